"""Which listings are views or colours of one product: a key of the group and how sure it is.

A group is found by what two listings share: a base id before a view's suffix (`A12_view1`, `A12_front`), a model number
in a field, the stem of an image's URL, a style number in the text, or a near-duplicate text. Keys are joined from the
surest to the least sure, and one that would make a group larger than `max_group` (the picture "coming soon", a size
chart) is refused.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pydantic import Field

from recsys_ray.config import Config

VIEWS = "view|front|back|side|full|additional|detail|flat|model|zoom|alt|main|swatch|left|right|top|bottom|angle|look"
_NAMED = re.compile(rf"^(?P<base>.{{3,}}?)[_\-. ](?:{VIEWS})[_\- ]?\d{{0,3}}$", re.IGNORECASE)
_SHORT = re.compile(r"^(?P<base>.{3,}?)[_\-.](?:[A-Ha-h]|\d{1,2})$")
_SIZE = re.compile(r"(?:\._[A-Z0-9_,]+_|[_\-]\d{2,4}x\d{2,4}|@\dx|[_\-](?:large|small|medium|thumb|xl|grande))$",
                   re.IGNORECASE)
_GENERIC = re.compile(r"^(?:image|img|photo|picture|pic|product|main|default|item)[_\- ]?\d{0,3}$")
_NUMBER = re.compile(r"\b(?:style|model|item|sku|art(?:icle)?|mpn|ref)(?:\s*(?:no|number|nr|code|id))?\s*[.:#]+\s*"
                     r"([A-Z0-9][A-Z0-9\-]{3,19})\b", re.IGNORECASE)
_FIELDS = frozenset(("item model number", "model number", "style number", "style code", "sku", "mpn", "part number",
                     "manufacturer part number", "article number"))
SOURCES = {             # what two listings share, and how often that means one product; joined in this order
    "id, named view": 0.95, "number in a field": 0.85, "image": 0.8, "id, letter or number": 0.7,
    "number in the text": 0.6, "near-duplicate text": 0.5,
}


class GroupConfig(Config):
    """What joins listings."""

    min_confidence: float = Field(default=0.5, ge=0, le=1)      # keys that are less sure join nothing
    max_group: int = Field(default=20, ge=2)                    # listings; a key that would join more is refused


DEFAULT = GroupConfig()


@dataclass(frozen=True)
class Groups:
    """The group of each of N listings, and what was found of it."""

    keys: list[str | None]              # the group's smallest product id; None: stands alone
    confidences: list[float | None]     # of the surest key that it shares
    sources: list[str | None]           # one of SOURCES
    refused: Counter[str] = field(default_factory=Counter)      # keys that would have joined too many, by source


def group_keys(products: pa.Table, images: pa.Table | None = None, config: GroupConfig = DEFAULT
               ) -> tuple[list[str | None], list[float | None]]:
    """(key, confidence) of the group of each product; both None for one that stands alone."""
    found = find_groups(products, images, config)
    return found.keys, found.confidences


def find_groups(products: pa.Table, images: pa.Table | None = None, config: GroupConfig = DEFAULT) -> Groups:
    """The groups of products; `products` has product_id and any of title, features, description, brand, attributes,
    image_urls and group_id (of near-duplicates), `images` (IMAGE) image_id and product_id.
    """
    ids: list[str] = products["product_id"].to_pylist()
    shared = _shared(_all_keys(products, images))
    parent = list(range(len(ids)))
    sizes = [1] * len(ids)
    surest: list[str | None] = [None] * len(ids)
    refused: Counter[str] = Counter()
    for source, confidence in SOURCES.items():
        for members in shared.get(source, ()) if confidence >= config.min_confidence else ():
            roots = {_root(parent, one) for one in members}
            if sum(sizes[one] for one in roots) > config.max_group:
                refused[source] += 1
                continue
            first, *others = sorted(roots)
            for other in others:
                parent[other] = first
                sizes[first] += sizes[other]
            for one in members:
                surest[one] = surest[one] or source
    smallest: dict[int, str] = {}
    for at, name in enumerate(ids):
        root = _root(parent, at)
        smallest[root] = min(smallest.get(root, name), name)
    keys = [smallest[_root(parent, at)] if surest[at] else None for at in range(len(ids))]
    return Groups(keys, [SOURCES[one] if one else None for one in surest], surest, refused)


def _root(parent: list[int], at: int) -> int:
    while parent[at] != at:
        parent[at] = parent[parent[at]]
        at = parent[at]
    return at


def _shared(keys: Iterator[tuple[int, str, str]]) -> dict[str, list[list[int]]]:
    """Source -> the listings of each key that two or more have."""
    found: dict[tuple[str, str], dict[int, None]] = defaultdict(dict)
    for at, source, key in keys:
        found[source, key][at] = None
    shared: dict[str, list[list[int]]] = defaultdict(list)
    for (source, _), members in sorted(found.items()):
        if len(members) > 1:
            shared[source].append(list(members))
    return shared


def _all_keys(products: pa.Table, images: pa.Table | None) -> Iterator[tuple[int, str, str]]:
    names = [name for name in ("title", "features", "description", "brand", "attributes", "image_urls", "group_id")
             if name in products.column_names]
    rows = products.select(["product_id", *names]).to_pylist()
    at_of: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        at_of[row["product_id"]].append(at)
        for source, key in _keys_of(row):
            yield at, source, key
    for row in images.select(["image_id", "product_id"]).to_pylist() if images is not None else ():
        stem = image_stem(row["image_id"])
        for at in at_of.get(row["product_id"] or "", ()) if stem else ():
            yield at, "image", stem


def _keys_of(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(source, key) pairs of one listing."""
    base, source = base_id(row["product_id"])
    yield source or "id, named view", base      # an id without a suffix is the base of those that have one
    if source is None:
        yield "id, letter or number", base
    brand = (row.get("brand") or "").strip().casefold()
    for name, content in dict(row.get("attributes") or ()).items():
        if name.strip().casefold() in _FIELDS and _looks_like_a_number(content):
            yield "number in a field", f"{brand}/{content.strip().casefold()}"
    for url in row.get("image_urls") or ():
        if stem := image_stem(url):
            yield "image", stem
    text = "\n".join(one for one in (row.get("title"), *(row.get("features") or ()), row.get("description")) if one)
    for match in _NUMBER.finditer(text):
        if _looks_like_a_number(match.group(1)):
            yield "number in the text", f"{brand}/{match.group(1).casefold()}"
    if row.get("group_id") is not None:
        yield "near-duplicate text", str(row["group_id"])


def base_id(one: str) -> tuple[str, str | None]:
    """(the id before a view's suffix, the source that the suffix makes it, None where there is none)."""
    if found := _NAMED.match(one):
        return found["base"].casefold(), "id, named view"
    if found := _SHORT.match(one):
        return found["base"].casefold(), "id, letter or number"
    return one.casefold(), None


def image_stem(location: str) -> str:
    """What the addresses of several pictures of one product have in common; "" for a name that tells nothing."""
    path = PurePosixPath(unquote(urlsplit(location).path))
    stem = path.name.rsplit(".", 1)[0] if "." in path.name else path.name
    while (cut := _SIZE.sub("", stem)) != stem:
        stem = cut
    base, _ = base_id(stem)
    return base if len(base) >= 5 and any(one.isdigit() for one in base) and not _GENERIC.match(base) else ""


def _looks_like_a_number(text: str | None) -> bool:
    """Four signs or more with a digit among them, and no year."""
    bare = (text or "").strip()
    return len(bare) >= 4 and any(one.isdigit() for one in bare) and not (bare.isdigit() and len(bare) == 4)


def group_members(keys: Sequence[str | None]) -> dict[str, list[int]]:
    """The places of each group's listings."""
    found: dict[str, list[int]] = defaultdict(list)
    for at, key in enumerate(keys):
        if key is not None:
            found[key].append(at)
    return dict(found)
