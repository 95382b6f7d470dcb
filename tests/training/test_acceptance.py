"""The gate of an encoder: a better one passes, a worse one is turned away with what was measured."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_ray.artifacts import Artifact, open_artifact, stage
from recsys_ray.config import Config
from recsys_ray.evaluation.gate import GateError
from recsys_ray.ids import row_ids
from recsys_ray.models.sentence_layout import find_model
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.runtime import RayConfig
from recsys_ray.schema import PRODUCT, PRODUCT_STATS, PRODUCT_TEXT, conform
from recsys_ray.training.acceptance import AcceptConfig, accept, likely_reasons

COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink", "grey", "purple")
NEEDS = {"couch": "sofa", "tee": "t-shirt", "sneaker": "running shoe", "lamp": "desk light", "lotion": "face cream"}


def publish_catalogue(root: Path) -> Path:
    names = [f"{colour} {kind}" for colour in COLOURS for kind in NEEDS.values()]
    table = pa.table({"row_id": row_ids(names), "product_id": names, "title": names, "text": names,
                      "group_id": row_ids(names), "category": ["all"] * len(names),
                      "as_of_ms": np.ones(len(names), int), "num_reviews": np.zeros(len(names), int),
                      "text_hash": [hashlib.sha256(one.encode()).hexdigest()[:32] for one in names]}).sort_by("row_id")
    with stage(root, "prepared", "x") as staging:
        files = [staging.write_table(f"{folder}/bucket-00000.parquet", conform(table, schema, folder))
                 for folder, schema in (("products", PRODUCT), ("product_text", PRODUCT_TEXT),
                                        ("product_stats", PRODUCT_STATS))]
        staging.commit(files, config=Config(), facts={"num_buckets": 1, "template": "seed-v1"})
    asked = [(f"{colour} {word}", f"{colour} {kind}") for colour in COLOURS for word, kind in NEEDS.items()]
    pq.write_table(pa.table({"query_id": [str(i) for i in range(len(asked))], "query": [q for q, _ in asked]}),
                   root / "queries.parquet")
    pq.write_table(pa.table({"query_id": [str(i) for i in range(len(asked))], "product_id": [p for _, p in asked],
                             "gain": [1.0] * len(asked)}), root / "judgments.parquet")
    return root


def publish_encoder(root: Path, model: Path, facts: dict[str, Any]) -> Artifact:
    with stage(root, "encoder", "x") as staging:
        shutil.copytree(model, staging.path / "encoder")
        names = [path.relative_to(staging.path).as_posix() for path in (staging.path / "encoder").rglob("*")
                 if path.is_file()]
        return staging.commit([staging.entry(name) for name in names], config=Config(), facts=facts)


def config_of(tmp_path: Path, base: str, **changes: Any) -> AcceptConfig:
    return AcceptConfig.model_validate({
        "candidate": tmp_path / "candidate", "latest": tmp_path / "latest", "prepared": tmp_path / "prepared",
        "base": TextEncoderConfig(model=base, device="cpu").model_dump(), "work_dir": tmp_path / "work",
        "queries": {"format": "table", "path": str(tmp_path / "prepared" / "queries.parquet")},
        "judgments": {"format": "table", "path": str(tmp_path / "prepared" / "judgments.parquet")},
        "primary": "Recall@1", "gate": {"min_units": 30}, "ray": RayConfig(progress=False).model_dump(), **changes})


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_an_improvement_becomes_the_latest(tmp_path: Path, tiny_text_model: Callable[..., Path],
                                           local_ray: None) -> None:
    publish_catalogue(tmp_path / "prepared")
    candidate = publish_encoder(tmp_path / "candidate", find_model("minilm"), {"steps": 10})
    accepted = accept(config_of(tmp_path, str(tiny_text_model())))
    accepted.verify()
    assert accepted.manifest.facts["outcome"] == "improved"
    assert accepted.manifest.facts["steps"] == 10
    assert accepted.manifest.parents["candidate"] == candidate.manifest.reference
    assert accepted.names("encoder/") == candidate.names("encoder/")
    assert accept(config_of(tmp_path, str(tiny_text_model()))).manifest.version == accepted.manifest.version


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_worse_one_is_turned_away_unless_told_otherwise(tmp_path: Path, tiny_text_model: Callable[..., Path],
                                                         local_ray: None) -> None:
    publish_catalogue(tmp_path / "prepared")
    publish_encoder(tmp_path / "candidate", tiny_text_model(), {"steps": 100, "best_step": 10, "learning_rate": 1.0})
    with pytest.raises(GateError, match=r"worse by Recall@1: .*force=true.*best of 100 steps was the 10th"):
        accept(config_of(tmp_path, "minilm"))
    with pytest.raises(ValueError, match="no encoder artefact was published"):
        open_artifact(tmp_path / "latest", "encoder")
    forced = accept(config_of(tmp_path, "minilm", force=True)).manifest.facts
    assert (forced["outcome"], forced["forced"]) == ("worse", True)
    assert "overfitting" in forced["likely_reasons"][0]


def test_each_reason_needs_its_figure() -> None:
    rows = [{"slice": name, "primary": True, "rows": count} for name, count in (("all", 100), ("generic", 40))]
    facts = {"copied_token_gap": 0.5, "false_negative_share": 0.1, "mask_same_product": False, "steps": 100,
             "best_step": 20, "base_value": 0.3, "best_value": 0.2, "learning_rate": 1e-3}
    found = likely_reasons(facts, {"comparisons": rows})
    assert [one.split(":")[0].split(",")[0].split(" of ")[0] for one in found] == [
        "copied words", "false negatives", "overfitting", "the validation never rose above the start (0.3000)", "40%"]
    sound = {"copied_token_gap": 0.01, "false_negative_share": 0.1, "mask_same_product": True, "steps": 100,
             "best_step": 90, "base_value": 0.3, "best_value": 0.4}
    assert likely_reasons(sound, {"comparisons": rows[:1]}) == []


def test_a_gate_on_what_the_training_has_seen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a gate needs the test split"):
        config_of(tmp_path, "minilm", queries={"format": "reviews", "prepared": "p", "split": "valid"})
