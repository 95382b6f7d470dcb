"""A user's sequence of items -> a score of every item, known or new: a small causal transformer over item vectors.

SASRec (Kang and McAuley, ICDM 2018) started from text: an item's vector is a projection of its text embedding
plus a learned residual that is zero where it starts and stays zero for items without a training interaction, so that
a cold item is scored by its text alone, in the space the others were trained in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recsys_ray.config import Config

FILES = ("config.json", "items.parquet", "model.safetensors", "text.safetensors")
ORDERS = 4          # in which a history without an order is read; its states are averaged
USERS_PER_BATCH = 256


class SequenceError(ValueError):
    """Files or histories that do not fit a sequence model."""


class SequenceConfig(Config):
    """How large the model is."""

    dimension: int = Field(default=64, ge=4)
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=2, ge=1)
    max_items: int = Field(default=50, ge=1)        # of a history: the latest
    dropout: float = Field(default=0.2, ge=0, lt=1)
    ordered: bool = True        # positions count; else a history is a set, shown in another order each time

    @model_validator(mode="after")
    def _divides(self) -> SequenceConfig:
        if self.dimension % self.heads:
            raise ValueError(f"dimension {self.dimension} is no multiple of heads {self.heads}")
        return self


class SequenceModel(nn.Module):
    """The network over a catalogue of I items; sequences are (B, L) of places, -1 behind the end."""

    text: Tensor
    warm: Tensor

    def __init__(self, config: SequenceConfig, text_IT: Tensor, warm_I: Tensor) -> None:
        """`text_IT` are the items' text embeddings, `warm_I` says which items have training interactions."""
        super().__init__()
        self.config, width = config, config.dimension
        self.register_buffer("text", text_IT.float(), persistent=False)
        self.register_buffer("warm", warm_I.float(), persistent=False)
        self.project = nn.Linear(text_IT.shape[1], width)
        self.project_bias = nn.Linear(text_IT.shape[1], 1)
        self.residual = nn.Embedding(len(text_IT), width)
        self.residual_bias = nn.Embedding(len(text_IT), 1)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual_bias.weight)
        self.position = nn.Embedding(config.max_items, width) if config.ordered else None
        self.dropout = nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(width, config.heads, 4 * width, config.dropout, "gelu", batch_first=True,
                                           norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def vectors(self, items_N: Tensor) -> tuple[Tensor, Tensor]:
        """The vector (N, D) and the bias (N,) of items, by any shape of places."""
        text, warm = self.text[items_N], self.warm[items_N][..., None]
        vector = self.project(text) + warm * self.residual(items_N)
        bias = self.project_bias(text) + warm * self.residual_bias(items_N)
        return vector, bias[..., 0]

    def states(self, items_BL: Tensor) -> Tensor:
        """What is known after each item of each sequence, (B, L, D)."""
        length = items_BL.shape[1]
        found_BLD = self.vectors(items_BL.clamp(min=0))[0]
        if self.position is not None:
            found_BLD = found_BLD + self.position.weight[:length]
        ahead_LL = torch.ones(length, length, dtype=torch.bool, device=items_BL.device).triu(1)
        found: Tensor = self.encoder(self.dropout(found_BLD), mask=ahead_LL)    # what is behind the end is ahead of all
        return found

    def forward(self, items_BL: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(states (B, L, D), vectors (N, D), biases (N,)) in one call, as distributed training needs it."""
        return self.states(items_BL), *self.vectors(targets_N)

    @torch.no_grad()
    def score(self, histories: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        """A score of every item for each history of places (oldest first), (U, I). Histories are not empty."""
        self.eval()
        device = self.text.device
        vectors_ID, bias_I = self.vectors(torch.arange(len(self.text), device=device))
        found = []
        for start in range(0, len(histories), USERS_PER_BATCH):
            part = histories[start:start + USERS_PER_BATCH]
            users_BD = torch.stack([self._last(part, order, device) for order in range(
                1 if self.config.ordered else ORDERS)]).mean(dim=0)
            found.append((users_BD @ vectors_ID.T + bias_I).cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, len(self.text)), np.float32)

    def _last(self, histories: list[npt.NDArray[np.int64]], order: int, device: torch.device) -> Tensor:
        """The last state of each history, (B, D), read in one of the orders."""
        if not self.config.ordered:
            histories = [np.random.default_rng([order, len(one)]).permutation(np.sort(one)) for one in histories]
        items_BL = torch.from_numpy(padded(histories, self.config.max_items)).to(device)
        last_B = (items_BL >= 0).sum(dim=1) - 1
        return self.states(items_BL)[torch.arange(len(histories), device=device), last_B]

    # --- files ------------------------------------------------------------------------------------
    def save(self, directory: Path, items: tuple[str, ...], popularity: npt.NDArray[np.float32]) -> tuple[str, ...]:
        """Write the files of `FILES`; returns their names. `popularity` is what an empty history gets."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILES[0]).write_text(self.config.model_dump_json(), encoding="utf-8")
        warm = pa.array(self.warm.bool().tolist())
        table = pa.table({"product_id": pa.array(items, pa.string()), "warm": warm, "popularity": popularity})
        pq.write_table(table, directory / FILES[1], compression="zstd", write_page_checksum=True)
        save_file({name: one.contiguous().cpu() for name, one in self.state_dict().items()}, directory / FILES[2])
        save_file({"text": self.text.contiguous().cpu()}, directory / FILES[3])
        return FILES


class SequenceRecommender:
    """A trained sequence model with its catalogue: the interface of `ranking.recommenders.Recommender`."""

    def __init__(self, model: SequenceModel, items: tuple[str, ...], popularity: npt.NDArray[np.float32]) -> None:
        """`items` are the ids by place."""
        self.model, self.items, self.popularity = model, items, popularity
        self._places = {item: place for place, item in enumerate(items)}

    @classmethod
    def load(cls, directory: Path) -> SequenceRecommender:
        """What `SequenceModel.save` wrote; `SequenceError` when the files do not fit together."""
        config = SequenceConfig.model_validate_json((directory / FILES[0]).read_bytes())
        table = pq.ParquetFile(directory / FILES[1], page_checksum_verification=True).read()
        text = load_file(directory / FILES[3])["text"]
        if len(text) != table.num_rows:
            raise SequenceError(f"{directory}: {table.num_rows} items but {len(text)} text embeddings; train it again")
        model = SequenceModel(config, text, torch.tensor(table["warm"].to_pylist()))
        try:
            model.load_state_dict(load_file(directory / FILES[2]))
        except RuntimeError as error:
            raise SequenceError(f"{directory / FILES[2]}: not the weights of this configuration: {error}") from None
        return cls(model.eval(), tuple(table["product_id"].to_pylist()),
                   np.asarray(table["popularity"].to_numpy(), dtype=np.float32))

    def score(self, histories: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        """A score of every item for each history of places, (U, I); of popularity where a history is empty."""
        scores: npt.NDArray[np.float32] = np.broadcast_to(self.popularity, (len(histories), len(self.items))).copy()
        known = [row for row, one in enumerate(histories) if len(one)]
        scores[known] = self.model.score([histories[row] for row in known])
        return scores

    def recommend(self, history: list[str], k: int, exclude_seen: bool = True) -> tuple[list[str], Any]:
        """The k best items for a history of item ids (oldest first) and their scores; unknown ids are passed over."""
        places = np.array([self._places[one] for one in history if one in self._places], dtype=np.int64)
        scores = self.score([places])[0]
        order = np.lexsort((np.arange(len(scores)), -self.popularity, -scores))
        if exclude_seen:
            order = order[~np.isin(order, places)]
        order = order[: max(0, k)]
        return [self.items[one] for one in order], scores[order]


def padded(sequences: list[npt.NDArray[np.int64]], most: int) -> npt.NDArray[np.int64]:
    """The last `most` items of each sequence, (B, L), -1 behind the end."""
    cut = [one[-most:] for one in sequences]
    found = np.full((len(cut), max(1, max(map(len, cut)))), -1, dtype=np.int64)
    for row, one in enumerate(cut):
        found[row, : len(one)] = one
    return found
