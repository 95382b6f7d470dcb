"""Products -> an "attributes" artefact: what each garment looks like by its own words, its group, an audit of both.

Products come from a prepared artefact or from a plain table with columns of any names. What is no garment, or says
nothing, is set aside with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from recsys_ray.artifacts import Artifact, Manifest, find_artifact, open_artifact, stage, write_text
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.attribute_audit import attribute_audit, attribute_page, spot_check
from recsys_ray.data.attribute_schema import NAMES, AttributeSchema, load_schema
from recsys_ray.data.attributes import READ_COLUMNS, AttributeReader, read_values, with_groups
from recsys_ray.data.preprocess import QUARANTINED_CHARS
from recsys_ray.data.product_groups import GroupConfig, find_groups
from recsys_ray.data.rule_files import PACKAGED
from recsys_ray.data.sources import load_rows, table_states
from recsys_ray.schema import ATTRIBUTE_ROW, PRODUCT, QUARANTINE

KIND = "attributes"
IMAGES_KIND = "image_vectors"       # of the embed_images job
STAGE_VERSION = 1                   # raise it when the same inputs would give other tables
_COLUMNS = ["product_id", *READ_COLUMNS, "image_urls"]
TABLE = pa.schema([PRODUCT.field(name) for name in _COLUMNS])   # of a plain table; only product_id must be there
Row = dict[str, Any]


class AttributeDataError(ValueError):
    """Products of which no attributes can be told; the message says why."""


class AttributeProducts(Config):
    """Where the products are: a prepared artefact, or a table (Parquet, CSV, JSONL; file, folder or glob)."""

    prepared: Path | None = None
    path: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)   # ours (names of TABLE): theirs
    endpoint_url: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.prepared is None) == (self.path is None):
            raise ValueError("give either prepared (the root of a prepared artefact) or path (a table of products)")
        return self

    def parents(self) -> dict[str, Manifest]:
        """The manifest of the prepared artefact, where there is one."""
        return {} if self.prepared is None else {"prepared": open_artifact(self.prepared, "prepared").manifest}

    def states(self) -> list[list[str | int]]:
        """Path, bytes and state of the files of a table."""
        return [] if self.path is None else table_states(self.path)

    def tables(self) -> Iterator[tuple[str, pa.Table]]:
        """(file, rows of TABLE with `_error`, and group_id where near-duplicates are known) of each part."""
        if self.prepared is not None:
            artifact = open_artifact(self.prepared, "prepared")
            for name in artifact.names("products/"):
                rows = artifact.table(name, [*_COLUMNS, "group_id"])
                yield name, rows.append_column("_error", pa.nulls(rows.num_rows, pa.string()))
            return
        yield self.path or "", load_rows(self.path or "", self.columns, TABLE, endpoint_url=self.endpoint_url)


class LabelAttributesConfig(Config):
    """Which products, read by which tables."""

    products: AttributeProducts
    image_vectors: Path | None = None           # artefact of embed_images: names of pictures help to find groups
    rules: tuple[str, ...] = (PACKAGED,)        # folders of attribute tables; later ones add to earlier ones
    groups: GroupConfig = GroupConfig()
    keep: Literal["garments", "all"] = "garments"   # garments: products whose kind was found
    seed: int = 7                               # of the sample of groups to look at
    output: Path


def label_attributes(config: LabelAttributesConfig) -> Artifact:
    """The `attributes` artefact: attributes.parquet (ATTRIBUTE_ROW), quarantine.parquet, groups.csv (a sample to look
    at), audit.json and audit.html.

    Facts: schema (digest), values of each attribute, known (share of products that tell it), counts. Errors:
    `AttributeSchemaError` for tables that cannot be used, `AttributeDataError` when no product is left.
    """
    schema = load_schema(config.rules)
    parents = config.products.parents()
    if config.image_vectors is not None:
        parents["images"] = open_artifact(config.image_vectors, IMAGES_KIND).manifest
    key = fingerprint({
        "stage": STAGE_VERSION, "options": config.model_dump(mode="json", exclude={"output", "rules"}),
        "rules": schema.digest, "products": config.products.states(),
        "parents": {name: one.fingerprint for name, one in parents.items()}})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    reader = AttributeReader(schema)
    products, values, quarantine = _read(config, reader)
    groups = find_groups(products, _images(config.image_vectors), config.groups)
    rows = with_groups(values, groups)
    audit = attribute_audit(rows, products, groups, quarantine, reader)
    with stage(config.output.resolve(), KIND, key) as staging:
        files = [staging.write_table("attributes.parquet", rows), staging.write_table("quarantine.parquet", quarantine)]
        texts = {"groups.csv": spot_check(rows, products, groups, config.seed), "audit.html": attribute_page(audit),
                 "audit.json": json.dumps(audit, indent=1, ensure_ascii=False, allow_nan=False) + "\n"}
        for name, text in texts.items():
            write_text(staging.path / name, text)
        return staging.commit([*files, *map(staging.entry, texts)], config=config, parents=parents,
                              facts=_facts(schema, audit))


def _facts(schema: AttributeSchema, audit: Row) -> Row:
    return {"schema": schema.digest, "values": {name: list(schema.values(name)) for name in NAMES},
            "known": {row["attribute"]: row["share"] for row in audit["known"]}, "counts": audit["counts"]}


def _images(root: Path | None) -> pa.Table | None:
    if root is None:
        return None
    tables = open_artifact(root, IMAGES_KIND).tables("vectors/", ["image_id", "product_id"])
    return pa.concat_tables(tables)


def _read(config: LabelAttributesConfig, reader: AttributeReader) -> tuple[pa.Table, pa.Table, pa.Table]:
    """(products that are kept, their ATTRIBUTE_ROWs without groups, QUARANTINE), the first two by product_id."""
    kept, values, aside = [], [], []
    seen: set[str] = set()
    for source, table in config.products.tables():
        rows = read_values(table.filter(pc.is_null(table["_error"])).select(
            [name for name in table.column_names if not name.startswith("_")]), reader)
        found: dict[str, int] = {}      # the first row of each id
        for at, product in enumerate(rows["product_id"].to_pylist()):
            found.setdefault(product, at)
        places = np.flatnonzero(pc.is_null(table["_error"]).to_numpy(zero_copy_only=False))
        category = rows["category2"].to_pylist()
        use = []
        for at, (place, product) in enumerate(zip(places.tolist(), rows["product_id"].to_pylist(), strict=True)):
            reason = "a second row with this id" if product in seen or found[product] != at else \
                "no kind of garment in its words" if config.keep == "garments" and category[at] is None else None
            if reason is None:
                use.append((place, at))
            else:
                aside.append(_aside(source, product, reason))
        seen.update(found)
        aside += [_aside(source, row["product_id"], row["_error"])
                  for row in table.filter(pc.is_valid(table["_error"])).select(["product_id", "_error"]).to_pylist()]
        kept.append(table.take(pa.array([place for place, _ in use], pa.int64())).select(
            [name for name in table.column_names if not name.startswith("_")]))
        values.append(rows.take(pa.array([at for _, at in use], pa.int64())))
    quarantine = pa.Table.from_pylist(sorted(aside, key=lambda one: (one["reason"], one["key"] or "")),
                                      schema=QUARANTINE)
    products, rows = pa.concat_tables(kept), pa.concat_tables(values)
    if not rows.num_rows:
        reasons = ", ".join(sorted({row["reason"] for row in aside})[:3])
        raise AttributeDataError(f"no garment is left: {len(aside)} products set aside ({reasons or 'no rows'}); are "
                                 "title and categories mapped in products.columns?")
    order = pc.sort_indices(rows["product_id"])
    return products.take(order), rows.take(order), quarantine


def _aside(source: str, product: str | None, reason: str) -> Row:
    return {"table": "products", "source": source, "key": product, "reason": reason,
            "row": json.dumps({"product_id": product})[:QUARANTINED_CHARS]}


def open_attributes(root: Path) -> tuple[Artifact, pa.Table]:
    """(the artefact, its ATTRIBUTE_ROW table)."""
    artifact = open_artifact(root, KIND)
    return artifact, artifact.table("attributes.parquet", ATTRIBUTE_ROW.names)
