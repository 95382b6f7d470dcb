"""What a product's words say of its looks: kind of garment, material, pattern, neckline, sleeve, and where they say it.

A value is read from the first place (its own field, title, features, description) that names one and is null where none
does. What a text denies ("not leather", "leather-free"), imitates ("faux silk") or says of another garment ("pair it
with leather boots") is not read. The words are `attribute_schema`'s tables.

The kind "graphic" is a pattern by policy: it is written where kinds are written, but it is no kind that two products
could share. `category_of` is the one place that says so.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from recsys_ray.data.attribute_schema import NAMES, AttributeRules, AttributeSchema
from recsys_ray.data.phrases import PhraseTable, Span, Token, longest, tokens
from recsys_ray.data.product_groups import DEFAULT, GroupConfig, Groups, find_groups
from recsys_ray.data.product_groups import group_keys as group_keys
from recsys_ray.schema import ATTRIBUTE_ROW, conform

GRAPHIC = "graphic"
PATH_SEPARATOR = ">"
MAX_KNOWN = 100_000
COMES_WITH = frozenset(("with", "w", "matching", "includes", "including", "plus", "no", "without"))
READ_COLUMNS = ("title", "brand", "categories", "attributes", "features", "description")
Key = tuple[str, str, str]          # (what the phrase does, attribute, value)
Row = Mapping[str, Any]


def is_graphic(category2: str | None) -> bool:
    """Whether a kind is the pattern "graphic", which is no category match and is left out of category figures."""
    return category2 == GRAPHIC


def category_of(category2: str | None) -> str | None:
    """The kind of garment that two products may share: None where it is not known, or only "graphic"."""
    return None if is_graphic(category2) else category2


def value_of(row: Row, name: str) -> str | None:
    """An attribute of an ATTRIBUTE_ROW as it is compared: the kind by `category_of`, the others as they are."""
    return category_of(row[name]) if name == "category2" else row[name]


def split_of_group(key: str, seed: int, train: float = 0.7, valid: float = 0.15) -> str:
    """"train", "valid" or "test" of a group, by its key alone, so that every stage finds the same.

    A product without a group is asked for by its product_id.
    """
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64
    return "train" if place < train else "valid" if place < train + valid else "test"


@dataclass(frozen=True)
class Reading:
    """A value and where it was read."""

    value: str
    place: str
    words: str

    def evidence(self, name: str) -> str:
        """As in the column `evidence`."""
        return f'{name}: {self.value}, in {self.place} ("{self.words}")'


@dataclass(frozen=True)
class _Named:
    """A value that a text names."""

    value: str
    words: str
    percent: float | None


@dataclass
class AttributeReader:
    """Applies a schema to products; counts the fields whose content no value knows."""

    schema: AttributeSchema
    unknown: Counter[tuple[str, str]] = field(init=False, default_factory=Counter)   # (attribute, content of its field)
    _phrases: PhraseTable[Key] = field(init=False, default_factory=PhraseTable)
    _known: dict[str, dict[str, list[_Named]]] = field(init=False, default_factory=dict)     # of short texts

    def __post_init__(self) -> None:
        for name, rules in self.schema.attributes.items():
            for value, phrases in rules.values.items():
                self._add(phrases, "value", name, value)
            self._add(rules.misleading, "misleading", name)
            self._add(rules.departments, "department", name)
            self._add(rules.other_goods, "other goods", name)
            self._add(rules.imitation.before, "before", name)
            self._add(rules.imitation.after, "after", name)
        words = self.schema.language
        for kind in ("before", "after", "until", "harmless"):
            self._add(getattr(words.negation, kind), f"negation {kind}", "")
        self._add(words.elsewhere, "elsewhere", "")

    def _add(self, phrases: Iterable[str], kind: str, name: str, value: str = "") -> None:
        for phrase in phrases:
            self._phrases.add(phrase, (kind, name, value))

    def named(self, text: str) -> dict[str, list[_Named]]:
        """What a text says of each attribute, in its order; nothing that it denies, imitates or says of another."""
        words = tokens(text)
        spans = self._phrases.find(words)
        if not any(one.key[0] == "value" for one in spans):
            return {}
        meant = {name: [one for one in longest([one for one in spans if one.key[1] == name and
                                                one.key[0] in ("value", "misleading")]) if one.key[0] == "value"]
                 for name in NAMES}
        undone = _Undone(words, spans, [one for part in meant.values() for one in part],
                         self.schema.language.negation.reach)
        found: dict[str, list[_Named]] = {}
        for name, part in meant.items():
            for one in part:
                if not undone.says(one, name):
                    said = text[words[one.start].start : words[one.stop - 1].stop]
                    found.setdefault(name, []).append(_Named(one.key[2], said, _percent(words, one, part)))
        return found

    def read(self, product: Row) -> dict[str, Reading]:
        """The value of each attribute that a product's words tell."""
        texts = _texts(product)
        levels = [level.strip() for one in product.get("categories") or () for level in one.split(PATH_SEPARATOR)]
        named = {place: self.named(text) for place, text in texts.items()}
        found: dict[str, Reading] = {}
        for name, rules in self.schema.attributes.items():
            for place in rules.read:
                if place == "category":
                    reading = self._of_levels(levels, name, rules, named["title"])
                elif name == "category2" and not self._may_be_a_garment(levels, texts["title"]):
                    reading = None
                elif place == "attributes":
                    reading = self._of_fields(product.get("attributes"), name, rules)
                else:
                    reading = _decided(named.get(place, {}).get(name, []), rules, place)
                if reading is not None:
                    found[name] = reading
                    break
        if "category2" in found and is_graphic(found["category2"].value):
            found.setdefault("pattern", Reading(GRAPHIC, "category2", found["category2"].words))
        return found

    def _short(self, text: str) -> dict[str, list[_Named]]:
        """What a level of a path or a field says: there are few, and they come again."""
        if text not in self._known and len(self._known) < MAX_KNOWN:
            self._known[text] = self.named(text)
        return self._known.get(text) or self.named(text)

    def _of_levels(self, levels: Sequence[str], name: str, rules: AttributeRules, title: dict[str, list[_Named]]
                   ) -> Reading | None:
        """The most specific level that names a value; of several on one shelf ("Coats & Vests") the title's."""
        in_title = {one.value for one in title.get(name, ())}
        style: Reading | None = None
        for level in reversed(levels):
            found = self._short(level).get(name, [])
            told = [one for one in found if one.value in in_title]
            reading = self._own_name(level, rules, "category") or _decided(told or found, rules, "category")
            if reading is not None and level.casefold() not in rules.styles:
                return reading
            style = style or reading
        return style

    def _own_name(self, text: str, rules: AttributeRules, place: str) -> Reading | None:
        """A level or field that is nothing but a value's name."""
        value = text.strip().casefold()
        return Reading(value, place, text.strip()) if value in rules.values else None

    def _may_be_a_garment(self, levels: Sequence[str], title: str) -> bool:
        """Whether fields and title may name the kind: no path but one of garments, and a title of no other goods."""
        if levels and not any(one.key[0] == "department" for level in levels
                              for one in self._phrases.find(tokens(level))):
            return False
        words = tokens(title)
        return all(one.key[0] != "other goods" or COMES_WITH & {word.word for word in words[max(0, one.start - 3) :
                                                                                            one.start]}
                   for one in self._phrases.find(words))

    def _of_fields(self, attributes: Any, name: str, rules: AttributeRules) -> Reading | None:
        for key, content in dict(attributes or ()).items():
            if not content or key.strip().casefold() not in rules.fields:
                continue
            place = f"field {key}"
            for text in (content, f"{content} {rules.noun}"):
                reading = self._own_name(text, rules, place) or _decided(self._short(text).get(name, []), rules, place)
                if reading is not None:
                    return reading
            self.unknown[name, content.strip().casefold()] += 1
        return None


@dataclass(frozen=True)
class _Undone:
    """Which values of a text do not hold."""

    words: Sequence[Token]
    spans: Sequence[Span[Key]]
    values: Sequence[Span[Key]]
    reach: int

    def says(self, value: Span[Key], name: str) -> bool:
        """Whether the value is denied, imitated or another garment's."""
        return self._beside(value, name) or self._elsewhere(value) or any(
            self._reaches(one, value) for one in self._of("negation before") if not self._part_of_another(one))

    def _of(self, kind: str, name: str = "") -> list[Span[Key]]:
        return [one for one in self.spans if one.key[:2] == (kind, name)]

    def _beside(self, value: Span[Key], name: str) -> bool:
        clause = self.words[value.start].clause
        before = any(one.stop == value.start and self.words[one.start].clause == clause
                     for one in self._of("before", name))
        return before or any(one.start == value.stop and self.words[one.start].clause == clause
                             for one in (*self._of("after", name), *self._of("negation after")))

    def _elsewhere(self, value: Span[Key]) -> bool:
        sentence = self.words[value.start].sentence
        return any(one.stop <= value.start and self.words[one.start].sentence == sentence
                   for one in self._of("elsewhere"))

    def _part_of_another(self, negator: Span[Key]) -> bool:
        """"no" in "no iron" or in the value "no sleeves" denies nothing further."""
        return any(one.start <= negator.start and negator.stop <= one.stop
                   for one in (*self._of("negation harmless"), *self.values))

    def _reaches(self, negator: Span[Key], value: Span[Key]) -> bool:
        between = range(negator.stop, value.start)
        same = negator.stop <= value.start and self.words[negator.start].clause == self.words[value.start].clause
        return same and len(between) < self.reach and not any(
            one.start in between for one in self._of("negation until"))


def _percent(words: Sequence[Token], span: Span[Key], others: Sequence[Span[Key]]) -> float | None:
    """The percentage stated of a value: at most two words before it ("60% organic cotton"), else directly after.

    One that stands before or behind another value belongs to that one.
    """
    taken = {at for one in others for at in range(one.start, one.stop)}
    for at in (span.start - 1, span.start - 2):
        if at < 0 or at in taken or words[at].clause != words[span.start].clause:
            break
        if words[at].word.endswith("%"):
            return _number(words[at])
    after = words[span.stop] if span.stop < len(words) else None
    if after is None or not after.word.endswith("%") or after.clause != words[span.start].clause:
        return None
    return None if {span.stop + 1, span.stop + 2} & taken else _number(after)


def _number(percent: Token) -> float:
    return float(percent.word.rstrip("% ").replace(",", "."))


def _decided(named: Sequence[_Named], rules: AttributeRules, place: str) -> Reading | None:
    """The value of one place, or None where it names none, or several and the rules do not choose."""
    largest = max((one.percent for one in named if one.percent is not None), default=None)
    left = [one for one in named if one.percent is None or one.percent == largest]
    if not left or (len({one.value for one in left}) > 1 and rules.several == "undecided"):
        return None
    order = list(rules.values)
    chosen = min(left, key=lambda one: order.index(one.value))
    return Reading(chosen.value, place, chosen.words)


def _texts(product: Row) -> dict[str, str]:
    """Title, features and description; the brand's name tells nothing of the garment."""
    parts = {"title": [product.get("title")], "features": product.get("features") or [],
             "description": [product.get("description")]}
    brand = (product.get("brand") or "").strip()
    joined = {place: "\n".join(one for one in texts if one) for place, texts in parts.items()}
    if brand:
        name = re.compile(rf"(?<!\w){re.escape(brand)}(?!\w)", re.IGNORECASE)
        joined = {place: name.sub("|", text) for place, text in joined.items()}
    return joined


def read_values(products: pa.Table, reader: AttributeReader) -> pa.Table:
    """ATTRIBUTE_ROW rows of products, in their order, without their groups."""
    names = ["product_id", *(name for name in READ_COLUMNS if name in products.column_names)]
    rows = []
    for product in products.select(names).to_pylist():
        found = reader.read(product)
        rows.append({"product_id": product["product_id"], **{name: one.value for name, one in found.items()},
                     "evidence": [one.evidence(name) for name, one in found.items()]})
    return conform(pa.Table.from_pylist(rows, schema=ATTRIBUTE_ROW), ATTRIBUTE_ROW, "attributes")


def with_groups(rows: pa.Table, groups: Groups) -> pa.Table:
    """ATTRIBUTE_ROW rows with the group of each."""
    columns = {"group_key": groups.keys, "group_confidence": groups.confidences}
    return pa.table({name: columns.get(name, rows[name]) for name in ATTRIBUTE_ROW.names}, schema=ATTRIBUTE_ROW)


def read_attributes(products: pa.Table, schema: AttributeSchema, images: pa.Table | None = None,
                    groups: GroupConfig = DEFAULT) -> pa.Table:
    """ATTRIBUTE_ROW rows of products, in their order.

    `products` has product_id and any of title, brand, categories, attributes, features, description, image_urls and
    group_id (of near-duplicates); `images` (IMAGE without bytes) helps to find groups.
    """
    return with_groups(read_values(products, AttributeReader(schema)), find_groups(products, images, groups))
