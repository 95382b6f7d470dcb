"""Fine-tuning of a cross-encoder on listed candidates: its configuration and its task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from recsys_ray.config import Config, fingerprint
from recsys_ray.evaluation.metrics import MetricSpec, RankedJudgments, score_all
from recsys_ray.models.cross_encoder import PairTokenizer, TrainableCrossEncoder, find_base, pair_tokens
from recsys_ray.models.sentence_layout import read_pair_layout
from recsys_ray.models.text_encoder import TextEncoderConfig, device_of, dtype_of
from recsys_ray.models.trainable_bert import TrainableOptions
from recsys_ray.runtime import RayConfig
from recsys_ray.training.bge import WorkersConfig
from recsys_ray.training.distributed import rank, sum_over_workers, world_size
from recsys_ray.training.loop import LoopConfig, Task
from recsys_ray.training.ranking_losses import LOSSES, LossName, in_rows
from recsys_ray.training.reranker_groups import Group, RerankerGroups, rows_of
from recsys_ray.training.sampler import BatchSampler, SamplerConfig

STAGE_VERSION = 1       # raise it when the same inputs would give another model
EVALUATED_AT_ONCE = 64  # lists

Places = npt.NDArray[np.int64]


class GroupBatches(Config):
    """Which lists make a step; a list is never divided."""

    batch_groups: int = Field(default=32, ge=1)         # lists of all workers together
    length_grouped: bool = True         # lists of like length together
    pass_tokens: int = Field(default=16_384, ge=1)      # tokens whose activations are held at once; same gradient


class RankingValidation(Config):
    """What is measured on the validation split, and which figure decides which weights are best."""

    queries: int = Field(default=1000, ge=1)            # drawn of those there are
    metrics: tuple[str, ...] = ("nDCG@10", "MAP")       # over each query's candidates
    objective: str = "nDCG@10"

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(MetricSpec.parse(name).name for name in names)

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.objective not in self.metrics:
            raise ValueError(f"objective: {self.objective!r} is not measured; there are {', '.join(self.metrics)}")
        return self


class FinetuneCrossEncoderConfig(LoopConfig):
    """Which model learns to rank from which lists, and how."""

    pairs: Path                             # artefact of make_reranker_pairs
    output: Path                            # artefact root of the cross-encoder
    model: str = "minilm"                   # a cross-encoder, or a body that is given a new head
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"   # of the products; weights are float32
    device: Literal["auto", "cpu"] = "auto"
    body: TrainableOptions = TrainableOptions()
    max_tokens: int = Field(default=256, ge=8)          # of query and text together
    max_chars: int = Field(default=20_000, ge=1)
    loss: LossName = "bce"
    sampler: GroupBatches = GroupBatches()
    validation: RankingValidation = RankingValidation()
    workers: WorkersConfig = WorkersConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        workers, lists = self.workers.count, self.sampler.batch_groups
        if workers > lists:
            raise ValueError(f"workers.count: {workers} workers for {lists} lists a step")
        return self

    def resolved(self) -> Self:
        """The same with absolute paths and one version of the model: workers start in other directories."""
        return self.replace(pairs=self.pairs.resolve(), output=self.output.resolve(), model=str(find_base(self.model)))

    def base_identity(self) -> dict[str, str]:
        """What it starts from."""
        layout = read_pair_layout(find_base(self.model))
        return {"weights_sha256": layout.weights_sha256(), "tokenizer_sha256": layout.tokenizer_sha256()}

    def key(self, pairs: str) -> str:
        """What the run is known by: everything that decides the trained weights; `pairs` is of the lists."""
        away = {"pairs", "output", "model", "workers", "ray", "trackers", "checkpoint_every"}
        return fingerprint({"stage": STAGE_VERSION, "pairs": pairs, "base": self.base_identity(),
                            "config": self.model_dump(mode="json", exclude=away)})


@dataclass
class CrossEncoderTask:
    """The model, the batches and their losses, on one worker."""

    config: FinetuneCrossEncoderConfig
    model: TrainableCrossEncoder
    train: RerankerGroups
    valid: RerankerGroups

    def __post_init__(self) -> None:
        """Draw the batches and the validation; wrap the model where there are several workers."""
        config, numbers = self.config, np.arange(len(self.train))
        batches = SamplerConfig(batch_size=config.sampler.batch_groups, length_grouped=config.sampler.length_grouped,
                                distinct_groups=False, distinct_queries=False)
        self.sampler = BatchSampler(batches, config.seed, self.train.lengths, numbers, numbers)
        self.judged = draw_lists(self.valid, config.validation.queries, config.seed)
        self.tokenise = PairTokenizer(self.model.layout, pair_tokens(config.max_tokens, self.model.layout),
                                      config.max_chars)
        self.wrapped: Any = self.model
        if world_size() > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False,
                                                               gradient_as_bucket_view=True)

    def task(self) -> Task:
        """What the loop runs."""
        several = {"no_sync": self.wrapped.no_sync} if world_size() > 1 else {}
        return Task(model=self.model, batches_per_epoch=self.sampler.steps_per_epoch, backward=self.backward,
                    evaluate=self.evaluate if self.judged else None, objective=self.config.validation.objective,
                    begin=self.begin, half=self.model.dtype == "float16", **several)

    def begin(self, number: int) -> None:
        """Give the batch its dropout."""
        self.model.dropout_seed = (self.config.seed << 32) + number

    def backward(self, number: int, scale: float) -> Mapping[str, float]:
        """Add this worker's gradients of a batch, some lists at a time; returns the figures of the whole batch.

        The loss is the mean over the lists of all workers, whatever their sizes.
        """
        groups = self.train.groups(self.sampler.share(number, rank(), world_size()))
        ids, second = self.tokenise(*rows_of(groups))
        share = scale * world_size() / self.config.sampler.batch_groups     # gradients are averaged over workers
        sums = torch.zeros(2, dtype=torch.float64)
        passes = list(_passes(groups, [len(one) for one in ids], self.config.sampler.pass_tokens))
        for turn, (some, rows) in enumerate(passes):
            with nullcontext() if turn == len(passes) - 1 or world_size() == 1 else self.wrapped.no_sync():
                scores_GL, labels_GL, real_GL = _listed(self.wrapped(ids[rows], second[rows]), some)
                loss_G = LOSSES[self.config.loss](scores_GL, labels_GL, real_GL)
                (loss_G.sum() * share).backward()  # type: ignore[no-untyped-call]
            best_G = scores_GL.detach().masked_fill(~real_GL, -torch.inf).argmax(dim=1, keepdim=True)
            first_G = labels_GL.gather(1, best_G)[:, 0] >= labels_GL.masked_fill(~real_GL, -torch.inf).amax(dim=1)
            sums += torch.stack([loss_G.detach().sum(), first_G.sum()]).cpu().double()
        loss, first = sum_over_workers(sums.to(self.model.device)).tolist()
        lists = self.config.sampler.batch_groups
        return {"loss": loss / lists, "accuracy": first / lists, "tokens": float(sum(map(len, ids)))}

    @torch.no_grad()
    def evaluate(self) -> Mapping[str, float]:
        """The figures of the validation lists with the weights as they are."""
        scores = []
        for start in range(0, len(self.judged), EVALUATED_AT_ONCE):
            ids, second = self.tokenise(*rows_of(self.judged[start:start + EVALUATED_AT_ONCE]))
            scores.append(self.model(ids, second).float().cpu().numpy())
        names = [one.query_id for one in self.judged for _ in one.texts]
        labels = np.array([label for one in self.judged for label in one.labels])
        return list_figures(names, labels, np.concatenate(scores), self.config.validation.metrics)


def build_task(config: FinetuneCrossEncoderConfig, train: RerankerGroups, valid: RerankerGroups) -> CrossEncoderTask:
    """The task on this worker; a new head is drawn from the run's seed, so every worker has the same."""
    running = TextEncoderConfig(device="cuda" if config.workers.gpus else config.device, dtype=config.dtype)
    device = device_of(running)
    torch.manual_seed(config.seed)
    model = TrainableCrossEncoder.load(config.model, config.body, dtype_of(running, device), device)
    return CrossEncoderTask(config, model, train, valid)


def draw_lists(valid: RerankerGroups, queries: int, seed: int) -> list[Group]:
    """All lists of at most `queries` query ids, in their order."""
    groups = valid.groups(range(len(valid)))
    names = sorted({one.query_id for one in groups})
    chosen = {names[place] for place in np.random.default_rng([seed, 1]).permutation(len(names))[:queries]}
    return [one for one in groups if one.query_id in chosen]


def _passes(groups: Sequence[Group], lengths: Sequence[int], budget: int) -> Iterator[tuple[list[Group], slice]]:
    """(lists, their rows) that go through the model together: whole lists of at most `budget` tokens."""
    some, start, end, tokens = list[Group](), 0, 0, 0
    for group in groups:
        added = sum(lengths[end:end + len(group.texts)])
        if some and tokens + added > budget:
            yield some, slice(start, end)
            some, start, tokens = [], end, 0
        some.append(group)
        end, tokens = end + len(group.texts), tokens + added
    yield some, slice(start, end)


def _listed(scores_N: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, labels and what is real of lists end to end, (G, L) each."""
    sizes = [len(one.texts) for one in groups]
    labels_N = torch.tensor([label for one in groups for label in one.labels], device=scores_N.device)
    real_N = torch.ones(len(labels_N), dtype=torch.bool, device=scores_N.device)
    return in_rows(scores_N, sizes), in_rows(labels_N, sizes), in_rows(real_N, sizes)


def list_figures(query_ids: Sequence[str], labels: npt.NDArray[Any], scores: npt.NDArray[Any], metrics: Sequence[str]
                 ) -> dict[str, float]:
    """Means over queries of metrics of N scored candidates; of equal scores the worse label stands first."""
    names = sorted(set(query_ids))
    query: Places = np.searchsorted(names, query_ids).astype(np.int64)
    order = np.lexsort((labels, -scores, query))
    counts = np.bincount(query, minlength=len(names)).astype(np.int64)
    rank_in_query = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    ranked = RankedJudgments(tuple(names), query[order], labels[order].astype(np.float64),
                             rank_in_query.astype(np.int64), counts)
    found = score_all(ranked, [MetricSpec.parse(name) for name in metrics])
    return {name: float(np.nanmean(found[:, column])) for column, name in enumerate(metrics)}
