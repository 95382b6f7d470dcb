"""Any table of products -> the probability of each concern for each product, on every node of a Ray cluster.

The table is divided into pieces of its files, or, when it is a prepared artefact, into the artefact's own buckets,
so that an index finds the scores of a bucket in one file. Ray Data hands pieces to a pool of actors, each of which
loads the model once and writes the probabilities of a piece as one file that appears whole or not at all; a rerun
skips the pieces that are there. A row that cannot be read goes to quarantine with its reason; one without ingredients
is scored by its title and says so, and so does one whose list is none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pydantic import Field

from recsys_ray import runtime
from recsys_ray.artifacts import (
    CURRENT,
    Artifact,
    FileEntry,
    Staging,
    find_artifact,
    open_artifact,
    stage,
    write_table,
)
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.concern_products import category_path
from recsys_ray.data.concern_rulebook import Rulebook, load_rules
from recsys_ray.data.concerns import Labeller
from recsys_ray.data.ingredients import ingredients_in_text, list_flags, parse_ingredients
from recsys_ray.data.rule_files import PACKAGED
from recsys_ray.data.sources.blocks import Piece, Recipe, pieces_of, read_piece
from recsys_ray.data.sources.config import TableSource
from recsys_ray.data.sources.plan import file_states, recipes
from recsys_ray.models.bt_bert import KIND as MODEL_KIND
from recsys_ray.models.bt_bert import Concern
from recsys_ray.models.bt_bert_scorer import BtBertConfig, BtBertScorer, bt_bert_identity
from recsys_ray.models.sentence_layout import find_model
from recsys_ray.piecework import piece_file, run_pieces
from recsys_ray.runtime import RayConfig
from recsys_ray.schema import QUARANTINE

log = logging.getLogger(__name__)

KIND = "concern_scores"
STAGE_VERSION = 2       # raise it when the same inputs would give other probabilities
PIECE_BYTES = 4 << 20   # of a file that one actor scores at a time: some thousands of products
SCORES, ASIDE, CSV = "scores/part", "set_aside/part", "bt_bert_outputs.csv"
BUCKETS = "scores/bucket"
NO_INGREDIENTS, NOTHING = "no ingredients", "neither ingredients nor a title"
FROM_TEXT = "ingredients found in its text"
# of a prepared product:
READ = ("product_id", "row_id", "title", "categories", "ingredients", "description", "features")


class ScoredTable(Config):
    """CSV, TSV, JSONL or Parquet files of products, or the root of a `prepared` artefact."""

    path: str
    columns: dict[str, str] = Field(default_factory=dict)   # our name (product_id, title, ingredients) -> theirs
    find_in_text: bool = False      # where there is no list: one after "Ingredients:", or the ones the text names
    # None: of a table they are scored by their title, of a shop with products of all kinds they are left out
    without_ingredients: Literal["score", "leave_out"] | None = None
    kinds_only: bool = False        # leave out products of no kind that the rules know: vitamins are sold as food, too
    rules: tuple[str, ...] = (PACKAGED,)                    # whose names tell what an ingredient and a kind is

    def source(self) -> TableSource:
        """The files of a plain table."""
        return TableSource(products=self.path, product_columns=self.columns)

    def prepared(self) -> Artifact | None:
        """The prepared artefact, if it is one."""
        root = Path(self.path)
        return open_artifact(root.resolve(), "prepared") if (root / CURRENT).is_file() else None


class ScoreConcernsConfig(Config):
    """Which products, which model."""

    products: ScoredTable
    output: Path                                        # artefact root of the scores
    model: BtBertConfig
    queries: dict[str, str] = Field(default_factory=dict)   # concern -> other words to ask for it with
    workers: int | None = Field(default=None, ge=1)     # None: one a GPU, else one a core
    ray: RayConfig = RayConfig()


@dataclass(frozen=True)
class _Job:
    """What every worker needs to know; pieces are named by their number."""

    work: tuple[tuple[Piece, Recipe], ...]      # of a plain table
    buckets: int                                # of a prepared artefact
    prepared: Artifact | None
    options: ScoredTable
    staging: str
    model: dict[str, Any]
    queries: dict[str, str]


def score_concerns(config: ScoreConcernsConfig) -> Artifact:
    """The `concern_scores` artefact: scores/*.parquet, the same rows as bt_bert_outputs.csv, quarantine.parquet.

    Columns: product_id, one float32 probability a concern, `addresses` (the concerns from their thresholds on),
    `note` (why a probability says little; null for most). Of a prepared artefact scores/bucket-*.parquet hold the rows
    of its buckets by row id, with `row_id` and `has_ingredients`. Facts: model (identity), concerns, queries, rows,
    quarantined. Errors: `ValueError` for a query of a concern that the model does not know.
    """
    source, prepared = config.products.source(), config.products.prepared()
    identity, output = bt_bert_identity(config.model), config.output.resolve()
    _check_queries(config.queries, identity["card"])
    key = fingerprint({
        "stage": STAGE_VERSION, "model": identity, "dtype": config.model.dtype, "queries": config.queries,
        "options": config.products.model_dump(mode="json", exclude={"path", "rules"}),
        "rules": load_rules(config.products.rules).digest,
        "files": file_states(source, ("products",)) if prepared is None else prepared.manifest.reference})
    if (done := find_artifact(output, KIND, key)) is not None:
        return done
    work = () if prepared else tuple((piece, recipe) for recipe in recipes(source, "products")
                                     for file in recipe.files for piece in pieces_of(file, PIECE_BYTES))
    with stage(output, KIND, key) as staging, runtime.connected(config.ray):
        model = config.model.replace(model=str(find_model(config.model.model, MODEL_KIND)))
        buckets = int(prepared.manifest.facts["num_buckets"]) if prepared else 0
        job = _Job(work, buckets, prepared, _decided(config.products, prepared), str(staging.path),
                   model.model_dump(mode="json"), config.queries)
        return _run(config, job, staging, identity)


def _check_queries(queries: Mapping[str, str], card: Mapping[str, Any]) -> None:
    known = [one["name"] for one in card["concerns"]]
    if queries and card["mode"] == "explicit":
        raise ValueError("queries: an explicit model reads no query")
    if unknown := [name for name in queries if name not in known]:
        raise ValueError(f"queries: unknown concern {unknown[0]!r}; the model knows {', '.join(known)}")


def _decided(options: ScoredTable, prepared: Artifact | None) -> ScoredTable:
    """The same options with a decision about products without ingredients."""
    return options.replace(without_ingredients=options.without_ingredients or ("leave_out" if prepared else "score"))


def _run(config: ScoreConcernsConfig, job: _Job, staging: Staging, identity: dict[str, Any]) -> Artifact:
    made = run_pieces(_BucketScorer if job.prepared else _PieceScorer, job, job.buckets or len(job.work), staging.path,
                      BUCKETS if job.prepared else SCORES, gpu=config.model.device != "cpu", workers=config.workers)
    quarantine = pa.concat_tables([QUARANTINE.empty_table(), *(
        pq.read_table(staging.path / piece_file(ASIDE, number), schema=QUARANTINE)
        for number in range(len(job.work)))])
    rows, without = _write_csv(staging.path, made)
    if not rows:
        raise ValueError(f"{config.products.path}: no row could be read; the first reason: "
                         f"{quarantine['reason'][0].as_py() if quarantine.num_rows else 'the table is empty'}")
    files = [*made, staging.write_table("quarantine.parquet", quarantine), staging.entry(CSV, rows)]
    facts = {"model": identity, "concerns": [one["name"] for one in identity["card"]["concerns"]],
             "queries": config.queries, "rows": rows, "quarantined": quarantine.num_rows}
    log.info("%d products scored, %d set aside", rows, quarantine.num_rows)
    if without == rows:
        log.warning("none of the %d products has ingredients, so only titles were read; name their column: "
                    "products.columns.ingredients=COLUMN", rows)
    return staging.commit(files, config=config, facts=facts,
                          parents={"prepared": job.prepared.manifest} if job.prepared else {})


class _Scorer:
    """A loaded model, and the names by which it is told what an ingredient is."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.scorer = BtBertScorer(BtBertConfig.model_validate(job.model))
        self.labeller = Labeller(load_rules(job.options.rules))
        self.asked = tuple(one.replace(query=job.queries.get(one.name, one.query)) for one in self.scorer.card.concerns)


class _PieceScorer(_Scorer):
    """Turns the number of a piece into scores."""

    def make(self, number: int) -> pa.Table:
        """The scores of a piece; what cannot be read is set aside in a file of its own."""
        scored, set_aside = [score_schema(self.scorer).empty_table()], [QUARANTINE.empty_table()]
        for block in read_piece(*self.job.work[number]):
            bad = pc.is_valid(block["_error"])
            set_aside.append(_quarantined(block.filter(bad)))
            scored.append(score_products(self.scorer, block.filter(pc.invert(bad)), self.job.options, self.labeller,
                                         self.asked))
        write_table(Path(self.job.staging), piece_file(ASIDE, number), pa.concat_tables(set_aside))
        return pa.concat_tables(scored)


class _BucketScorer(_Scorer):
    """Turns the number of a bucket into scores."""

    def make(self, number: int) -> pa.Table:
        """The scores of a bucket's products."""
        assert self.job.prepared is not None
        products = self.job.prepared.table(piece_file("products/bucket", number), READ)
        return score_bucket(self.scorer, products, self.job.options, self.labeller, self.asked)


# --- rows -----------------------------------------------------------------------------------------
def score_schema(scorer: BtBertScorer) -> pa.Schema:
    """The columns of the scores of this model."""
    return pa.schema([pa.field("product_id", pa.string()),
                      *(pa.field(name, pa.float32()) for name in scorer.card.names()),
                      pa.field("addresses", pa.list_(pa.string())), pa.field("note", pa.string())])


def score_products(scorer: BtBertScorer, products: pa.Table, options: ScoredTable, labeller: Labeller,
                   asked: Sequence[Concern] | None = None) -> pa.Table:
    """RAW_PRODUCT rows -> their scores, in their order; `asked`: the model's concerns, in other words."""
    return _scored(scorer, with_lists(products, options, labeller), labeller.rulebook, asked)[0]


def score_bucket(scorer: BtBertScorer, products: pa.Table, options: ScoredTable, labeller: Labeller,
                 asked: Sequence[Concern] | None = None) -> pa.Table:
    """PRODUCT rows -> their scores by row id; `asked`: the model's concerns, in other words."""
    products = with_lists(products.sort_by("row_id"), options, labeller)
    table, has = _scored(scorer, products, labeller.rulebook, asked)
    return table.append_column("row_id", products["row_id"].combine_chunks()).append_column("has_ingredients", has)


def with_lists(products: pa.Table, options: ScoredTable, labeller: Labeller) -> pa.Table:
    """Rows of products with `ingredients` null where there are none, and `_found`: whether they were found in a text.

    Rows without any, and of no known kind, are left out if the options say so.
    """
    book = labeller.rulebook
    if options.kinds_only:
        known = [bool(labeller.kinds(category_path(row["categories"]), row["title"] or ""))
                 for row in products.select(["title", "categories"]).to_pylist()]
        products = products.filter(pa.array(known, pa.bool_()))
    lists: list[str | None] = [one if (one or "").strip() else None for one in products["ingredients"].to_pylist()]
    own = [one is not None for one in lists]
    if options.find_in_text:
        lists = [one or ingredients_in_text(_text_of(row), book.synonyms, book.active_names)
                 for one, row in zip(lists, products.select(["title", "description", "features"]).to_pylist(),
                                     strict=True)]
    products = products.set_column(products.column_names.index("ingredients"), "ingredients",
                                   pa.array(lists, pa.string()))
    products = products.append_column("_found", pa.array([one is not None and not first for one, first in
                                                          zip(lists, own, strict=True)], pa.bool_()))
    return products.filter(pc.is_valid(products["ingredients"])) if options.without_ingredients == "leave_out" \
        else products


def _scored(scorer: BtBertScorer, products: pa.Table, book: Rulebook, asked: Sequence[Concern] | None
            ) -> tuple[pa.Table, pa.Array]:
    """(scores in the order of the rows, which of them have ingredients)."""
    ingredients, titles = products["ingredients"].to_pylist(), products["title"].to_pylist()
    found_NC = scorer.score(ingredients, titles, asked)
    names, thresholds = scorer.card.names(), scorer.card.calibration.thresholds
    said_NC = found_NC >= np.array([thresholds.get(name, 0.5) for name in names], dtype=np.float32)
    notes = [_note(*row, book) for row in zip(ingredients, titles, products["_found"].to_pylist(), strict=True)]
    columns = [products["product_id"].combine_chunks(),
               *(pa.array(found_NC[:, place]) for place in range(len(names))),
               pa.array([[name for name, yes in zip(names, row, strict=True) if yes] for row in said_NC.tolist()],
                        pa.list_(pa.string())), pa.array(notes, pa.string())]
    return pa.Table.from_arrays(columns, schema=score_schema(scorer)), pa.array(
        [one is not None for one in ingredients], pa.bool_())


def _note(ingredients: str | None, title: str | None, found: bool, book: Rulebook) -> str | None:
    """Why the probabilities of a product say little; None where nothing is known against them."""
    if ingredients is None:
        return NO_INGREDIENTS if (title or "").strip() else NOTHING
    flags = list_flags(parse_ingredients(ingredients, book.synonyms), book.synonyms)
    return flags[0] if flags else FROM_TEXT if found else None


def _text_of(product: dict[str, Any]) -> str:
    return "\n".join(one for one in (product["title"], product["description"], *(product["features"] or ())) if one)


def _quarantined(block: pa.Table) -> pa.Table:
    rows = [{"table": "products", "source": where, "key": None, "reason": reason, "row": None}
            for where, reason in zip(block["_source"].to_pylist(), block["_error"].to_pylist(), strict=True)]
    return pa.Table.from_pylist(rows, schema=QUARANTINE)


def _write_csv(staging: Path, parts: list[FileEntry]) -> tuple[int, int]:
    """Write the parts as one CSV file, a part at a time; returns its rows, and how many are without ingredients."""
    rows, without, partial = 0, 0, staging / f".{CSV}.{os.getpid()}.tmp"
    writer: pa_csv.CSVWriter | None = None
    for table in _tables(staging, parts):
        flat = table.select([name for name in table.column_names if name not in ("row_id", "has_ingredients")])
        flat = flat.set_column(flat.column_names.index("addresses"), "addresses",
                               pc.binary_join(flat["addresses"], "|"))
        writer = writer or pa_csv.CSVWriter(partial, flat.schema)
        writer.write_table(flat)
        rows += table.num_rows
        without += sum(one in (NO_INGREDIENTS, NOTHING) for one in table["note"].to_pylist())
    if writer is not None:
        writer.close()
        os.replace(partial, staging / CSV)
    return rows, without


def _tables(staging: Path, parts: list[FileEntry]) -> Iterator[pa.Table]:
    for entry in parts:
        with pq.ParquetFile(staging / entry.path, page_checksum_verification=True) as file:
            yield file.read()
