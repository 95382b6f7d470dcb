"""Every job on its demo configuration, one after another on one small shop: `test_<job>` for each file in jobs/."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from recsys_ray.artifacts import Manifest, current_version, list_versions, open_artifact
from recsys_ray.config import main
from recsys_ray.runtime import free_ports

pytestmark = pytest.mark.ray
REPO = Path(__file__).resolve().parents[2]
SHOP = ("products=500", "reviews=3000", "queries=20", "image_products=5")
DEMO = Path("runs/demo")
SYSTEMS = ("bm25", "dense", "hybrid")
SHORT = ("query_tokens=16", "document_tokens=16", "sampler.batch_size=16")     # of a training nobody will use
QUERY_SETS = {"test": "demo", "queries": "demo_queries"}


def run_job(name: str, *overrides: str, config: str = "demo") -> int:
    """The exit status of a job, run in this process as its command line runs it."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", REPO / "jobs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return main(module.JobConfig, module.run, ["--config", str(REPO / "configs" / name / f"{config}.yaml"), *overrides])


def manifest(path: str, kind: str) -> Manifest:
    return open_artifact(DEMO / path, kind).manifest


def versions() -> dict[str, str | None]:
    """The current version of every artefact of the run."""
    return {str(path.parent): current_version(path.parent) for path in sorted(DEMO.rglob("CURRENT"))}


@pytest.fixture(scope="module", autouse=True)
def flow(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """The exit status of each step from the shop to the report, run in an empty working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        status = {"make_demo_shop": run_job("make_demo_shop", *SHOP)}
        for stage in ("prepare", "embed", "build_index", "extract_keywords"):
            status[stage] = run_job(stage)
        status["make_pairs"] = run_job("make_pairs", "max_train_reviews=150")
        status["mine_negatives"] = run_job("mine_negatives")
        status["finetune_bge"] = run_job("finetune_bge", "workers.count=0", "max_steps=3", "evaluate_every=3", *SHORT)
        status["make_reranker_pairs"] = run_job("make_reranker_pairs")
        status["finetune_cross_encoder"] = run_job("finetune_cross_encoder", "workers.count=0", "max_steps=2",
                                                   "evaluate_every=2", "max_tokens=24", "sampler.batch_groups=4",
                                                   "validation.queries=4")
        for queries, config in QUERY_SETS.items():
            for system in SYSTEMS:
                status[f"retrieve_candidates {system}-{queries}"] = run_job(
                    "retrieve_candidates", f"output={DEMO}/candidates/{system}-{queries}", f"retriever.mode={system}",
                    config=config)
        for config in ("demo", "demo_queries"):
            status[f"evaluate {config}"] = run_job("evaluate", "samples=200", config=config)
        status["write_report"] = run_job("write_report")
        yield status


def test_every_job_is_covered_and_every_step_succeeded(flow: dict[str, int]) -> None:
    tests = {name.removeprefix("test_") for name in globals()}
    jobs = {path.stem for path in (REPO / "jobs").glob("*.py")}
    assert jobs
    assert jobs <= tests, f"without a test here: {sorted(jobs - tests)}"
    assert flow == dict.fromkeys(flow, 0)


def test_make_demo_shop() -> None:
    assert json.loads((DEMO / "shop/public/shop.json").read_text())["counts"]["images"] == 5
    assert pq.read_metadata(DEMO / "shop/truth/queries.parquet").num_rows == 20


def test_prepare() -> None:
    prepared = manifest("prepared", "prepared")
    products, texts = prepared.rows("products/"), prepared.rows("product_text/")
    assert 450 <= products == texts
    assert prepared.rows("quarantine/") > 0     # the shop plants rows that nobody can use
    assert {name: prepared.rows(f"reviews/{name}/") > 0 for name in ("train", "valid", "test")} == {
        "train": True, "valid": True, "test": True}


def test_embed() -> None:
    embedded = manifest("embeddings", "embeddings")
    assert embedded.rows("vectors/") == manifest("prepared", "prepared").rows("products/")
    assert embedded.facts["dimension"] == 384


def test_build_index() -> None:
    index = manifest("index", "index")
    assert index.facts["live_rows"] == manifest("prepared", "prepared").rows("products/")
    assert index.facts["encoder"] == manifest("embeddings", "embeddings").facts["encoder"]


def test_make_pairs() -> None:
    pairs = manifest("pairs", "pairs")
    assert 150 < pairs.rows("pairs/train/") < 350       # about 150 reviews, keywords and text of each
    assert pairs.rows("pairs/valid/") > 0
    shares = pairs.facts["copied_token_share"]
    assert pairs.facts["copied_token_gap"] < 0.2
    assert shares["train"] < shares["train, own review left in"]


def test_mine_negatives() -> None:
    mined = manifest("pairs-mined", "pairs")
    assert mined.rows("pairs/train/") == manifest("pairs", "pairs").rows("pairs/train/")
    assert mined.facts["negatives"]["random"] == mined.rows("pairs/train/")
    assert mined.facts["negatives"]["mined"] > mined.rows("pairs/train/")


def test_finetune_bge() -> None:
    encoder = manifest("encoder", "encoder")
    assert encoder.facts["steps"] == 3
    assert encoder.parents["pairs"] == manifest("pairs", "pairs").reference


def test_heads_from_pairs_to_candidates() -> None:
    """MiniLM gets BGE-M3's heads, and its index answers by all scores."""
    assert run_job("finetune_bge", "workers.count=0", "max_steps=3", "evaluate_every=3", *SHORT, config="heads") == 0
    for stage in ("embed", "build_index", "retrieve_candidates"):
        assert run_job(stage, "encoder.max_tokens=16" if stage != "build_index" else "rows_per_segment=300",
                       config="heads") == 0
    found = pq.read_table(next((DEMO / "candidates/heads-test").glob("versions/*/candidates-00000.parquet")))
    for name in ("dense_score", "lexical_score", "sparse_score", "multi_score"):
        assert found[name].null_count == 0
    assert max(found["sparse_score"].to_pylist()) > 0


def test_make_reranker_pairs() -> None:
    pairs = manifest("reranker-pairs", "reranker_pairs")
    counts = pairs.facts["counts"]
    assert counts["train users"] > 50
    assert pairs.rows("pairs/train/") == 4 * counts["train rows, positive"]     # two matched and one uniform negative
    assert pairs.facts["leaks"] == {"candidates named in their own context": 0, "users in more than one split": 0}
    assert counts["items"] >= 450


def test_finetune_cross_encoder() -> None:
    model = manifest("cross-encoder", "cross_encoder")
    assert model.facts["steps"] == 2
    assert model.parents["pairs"] == manifest("reranker-pairs", "reranker_pairs").reference


def test_train_recommenders() -> None:
    assert run_job("train_recommenders") == 0
    facts = manifest("recommenders", "recommenders").facts
    assert facts["timed"]
    assert set(facts["chosen"]) == {"popularity", "item_knn", "ease"}


def test_finetune_sequence() -> None:
    assert run_job("finetune_sequence", "max_steps=3", "evaluate_every=3", "workers.count=0") == 0
    sequence = manifest("sequence", "sequence_model")
    assert sequence.facts["steps"] == 3
    assert sequence.parents["embeddings"] == manifest("embeddings", "embeddings").reference


def test_evaluate_ranking() -> None:
    assert run_job("train_recommenders") == 0       # made already, unless this test runs alone
    assert run_job("evaluate_ranking", "samples=100") == 0
    assert set(manifest("ranking", "ranking").facts["systems"]) == {"random", "popularity", "item_knn", "ease"}


def test_train_gbdt() -> None:
    """Trees from the valid split's reviews, measured on the test split's, and shown in the report."""
    assert run_job("retrieve_candidates", config="demo_valid") == 0
    assert run_job("train_gbdt", "gbdt.rounds=20", "gbdt.min_leaf=10", "samples=100") == 0
    trees = manifest("gbdt", "gbdt")
    assert trees.parents["fit"] == manifest("candidates/hybrid-valid", "candidates").reference
    assert trees.facts["metrics"]["gbdt, nDCG@5"] > 0
    assert run_job("write_report", f"ranker={DEMO}/gbdt", f"output={DEMO}/report-ranker") == 0
    assert "What the trees read" in (DEMO / "report-ranker/index.html").read_text("utf-8")


def test_recommend_candidates() -> None:
    """Lists of a recommender, and trees behind /v1/recommend from them."""
    assert run_job("train_recommenders") == 0       # made already, unless this test runs alone
    for config in ("demo_valid", "demo"):
        assert run_job("recommend_candidates", config=config) == 0
    assert run_job("train_gbdt", "gbdt.rounds=5", "gbdt.min_leaf=5", "samples=100", config="recommend") == 0
    trees = manifest("gbdt-recommend", "gbdt")
    assert trees.parents["fit"] == manifest("candidates/recommended-valid", "candidates").reference


def test_score_pairs() -> None:
    """Three steps make no teacher: the job says so and leaves; told otherwise its scores are learned from."""
    small = ("queries=60", "candidates=10", "workers=1")
    assert run_job("score_pairs", *small) == 2
    assert not (DEMO / "pairs-scored" / "CURRENT").exists()
    assert run_job("score_pairs", *small, "force=true") == 0
    assert manifest("pairs-scored", "pairs").facts["teacher"]["forced"]
    short = ("workers.count=0", "max_steps=2", "evaluate_every=2", *SHORT)
    assert run_job("finetune_bge", *short, config="distilled") == 0
    assert run_job("finetune_bge", *short, config="guided") == 0
    assert manifest("encoder-guided", "encoder").parents["guide"].startswith("guide_vectors/")


def test_train_rounds() -> None:
    short = [f"finetune.{one}" for one in (*SHORT, "workers.count=0", "max_steps=2", "evaluate_every=2")]
    assert run_job("train_rounds", "start=previous", *short) == 0
    table = json.loads((DEMO / "rounds/rounds.json").read_text())
    assert [row["round"] for row in table["rounds"]] in ([1], [1, 2])
    assert table["best"] == table["rounds"][0]["encoder"] or len(table["rounds"]) == 2
    made = versions()
    assert run_job("train_rounds", "start=previous", *short) == 0
    assert versions() == made


def test_accept_encoder() -> None:
    """Three steps improve nothing that a gate can see: the job says so and leaves; told otherwise it publishes."""
    assert run_job("accept_encoder", "queries.max_queries=50") == 2
    assert not (DEMO / "encoder-latest" / "CURRENT").exists()
    assert run_job("accept_encoder", "queries.max_queries=50", "force=true") == 0
    latest = manifest("encoder-latest", "encoder")
    assert (latest.facts["outcome"], latest.facts["forced"]) == ("undecidable", True)
    assert latest.parents["candidate"] == manifest("encoder", "encoder").reference


def test_tune() -> None:
    short = [f"finetune.{one}" for one in (*SHORT, "max_steps=2", "evaluate_every=1")]
    assert run_job("tune", "trials=2", "space={optim.learning_rate: {low: 1.0e-5, high: 1.0e-4}}", *short) == 0
    board = json.loads((DEMO / "sweep/leaderboard.json").read_text())
    assert (board["trials"], board["errored"]) == (2, 0)
    assert run_job("finetune_bge", "output=runs/demo/encoder-best", config=str((DEMO / "sweep/best").resolve())) == 0


def test_extract_keywords() -> None:
    keywords = manifest("keywords", "keywords")
    reviews = sum(manifest("prepared", "prepared").rows(f"reviews/{split}/") for split in ("train", "valid", "test"))
    assert keywords.rows("keywords/") == reviews
    assert run_job("prepare", f"keywords={DEMO}/keywords", f"output={DEMO}/prepared-again") == 0
    assert manifest("prepared-again", "prepared").parents["keywords"] == keywords.reference


@pytest.mark.parametrize("queries", QUERY_SETS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_retrieve_candidates(system: str, queries: str) -> None:
    found = open_artifact(DEMO / "candidates" / f"{system}-{queries}", "candidates")
    asked = set(pq.read_table(found.path / "queries.parquet").column("query_id").to_pylist())
    rows = [pq.read_table(path) for path in sorted(found.path.glob("candidates-*.parquet"))]
    answered = {one for table in rows for one in table.column("query_id").to_pylist()}
    assert len(asked) == (20 if queries == "queries" else manifest("prepared", "prepared").rows("reviews/test/"))
    assert answered <= asked
    assert answered == asked or system == "bm25"    # only the lexical search may find nothing
    assert max(rank for table in rows for rank in table.column("rank").to_pylist()) == 100


def test_evaluate() -> None:
    for name, primary in (("queries", "nDCG@10"), ("reviews", "Recall@10")):
        evaluation = open_artifact(DEMO / "evaluation" / name, "evaluation")
        metrics = json.loads((evaluation.path / "metrics.json").read_text())
        assert {*SYSTEMS, "popularity"} <= set(metrics["systems"])
        assert metrics["primary"] == primary


def test_write_report() -> None:
    page = (DEMO / "report/index.html").read_text("utf-8")
    assert "The demo shop, from raw files to answers" in page
    assert json.loads((DEMO / "report/report.json").read_text())["tables"]


def test_label_concerns() -> None:
    assert run_job("label_concerns") == 0
    labels = manifest("concern-labels", "concern_labels")
    assert labels.parents["prepared"] == manifest("prepared", "prepared").reference
    assert labels.rows("labels.parquet") == 7 * labels.rows("products.parquet") > 350


def test_finetune_bt_bert() -> None:
    assert run_job("label_concerns") == 0
    assert run_job("finetune_bt_bert", "workers.count=0", "max_steps=2", "max_tokens=24", "evaluate_every=2",
                   "validation_products=20", "device=cpu") == 0
    assert len(manifest("bt-bert", "bt_bert").facts["bt_bert"]["card"]["concerns"]) == 7


def test_score_concerns() -> None:
    test_finetune_bt_bert()
    assert run_job("score_concerns", "workers=1", "model.device=cpu") == 0
    scores = manifest("concern-scores", "concern_scores")
    assert scores.facts["rows"] == scores.rows("scores/bucket-") > 50
    assert scores.parents["prepared"] == manifest("prepared", "prepared").reference


def test_explain_concerns() -> None:
    test_finetune_bt_bert()
    assert run_job("explain_concerns", "most_products=3", "model.device=cpu") == 0
    assert manifest("concern-explanations", "concern_explanations").facts["products"] == 3


def test_concerns_reach_the_index_and_the_report() -> None:
    test_score_concerns()
    test_explain_concerns()
    assert run_job("build_index", f"concerns={DEMO}/concern-scores", f"reasons={DEMO}/concern-explanations",
                   f"output={DEMO}/index-concerns") == 0
    assert set(manifest("index-concerns", "index").facts["concerns"]["names"]) == {
        "redness", "eyebag", "acne", "oiliness", "wrinkle", "age", "moisture"}
    assert run_job("write_report", f"concerns={{labels: {DEMO}/concern-labels, scores: {DEMO}/concern-scores, "
                   f"reasons: {DEMO}/concern-explanations}}", f"output={DEMO}/report-concerns") == 0
    assert "Beauty concerns" in (DEMO / "report-concerns/index.html").read_text("utf-8")


def test_evaluate_concerns() -> None:
    """Baselines alone here; the scores of a trained model are evaluated where it is trained."""
    assert run_job("label_concerns") == 0       # made already, unless this test runs alone
    assert run_job("evaluate", "samples=100", "systems={}", config="concerns") == 0
    evaluation = manifest("evaluation/concerns", "concern_evaluation")
    assert evaluation.facts["systems"] == ["majority", "fuzzy", "ingredients"]
    assert evaluation.parents["labels"] == manifest("concern-labels", "concern_labels").reference


def test_embed_images() -> None:
    assert run_job("embed_images", "workers=1", "encoder.device=cpu") == 0
    assert manifest("image-vectors", "image_vectors").facts["rows"] == 5


def test_label_attributes() -> None:
    assert run_job("label_attributes") == 0
    rows = manifest("attributes", "attributes")
    assert rows.parents["prepared"] == manifest("prepared", "prepared").reference
    assert 50 < rows.rows("attributes.parquet") < 300       # the garments among 500 products
    assert min(rows.facts["known"].values()) > 0.3


def test_finetune_attribute_adapter() -> None:
    """Of the same products more pictures than the flow needs, so that some garments share a kind."""
    assert run_job("label_attributes") == 0
    assert run_job("make_demo_shop", *SHOP[:2], "queries=0", "image_products=100", f"output={DEMO}/pictured") == 0
    assert run_job("embed_images", "workers=1", "encoder.device=cpu", f"images.path={DEMO}/pictured/public/images",
                   f"output={DEMO}/pictured-vectors") == 0
    assert run_job("finetune_attribute_adapter", f"vectors={DEMO}/pictured-vectors", "pairs=null", "workers.count=0",
                   "max_steps=2", "evaluate_every=2", "sampler.batch_size=8", "gate.min_units=2", "force=true") == 0
    adapter = manifest("attribute-adapter", "attribute_adapter")
    assert adapter.facts["pictures"]["train"] > 10
    assert adapter.parents["attributes"] == manifest("attributes", "attributes").reference


def test_evaluate_attributes() -> None:
    """Of the pictures that the adapter was made from, all: the small shop's test part has too few of a kind."""
    test_finetune_attribute_adapter()
    assert run_job("evaluate", f"vectors={DEMO}/pictured-vectors", "part=all", "shown_slices=1",
                   config="attributes") == 0
    evaluation = manifest("evaluation/attributes", "attribute_evaluation")
    assert evaluation.facts["systems"] == ["frozen", "adapted"]
    assert evaluation.parents["adapter"] == manifest("attribute-adapter", "attribute_adapter").reference


def test_make_attribute_pairs() -> None:
    """Mined in texts: the small shop has too few pictures to pair."""
    assert run_job("label_attributes") == 0
    assert run_job("make_attribute_pairs", "vectors.images=null", f"vectors.texts={DEMO}/embeddings",
                   "pairs.contradictions=kept") == 0
    pairs = manifest("attribute-pairs", "attribute_pairs")
    assert pairs.rows("pairs/train.parquet") > 100
    assert pairs.parents["attributes"] == manifest("attributes", "attributes").reference


def test_ground_attributes() -> None:
    """The sample, one kind of verdict filled in as a reviewer would, and its analysis."""
    assert run_job("label_attributes") == 0
    assert run_job("ground_attributes", "sample=30") == 0
    review = open_artifact(DEMO / "grounding", "grounding").file("review.csv")
    rows = list(csv.DictReader(review.open()))
    assert len(rows) == 30
    with Path("done.csv").open("w") as done:
        writer = csv.DictWriter(done, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "category2 verdict": "right"} for row in rows)
    assert run_job("ground_attributes", "completed=done.csv", f"output={DEMO}/grounded") == 0
    assert manifest("grounded", "grounding").facts["attributes"][0]["judged"] == 30


def test_build_hybrid() -> None:
    test_embed_images()
    assert run_job("build_hybrid") == 0
    hybrid = manifest("hybrid", "hybrid_index")
    assert hybrid.facts["known"] == {"text": hybrid.facts["rows"], "image": 5, "behaviour": 0}


def test_search_products() -> None:
    test_build_hybrid()
    assert run_job("search_products") == 0
    assert len(json.loads((DEMO / "search/answer.json").read_text())) == 10


def test_write_store() -> None:
    assert run_job("write_store") == 0
    assert run_job("write_store", "store={kind: chroma, path: runs/demo/chroma}") == 0


def test_write_copy() -> None:
    assert run_job("write_copy") == 0
    assert not (DEMO / "product-copy").exists()     # off unless a server is named


def test_analyse_embeddings() -> None:
    assert run_job("analyse_embeddings") == 0
    figures = manifest("embedding-analysis", "embedding_analysis").facts["figures"]
    assert figures["category_match_rate"] > figures["category_match_chance"]


def test_realism_card() -> None:
    assert run_job("realism_card", "sample=50") == 0
    assert json.loads((DEMO / "realism.json").read_text())


@pytest.fixture(scope="module")
def compacted(flow: dict[str, int]) -> tuple[Manifest, Manifest]:
    """An index of several segments at runs/demo/segmented, before and after its compaction."""
    assert run_job("build_index", f"output={DEMO}/segmented", "rows_per_segment=200") == 0
    before = manifest("segmented", "index")
    assert run_job("compact_index", f"index={DEMO}/segmented") == 0
    return before, manifest("segmented", "index")


def test_compact_index(compacted: tuple[Manifest, Manifest]) -> None:
    before, after = compacted
    assert len(before.facts["segments"]) > len(after.facts["segments"]) == 1
    assert after.facts["live_rows"] == before.facts["live_rows"]


def test_rollback(compacted: tuple[Manifest, Manifest]) -> None:
    before, after = compacted
    assert run_job("rollback", f"root={DEMO}/segmented") == 0
    assert current_version(DEMO / "segmented") == before.version
    assert run_job("rollback", f"root={DEMO}/segmented", f"version={after.version}") == 0
    assert current_version(DEMO / "segmented") == after.version
    assert len(list_versions(DEMO / "segmented")) == 2


def test_serve() -> None:
    port, answers = free_ports(1)[0], []
    client = threading.Thread(target=ask_then_stop, args=(f"http://127.0.0.1:{port}", answers))
    client.start()
    assert run_job("serve", f"port={port}", "encoder=null", "retriever.mode=bm25") == 0   # run_shop serves with it
    client.join()
    assert answers[0]["shards_answered"] == answers[0]["shards_total"]
    assert len(answers[0]["items"]) == 5


def ask_then_stop(url: str, answers: list[dict[str, Any]]) -> None:
    """Ask the service once it is ready, and tell this process to stop serving."""
    deadline = time.monotonic() + 90
    try:
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{url}/readyz", timeout=10).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.3)
        answers.append(httpx.post(f"{url}/v1/search", json={"query": "a couch", "k": 5}, timeout=30).json())
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def test_run_shop(capsys: pytest.CaptureFixture[str]) -> None:
    """Everything is there already, so the whole flow makes nothing anew, and still answers its questions."""
    before = versions()
    assert before
    assert run_job("run_shop", *(f"flow.shop.{one}" for one in SHOP), "ranker.gbdt.rounds=20",
                   "ranker.gbdt.min_leaf=10", "ranker.samples=100", "images.workers=1", "images.encoder.device=cpu",
                   f"serve.port={free_ports(1)[0]}") == 0
    now = versions()
    assert {path: now[path] for path in before if "evaluation" not in path} == {
        path: version for path, version in before.items() if "evaluation" not in path}
    assert "couch for a small flat" in capsys.readouterr().out
    assert len(list((DEMO / "pictures/images").glob("*.jpg"))) == 5
