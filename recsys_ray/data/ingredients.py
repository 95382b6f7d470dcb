"""Ingredient lists as packs and shops write them -> canonical INCI names in the order of the list.

The order is kept because it carries the amounts: descending weight down to 1 %, any order below, colourants
last (Regulation (EC) 1223/2009, article 19(1)(g)). Names that no table knows stay as written, in lower case.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

MAX_CHARS = 200_000         # of a list: what follows is not read
MANY = 300                  # ingredients: no pack has more
MAX_NAME_CHARS = 120        # a longer piece is prose
MIN_JUDGED = 5              # names from which on a list without one known name is none

_MARKS = re.compile(r"[*†‡§®™©℠°¹²³⁴\u200b-\u200f\ufeff\u00ad]")
_FOOTNOTE = re.compile(r"[.\n]\s*\*+\s*(?:certified|organic|ingredients? from|from|natural|denotes|indicates)[^\n]*$",
                       re.IGNORECASE)
_NUMBERED = re.compile(r"(?:^|\s)\d{1,3}[.)]\s+")
_TAG = re.compile(r"<[^<>]{0,200}>")
_LABEL = re.compile(
    r"\b(?:(?P<kind>active|inactive|in-active|other|medicinal|non-medicinal)\s+)?"
    r"(?:(?:full|key|all|complete|product)\s+)?"
    r"(?:ingredients?(?:\s+list)?|ingr[ée]dients|ingredientes|ingredienti|inhaltsstoffe|zutaten|inci)"
    r"\s*(?:\(inci\))?\s*[:：]\s*", re.IGNORECASE)
_END = re.compile(
    r"(?:^|[.\n;])\s*(?:directions?|how to use|to use|warnings?|cautions?|made in|manufactured|distributed|"
    r"keep out of|for external use|storage|store in|application)\b", re.IGNORECASE)
_MAY = re.compile(
    r"(?:(?P<open>[\[({])\s*)?(?:(?:may contain|peut contenir|kann enthalten|puede contener|può contenere)(?:\s*/\s*)?"
    r"|[\[(]?\+\s*/\s*[-–][\])]?|±)\s*[:：-]?", re.IGNORECASE)
_SENTENCE = re.compile(
    r"(?<!denat)(?<!DENAT)(?<!Denat)(?<!\bvar)(?<!\bno)(?<!\bssp)(?<!\bspp)(?<!\bvit)(?<!\bVit)(?<!\d)(?<!\bC)"
    r"(?<!\.I)\.\s+(?=[A-Z(])")
_DASH = re.compile(r" [-–—] ")
_AND = re.compile(r"\s*\(\s*(?:and|&)\s*\)\s*", re.IGNORECASE)
_LOCANT = re.compile(r"(?:^|[\s,(\[/-])\d{1,2}$")      # before a comma: "1" of 1,2-Hexanediol, "2" of 2,5 %
_NUMBER = re.compile(r"^\s*(?:\d{1,3}[.)]\s+|[-–*]\s+|(?:and|&|und|et)\s+)", re.IGNORECASE)
_PERCENT = re.compile(
    r"[\[(]?\s*(?<![\w.,])(?P<value>\d{1,3}(?:[.,]\d{1,4})?)\s*%\s*(?:w/w|w/v|v/v|by weight)?\s*[\])]?", re.IGNORECASE)
_INNER = re.compile(r"[\[({]([^\[\](){}]*)[\])}]")
_COLOUR = re.compile(r"^(?:c\.?\s*i\.?\s*)?(?:no\.?\s*)?(\d{5})(?::\d)?$", re.IGNORECASE)
_ORIGIN = re.compile(r"^(?:(?:certified|organic|organically grown|natural|pure|raw|cold[- ]pressed|refined|unrefined|"
                     r"virgin|extra virgin|micronized|encapsulated|nano)\s+)+")
_POLYMER = re.compile(r"polymer|copolyol|resin|esters?\b|glycerides\b")
_NOT = re.compile(r"\b(?:free (?:of|from)|without|no|zero|non|never|not|n't)\b", re.IGNORECASE)
_JOINED = re.compile(r"/| & | and ", re.IGNORECASE)
_SEPARATORS = frozenset(",;•●▪◦·|、،")
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Ingredient:
    """One entry of a list."""

    name: str                       # canonical, lower case; as written where no table knows it
    written: str                    # as on the pack
    percent: float | None = None    # where the list states it
    may_contain: bool = False       # one of the shades has it, perhaps


def name_key(text: str) -> str:
    """Letters and digits of a name without case and accents: what spellings of one name share."""
    folded = unicodedata.normalize("NFKD", text.casefold())
    return "".join(one for one in folded if one.isalnum())


class Synonyms:
    """Every known spelling of an ingredient -> its canonical name."""

    def __init__(self, spellings: Mapping[str, Iterable[str]]) -> None:
        """`spellings`: canonical name -> its other spellings. Errors: `ValueError` for one spelling of two names."""
        self._names: dict[str, str] = {}
        for name, others in spellings.items():
            for one in (name, *others):
                taken = self._names.setdefault(name_key(one), name)
                if taken != name:
                    raise ValueError(f"{one!r} is a spelling of both {taken!r} and {name!r}; keep it under one of them")

    def __len__(self) -> int:
        return len(self._names)

    def find(self, written: str) -> str | None:
        """The canonical name, or None for one that no table knows; colour index numbers are always known."""
        found = self._names.get(name_key(written))
        if found is None and (colour := _COLOUR.fullmatch(written.strip())):
            return self._names.get(f"ci{colour[1]}", f"ci {colour[1]}")
        return found

    def knows(self, name: str) -> bool:
        """Whether some table has this name."""
        return self.find(name) is not None


def parse_ingredients(text: str, synonyms: Synonyms) -> list[Ingredient]:
    """The ingredients of a list, each name once, in order; those a product may contain come last and are marked.

    Commas inside brackets and locants do not divide; "Water/Aqua/Eau" is one; what stands before a label such as
    "Ingredients:" and after "Directions" is left out. Empty for a text without a name. Linear in the text.
    """
    found: dict[str, Ingredient] = {}
    percent_of = ""
    for part, may_contain in _sections(_plain(text)):
        for piece in _pieces(part):
            for one in _read_piece(piece, synonyms):
                if not one.name:                        # "Salicylic Acid, 2 %": the amount of the one before
                    before = found.get(percent_of)
                    if before is not None and before.percent is None:
                        found[percent_of] = replace(before, percent=one.percent)
                    continue
                percent_of = one.name
                known = found.get(one.name)
                if known is None:
                    found[one.name] = replace(one, may_contain=may_contain)
                elif known.percent is None and one.percent is not None:
                    found[one.name] = replace(known, percent=one.percent)
    return sorted(found.values(), key=lambda one: one.may_contain)


def list_flags(ingredients: Sequence[Ingredient], synonyms: Synonyms) -> list[str]:
    """Why a parsed list should not be trusted, in words; empty for a good one."""
    if not ingredients:
        return ["no ingredient was found"]
    flags = []
    if len(ingredients) > MANY:
        flags.append(f"too long for a list: {len(ingredients):,} ingredients, more than {MANY}")
    if len(ingredients) >= MIN_JUDGED and not any(synonyms.knows(one.name) for one in ingredients):
        flags.append(f"no known name: none of its {len(ingredients)} names is in the tables; "
                     "another language, or no ingredient list")
    return flags


def ingredients_in_text(text: str, synonyms: Synonyms, wanted: Collection[str]) -> str | None:
    """The list after a label such as "Ingredients:" in a description, else the `wanted` ingredients it names, in order.

    None where there is neither. A label followed by prose ("Ingredients: made from natural resin") is no list: at
    least two and a third of its first names must be known.
    """
    plain = _plain(text)
    for label in _LABEL.finditer(plain):
        listed = plain[label.start() :]
        head = parse_ingredients(listed, synonyms)[:12]
        known = sum(synonyms.knows(one.name) for one in head)
        if known >= 2 and 3 * known >= len(head):
            return listed[: MAX_CHARS].strip()
    return ", ".join(_mentions(plain, synonyms, wanted)) or None


def _mentions(text: str, synonyms: Synonyms, wanted: Collection[str], longest: int = 5) -> list[str]:
    """Wanted names in a text; what a sentence says the product is free of is not mentioned."""
    found: dict[str, None] = {}
    for sentence in re.split(r"[.;!?\n]", text):
        words = re.findall(r"[\w'-]+", sentence[: start.start()] if (start := _NOT.search(sentence)) else sentence)
        at = 0
        while at < len(words):
            size, name = next(((size, name) for size in range(min(longest, len(words) - at), 0, -1)
                               if (name := synonyms.find(" ".join(words[at : at + size]))) is not None), (1, None))
            at += size
            if name in wanted and words[at : at + 1] != ["free"]:
                found.setdefault(name or "")
    return list(found)


# --- text -> parts --------------------------------------------------------------------------------
def _plain(text: str) -> str:
    """The text without markup, marks and exotic spaces."""
    bare = _TAG.sub("\n", html.unescape(text[:MAX_CHARS])) if "<" in text or "&" in text else text[:MAX_CHARS]
    bare = unicodedata.normalize("NFKC", _MARKS.sub("", _FOOTNOTE.sub("", bare)))
    return re.sub(r"[^\S\n]+", " ", bare.replace("\r", "\n")).strip()


def _sections(text: str) -> Iterator[tuple[str, bool]]:
    """(part of the list, whether it is only what the product may contain)."""
    labels = list(_LABEL.finditer(text))
    if labels and (labels[0]["kind"] or "").lower() in ("", "active", "medicinal"):
        text = text[labels[0].start() :]            # what comes first is about the product
    text = _LABEL.sub(" ; ", text)
    if (end := _END.search(text)) is not None and text[: end.start()].strip(" ;"):
        text = text[: end.start()]
    at = 0
    while (found := _MAY.search(text, at)) is not None:
        yield text[at : found.start()], False
        stop = _closing(text, found.end()) if found["open"] else len(text)
        if found["open"] and not _MAY.sub("", text[found.end() : stop]).strip(" :/"):
            stop = len(text)                        # "(may contain) CI 77891": the bracket held the words alone
        yield _MAY.sub(",", text[found.end() : stop]).lstrip(")]}:, "), True
        at = stop + 1
    yield text[at:], False


def _closing(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        if text[at] in _OPEN:
            depth += 1
        elif text[at] in _CLOSE:
            if depth == 0:
                return at
            depth -= 1
    return len(text)


def _pieces(text: str) -> Iterator[str]:
    """The entries of a list, undivided where a comma belongs to a name."""
    text = _NUMBERED.sub(", ", text) if re.match(r"\s*1[.)]\s", text) else text
    text = _SENTENCE.sub(", ", _AND.sub(", ", text))
    if len(_DASH.findall(text)) > max(1, text.count(",") + text.count(";")):
        text = _DASH.sub(", ", text)                # "AQUA - GLYCERIN - RETINOL"
    lines = "\n" in text and text.count("\n") > text.count(",") + text.count(";")
    grouped, depth, start = _grouping(text), 0, 0
    for at, one in enumerate(text):
        if at in grouped:
            depth += 1 if one in _OPEN else -1
        elif depth == 0 and (one in _SEPARATORS or (lines and one == "\n")) and not _inside_name(text, start, at):
            yield text[start:at]
            start = at + 1
    yield text[start:]


def _grouping(text: str) -> set[int]:
    """Places of the brackets that have a partner; a bracket that is never closed groups nothing."""
    places: set[int] = set()
    stack: list[int] = []
    for at, one in enumerate(text):
        if one in _OPEN:
            stack.append(at)
        elif one in _CLOSE and stack:
            places |= {stack.pop(), at}
    return places


def _inside_name(text: str, start: int, at: int) -> bool:
    """Whether the comma at `at` stands between two digits of one name or number."""
    return (text[at] == "," and text[at + 1 : at + 2].isdigit()
            and _LOCANT.search(text[max(start, at - 4) : at]) is not None)


# --- one entry ------------------------------------------------------------------------------------
def _read_piece(piece: str, synonyms: Synonyms) -> Iterator[Ingredient]:
    """The ingredients of one entry; an entry that is only an amount has no name."""
    written = _NUMBER.sub("", " ".join(piece.split())).strip(" .:;,-–_")
    stated = _PERCENT.search(written)
    percent = float(stated["value"].replace(",", ".")) if stated else None
    percent = percent if percent is None or percent <= 100 else None
    bare = _PERCENT.sub(" ", written).strip(" .:;,-–_") if stated else written
    if not any(one.isalpha() for one in bare) and not _COLOUR.fullmatch(bare):
        if percent is not None:
            yield Ingredient("", written, percent)
        return
    if len(bare) > MAX_NAME_CHARS and "(" not in bare:
        return
    for name in _names(bare, synonyms):
        if 0 < len(name) <= MAX_NAME_CHARS:
            yield Ingredient(name, written[:MAX_NAME_CHARS], percent)


def _names(bare: str, synonyms: Synonyms) -> Iterator[str]:
    """Canonical names of one entry: the whole, what is before its bracket or in it, or parts at a slash."""
    if (whole := synonyms.find(bare)) is not None:
        yield whole
        return
    inner = [one.strip() for one in _INNER.findall(bare) if one.strip()]
    outer = " ".join(_bracketless(bare).split()).strip(" .:;,-–")
    listed = [one for one in inner if "," in one and len(one) > 2]
    if outer:
        yield from _outer_names(outer, [one for one in inner if one not in listed], synonyms)
    for one in listed if outer else inner:      # "Parfum (Linalool, Limonene)"
        for piece in _pieces(one):
            if (name := synonyms.find(piece.strip(" .")) or _lower(piece)):
                yield name


def _outer_names(outer: str, inner: Sequence[str], synonyms: Synonyms) -> Iterator[str]:
    known = synonyms.find(outer) or synonyms.find(_ORIGIN.sub("", outer.lower()))
    parts = [part.strip() for part in _JOINED.split(outer) if part.strip()]
    if known is None and len(parts) > 1 and not _POLYMER.search(outer.lower()):
        found = list(dict.fromkeys(name for name in map(synonyms.find, parts) if name is not None))
        if found:       # one thing in several languages, or several things in one entry
            yield from found if len([one for one in parts if synonyms.knows(one)]) == len(parts) else found[:1]
            return
    if known is None:
        known = next((name for name in map(synonyms.find, inner) if name is not None), None)
    yield known or _lower(outer)


def _bracketless(text: str) -> str:
    while (shorter := _INNER.sub(" ", text)) != text:
        text = shorter
    return re.sub(r"[\[\](){}]", " ", text)


def _lower(text: str) -> str:
    return " ".join(re.sub(r"[\[\](){}]", " ", text).lower().split()).strip(" .:;,-–/")
