"""Products -> a "concern_labels" artefact: products and labels of concerns, split, audited, with what was set aside.

Labels come from the rule tables or from a table of one's own. Everything is held in one process: of a large catalogue
only the products that have ingredients and are of a known kind come this far.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_ray.artifacts import Artifact, FileEntry, Staging, find_artifact, stage, write_text
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.concern_audit import audit_of, audit_page
from recsys_ray.data.concern_products import ConcernProducts, read_concern_products
from recsys_ray.data.concern_rulebook import Rulebook, load_rules
from recsys_ray.data.concern_splits import ConcernSplitConfig, stratified_split
from recsys_ray.data.concerns import LABELS, Labeller, Mode, label_products
from recsys_ray.data.rule_files import PACKAGED
from recsys_ray.data.sources import load_rows, table_states
from recsys_ray.schema import CONCERN_LABEL, CONCERN_PRODUCT, QUARANTINE, conform

log = logging.getLogger(__name__)

KIND = "concern_labels"
STAGE_VERSION = 1       # raise it when the same inputs would give other tables
OWN = "own label"       # the rule of a label that was given
_LABEL_ROW = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("product_id", "concern", "label")])
_SAID = {"1": 1, "1.0": 1, "true": 1, "yes": 1, "0": 0, "0.0": 0, "false": 0, "no": 0}
GivenLabels = dict[tuple[str, str], tuple[int, str]]    # (product_id, concern) -> label, place


TableReader = Callable[[str, Mapping[str, str], pa.Schema], pa.Table]


class LabelError(ValueError):
    """Labels, or products, from which no labelled set can be made; the message names the file and row."""


class OwnLabels(Config):
    """A table of labels: Parquet, CSV or JSONL with product_id, concern and label (1 or 0)."""

    path: str
    columns: dict[str, str] = Field(default_factory=dict)   # ours: theirs


class LabelConcernsConfig(Config):
    """Which products, labelled by what, and how they are split."""

    products: ConcernProducts
    labels: OwnLabels | None = None             # instead of the rules
    rules: tuple[str, ...] = (PACKAGED,)        # folders of rule tables; later ones add to earlier ones
    concerns: tuple[str, ...] = ()              # none named: all of the rule tables (or of the labels)
    mode: Mode = "positive_unlabelled"
    withheld_rules: tuple[str, ...] = ()        # ids; see `held_out` of CONCERN_LABEL
    split: ConcernSplitConfig = ConcernSplitConfig()
    output: Path


def label_concerns(config: LabelConcernsConfig) -> Artifact:
    """The `concern_labels` artefact: products.parquet (CONCERN_PRODUCT), labels.parquet (CONCERN_LABEL), labels.csv,
    quarantine.parquet, audit.json and audit.html.

    Facts: concerns {key: {query, paraphrases}}, mode, prevalence and counts of each concern, rules (their digest).
    Errors: `RuleError` for an unknown concern or rule, `LabelError` for own labels that cannot be used or when no
    product is left.
    """
    book = load_rules(config.rules).select(config.concerns)
    book.check_rules(config.withheld_rules)
    parents = config.products.parents()
    key = fingerprint({
        "stage": STAGE_VERSION, "options": config.model_dump(mode="json", exclude={"output", "rules"}),
        "rules": book.digest, "products": config.products.states(), "labels": _states(config.labels),
        "parents": {name: one.fingerprint for name, one in parents.items()}})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    products, labels, quarantine, book = _labelled(config, book)
    labels, products = _split(labels, products, config.split)
    audit = audit_of(products, labels, quarantine, book, config.mode)
    for name in audit["without_positives"]:
        log.warning("%s has no positive product: a model cannot learn it from these labels", name)
    with stage(config.output.resolve(), KIND, key) as staging:
        files = [staging.write_table("products.parquet", products), staging.write_table("labels.parquet", labels),
                 staging.write_table("quarantine.parquet", quarantine), *_texts(staging, labels, audit)]
        return staging.commit(files, config=config, parents=parents, facts=_facts(config, book, audit))


def _states(labels: OwnLabels | None) -> list[list[str | int]]:
    return [] if labels is None else table_states(labels.path)


def _labelled(config: LabelConcernsConfig, book: Rulebook) -> tuple[pa.Table, pa.Table, pa.Table, Rulebook]:
    """(PRODUCTS, LABELS, QUARANTINE, the rulebook of the concerns that are labelled)."""
    labeller = Labeller(book)
    products, quarantine = read_concern_products(config.products, labeller, kinds_only=config.labels is None)
    if not products.num_rows:
        reasons = ", ".join(sorted({reason.split(":")[0] for reason in quarantine["reason"].to_pylist()}))
        raise LabelError(f"no product is left to label: {quarantine.num_rows} set aside ({reasons or 'no rows'})")
    if config.labels is None:
        return products, label_products(products, labeller, config.withheld_rules), quarantine, book
    given, unknown = _own_labels(config.labels, book, products)
    if not config.concerns:
        book = book.select([name for name in book.concerns if any(one == name for _, one in given)])
    labelled = {product for product, _ in given}
    products = products.filter(pc.is_in(products["product_id"], value_set=pa.array(sorted(labelled))))
    rows = [{"product_id": product, "concern": concern, "label": given.get((product, concern)),
             "rules": [OWN] if (product, concern) in given else [], "conflict": False, "held_out": False}
            for product in products["product_id"].to_pylist() for concern in book.concerns]
    return products, pa.Table.from_pylist(rows, schema=LABELS), pa.concat_tables([quarantine, unknown]), book


def _own_labels(config: OwnLabels, book: Rulebook, products: pa.Table
                ) -> tuple[dict[tuple[str, str], int], pa.Table]:
    """The label of each (product, concern) of the file, and the rows about products that there are not."""
    found = read_given(config, book.concerns)
    known = set(products["product_id"].to_pylist())
    aside = [{"table": "labels", "source": place, "key": pair[0], "row": json.dumps(pair),
              "reason": "label of a product that was not read or was set aside"}
             for pair, (_, place) in found.items() if pair[0] not in known]
    kept = {pair: label for pair, (label, _) in found.items() if pair[0] in known}
    if not kept:
        raise LabelError(f"{config.path}: none of its {len(found)} labels is of a product that can be used; are "
                         "product_id of labels and products the same ids, and is it they that `products` names?")
    return kept, pa.Table.from_pylist(aside, schema=QUARANTINE)


def read_given(config: OwnLabels, known: Collection[str] | None = None, read: TableReader = load_rows) -> GivenLabels:
    """(product_id, concern) -> (label, place) of a table of labels; `known`: the concerns it may name (None: any).

    `read` is how the table is opened: evaluation may open what no training may.

    Errors: `LabelError` naming file and row of the first bad one: no label, one that is neither 1 nor 0, an unknown
    concern, two labels of one pair that differ.
    """
    found: GivenLabels = {}
    for row in read(config.path, config.columns, _LABEL_ROW).to_pylist():
        place = row["_source"]
        if row["_error"]:
            raise LabelError(f"{place}: {row['_error']}")
        if known is not None and row["concern"] not in known:
            raise LabelError(f"{place}: unknown concern {row['concern']!r}; known are {', '.join(known)}. "
                             "A further one needs its words in concerns.yaml of a further folder under rules")
        label = _SAID.get(row["label"].strip().lower())
        if label is None:
            raise LabelError(f"{place}: label {row['label']!r}; it is 1 (addresses the concern) or 0")
        pair = row["product_id"], row["concern"]
        before = found.setdefault(pair, (label, place))
        if before[0] != label:
            raise LabelError(f"{place}: {pair[0]!r} has label {label} for {pair[1]}, and {before[0]} in {before[1]}")
    return found


def _split(labels: pa.Table, products: pa.Table, config: ConcernSplitConfig) -> tuple[pa.Table, pa.Table]:
    """CONCERN_LABEL and CONCERN_PRODUCT: both with the split of the product."""
    width = labels.num_rows // products.num_rows
    label = labels["label"].cast(pa.float32()).to_numpy(zero_copy_only=False).reshape(-1, width)
    held_out = labels["held_out"].to_numpy(zero_copy_only=False).astype(bool).reshape(-1, width)
    marks = np.concatenate([(label == 1) & ~held_out, (label == 0) & ~held_out, held_out], axis=1)
    split = stratified_split(products["group_id"].to_numpy(), marks, config)
    return (conform(labels.append_column("split", pa.array(np.repeat(np.array(split), width).tolist(), pa.string())),
                    CONCERN_LABEL, "labels"),
            conform(products.append_column("split", pa.array(split, pa.string())), CONCERN_PRODUCT, "products"))


def _texts(staging: Staging, labels: pa.Table, audit: dict[str, Any]) -> Sequence[FileEntry]:
    from pyarrow import csv

    flat = labels.set_column(labels.schema.get_field_index("rules"), "rules",
                             pc.binary_join(labels["rules"].combine_chunks(), "; "))
    csv.write_csv(flat, staging.path / "labels.csv")
    write_text(staging.path / "audit.json", json.dumps(audit, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(staging.path / "audit.html", audit_page(audit))
    return [staging.entry("labels.csv", labels.num_rows), staging.entry("audit.json"), staging.entry("audit.html")]


def _facts(config: LabelConcernsConfig, book: Rulebook, audit: dict[str, Any]) -> dict[str, Any]:
    return {"concerns": {name: {"query": words.query, "paraphrases": list(words.paraphrases)}
                         for name, words in book.concerns.items()},
            "mode": config.mode, "rules": book.digest, "withheld_rules": list(config.withheld_rules),
            "prevalence": {row["concern"]: row["prevalence"] for row in audit["concerns"]},
            "without_positives": audit["without_positives"], "counts": audit["counts"]}
