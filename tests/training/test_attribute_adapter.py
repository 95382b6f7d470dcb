"""Training of the adapter of pictures: what stands against what, one worker and two, resuming, the gate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from curves import assert_same_curve, curve

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config
from recsys_ray.data.attribute_items import Items, Pairs, halves, label_pairs, split_places
from recsys_ray.data.attribute_pair_data import GroupSplit
from recsys_ray.evaluation.gate import GateError
from recsys_ray.models.attribute_adapter import AttributeAdapter
from recsys_ray.retrieval.embed_images import vector_schema
from recsys_ray.schema import ATTRIBUTE_PAIR, ATTRIBUTE_ROW, embedding_schema
from recsys_ray.training.attribute_adapter import AdapterData, FinetuneAttributeAdapterConfig, build_task
from recsys_ray.training.attribute_adapter_run import finetune_attribute_adapter, finetune_here

REPO = Path(__file__).resolve().parents[2]
WIDTH, TEXT = 12, 5
SPLIT = GroupSplit(train=0.6, valid=0.3)
MATERIALS, NECKS = ("cotton", "denim", "silk"), ("crew", "square", "v_neck")
IMAGE = {"model": "tiny", "weights_sha256": "0", "dimension": WIDTH}
WORDS = {"weights_sha256": "1", "dimension": TEXT}


def garments(count: int, seed: int = 0) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """(ATTRIBUTE_ROW rows, vectors of pictures, vectors of texts): attributes are there, below louder noise."""
    random = np.random.default_rng(seed)
    axes = np.random.default_rng(99).normal(size=(2 + len(MATERIALS) + len(NECKS), WIDTH))
    words = np.random.default_rng(98).normal(size=(len(axes), TEXT))
    rows, signs = [], np.zeros((count, len(axes)))
    for number in range(count):
        kind, material, neck = random.integers(2), random.integers(len(MATERIALS)), random.integers(len(NECKS))
        signs[number, [kind, 2 + material, 2 + len(MATERIALS) + neck]] = 1
        rows.append({"product_id": f"p{number}", "category2": ("tee", "dress")[kind], "material": MATERIALS[material],
                     "neckline": None if number % 5 == 0 else NECKS[neck], "evidence": [],
                     "group_key": f"g{number // 2}" if number % 7 == 0 else None})
    loud = random.normal(size=(count, 2)) @ np.random.default_rng(97).normal(size=(2, WIDTH)) * 2
    pictures = signs @ axes + loud + random.normal(size=(count, WIDTH)) * 0.3
    texts = signs @ words + random.normal(size=(count, TEXT)) * 0.2
    return rows, *(np.ascontiguousarray(one / np.linalg.norm(one, axis=1, keepdims=True), dtype=np.float32)
                   for one in (pictures, texts))


def pairs_of(rows: list[dict[str, Any]], seed: int = 0) -> pa.Table:
    """Alike: one kind and material; of each anchor two of its kind and another material are known negatives."""
    random, found = np.random.default_rng(seed), []
    for row in rows:
        for other in random.permutation(len(rows))[:40].tolist():
            one = rows[other]
            if one is row or one["category2"] != row["category2"]:
                continue
            alike = one["material"] == row["material"]
            found.append({"anchor_id": row["product_id"], "other_id": one["product_id"], "label": int(alike),
                          "kind": "medium" if alike else "hard_material"})
    return pa.Table.from_pylist(found, schema=ATTRIBUTE_PAIR)


def data_of(count: int = 240, texts: bool = True) -> AdapterData:
    rows, pictures, words = garments(count)
    items = Items.of(pictures, pa.Table.from_pylist(rows, schema=ATTRIBUTE_ROW), words if texts else None)
    split = split_places(items, SPLIT)
    return AdapterData(items, split["train"], split["valid"],
                       Pairs.of(pairs_of(rows), items).within(split["train"], len(items)), IMAGE,
                       WORDS if texts else None)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image_vectors, attributes, attribute_pairs and embeddings of the same garments."""
    root, (rows, pictures, words) = tmp_path_factory.mktemp("artefacts"), garments(240)
    names = [row["product_id"] for row in rows]

    def vectors(array: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])

    tables = {
        "image_vectors": ("vectors/part-00000.parquet", {"encoder": IMAGE}, pa.table(
            {"image_id": [f"{name}.jpg" for name in names], "product_id": names, "vector": vectors(pictures),
             **{name: pa.nulls(len(names), kind) for name, kind in (
                 ("group_id", pa.string()), ("label", pa.string()), ("width", pa.int32()), ("height", pa.int32()))}}
        ).select(vector_schema(WIDTH).names).cast(vector_schema(WIDTH))),
        "attributes": ("attributes.parquet", {}, pa.Table.from_pylist(rows, schema=ATTRIBUTE_ROW)),
        "attribute_pairs": ("pairs/train.parquet", {"split": SPLIT.model_dump()}, pairs_of(rows)),
        "embeddings": ("vectors/bucket-00000.parquet", {"encoder": WORDS}, pa.table(
            {"row_id": np.arange(len(names)), "product_id": names, "text_hash": names, "vector": vectors(words)}
        ).cast(embedding_schema(TEXT)))}
    for kind, (name, facts, table) in tables.items():
        with stage(root / kind, kind, "f") as staging:
            staging.commit([staging.write_table(name, table)], config=Config(), facts=facts)
    return root


def settings_of(artefacts: Path, output: Path, **changes: Any) -> FinetuneAttributeAdapterConfig:
    return FinetuneAttributeAdapterConfig.model_validate({
        "vectors": artefacts / "image_vectors", "attributes": artefacts / "attributes",
        "pairs": artefacts / "attribute_pairs", "embeddings": artefacts / "embeddings", "output": output,
        "max_steps": 12, "evaluate_every": 4, "checkpoint_every": 3, "workers": {"threads": 1},
        "optim": {"learning_rate": 1e-2}, "loss": {"attributes": 1, "noise": 0.5},
        "sampler": {"batch_size": 32, "boosts": {"material": {"denim": 3}}},
        "gate": {"min_units": 10}, "force": True, **changes})


@pytest.fixture(scope="module")
def uninterrupted(artefacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return finetune_attribute_adapter(settings_of(artefacts, tmp_path_factory.mktemp("whole") / "adapter"))


def test_a_short_run_brings_like_attributes_together(artefacts: Path, tmp_path: Path) -> None:
    found = finetune_here(settings_of(artefacts, tmp_path / "adapter", max_steps=120, epochs=99, evaluate_every=40))
    facts = found.manifest.facts
    assert facts["best_value"] > facts["base_value"] + 0.1
    assert sum(facts["pictures"].values()) < 240        # the test split's were not touched
    assert facts["pictures"]["gate"] > 20
    adapter = AttributeAdapter.load(str(found.path.parents[1]))
    assert adapter.card.image == IMAGE
    assert "shares of what shops say" in (found.path / "attribute_adapter" / "README.md").read_text()
    boards = json.loads(found.file("scoreboard.json").read_text())
    fabrics = next(row for row in boards["pictures"]["rows"] if row["slice"] == "material")
    assert max(fabrics["chance"]["mean"], fabrics["frozen"]["mean"]) + 0.1 < fabrics["trained"]["mean"]
    by_text = {row["slice"]: row for row in boards["texts"]["rows"]}
    assert by_text["material"]["frozen"] == by_text["material"]["chance"]       # these texts had no place in the space
    assert by_text["material"]["verdict"]["outcome"] == "improved"
    lines = curve(found)
    assert lines[0]["attributes@10"] == facts["base_value"]        # before the first step it is the frozen model
    assert {"neckline@10", "text_material@10"} <= set(lines[0])
    assert {"loss_image", "loss_text", "loss_fused", "loss_attributes", "masked_share", "share material=denim",
            "image_weight"} <= set(lines[1])


def test_what_stands_against_what(artefacts: Path) -> None:
    """Columns: positives of the batch, then known negatives. Never of one's own group, never what may be as good."""
    config, data = settings_of(artefacts, artefacts / "unused"), data_of(texts=False)
    task = build_task(config, data)
    batch = task.sampler.batch(0)
    anchors, others = data.pairs.anchors[batch], data.pairs.others[batch]
    hard, owners = task.known_negatives(0, anchors)
    columns = np.concatenate([others, hard])
    seats = np.arange(len(batch))
    allowed = task.allowed(anchors, others, columns, owners, seats)
    assert allowed is not None
    material, kind = (data.items.codes[:, list(data.items.values).index(name)] for name in ("material", "category2"))
    for row in range(len(batch)):
        for column in range(len(columns)):
            if column == row:
                assert allowed[row, column]
            elif data.items.groups[columns[column]] == data.items.groups[anchors[row]]:
                assert not allowed[row, column]
            elif column >= len(batch) and owners[column - len(batch)] == row:
                assert allowed[row, column]
            elif material[columns[column]] == material[anchors[row]] and kind[columns[column]] == kind[anchors[row]]:
                neck = data.items.codes[:, list(data.items.values).index("neckline")]
                shared = neck[anchors[row]] == neck[others[row]] >= 0
                assert not allowed[row, column] or shared


def test_workers_add_up_to_one(artefacts: Path) -> None:
    """Losses of two workers' own rows are those of all rows: each knows all columns."""
    config, data = settings_of(artefacts, artefacts / "unused"), data_of()
    task = build_task(config, data)
    batch, seats = task.sampler.batch(1), np.arange(32)
    whole = task.losses(1, batch, batch, seats)
    for worker in range(2):
        own = task.losses(1, batch, batch[worker::2], seats[worker::2])
        for name, values in own.items():
            assert np.allclose(values.detach(), whole[name][worker::2].detach(), atol=1e-5), name


def test_labels_alone_make_pairs_of_different_groups() -> None:
    rows, pictures, _ = garments(60)
    labelled = [{"product_id": row["product_id"], "category2": row["category2"], "group_key": f"sender {number % 6}",
                 "evidence": []} for number, row in enumerate(rows)]
    items = Items.of(pictures, pa.Table.from_pylist(labelled, schema=ATTRIBUTE_ROW))
    pairs = label_pairs(items, 7)
    assert len(pairs) > 300
    assert (items.groups[pairs.anchors] != items.groups[pairs.others]).all()
    assert (items.codes[pairs.anchors] == items.codes[pairs.others]).all()


def test_those_that_choose_the_step_do_not_judge_it() -> None:
    data = data_of()
    choosing, judging = halves(data.items, data.valid, 0.5, 7)
    assert sorted([*choosing, *judging]) == data.valid.tolist()
    assert not set(data.items.groups[choosing]) & set(data.items.groups[judging])
    assert abs(len(choosing) - len(judging)) < 12
    assert all(np.array_equal(one, data.valid) for one in halves(data.items, data.valid, 1.0, 7))


def test_graphic_is_no_category() -> None:
    rows, pictures, _ = garments(4)
    rows[0]["category2"] = "graphic"
    items = Items.of(pictures, pa.Table.from_pylist(rows, schema=ATTRIBUTE_ROW))
    assert "graphic" not in items.values["category2"]
    assert items.codes[0, 0] == -1


def test_a_killed_run_goes_on_and_ends_the_same(artefacts: Path, tmp_path: Path, uninterrupted: Artifact) -> None:
    settings = settings_of(artefacts, tmp_path / "adapter")
    script = ("import sys; from recsys_ray.training.attribute_adapter_run import finetune_here; "
              "from recsys_ray.training.attribute_adapter import FinetuneAttributeAdapterConfig; "
              "finetune_here(FinetuneAttributeAdapterConfig.model_validate_json(sys.argv[1]))")
    killed = subprocess.run([sys.executable, "-c", script, settings.model_dump_json()], cwd=REPO, timeout=240,
                            env={**os.environ, "RECSYS_CRASH_AT": "step_7"}, capture_output=True, text=True)
    assert killed.returncode == 137, killed.stderr[-2000:]
    assert_same_curve(curve(finetune_here(settings)), curve(uninterrupted))


def test_an_adapter_below_the_frozen_model_is_not_published(artefacts: Path, tmp_path: Path) -> None:
    """A random head of one number throws the space away, and a step does not bring it back."""
    settings = settings_of(artefacts, tmp_path / "adapter", head={"kind": "mlp", "hidden": 1, "start": "random"},
                           max_steps=1, force=False, gate={"min_units": 10, "margin": 0})
    with pytest.raises(GateError, match="below the frozen model: "):
        finetune_here(settings)
    assert not (tmp_path / "adapter" / "CURRENT").exists()
    forced = finetune_here(settings.replace(force=True)).manifest.facts
    assert forced["forced"]


def test_metadata_of_other_pictures_is_refused(artefacts: Path, tmp_path: Path) -> None:
    rows, _, _ = garments(240)
    order = np.random.default_rng(3).permutation(len(rows))
    shuffled = [{**rows[other], "product_id": row["product_id"]} for row, other in zip(rows, order, strict=True)]
    with stage(tmp_path / "attributes", "attributes", "g") as staging:
        table = pa.Table.from_pylist(shuffled, schema=ATTRIBUTE_ROW)
        staging.commit([staging.write_table("attributes.parquet", table)], config=Config())
    with pytest.raises(ValueError, match=r"(?i)shuffled|aligned|belong"):
        finetune_here(settings_of(artefacts, tmp_path / "adapter", attributes=tmp_path / "attributes"))


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_two_workers_end_with_the_curve_of_one(artefacts: Path, tmp_path: Path, local_ray: object,
                                               uninterrupted: Artifact) -> None:
    shared = finetune_attribute_adapter(settings_of(artefacts, tmp_path / "adapter",
                                                    workers={"count": 2, "cpus": 0.5, "threads": 1}))
    ours, theirs = curve(shared), curve(uninterrupted)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in {"loss", "attributes@10"} & other.keys():
            assert mine[name] == pytest.approx(other[name], rel=2e-3)
