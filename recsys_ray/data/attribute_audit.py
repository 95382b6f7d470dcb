"""The audit of attributes: what is told of how many products and where, which groups hold together; a page of it."""

from __future__ import annotations

import csv
import io
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from recsys_ray.data.attribute_schema import NAMES
from recsys_ray.data.attributes import AttributeReader, is_graphic, value_of
from recsys_ray.data.product_groups import Groups, group_members
from recsys_ray.data.proportions import wilson
from recsys_ray.pages import render_page

UNKNOWN = 15            # contents of fields shown that no value knows
EXAMPLES = 3            # of each attribute
SPOT_CHECKED = 50       # groups in groups.csv
SURE = 0.8              # of groups that agree in their kind, by the interval's lower end, for "use them"
Row = dict[str, Any]


def attribute_audit(rows: pa.Table, products: pa.Table, groups: Groups, quarantine: pa.Table, reader: AttributeReader
                    ) -> Row:
    """The figures of the page as plain values: known, values, kinds, groups, unknown, examples, quarantine, counts."""
    read = rows.to_pylist()
    titles = dict(zip(products["product_id"].to_pylist(), products["title"].to_pylist()
                      if "title" in products.column_names else [None] * products.num_rows, strict=True))
    reasons = Counter(quarantine["reason"].to_pylist())
    return {
        "known": [_known(name, read) for name in NAMES],
        "values": {name: _values(name, read, reader.schema.values(name)) for name in NAMES},
        "kinds": _kinds(read), "groups": group_audit(read, groups),
        "unknown": [{"attribute": name, "content": content, "products": count}
                    for (name, content), count in reader.unknown.most_common(UNKNOWN)],
        "examples": {name: _examples(name, read, titles) for name in NAMES},
        "quarantine": [{"reason": reason, "rows": count} for reason, count in reasons.most_common()],
        "counts": {"products": len(read), "graphic": sum(is_graphic(row["category2"]) for row in read),
                   "groups": len(group_members(groups.keys)), "in groups": sum(key is not None for key in groups.keys),
                   "set aside": quarantine.num_rows},
    }


def _known(name: str, rows: Sequence[Row]) -> Row:
    places = Counter(one.split(", in ", 1)[1].split(' ("')[0].split(" ")[0] for row in rows for one in row["evidence"]
                     if one.startswith(f"{name}: "))
    count = sum(row[name] is not None for row in rows)
    return {"attribute": name, "products": count, "share": count / len(rows),
            "places": dict(places.most_common())}


def _values(name: str, rows: Sequence[Row], values: Sequence[str]) -> list[Row]:
    counts = Counter(row[name] for row in rows if row[name] is not None)
    total = max(1, sum(counts.values()))
    return sorted(({"value": value, "products": counts[value], "share": counts[value] / total} for value in values),
                  key=lambda row: -int(row["products"]))


def _kinds(rows: Sequence[Row]) -> list[Row]:
    """Of each kind of garment, how many there are and the share that tells each attribute."""
    found = []
    for kind, count in Counter(row["category2"] for row in rows).most_common():
        own = [row for row in rows if row["category2"] == kind]
        found.append({"category2": kind or "not said", "products": count,
                      "known": {name: sum(row[name] is not None for row in own) / count for name in NAMES[1:]}})
    return found


def _examples(name: str, rows: Sequence[Row], titles: Mapping[str, str | None]) -> list[Row]:
    """Products whose values differ, from as many values as there are."""
    first: dict[str, Row] = {}
    for row in rows:
        if row[name] is not None:
            first.setdefault(row[name], row)
    return [{"product_id": row["product_id"], "title": titles[row["product_id"]] or "no title",
             "evidence": [one for one in row["evidence"] if one.startswith(f"{name}: ")]}
            for row in list(first.values())[:EXAMPLES]]


# --- groups ---------------------------------------------------------------------------------------
def group_audit(rows: Sequence[Row], groups: Groups) -> Row:
    """Sizes and sources of groups, and whether their members say the same, against what chance would give."""
    members = group_members(groups.keys)
    sizes = Counter(len(one) for one in members.values())
    agreement = [_agreement(name, rows, list(members.values())) for name in NAMES]
    by_source = []
    for source, count in Counter(one for one in groups.sources if one).most_common():
        own = [part for part in members.values() if any(groups.sources[at] == source for at in part)]
        by_source.append({"source": source, "products": count, "refused": groups.refused[source],
                          **{key: value for key, value in _agreement("category2", rows, own).items()
                             if key in ("groups", "agree", "low", "high")}})
    return {"sizes": [{"size": size, "groups": count} for size, count in sorted(sizes.items())],
            "agreement": agreement, "by_source": by_source, "refused": dict(groups.refused),
            "advice": _advice(agreement[0])}


def _agreement(name: str, rows: Sequence[Row], members: Sequence[Sequence[int]]) -> Row:
    """Of groups with two known values or more, the share that has one value; `chance`: of two products at random."""
    known = [[value for at in part if (value := value_of(rows[at], name)) is not None] for part in members]
    counted = [part for part in known if len(part) > 1]
    agree = sum(len(set(part)) == 1 for part in counted)
    low, high = wilson(agree, len(counted))
    all_values = Counter(value for row in rows if (value := value_of(row, name)) is not None)
    total = sum(all_values.values())
    return {"attribute": name, "groups": len(counted), "agree": agree / len(counted) if counted else None, "low": low,
            "high": high, "chance": sum((count / total) ** 2 for count in all_values.values()) if total else None}


def _advice(category: Row) -> str:
    if not category["groups"]:
        return "No group has two listings of a known kind: strong positives come from attributes alone."
    if category["low"] >= SURE:
        return "Use them as strong positives: at least four groups in five agree in their kind."
    if category["high"] < SURE:
        return ("Do not use them as strong positives (min_group_confidence: 1): groups disagree in their kind. See by "
                "which source they were joined, and raise groups.min_confidence above it.")
    return "Too few groups to tell whether they hold together: look at groups.csv before they are used."


def spot_check(rows: pa.Table, products: pa.Table, groups: Groups, seed: int) -> str:
    """CSV of a sample of groups, a row a listing, to be looked at: does every row of a group show one product?"""
    read = rows.to_pylist()
    titles = products["title"].to_pylist() if "title" in products.column_names else [None] * len(read)
    members = group_members(groups.keys)
    chosen = sorted(random.Random(seed).sample(sorted(members), min(SPOT_CHECKED, len(members))))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group_key", "product_id", "found by", "confidence", "title", *NAMES, "same product (yes/no)"])
    for key in chosen:
        for at in members[key]:
            row = read[at]
            writer.writerow([key, row["product_id"], groups.sources[at], groups.confidences[at], safe_cell(titles[at]),
                             *(row[name] or "" for name in NAMES), ""])
    return text.getvalue()


def safe_cell(text: str | None) -> str:
    """A shop's text for a cell that a spreadsheet must not take for a formula."""
    return f"'{text}" if (text or "").lstrip().startswith(("=", "+", "-", "@")) else text or ""


def attribute_page(audit: Mapping[str, Any]) -> str:
    """The audit as one HTML page that needs nothing else; every text is escaped."""
    return render_page(__name__, "attribute_audit.html", audit=audit, names=NAMES)
