"""Which concerns a product addresses, by rules of its category and its ingredients, with the rules that say so.

A concern is *labelled* 1 where a rule speaks for it, 0 where one speaks against it (a category that excludes the
concern, or an ingredient that works against it), and null where rules contradict each other or none speaks. What null
means in training is the mode's decision: `targets`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.data.concern_rulebook import IngredientRule, Rulebook, ingredient_id, kind_id
from recsys_ray.data.ingredients import Ingredient, parse_ingredients
from recsys_ray.data.phrases import singular

Mode = Literal["seed", "positive_unlabelled"]
PATH_SEPARATOR = " > "      # between the levels of a category
LABELS = pa.schema([        # CONCERN_LABEL before the split
    pa.field("product_id", pa.string(), nullable=False), pa.field("concern", pa.string(), nullable=False),
    pa.field("label", pa.int8()), pa.field("rules", pa.list_(pa.string()), nullable=False),
    pa.field("conflict", pa.bool_(), nullable=False), pa.field("held_out", pa.bool_(), nullable=False)])


@dataclass(frozen=True)
class Verdict:
    """The rules that spoke about one product and concern."""

    speaks_for: tuple[str, ...] = ()
    against: tuple[str, ...] = ()

    @property
    def rules(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.speaks_for, *self.against)

    @property
    def conflict(self) -> bool:
        """Whether they contradict each other."""
        return bool(self.speaks_for and self.against)

    @property
    def label(self) -> int | None:
        """1, 0, or None where no rule spoke or two contradict each other."""
        return None if self.conflict or not self.rules else int(bool(self.speaks_for))

    def without(self, withheld: Collection[str]) -> Verdict:
        """The same without some rules."""
        return Verdict(tuple(one for one in self.speaks_for if one not in withheld),
                       tuple(one for one in self.against if one not in withheld))


@dataclass
class Labeller:
    """Applies a rulebook to products; remembers what it found of each category."""

    rulebook: Rulebook
    _phrases: list[tuple[tuple[str, ...], str]] = field(init=False)
    _by_ingredient: dict[str, list[str]] = field(init=False)
    _kinds: dict[str, tuple[str, ...]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._phrases = [(_words(phrase), name) for name, kind in self.rulebook.kinds.items() for phrase in kind.words]
        self._by_ingredient = {}
        for name, rule in self.rulebook.rules.items():
            for one in dict.fromkeys(rule.ingredients):
                self._by_ingredient.setdefault(one, []).append(name)

    def kinds(self, category: str | None, title: str) -> tuple[str, ...]:
        """The kinds of product that the most specific level of the category names; without a category, the title's."""
        if category is None:
            return self._named(title)
        found = self._kinds.get(category)
        if found is None:
            levels = reversed(category.split(PATH_SEPARATOR.strip()))
            found = self._kinds[category] = next(filter(None, map(self._named, levels)), ())
        return found

    def _named(self, text: str) -> tuple[str, ...]:
        """Kinds whose words are in the text; one inside a longer name of another kind is not meant ("eye *serum*")."""
        words = _words(text)
        spans = [(start, start + len(phrase), name) for phrase, name in self._phrases
                 for start in range(len(words) - len(phrase) + 1) if words[start : start + len(phrase)] == phrase]
        meant = [name for start, stop, name in spans
                 if not any(low <= start and stop <= high and high - low > stop - start for low, high, _ in spans)]
        return tuple(dict.fromkeys(meant))

    def verdicts(self, kinds: Sequence[str], ingredients: Sequence[Ingredient]) -> dict[str, Verdict]:
        """The verdict on every concern of the rulebook."""
        named = [(name, self.rulebook.kinds[name]) for name in kinds]
        pros: dict[str, list[str]] = {concern: [] for concern in self.rulebook.concerns}
        cons: dict[str, list[str]] = {concern: [] for concern in self.rulebook.concerns}
        for name, kind in named:
            _add(pros, kind.speaks_for, kind_id(name))
            _add(cons, kind.against, kind_id(name))
        excluded = {concern for _, kind in named for concern in kind.against}
        for name, rule in self._speaking({kind.use for _, kind in named}, ingredients):
            _add(pros, [one for one in rule.speaks_for if one not in excluded], ingredient_id(name))
            _add(cons, rule.against, ingredient_id(name))
        return {concern: Verdict(tuple(pros[concern]), tuple(cons[concern])) for concern in pros}

    def _speaking(self, uses: Collection[str], ingredients: Sequence[Ingredient]
                  ) -> Iterable[tuple[str, IngredientRule]]:
        """The ingredient rules that hold for the list, each once, in the order of the list."""
        line = next((at for at, one in enumerate(ingredients) if one.name in self.rulebook.one_percent_line),
                    len(ingredients))
        spoken: dict[str, IngredientRule] = {}
        for at, one in enumerate(ingredients):
            for name in self._by_ingredient.get(one.name, ()) if not one.may_contain else ():
                rule = self.rulebook.rules[name]
                enough = one.percent is None or rule.at_least is None or one.percent >= rule.at_least
                above = not rule.above_one_percent or at < line or (one.percent or 0) >= 1
                if enough and above and any(use in uses for use in rule.where):
                    spoken.setdefault(name, rule)
        return spoken.items()

    def read(self, product: Mapping[str, Any]) -> dict[str, Verdict]:
        """The verdicts on a row with title, category and ingredients (as in CONCERN_PRODUCT)."""
        listed = parse_ingredients(product["ingredients"] or "", self.rulebook.synonyms)
        return self.verdicts(self.kinds(product["category"], product["title"] or ""), listed)


def _add(sides: dict[str, list[str]], concerns: Iterable[str], rule_id: str) -> None:
    for concern in concerns:
        if concern in sides and rule_id not in sides[concern]:
            sides[concern].append(rule_id)


def _words(text: str) -> tuple[str, ...]:
    return tuple(map(singular, re.findall(r"[^\W_]+", text.lower())))


def label_products(products: pa.Table, labeller: Labeller, withheld: Collection[str] = ()) -> pa.Table:
    """LABELS rows, one for each product and concern, in the order of both.

    A label that withheld rules alone have made is `held_out`. `products` has product_id, title, category and
    ingredients; errors: `RuleError` for a withheld rule that the tables do not have.
    """
    labeller.rulebook.check_rules(withheld)
    rows = []
    for product in products.select(["product_id", "title", "category", "ingredients"]).to_pylist():
        for concern, verdict in labeller.read(product).items():
            rows.append({"product_id": product["product_id"], "concern": concern, "label": verdict.label,
                         "rules": list(verdict.rules), "conflict": verdict.conflict,
                         "held_out": verdict.label is not None and not verdict.without(withheld).rules})
    return pa.Table.from_pylist(rows, schema=LABELS)


def targets(labels: pa.Table, mode: Mode) -> npt.NDArray[np.float32]:
    """1, 0, or NaN = masked, for each row of a CONCERN_LABEL table: what training and evaluation may count.

    `seed`: what no rule labelled is negative. `positive_unlabelled`: it is masked. In both, contradictions are masked,
    and labels of withheld rules are masked but in test, where they count.
    """
    label: npt.NDArray[np.float32] = labels["label"].cast(pa.float32()).to_numpy().astype(np.float32)
    conflict, held_out = (pc.fill_null(labels[name], False).to_numpy(zero_copy_only=False).astype(bool)
                          for name in ("conflict", "held_out"))
    if mode == "seed":
        label[np.isnan(label) & ~conflict] = 0.0
    tested = pc.equal(labels["split"], "test").to_numpy(zero_copy_only=False)
    label[held_out & ~tested] = np.nan
    return label
