"""BERT and XLM-RoBERTa without padding: texts of a batch lie end to end, attention runs per length.

The texts of a batch are sorted by length, so those of one length are neighbours and form a dense
(texts, tokens) block: no padding is computed and no mask is needed. Query, key and value are one
matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from recsys_ray.models.fronts import Fronts, places_of

# Above this length the (tokens, tokens) scores of plain attention outgrow the cache and SDPA wins.
PLAIN_ATTENTION_TOKENS = 512


class PackedBert:
    """The forward pass of a BERT, RoBERTa or XLM-RoBERTa body up to the pooled vector."""

    def __init__(self, weights: Mapping[str, Tensor], body: Mapping[str, Any], pooling: str, dtype: torch.dtype,
                 device: torch.device) -> None:
        """`weights` of the body by their names in the model's own files, `body` its config.json."""
        self.pooling, self.device = pooling, device
        self.heads: int = body["num_attention_heads"]
        self.dimension: int = body["hidden_size"]
        self._epsilon = float(body.get("layer_norm_eps", 1e-12))
        # RoBERTa numbers its positions from pad + 1
        self._first_position = 0 if body["model_type"] == "bert" else int(body.get("pad_token_id", 1)) + 1

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype).contiguous()

        def pair(module: str) -> tuple[Tensor, Tensor]:
            return place(weights[f"{module}.weight"]), place(weights[f"{module}.bias"])

        self._words = place(weights["embeddings.word_embeddings.weight"])
        # tokens have type 0, so its vector joins the positions once and for all; those of a second text add the rest
        types = weights["embeddings.token_type_embeddings.weight"]
        self._positions = place(weights["embeddings.position_embeddings.weight"] + types[0])
        self._second = place(types[-1] - types[0])
        self._first_norm = pair("embeddings.LayerNorm")
        self._layers = []
        for number in range(body["num_hidden_layers"]):
            layer = f"encoder.layer.{number}"
            own = [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")]
            fused = (place(torch.cat([weights[f"{name}.weight"] for name in own])),
                     place(torch.cat([weights[f"{name}.bias"] for name in own])))
            mixer = f"{layer}.attention.output"
            self._layers.append((fused, pair(f"{mixer}.dense"), pair(f"{mixer}.LayerNorm"),
                                 pair(f"{layer}.intermediate.dense"), pair(f"{layer}.output.dense"),
                                 pair(f"{layer}.output.LayerNorm")))

    @torch.inference_mode()
    def __call__(self, token_ids: Sequence[npt.NDArray[np.int32]], second: Sequence[int] | None = None,
                 fronts: Fronts | None = None) -> npt.NDArray[np.float32]:
        """Pooled vectors, float32 (N, D), of N tokenised texts sorted by length.

        `second`: of pairs of texts, the place where the second begins, for bodies that are told by a token type.
        `fronts`: what stands in front of every text, (N x F, D): of each the first token's state.
        """
        if self.pooling == "cls":
            pooled_ND = self._checked(token_ids, second, True, fronts).float()
        else:
            pooled_ND = self.pool(self.hidden_states(token_ids, second), token_ids)
        pooled: npt.NDArray[np.float32] = pooled_ND.cpu().numpy()
        return pooled

    @torch.inference_mode()
    def hidden_states(self, token_ids: Sequence[npt.NDArray[np.int32]], second: Sequence[int] | None = None,
                      fronts: Fronts | None = None) -> Tensor:
        """The last layer's state of every token, (T, D), of N tokenised texts sorted by length, end to end."""
        return self._checked(token_ids, second, False, fronts)

    def _checked(self, token_ids: Sequence[npt.NDArray[np.int32]], second: Sequence[int] | None, first_only: bool,
                 fronts: Fronts | None) -> Tensor:
        # The bare exponential takes half the time of a softmax on a CPU. Where scores leave its range
        # (about +-88, far outside what trained models give) the result is NaN and the batch runs again.
        bare = self.device.type == "cpu" and self._words.dtype != torch.float16
        hidden_TD = self._run(token_ids, second, bare, first_only, fronts)
        if bare and not torch.isfinite(hidden_TD).all():
            hidden_TD = self._run(token_ids, second, False, first_only, fronts)
        return hidden_TD

    def _run(self, token_ids: Sequence[npt.NDArray[np.int32]], second: Sequence[int] | None, bare: bool,
             first_only: bool, fronts: Fronts | None) -> Tensor:
        """The last layer's states of all tokens, (T, D), or of the first of each text or front, (N x F, D)."""
        groups = _groups(token_ids)
        masks = [None if fronts is None else fronts.mask(length).to(self.device, self._words.dtype)
                 for _, length in groups]
        ids = torch.from_numpy(np.concatenate(token_ids)).to(self.device, non_blocking=True)
        positions = torch.from_numpy(np.concatenate([places_of(len(one), fronts) for one in token_ids]))
        hidden_TD = F.embedding(ids, self._words)
        hidden_TD = hidden_TD + F.embedding(positions.to(self.device) + self._first_position, self._positions)
        if second is not None:
            typed = token_types(token_ids, second).to(self.device).unsqueeze(1)
            hidden_TD = torch.where(typed > 0, hidden_TD + self._second, hidden_TD)
        hidden_TD = self._norm(hidden_TD, self._first_norm)
        for number, (qkv, out, attention_norm, up, down, output_norm) in enumerate(self._layers, 1):
            if first_only and number == len(self._layers):  # what follows works on one row a text
                firsts = [0] if fronts is None else fronts.firsts
                hidden_TD, mixed_TD = _attend_first(hidden_TD, qkv, groups, self.heads, masks, firsts)
            else:
                mixed_TD = _attend(F.linear(hidden_TD, *qkv), groups, self.heads, bare, masks)
            hidden_TD = self._norm(F.linear(mixed_TD, *out).add_(hidden_TD), attention_norm)
            inner = F.gelu(F.linear(hidden_TD, *up))
            hidden_TD = self._norm(F.linear(inner, *down).add_(hidden_TD), output_norm)
        return hidden_TD

    @torch.inference_mode()
    def pool(self, hidden_TD: Tensor, token_ids: Sequence[npt.NDArray[np.int32]]) -> Tensor:
        """One vector a text, float32 (N, D), from the states of its tokens."""
        pooled, start = [], 0
        for texts, length in _groups(token_ids):
            block_NLD = hidden_TD[start:start + texts * length].view(texts, length, -1)
            pooled.append(block_NLD[:, 0].float() if self.pooling == "cls" else block_NLD.float().mean(dim=1))
            start += texts * length
        return torch.cat(pooled)

    def _norm(self, hidden_TD: Tensor, weight_bias: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(hidden_TD, (self.dimension,), *weight_bias, self._epsilon)


def token_types(token_ids: Sequence[npt.NDArray[np.int32]], second: Sequence[int]) -> Tensor:
    """0 for the tokens of each first text, 1 from the place where its second begins, texts end to end, (T,)."""
    return torch.from_numpy(np.concatenate([(np.arange(len(one)) >= place).astype(np.int32)
                                            for one, place in zip(token_ids, second, strict=True)]))


def _groups(token_ids: Sequence[npt.NDArray[np.int32]]) -> list[tuple[int, int]]:
    """(texts, tokens) of each run of texts that have one length."""
    return [(sum(1 for _ in same), length) for length, same in groupby(len(one) for one in token_ids)]


def _attend(qkv_T3D: Tensor, groups: Sequence[tuple[int, int]], heads: int, bare: bool, masks: Sequence[Tensor | None]
            ) -> Tensor:
    """Self-attention inside each text, (T, D), one dense block for all texts of a length.

    `bare`: weights are exp(score) over their sum, without subtracting the largest score first. `masks` (L, L) of each
    group are added to its scores.
    """
    tokens, width = qkv_T3D.shape[0], qkv_T3D.shape[1] // 3
    size = width // heads
    mixed_TD = qkv_T3D.new_empty(tokens, width)
    start = 0
    for (texts, length), mask_LL in zip(groups, masks, strict=True):
        end = start + texts * length
        query, key, value = qkv_T3D[start:end].view(texts, length, 3, heads, size).permute(2, 0, 3, 1, 4)
        if length <= PLAIN_ATTENTION_TOKENS:
            scores_NHLL = (query * size**-0.5) @ key.transpose(-1, -2)
            if mask_LL is not None:
                scores_NHLL += mask_LL
            if bare:
                weights_NHLL = scores_NHLL.exp_()
                block_NHLd = (weights_NHLL @ value).div_(weights_NHLL.sum(dim=-1, keepdim=True))
            else:
                block_NHLd = torch.softmax(scores_NHLL, dim=-1) @ value
        else:
            block_NHLd = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_LL)
        mixed_TD[start:end].view(texts, length, heads, size).copy_(block_NHLd.transpose(1, 2))
        start = end
    return mixed_TD


def _attend_first(hidden_TD: Tensor, qkv: tuple[Tensor, Tensor], groups: Sequence[tuple[int, int]], heads: int,
                  masks: Sequence[Tensor | None], places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(the states of the tokens at F places of each text, what they attend to), (N x F, D) each: F queries a text."""
    width, each = hidden_TD.shape[1], len(places)
    size, (weight, bias) = width // heads, qkv
    lengths = torch.tensor([length for texts, length in groups for _ in range(texts)], device=hidden_TD.device)
    starts = (lengths.cumsum(0) - lengths)[:, None]
    first_RD = hidden_TD[(starts + torch.tensor(places, device=starts.device)).flatten()]
    query_RD = F.linear(first_RD, weight[:width], bias[:width])
    both_T2D = F.linear(hidden_TD, weight[width:], bias[width:])
    mixed, start, row = [], 0, 0
    for (texts, length), mask_LL in zip(groups, masks, strict=True):
        key, value = both_T2D[start:start + texts * length].view(texts, length, 2, heads, size).permute(2, 0, 3, 1, 4)
        query = query_RD[row:row + texts * each].view(texts, each, heads, size).transpose(1, 2) * size**-0.5
        scores_NHFL = query @ key.transpose(-1, -2)
        if mask_LL is not None:
            scores_NHFL += mask_LL[list(places)]
        mixed.append((torch.softmax(scores_NHFL, dim=-1) @ value).transpose(1, 2).reshape(texts * each, width))
        start, row = start + texts * length, row + texts * each
    return first_RD, torch.cat(mixed)
