"""(product, concern) pairs from concern labels: what is asked, what is right and how much it counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_ray.artifacts import CURRENT, Artifact, open_artifact
from recsys_ray.config import Config, ConfigError
from recsys_ray.data.concern_data import KIND, LabelConcernsConfig, OwnLabels, label_concerns
from recsys_ray.data.concern_products import ConcernProducts
from recsys_ray.data.concern_splits import ConcernSplitConfig
from recsys_ray.data.rule_files import PACKAGED
from recsys_ray.models.bt_bert import Concern

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class LabelSource(Config):
    """Where labels are: the artefact of `label_concerns`, or a table of one's own (product_id, concern, label)."""

    path: Path
    # of a table:
    products: ConcernProducts | None = None     # whose labels it holds
    columns: dict[str, str] = Field(default_factory=dict)   # ours: theirs
    split: ConcernSplitConfig = ConcernSplitConfig()
    rules: tuple[str, ...] = (PACKAGED,)        # folders whose concerns.yaml have the words of its concerns

    def artifact(self, beside: Path) -> Artifact:
        """The labels as an artefact; of a table it is made, at `beside` with "-labels" behind its name."""
        if (self.path / CURRENT).is_file():
            return open_artifact(self.path.resolve(), KIND)
        if self.products is None:
            raise ConfigError(f"labels.path: {self.path} is no artefact of label_concerns; if it is a table of labels, "
                              "say whose they are: labels.products.path=FILE (or labels.products.prepared=DIR)")
        return label_concerns(LabelConcernsConfig(
            products=self.products, labels=OwnLabels(path=str(self.path), columns=self.columns), split=self.split,
            rules=self.rules, output=beside.with_name(f"{beside.name}-labels")))

    def at(self, artifact: Artifact) -> Self:
        """The same labels by the absolute path of their artefact."""
        return type(self)(path=artifact.path.parents[1])


@dataclass(frozen=True)
class ConcernPairs:
    """The P products of one split and what is known of them for C concerns."""

    product_ids: list[str]
    ingredients: list[str | None]
    titles: list[str]
    targets: Floats     # (P, C), 1 or 0
    weights: Floats     # (P, C), 0: not looked at

    def __len__(self) -> int:
        return len(self.product_ids)

    def take(self, places: Ints) -> ConcernPairs:
        """The products at `places`, in that order."""
        return ConcernPairs(
            [self.product_ids[place] for place in places], [self.ingredients[place] for place in places],
            [self.titles[place] for place in places], self.targets[places], self.weights[places])

    def positive_share(self) -> Floats:
        """The weighted share of positives of each concern, (C,); 0 where nothing is looked at."""
        total_C = self.weights.sum(axis=0)
        found: Floats = (self.targets * self.weights).sum(axis=0) / np.where(total_C > 0, total_C, 1)
        return found


def concerns_of(labels: Artifact, names: tuple[str, ...] | None) -> tuple[Concern, ...]:
    """The concerns of the labels, or those named, each with its words; raises `ConfigError` for an unknown name."""
    known: dict[str, dict[str, str]] = labels.manifest.facts["concerns"]
    if unknown := [name for name in names or () if name not in known]:
        raise ConfigError(f"concerns: {labels.manifest.reference} has no labels of {', '.join(unknown)}; it has "
                          f"{', '.join(known)}")
    return tuple(Concern(name=name, query=known[name]["query"]) for name in names or known)


def read_pairs(labels: Artifact, split: str, concerns: tuple[Concern, ...], unlabelled_weight: float | None
               ) -> ConcernPairs:
    """The products of a split that have ingredients or a title, in the order of their ids.

    Unlabelled pairs are negatives that count `unlabelled_weight`; None: 1 where the labels were made in mode `seed`,
    else 0. Contradictions, and pairs that only withheld rules labelled, count nothing, whichever split they are in.
    """
    if unlabelled_weight is None:
        unlabelled_weight = float(labels.manifest.facts["mode"] == "seed")
    products = labels.table("products.parquet")
    products = products.filter(pc.equal(products["split"], split)).sort_by("product_id")
    rows = labels.table("labels.parquet")
    rows = rows.filter(pc.equal(rows["split"], split))
    ids = products["product_id"].to_pylist()
    targets_PC = np.zeros((len(ids), len(concerns)), dtype=np.float32)
    weights_PC = np.zeros_like(targets_PC)
    place_of_id = {one: place for place, one in enumerate(ids)}
    for column, concern in enumerate(concerns):
        own = rows.filter(pc.equal(rows["concern"], concern.name))
        places = np.array([place_of_id[one] for one in own["product_id"].to_pylist()], dtype=np.int64)
        told, weight = _column(own, unlabelled_weight)
        targets_PC[places, column], weights_PC[places, column] = told, weight
    return ConcernPairs(ids, products["ingredients"].to_pylist(), products["title"].to_pylist(), targets_PC,
                        weights_PC)


def _column(rows: pa.Table, unlabelled_weight: float) -> tuple[Floats, Floats]:
    label = rows["label"]
    known = pc.is_valid(label).to_numpy(zero_copy_only=False)
    target = pc.fill_null(label, 0).to_numpy().astype(np.float32)
    weight = np.where(known, 1.0, unlabelled_weight).astype(np.float32)
    for left_out in ("held_out", "conflict"):
        weight[rows[left_out].to_numpy(zero_copy_only=False)] = 0.0
    return target, weight
