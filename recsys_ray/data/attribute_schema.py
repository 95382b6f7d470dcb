"""The tables of what a garment looks like: YAML files that a merchandiser reads and edits -> one checked schema.

A folder holds one file for each attribute and language.yaml (negation, words that speak of another garment), or some of
them; later folders add to earlier ones, and a value that comes again replaces what was there. So a shop's own words are
a small folder beside the packaged one, and no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from recsys_ray.config import Config, fingerprint
from recsys_ray.data.phrases import words_of
from recsys_ray.data.rule_files import PACKAGED, read_rules

FOLDER = Path(__file__).parent / "attribute_rules"
LANGUAGE = "language"
NAMES = ("category2", "material", "pattern", "neckline", "sleeve")
FILES = tuple(f"{name}.yaml" for name in (*NAMES, LANGUAGE))
Place = Literal["category", "attributes", "title", "features", "description"]


class AttributeSchemaError(ValueError):
    """Attribute tables that cannot be used; the message names the file and the key."""


class Imitation(Config):
    """Words directly beside a value's words which say that the garment is not made of it."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


class AttributeRules(Config):
    """One attribute: its values and the words of each."""

    about: str
    fields: tuple[str, ...] = ()                # of the product's own table of attributes, e.g. "Fabric type"
    read: tuple[Place, ...] = Field(min_length=1)           # the first place that decides counts
    several: Literal["first_listed", "undecided"]           # what a place means that names two values
    noun: str = ""                              # put after a field that names no value by itself ("Neckline: Round")
    departments: tuple[str, ...] = ()           # category2: where the title may be read although there is a path
    styles: tuple[str, ...] = ()                # levels that tell a style below one that names a kind
    other_goods: tuple[str, ...] = ()           # category2: a title that names one is of no garment
    values: dict[str, tuple[str, ...]] = Field(min_length=1)
    misleading: tuple[str, ...] = ()            # phrases that hold the words and do not mean them
    imitation: Imitation = Imitation()


class Negation(Config):
    """How a text denies."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    until: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    reach: int = Field(default=4, ge=1, le=12)


class Language(Config):
    """Words that hold for every attribute."""

    negation: Negation = Negation()
    elsewhere: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttributeSchema:
    """Checked tables: the rules of each attribute in the order of `NAMES`, and the words of denial."""

    attributes: Mapping[str, AttributeRules]
    language: Language
    digest: str                                 # of everything the tables say

    def values(self, name: str) -> tuple[str, ...]:
        """The values of an attribute, in the order of its file."""
        return tuple(self.attributes[name].values)


def load_schema(folders: Sequence[str | Path] = (PACKAGED,)) -> AttributeSchema:
    """The tables of some folders; `packaged` names the ones that come with the library.

    Errors: `AttributeSchemaError` naming the folder, file and key: a missing folder, a file that is none of ours, a
    value without words, one phrase of two values.
    """
    merged: dict[str, dict[str, Any]] = {}
    for folder in folders:
        root = FOLDER if str(folder) == PACKAGED else Path(folder)
        for path, values in read_rules(root, FILES, "an attribute table", AttributeSchemaError):
            _merge(merged.setdefault(path.stem, {}), values)
    if missing := [name for name in NAMES if name not in merged]:
        raise AttributeSchemaError(f"rules of {', '.join(map(str, folders))}: no {missing[0]}.yaml; there are five "
                                   f"attributes: {', '.join(NAMES)}. Put {PACKAGED!r} first to add to ours")
    attributes = {name: _checked(name, merged[name], AttributeRules) for name in NAMES}
    language = _checked(LANGUAGE, merged.get(LANGUAGE, {}), Language)
    for name, rules in attributes.items():
        _check_phrases(name, rules)
    document = {"language": language.model_dump(mode="json"),
                **{name: list(rules.model_dump(mode="json").items()) for name, rules in attributes.items()},
                "order": {name: list(rules.values) for name, rules in attributes.items()}}
    return AttributeSchema(attributes, language, fingerprint(document))


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        before = into.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            _merge(before, value) if key != "values" else before.update(value)
        elif isinstance(value, list) and isinstance(before, list) and key != "read":
            into[key] = [*before, *value]
        else:
            into[key] = value


def _checked(name: str, values: Mapping[str, Any], kind: type[Any]) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        hint = ' (YAML reads no, yes, on and off as true or false: write "no")' if isinstance(
            problem["input"], bool) else ""
        raise AttributeSchemaError(f"{name}.yaml: {place}: {problem['msg']}{hint}") from None


def _check_phrases(name: str, rules: AttributeRules) -> None:
    owner: dict[tuple[str, ...], str] = {}
    for value, phrases in rules.values.items():
        if not phrases:
            raise AttributeSchemaError(f"{name}.yaml: values.{value}: no words; a value is found by its words")
        for phrase in phrases:
            words = words_of(phrase)
            if not words:
                raise AttributeSchemaError(f"{name}.yaml: values.{value}: {phrase!r} has no word")
            other = owner.setdefault(words, value)
            if other != value:
                raise AttributeSchemaError(f"{name}.yaml: {phrase!r} belongs to {other!r} and to {value!r}; keep one")
