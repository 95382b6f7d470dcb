"""What an evaluation of pictures' vectors is asked to do, and one of its tasks: queries against a catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from recsys_ray.data.attribute_pair_data import GroupSplit
from recsys_ray.data.image_files import ImageTable
from recsys_ray.evaluation.attributes import Vectors, top_products
from recsys_ray.evaluation.evaluation_config import EvaluationConfig


class EvaluateAttributesConfig(EvaluationConfig):
    """Which vectors, by which attributes, on which pictures."""

    task: Literal["attributes"] = "attributes"
    name: str
    vectors: Path                               # artefact of embed_images: the frozen model
    attributes: Path | None = None              # artefact of label_attributes; None: a picture's label is its kind
    adapter: Path | None = None                 # artefact of finetune_attribute_adapter; None: the frozen model alone
    trained: Path | None = None                 # artefact of embed_images by the adapter's network, if that was trained
    texts: Path | None = None                   # artefact of embed: products' texts, for an adapter that reads them
    images: ImageTable | None = None            # pictures for the page; None: where the vectors were made from
    split: GroupSplit | None = None             # None: the adapter's own, or the default shares
    part: Literal["train", "valid", "test", "all"] = "test"
    most_queries: int = Field(default=2000, ge=1)
    most_pictures: int | None = Field(default=None, ge=2)   # of the catalogue; 5000 with 500 queries is quick
    depth: int = Field(default=10, ge=1)
    slices: tuple[str, ...] | None = None       # declared; None: each attribute and each of its values
    margin: float = Field(default=0.03, ge=0)
    min_units: int = Field(default=30, ge=2)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    shown_slices: int = Field(default=12, ge=0)     # on the page, the weakest
    shown_queries: int = Field(default=2, ge=1)     # of each
    seed: int = 7
    output: Path

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.texts is not None and self.adapter is None:
            raise ValueError("texts are read by an adapter: give adapter, or leave texts out")
        if self.trained is not None and self.adapter is None:
            raise ValueError("trained: are vectors by an adapter's own network: give adapter, or leave them out")
        return self


@dataclass(frozen=True)
class Task:
    """Queries, and the vectors of each system in the order of the catalogue."""

    name: str
    queries: pa.Table                           # ATTRIBUTE_ROW
    query_vectors: Mapping[str, Vectors]        # system -> (N_q, D)
    catalogue: pa.Table
    catalogue_vectors: Mapping[str, Vectors]

    def top(self, system: str, places: npt.NDArray[np.int64], depth: int) -> npt.NDArray[np.int64]:
        """What a system finds first for some queries, as places of the catalogue."""
        return top_products(self.query_vectors[system][places], self.queries.take(pa.array(places)),
                            self.catalogue_vectors[system], self.catalogue, depth)
