"""A guide's stored vectors against the guide itself, and the loss they give against sentence-transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_pairs import pair_rows, write_pairs

from recsys_ray.artifacts import Artifact, open_artifact
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.training.bge import FinetuneBgeConfig, build_task
from recsys_ray.training.contrastive import ContrastiveConfig, contrastive_loss
from recsys_ray.training.guide import GuideVectors, open_guide_vectors
from recsys_ray.training.launch import finetune_bge, finetune_here
from recsys_ray.training.pair_shards import open_pair_shards
from recsys_ray.training.trackers import read_curve

TinyModel = Callable[..., Path]
MARGIN = 0.05


@pytest.fixture(scope="module")
def models(tiny_text_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(student, guide); the guide has learned a little, because a random one finds all texts alike."""
    root, student = tmp_path_factory.mktemp("guide"), tiny_text_model()
    write_pairs(root / "pairs", negatives=2)
    guide = finetune_here(FinetuneBgeConfig.model_validate(settings_of(
        root / "pairs", root / "encoder", (student, student), guide=None, contrastive={}, max_steps=20,
        optim={"learning_rate": 3e-3})))
    return student, guide.path / "encoder"


def settings_of(pairs: Path, output: Path, models: tuple[Path, Path], **changes: Any) -> dict[str, Any]:
    student, guide = ({"model": str(one), "device": "cpu", "dtype": "float32"} for one in models)
    return {"pairs": pairs, "output": output, "encoder": student, "guide": guide, "query_tokens": 64,
            "document_tokens": 64, "max_steps": 4, "epochs": 9, "sampler": {"batch_size": 8}, "negatives": 1,
            "contrastive": {"guide_margin": MARGIN}, "validation": {"queries": 10, "products": 20}, **changes}


@pytest.fixture(scope="module")
def trained(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("guided")
    write_pairs(root / "pairs", negatives=2)
    return finetune_here(FinetuneBgeConfig.model_validate(settings_of(root / "pairs", root / "encoder", models)))


def vectors_of(trained: Artifact) -> GuideVectors:
    return open_guide_vectors(trained.path.parents[1].with_name("encoder-shards-guide"),
                              trained.manifest.parents["guide"].partition("/")[2])


def test_a_batch_gets_the_guides_own_vectors(trained: Artifact, models: tuple[Path, Path]) -> None:
    shards = open_pair_shards(trained.path.parents[1].with_name("encoder-shards"))
    found = vectors_of(trained).at(places := shards.places(np.array([40, 3, 63]), 1))
    rows = pair_rows(64, "train", 2)
    by_bucket = rows[0::2] + rows[1::2]
    wanted = [by_bucket[place] for place in (40, 3, 63)]
    guide = build_text_encoder(TextEncoderConfig(model=str(models[1]), device="cpu", dtype="float32"))
    assert torch.allclose(found.queries, torch.from_numpy(guide.encode_queries([row["query"] for row in wanted])),
                          atol=1e-3)
    texts = [row["text"] for row in wanted] + [row["negative_texts"][0] for row in wanted]
    assert torch.allclose(found.documents, torch.from_numpy(guide.encode_documents(texts)), atol=1e-3)
    assert shards.batch_at(places).negative_of.tolist() == [-1, -1, -1, 0, 1, 2]


@pytest.mark.parametrize("mini_batch", [None, 3])
def test_the_guided_loss_is_sentence_transformers(trained: Artifact, models: tuple[Path, Path],
                                                  mini_batch: int | None) -> None:
    """From the stored vectors on; the margin lies in a gap of the guide's scores, beyond their rounding."""
    from sentence_transformers import SentenceTransformer

    st = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    config = FinetuneBgeConfig.model_validate(settings_of(Path("pairs"), Path("out"), models))
    shards = open_pair_shards(trained.path.parents[1].with_name("encoder-shards"))
    places = shards.places(np.arange(0, 32, 3), 1)
    batch, guide = shards.batch_at(places), vectors_of(trained).at(places)
    scores = guide.queries @ guide.documents.T
    gaps = (scores.diagonal()[:, None] - scores).flatten().sort().values
    middle = gaps[len(gaps) // 4: 3 * len(gaps) // 4]
    widest = int((middle[1:] - middle[:-1]).argmax())
    assert float(middle[widest + 1] - middle[widest]) > 1e-4
    margin = float(middle[widest: widest + 2].mean())

    loss = ContrastiveConfig(guide_margin=margin, mini_batch=mini_batch, mask_same_product=False, mask_same_text=False)
    task = build_task(config, shards, shards, "cpu")
    task.model.eval()
    found = contrastive_loss(task.model, task.model, batch, loss, guide=guide)
    student, their_guide = (SentenceTransformer(str(one), device="cpu").eval() for one in models)
    settings = {"temperature": loss.temperature, "margin": margin, "contrast_anchors": False,
                "contrast_positives": False}
    theirs = (st.GISTEmbedLoss(student, their_guide, **settings) if mini_batch is None
              else st.CachedGISTEmbedLoss(student, their_guide, mini_batch_size=3, **settings))
    rows = pair_rows(64, "train", 2)[0::2][0:32:3]
    columns = [[row["query"] for row in rows], [row["text"] for row in rows],
               [row["negative_texts"][0] for row in rows]]
    wanted = theirs([dict(student.preprocess(column)) for column in columns], torch.zeros(len(rows)))
    assert found.loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert 0.1 < found.masked_share < 0.9
    plain = contrastive_loss(task.model, task.model, batch, loss.replace(guide_margin=None))
    assert abs(plain.loss - found.loss) > 1e-2


def test_its_vectors_are_computed_once(trained: Artifact, models: tuple[Path, Path]) -> None:
    root = trained.path.parents[2]
    assert open_artifact(root / "encoder-shards-guide", "guide_vectors").manifest.rows() == 64 + sum(
        len({text for row in pair_rows(64, "train", 2)[start::2] for text in (row["text"], *row["negative_texts"])})
        for start in range(2))
    other = finetune_here(FinetuneBgeConfig.model_validate(settings_of(
        root / "pairs", root / "other", models, shards=root / "encoder-shards", seed=3)))
    assert other.manifest.parents["guide"] == trained.manifest.parents["guide"]
    assert other.manifest.fingerprint != trained.manifest.fingerprint
    masked = [line["masked_share"] for line in read_curve(trained.file("metrics.jsonl")) if "loss" in line]
    unguided = finetune_here(FinetuneBgeConfig.model_validate(settings_of(
        root / "pairs", root / "plain", models, shards=root / "encoder-shards", guide=None, contrastive={})))
    plain = [line["masked_share"] for line in read_curve(unguided.file("metrics.jsonl")) if "loss" in line]
    assert all(one > other for one, other in zip(masked, plain, strict=True))


def test_a_guide_and_its_margin_belong_together(models: tuple[Path, Path]) -> None:
    for change in ({"guide": None}, {"contrastive": {}}):
        with pytest.raises(ValueError, match="give both or neither"):
            FinetuneBgeConfig.model_validate(settings_of(Path("p"), Path("o"), models, **change))


@pytest.mark.ray
def test_two_workers_in_chunks_learn_what_one_learns(trained: Artifact, models: tuple[Path, Path], tmp_path: Path,
                                                     local_ray: None) -> None:
    settings = settings_of(trained.path.parents[2] / "pairs", tmp_path / "encoder", models,
                           contrastive={"guide_margin": MARGIN, "mini_batch": 3},
                           workers={"count": 2, "cpus": 0.5, "threads": 1}, ray={"num_cpus": 4, "progress": False})
    found = finetune_bge(FinetuneBgeConfig.model_validate(settings))
    curves = [[(line["loss"], line["masked_share"]) for line in read_curve(one.file("metrics.jsonl")) if "loss" in line]
              for one in (found, trained)]
    assert np.allclose(*curves, rtol=1e-4)
