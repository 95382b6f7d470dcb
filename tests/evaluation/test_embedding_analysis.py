"""Figures of embedding spaces that were made to be told apart; drift that is and drift that is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.artifacts import stage
from recsys_ray.config import Config
from recsys_ray.evaluation.analyse_embeddings import AnalyseConfig, analyse_embeddings
from recsys_ray.evaluation.embedding_analysis import (
    AnalysisError,
    AnalysisOptions,
    DriftLimits,
    EmbeddingAnalyser,
    drift,
)
from recsys_ray.ids import row_ids
from recsys_ray.schema import embedding_schema


def clusters(count: int = 300, groups: int = 6, spread: float = 0.3, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    random = np.random.default_rng(seed)
    middles = np.random.default_rng(99).standard_normal((groups, 16))
    of = np.arange(count) % groups
    return (middles[of] + spread * random.standard_normal((count, 16))).astype(np.float32), [f"c{one}" for one in of]


def analyser(vectors: np.ndarray, categories: list[str] | None = None, prefix: str = "P", **options: object
             ) -> EmbeddingAnalyser:
    return EmbeddingAnalyser(vectors, [f"{prefix}{number}" for number in range(len(vectors))], categories,
                             AnalysisOptions(**options))  # type: ignore[arg-type]


def test_clusters_match_by_category_and_noise_matches_by_chance() -> None:
    vectors, names = clusters()
    good = analyser(vectors, names).figures()
    assert good["category_match_rate"] > 0.95
    assert good["category_match_chance"] == pytest.approx(1 / 6)
    noise = analyser(np.random.default_rng(1).standard_normal((300, 16)), names).figures()
    assert noise["category_match_rate"] == pytest.approx(1 / 6, abs=0.05)
    assert noise["effective_dimensions"] > 10 > good["effective_dimensions"]
    assert analyser(vectors).category_match() is None


def test_a_narrow_cone_and_a_hub_are_seen() -> None:
    random = np.random.default_rng(2)
    wide = random.standard_normal((400, 32))
    assert analyser(wide).diversity()["mean_similarity"] == pytest.approx(0, abs=0.02)
    assert analyser(wide + 5).diversity()["mean_similarity"] > 0.9
    around = np.vstack([wide, np.full((1, 32), 1e-3) + wide.mean(axis=0)])      # in the middle, near to everybody
    hub = analyser(np.vstack([wide + 1.0, (wide + 1.0).mean(axis=0)])).hubness()
    assert hub["largest_hub"] > 0.5
    assert hub["hub_skewness"] > analyser(wide).hubness()["hub_skewness"] + 5
    assert 0 <= analyser(around).hubness()["never_found"] < 0.2


def test_near_duplicates_are_listed_once() -> None:
    vectors = np.random.default_rng(3).standard_normal((50, 16))
    vectors[7] = vectors[3] * 2
    pairs = analyser(vectors).near_duplicates()
    assert [(one.first, one.second) for one in pairs] == [("P3", "P7")]
    assert pairs[0].cosine == pytest.approx(1)


def test_drift_is_told_by_what_changed() -> None:
    vectors, names = clusters()
    before = analyser(vectors, names)
    same = drift(before, analyser(vectors, names), same_encoder=True)
    assert (same.retrain, same.moved, same.kept_neighbours) == (False, pytest.approx(0, abs=1e-6), 1.0)
    turn = np.linalg.qr(np.random.default_rng(4).standard_normal((16, 16)))[0]
    turned = drift(before, analyser(vectors @ turn, names), same_encoder=False)     # another basis, the same space
    assert turned.moved is None
    assert turned.kept_neighbours == pytest.approx(1)
    assert not turned.retrain
    scrambled = drift(before, analyser(np.random.default_rng(5).permutation(vectors), names), same_encoder=True)
    assert len(scrambled.reasons) == 3
    alike, more = np.vstack([vectors, clusters(seed=8)[0]]), [*names, *names]
    assert drift(before, analyser(alike, more), same_encoder=True).novelty == pytest.approx(0.5, abs=0.15)
    strange = np.vstack([vectors, np.random.default_rng(6).standard_normal((100, 16)) * 3])
    found = drift(before, analyser(strange, [*names, *["new"] * 100]), same_encoder=True)
    assert found.novelty is not None
    assert found.novelty > 0.9
    assert "new products lie further out" in found.reasons[0]
    assert not drift(before, analyser(strange), DriftLimits(novelty=1, kept_neighbours=0), same_encoder=True).retrain


def publish(root: Path, vectors: np.ndarray, key: str) -> None:
    ids = [f"P{number}" for number in range(len(vectors))]
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).reshape(-1)), vectors.shape[1])
    table = pa.table({"row_id": row_ids(ids), "product_id": ids, "text_hash": ids, "vector": column},
                     schema=embedding_schema(vectors.shape[1]))
    with stage(root, "embeddings", key) as staging:
        staging.commit([staging.write_table("vectors/bucket-00000.parquet", table)], config=Config(), facts={
            "encoder": {"model": "a"}, "dimension": int(vectors.shape[1])})


def test_the_job_compares_with_the_version_before_and_can_fail_on_drift(tmp_path: Path) -> None:
    vectors = clusters()[0]
    publish(tmp_path / "embeddings", vectors, "a" * 16)
    config = AnalyseConfig(vectors=tmp_path / "embeddings", output=tmp_path / "analysis", fail_on_drift=True)
    first = analyse_embeddings(config)
    assert first.manifest.facts["drift"] is None
    publish(tmp_path / "embeddings", np.random.default_rng(1).permutation(vectors), "b" * 16)
    with pytest.raises(AnalysisError, match=r"drifted from embeddings/.*neighbours kept"):
        analyse_embeddings(config)
    found = analyse_embeddings(config.replace(fail_on_drift=False))
    assert found.manifest.facts["drift"]["retrain"]
    page = found.file("index.html").read_text("utf-8")
    assert "Retrain: " in page
    assert page.count("<svg") == 2


def test_vectors_that_say_nothing_are_refused() -> None:
    with pytest.raises(AnalysisError, match="zeros or not finite"):
        analyser(np.zeros((5, 4)))
    with pytest.raises(AnalysisError, match="5 vectors, 2 ids"):
        EmbeddingAnalyser(np.ones((5, 4)), ["a", "b"])
