"""Fine-tuning of BT-BERT on labelled products: its configuration and its task.

Every product is paired with every concern that something is known of, so one product is as many examples. A model
that is already a BT-BERT learns further concerns: its own come back as a share `replay` of their pairs, without
which it forgets them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys_ray.config import Config, ConfigError, fingerprint
from recsys_ray.models.bt_bert import CARD, KIND, BtBert, BtBertCard, Concern, Mode, read_card
from recsys_ray.models.bt_bert_input import Layout, ProductTokens, Tokens
from recsys_ray.models.cross_encoder import batches
from recsys_ray.models.sentence_layout import find_model, read_pair_layout
from recsys_ray.models.text_encoder import TextEncoderConfig, device_of, dtype_of
from recsys_ray.models.trainable_bert import TrainableOptions
from recsys_ray.runtime import RayConfig
from recsys_ray.training.bge import WorkersConfig
from recsys_ray.training.concern_pairs import ConcernPairs, LabelSource
from recsys_ray.training.distributed import rank, sum_over_workers, world_size
from recsys_ray.training.loop import LoopConfig, Task
from recsys_ray.training.optim import OptimConfig
from recsys_ray.training.sampler import BatchSampler, SamplerConfig

log = logging.getLogger(__name__)

STAGE_VERSION = 3       # raise it when the same inputs would give another model
STARTED_ON = 256        # inputs on which the mean prediction is set to the prior, before training and after
EVALUATED_TOKENS = 8192
OBJECTIVE = "macro_ap"
TOKENS = "encoder.body.embeddings.word_embeddings."     # how the name of the token embeddings begins

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class ConcernBatches(Config):
    """Which pairs make a step."""

    # pairs of all workers together; products where an input is a whole product: layout `shared`, mode `explicit`
    batch_size: int = Field(default=8, ge=1)
    length_grouped: bool = True


class FinetuneBtBertConfig(LoopConfig):
    """Which model learns which concerns from which labels, and how."""

    labels: LabelSource
    output: Path                            # artefact root of the model
    model: str = "minilm"                   # a BERT-family body, or a BT-BERT that is to learn more
    concerns: tuple[str, ...] | None = None     # of the labels'; None: all
    replay: float = Field(default=1.0, ge=0, le=1)      # of a BT-BERT's own concerns: share of their pairs
    mode: Mode = "presoftmax"
    layout: Layout = "paper"
    max_tokens: int = Field(default=512, ge=16)
    # of unlabelled pairs as negatives; 0: left out; None: as the labels' mode says
    unlabelled_weight: float | None = Field(default=None, ge=0, le=1)
    train_share: float = Field(default=1.0, gt=0, le=1)     # of the training products, drawn by the seed
    ingredient_dropout: float = Field(default=0.0, ge=0, lt=1)  # share left out of a list, others each time it is read
    class_weights: bool = False             # positives and negatives of a concern count the same in sum
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"   # of the products; weights are float32
    device: Literal["auto", "cpu"] = "auto"
    body: TrainableOptions = TrainableOptions()
    optim: OptimConfig = OptimConfig(learning_rate=3e-5, betas=(0.9, 0.95))
    head_rate: float = Field(default=10.0, gt=0)    # learning rate of what is new beside the body, as its multiple
    token_rate: float = Field(default=1.0, gt=0)    # that of token embeddings: a word of few products has few steps
    sampler: ConcernBatches = ConcernBatches()
    validation_products: int = Field(default=1000, ge=1)
    workers: WorkersConfig = WorkersConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.workers.count > self.sampler.batch_size:
            raise ValueError(f"workers.count: {self.workers.count} workers for {self.sampler.batch_size} pairs a step")
        return self

    def resolved(self) -> Self:
        """The same with absolute paths and one version of the model: workers start in other directories."""
        return self.replace(output=self.output.resolve(), model=str(find_model(self.model, KIND)))

    def base_identity(self) -> dict[str, str]:
        """What it starts from."""
        layout = read_pair_layout(find_model(self.model, KIND))
        return {"weights_sha256": layout.weights_sha256(), "tokenizer_sha256": layout.tokenizer_sha256()}

    def key(self, labels: str) -> str:
        """What the run is known by: everything that decides the trained weights; `labels` is of the labels."""
        away = {"labels", "output", "model", "workers", "ray", "trackers", "checkpoint_every"}
        return fingerprint({"stage": STAGE_VERSION, "labels": labels, "base": self.base_identity(),
                            "config": self.model_dump(mode="json", exclude=away)})


@dataclass
class BtBertTask:
    """The model, the batches and their losses, on one worker."""

    config: FinetuneBtBertConfig
    model: BtBert
    train: ConcernPairs
    valid: ConcernPairs

    def __post_init__(self) -> None:
        """Tokenise, draw the batches and the validation; wrap the model where there are several workers."""
        config, self.tokens = self.config, self.model.tokenizer()
        self.products = self.tokens.products(self.train.ingredients, self.train.titles)
        card = self.model.card
        self.queries = [] if card.mode == "explicit" else [self.tokens.query(one.query) for one in card.concerns]
        self.weights_PC = class_weights(self.train) if config.class_weights else self.train.weights
        self.units = units_of(self.weights_PC, card.whole)
        lengths = np.array([len(one.ingredients) + len(one.title) for one in self.products], dtype=np.int64)
        numbers = np.arange(len(self.units))
        settings = SamplerConfig(batch_size=config.sampler.batch_size, length_grouped=config.sampler.length_grouped,
                                 distinct_groups=False, distinct_queries=False)
        self.sampler = BatchSampler(settings, config.seed, lengths[self.units[:, 0]], numbers, numbers)
        self.judged = self.valid.take(drawn(len(self.valid), config.validation_products, config.seed))
        self.judged_products = self.tokens.products(self.judged.ingredients, self.judged.titles)
        self.learned_C: npt.NDArray[np.bool_] = np.any(self.train.weights > 0, axis=0)
        self.wrapped: Any = self.model
        if world_size() > 1:
            self.model.mean_of = mean_over_workers
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False,
                                                               gradient_as_bucket_view=True)

    def task(self) -> Task:
        """What the loop runs."""
        several = {"no_sync": self.wrapped.no_sync} if world_size() > 1 else {}
        return Task(model=self.model, batches_per_epoch=self.sampler.steps_per_epoch, backward=self.backward,
                    evaluate=self.evaluate if can_judge(self.judged, self.learned_C) else None, objective=OBJECTIVE,
                    begin=self.begin, half=self.model.encoder.dtype == "float16",
                    rates={TOKENS: self.config.token_rate} | dict.fromkeys(
                        self.model.head_names, self.config.head_rate), **several)

    def begin(self, number: int) -> None:
        """Give the batch its dropout."""
        self.model.encoder.dropout_seed = (self.config.seed << 32) + number

    def backward(self, number: int, scale: float) -> Mapping[str, float]:
        """Add this worker's gradients of a batch; returns the figures of the whole batch.

        The loss is the mean over the pairs of all workers; of whole products over products and concerns.
        """
        units = self.units[self.sampler.share(number, rank(), world_size())]
        ids = self.inputs(self._seen(number, units), units)
        logits = self.wrapped(ids)
        targets, weights = _of_units(self.train.targets, units), _of_units(self.weights_PC, units)
        loss = weighted_loss(logits, targets.to(logits.device), weights.to(logits.device))
        whole = self.config.sampler.batch_size * (targets[0].numel() if len(units) else 1)
        # gradients are averaged over workers
        (loss * (scale * world_size() / whole)).backward()  # type: ignore[no-untyped-call]
        summed = sum_over_workers(loss.detach().double().reshape(1))
        return {"loss": float(summed) / whole, "tokens": float(sum(map(len, ids)))}

    def _seen(self, number: int, units: Ints) -> Sequence[ProductTokens]:
        """The training products as batch `number` reads them, the same on all workers."""
        share, seen = self.config.ingredient_dropout, list(self.products)
        for product in np.unique(units[:, 0]).tolist() if share else ():
            seen[product] = seen[product].thinned(share, np.random.default_rng([self.config.seed, 5, number, product]))
        return seen

    def first_inputs(self) -> list[Tokens]:
        """Some inputs of the training pairs, drawn by the seed."""
        return self.inputs(self.products, self.units[drawn(len(self.units), STARTED_ON, self.config.seed)])

    def settle(self) -> None:
        """Set the mean prediction over training pairs to their share of positives: each batch had a mean of its own."""
        self.model.settle(self.first_inputs(), float(self.train.positive_share().mean()))

    def inputs(self, products: Sequence[ProductTokens], units: Ints) -> list[Tokens]:
        """The inputs of (product, concern) units; the concern is -1 where a product is asked for all at once."""
        if self.model.card.style == "shared":
            return [self.tokens.shared(self.queries, products[product]) for product in units[:, 0].tolist()]
        return [self.tokens.pair(self.queries[concern] if concern >= 0 else None, products[product]).ids
                for product, concern in units.tolist()]

    @torch.no_grad()
    def logits(self, products: Sequence[ProductTokens]) -> Floats:
        """Logits of P products for C concerns with the weights as they are, float32 (P, C)."""
        count, whole = len(self.model.card.concerns), self.model.card.whole
        units = units_of(np.ones((len(products), count), np.float32), whole)
        ids = self.inputs(products, units)
        out = np.zeros((len(units), count) if whole else len(units), dtype=np.float32)
        order = np.argsort([-len(one) for one in ids], kind="stable")
        for batch in batches(order, [len(one) for one in ids], EVALUATED_TOKENS) if len(ids) else ():
            out[batch] = self.model([ids[place] for place in batch]).float().cpu().numpy()
        return out.reshape(len(products), count)

    def evaluate(self) -> Mapping[str, float]:
        """Average precision of each concern on the validation products, and the mean of those learned here.

        Without replay that leaves the known ones out: weights that forget them could otherwise never be the best.
        """
        logits_PC = self.logits(self.judged_products)
        each = average_precisions(logits_PC, self.judged.targets, self.judged.weights)
        named = {f"ap_{name}": value for name, value in zip(self.model.card.names(), each, strict=True)
                 if np.isfinite(value)}
        return {OBJECTIVE: float(np.nanmean(each[self.learned_C])), **named}


def build_task(config: FinetuneBtBertConfig, concerns: tuple[Concern, ...], train: ConcernPairs, valid: ConcernPairs
               ) -> BtBertTask:
    """The task on this worker; a new head starts at the prior, the same on every worker.

    Errors: `ConfigError` when a concern has no positive to learn from.
    """
    if config.train_share < 1:
        train = train.take(drawn(len(train), max(1, round(config.train_share * len(train))), config.seed))
    if barren := [one.name for one, share in zip(concerns, train.positive_share(), strict=True) if share == 0]:
        raise ConfigError(f"concerns: no training product is labelled positive for {', '.join(barren)}; label some, "
                          "or leave the concern out with `concerns`")
    running = TextEncoderConfig(device="cuda" if config.workers.gpus else config.device, dtype=config.dtype)
    device = device_of(running)
    torch.manual_seed(config.seed)
    card = BtBertCard(mode=config.mode, layout=config.layout, max_tokens=config.max_tokens, concerns=concerns)
    model = BtBert.load(config.model, card, config.body, dtype_of(running, device), device)
    known = known_concerns(config.model)
    if known:
        train = replayed(train, [one.name in known for one in concerns], config.replay, config.seed)
    task = BtBertTask(config, model, train, valid)
    model.eval()        # what follows measures the model without dropout; the loop trains it
    if known:
        model.recenter(task.first_inputs())
    else:
        share = torch.from_numpy(train.positive_share())
        model.start(task.first_inputs(), share if config.mode == "explicit" else share.mean(), config.head_rate)
    return task


def known_concerns(model: str) -> list[str]:
    """The concerns that a model already knows; none of a bare body."""
    root = find_model(model, KIND)
    return read_card(root).names() if (root / CARD).is_file() else []


def replayed(pairs: ConcernPairs, known: Sequence[bool], share: float, seed: int) -> ConcernPairs:
    """The pairs of new concerns, and of known ones those of a share of the products, drawn by `seed`."""
    weights_PC = pairs.weights.copy()
    left_out = np.random.default_rng([seed, 3]).permutation(len(pairs))[round(share * len(pairs)):]
    weights_PC[np.ix_(left_out, np.flatnonzero(known))] = 0.0
    return ConcernPairs(pairs.product_ids, pairs.ingredients, pairs.titles, pairs.targets, weights_PC)


def units_of(weights_PC: Floats, whole: bool) -> Ints:
    """(product, concern) of every pair that counts, (U, 2); `whole`: (product, -1) of every product that has one."""
    if whole:
        products = np.flatnonzero((weights_PC > 0).any(axis=1))
        return np.stack([products, np.full_like(products, -1)], axis=1).astype(np.int64)
    return np.argwhere(weights_PC > 0).astype(np.int64)


def class_weights(pairs: ConcernPairs) -> Floats:
    """Weights with which positives and negatives of a concern count the same, and its sum stays what it was."""
    share_C = pairs.positive_share()
    positive_C, negative_C = 0.5 / np.maximum(share_C, 1e-6), 0.5 / np.maximum(1 - share_C, 1e-6)
    found: Floats = (pairs.weights * np.where(pairs.targets > 0, positive_C, negative_C)).astype(np.float32)
    return found


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The sum over pairs of weight times binary cross-entropy."""
    return (F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none") * weights).sum()


def mean_over_workers(rows: Tensor) -> Tensor:
    """The mean over the first axis of all workers' rows."""
    counted = torch.cat([rows.sum(dim=0).reshape(-1), rows.new_tensor([len(rows)])])
    total = sum_over_workers(counted)
    return (total[:-1] / total[-1]).reshape(rows.shape[1:])


def _of_units(values_PC: Floats, units: Ints) -> Tensor:
    found = values_PC[units[:, 0]] if len(units) and units[0, 1] < 0 else values_PC[units[:, 0], units[:, 1]]
    return torch.from_numpy(np.ascontiguousarray(found))


def drawn(count: int, wanted: int, seed: int) -> Ints:
    """At most `wanted` of the numbers from 0 to `count` - 1, ascending."""
    return np.sort(np.random.default_rng([seed, 1]).permutation(count)[:wanted]).astype(np.int64)


def can_judge(pairs: ConcernPairs, learned_C: npt.NDArray[np.bool_]) -> bool:
    """Whether some concern that is learned has a positive and a negative to be told apart."""
    found = average_precisions(np.zeros_like(pairs.targets), pairs.targets, pairs.weights)[learned_C]
    if not np.isfinite(found).any():
        log.warning("no validation product is labelled positive for a concern to learn: the last weights are kept")
    return bool(np.isfinite(found).any())


def average_precisions(scores_PC: Floats, targets_PC: Floats, weights_PC: Floats) -> npt.NDArray[np.float64]:
    """Average precision of each concern, (C,); NaN for one without a positive or without a negative."""
    from sklearn.metrics import average_precision_score

    found = np.full(targets_PC.shape[1], np.nan)
    for column in range(targets_PC.shape[1]):
        seen = weights_PC[:, column] > 0
        target = targets_PC[seen, column]
        if 0 < target.sum() < len(target):
            found[column] = average_precision_score(target, scores_PC[seen, column],
                                                    sample_weight=weights_PC[seen, column])
    return found
