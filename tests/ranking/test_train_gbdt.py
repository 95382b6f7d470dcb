"""The training stage: what it publishes, that it repeats itself, and how time divides the queries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_period import Period, candidates_of, write_period

from recsys_ray.artifacts import open_artifact
from recsys_ray.models.cross_encoder import CrossEncoderConfig
from recsys_ray.ranking.features import FEATURES
from recsys_ray.ranking.gbdt import MODEL, GbdtRanker
from recsys_ray.ranking.rerank import RerankConfig, Reranker, RerankError
from recsys_ray.ranking.train_gbdt import TrainGbdtConfig, fitting_part, train_gbdt
from recsys_ray.schema import EVENT, conform

TREES = {"rounds": 40, "leaves": 4, "min_leaf": 5, "learning_rate": 0.2}


@pytest.fixture(scope="module")
def period(tmp_path_factory: pytest.TempPathFactory) -> Period:
    return write_period(tmp_path_factory.mktemp("period"))


def config(period: Period, output: Path, **changes: Any) -> TrainGbdtConfig:
    return TrainGbdtConfig.model_validate({
        "index": period.index, "fit": period.valid, "test": period.test, "prepared": period.prepared, "output": output,
        "rerank": {"one_title": False, "depth": 12}, "gbdt": TREES, "samples": 100, **changes})


def test_trees_are_published_measured_and_explained(period: Period, tmp_path: Path) -> None:
    made = train_gbdt(config(period, tmp_path))
    facts = made.manifest.facts
    assert facts["features"] == list(FEATURES)
    assert facts["queries"]["fit"] + facts["queries"]["stop"] == 120
    assert facts["metrics"]["gbdt, nDCG@5"] > facts["metrics"]["retrieval, nDCG@5"] + 0.1   # its order knew nothing
    measured = json.loads(made.file("metrics.json").read_bytes())["test"]
    assert measured["queries"] == 120 > measured["found"]       # a fifth was never retrieved
    values = {(row["system"], row["scope"]): row["mean"] for row in measured["systems"] if row["metric"] == "nDCG@5"}
    assert values["gbdt", "unconditional"] == pytest.approx(
        values["gbdt", "conditional"] * measured["found"] / measured["queries"])
    document = json.loads(made.file("explanation.json").read_bytes())
    assert sum(one["gain_share"] for one in document["features"]) == pytest.approx(1, abs=1e-3)
    assert "<svg" in made.file("explanation.html").read_text("utf-8")
    assert {entry.path for entry in made.manifest.files} >= {MODEL}
    assert train_gbdt(config(period, tmp_path)).manifest.version == made.manifest.version


def test_the_same_input_gives_the_same_file(period: Period, tmp_path: Path) -> None:
    texts = {train_gbdt(config(period, tmp_path / name, test=None)).file(MODEL).read_text() for name in "ab"}
    assert len(texts) == 1


def test_the_published_trees_order_as_the_measured_ones(period: Period, tmp_path: Path) -> None:
    train_gbdt(config(period, tmp_path))
    reranker = Reranker(RerankConfig(gbdt=tmp_path, depth=12))
    assert reranker.gbdt is not None
    assert reranker.gbdt.trained_with == {"depth": 12, "cross_top": 20}
    assert isinstance(reranker.gbdt, GbdtRanker)


def test_trees_that_read_a_cross_encoder_want_that_one(period: Period, tmp_path: Path, tiny_pair_model: Any) -> None:
    first, second = (CrossEncoderConfig(model=str(tiny_pair_model(seed=seed)), device="cpu") for seed in (0, 1))
    rerank = {"one_title": False, "depth": 12, "cross_top": 4, "cross_encoder": first.model_dump()}
    made = train_gbdt(config(period, tmp_path, rerank=rerank, test=None))
    assert made.manifest.facts["cross_encoder"]["weights_sha256"]
    Reranker(RerankConfig(gbdt=tmp_path, cross_encoder=first, depth=12, cross_top=4))
    with pytest.raises(RerankError, match="weights_sha256"):
        Reranker(RerankConfig(gbdt=tmp_path, cross_encoder=second))
    with pytest.raises(RerankError, match="configure the one"):
        Reranker(RerankConfig(gbdt=tmp_path))


def test_events_are_learned_from(period: Period, tmp_path: Path) -> None:
    rows = candidates_of(open_artifact(period.valid, "candidates")).to_pylist()
    judged = open_artifact(period.valid, "candidates").table("judgments.parquet").to_pylist()
    right = {(row["query_id"], row["product_id"]) for row in judged}
    events = []
    for row in rows:
        own = (row["query_id"], row["product_id"])
        base = {"query_id": own[0], "list_id": own[0], "product_id": own[1], "timestamp_ms": 1}
        if row["rank"] <= 8:
            events.append({**base, "kind": "impression", "position": row["rank"], "event_id": f"{own}i"})
            if own in right:
                events.append({**base, "kind": "click", "position": None, "event_id": f"{own}c"})
    pq.write_table(conform(pa.Table.from_pylist(events), EVENT, "events"), tmp_path / "events.parquet")
    made = train_gbdt(config(period, tmp_path / "gbdt", events=tmp_path / "events.parquet"))
    assert made.manifest.facts["metrics"]["gbdt, nDCG@5"] > made.manifest.facts["metrics"]["retrieval, nDCG@5"]
    assert made.manifest.facts["queries"]["fit, with their product"] < 96     # of those that were shown


def test_time_divides_the_queries() -> None:
    names = list("abcdefgh")
    times = dict(zip(names, [5, 1, 1, 9, 7, 3, 3, 2], strict=True))
    chosen = fitting_part(names, times, 0.75, 7)
    fitted = [times[one] for one, part in zip(names, chosen, strict=True) if part]
    stopping = [times[one] for one, part in zip(names, chosen, strict=True) if not part]
    assert len(fitted) == 6
    assert max(fitted) < min(stopping)
    assert 0 < np.sum(~fitting_part([str(one) for one in range(50)], None, 0.75, 7)) < 25


def test_trees_in_the_configuration_are_refused(period: Period, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rerank\.gbdt"):
        config(period, tmp_path, rerank={"gbdt": str(tmp_path)})


@pytest.mark.ray
def test_two_workers_grow_trees_as_good(period: Period, tmp_path: Path, local_ray: None) -> None:
    alone = train_gbdt(config(period, tmp_path / "alone"))
    shared = train_gbdt(config(period, tmp_path / "shared", workers={"count": 2}))
    values = [one.manifest.facts["metrics"]["gbdt, nDCG@5"] for one in (alone, shared)]
    assert values[1] == pytest.approx(values[0], abs=0.08)
    assert values[1] > shared.manifest.facts["metrics"]["retrieval, nDCG@5"] + 0.1
    Reranker(RerankConfig(gbdt=tmp_path / "shared", depth=12))
