"""The rule tables of concerns: YAML files that a cosmetic chemist reads and edits -> one checked `Rulebook`.

A folder holds concerns.yaml, categories.yaml, ingredients.yaml and synonyms.yaml, or some of them; later folders add
to earlier ones, and a key that comes again replaces what was there. So a shop's own concern is a small folder beside
the packaged one, and no code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from recsys_ray.config import Config, fingerprint
from recsys_ray.data.ingredients import Synonyms
from recsys_ray.data.rule_files import PACKAGED, read_rules

FOLDER = Path(__file__).parent / "concern_rules"
FILES = ("concerns.yaml", "categories.yaml", "ingredients.yaml", "synonyms.yaml")


class RuleError(ValueError):
    """Rule tables that cannot be used, or a concern or rule that they do not have; the message names the known ones."""


class ConcernWords(Config):
    """What a shopper calls a concern."""

    query: str = Field(min_length=1)
    paraphrases: tuple[str, ...] = ()


class _Speaks(Config):
    speaks_for: tuple[str, ...] = Field(default=(), alias="for")
    against: tuple[str, ...] = ()
    source: str = Field(min_length=10)      # who says so
    verified: bool = False                  # whether the source was read and does say so

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if both := sorted({*self.speaks_for} & {*self.against}):
            raise ValueError(f"for and against {both[0]!r}: a rule speaks for one side")
        return self


class Kind(_Speaks):
    """A kind of product, found by the words of its category."""

    words: tuple[str, ...] = Field(min_length=1)
    use: str


class IngredientRule(_Speaks):
    """What an ingredient does, and where."""

    ingredients: tuple[str, ...] = Field(min_length=1)
    where: tuple[str, ...] = Field(min_length=1)
    above_one_percent: bool = False
    at_least: float | None = Field(default=None, gt=0, le=100)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.speaks_for and not self.against:
            raise ValueError("speaks neither for nor against a concern")
        return self


class _Line(Config):
    ingredients: tuple[str, ...]
    source: str = Field(min_length=10)


class _Group(Config):
    source: str = Field(min_length=10)
    names: dict[str, tuple[str, ...]]


class _Tables(Config):
    concerns: dict[str, ConcernWords]
    uses: tuple[str, ...]
    kinds: dict[str, Kind]
    one_percent_line: _Line
    rules: dict[str, IngredientRule]
    groups: tuple[_Group, ...]


@dataclass(frozen=True)
class Rulebook:
    """Checked rule tables. Rule ids are `category/<kind>` and `ingredient/<rule>`."""

    concerns: Mapping[str, ConcernWords]
    kinds: Mapping[str, Kind]
    rules: Mapping[str, IngredientRule]     # their ingredients under canonical names
    one_percent_line: frozenset[str]
    synonyms: Synonyms
    digest: str                             # of everything the tables say

    @property
    def rule_ids(self) -> list[str]:
        """The id of every rule that speaks, categories first."""
        return [*(kind_id(name) for name, one in self.kinds.items() if one.speaks_for or one.against),
                *(ingredient_id(name) for name in self.rules)]

    @property
    def active_names(self) -> frozenset[str]:
        """The ingredients that some rule speaks of."""
        return frozenset(name for rule in self.rules.values() for name in rule.ingredients)

    def select(self, concerns: Sequence[str]) -> Rulebook:
        """The same tables for these concerns alone (none named: all), in the order given."""
        self.check_concerns(concerns)
        return replace(self, concerns={name: self.concerns[name] for name in concerns}) if concerns else self

    def check_concerns(self, names: Iterable[str]) -> None:
        """Nothing; raises `RuleError` for a concern that the tables do not have."""
        for name in names:
            if name not in self.concerns:
                raise RuleError(f"unknown concern {name!r}; the rule tables know {', '.join(self.concerns)}. "
                                "A concern of your own goes into concerns.yaml of a further rule folder")

    def check_rules(self, ids: Iterable[str]) -> None:
        """Nothing; raises `RuleError` for a rule id that the tables do not have."""
        known = self.rule_ids
        for one in ids:
            if one not in known:
                near = difflib.get_close_matches(one, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"ids look like {known[0]!r} and {known[-1]!r}"
                raise RuleError(f"unknown rule {one!r}; {hint}")


def kind_id(name: str) -> str:
    """The rule id of a kind of product."""
    return f"category/{name}"


def ingredient_id(name: str) -> str:
    """The rule id of an ingredient rule."""
    return f"ingredient/{name}"


def load_rules(folders: Sequence[str | Path] = (PACKAGED,)) -> Rulebook:
    """The rule tables of some folders; `packaged` names the ones that come with the library.

    Errors: `RuleError` naming the folder, file and key: a missing folder, a file that is none of ours, a rule without a
    source, of an unknown concern or use, or a spelling that belongs to two names.
    """
    merged: dict[str, Any] = {"concerns": {}, "uses": [], "kinds": {}, "rules": {}, "groups": []}
    for folder in folders:
        root = FOLDER if str(folder) == PACKAGED else Path(folder)
        for path, values in read_rules(root, FILES, "a rule table", RuleError):
            _merge(merged, values, path)
    try:
        tables = _Tables.model_validate(merged)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise RuleError(f"rules of {', '.join(map(str, folders))}: {'.'.join(map(str, problem['loc']))}: "
                        f"{problem['msg']}") from None
    return _checked(tables)


_KEYS = {"concerns.yaml": {"concerns"}, "categories.yaml": {"uses", "kinds"},
         "ingredients.yaml": {"one_percent_line", "rules"}, "synonyms.yaml": {"groups"}}


def _merge(merged: dict[str, Any], values: Mapping[str, Any], path: Path) -> None:
    for key, value in values.items():
        if key not in _KEYS[path.name]:
            raise RuleError(f"{path}: unknown key {key!r}; it holds {', '.join(sorted(_KEYS[path.name]))}")
        if isinstance(value, dict) and key != "one_percent_line":
            merged[key] = {**merged[key], **value}
        elif isinstance(value, list):
            merged[key] = [*merged[key], *value]
        else:
            merged[key] = value


def _checked(tables: _Tables) -> Rulebook:
    if not tables.concerns:
        raise RuleError("the rules name no concern; concerns.yaml lists them")
    known = set(tables.concerns)
    for rule_id, rule in [*((kind_id(name), kind) for name, kind in tables.kinds.items()),
                          *((ingredient_id(name), one) for name, one in tables.rules.items())]:
        if unknown := sorted({*rule.speaks_for, *rule.against} - known):
            raise RuleError(f"{rule_id}: unknown concern {unknown[0]!r}; concerns.yaml has {', '.join(sorted(known))}")
        uses = rule.where if isinstance(rule, IngredientRule) else (rule.use,) if isinstance(rule, Kind) else ()
        if strange := sorted(set(uses) - set(tables.uses)):
            raise RuleError(f"{rule_id}: unknown use {strange[0]!r}; categories.yaml has {', '.join(tables.uses)}")
    synonyms = _synonyms(tables)
    rules = {name: rule.model_copy(update={"ingredients": tuple(synonyms.find(one) or one for one in rule.ingredients)})
             for name, rule in tables.rules.items()}
    line = frozenset(synonyms.find(one) or one for one in tables.one_percent_line.ingredients)
    digest = fingerprint(tables.model_dump(mode="json"))
    return Rulebook(tables.concerns, tables.kinds, rules, line, synonyms, digest)


def _synonyms(tables: _Tables) -> Synonyms:
    """Every spelling of synonyms.yaml, and every name of the rules that is none of them."""
    spellings: dict[str, list[str]] = {}
    for group in tables.groups:
        for name, others in group.names.items():
            spellings.setdefault(name, []).extend(others)
    try:
        written = Synonyms(spellings)
        named = [*tables.one_percent_line.ingredients,
                 *(one for rule in tables.rules.values() for one in rule.ingredients)]
        return Synonyms({**spellings, **{one: () for one in named if not written.knows(one)}})
    except ValueError as error:
        raise RuleError(f"synonyms.yaml: {error}") from None
