"""Rows as real shops have them: HTML, mojibake, absurd prices, repeated and broken lines."""

from __future__ import annotations

import json
from typing import Any

from recsys_ray.data.demo_shop.streams import Dice

PRODUCT_DIRT = ("missing title", "html", "mojibake", "absurd price", "repeated id", "broken line", "missing id")
REVIEW_DIRT = ("empty", "html", "mojibake", "repeated", "broken line", "missing id", "impossible time")
ABSURD_PRICES = (9_999_999.99, -4.0, 0.0, "from $12.99 to $1,299.00", "call us", "\u2014")
ACCENTED = ("Cr\u00e8me fra\u00eeche caf\u00e9 \u2013 d\u00e9j\u00e0 vu",
            "Fa\u00e7ade \u2019na\u00efve\u2019 \u00fcber \u20ac 5",
            "ni\u00f1o \u201cma\u00f1ana\u201d")


def write(record: dict[str, Any]) -> str:
    """One line of a JSONL file."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def dirty_product(record: dict[str, Any], kind: str, roll: Dice) -> list[str]:
    """The lines that a listing leaves when this goes wrong; every listing keeps one line that can be read."""
    if kind == "repeated id":
        poorer = {**record, "title": record["title"].upper(), "features": [], "details": {}}
        return [write(record), write(poorer)]
    if kind == "broken line":
        return [write(record), _cut(write(record), roll)]
    if kind == "missing id":
        return [write(record), write({**record, "parent_asin": roll.pick([None, "", "  "])})]
    spoiled = dict(record)
    if kind == "missing title":
        spoiled["title"] = roll.pick([None, "", " "])
        spoiled["description"] = record["description"] or [f"{record['title']}."]
    elif kind == "html":
        spoiled["title"] = f"<b>{record['title']}</b> &amp; more"
        spoiled["description"] = [f"<p>{text}<br/></p>" for text in record["description"] or ["New&nbsp;"]]
    elif kind == "mojibake":
        spoiled["title"] = f"{record['title']} {mojibake(roll.pick(ACCENTED))}"
    else:
        spoiled["price"] = roll.pick(ABSURD_PRICES)
    return [write(spoiled)]


def dirty_review(record: dict[str, Any], kind: str, roll: Dice) -> tuple[dict[str, Any], list[str]]:
    """(the review as it stands in its own line, further lines that go wrong)."""
    if kind == "repeated":
        return record, [write(record)]
    if kind == "broken line":
        return record, [_cut(write(record), roll)]
    if kind == "missing id":
        return record, [write({**record, "asin": None, "parent_asin": None})]
    if kind == "impossible time":
        return record, [write({**record, "timestamp": roll.pick([0, 7, 99_999_999_999_999])})]
    if kind == "empty":
        return {**record, "title": "", "text": roll.pick(["", " ", None])}, []
    if kind == "html":
        return {**record, "text": record["text"].replace(". ", ".<br /><br />") + "&#34;"}, []
    return {**record, "text": f"{record['text']} {mojibake(roll.pick(ACCENTED))}"}, []


def mojibake(text: str) -> str:
    """UTF-8 bytes read as Windows-1252, as a careless import does."""
    return text.encode().decode("cp1252", errors="ignore")


def _cut(line: str, roll: Dice) -> str:
    return line[: len(line) // 4 + roll.below(max(1, len(line) // 2))]
