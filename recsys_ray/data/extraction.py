"""One bucket of an extraction: what has to be asked, the answers of one unit, and the finished tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_ray.artifacts import Artifact, FileEntry, open_artifact, write_table
from recsys_ray.data.buckets import first_per_group
from recsys_ray.data.keywords import content_words, review_keywords
from recsys_ray.data.llm_client import LlmConfig, Messages
from recsys_ray.data.llm_keywords import ASPECTS, Answer, Question, answer_all, keywords_of
from recsys_ray.data.preprocess import QUARANTINED_CHARS, clean_query
from recsys_ray.ids import row_ids
from recsys_ray.schema import PRODUCT_SUMMARY, QUARANTINE, REVIEW_KEYWORDS, TEXTS, conform

KEYWORDS, SUMMARY = "keywords", "summary"
ASKED = pa.schema([("kind", pa.string()), ("id", pa.string()), ("row_id", pa.int64()), ("product_id", pa.string()),
                   ("split", pa.string()), ("text", pa.string()), ("content_key", pa.string())])
ANSWERED = pa.schema([*ASKED, *((name, TEXTS) for name in (*ASPECTS, "keywords")), ("summary", pa.string()),
                      ("reason", pa.string()), ("unavailable", pa.bool_())])


@dataclass(frozen=True)
class Plan:
    """What every bucket needs; plain values, so that they travel to any node."""

    prepared: str
    version: str
    staging: str
    earlier: tuple[str, str] | None     # root and version of the artefact whose answers are kept
    llm: LlmConfig | None
    splits: tuple[str, ...]
    max_reviews_per_product: int | None
    min_words: int
    summaries_over: int
    summary_chars: int

    def question(self, kind: str, text: str) -> Question:
        """What is asked of a text."""
        return Question("summary", text, self.summary_chars) if kind == SUMMARY else Question("keywords", text)


@dataclass(frozen=True)
class Unit:
    """A run of texts of one bucket that one worker asks about."""

    bucket: str
    name: str
    start: int
    rows: int

    @property
    def file(self) -> str:
        """Where its answers stand below the staging directory."""
        return f"scratch/answers/{self.name}.parquet"


def asked_file(bucket: str) -> str:
    """Where the texts that have to be asked about stand below the staging directory."""
    return f"scratch/asked/{bucket}.parquet"


def _known_file(bucket: str) -> str:
    return f"scratch/known/{bucket}.parquet"


# --- what to ask ----------------------------------------------------------------------------------
def plan_bucket(plan: Plan, bucket: str) -> Counter[str]:
    """Write the texts of one bucket that have to be asked about, and those that need not be; returns the counts."""
    prepared = open_artifact(plan.prepared, "prepared", plan.version)
    earlier = _earlier_answers(plan, bucket)
    counts: Counter[str] = Counter()
    asked, known = [ASKED.empty_table()], [ANSWERED.empty_table()]
    for texts in _texts(plan, prepared, bucket):
        kinds, said = texts["kind"].to_pylist(), texts["text"].to_pylist()
        keys = [plan.question(kind, text).key(plan.llm) for kind, text in zip(kinds, said, strict=True)]
        texts = texts.append_column("content_key", pa.array(keys, pa.string()))
        kept = np.array([key in earlier for key in keys], dtype=bool)
        empty = ~kept & np.array([len(content_words(text)) < plan.min_words for text in said], dtype=bool)
        asked.append(texts.filter(pa.array(~kept & ~empty)).cast(ASKED))
        rows = texts.filter(pa.array(kept | empty)).to_pylist()
        known.append(_answered(rows, [earlier.get(row["content_key"], Answer({})) for row in rows]))
        counts["answers kept"] += int(kept.sum())
        counts["too short to ask"] += int(empty.sum())
    for name, tables in ((asked_file(bucket), asked), (_known_file(bucket), known)):
        write_table(Path(plan.staging), name, pa.concat_tables(tables))
    counts["asked"] = sum(table.num_rows for table in asked)
    return counts


def _earlier_answers(plan: Plan, bucket: str) -> dict[str, Answer]:
    """The answers of an earlier version by their keys."""
    if plan.earlier is None:
        return {}
    artifact, found = open_artifact(plan.earlier[0], "keywords", plan.earlier[1]), {}
    for folder, columns in (("keywords", [*ASPECTS, "keywords"]), ("summaries", ["summary"])):
        name = f"{folder}/{bucket}.parquet"
        if name in artifact.names(f"{folder}/"):
            for row in artifact.table(name, ["content_key", *columns]).to_pylist():
                found[row.pop("content_key")] = Answer(
                    {key: [value] if isinstance(value, str) else value or [] for key, value in row.items()})
    return found


def _texts(plan: Plan, prepared: Artifact, bucket: str) -> Iterator[pa.Table]:
    """The texts of one bucket, some at a time: reviews of each split, then long descriptions."""
    for split in plan.splits:
        name = f"reviews/{split}/{bucket}.parquet"
        if name in prepared.names("reviews/"):
            yield from _review_texts(plan, prepared.file(name), split)
    if plan.llm is None:
        return
    products = prepared.table(f"products/{bucket}.parquet", ["row_id", "product_id", "description"])
    long = products.filter(pc.greater(pc.fill_null(pc.utf8_length(products["description"]), 0), plan.summaries_over))
    yield _text_table(SUMMARY, "", long["product_id"], long, long["description"].to_pylist())


def _review_texts(plan: Plan, path: Path, split: str) -> Iterator[pa.Table]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        chosen = None
        if plan.max_reviews_per_product is not None:
            ids = file.read(columns=["row_id", "review_id"])
            order = row_ids(ids["review_id"].to_pylist())       # the first of these feed the product's text
            chosen = first_per_group(ids["row_id"].to_numpy(), order, plan.max_reviews_per_product)
        start = 0
        for group in range(file.num_row_groups):
            block = file.read_row_group(group, columns=["review_id", "row_id", "product_id", "title", "text"])
            if chosen is not None:
                here = np.sort(chosen[(chosen >= start) & (chosen < start + block.num_rows)]) - start
                start += block.num_rows
                block = block.take(pa.array(here))
            said = [clean_query(str(text if text and text.strip() else title or "")) for title, text in zip(
                block["title"].to_pylist(), block["text"].to_pylist(), strict=True)]
            yield _text_table(KEYWORDS, split, block["review_id"], block, said)


def _text_table(kind: str, split: str, ids: pa.ChunkedArray, rows: pa.Table, texts: list[str]) -> pa.Table:
    count = rows.num_rows
    return pa.table({"kind": pa.array([kind] * count, pa.string()), "id": ids, "row_id": rows["row_id"],
                     "product_id": rows["product_id"], "split": pa.array([split] * count, pa.string()),
                     "text": pa.array(texts, pa.string())})


# --- answers --------------------------------------------------------------------------------------
def answer_unit(asked: pa.Table, plan: Plan, ask: Callable[[Messages], str] | None) -> pa.Table:
    """ANSWERED rows of ASKED rows; without `ask` by the offline extractor."""
    rows = asked.to_pylist()
    if ask is None or plan.llm is None:
        return _answered(rows, [Answer({"keywords": review_keywords(row["text"])}) for row in rows])
    questions = [plan.question(row["kind"], row["text"]) for row in rows]
    return _answered(rows, answer_all(questions, plan.llm, ask))


def _answered(rows: list[dict[str, Any]], answers: list[Answer]) -> pa.Table:
    return pa.Table.from_pylist([{**row, **_columns(answer.values), "reason": answer.reason,
                                  "unavailable": answer.unavailable}
                                 for row, answer in zip(rows, answers, strict=True)], schema=ANSWERED)


def _columns(values: Mapping[str, list[str]]) -> dict[str, Any]:
    return {**{aspect: values.get(aspect, []) for aspect in ASPECTS},
            "keywords": values.get("keywords") or keywords_of(dict(values)),
            "summary": values["summary"][0] if values.get("summary") else None}


# --- finished tables ------------------------------------------------------------------------------
def merge_bucket(plan: Plan, bucket: str, units: list[str]) -> tuple[list[FileEntry], Counter[str]]:
    """Write keywords, summaries and quarantine of one bucket; returns their entries and the counts."""
    staging = Path(plan.staging)
    files = [_known_file(bucket), *(Unit(bucket, name, 0, 0).file for name in units)]
    rows = pa.concat_tables([pq.ParquetFile(staging / name, page_checksum_verification=True).read() for name in files])
    right = rows.filter(rows["reason"].is_null()).rename_columns(
        ["review_id" if name == "id" else name for name in rows.column_names])
    reviews = right.filter(pc.equal(right["kind"], KEYWORDS)).sort_by([("row_id", "ascending"),
                                                                      ("review_id", "ascending")])
    written = right.filter(pc.and_(pc.equal(right["kind"], SUMMARY), right["summary"].is_valid()))
    wrong = rows.filter(rows["reason"].is_valid())
    entries = [
        write_table(staging, f"keywords/{bucket}.parquet", conform(reviews, REVIEW_KEYWORDS, "keywords")),
        write_table(staging, f"summaries/{bucket}.parquet",
                    conform(written.sort_by("row_id"), PRODUCT_SUMMARY, "summaries")),
        write_table(staging, f"quarantine/{bucket}.parquet", _quarantine(wrong))]
    counts: Counter[str] = Counter(f"set aside: {reason}" for reason in wrong["reason"].to_pylist())
    counts["without an answer"] += sum(wrong["unavailable"].to_pylist())
    counts["reviews with keywords"] += sum(bool(words) for words in reviews["keywords"].to_pylist())
    counts["summaries"] += written.num_rows
    return entries, counts


def _quarantine(rows: pa.Table) -> pa.Table:
    tables = {KEYWORDS: "reviews", SUMMARY: "products"}
    return conform(pa.table({
        "table": pa.array([tables[kind] for kind in rows["kind"].to_pylist()], pa.string()), "key": rows["id"],
        "reason": rows["reason"],
        "row": pa.array([text[:QUARANTINED_CHARS] for text in rows["text"].to_pylist()], pa.string()),
    }), QUARANTINE, "quarantine").sort_by([("reason", "ascending"), ("key", "ascending")])
