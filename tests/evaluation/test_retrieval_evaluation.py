"""The whole evaluation on artefacts small enough to work out by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ray.artifacts import Artifact, ArtifactError, stage
from recsys_ray.config import Config, ConfigError, load_config
from recsys_ray.evaluation.gate import GateError
from recsys_ray.evaluation.judgments import JudgmentError
from recsys_ray.evaluation.retrieval import EvaluateConfig, evaluate, read_evaluation
from recsys_ray.evaluation.summary import terminal_summary
from recsys_ray.schema import CANDIDATE, PRODUCT, PRODUCT_STATS, QUERY, REVIEW

REPO = Path(__file__).resolve().parents[2]
QUERIES = [str(i) for i in range(40)]


def publish(root: Path, kind: str, tables: dict[str, pa.Table], fingerprint: str) -> Artifact:
    with stage(root, kind, fingerprint) as staging:
        return staging.commit([staging.write_table(name, table) for name, table in tables.items()], config=Config())


def candidates(root: Path, answers: dict[str, list[str]], asked: list[str] | None = None) -> None:
    rows = [{"query_id": query, "row_id": 0, "product_id": product, "rank": rank, "score": 1.0 / rank}
            for query, products in answers.items() for rank, product in enumerate(products, 1)]
    half = len(rows) // 2
    asked_rows = [{"query_id": one, "query": f"text of {one}",
                   "slices": ["even"] if int(one.strip("r")) % 2 == 0 else None}
                  for one in (asked or answers)]
    publish(root, "candidates", {
        "candidates-0.parquet": pa.Table.from_pylist(rows[:half], schema=CANDIDATE),
        "candidates-1.parquet": pa.Table.from_pylist(rows[half:], schema=CANDIDATE),
        "queries.parquet": pa.Table.from_pylist(asked_rows, schema=QUERY)}, root.name)


def labelled(path: Path, pairs: list[tuple[str, str, str]]) -> Path:
    pq.write_table(pa.table({"qid": [int(pair[0]) for pair in pairs], "asin": [pair[1] for pair in pairs],
                             "grade": [pair[2] for pair in pairs]}), path)
    return path


def config(tmp_path: Path, **changes: object) -> EvaluateConfig:
    values = {
        "name": "small", "output": tmp_path / "evaluation", "primary": "nDCG@10", "metrics": ["Recall@1", "MRR"],
        "systems": {"weak": tmp_path / "weak", "strong": tmp_path / "strong"}, "baseline": "weak", "samples": 300,
        "judgments": {"format": "table", "path": tmp_path / "labels.parquet", "gain_of_label": {"E": 1.0, "I": 0.0},
                      "columns": {"query_id": "qid", "product_id": "asin", "label": "grade"}}}
    return EvaluateConfig.model_validate({**values, **changes})


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """`strong` puts the one exact product first, `weak` second; the label file has integer query ids."""
    candidates(tmp_path / "weak", {one: ["bad", "good"] for one in QUERIES})
    candidates(tmp_path / "strong", {one: ["good", "bad"] for one in QUERIES})
    grades = (("good", "E"), ("bad", "I"))
    labelled(tmp_path / "labels.parquet", [(one, product, grade) for one in QUERIES for product, grade in grades])
    return tmp_path


def mean(document: dict, system: str, metric: str, slice_name: str = "all") -> float:
    return next(row["mean"] for row in document["means"]
                if (row["system"], row["metric"], row["slice"]) == (system, metric, slice_name))


def test_figures_by_hand(small):
    document = read_evaluation(evaluate(config(small)))
    assert mean(document, "strong", "Recall@1") == 1.0
    assert mean(document, "weak", "Recall@1") == 0.0
    assert mean(document, "weak", "MRR") == 0.5
    assert mean(document, "weak", "nDCG@10") == pytest.approx(1 / np.log2(3))
    assert mean(document, "weak", "Judged@10") == 0.2       # two of ten places
    assert document["slices"] == ["all", "even"]
    assert document["counts"]["queries"] == 40
    assert "divided by" in document["definitions"]["nDCG@10"]
    found = next(row for row in document["comparisons"] if row["primary"] and row["slice"] == "all")
    assert (found["system"], found["outcome"], found["wins"]) == ("strong", "improved", 40)
    assert found["mean"] == pytest.approx(1 - 1 / np.log2(3))


def test_per_query_values_and_terminal_text(small):
    artifact = evaluate(config(small))
    table = artifact.table("per_query/weak.parquet")
    assert table["nDCG@10"].to_pylist() == pytest.approx([1 / np.log2(3)] * 40)
    assert table["query"][0].as_py() == "text of 0"
    text = terminal_summary(read_evaluation(artifact))
    assert "1.000 [1.000, 1.000]" in text
    assert "improved" in text
    assert "Judged@10" in text


def test_the_same_inputs_are_not_scored_again_and_changed_labels_are(small):
    first = evaluate(config(small))
    assert evaluate(config(small)).path == first.path
    labelled(small / "labels.parquet", [(one, "bad", "E") for one in QUERIES])
    second = evaluate(config(small))
    assert second.path != first.path
    assert mean(read_evaluation(second), "weak", "Recall@1") == 1.0


def test_a_rerun_elsewhere_gives_the_same_figures(small):
    one = read_evaluation(evaluate(config(small)))
    other = read_evaluation(evaluate(config(small, output=small / "again")))
    assert one == other


def test_what_does_not_fit_is_counted(small):
    pairs = [(one, "good", "E") for one in QUERIES[:30]]
    pairs += [("0", "good", "E"), ("1", "good", "I"), ("77", "x", "E")]
    labelled(small / "labels.parquet", [*pairs, ("5", "bad", "I"), ("30", "bad", "I")])
    counts = read_evaluation(evaluate(config(small)))["counts"]
    assert counts == {"judgments": 32, "queries": 31, "asked_without_judgment": 9, "unknown_queries": 1,
                      "judged_twice": 2, "judged_twice_differently": 1, "not_in_catalogue": 0, "without_relevant": 1}


def test_a_query_one_system_did_not_answer_counts_zero_for_it(small):
    candidates(small / "lazy", {one: ["good"] for one in QUERIES[:10]}, asked=QUERIES)
    document = read_evaluation(evaluate(config(small, systems={"weak": small / "weak", "lazy": small / "lazy"})))
    assert mean(document, "lazy", "Recall@1") == 0.25
    assert document["queries_without_answer"] == {"weak": 0, "lazy": 30}


def test_labels_of_other_queries_are_refused(small):
    labelled(small / "labels.parquet", [("99", "good", "E")])
    with pytest.raises(JudgmentError, match="none of the 1 judged queries was asked"):
        evaluate(config(small))


def test_labels_and_columns_that_are_unknown_are_named(small):
    labelled(small / "labels.parquet", [("1", "good", "X")])
    with pytest.raises(JudgmentError, match=r"no gain for label.s. X"):
        evaluate(config(small))
    judgments = {"format": "table", "path": small / "labels.parquet", "columns": {"product_id": "sku"}}
    with pytest.raises(JudgmentError, match="the file has qid, asin, grade"):
        evaluate(config(small, judgments=judgments))


def test_a_required_improvement_that_is_none_fails_the_command(small):
    with pytest.raises(GateError, match="weak against strong"):
        evaluate(config(small, baseline="strong", required=["weak"]))
    evaluate(config(small, required=["strong"]))


def test_configuration_mistakes_are_named_before_any_work(tmp_path):
    base = config(tmp_path).model_dump(mode="json")
    for change, says in [({"popularity": True}, "popularity needs prepared"),
                         ({"metrics": ["MRR", "RR"]}, "named twice"), ({"systems": {}}, "at least one system"),
                         ({"systems": {"../x": "y"}}, "cannot name systems")]:
        with pytest.raises(ValueError, match=says):
            EvaluateConfig.model_validate({**base, **change})
    candidates(tmp_path / "weak", {"0": ["a"]})
    candidates(tmp_path / "strong", {"0": ["a"]})
    with pytest.raises(ValueError, match="baseline 'other'"):
        evaluate(config(tmp_path, baseline="other"))
    with pytest.raises(ArtifactError, match="run its job first"):
        evaluate(config(tmp_path, systems={"weak": tmp_path / "nothing"}))


def reviews_shop(tmp_path: Path) -> Path:
    """60 test reviews of 20 products by 12 users; product p00 has most reviews; reviews 0, 5, 10, ... are generic."""
    products = [{"row_id": i, "product_id": f"p{i:02d}", "group_id": i, "title": f"Product {i}"} for i in range(20)]
    stats = [{"row_id": i, "as_of_ms": 0, "num_reviews": 100 - i} for i in range(20)]
    reviews = [{"review_id": f"r{i:02d}", "row_id": i % 20, "product_id": f"p{i % 20:02d}", "user_id": f"u{i % 12}",
                "timestamp_ms": i, "split": "test", "cold": i % 20 >= 15} for i in range(60)]
    root = tmp_path / "prepared"
    publish(root, "prepared", {
        "products/bucket-00000.parquet": pa.Table.from_pylist(products[:10], schema=PRODUCT),
        "products/bucket-00001.parquet": pa.Table.from_pylist(products[10:], schema=PRODUCT),
        "product_stats/bucket-00000.parquet": pa.Table.from_pylist(stats[:10], schema=PRODUCT_STATS),
        "product_stats/bucket-00001.parquet": pa.Table.from_pylist(stats[10:], schema=PRODUCT_STATS),
        "reviews/test/bucket-00000.parquet": pa.Table.from_pylist(reviews, schema=REVIEW)}, "prepared")
    truth = pa.table({"review_id": [f"r{i:02d}" for i in range(60)], "generic": [i % 5 == 0 for i in range(60)]})
    pq.write_table(truth, tmp_path / "truth.parquet")
    for name, shift in (("right", 0), ("near", 1)):
        answers = {f"r{i:02d}": [f"p{(i + shift + step) % 20:02d}" for step in (0, 19)] for i in range(60)}
        candidates(tmp_path / name, answers)
    return root


def test_reviews_with_slices_popularity_and_ceiling(tmp_path):
    prepared = reviews_shop(tmp_path)
    document = read_evaluation(evaluate(EvaluateConfig.model_validate({
        "name": "reviews", "output": tmp_path / "evaluation", "prepared": prepared, "popularity": True, "samples": 200,
        "systems": {"near": tmp_path / "near", "right": tmp_path / "right"}, "baseline": "near",
        "unit": "product_and_user",
        "judgments": {"format": "reviews", "prepared": prepared, "split": "test"},
        "truth": {"path": tmp_path / "truth.parquet"}, "primary": "Recall@1", "metrics": ["Recall@5", "MRR"]})))
    assert document["systems"] == ["near", "right", "popularity", "oracle"]
    assert document["slices"] == ["all", "warm", "cold", "answerable", "generic", "even"]
    assert mean(document, "right", "Recall@1") == 1.0
    assert mean(document, "near", "MRR") == 0.5             # its product stands second
    assert mean(document, "popularity", "Recall@5") == 0.25  # p00 to p04 of 20 equally frequent products
    assert mean(document, "popularity", "Recall@1", "cold") == 0.0
    # generic reviews are those of p00, p05, p10, p15, 3 each; popularity finds p00 at rank 1: 48 + 3 of 60
    assert mean(document, "oracle", "Recall@1") == pytest.approx(51 / 60)
    assert mean(document, "oracle", "Recall@1", "answerable") == 1.0
    units = next(row["units"] for row in document["means"] if row["slice"] == "all")
    assert units == 12                                      # users, the fewer of users and products


def test_judged_products_missing_from_the_catalogue_are_counted(tmp_path):
    prepared = reviews_shop(tmp_path)
    pq.write_table(pa.table({"query_id": ["r01", "r02"], "product_id": ["p01", "gone"], "gain": [1.0, 1.0]}),
                   tmp_path / "labels.parquet")
    document = read_evaluation(evaluate(config(
        tmp_path, systems={"right": tmp_path / "right"}, baseline="right", prepared=prepared,
        judgments={"format": "table", "path": tmp_path / "labels.parquet"})))
    assert document["counts"]["not_in_catalogue"] == 1
    assert mean(document, "right", "Recall@1") == 0.5


def test_a_truth_of_another_shop_is_refused(tmp_path):
    prepared = reviews_shop(tmp_path)
    pq.write_table(pa.table({"review_id": ["z"], "generic": [True]}), tmp_path / "truth.parquet")
    with pytest.raises(JudgmentError, match="names 0 of 60 queries"):
        evaluate(config(tmp_path, systems={"right": tmp_path / "right"}, baseline="right",
                        judgments={"format": "reviews", "prepared": prepared},
                        truth={"path": tmp_path / "truth.parquet"}))


def test_the_command_prints_figures_and_says_what_is_wrong(small):
    (small / "job.yaml").write_text(config(small).to_yaml(), encoding="utf-8")
    command = [sys.executable, str(REPO / "jobs" / "evaluate.py"), "--config", str(small / "job.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "small: all (40 queries, 40 units)" in done.stdout
    failed = subprocess.run([*command, "judgments.path=nowhere.parquet"], capture_output=True, text=True, check=False)
    assert (failed.returncode, "nowhere.parquet: no such file" in failed.stderr) == (2, True)


@pytest.mark.parametrize("name", ["demo", "demo_queries", "esci", "icecat"])
def test_shipped_configurations_load(name):
    assert load_config(EvaluateConfig, REPO / "configs" / "evaluate" / f"{name}.yaml").all_metrics()
    with pytest.raises(ConfigError, match="basline"):
        load_config(EvaluateConfig, REPO / "configs" / "evaluate" / f"{name}.yaml", ["basline=bm25"])


def test_open_label_files_fit_the_shipped_configurations(real_data):
    from recsys_ray.evaluation.judgments import read_judgments
    for folder, name, queries in (("esci_us_subset", "esci", 105), ("chorus_icecat", "icecat", 95)):
        root = real_data(folder)
        loaded = load_config(EvaluateConfig, REPO / "configs" / "evaluate" / f"{name}.yaml")
        path = root / loaded.judgments.path.name
        judgments, _ = read_judgments(loaded.judgments.replace(path=path), None)  # type: ignore[arg-type]
        assert len(judgments["query_id"].unique()) == queries
        assert max(judgments["gain"].to_pylist()) == (1.0 if name == "esci" else 3.0)
