"""The page and its JSON: complete, self-contained, escaped, and the same again on a rerun."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.artifacts import ArtifactError, Manifest, open_artifact, stage
from recsys_ray.config import Config, load_config
from recsys_ray.evaluation import plots
from recsys_ray.evaluation.examples import example_rows, pick_queries
from recsys_ray.evaluation.lineage import lineage, lineage_svg, lineage_table
from recsys_ray.evaluation.report import ReportConfig, write_report
from recsys_ray.evaluation.retrieval import EvaluateConfig, evaluate
from recsys_ray.schema import AUDIT, CANDIDATE, PRODUCT, PRODUCT_STATS, QUARANTINE, QUERY, REVIEW

REPO = Path(__file__).resolve().parents[2]
DAY = 86_400_000
EVIL = "<script>alert(1)</script>"
SPLITS = ("train",) * 8 + ("valid", "test")


def publish(root: Path, kind: str, tables: dict[str, pa.Table], parents: dict[str, Manifest] | None = None) -> Manifest:
    with stage(root, kind, root.name) as staging:
        files = [staging.write_table(name, table) for name, table in tables.items()]
        return staging.commit(files, config=Config(), parents=parents).manifest


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop of 60 products, 600 reviews and three systems of rising quality, evaluated; read only."""
    tmp_path = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    products = [{"row_id": i, "product_id": f"p{i:02d}", "group_id": i, "title": f"Sofa {i} {EVIL if i == 3 else ''}",
                 "brand": "Nord", "price_cents": 1000 + i if i % 4 else None} for i in range(60)]
    stats = [{"row_id": i, "as_of_ms": 0, "num_reviews": 600 // (i + 1)} for i in range(60)]
    product_of = rng.integers(0, 60, 600)
    reviews = [{"review_id": f"r{i:03d}", "row_id": int(p), "product_id": f"p{p:02d}", "user_id": f"u{i % 90}",
                "timestamp_ms": (18_000 + i * 2) * DAY, "split": SPLITS[i // 60], "cold": p > 50}
               for i, p in enumerate(product_of)]
    audit = [{"section": "rows", "name": "products read", "value": 64.0, "note": f"4 in quarantine {EVIL}"},
             {"section": "leaks", "name": "held-out reviews in product text", "value": 0.0, "note": None}]
    prepared = publish(tmp_path / "prepared", "prepared", {
        "products/bucket-00000.parquet": pa.Table.from_pylist(products, schema=PRODUCT),
        "product_stats/bucket-00000.parquet": pa.Table.from_pylist(stats, schema=PRODUCT_STATS),
        "quarantine/products.parquet": pa.Table.from_pylist([{"table": "x", "reason": "y"}] * 4, schema=QUARANTINE),
        "audit/audit.parquet": pa.Table.from_pylist(audit, schema=AUDIT),
        **{f"reviews/{split}/bucket-00000.parquet": pa.Table.from_pylist(
            [row for row in reviews if row["split"] == split], schema=REVIEW) for split in set(SPLITS)}})
    index = publish(tmp_path / "index", "index", {"rows.parquet": pa.table({"row_id": [1]})}, {"prepared": prepared})
    test = [row for row in reviews if row["split"] == "test"]
    for name, noise in (("bm25", 14), ("dense", 9), ("hybrid", 4)):
        answers = []
        for row in test:
            order = np.argsort(rng.normal(0, noise, 60) + np.abs(np.arange(60) - row["row_id"]), kind="stable")[:20]
            answers += [{"query_id": row["review_id"], "row_id": int(p), "product_id": f"p{p:02d}", "rank": rank,
                         "score": 1 / rank} for rank, p in enumerate(order, 1)]
        asked = [{"query_id": row["review_id"], "query": f"the {EVIL} sofa of {row['user_id']}"} for row in test]
        publish(tmp_path / name, "candidates", {"candidates-0.parquet": pa.Table.from_pylist(answers, schema=CANDIDATE),
                                                "queries.parquet": pa.Table.from_pylist(asked, schema=QUERY)},
                {"index": index})
    evaluate(EvaluateConfig.model_validate({
        "name": "reviews of the test split", "output": tmp_path / "evaluation", "primary": "Recall@10",
        "systems": {name: tmp_path / name for name in ("bm25", "dense", "hybrid")}, "baseline": "bm25", "samples": 300,
        "judgments": {"format": "reviews", "prepared": tmp_path / "prepared"}, "prepared": tmp_path / "prepared",
        "popularity": True, "metrics": ["Recall@1", "Recall@5", "Recall@20", "MRR"], "unit": "product_and_user"}))
    return tmp_path


def config(shop: Path, output: str = "report") -> ReportConfig:
    return ReportConfig.model_validate({
        "title": f"A small shop {EVIL}", "prepared": shop / "prepared", "evaluations": [shop / "evaluation"],
        "examples": {"system": "hybrid", "candidates": shop / "hybrid"}, "index": shop / "index",
        "output": shop / output})


def test_the_page_is_self_contained_escaped_and_described(shop):
    page = write_report(config(shop)).read_text("utf-8")
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r'(src|href)="(?!#)', page)         # nothing is fetched: only links within the page
    assert "url(http" not in page
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) >= 6
    assert all("<title>" in drawing and 'role="img"' in drawing for drawing in drawings)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in page
    assert re.search(r"10\.\d\d · ", page)
    for words in ("held-out reviews in product text", "expected:", "improved", "Lineage", "popularity"):
        assert words in page


def test_figures_of_the_page_are_those_of_the_json_and_of_the_evaluation(shop):
    page = write_report(config(shop))
    report = json.loads((page.parent / "report.json").read_text("utf-8"))
    cards = {card["label"]: card for card in report["headline"]}
    assert cards["products"]["value"] == 60
    assert cards["reviews"]["value"] == 600
    assert cards["rows in quarantine"]["value"] == 4
    best = cards["Recall@10, reviews of the test split"]
    values = open_artifact(shop / "evaluation", "evaluation").table("per_query/hybrid.parquet")["Recall@10"].to_numpy()
    assert best["value"] == pytest.approx(values.mean(), abs=5e-5)
    assert f"{best['value']:.3f}" in page.read_text("utf-8")


def test_a_rerun_repeats_every_figure_and_table(shop):
    first, second = (json.loads((write_report(config(shop, name)).parent / "report.json").read_text("utf-8"))
                     for name in ("one", "two"))
    assert first["headline"] == second["headline"]
    assert first["tables"] == second["tables"]
    pages = [(shop / name / "index.html").read_text("utf-8") for name in ("one", "two")]
    pages = [re.sub(r"Written [^ ]+ by", "", page).replace(f"{shop}/{name}", "") for page, name in zip(
        pages, ("one", "two"), strict=True)]
    assert pages[0] == pages[1]


def test_artefacts_that_are_missing_are_named(shop):
    with pytest.raises(ArtifactError, match="nowhere"):
        write_report(config(shop).replace(prepared=shop / "nowhere"))


def test_benchmark_results_are_listed(shop):
    (shop / "results").mkdir()
    (shop / "results" / "embed.json").write_text(json.dumps(
        {"name": "embed", "command": "make bench-embed", "headline": {"ratio": 3.25, "missing": None}}), "utf-8")
    page = write_report(config(shop).replace(benchmarks=shop / "results")).read_text("utf-8")
    assert "make bench-embed" in page
    assert "3.250" in page


def test_examples_mark_hits_and_name_what_was_missed(shop):
    evaluation = open_artifact(shop / "evaluation", "evaluation")
    rows = example_rows(evaluation.table("per_query/bm25.parquet"), evaluation.table("judgments.parquet"),
                        open_artifact(shop / "bm25", "candidates").tables("candidates-"),
                        open_artifact(shop / "prepared", "prepared"), ["Recall@10", "MRR"], 1.0)
    assert [row["kind"] for row in rows] == ["best"] * 3 + ["middle"] * 3 + ["worst"] * 3
    relevant = dict(zip(*(evaluation.table("judgments.parquet")[name].to_pylist()
                          for name in ("query_id", "product_id")), strict=True))
    for row in rows:
        assert [product["rank"] for product in row["products"]] == [1, 2, 3, 4, 5]
        hits = [product["product_id"] for product in row["products"] if product["hit"]]
        wanted = relevant[row["query_id"]]
        assert hits == [wanted] if row["expected"] is None else row["expected"]["product_id"] == wanted
    assert rows[-1]["expected"]["title"].startswith("Sofa")
    assert rows[-1]["expected"]["rank"] is None or rows[-1]["expected"]["rank"] > 10


def test_picked_queries_by_hand():
    table = pa.table({"query_id": list("abcdefg"), "m": [0.5, 1.0, None, 0.0, 0.7, 1.0, 0.2]})
    tied = table.append_column("tie", pa.array([0.0, 0.1, 0.0, 0.0, 0.0, 0.9, 0.0]))
    assert pick_queries(tied, ["m", "tie"], 2)["best"] == [5, 1]
    # order: b f e a g d (c is undefined); two each: best b f, middle e a, worst g d
    assert pick_queries(table, ["m"], 2) == {"best": [1, 5], "middle": [4, 0], "worst": [6, 3]}
    assert pick_queries(table.slice(0, 1), ["m"], 2) == {"best": [0], "middle": [], "worst": []}


def manifest(kind: str, **parents: str) -> Manifest:
    return Manifest(kind=kind, version="v1", fingerprint="0" * 16, created="", git_sha="", config={}, parents=parents,
                    facts={}, files=())


def test_lineage_puts_parents_left_of_children_and_keeps_the_unknown():
    nodes = lineage([manifest("evaluation", a="candidates/v1"), manifest("candidates", b="index/v1"),
                     manifest("index", c="prepared/v1", d="embeddings/v9")])
    columns = {node.reference: node.column for node in nodes}
    assert columns == {"prepared/v1": 0, "embeddings/v9": 0, "index/v1": 1, "candidates/v1": 2, "evaluation/v1": 3}
    assert lineage_svg(nodes).count('class="edge"') == 4
    unknown = next(row for row in lineage_table(nodes) if row["kind"] == "embeddings")
    assert unknown["fingerprint"] is None


def test_lineage_keeps_its_order_whatever_the_versions_are_called():
    def names(first: str, second: str) -> list[str]:
        made = [manifest("candidates").replace(version=version, config={"output": f"runs/{name}"})
                for version, name in ((first, "bm25"), (second, "dense"))]
        return [row["config"] for row in lineage_table(lineage(made))]

    assert names("v1", "v2") == names("v2", "v1")


def test_a_plot_takes_its_colours_from_the_page():
    svg = plots.win_loss(np.array([0.2, 0.0, -0.1]), "difference", "Wins & losses")
    assert "<title>Wins &amp; losses</title>" in svg
    assert "var(--series-2)" in svg
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]\b", svg)
    assert svg == plots.win_loss(np.array([0.2, 0.0, -0.1]), "difference", "Wins & losses")


def test_shipped_configuration_loads():
    assert load_config(ReportConfig, REPO / "configs" / "write_report" / "demo.yaml").evaluations
