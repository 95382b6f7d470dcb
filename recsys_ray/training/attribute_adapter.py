"""Training of the adapter of pictures: its configuration and its task.

A step draws pairs of pictures that are alike (`BalancedSampler`) and some known negatives of their anchors. The
columns of the contrastive loss are the positives of all pairs and all those negatives. A column is a negative of a row
only if it is of another group and is known to differ in what makes the row's pair alike, or if it is one of the row's
own known negatives: so a known negative of one pair never is a false one of another.

Every worker computes all columns and the losses of its own rows. A head is cheap, so this costs less than sending
vectors, and the gradients of the workers add up to exactly those of one. Where the network below is trained, too
(`tower`), the workers share its pictures and send vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys_ray.config import Config, ConfigError, fingerprint
from recsys_ray.data.attribute_items import ATTRIBUTES, Items, Pairs
from recsys_ray.data.attribute_pair_data import GroupSplit
from recsys_ray.evaluation.attributes import attribute_figures
from recsys_ray.models.attribute_adapter import AdapterCard, AttributeAdapter, HeadConfig
from recsys_ray.models.image_encoder import ImageEncoder
from recsys_ray.runtime import RayConfig
from recsys_ray.training.attribute_gate import SliceGateConfig
from recsys_ray.training.balanced_sampler import BalancedConfig, BalancedSampler
from recsys_ray.training.bge import WorkersConfig
from recsys_ray.training.clip_texts import ClipTexts
from recsys_ray.training.distributed import rank, sum_over_workers, world_size
from recsys_ray.training.loop import LoopConfig, Task
from recsys_ray.training.losses import attribute_cross_entropy, info_nce, known_to_differ, same_key, scores
from recsys_ray.training.optim import OptimConfig
from recsys_ray.training.tower import TowerConfig, TowerPass, TrainedTower
from recsys_ray.training.tower_pictures import Pictures

STAGE_VERSION = 1       # raise it when the same inputs would give another adapter
OBJECTIVE = "attributes@10"

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Lookup = Callable[[Ints], Tensor]       # places of pictures -> their vectors by the tower, (N, D)


class AdapterLossConfig(Config):
    """What is minimised: the mean over rows of the weighted sum of these."""

    temperature: float = Field(default=0.07, gt=0)      # kept: no parameter
    image: float = Field(default=1.0, ge=0)             # of pictures finding pictures
    text: float = Field(default=0.5, ge=0)              # of a product's text finding its picture
    fused: float = Field(default=0.5, ge=0)             # of both halves finding both, by the learned weight
    attributes: float = Field(default=10.0, ge=0)       # of naming a picture's attributes
    attribute_weights: dict[str, float] = Field(default_factory=lambda: {"neckline": 2.0})
    # length of random noise on frozen vectors, by how far pictures are from their middle: keeps heads from learning by
    # heart what few pictures show (Bishop 1995: the same as a Tikhonov penalty)
    noise: float = Field(default=1.0, ge=0)
    mask: bool = True       # what may be as good as the positive is no negative; without it, as in naive recipes, it is

    @model_validator(mode="after")
    def _known(self) -> Self:
        if wrong := set(self.attribute_weights) - set(ATTRIBUTES):
            raise ValueError(f"attribute_weights: {', '.join(sorted(wrong))}; there are {', '.join(ATTRIBUTES)}")
        return self


class MiniValidation(Config):
    """The catalogue that is searched during training, to choose the step."""

    # of the valid split's groups; the gate judges by the others, which chose nothing. 1: all of them do both
    share: float = Field(default=0.5, gt=0, le=1)
    items: int = Field(default=5000, ge=2)
    queries: int = Field(default=500, ge=1)


class FinetuneAttributeAdapterConfig(LoopConfig):
    """Which pictures, what is known of them, and how their adapter learns."""

    vectors: Path                           # artefact of embed_images
    attributes: Path | None = None          # of make_attributes; None: a picture's label is its category2
    pairs: Path | None = None               # of make_attribute_pairs; None: pictures of one label are alike
    embeddings: Path | None = None          # of embed: texts of the same products, by a text encoder
    clip_texts: ClipTexts | None = None     # or by the text tower of the pictures' own network; neither: pictures alone
    output: Path                            # artefact root of the adapter
    head: HeadConfig = HeadConfig()
    tower: TowerConfig | None = None        # how the network of the pictures is trained; None: it is frozen
    loss: AdapterLossConfig = AdapterLossConfig()
    sampler: BalancedConfig = BalancedConfig()
    validation: MiniValidation = MiniValidation()
    gate: SliceGateConfig = SliceGateConfig()
    force: bool = False                     # publish whatever the gate says; it is recorded
    split: GroupSplit = GroupSplit()        # of the groups, where there are no pairs; else theirs
    epochs: float = Field(default=10.0, gt=0)
    optim: OptimConfig = OptimConfig(learning_rate=1e-3, weight_decay=0.01)
    workers: WorkersConfig = WorkersConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.workers.count > self.sampler.batch_size:
            raise ValueError(f"workers.count: {self.workers.count} workers for {self.sampler.batch_size} pairs a step")
        if self.embeddings is not None and self.clip_texts is not None:
            raise ValueError("embeddings, clip_texts: are two towers for the same texts; give one")
        if self.pairs is not None and self.attributes is None:
            raise ValueError("pairs: are of products; give the attributes they were made from, too")
        return self

    def resolved(self) -> Self:
        """The same with absolute paths: workers start in other directories."""
        given = {name: getattr(self, name) for name in ("vectors", "attributes", "pairs", "embeddings", "output")}
        texts = {} if self.clip_texts is None else {"clip_texts": self.clip_texts.resolved().model_dump()}
        return self.replace(**{name: path.resolve() for name, path in given.items() if path is not None}, **texts)

    def key(self, inputs: Mapping[str, str]) -> str:
        """What the run is known by: everything that decides the trained weights; `inputs` are fingerprints."""
        away = {"vectors", "attributes", "pairs", "embeddings", "clip_texts", "output", "gate", "force", "workers",
                "ray", "trackers", "checkpoint_every", "tower"}
        tower = {} if self.tower is None else {"tower": self.tower.model_dump(
            mode="json", exclude={"images", "encoder", "at_once"})}     # those are the vectors' own
        return fingerprint({"stage": STAGE_VERSION, "inputs": dict(inputs),
                            "config": self.model_dump(mode="json", exclude=away) | tower})


@dataclass(frozen=True)
class AdapterData:
    """All pictures, the pairs of the train split's, and the pictures that judge."""

    items: Items
    train: Ints             # places among the items
    valid: Ints             # those that choose the step
    pairs: Pairs            # of train pictures alone
    image: dict[str, Any]   # identity of the tower that the vectors are of
    text: dict[str, Any] | None = None
    judges: Ints | None = None          # those that the gate goes by; None: those that choose the step
    pictures: Pictures | None = None    # of a tower that is trained: all of these

    @property
    def judging(self) -> Ints:
        """The places of the pictures that the gate goes by."""
        return self.valid if self.judges is None else self.judges


@dataclass
class AdapterTask:
    """The adapter, the batches and their losses, on one worker."""

    config: FinetuneAttributeAdapterConfig
    model: AttributeAdapter
    data: AdapterData
    tower: TrainedTower | None = None

    def __post_init__(self) -> None:
        """Draw the batches and the validation."""
        items, pairs, device = self.data.items, self.data.pairs, self.model.scale.device
        self.sampler = BalancedSampler(self.config.sampler, self.config.seed, items.values,
                                       items.codes[pairs.anchors], items.groups[pairs.anchors])
        self.vectors, self.codes = torch.from_numpy(items.vectors).to(device), torch.from_numpy(items.codes).to(device)
        self.groups = torch.from_numpy(items.groups).to(device)
        self.texts = None if items.texts is None else torch.from_numpy(items.texts).to(device)
        self.noise = self.config.loss.noise * float(np.sqrt(items.vectors[self.data.train].var(axis=0).mean()))
        random = np.random.default_rng([self.config.seed, 1])
        judged = random.permutation(self.data.valid)[:self.config.validation.items]
        self.judged, self.asked = items.take(judged), np.arange(min(len(judged), self.config.validation.queries))
        self.judged_places = judged
        self.trained = self.model if self.tower is None else nn.ModuleDict({
            "adapter": self.model, "tower": self.tower.network})

    def task(self) -> Task:
        """What the loop runs."""
        rates = {} if self.config.tower is None else {
            "tower.": self.config.tower.learning_rate / self.config.optim.learning_rate}
        return Task(model=self.trained, batches_per_epoch=self.sampler.steps_per_epoch, backward=self.backward,
                    evaluate=self.evaluate if len(self.judged) > 1 else None, objective=OBJECTIVE,
                    begin=lambda number: None, rates=rates)

    def backward(self, number: int, scale: float) -> Mapping[str, float]:
        """Add the gradients of a batch, summed over workers; returns the figures of the whole batch."""
        batch = self.sampler.batch(number)
        passed = None if self.tower is None else TowerPass(self.tower, self.pictured(number, batch))
        parts = self.losses(number, batch, batch[rank()::world_size()], np.arange(len(batch))[rank()::world_size()],
                            None if passed is None else passed.take)
        weights = {"attributes": self.config.loss.attributes, "image": self.config.loss.image,
                   "text": self.config.loss.text, "fused": self.config.loss.fused}
        figures = {f"loss_{name}": each.sum() / len(batch) for name, each in parts.items() if name in weights}
        loss = torch.stack([weights[name.removeprefix("loss_")] * one for name, one in figures.items()]).sum()
        trained = [one for one in self.model.parameters() if one.requires_grad]
        found = list(torch.autograd.grad(loss * scale, [*trained, *([] if passed is None else [passed.vectors_UD])],
                                         allow_unused=True))
        if passed is not None and self.tower is not None:
            found[-1:] = passed.gradients(found[-1])
            trained += self.tower.weights
        flat = sum_over_workers(torch.cat([torch.zeros_like(one).reshape(-1) if own is None else own.reshape(-1)
                                           for one, own in zip(trained, found, strict=True)]))
        for one, part in zip(trained, torch.split(flat, [one.numel() for one in trained]), strict=True):
            one.grad = part.view_as(one) if one.grad is None else one.grad + part.view_as(one)
        told = {"loss": loss, **figures, "masked_share": parts["masked"].sum() / len(batch)}
        summed = sum_over_workers(torch.stack([one.detach().double() for one in told.values()]))
        weight = {} if self.texts is None else {"image_weight": float(self.model.image_weight().detach())}
        return {**dict(zip(told, summed.tolist(), strict=True)), **weight, **self.sampler.shares(batch)}

    def pictured(self, number: int, batch: Ints) -> Ints:
        """The places of all pictures that the losses of a batch are of, sorted, none twice."""
        anchors = self.data.pairs.anchors[batch]
        return np.unique(np.concatenate([anchors, self.data.pairs.others[batch],
                                         self.known_negatives(number, anchors)[0]]))

    def losses(self, number: int, batch: Ints, own: Ints, seats: Ints, vectors: Lookup | None = None
               ) -> dict[str, Tensor]:
        """The parts of the loss for a worker's own pairs (M,), which sit at `seats` of the batch; and the share masked.

        Columns are the positives of the whole batch, then the known negatives of its anchors. `vectors` are the
        pictures' by the tower; None: those it had when it was frozen.
        """
        vectors = vectors or (lambda places: self.vectors[places])
        pairs, model, temperature = self.data.pairs, self.model, self.config.loss.temperature
        hard, owners = self.known_negatives(number, pairs.anchors[batch])
        anchors, others = pairs.anchors[own], pairs.others[own]
        columns, of_text = np.concatenate([pairs.others[batch], hard]), np.concatenate([pairs.anchors[batch], hard])
        seat = torch.from_numpy(seats).to(self.vectors.device)
        allowed = self.allowed(anchors, others, columns, owners, seats)
        images_D = self.noisy(number, 0, vectors(pairs.anchors[batch]))
        image_MD, image_CD = model.image(images_D[seat]), model.image(self.noisy(number, 1, vectors(columns)))
        found = {"image": info_nce(scores(image_MD, image_CD, "dot"), seat, temperature, allowed),
                 "masked": image_MD.new_zeros(()) if allowed is None else (~allowed).float().mean(dim=1)}
        if self.config.loss.attributes:
            found["attributes"] = attribute_cross_entropy(model.logits(image_MD), self.codes[anchors],
                                                          self.config.loss.attribute_weights)
        if self.texts is None or model.text is None:
            return found
        there_M = (self.texts[anchors] != 0).any(dim=1)
        text_MD, text_CD = self.text_of(anchors), self.text_of(columns)
        pictures_CD = model.image(self.noisy(number, 2, vectors(of_text)))
        by_text = self.allowed(anchors, anchors, of_text, owners, seats)
        found["text"] = torch.where(there_M, info_nce(scores(text_MD, pictures_CD, "dot"), seat, temperature, by_text),
                                    0.0)
        found["fused"] = info_nce(scores(model.fuse(image_MD, text_MD), model.fuse(image_CD, text_CD), "dot"), seat,
                                  temperature, allowed)
        return found

    def noisy(self, number: int, part: int, vectors_ND: Tensor) -> Tensor:
        """The tower's vectors of pictures with this batch's noise, (N, D), the same on every worker."""
        if not self.noise:
            return vectors_ND
        random = torch.Generator().manual_seed((self.config.seed << 32) + 3 * number + part)
        return vectors_ND + self.noise * torch.randn(vectors_ND.shape, generator=random).to(vectors_ND.device)

    def text_of(self, places: Ints) -> Tensor:
        """Adapted texts, (N, D); zeros where a product has none, so that only its picture counts."""
        assert self.texts is not None
        assert self.model.text is not None
        frozen = self.texts[places]
        adapted: Tensor = self.model.text(frozen) * (frozen != 0).any(dim=1, keepdim=True)
        return adapted

    def allowed(self, anchors: Ints, positives: Ints, columns: Ints, owners: Ints, seats: Ints) -> Tensor | None:
        """Which columns are candidates of which rows, (M, C): the positive, and what is a negative for sure."""
        if not self.config.loss.mask:
            return None
        differ_MC = known_to_differ(self.codes[anchors], self.codes[positives], self.codes[columns])
        seat_M = torch.from_numpy(seats).to(differ_MC.device)
        owner_C = torch.from_numpy(np.concatenate([np.full(len(columns) - len(owners), -1), owners])).to(seat_M.device)
        own_MC = owner_C[None, :] == seat_M[:, None]
        other_group_MC = ~same_key(self.groups[anchors], self.groups[columns])
        found = (differ_MC | own_MC) & other_group_MC
        return found.scatter(1, seat_M[:, None], True)

    def known_negatives(self, number: int, anchors: Ints) -> tuple[Ints, Ints]:
        """Some known negatives of the anchors, (H,) places, and the seat of each one's anchor, (H,)."""
        random, most = np.random.default_rng([self.config.seed, 2, number]), self.config.sampler.negatives
        each = [self.data.pairs.negatives_of(anchor) for anchor in anchors.tolist()]
        drawn = [random.permutation(one)[:most] for one in each]
        owners = np.repeat(np.arange(len(drawn)), [len(one) for one in drawn])
        return np.concatenate([np.zeros(0, np.int64), *drawn]), owners.astype(np.int64)

    def evaluate(self) -> Mapping[str, float]:
        """Shares of the first ten that have the query's attribute, pictures finding pictures and texts finding them."""
        frozen = self.judged.vectors if self.tower is None else self.tower.vectors(self.judged_places)
        pictures, rows = self.model.adapt(frozen), self.judged.rows
        asked = rows.take(self.asked)
        found = mean_figures(attribute_figures(pictures[self.asked], asked, pictures, rows))
        if not found:
            raise ConfigError("no two validation pictures have a known attribute; give more pictures")
        told = {OBJECTIVE: float(np.mean([*found.values()])), **found}
        if self.judged.texts is not None:
            told_N = self.asked[(self.judged.texts[self.asked] != 0).any(axis=1)]
            texts = self.model.adapt(self.judged.texts[told_N], "text")
            of_text = mean_figures(attribute_figures(texts, rows.take(told_N), pictures, rows))
            told |= {f"text_{name}": value for name, value in of_text.items()}
        return told


def mean_figures(figures: Mapping[str, npt.NDArray[Any]]) -> dict[str, float]:
    """Mean over the queries of each attribute that some of them have."""
    return {f"{name}@10": float(np.nanmean(each)) for name, each in figures.items() if np.isfinite(each).any()}


def build_task(config: FinetuneAttributeAdapterConfig, data: AdapterData) -> AdapterTask:
    """The task on this worker; prototypes and a projection begin at what the train pictures say, equal on all."""
    torch.manual_seed(config.seed)
    card = AdapterCard(image=data.image, text=data.text, head=config.head, attributes=data.items.values,
                       temperature=config.loss.temperature)
    model, known = AttributeAdapter(card), data.items.take(data.train)
    if config.head.start == "identity":
        model.start(torch.from_numpy(known.vectors), torch.from_numpy(known.codes),
                    None if known.texts is None else torch.from_numpy(known.texts))
    return AdapterTask(config, model.to("cuda" if config.workers.gpus else "cpu"), data, build_tower(config, data))


def build_tower(config: FinetuneAttributeAdapterConfig, data: AdapterData) -> TrainedTower | None:
    """The network of the pictures where it is trained; None where it is frozen."""
    if config.tower is None or config.tower.encoder is None or data.pictures is None:
        return None
    return TrainedTower(config.tower, ImageEncoder(config.tower.encoder), data.pictures)
