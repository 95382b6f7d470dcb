"""BGE-M3 whole: one vector, token weights and token vectors of a text from one packed forward pass.

Chen et al., "BGE M3-Embedding", arXiv 2402.03216, section 3.2; H are the last layer's states:

* dense: H of the first token (the mean over all tokens where the model says so), unit length; a score
  is the inner product.
* sparse: relu(w . H_t + b) is the weight of token t, the largest where it comes several times, 0 for
  special tokens; a score is the sum over shared tokens of the product of both weights.
* multi-vector: W H_t + b at unit length for every token but the first; a score is the mean over the
  query's tokens of the largest inner product with a token of the document.

`BgeM3Encoder` is for inference, `BgeM3` for training; both read and write the same directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from recsys_ray.models.bge_m3_heads import BgeM3Heads
from recsys_ray.models.sentence_layout import EncoderError, SentenceLayout
from recsys_ray.models.text_encoder import (
    PackedRunner,
    TextEncoder,
    TextEncoderConfig,
    load_tokenizer,
    prepare_texts,
    unit_length,
)
from recsys_ray.models.token_signals import Encoding, MultiVectors, Signals, SparseRows, concat_signals

if TYPE_CHECKING:
    from recsys_ray.models.trainable_bert import TrainableConfig

TokenIds = Sequence[npt.NDArray[np.int32]]


class BgeM3Encoder(TextEncoder):
    """A loaded BGE-M3 with the heads that its configuration asks for; plain vectors come as from any encoder."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__(config)
        if not isinstance(self._runner, PackedRunner):
            raise EncoderError(f"{self.layout.root}: token weights and vectors need a packed body"
                               f"{f': {self.layout.not_packed}' if self.layout.not_packed else ''}; "
                               "turn off encoder.sparse and encoder.multi_vector, or backend=sentence_transformers")
        self._packed = self._runner
        self.heads = BgeM3Heads.load(self.layout.root, self.dimension, sparse=config.sparse, multi=config.multi_vector)
        self.heads.to(self.device).requires_grad_(False)

    def encode_all_documents(self, texts: Sequence[str]) -> Encoding:
        """Vectors and signals of N product texts, as far as the configuration asks for them."""
        return self.encode(texts, sparse=self.config.sparse, multi_vector=self.config.multi_vector,
                           prompt=self.identity["document_prompt"])

    def encode_all_queries(self, texts: Sequence[str]) -> Encoding:
        """Vectors and signals of N queries, as far as the configuration asks for them."""
        return self.encode(texts, sparse=self.config.sparse, multi_vector=self.config.multi_vector,
                           prompt=self.identity["query_prompt"])

    def encode(self, texts: Sequence[str], dense: bool = True, sparse: bool = True, multi_vector: bool = True,
               prompt: str = "") -> Encoding:
        """The asked parts of N texts: dense float32 (N, D), token weights, token vectors in the configured type.

        Errors: `EncoderError` for a part whose head was not loaded.
        """
        different, index = prepare_texts(texts, self.config.max_chars)
        vectors = np.zeros((len(different), self.dimension), dtype=np.float32)
        order, parts = [np.zeros(0, np.int64)], [self._nothing(sparse, multi_vector)]
        for places, token_ids in self._packed.batches(different, prompt) if different else ():
            hidden_TD = self._packed.forward.hidden_states(token_ids)
            if dense:
                vectors[places] = self._packed.forward.pool(hidden_TD, token_ids).cpu().numpy()
            order.append(places.astype(np.int64))
            parts.append(self._signals(hidden_TD, token_ids, sparse, multi_vector))
        signals = concat_signals(parts).take(np.argsort(np.concatenate(order))[index])
        if self.identity["normalise"]:
            vectors = unit_length(vectors)
        return Encoding(vectors[index] if dense else None, signals)

    @torch.inference_mode()
    def _signals(self, hidden_TD: Tensor, token_ids: TokenIds, sparse: bool, multi_vector: bool) -> Signals:
        lengths = [len(one) for one in token_ids]
        rows, multi = None, None
        if sparse:
            weights_T = self.heads.token_weights(hidden_TD).cpu().numpy()
            rows = sparse_rows(token_ids, weights_T, self._packed.special_ids)
        if multi_vector:
            kept_TM = self.heads.token_vectors(hidden_TD[_without_first(lengths).to(hidden_TD.device)])
            offsets = np.cumsum([0, *(length - 1 for length in lengths)], dtype=np.int64)
            multi = MultiVectors(offsets, kept_TM.cpu().numpy().astype(self.config.multi_vector_dtype))
        return Signals(rows, multi)

    def _nothing(self, sparse: bool, multi_vector: bool) -> Signals:
        """The signals of no texts, in the right types."""
        return self._signals(torch.zeros((0, self.dimension), device=self.device), [], sparse, multi_vector)


def sparse_rows(token_ids: TokenIds, weights_T: npt.NDArray[np.float32], special_ids: Sequence[int]) -> SparseRows:
    """The weights above 0 of each text's different tokens, the largest of a repeated one, special tokens left out."""
    tokens = np.concatenate([np.zeros(0, np.int32), *token_ids]).astype(np.int64)
    text = np.repeat(np.arange(len(token_ids)), [len(one) for one in token_ids])
    kept = ~(weights_T <= 0) & ~np.isin(tokens, special_ids)    # a NaN stays, so that it is found
    text, tokens, weights = text[kept], tokens[kept], weights_T[kept]
    order = np.lexsort((tokens, text))
    text, tokens, weights = text[order], tokens[order], weights[order]
    first = np.flatnonzero(np.concatenate([[True], (np.diff(text) != 0) | (np.diff(tokens) != 0)])[: len(text)])
    largest = np.maximum.reduceat(weights, first) if len(first) else weights
    offsets = np.zeros(len(token_ids) + 1, dtype=np.int64)
    np.cumsum(np.bincount(text[first], minlength=len(token_ids)), out=offsets[1:])
    return SparseRows(offsets, tokens[first].astype(np.int32), largest.astype(np.float32))


def _without_first(lengths: Sequence[int]) -> Tensor:
    """The places of all tokens but the first of each text, in texts laid end to end."""
    places = [np.arange(end - length + 1, end) for length, end in zip(lengths, np.cumsum(lengths), strict=True)]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *places]))


def _exact(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()


def _mean_states(hidden_TD: Tensor, lengths: Sequence[int]) -> Tensor:
    sizes = torch.tensor(lengths, device=hidden_TD.device)
    texts = torch.repeat_interleave(torch.arange(len(lengths), device=hidden_TD.device), sizes)
    exact_TD = _exact(hidden_TD)
    return exact_TD.new_zeros(len(lengths), exact_TD.shape[1]).index_add(0, texts, exact_TD) / sizes[:, None]


# --- training -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TokenStates:
    """What a forward pass gives for N texts of T tokens in all, with gradients."""

    dense: Tensor                       # (N, D), unit length
    weights: Tensor                     # (T,), of every token as it stands, 0 for special ones
    token_ids: npt.NDArray[np.int64]    # (T,)
    lengths: list[int]                  # tokens of each text
    multi: Tensor                       # (T - N, M), unit length, all tokens but the first of each text
    multi_lengths: list[int]            # lengths - 1


class BgeM3(nn.Module):
    """A body with both heads, to be trained. `body` gives `hidden_states(token_ids) -> ((T, D), lengths)`."""

    def __init__(self, body: Any, heads: BgeM3Heads, special_ids: Sequence[int], pooling: str = "cls") -> None:
        super().__init__()
        self.body, self.heads, self.special_ids, self.pooling = body, heads, tuple(special_ids), pooling

    @classmethod
    def load(cls, config: TrainableConfig, new_heads: int | None = None) -> Self:
        """The model of `config` to be trained; with `new_heads` heads made from its body, token vectors of that size.

        Errors: `EncoderError` when a head is missing and none is to be made, and when one is there although
        new ones are to be made.
        """
        from recsys_ray.models.trainable_bert import TrainableBert

        body = TrainableBert.load(config)
        layout = body.layout
        if new_heads is not None and BgeM3Heads.there(layout.root):
            raise EncoderError(f"{layout.root}: has heads already; leave new_heads out to train them further")
        heads = (BgeM3Heads.load(layout.root, layout.dimension) if new_heads is None
                 else BgeM3Heads.new(layout.dimension, new_heads))
        special_ids = load_tokenizer(layout, layout.max_tokens or 3)[1]
        return cls(body, heads.to(body.device), special_ids, layout.pooling)

    @property
    def layout(self) -> SentenceLayout:
        """Where the model came from."""
        layout: SentenceLayout = self.body.layout
        return layout

    @property
    def dtype(self) -> str:
        """The type of the body's products."""
        return str(self.body.dtype)

    @property
    def dropout_seed(self) -> int:
        """What the body's dropout is a function of, beside the text."""
        return int(self.body.dropout_seed)

    @dropout_seed.setter
    def dropout_seed(self, seed: int) -> None:
        self.body.dropout_seed = seed

    def forward(self, token_ids: TokenIds) -> TokenStates:
        """Vectors, token weights and token vectors of N tokenised texts, in their order."""
        hidden_TD, lengths = self.body.hidden_states(token_ids)
        ends = np.cumsum(lengths)
        tokens = np.concatenate(token_ids).astype(np.int64)
        ordinary = torch.from_numpy(~np.isin(tokens, self.special_ids)).to(hidden_TD.device)
        firsts = torch.from_numpy(ends - np.asarray(lengths)).to(hidden_TD.device)
        others = _without_first(lengths).to(hidden_TD.device)
        dense_ND = _exact(hidden_TD[firsts]) if self.pooling == "cls" else _mean_states(hidden_TD, lengths)
        return TokenStates(
            F.normalize(dense_ND, dim=-1), self.heads.token_weights(hidden_TD) * ordinary, tokens,
            list(lengths), self.heads.token_vectors(hidden_TD[others]), [length - 1 for length in lengths])

    def save(self, root: Path, card: str = "", prompts: dict[str, str] | None = None) -> None:
        """Write the body as a sentence-transformers folder (as `TrainableBert.save`) and the heads beside it."""
        self.body.save(root, card, prompts)
        self.heads.save(root)
