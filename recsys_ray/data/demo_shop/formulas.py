"""Ingredient lists in INCI order, and what they do: actives, antagonists, and the effect of the order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recsys_ray.data.demo_shop.streams import Dice
from recsys_ray.data.demo_shop.vocabulary import Concern, Formulary

LATE = 0.5          # an ingredient beyond this part of the list is there in traces only
TRACE = 0.2         # of the full effect
SPOILED = 0.2       # of the effect, with an antagonist that is not in traces
EFFECTIVE = 0.5     # strength from which a product helps
P_LATE, P_SPOILED = 0.22, 0.22


@dataclass(frozen=True)
class Effect:
    """What a list does against one concern."""

    concern: str
    strength: float             # 0: nothing, 1: one active in full strength
    actives: list[str]
    antagonists: list[str]

    @property
    def helps(self) -> bool:
        """Whether the product helps."""
        return self.strength >= EFFECTIVE


def ingredients(dice: Dice, base: str, scent: str, aims: Sequence[Concern], formulary: Formulary) -> list[str]:
    """An ingredient list for a product that is meant against `aims`; some makers get it wrong.

    An active may come so late that it is there in traces, and an antagonist may spoil it.
    """
    early: list[str] = []
    late: list[str] = []
    for concern in aims:
        (late if dice.chance(P_LATE) else early).append(dice.pick(concern.actives))
        if dice.chance(P_SPOILED):
            early.append(dice.pick(sorted(concern.antagonists)))
        elif dice.chance(0.15):         # harmless: an antagonist in traces
            late.append(dice.pick(sorted(concern.antagonists)))
    start = dice.below(len(formulary.fillers))
    fillers = [formulary.fillers[(start + step) % len(formulary.fillers)] for step in range(6 + dice.below(5))]
    half = len(fillers) // 4
    listed = [*formulary.bases[base], *early, *fillers[:half]]
    tail = [*fillers[half:], *late, *formulary.scents.get(scent, ()), dice.pick(formulary.preservatives)]
    return list(dict.fromkeys([*listed, *_lengthened(tail, len(listed), formulary)]))


def _lengthened(tail: list[str], head: int, formulary: Formulary) -> list[str]:
    """`tail` with enough fillers before its end that everything planted late is in the second half."""
    more = [one for one in formulary.fillers if one not in tail][: max(0, head + 2 - len(tail))]
    return [*more, *tail]


def effects(listed: Sequence[str], concerns: Sequence[Concern]) -> list[Effect]:
    """What an ingredient list does against each concern: a function of the list and its order alone."""
    bound = len(listed) * LATE
    found = []
    for concern in concerns:
        actives = [one for one in listed if one in concern.actives]
        spoilers = [one for at, one in enumerate(listed) if one in concern.antagonists and at < bound]
        strength = sum(1.0 if listed.index(one) < bound else TRACE for one in actives)
        found.append(Effect(concern.key, strength * (SPOILED if spoilers else 1.0), actives, spoilers))
    return found
