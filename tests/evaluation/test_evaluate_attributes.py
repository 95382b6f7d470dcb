"""The stage and its page: artefacts in, figures by slice, the gallery's pictures, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config
from recsys_ray.evaluation.attribute_tasks import EvaluateAttributesConfig
from recsys_ray.evaluation.attributes import AttributeMetricError
from recsys_ray.evaluation.evaluate_attributes import attribute_summary, evaluate_attributes
from recsys_ray.evaluation.tasks import EvaluationConfig
from recsys_ray.models.attribute_adapter import AdapterCard, AttributeAdapter
from recsys_ray.retrieval.embed_images import vector_schema
from recsys_ray.schema import ATTRIBUTE_ROW, IMAGE, conform

COUNT, DIMENSION = 360, 8
KINDS, NECKS = ("dress", "coat", "graphic"), ("crew", "v neck", None)
ENCODER = {"model": "m", "dimension": DIMENSION}


class _Images(Config):
    images: dict[str, Any]


class _Split(Config):
    pairs: None = None
    split: dict[str, Any]


def jpeg(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 60), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def write(folder: Path, adapted: float | None = 0.0, shuffled: bool = False) -> dict[str, Any]:
    """Vectors of pictures, their attributes, and an adapter whose change is `adapted` times noise (None: collapse)."""
    random = np.random.default_rng(4)
    kind, neck = random.integers(0, 3, COUNT), random.integers(0, 3, COUNT)
    centres = random.normal(size=(6, DIMENSION))
    vectors = centres[kind] + 0.5 * centres[3 + neck] + 0.4 * random.normal(size=(COUNT, DIMENSION))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ids = [f"p{at:03d}" for at in range(COUNT)]
    pictures = pa.table({"image_id": [f"{one}.jpg" for one in ids], "product_id": ids,
                         "data": pa.array([jpeg((20 * int(one), 90, 120)) for one in kind[:-1]] + [b"broken"],
                                          pa.large_binary())})
    pq.write_table(conform(pictures, IMAGE, "images"), folder / "pictures.parquet")
    table = pa.table({"image_id": pictures["image_id"], "product_id": ids, "vector": pa.FixedSizeListArray.from_arrays(
        pa.array(vectors.reshape(-1)), DIMENSION)})
    with stage(folder / "vectors", "image_vectors", "v") as staging:
        staging.commit([staging.write_table("vectors/part-00000.parquet", conform(
            table, vector_schema(DIMENSION), "vectors"))], facts={"encoder": ENCODER, "dimension": DIMENSION},
            config=_Images(images={"path": str(folder / "pictures.parquet")}))
    order = random.permutation(COUNT) if shuffled else np.arange(COUNT)
    rows = pa.table({"product_id": ids, "category2": [KINDS[one] for one in kind[order]],
                     "neckline": [NECKS[one] for one in neck[order]], "evidence": [[]] * COUNT})
    with stage(folder / "attributes", "attributes", "a") as staging:
        staging.commit([staging.write_table("attributes.parquet", conform(rows, ATTRIBUTE_ROW, "rows"))],
                       config=_Images(images={}))
    adapter = AttributeAdapter(AdapterCard(image=ENCODER, text=None, attributes={"neckline": ("crew", "v neck")}))
    weights = adapter.state_dict()
    if adapted is None:
        weights["image.change.bias"] += 1000.0
    with stage(folder / "adapter", "attribute_adapter", "x") as staging:
        adapter.save(staging.path / "attribute_adapter")
        staging.commit([staging.entry(f"attribute_adapter/{name}") for name in ("adapter.safetensors", "adapter.json")],
                       config=_Split(split={"train": 0.2, "valid": 0.1, "seed": 7}))
    return {"name": "n", "vectors": folder / "vectors", "attributes": folder / "attributes",
            "adapter": folder / "adapter", "output": folder / "out"}


def run(folder: Path, inputs: dict[str, Any], **options: Any) -> tuple[Artifact, dict[str, Any]]:
    made = evaluate_attributes(EvaluateAttributesConfig.model_validate({**inputs, **options}))
    return made, json.loads(made.file("metrics.json").read_text("utf-8"))


def test_an_adapter_that_changes_nothing_is_kept_and_shown(tmp_path: Path) -> None:
    inputs = write(tmp_path)
    made, document = run(tmp_path, inputs)
    board = document["tasks"][0]
    rows = {row["slice"]: row for row in board["rows"]}
    assert {"category2", "neckline", "category2 mAP", "category2=coat", "neckline=v neck"} == {
        one for one in rows if "graphic" not in one and "dress" not in one and "crew" not in one}
    assert "category2=graphic" not in rows
    assert "material" not in rows                       # of which nothing is known
    assert rows["category2"]["chance"]["mean"] < rows["category2"]["frozen"]["low"]
    assert rows["category2"]["frozen"] == rows["category2"]["trained"]
    assert rows["category2"]["verdict"]["outcome"] == "kept"
    assert board["gate"] == {"passed": True, "worse": [], "undecidable": []}
    assert [one["outcome"] for one in board["targets"]] == ["missed", *["not measured"] * 4]
    assert 0.55 * COUNT < document["counts"]["pictures"] < 0.85 * COUNT     # the adapter's own test part
    page = made.file("index.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") > 20
    assert 'class="shot hit"' in page
    assert 'class="shot miss"' in page
    assert "<script" not in page
    text = attribute_summary(document)
    assert "target neckline +0.05: missed (+0.000)" in text
    assert evaluate_attributes(EvaluateAttributesConfig.model_validate(inputs)).manifest.version == \
        made.manifest.version


def test_a_collapsed_adapter_is_refused_by_the_gate(tmp_path: Path) -> None:
    made, document = run(tmp_path, write(tmp_path, adapted=None), shown_slices=2)
    gate = document["tasks"][0]["gate"]
    assert not gate["passed"]
    assert {"category2", "neckline"} <= set(gate["worse"])
    assert "refused" in made.file("index.html").read_text("utf-8")
    rows = {row["slice"]: row for row in document["tasks"][0]["rows"]}
    assert rows["category2"]["trained"]["mean"] == pytest.approx(rows["category2"]["chance"]["mean"], abs=0.02)


def test_an_adapter_with_its_own_network_stands_beside_the_frozen_one(tmp_path: Path) -> None:
    """Its pictures were embedded again, in another order, by a network that knows kinds perfectly."""
    inputs = write(tmp_path)
    kinds = pq.read_table(next((tmp_path / "attributes").rglob("attributes.parquet")))["category2"].to_pylist()
    network, order = {**ENCODER, "weights_sha256": "trained"}, np.random.default_rng(1).permutation(COUNT)
    vectors = np.eye(DIMENSION, dtype=np.float32)[[KINDS.index(kinds[at]) for at in order]]
    table = pa.table({"image_id": [f"p{at:03d}.jpg" for at in order], "vector": pa.FixedSizeListArray.from_arrays(
        pa.array(vectors.reshape(-1)), DIMENSION)})
    with stage(tmp_path / "trained", "image_vectors", "t") as staging:
        staging.commit([staging.write_table("vectors/part-00000.parquet", conform(
            table, vector_schema(DIMENSION), "vectors"))], facts={"encoder": network}, config=Config())
    card = AdapterCard(image=ENCODER, attributes={"neckline": ("crew", "v neck")}).on(network)
    with stage(tmp_path / "adapter", "attribute_adapter", "y") as staging:
        AttributeAdapter(card).save(staging.path / "attribute_adapter")
        staging.commit([staging.entry(f"attribute_adapter/{name}") for name in ("adapter.safetensors", "adapter.json")],
                       config=_Split(split={"train": 0.2, "valid": 0.1, "seed": 7}))
    with pytest.raises(AttributeMetricError, match="give those vectors as `trained`"):
        run(tmp_path, inputs)
    _, document = run(tmp_path, inputs, trained=tmp_path / "trained")
    row = next(one for one in document["tasks"][0]["rows"] if one["slice"] == "category2")
    assert row["trained"]["mean"] == 1.0 > row["frozen"]["mean"]


def test_the_frozen_model_alone_stands_beside_chance(tmp_path: Path) -> None:
    inputs = {**write(tmp_path), "adapter": None}
    _, document = run(tmp_path, inputs, part="all", slices=["neckline=crew"], shown_slices=1)
    board = document["tasks"][0]
    assert (board["systems"], board["gate"], board["targets"]) == (["frozen"], None, [])
    assert [row["slice"] for row in board["rows"]] == ["category2", "neckline", "category2 mAP", "neckline=crew"]
    assert document["counts"]["pictures"] == COUNT


def test_shuffled_rows_and_strange_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AttributeMetricError, match="not those of the vectors"):
        run(tmp_path, write(tmp_path, shuffled=True))
    with pytest.raises(ValueError, match="texts are read by an adapter"):
        EvaluateAttributesConfig(name="n", vectors=tmp_path, texts=tmp_path, output=tmp_path)
    assert EvaluationConfig.chosen_for({"task": "attributes"}) is EvaluateAttributesConfig
