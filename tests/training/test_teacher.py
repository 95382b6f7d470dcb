"""A teacher's scores stay beside their documents, and only a better one is let in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from small_pairs import pair_rows, table, write_pairs

from recsys_ray.artifacts import Artifact, open_artifact, stage
from recsys_ray.config import Config
from recsys_ray.data.pairs import PairError
from recsys_ray.models.cross_encoder import CrossEncoderConfig
from recsys_ray.models.pair_scorer import PairScorerConfig, build_pair_scorer
from recsys_ray.models.registry import build_cross_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.training import teacher
from recsys_ray.training.bge import FinetuneBgeConfig
from recsys_ray.training.launch import finetune_here
from recsys_ray.training.losses import TeacherError
from recsys_ray.training.pair_passes import score_pairs
from recsys_ray.training.pair_shards import PairTokenizer, ShardSettings, open_pair_shards, write_shard
from recsys_ray.training.teacher import ScorePairsConfig, draw_questions, with_scores
from recsys_ray.training.trackers import read_curve

TinyModel = Callable[..., Path]


class Letters:
    """How many letters of the query the text begins with; `blur` of them at random."""

    def __init__(self, blur: float = 0.0) -> None:
        self.random, self.blur = np.random.default_rng(0), blur

    def score(self, queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        found = [float(query[:4] == text[:4]) for query, text in zip(queries, texts, strict=True)]
        return np.array(found, np.float32) + self.blur * self.random.random(len(found)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tiny_text_model: TinyModel) -> Path:
    return tiny_text_model()


@pytest.fixture
def config(tmp_path: Path, model: Path) -> ScorePairsConfig:
    write_pairs(tmp_path / "pairs", train=40, valid=80, negatives=2)
    return ScorePairsConfig.model_validate({
        "pairs": tmp_path / "pairs", "output": tmp_path / "scored", "candidates": 10, "workers": 0,
        "teacher": {"encoder": {"model": str(model), "device": "cpu", "dtype": "float32"}},
        "student": {"model": str(model), "device": "cpu", "dtype": "float32"}})


def test_scores_lie_beside_their_documents_through_shards_and_batches(tmp_path: Path, model: Path) -> None:
    rows = pair_rows(9, negatives=2)
    rows[4] |= {"negative_row_ids": [], "negative_texts": [], "negative_group_ids": []}

    class Lengths:
        def score(self, queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:
            return np.array([len(query) + len(text) / 100 for query, text in zip(queries, texts, strict=True)],
                            np.float32)

    found = with_scores(table(rows), Lengths())
    settings = ShardSettings(TextEncoderConfig(model=str(model), device="cpu").model_dump(mode="json"), 16, 16)
    with stage(tmp_path, "pair_shards", "one") as staging:
        entries = write_shard(found, PairTokenizer(settings), staging.path, "train/bucket-00000")
        staging.commit(entries, config=Config(), facts={"settings": {}})
    shards = open_pair_shards(tmp_path)
    chosen = [7, 4, 0]
    places = shards.places(np.array(chosen), 1)
    given = shards.teacher_scores(places)
    wanted = np.full((3, 5), np.nan, np.float32)
    for query, place in enumerate(chosen):
        wanted[query, query] = len(rows[place]["query"]) + len(rows[place]["text"]) / 100
    for column, (query, place) in enumerate(((0, 7), (2, 0)), start=3):
        wanted[query, column] = len(rows[place]["query"]) + len(rows[place]["negative_texts"][0]) / 100
    np.testing.assert_allclose(given, wanted, rtol=1e-6)


def test_the_questions_are_fair(config: ScorePairsConfig) -> None:
    pairs = open_artifact(config.pairs, "pairs")
    asked = draw_questions(pairs, 30, 10, 1)
    assert asked == draw_questions(pairs, 30, 10, 1)
    assert [len(texts) for texts in asked.texts] == [10] * 30
    rows = {row["query"]: row for row in pair_rows(80, "valid", 2)}
    for query, texts in zip(asked.queries, asked.texts, strict=True):
        assert texts[0] == rows[query]["text"]
        assert texts[0] not in texts[1:]
    assert asked.reciprocal_ranks(Letters()).mean() == 1
    with pytest.raises(TeacherError, match="lower candidates"):
        draw_questions(pairs, 30, 200, 1)


def test_a_teacher_that_is_not_better_is_refused_with_the_figures(config: ScorePairsConfig,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Itself, a worse one and a better one; told otherwise, any."""
    with pytest.raises(TeacherError, match=r"not measurably better.*teacher 0\.\d+, student 0\.\d+\).*force"):
        score_pairs(config)
    assert not (config.output / "CURRENT").exists()

    def build(given: PairScorerConfig) -> Any:
        return scorers.pop(0)

    monkeypatch.setattr(teacher, "build_pair_scorer", build)
    pairs = open_artifact(config.pairs, "pairs")
    scorers = [Letters(blur=3.0), Letters()]
    with pytest.raises(TeacherError, match="worse"):
        teacher.compared(config, pairs)
    scorers = [Letters(blur=3.0), Letters()]
    assert teacher.compared(config.replace(force=True), pairs)["forced"]
    scorers = [Letters(), Letters(blur=3.0)]
    facts = teacher.compared(config, pairs)
    assert not facts["forced"]
    assert 0 < facts["difference"][1] <= facts["difference"][0] == pytest.approx(1 - facts["student_mrr"])


def scored_by(config: ScorePairsConfig) -> Artifact:
    return score_pairs(config.replace(force=True))


def test_a_training_learns_from_the_scores(config: ScorePairsConfig, model: Path, tiny_text_model: TinyModel,
                                           tmp_path: Path) -> None:
    """The student that is the teacher has nothing to learn from it, another one has; without scores none can."""
    artifact = scored_by(config)
    assert artifact.manifest.facts["copied_token_gap"] == 0.05
    assert scored_by(config).manifest.version == artifact.manifest.version
    rows = artifact.table("pairs/train/bucket-00000.parquet")
    scorer = build_pair_scorer(config.teacher)
    texts = [texts[1] for texts in rows["negative_texts"].to_pylist()]
    np.testing.assert_allclose([one[1] for one in rows["teacher_negatives"].to_pylist()],
                               scorer.score(rows["query"].to_pylist(), texts), atol=1e-5)

    def losses(pairs: Path, student: Path, name: str, **distillation: Any) -> list[float]:
        settings = {"pairs": pairs, "output": tmp_path / name, "query_tokens": 64, "document_tokens": 64,
                    "encoder": {"model": str(student), "device": "cpu", "dtype": "float32"}, "max_steps": 2,
                    "sampler": {"batch_size": 8}, "body": {"dropout": 0.0}, "shards": tmp_path / f"{pairs.name}-shards",
                    "contrastive": {"distillation": distillation or None, "mini_batch": 4}}
        found = finetune_here(FinetuneBgeConfig.model_validate(settings))
        return [line["loss"] for line in read_curve(found.file("metrics.jsonl")) if "loss" in line]

    plain = losses(config.pairs, model, "plain")
    taught = losses(config.output, model, "taught", kind="margin_mse", weight=1e4)
    assert taught[0] == pytest.approx(plain[0], rel=1e-3)
    other = tiny_text_model(seed=4)
    plain = losses(config.pairs, other, "other-plain")
    for kind in ("margin_mse", "kl"):
        assert losses(config.output, other, f"other-{kind}", kind=kind, weight=1e4)[0] > plain[0] + 1e-3
    with pytest.raises(TeacherError, match="score_pairs"):
        losses(config.pairs, model, "none", kind="kl")


def test_a_cross_encoder_can_be_the_teacher(config: ScorePairsConfig, tiny_pair_model: TinyModel) -> None:
    settings = {"model": str(tiny_pair_model("bert")), "device": "cpu", "dtype": "float32"}
    chosen = PairScorerConfig.model_validate({"cross_encoder": settings})
    artifact = scored_by(config.replace(teacher=chosen.model_dump()))
    assert artifact.manifest.facts["teacher"]["identity"]["kind"] == "cross_encoder"
    rows = artifact.table("pairs/train/bucket-00001.parquet")
    wanted = build_cross_encoder(CrossEncoderConfig.model_validate(settings)).score(
        rows["query"].to_pylist(), rows["text"].to_pylist())
    np.testing.assert_allclose(rows["teacher_positive"].to_numpy(), wanted, atol=1e-5)


def test_a_teacher_judged_against_another_student_is_refused(model: Path, tiny_text_model: TinyModel) -> None:
    encoder = TextEncoderConfig(model=str(model), device="cpu")
    facts = {"teacher": {"forced": False, "student": teacher.encoder_identity(encoder)}}
    teacher.require_its_student(facts, encoder, Path("pairs"))
    other = encoder.replace(model=str(tiny_text_model(seed=2)))
    with pytest.raises(TeacherError, match="better than another encoder"):
        teacher.require_its_student(facts, other, Path("pairs"))
    teacher.require_its_student({"teacher": {**facts["teacher"], "forced": True}}, other, Path("pairs"))


def test_a_teacher_is_one_model_and_pairs_need_negatives(config: ScorePairsConfig, tmp_path: Path) -> None:
    for both in ({}, {"encoder": {}, "cross_encoder": {"model": "x"}}):
        with pytest.raises(ValueError, match="give one of the two"):
            PairScorerConfig.model_validate(both)
    write_pairs(tmp_path / "bare")
    with pytest.raises(PairError, match="mine negatives first"):
        score_pairs(config.replace(pairs=tmp_path / "bare"))


def test_scores_that_are_no_numbers_are_refused() -> None:
    class Broken:
        def score(self, queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:
            return np.full(len(queries), np.nan, np.float32)

    with pytest.raises(TeacherError, match="is nan"):
        with_scores(table(pair_rows(2)), Broken())
    assert with_scores(table([]), Broken()).num_rows == 0
    assert isinstance(with_scores(table([]), Broken()), pa.Table)
