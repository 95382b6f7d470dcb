"""BERT and XLM-RoBERTa without padding: texts of a batch lie end to end, attention runs per length.

The texts of a batch are sorted by length, so those of one length are neighbours and form a dense
(texts, tokens) block: no padding is computed and no mask is needed. Query, key and value are one
matrix product.

On a CPU, oneDNN compiles a kernel for each shape of a bf16 product, a millisecond and some 0.6 MB that it keeps: a
service whose every request has another number of tokens grows by a gigabyte. So products have one of few numbers of
rows (`rows_of`), the last ones empty, and attention goes through PyTorch's fused kernel, which compiles nothing.
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

FEWEST_ROWS, MOST_EMPTY = 8, 64     # of a matrix product; the number of rows that are added at most
WARM_LENGTH = 32                    # of a text that is computed for its shape alone


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
            pooled_ND = self._run(token_ids, second, True, fronts).float()
        else:
            pooled_ND = self.pool(self.hidden_states(token_ids, second), token_ids)
        pooled: npt.NDArray[np.float32] = pooled_ND.cpu().numpy()
        return pooled

    @torch.inference_mode()
    def hidden_states(self, token_ids: Sequence[npt.NDArray[np.int32]], second: Sequence[int] | None = None,
                      fronts: Fronts | None = None) -> Tensor:
        """The last layer's state of every token, (T, D), of N tokenised texts sorted by length, end to end."""
        return self._run(token_ids, second, False, fronts)

    def warm_up(self, tokens: int) -> None:
        """Have the kernels compiled that batches of up to `tokens` tokens need, so that no request waits for one."""
        if self.device.type != "cpu" or self._words.dtype != torch.bfloat16:
            return
        for rows in sorted({rows_of(one) for one in range(1, tokens + 1)}):
            lengths = [WARM_LENGTH] * (rows // WARM_LENGTH) + [rows % WARM_LENGTH]
            self([np.zeros(one, np.int32) for one in lengths if one])
            if rows * WARM_LENGTH <= 2 * tokens:        # so many texts may come together
                self([np.zeros(1, np.int32)] * rows)

    def _run(self, token_ids: Sequence[npt.NDArray[np.int32]], second: Sequence[int] | None, first_only: bool,
             fronts: Fronts | None) -> Tensor:
        """The last layer's states of all tokens, (T, D), or of the first of each text or front, (N x F, D)."""
        groups = _groups(token_ids)
        masks = [None if fronts is None else fronts.mask(length).to(self.device, self._words.dtype)
                 for _, length in groups]
        wanted = sum(map(len, token_ids))
        empty = np.zeros(rows_of(wanted) - wanted, np.int32)    # from here on T counts these as well
        ids = torch.from_numpy(np.concatenate([*token_ids, empty])).to(self.device, non_blocking=True)
        positions = torch.from_numpy(np.concatenate([*(places_of(len(one), fronts) for one in token_ids), empty]))
        hidden_TD = F.embedding(ids, self._words)
        hidden_TD = hidden_TD + F.embedding(positions.to(self.device) + self._first_position, self._positions)
        if second is not None:
            typed = F.pad(token_types(token_ids, second), (0, len(empty))).to(self.device).unsqueeze(1)
            hidden_TD = torch.where(typed > 0, hidden_TD + self._second, hidden_TD)
        hidden_TD = self._norm(hidden_TD, self._first_norm)
        for number, (qkv, out, attention_norm, up, down, output_norm) in enumerate(self._layers, 1):
            if first_only and number == len(self._layers):  # what follows works on one row a text
                firsts = [0] if fronts is None else fronts.firsts
                wanted = len(token_ids) * len(firsts)
                hidden_TD, mixed_TD = _attend_first(hidden_TD, qkv, groups, self.heads, masks, firsts)
            else:
                mixed_TD = _attend(F.linear(hidden_TD, *qkv), groups, self.heads, masks)
            hidden_TD = self._norm(F.linear(mixed_TD, *out).add_(hidden_TD), attention_norm)
            inner = F.gelu(F.linear(hidden_TD, *up))
            hidden_TD = self._norm(F.linear(inner, *down).add_(hidden_TD), output_norm)
        return hidden_TD[:wanted]

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


def rows_of(wanted: int) -> int:
    """The rows of a product of which `wanted` are needed: 16 numbers from 512 to 1,024, every 64th beyond."""
    step = min(max(FEWEST_ROWS, 1 << max(wanted.bit_length() - 5, 0)), MOST_EMPTY)
    return -(-wanted // step) * step


def _attend(qkv_T3D: Tensor, groups: Sequence[tuple[int, int]], heads: int, masks: Sequence[Tensor | None]) -> Tensor:
    """Self-attention inside each text, (T, D), one dense block for all texts of a length.

    `masks` (L, L) of each group are added to its scores. What stands behind the last group is 0.
    """
    tokens, width = qkv_T3D.shape[0], qkv_T3D.shape[1] // 3
    mixed_TD = qkv_T3D.new_empty(tokens, width)
    start = 0
    for (texts, length), mask_LL in zip(groups, masks, strict=True):
        end = start + texts * length
        query, key, value = qkv_T3D[start:end].view(texts, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        block_NHLd = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_LL)
        mixed_TD[start:end].view(texts, length, heads, -1).copy_(block_NHLd.transpose(1, 2))
        start = end
    mixed_TD[start:] = 0
    return mixed_TD


def _attend_first(hidden_TD: Tensor, qkv: tuple[Tensor, Tensor], groups: Sequence[tuple[int, int]], heads: int,
                  masks: Sequence[Tensor | None], places: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(the states of the tokens at F places of each text, what they attend to), (N x F, D) each: F queries a text.

    Both have as many rows as `rows_of` says; those behind the last text are of no use.
    """
    width, each = hidden_TD.shape[1], len(places)
    weight, bias = qkv
    lengths = torch.tensor([length for texts, length in groups for _ in range(texts)], device=hidden_TD.device)
    wanted = len(lengths) * each
    starts = (lengths.cumsum(0) - lengths)[:, None]
    chosen = (starts + torch.tensor(places, device=starts.device)).flatten()
    first_RD = hidden_TD[F.pad(chosen, (0, rows_of(wanted) - wanted))]
    query_RD = F.linear(first_RD, weight[:width], bias[:width])
    both_T2D = F.linear(hidden_TD, weight[width:], bias[width:])
    mixed_RD = torch.zeros_like(first_RD)
    start, row = 0, 0
    for (texts, length), mask_LL in zip(groups, masks, strict=True):
        end, last = start + texts * length, row + texts * each
        key, value = both_T2D[start:end].view(texts, length, 2, heads, -1).permute(2, 0, 3, 1, 4)
        query = query_RD[row:last].view(texts, each, heads, -1).transpose(1, 2)
        mask_FL = None if mask_LL is None else mask_LL[list(places)]
        block_NHFd = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_FL)
        mixed_RD[row:last] = block_NHFd.transpose(1, 2).reshape(texts * each, width)
        start, row = end, last
    return first_RD, mixed_RD
