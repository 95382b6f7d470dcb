"""The audit of concern labels: how many, made by which rules, where rules contradict each other, and a page of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_ray.data.concern_rulebook import Rulebook, ingredient_id, kind_id
from recsys_ray.data.concerns import Mode, targets
from recsys_ray.data.splits import SPLITS
from recsys_ray.pages import render_page

EXAMPLES = 4            # of each concern
CONFLICTS = 25          # shown; all are counted
SHOWN_CHARS = 500       # of an ingredient list
Row = dict[str, Any]


def audit_of(products: pa.Table, labels: pa.Table, quarantine: pa.Table, book: Rulebook, mode: Mode) -> Row:
    """The figures of the page as plain values: concerns, overlaps, rules, conflicts, examples, splits, quarantine."""
    rows = labels.to_pylist()
    by_product = {row["product_id"]: row for row in products.to_pylist()}
    counted = targets(labels, mode)
    concerns = [_concern(name, book, rows, counted) for name in book.concerns]
    conflicts = [row for row in rows if row["conflict"]]
    reasons = Counter((row["table"], row["reason"].split(":")[0]) for row in quarantine.to_pylist())
    return {
        "mode": mode, "concerns": concerns, "overlaps": _overlaps(rows, list(book.concerns)),
        "rules": _rules(rows, book), "splits": _splits(products),
        "conflicts": [_shown(row, by_product[row["product_id"]]) for row in conflicts[:CONFLICTS]],
        "examples": {name: _examples(name, rows, by_product) for name in book.concerns},
        "quarantine": [{"table": table, "reason": reason, "rows": count}
                       for (table, reason), count in sorted(reasons.items())],
        "without_positives": [row["concern"] for row in concerns if not row["positives"]],
        "counts": {"products": products.num_rows, "groups": len(pc.unique(products["group_id"])),
                   "labels": sum(row["label"] is not None for row in rows), "conflicts": len(conflicts),
                   "held_out": sum(row["held_out"] for row in rows), "set_aside": quarantine.num_rows,
                   "without_ingredients": products["ingredients"].null_count},
    }


def _concern(name: str, book: Rulebook, rows: Sequence[Row], counted: np.ndarray[Any, Any]) -> Row:
    own = [(row, target) for row, target in zip(rows, counted.tolist(), strict=True) if row["concern"] == name]
    known = [target for _, target in own if target == target]
    labels = Counter(row["label"] for row, _ in own)
    conflicts = sum(row["conflict"] for row, _ in own)
    return {
        "concern": name, "query": book.concerns[name].query, "positives": labels[1], "negatives": labels[0],
        "unlabelled": labels[None] - conflicts, "conflicts": conflicts,
        "held_out": sum(row["held_out"] for row, _ in own),
        "prevalence": sum(known) / len(known) if known else None,      # among what the mode counts
        "positives_of_split": {split: sum(row["label"] == 1 for row, _ in own if row["split"] == split)
                               for split in SPLITS},
        "negatives_of_split": {split: sum(row["label"] == 0 for row, _ in own if row["split"] == split)
                               for split in SPLITS},
    }


def _overlaps(rows: Sequence[Row], concerns: Sequence[str]) -> list[list[int]]:
    """Products that are positive for both, (C, C); the diagonal has the positives themselves."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["label"] == 1:
            found.setdefault(row["product_id"], []).append(row["concern"])
    pairs = Counter((one, other) for names in found.values() for one in names for other in names)
    return [[pairs[one, other] for other in concerns] for one in concerns]


def _rules(rows: Sequence[Row], book: Rulebook) -> list[Row]:
    """What each rule did, those that never spoke last."""
    labels: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    opposed: Counter[str] = Counter()
    for row in rows:
        labels.update(row["rules"])
        if len(row["rules"]) == 1:
            alone.update(row["rules"])
        if row["conflict"]:
            opposed.update(row["rules"])
    speaking: list[tuple[str, Any]] = [(kind_id(name), one) for name, one in book.kinds.items()]
    speaking += [(ingredient_id(name), one) for name, one in book.rules.items()]
    found = [{"rule": rule_id, "for": [one for one in rule.speaks_for if one in book.concerns],
              "against": [one for one in rule.against if one in book.concerns],
              "labels": labels[rule_id], "alone": alone[rule_id], "in_conflict": opposed[rule_id],
              "source": rule.source, "verified": rule.verified} for rule_id, rule in speaking]
    found = [row for row in found if row["for"] or row["against"]]
    return sorted(found, key=lambda row: (-row["labels"], row["rule"]))


def _splits(products: pa.Table) -> list[Row]:
    rows = []
    for split in SPLITS:
        part = products.filter(pc.equal(products["split"], split))
        rows.append({"split": split, "products": part.num_rows, "groups": len(pc.unique(part["group_id"]))})
    return rows


def _examples(concern: str, rows: Sequence[Row], products: Mapping[str, Row]) -> list[Row]:
    """Some positives, made by as many different rules as there are, then a negative."""
    by_rule: dict[str, Row] = {}
    for row in rows:
        if row["concern"] == concern and row["label"] == 1:
            by_rule.setdefault(row["rules"][0], row)
    chosen = sorted(by_rule.values(), key=lambda row: -len(row["rules"]))[: EXAMPLES - 1]
    chosen += [row for row in rows if row["concern"] == concern and row["label"] == 0][:1]
    return [_shown(row, products[row["product_id"]]) for row in chosen]


def _shown(row: Row, product: Row) -> Row:
    listed = product["ingredients"] or ""
    return {"product_id": row["product_id"], "concern": row["concern"], "label": row["label"], "rules": row["rules"],
            "title": product["title"], "category": product["category"],
            "ingredients": listed if len(listed) <= SHOWN_CHARS else listed[:SHOWN_CHARS] + " ..."}


def audit_page(audit: Mapping[str, Any]) -> str:
    """The audit as one HTML page that needs nothing else; every text is escaped."""
    return render_page(__name__, "concern_audit.html", audit=audit, splits=SPLITS)
