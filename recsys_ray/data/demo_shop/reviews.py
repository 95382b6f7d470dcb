"""The words of reviews: some about attributes in shoppers' own words, some about nothing at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recsys_ray.data.demo_shop.config import Clarity
from recsys_ray.data.demo_shop.products import Product
from recsys_ray.data.demo_shop.streams import Dice
from recsys_ray.data.demo_shop.vocabulary import Words, formulary, phrases


@dataclass(frozen=True)
class Told:
    """A review's words and what they tell."""

    title: str
    text: str
    says_kind: bool
    facets: tuple[str, ...]         # attributes spoken of, truly or not
    concern: str | None             # the concern spoken of
    generic: bool = False           # fits any product


def mood_of(rating: int) -> str:
    """high, middle or low."""
    return "high" if rating >= 4 else "middle" if rating == 3 else "low"


def generic_review(rating: int, roll: Dice) -> Told:
    """Words that fit any product."""
    spoken, mood = phrases(), mood_of(rating)
    parts = [roll.pick(spoken["generic"][mood])]
    if roll.chance(0.35):
        parts.append(roll.pick(spoken["generic"][mood]))
    while roll.chance(0.3) and len(parts) < 5:
        parts.append(roll.pick(spoken["generic_more"]))
    text = " ".join(part if part[-1] in ".!" else part + "." for part in parts)
    return Told(roll.pick(spoken["titles"][mood]), register(text, roll, 0.05), False, (), None, generic=True)


def told_review(product: Product, wants: Sequence[int], rating: int, clear: Clarity, roll: Dice) -> Told:
    """Words about a product; `wants` are the concerns of the reviewer, whom the product helped or not."""
    spoken, mood = phrases(), mood_of(rating)
    says_kind = roll.chance(clear.say_type)
    kind = shopper_word(product.kind.words, clear, roll)
    opener = roll.pick(spoken["openers"][mood]).replace("{t}", kind) if says_kind else \
        roll.pick(spoken["plain_openers"][mood])
    facets = _spoken_facets(product, clear, roll)
    concern, about_concern = _about_concern(product, wants, roll)
    if not facets and not concern and not says_kind:
        facets = [roll.pick([at for at, value in enumerate(product.values) if value >= 0])]
    sentences = [_statement(product, at, clear, roll) for at in facets] + about_concern
    if roll.chance(clear.say_brand):
        sentences.append(roll.pick(spoken["brand_sayings"]).replace("{b}", product.brand))
    if roll.chance(clear.say_line):
        sentences.append(roll.pick(spoken["line_sayings"]).replace("{l}", product.line))
    while roll.chance(clear.filler) and len(sentences) < 9:
        sentences.insert(roll.below(len(sentences) + 1), roll.pick(spoken["fillers"][product.department.key]))
    if roll.chance(clear.filler / 2):
        sentences.append(roll.pick(spoken["fillers"]["any"]))
    if roll.chance(clear.filler / 2):
        sentences.append(roll.pick(spoken["closers"][mood]))
    title = _title(product, facets, kind, clear, roll, mood)
    text = register(" ".join([opener, *sentences]), roll, clear.typo)
    return Told(title, text, says_kind, tuple(product.department.facets[at].key for at in facets), concern)


def shopper_word(words: Words, clear: Clarity, roll: Dice) -> str:
    """How a shopper calls it: now and then as the catalogue does."""
    if roll.chance(clear.catalogue_words):
        return roll.pick(words.catalogue).lower()
    return roll.mostly_first(words.shopper)


def _spoken_facets(product: Product, clear: Clarity, roll: Dice) -> list[int]:
    present = [at for at, value in enumerate(product.values) if value >= 0]
    chance = min(1.0, clear.say_facets / len(present))
    return [at for at in present if roll.chance(chance)]


def _statement(product: Product, at: int, clear: Clarity, roll: Dice) -> str:
    facet = product.department.facets[at]
    value = roll.below(len(facet.values)) if roll.chance(clear.wrong_facet) else product.values[at]
    said = roll.pick(facet.sayings).replace("{w}", shopper_word(facet.words[value], clear, roll))
    return said[0].upper() + said[1:] + "."


def _about_concern(product: Product, wants: Sequence[int], roll: Dice) -> tuple[str | None, list[str]]:
    """What a beauty product did: reviewers speak of their own concern first."""
    if not product.claims or not roll.chance(0.55):
        return None, []
    mine = [at for at in product.claims if at in wants] or list(product.claims)
    at = roll.pick(mine)
    concern = formulary().concerns[at]
    said = roll.pick(concern.works if at in product.helps else concern.fails)
    said = said.replace("{w}", roll.mostly_first(concern.words.shopper))
    return concern.key, [said[0].upper() + said[1:] + "."]


def _title(product: Product, facets: Sequence[int], kind: str, clear: Clarity, roll: Dice, mood: str) -> str:
    spoken = phrases()
    if not facets or not roll.chance(0.3):
        return str(roll.pick(spoken["titles"][mood]))
    at = roll.pick(facets)
    word = shopper_word(product.department.facets[at].words[product.values[at]], clear, roll)
    title = roll.pick(spoken["specific_titles"]).replace("{w}", word).replace("{t}", kind)
    return str(title[0].upper() + title[1:])


def register(text: str, roll: Dice, typo: float) -> str:
    """The way this reviewer types."""
    if typo and roll.chance(typo):
        for right, wrong in phrases()["typos"].items():
            text = text.replace(f" {right} ", f" {wrong} ")
    style = roll.below(100)
    if style < 22:
        return text.lower()
    if style < 30:
        return text.lower().replace(".", "").replace("!", "")
    if style < 38:
        return text.replace(".", "!")
    if style < 41:
        return text.upper()
    return text
