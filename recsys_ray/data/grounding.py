"""The grounding audit: is what was read of a product really said of that garment? A sample to judge, and what it shows.

A reviewer gets a CSV of products, drawn from every kind of garment, and writes a verdict beside each value. The
verdicts give the share that is right of each attribute, with its interval, the contamination (words that speak of
another garment or a part of it) and where it comes from, and advice for the tables.
"""

from __future__ import annotations

import csv
import io
import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from recsys_ray.data.attribute_audit import safe_cell
from recsys_ray.data.attribute_schema import NAMES
from recsys_ray.data.proportions import Share, weighted_share
from recsys_ray.pages import render_page

VERDICTS = ("right", "wrong", "other", "unsure")
WANTED = 0.9            # share right from which an attribute may be trained on
SHOWN_CHARS = 400       # of a product's features and description
NOT_SAID = "not said"
FEW = 5                 # rows of a place or kind below which nothing is advised about it
INSTRUCTIONS = """Read the title and the text of a row, look at the picture if there is one, and write into each
"verdict" column beside a value:
  right   the words speak of this garment, and the value is what they say
  wrong   they speak of this garment, and the value is something else (write which under "should be")
  other   they speak of another garment, or of a part (a lining, a belt, the jeans it is worn with)
  unsure  nobody could tell
Where there is no value and the text says one, write it under "should be". Leave the other columns as they are.
"""
Row = dict[str, Any]


class GroundingError(ValueError):
    """A review that cannot be read; the message names the row and column."""


def columns() -> list[str]:
    """The columns of a review."""
    return ["product_id", "stratum", "weight", "title", "text", "picture",
            *(f"{name}{part}" for name in NAMES for part in ("", " words", " verdict", " should be"))]


# --- the sample -----------------------------------------------------------------------------------
def stratified_sample(strata: Sequence[str], count: int, seed: int) -> list[int]:
    """The places of `count` rows, at least two of every stratum where there are, the rest by the strata's sizes."""
    members: dict[str, list[int]] = defaultdict(list)
    for at, one in enumerate(strata):
        members[one].append(at)
    count = min(count, len(strata))
    quota = {one: min(2, len(members[one])) for one in sorted(members, key=lambda one: -len(members[one]))}
    while sum(quota.values()) > count:          # more strata than rows: the largest ones stay
        smallest = [one for one, size in quota.items() if size][-1]
        quota[smallest] -= 1
    while sum(quota.values()) < count:
        quota[min(quota, key=lambda one: quota[one] / len(members[one]))] += 1
    drawn = random.Random(seed)
    return sorted(at for one, size in sorted(quota.items()) for at in drawn.sample(members[one], size))


def review_csv(rows: pa.Table, products: Mapping[str, Row], count: int, seed: int) -> str:
    """The CSV to fill in, a row a product, stratified by kind; `products` has title, text and picture of each id."""
    read = rows.to_pylist()
    strata = [row["category2"] or NOT_SAID for row in read]
    chosen = stratified_sample(strata, count, seed)
    sizes, drawn = Counter(strata), Counter(strata[at] for at in chosen)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(), lineterminator="\n")
    writer.writeheader()
    for at in chosen:
        row, stratum = read[at], strata[at]
        product = products.get(row["product_id"], {})
        words = {one.partition(": ")[0]: one.partition(", in ")[2] for one in row["evidence"]}
        writer.writerow({
            "product_id": row["product_id"], "stratum": stratum, "weight": f"{sizes[stratum] / drawn[stratum]:.6g}",
            "title": safe_cell(product.get("title")), "text": safe_cell(product.get("text"))[:SHOWN_CHARS],
            "picture": safe_cell(product.get("picture")), **{name: row[name] or "" for name in NAMES},
            **{f"{name} words": safe_cell(words.get(name)) for name in NAMES}})
    return text.getvalue()


# --- the completed review -------------------------------------------------------------------------
def read_review(text: str, rows: pa.Table) -> list[Row]:
    """The rows of a completed review, checked against the attributes they were drawn from.

    Errors: `GroundingError` for a missing column, a verdict that is none, a product or value that the attributes do not
    have (they were made anew since), or a review without any verdict.
    """
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff")))
    if missing := [one for one in columns() if one not in (reader.fieldnames or ())]:
        raise GroundingError(f"no column {missing[0]!r}; a review has the columns of its sample")
    known = {row["product_id"]: row for row in rows.to_pylist()}
    found, verdicts = [], 0
    for number, row in enumerate(reader, start=2):
        own = known.get(row["product_id"])
        if own is None:
            raise GroundingError(f"row {number}: product {row['product_id']!r} is not among the attributes")
        for name in NAMES:
            verdict = row[f"{name} verdict"] = (row[f"{name} verdict"] or "").strip().lower()
            row[f"{name} should be"] = (row[f"{name} should be"] or "").strip().lower()
            if (own[name] or "") != row[name]:
                raise GroundingError(f"row {number}: {name} is {row[name]!r} here and {own[name]!r} in the attributes; "
                                     "draw a new sample, or give the attributes it was drawn from")
            if verdict and verdict not in VERDICTS:
                raise GroundingError(f"row {number}, {name} verdict: {verdict!r} is none of {', '.join(VERDICTS)}")
            verdicts += bool(verdict)
        try:
            row["weight"] = float(row["weight"])
        except ValueError:
            raise GroundingError(f"row {number}, weight: {row['weight']!r} is no number") from None
        found.append(row)
    if not verdicts:
        raise GroundingError("no verdict is filled in")
    return found


def analyse(review: Sequence[Row], values: Mapping[str, Sequence[str]]) -> Row:
    """The figures of a completed review as plain values: attributes, strata, places, contamination, missed, advice.

    `values` are the values that each attribute has in the tables. Shares are of the catalogue the sample stands for.
    """
    attributes = [_attribute(name, review) for name in NAMES]
    places = [one for name in NAMES for one in _places(name, review)]
    contamination = Counter((name, row[name], row[f"{name} words"]) for row, name in _judged(review)
                            if row[f"{name} verdict"] == "other")
    missed = Counter((name, row[f"{name} should be"]) for row in review for name in NAMES
                     if row[f"{name} should be"] and row[f"{name} verdict"] in ("", "wrong", "other"))
    return {
        "attributes": attributes, "places": places, "strata": _strata(review),
        "contamination": [{"attribute": name, "value": value, "words": words, "rows": count}
                          for (name, value, words), count in contamination.most_common()],
        "missed": [{"attribute": name, "value": value, "rows": count, "known": value in values[name]}
                   for (name, value), count in missed.most_common()],
        "advice": [*_attribute_advice(attributes), *_place_advice(places), *_word_advice(review),
                   *_value_advice(missed, values)],
        "counts": {"products": len(review), "verdicts": sum(1 for _ in _judged(review)),
                   "unsure": sum(row[f"{name} verdict"] == "unsure" for row in review for name in NAMES)},
    }


def _judged(review: Sequence[Row]) -> list[tuple[Row, str]]:
    """Rows and attributes with a verdict that says something."""
    return [(row, name) for name in NAMES for row in review
            if row[name] and row[f"{name} verdict"] in ("right", "wrong", "other")]


def _share(rows: Sequence[Row], name: str, verdict: str) -> Share | None:
    return weighted_share([row[f"{name} verdict"] == verdict for row in rows], [row["weight"] for row in rows])


def _attribute(name: str, review: Sequence[Row]) -> Row:
    rows = [row for row, one in _judged(review) if one == name]
    return {"attribute": name, "judged": len(rows), "right": _plain(_share(rows, name, "right")),
            "contaminated": _plain(_share(rows, name, "other")),
            "missed": sum(bool(row[f"{name} should be"]) and not row[name] for row in review)}


def _plain(share: Share | None) -> Row | None:
    return None if share is None else {"share": share.share, "low": share.low, "high": share.high}


def _place(words: str) -> str:
    """"title" of `title ("denim")`."""
    return words.lstrip("'").partition(' ("')[0].split(" ")[0]


def _places(name: str, review: Sequence[Row]) -> list[Row]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row, one in _judged(review):
        if one == name:
            found[_place(row[f"{name} words"])].append(row)
    return [{"attribute": name, "place": place, "judged": len(rows), "right": _plain(_share(rows, name, "right")),
             "other": sum(row[f"{name} verdict"] == "other" for row in rows)} for place, rows in sorted(found.items())]


def _strata(review: Sequence[Row]) -> list[Row]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for row, name in _judged(review):
        found[row["stratum"]][row[f"{name} verdict"]] += 1
    return [{"stratum": one, "judged": counts.total(), "right": counts["right"] / counts.total()}
            for one, counts in sorted(found.items(), key=lambda item: item[1]["right"] / item[1].total())]


# --- advice ---------------------------------------------------------------------------------------
def _attribute_advice(attributes: Sequence[Row]) -> list[str]:
    found = []
    for row in attributes:
        name, right = row["attribute"], row["right"]
        if right is None:
            found.append(f"{name}: nothing was judged; it stays unknown whether it can be trained on.")
        elif right["high"] < WANTED:
            found.append(f"{name}: {right['share']:.0%} are right ({right['low']:.0%} to {right['high']:.0%}), less "
                         f"than {WANTED:.0%}: mend {name}.yaml before it is trained on or gated by.")
        elif right["low"] < WANTED:
            more = math.ceil(right["share"] * (1 - right["share"]) * (1.96 / 0.03) ** 2)
            found.append(f"{name}: {right['low']:.0%} to {right['high']:.0%} are right; whether it is {WANTED:.0%} is "
                         f"open. About {max(more, 2 * row['judged'])} judged rows would tell.")
    return found


def _place_advice(places: Sequence[Row]) -> list[str]:
    return [f"{row['attribute']}: what is read in the {row['place']} is right in {row['right']['share']:.0%} of "
            f"{row['judged']} rows ({row['other']} are another garment's): take {row['place']} out of `read` in "
            f"{row['attribute']}.yaml." for row in places
            if row["judged"] >= FEW and row["right"]["high"] < WANTED and row["place"] not in ("title", "category")]


def _word_advice(review: Sequence[Row]) -> list[str]:
    """Words that mislead at least twice and in half of their rows."""
    rows: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row, name in _judged(review):
        said = row[f"{name} words"].partition('("')[2].removesuffix('")').lower()
        rows[name, row[name], said].append(row[f"{name} verdict"])
    found = []
    for (name, value, said), verdicts in sorted(rows.items()):
        wrong = len(verdicts) - verdicts.count("right")
        if wrong >= 2 and 2 * wrong >= len(verdicts):
            where = "`misleading`, or the phrase before it to `elsewhere` in language.yaml," \
                if verdicts.count("other") * 2 >= wrong else "`misleading`"
            found.append(f'{name}: "{said}" was read as {value} and is not in {wrong} of {len(verdicts)} rows: add the '
                         f"phrase it stands in to {where} or take the word from {value}.")
    return found


def _value_advice(missed: Counter[tuple[str, str]], values: Mapping[str, Sequence[str]]) -> list[str]:
    found = []
    for (name, value), count in missed.most_common():
        if value in values[name]:
            found.append(f"{name}: {value} was missed in {count} row(s): add the words that say it.")
        else:
            found.append(f"{name}: {value!r} is no value yet and was wanted in {count} row(s): add it to {name}.yaml, "
                         "or give its words to a value that is near enough.")
    return found


def grounding_page(found: Mapping[str, Any]) -> str:
    """The analysis as one HTML page that needs nothing else; every text is escaped."""
    return render_page(__name__, "grounding.html", found=found)
