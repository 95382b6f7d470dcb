"""The Ray shell: from a source's files to the published rows, and from a shop's judgments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config
from recsys_ray.data.candidate_lists import CandidateLists, candidate_lists
from recsys_ray.data.judged_pairs import GradedQuery
from recsys_ray.data.judged_triples import JudgedShop, judged_rows
from recsys_ray.data.reranker_data import MakeRerankerPairsConfig, make_reranker_pairs
from recsys_ray.ids import row_ids
from recsys_ray.schema import HISTORY, ITEM, RERANKER_PAIR

USERS, BOOKS = 60, 40


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small library in the book source's own four files."""
    root = tmp_path_factory.mktemp("goodreads")
    random = np.random.default_rng(3)
    shelves = [{"name": "to-read", "count": 9}, {"name": "fantasy", "count": 5}]
    pq.write_table(pa.table({
        "book_id": [str(book) for book in range(BOOKS)], "title": [f"Book {book}" for book in range(BOOKS)],
        "description": ["words"] * BOOKS, "popular_shelves": [shelves] * BOOKS,
        "authors": [[{"author_id": str(book % 3), "role": ""}] for book in range(BOOKS)]}),
        root / "reduced_books.parquet")
    names = pa.table({"author_id": ["0", "1", "2"], "name": ["Ann", "Bob", "Cid"]})
    pq.write_table(names, root / "new_authors.parquet")
    pq.write_table(pa.table({"book_id": ["0"], "text": ["the source's own text"]}), root / "book_texts_reduced.parquet")
    rows = [(f"u{user}", str(book), int(random.integers(3, 6)) if number < 8 else 0)
            for user in range(USERS) for number, book in enumerate(random.permutation(BOOKS)[:10].tolist())]
    users, books, ratings = zip(*rows, strict=True)
    pq.write_table(pa.table({"user_id": users, "book_id": books, "rating": ratings}),
                   root / "reduced_interactions.parquet")
    return root


def configured(source: dict[str, Any], output: Path, **changes: Any) -> MakeRerankerPairsConfig:
    return MakeRerankerPairsConfig.model_validate({
        "source": source, "output": output, "num_buckets": 3, "max_positives": 2, "min_positives": 2,
        "negatives": {"uniform": 2, "popularity_matched": 1}, "popularity_bins": 5, **changes})


def rows_of(artifact: Artifact, prefix: str) -> list[dict[str, Any]]:
    return [row for table in artifact.tables(prefix) for row in table.to_pylist()]


@pytest.mark.ray
def test_the_books_of_the_source_become_rows(library: Path, tmp_path: Path, local_ray: None) -> None:
    config = configured({"format": "goodreads", "path": str(library)}, tmp_path / "pairs")
    made = make_reranker_pairs(config)
    rows = rows_of(made, "pairs/")
    assert {table.schema for table in made.tables("pairs/")} == {RERANKER_PAIR}
    assert {row["split"] for row in rows} == {"train", "valid", "test"}
    for split in ("train", "valid", "test"):
        assert {row["split"] for row in rows_of(made, f"pairs/{split}/")} == {split}
    assert sum(row["label"] for row in rows) * 4 == len(rows)
    assert all(row["query"].startswith("Likes: Book") and row["query"].endswith("Genres: fantasy.") for row in rows)
    assert "| candidates named in their own context | 0 |" in made.file("audit/audit.md").read_text("utf-8")
    items = {row["product_id"]: row for row in made.table("items.parquet").to_pylist()}
    assert made.table("items.parquet").schema == ITEM
    assert items["0"]["text"] == "the source's own text"
    assert items["4"]["text"] == "Book 4 by Bob. Genres: fantasy. words"
    histories = rows_of(made, "histories/")
    assert {table.schema for table in made.tables("histories/")} == {HISTORY}
    held = {(row["user_id"], row["product_id"]) for row in histories if row["held_out"]}
    assert held == {(row["query_id"], row["product_id"]) for row in rows if row["label"]}
    met = {(row["user_id"], row["product_id"]) for row in histories}
    assert not met & {(row["query_id"], row["product_id"]) for row in rows if not row["label"]}
    assert {row["kind"] for row in histories} == {"rating", "to_read"}
    assert (len(histories), len({row["user_id"] for row in histories})) == (10 * USERS, USERS)
    liked = [row for row in histories if row["split"] == "train" and (row["rating"] or 0) >= 4]
    assert sum(row["popularity"] for row in items.values()) == len(liked)
    assert make_reranker_pairs(config).manifest.version == made.manifest.version
    other = make_reranker_pairs(config.replace(output=tmp_path / "other"))
    assert [entry.sha256 for entry in other.manifest.files] == [entry.sha256 for entry in made.manifest.files]


@pytest.mark.ray
def test_users_are_sampled_and_lists_are_mined(library: Path, tmp_path: Path, local_ray: None) -> None:
    lists = tmp_path / "found.parquet"
    pq.write_table(pa.table({"query_id": [f"u{user}" for user in range(USERS) for _ in range(20)],
                             "product_id": [str(book) for _ in range(USERS) for book in range(20)],
                             "rank": [rank for _ in range(USERS) for rank in range(1, 21)]}), lists)
    made = make_reranker_pairs(configured(
        {"format": "goodreads", "path": str(library)}, tmp_path / "pairs", negatives={"mined": 2}, last_rank=15,
        candidates=[str(lists)], max_users={"train": 10}))
    rows = rows_of(made, "pairs/")
    assert len({row["query_id"] for row in rows if row["split"] == "train"}) == 10
    assert len({row["user_id"] for row in rows_of(made, "histories/")}) == USERS
    assert {row["origin"] for row in rows} == {"positive", "mined"}
    assert {int(row["product_id"]) for row in rows if row["origin"] == "mined"} <= set(range(15))


def test_several_lists_become_one(tmp_path: Path) -> None:
    for name, ranks in (("one", [1, 2, 9]), ("two", [2, 1, 3])):
        pq.write_table(pa.table({"query_id": ["q"] * 3, "product_id": ["a", "b", "c"], "rank": ranks}),
                       tmp_path / f"{name}.parquet")
    paths = [str(tmp_path / f"{name}.parquet") for name in ("one", "two")]
    assert candidate_lists(paths, 1, 5).of("q") == ["a", "b", "c"]
    assert candidate_lists(paths[::-1], 1, 5).of("q") == ["b", "a", "c"]
    assert candidate_lists(paths[:1], 2, 5).of("q") == ["b"]
    assert candidate_lists(paths, 1, 5).of("another") == candidate_lists([], 1, 5).of("q") == []
    assert candidate_lists(paths, 1, 5).digest() != candidate_lists(paths, 1, 2).digest()


def test_contradictions_are_refused(tmp_path: Path) -> None:
    judged = {"prepared": "p", "queries": "q", "judgments": "j"}
    source = {"format": "goodreads", "path": "x"}
    for changes, reason in (({"judged": judged}, "either source"), ({"source": None}, "either source"),
                            ({"negatives": {"mined": 1}}, "mined negatives need"),
                            ({"source": None, "judged": {**judged, "mined": 1}}, "mined negatives need")):
        with pytest.raises(ValueError, match=reason):
            configured(**{"source": source, "output": tmp_path, **changes})


# --- judged queries -------------------------------------------------------------------------------
@pytest.fixture
def prepared(tmp_path: Path) -> Artifact:
    """Ten products in two buckets; p8 and p9 are near-duplicates."""
    names = [f"p{number}" for number in range(10)]
    numbers = row_ids(names)
    groups = [int(one) for one in numbers]
    groups[9] = groups[8]
    with stage(tmp_path / "prepared", "prepared", "f") as staging:
        files = []
        for bucket in range(2):
            order = [place for place in np.argsort(numbers).tolist() if numbers[place] % 2 == bucket]
            ids = {"row_id": [int(numbers[place]) for place in order], "product_id": [names[place] for place in order]}
            files.append(staging.write_table(f"products/bucket-{bucket:05d}.parquet", pa.table(
                {**ids, "group_id": [groups[place] for place in order]})))
            files.append(staging.write_table(f"product_text/bucket-{bucket:05d}.parquet", pa.table(
                {**ids, "text": [f"text {names[place]}" for place in order]})))
        return staging.commit(files, config=Config(), facts={"num_buckets": 2, "template": "fields-v1"})


def test_judgments_become_rows_with_their_gains(prepared: Artifact) -> None:
    from collections import Counter

    counts: Counter[str] = Counter()
    config = JudgedShop(prepared=prepared.path, queries="", judgments="", uniform=4, mined=2)
    lists = CandidateLists.of_table(pa.table({"query_id": ["q1"] * 3, "product_id": ["p1", "p4", "p5"],
                                              "rank": [1, 2, 3]}))
    queries = [GradedQuery("q1", "blue", "train", {"p1": 1.0, "p2": 0.01, "p8": 0.0, "gone": 1.0}),
               GradedQuery("q2", "red", "valid", {"p3": 0.1})]
    rows = judged_rows(queries, prepared, config, lists, counts)
    judged = {(row["query_id"], row["product_id"]): row["label"] for row in rows if row["origin"] == "judged"}
    assert judged == {("q1", "p1"): 1.0, ("q1", "p2"): 0.01, ("q1", "p8"): 0.0, ("q2", "p3"): 0.1}
    first = {row["product_id"]: row for row in rows if row["query_id"] == "q1"}
    assert "p9" not in first        # as good as p8, which was judged
    assert {name for name, row in first.items() if row["origin"] == "mined"} == {"p4", "p5"}
    assert {row["label"] for row in rows if row["origin"] != "judged"} == {0.0}
    assert first["p1"]["text"] == "text p1"
    assert counts["judged products not in the catalogue"] == 1
    assert [row["query_id"] for row in rows] == sorted(row["query_id"] for row in rows)
    assert pa.Table.from_pylist(rows, schema=RERANKER_PAIR).num_rows == len(rows)


@pytest.mark.ray
def test_a_judged_shop_is_published(prepared: Artifact, tmp_path: Path, local_ray: None) -> None:
    pq.write_table(pa.table({"query_id": [f"q{number}" for number in range(10)], "query": ["words"] * 10}),
                   tmp_path / "queries.parquet")
    pq.write_table(pa.table({"query_id": [f"q{number}" for number in range(10)], "product_id": ["p1"] * 10,
                             "label": ["E"] * 10}), tmp_path / "judgments.parquet")
    made = make_reranker_pairs(MakeRerankerPairsConfig.model_validate({
        "output": tmp_path / "pairs", "judged": {
            "prepared": prepared.path.parents[1], "queries": str(tmp_path / "queries.parquet"),
            "judgments": str(tmp_path / "judgments.parquet"), "gain_of_label": {"E": 1.0}, "valid_folds": [0],
            "train_folds": [1, 2], "uniform": 2}}))
    assert made.manifest.facts["rows"] == {"train": 12, "valid": 6, "test": 0}
    assert made.table("judged_queries.parquet").num_rows == 6
    assert made.manifest.parents["prepared"] == prepared.manifest.reference


@pytest.mark.ray
def test_goodbooks_protocol(real_data: Callable[[str], Path], tmp_path: Path, local_ray: None) -> None:
    """Twelve rows a user under one context, all of the books whose ratings are complete, nothing given away."""
    root = real_data("goodbooks")
    complete = root / "books_with_complete_ratings.parquet"
    made = make_reranker_pairs(MakeRerankerPairsConfig.model_validate({
        "source": {"format": "goodbooks", "path": str(root)}, "output": tmp_path / "pairs", "num_buckets": 4,
        "eligible": str(complete), "eligible_columns": {"product_id": "book_id"},
        "max_users": {"train": 2000, "valid": 100, "test": 100}}))
    assert set(made.manifest.facts["leaks"].values()) == {0}
    assert made.manifest.facts["popularity_auc"]["train"] == pytest.approx(0.5, abs=0.03)
    assert made.manifest.facts["rows"] == {"train": 24_000, "valid": 1200, "test": 1200}
    allowed = {str(book) for book in pq.read_table(complete)["book_id"].to_pylist()}
    by_user: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(made, "pairs/test/"):
        by_user.setdefault(row["query_id"], []).append(row)
        assert row["product_id"] in allowed
    for rows in by_user.values():
        assert (len(rows), sum(row["label"] for row in rows), len({row["query"] for row in rows})) == (12, 3, 1)
