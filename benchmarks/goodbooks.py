"""Books for readers: what each recommender and reranker is worth under three kinds of negatives, and in a full ranking.

    python benchmarks/goodbooks.py --config configs/bench_goodbooks/full.yaml

Users are split; three liked books of each are hidden among the books whose ratings are complete. Popularity,
ItemKNN, EASE, the sequence model and the cross-encoders learn from training users, the settings and the blend from
validation users, and every figure is of test users. Each training and each score matrix is kept: a rerun makes what
is missing.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

sys.path.insert(0, str(Path(__file__).resolve().parent))
from goodbooks_blend import Blend, BlendConfig, Features, features, fit_blend
from goodbooks_plot import plot_curves
from goodbooks_scores import (
    POSITIVE,
    Books,
    Floats,
    Ints,
    Panel,
    bi_encoder_scores,
    bm25_scores,
    cached,
    collaborative,
    read_books,
    read_panel,
    standardised,
)

from recsys_ray.artifacts import Artifact, find_artifact, stage
from recsys_ray.config import Config, fingerprint, main
from recsys_ray.data.reranker_data import MakeRerankerPairsConfig, make_reranker_pairs
from recsys_ray.data.reranker_pairs import POLICIES
from recsys_ray.evaluation.ranking import RANDOM, Measured, ScoredPairs, measure, measure_whole, whole_ranking
from recsys_ray.evaluation.results import write_result
from recsys_ray.evaluation.significance import Resampling
from recsys_ray.models.cross_encoder import CrossEncoder, CrossEncoderConfig
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.ranking.histories import Histories, RerankerHistories, read_histories
from recsys_ray.ranking.train_recommenders import TrainRecommendersConfig, train_recommenders
from recsys_ray.training.cross_encoder import FinetuneCrossEncoderConfig
from recsys_ray.training.cross_encoder_run import finetune_cross_encoder
from recsys_ray.training.sequence import FinetuneSequenceConfig, finetune_sequence
from recsys_ray.training.trackers import read_curve

log = logging.getLogger(__name__)

BASELINES = ("popularity", "item_knn", "ease", "item_knn_standardised", "ease_standardised", "bm25", "bi_encoder")
BLEND, WHOLE = "blend", "full"
FIRST_STAGE = "ease"        # whose head the cross-encoders reorder in the full ranking
RECOMMENDERS = ("popularity", "item_knn", "ease", "sequence")   # whose heads the blend orders there


class RerankerRow(Config):
    """One cross-encoder: which negatives it learns from, of how many users, and how."""

    negatives: dict[str, int]
    users: int = Field(ge=1)            # 3 positives and 9 negatives each
    finetune: dict[str, Any] = Field(default_factory=dict)


class JobConfig(Config):
    """Data, sizes and systems."""

    pairs: dict[str, Any]                           # keys of MakeRerankerPairsConfig, without negatives and output
    work: Path = Path("runs/bench_goodbooks")
    result: Path = Path("benchmarks/results/goodbooks.json")
    plot: Path = Path("docs/goodbooks_curves.png")
    valid_users: int = Field(default=2400, ge=10)   # fit the blend of the full ranking
    test_users: int = Field(default=1200, ge=10)    # make the figures of the full ranking
    sampled_users: int = Field(default=400, ge=10)  # the first of each, who also get sampled negatives
    recommenders: dict[str, Any] = Field(default_factory=dict)      # keys of TrainRecommendersConfig
    sequence: dict[str, Any] = Field(default_factory=dict)          # keys of FinetuneSequenceConfig
    encoder: TextEncoderConfig = TextEncoderConfig(device="cpu", max_tokens=128)
    cross_encoders: dict[str, RerankerRow] = Field(default_factory=dict)
    blended: tuple[str, ...] = ()                   # those the blend reads, which also take part in the full ranking
    cpu_seconds: float = Field(default=600, gt=0)   # of each cross-encoder's training, at most
    losses: tuple[str, ...] = ()    # tried on the first of `blended`; what validation users prefer trains every row
    loss_cpu_seconds: float = Field(default=200, gt=0)              # of each of these trainings, at most
    finetune: dict[str, Any] = Field(default_factory=dict)          # of every cross-encoder
    max_tokens: int = Field(default=160, ge=8)      # of context and book together
    depth: int = Field(default=20, ge=1)            # books of the first stage that cross-encoders reorder
    blended_depth: int = Field(default=100, ge=1)   # books of each recommender that the blend orders in that ranking
    blend: BlendConfig = BlendConfig()
    samples: int = Field(default=2000, ge=100)
    seed: int = 7

    @model_validator(mode="after")
    def _known(self) -> Self:
        if unknown := set(self.blended) - set(self.cross_encoders):
            raise ValueError(f"blended: {sorted(unknown)} are none of cross_encoders: {', '.join(self.cross_encoders)}")
        if self.losses and not self.blended:
            raise ValueError("losses: are tried on the first of `blended`, which is empty")
        return self


def run(config: JobConfig) -> Path:
    """Make what is missing, measure, and write the result file."""
    first = _pairs(config, "first", {"uniform": 3})
    histories, _ = read_histories(RerankerHistories(path=first.path.parents[1]))
    recommenders = train_recommenders(TrainRecommendersConfig.model_validate({
        "candidates": ["item_knn", "ease"], **config.recommenders,
        "histories": {"format": "reranker_pairs", "path": first.path.parents[1]},
        "output": config.work / "recommenders"}))
    lists = str(recommenders.path / "candidates" / "*.parquet")
    sequence = _sequence(config, first, histories)
    judged = _pairs(config, "judged", dict.fromkeys(POLICIES, 3), lists, train=1)
    books = read_books(judged, histories)
    panels = {split: read_panel(judged, split, histories, books, most)
              for split, most in (("valid", config.valid_users), ("test", config.test_users))}
    scores = {split: _scores(config, split, panel, books, recommenders, sequence) for split, panel in panels.items()}
    tried = {loss: _cross_encoder(config, config.blended[0], lists, loss) for loss in config.losses}
    config = config.replace(finetune={**config.finetune, **_best_loss(tried)})
    rerankers = {name: _cross_encoder(config, name, lists) for name in config.cross_encoders}
    reranked = {split: {name: _reranked(config, split, name, one, panel, books, scores[split])
                        for name, one in rerankers.items() if split == "test" or name in config.blended}
                for split, panel in panels.items()}
    return _write(config, panels, scores, reranked, {
        "recommenders": recommenders.manifest.facts, "sequence": sequence.manifest.facts,
        "losses": [{"name": name, **_cost(one)} for name, one in tried.items()],
        "cross_encoders": [{"name": name, **_cost(one)} for name, one in rerankers.items()],
        "pairs": judged.manifest.facts})


# --- what is trained ------------------------------------------------------------------------------
def _pairs(config: JobConfig, name: str, negatives: Mapping[str, int], lists: str | None = None,
           train: int | None = None) -> Artifact:
    most = {**config.pairs.get("max_users", {}), **({"train": train} if train else {})}
    return make_reranker_pairs(MakeRerankerPairsConfig.model_validate({
        **config.pairs, "negatives": dict(negatives), "candidates": [lists] if lists else [], "max_users": most,
        "output": config.work / "pairs" / name, "seed": config.seed}))


def _sequence(config: JobConfig, pairs: Artifact, histories: Histories) -> Artifact:
    embeddings = _embeddings(config, pairs, histories)
    return finetune_sequence(FinetuneSequenceConfig.model_validate({
        **config.sequence, "histories": {"format": "reranker_pairs", "path": pairs.path.parents[1]},
        "embeddings": embeddings.path.parents[1], "output": config.work / "sequence", "seed": config.seed}))


def _embeddings(config: JobConfig, pairs: Artifact, histories: Histories) -> Artifact:
    """The item texts of the pairs as an `embeddings` artefact."""
    output, key = config.work / "embeddings", fingerprint([pairs.manifest.fingerprint, config.encoder.digest()])
    if (done := find_artifact(output, "embeddings", key)) is not None:
        return done
    model = build_text_encoder(config.encoder)
    vectors = model.encode_documents(pairs.table("items.parquet", ["text"])["text"].to_pylist())
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), model.dimension)
    with stage(output, "embeddings", key) as staging:
        entry = staging.write_table("vectors/bucket-00000.parquet", pa.table({
            "product_id": pa.array(histories.items), "vector": column}))
        return staging.commit([entry], config=config, parents={"pairs": pairs.manifest},
                              facts={"encoder": model.identity})


def _cross_encoder(config: JobConfig, name: str, lists: str, tried_loss: str | None = None) -> Artifact:
    """The cross-encoder of a row, or a shorter training of it with a loss that is tried."""
    row = config.cross_encoders[name]
    pairs = _pairs(config, name, row.negatives, lists if row.negatives.get("mined") else None, row.users)
    training = {"max_cpu_seconds": config.cpu_seconds, "max_tokens": config.max_tokens, **config.finetune,
                **row.finetune}
    if tried_loss is not None:
        training |= {"max_cpu_seconds": config.loss_cpu_seconds, "loss": tried_loss}
    return finetune_cross_encoder(FinetuneCrossEncoderConfig.model_validate({
        **training, "pairs": pairs.path.parents[1], "seed": config.seed,
        "output": config.work / ("cross_encoders" if tried_loss is None else "losses") / (tried_loss or name)}))


def _best_loss(tried: Mapping[str, Artifact]) -> dict[str, str]:
    """The loss that validation users prefer, as a key of `finetune`; nothing where none was tried."""
    values = {loss: one.manifest.facts["best_value"] for loss, one in tried.items()}
    if any(value is None for value in values.values()):
        raise ValueError(f"losses: {values}: without an evaluation there is nothing to choose by; raise "
                         "loss_cpu_seconds or lower finetune.evaluate_every")
    return {"loss": max(values, key=lambda loss: values[loss])} if values else {}


def _cost(artifact: Artifact) -> dict[str, Any]:
    """What a cross-encoder took, and its learning curve."""
    facts = artifact.manifest.facts
    objective = facts["objective"]
    curve = [{"step": line["step"], objective: line[objective]} for line in read_curve(artifact.file("metrics.jsonl"))
             if objective in line]
    names = ("loss", "steps", "best_step", "best_value", "pairs", "lists", "tokens", "cpu_seconds", "learning_rate")
    pairs_per_step = artifact.manifest.config["sampler"]["batch_groups"] * facts["pairs"]["train"] // facts["lists"]
    return {**{name: facts[name] for name in names}, "pairs_per_step": pairs_per_step,
            "cpu_hours": facts["cpu_seconds"] / 3600, "curve": curve}


# --- scores ---------------------------------------------------------------------------------------
def _scores(config: JobConfig, split: str, panel: Panel, books: Books, recommenders: Artifact, sequence: Artifact
            ) -> dict[str, Floats]:
    text = cached(config.work / "scores" / f"text-{split}", [panel.contexts, books.texts, config.encoder.digest()],
                  lambda: {"bm25": bm25_scores(panel.contexts, books.texts),
                           "bi_encoder": bi_encoder_scores(config.encoder, panel.contexts, books.texts)})
    return {**collaborative(recommenders, sequence, panel, books), **text}


def _reranked(config: JobConfig, split: str, name: str, artifact: Artifact, panel: Panel, books: Books,
              scores: Mapping[str, Floats]) -> Floats:
    """(U, E): a cross-encoder's scores of the rows under every policy and of the first stage's head, else NaN."""
    user, book = panel.first(config.sampled_users).union()
    wanted = np.zeros(panel.allowed.shape, dtype=bool)
    wanted[user, book] = True
    if name in config.blended:
        wanted |= _head(panel, scores[FIRST_STAGE], config.depth)
    key = [artifact.manifest.fingerprint, panel.contexts, books.texts, fingerprint(np.argwhere(wanted).tolist()),
           config.max_tokens]

    def make() -> dict[str, npt.NDArray[Any]]:
        rows = np.argwhere(wanted)
        model = CrossEncoder(CrossEncoderConfig(model=str(artifact.path / "cross_encoder"), device="cpu",
                                                max_tokens=config.max_tokens))
        log.info("%s: %d pairs of %s", name, len(rows), split)
        found = np.full(wanted.shape, np.nan, np.float32)
        found[rows[:, 0], rows[:, 1]] = model.score([panel.contexts[one] for one in rows[:, 0]],
                                                    [books.texts[one] for one in rows[:, 1]])
        return {"scores": found}

    return cached(config.work / "scores" / f"{name}-{split}", key, make)["scores"]


# --- figures --------------------------------------------------------------------------------------
def _write(config: JobConfig, panels: Mapping[str, Panel], scores: Mapping[str, Mapping[str, Floats]],
           reranked: Mapping[str, Mapping[str, Floats]], facts: Mapping[str, Any]) -> Path:
    tables: dict[str, Any] = {"setting": config.model_dump(mode="json"), "trained": dict(facts),
                              "users": {split: {WHOLE: len(panel), "sampled": len(panel.first(config.sampled_users))}
                                        for split, panel in panels.items()}}
    read = {split: {name: reranked[split][name] for name in config.blended} for split in panels}
    found = {split: features(panel, scores[split], read[split]) for split, panel in panels.items()}
    few = {split: panel.first(config.sampled_users) for split, panel in panels.items()}
    measured: dict[str, Measured] = {}
    for policy in POLICIES:
        blend = fit_blend(found["valid"], *few["valid"].pairs(policy), config.blend)
        systems = {**scores["test"], **_standardised(panels["test"], scores["test"]), **reranked["test"]}
        measured[policy] = _under(config, few["test"], policy, systems, found["test"], blend)
        tables[policy] = _table(measured[policy], blend, "ROC AUC")
    heads = {split: _heads(config, panel, scores[split], read[split]) for split, panel in panels.items()}
    found = {split: features(panel, scores[split], heads[split]) for split, panel in panels.items()}
    blend = _whole_blend(config, panels["valid"], scores["valid"], found["valid"])
    measured[WHOLE] = _whole(config, panels["test"], scores["test"], heads["test"], found["test"], blend)
    tables[WHOLE] = _table(measured[WHOLE], blend, "nDCG@10")
    command = f"python benchmarks/goodbooks.py {shlex.join(sys.argv[1:])}"
    written = write_result(config.result, command=command, headline=_headline(measured), tables=tables,
                           seeds=[config.seed])
    plot_curves(facts["cross_encoders"], config.plot)   # after it: a picture that changed makes the commit look dirty
    return written


def _under(config: JobConfig, panel: Panel, policy: str, systems: Mapping[str, Floats], found: Features, blend: Blend
           ) -> Measured:
    """Every system on the rows of one policy."""
    user, book, label = panel.pairs(policy)
    lot = np.random.default_rng(config.seed).permutation(len(user))
    columns = {RANDOM: lot.astype(np.float64),
               **{name: one[user, book].astype(np.float64) for name, one in systems.items()},
               BLEND: blend.score(found, user, book)}
    return measure(ScoredPairs(panel.users, user, label, columns, lot), _resampling(config))


def _heads(config: JobConfig, panel: Panel, scores: Mapping[str, Floats], reranked: Mapping[str, Floats]
           ) -> dict[str, Floats]:
    """The cross-encoders' scores of the first stage's head alone: which other books they read tells the labels."""
    head = _head(panel, scores[FIRST_STAGE], config.depth)
    return {name: np.where(head, one, np.nan).astype(np.float32) for name, one in reranked.items()}


def _head(panel: Panel, scores: Floats, depth: int) -> npt.NDArray[np.bool_]:
    """(U, E): the `depth` best books of each user that may be shown."""
    order = np.argsort(-np.where(panel.allowed, scores, -np.inf), axis=1, kind="stable")
    head = np.zeros(panel.allowed.shape, dtype=bool)
    head[np.arange(len(panel))[:, None], order[:, :depth]] = True
    return head & panel.allowed


def _candidates(config: JobConfig, panel: Panel, scores: Mapping[str, Floats]) -> tuple[Ints, Ints]:
    """(user, book) of what the blend orders in the full ranking: the heads of all recommenders."""
    heads = [_head(panel, scores[name], config.blended_depth) for name in RECOMMENDERS]
    user, book = np.nonzero(np.logical_or.reduce(heads))
    return user, book


def _whole_blend(config: JobConfig, panel: Panel, scores: Mapping[str, Floats], found: Features) -> Blend:
    """The blend fitted to full rankings."""
    relevant = np.zeros(panel.allowed.shape, dtype=np.int64)
    for row, books in enumerate(panel.rows[POSITIVE]):
        relevant[row, books] = 1
    user, book = _candidates(config, panel, scores)
    return fit_blend(found, user, book, relevant[user, book], config.blend)


def _whole(config: JobConfig, panel: Panel, scores: Mapping[str, Floats], heads: Mapping[str, Floats],
           found: Features, blend: Blend) -> Measured:
    """Every system over all books that may be shown; below what a system reordered, the first stage goes on."""
    first = scores[FIRST_STAGE].astype(np.float64)
    below = first - first.max() - 1
    systems: dict[str, npt.NDArray[Any]] = {
        RANDOM: np.random.default_rng(config.seed).random(panel.allowed.shape), **scores}
    for name, one in heads.items():
        systems[name] = np.where(np.isnan(one), below, 1 / (1 + np.exp(-one.astype(np.float64))))
    user, book = _candidates(config, panel, scores)
    blended = blend.score(found, user, book)
    systems[BLEND] = below + blended.min()
    systems[BLEND][user, book] = blended
    relevant = [books.tolist() for books in panel.rows[POSITIVE]]
    return measure_whole({name: whole_ranking(panel.users, one, relevant, panel.allowed, config.seed)
                          for name, one in systems.items()}, _resampling(config))


def _standardised(panel: Panel, scores: Mapping[str, Floats]) -> dict[str, Floats]:
    """Pooled figures compare scores of different users: the same systems with each user's scores on one scale."""
    return {f"{name}_standardised": standardised(scores[name], panel.allowed)
            for name in ("item_knn", "ease", "sequence")}


def _resampling(config: JobConfig) -> Resampling:
    return Resampling(samples=config.samples, seed=config.seed)


def _baselines(found: Measured) -> list[str]:
    return [name for name in BASELINES if name in found.values]


def _table(found: Measured, blend: Blend, metric: str) -> dict[str, Any]:
    """All figures of one set of candidates, and the blend and every other system of ours against each baseline."""
    ours = [name for name in found.values if name not in (*BASELINES, RANDOM)]
    return {"decided_by": metric, "systems": found.rows(), "blend": blend.facts,
            "best_baseline": found.best(_baselines(found), metric),
            "differences": {name: {baseline: found.compare(name, baseline)[metric] for baseline in _baselines(found)}
                            for name in ours}}


def _headline(measured: Mapping[str, Measured]) -> dict[str, float]:
    uniform, matched, whole = measured["uniform"], measured["popularity_matched"], measured[WHOLE]
    best_matched = matched.best(_baselines(matched), "ROC AUC")
    best_whole = whole.best(_baselines(whole), "nDCG@10")
    figures = {
        "uniform_auc": uniform.mean(BLEND, "ROC AUC"), "uniform_ap": uniform.mean(BLEND, "AP"),
        "uniform_map": uniform.mean(BLEND, "MAP"), "uniform_ndcg10": uniform.mean(BLEND, "nDCG@10"),
        "uniform_gain_ci_low": uniform.compare(BLEND, uniform.best(_baselines(uniform), "ROC AUC"))["ROC AUC"]["low"],
        "popmatched_auc": matched.mean(BLEND, "ROC AUC"),
        "popmatched_best_baseline_auc": matched.mean(best_matched, "ROC AUC"),
        "popmatched_gain_ci_low": matched.compare(BLEND, best_matched)["ROC AUC"]["low"],
        "full_ndcg10": whole.mean(BLEND, "nDCG@10"), "full_best_baseline_ndcg10": whole.mean(best_whole, "nDCG@10"),
        "full_gain_ci_low": whole.compare(BLEND, best_whole)["nDCG@10"]["low"],
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
