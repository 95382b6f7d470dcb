"""The parts of a transformer layer on packed texts, with gradients: few passes over memory, few saved tensors.

Texts lie end to end, so nothing is padded outside attention. There, texts of like length share a
block, padded by so little that it costs less than a further block would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from recsys_ray.models.counter_dropout import keep_mask, keep_scale, masked_
from recsys_ray.models.fronts import Fronts

WASTED_SCORES = 4096    # padded (query, key) places a head may add to a block: about what one more block costs


@dataclass(frozen=True)
class Block:
    """Texts that attend together: `texts` of at most `length` tokens, in the packed rows `start` to `end`."""

    start: int
    end: int
    texts: int
    length: int
    rows: Tensor | None = None      # (texts * length,) packed row of each place; padding repeats the last token
    places: Tensor | None = None    # (end - start,) place of each packed row
    padding: Tensor | None = None   # (texts, 1, 1, length), 0 or -inf
    mask: Tensor | None = None      # (length, length), 0 or -inf: what sees what, beside padding

    def gather(self, packed_TX: Tensor) -> Tensor:
        """The rows of a packed tensor as (texts, length, X)."""
        block = packed_TX[self.start:self.end] if self.rows is None else packed_TX.index_select(0, self.rows)
        return block.view(self.texts, self.length, *packed_TX.shape[1:])

    def scatter(self, block_NLX: Tensor, packed_TX: Tensor) -> None:
        """Write (texts, length, X) to the rows of a packed tensor, padding left out."""
        flat = block_NLX.reshape(self.texts * self.length, -1)
        packed_TX[self.start:self.end] = flat if self.places is None else flat.index_select(0, self.places)

    def masked_(self, scores: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Scores (texts, heads, length, length), or of some `rows` of each text; in place, -inf where none sees."""
        if self.padding is not None:
            scores += self.padding.to(scores.dtype)
        if self.mask is not None:
            scores += (self.mask if rows is None else self.mask[list(rows)]).to(scores.dtype)
        return scores


def plan_blocks(lengths: Sequence[int], device: torch.device, fronts: Fronts | None = None) -> list[Block]:
    """The attention blocks of texts laid end to end by falling length."""
    blocks, first, start = [], 0, 0
    while first < len(lengths):
        longest, last, waste = lengths[first], first + 1, 0
        while last < len(lengths):
            waste += longest**2 - lengths[last]**2
            if waste > WASTED_SCORES:
                break
            last += 1
        some = lengths[first:last]
        blocks.append(_block(start, some, device, None if fronts is None else fronts.mask(longest).to(device)))
        start += sum(some)
        first = last
    return blocks


def _block(start: int, lengths: Sequence[int], device: torch.device, mask: Tensor | None) -> Block:
    longest, total = lengths[0], sum(lengths)
    if lengths[-1] == longest:
        return Block(start, start + total, len(lengths), longest, mask=mask)
    sizes = np.asarray(lengths)
    columns = np.arange(longest)
    real = columns < sizes[:, None]
    firsts = start + np.cumsum(sizes) - sizes
    rows = (firsts[:, None] + np.minimum(columns, sizes[:, None] - 1)).reshape(-1)
    padding = np.where(real, np.float32(0), np.float32(-np.inf))[:, None, None, :]
    return Block(start, start + total, len(lengths), longest, torch.from_numpy(rows).to(device),
                 torch.from_numpy(np.flatnonzero(real)).to(device), torch.from_numpy(padding).to(device), mask)


# --- linear ---------------------------------------------------------------------------------------
class WorkingWeights:
    """The weights of linear layers and norms in the computing type, converted once for one forward pass.

    For one pass only: a fused optimizer changes parameters without raising their version counters, so
    there is nothing to see by whether a conversion is still right.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype      # None: as the parameters are
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, *modules: nn.Module) -> tuple[Tensor, Tensor]:
        """(weight, bias) of modules put side by side, without gradient."""
        held = self._held.get(id(modules[0]))
        if held is None:
            with torch.no_grad():
                held = self._joined([m.weight for m in modules]), self._joined([m.bias for m in modules])
            self._held[id(modules[0])] = held
        return held

    def _joined(self, parameters: Sequence[Any]) -> Tensor:
        parts = [one.detach().to(self.dtype or one.dtype) for one in parameters]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, weight)
        ctx.parameters = [(one.shape[0], one.dtype) for one in parameters]
        return F.linear(x_TI, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x_TI, weight = ctx.saved_tensors
        grad_TO, needed, count = gradients[0], ctx.needs_input_grad, len(ctx.parameters) // 2
        sizes = [size for size, _ in ctx.parameters[:count]]
        found: list[Tensor | None] = [None] * (2 * count)
        if any(needed[3:3 + count]):
            found[:count] = torch.split(grad_TO.t() @ x_TI, sizes)
        if any(needed[3 + count:]):
            found[count:] = torch.split(grad_TO.sum(0, dtype=_summing(grad_TO.dtype)), sizes)
        grads = [one.to(dtype) if one is not None and need else None
                 for one, (_, dtype), need in zip(found, ctx.parameters, needed[3:], strict=True)]
        return grad_TO @ weight if needed[0] else None, None, None, *grads


def linear(x_TI: Tensor, working: WorkingWeights, *modules: nn.Module) -> Tensor:
    """The outputs of linear layers side by side, (T, O); anything else than a plain layer computes for itself."""
    if all(type(module) is nn.Linear for module in modules):
        weight, bias = working(*modules)
        return _Linear.apply(x_TI, weight, bias, *[m.weight for m in modules],  # type: ignore[no-any-return]
                             *[m.bias for m in modules])
    with torch.autocast(x_TI.device.type, dtype=x_TI.dtype, enabled=x_TI.dtype in (torch.bfloat16, torch.float16)):
        return torch.cat([module(x_TI) for module in modules], dim=-1).to(x_TI.dtype)


def _summing(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


# --- residual, dropout and norm -------------------------------------------------------------------
@dataclass(frozen=True)
class Dropout:
    """Dropout of one forward pass: a key for each token, None where nothing is dropped."""

    keys: Tensor | None      # (T,)
    hidden: float
    attention: float

    def hidden_keep(self, site: int, width: int) -> Tensor | None:
        """The mask (T, width) of token states at one place of the network."""
        if self.keys is None or not self.hidden:
            return None
        return keep_mask(self.keys, site, width, self.hidden)

    def take(self, start: int, end: int) -> Dropout:
        """The same for tokens `start` to `end`."""
        return self if self.keys is None else Dropout(self.keys[start:end], self.hidden, self.attention)

    def at(self, rows: Tensor) -> Dropout:
        """The same for the tokens in some rows."""
        return self if self.keys is None else Dropout(self.keys[rows], self.hidden, self.attention)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, residual_TD: Tensor, keep: Tensor | None, rate: float, epsilon: float,
                weight: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
        scale = keep_scale(rate) if keep is not None else 1.0
        dropped = x_TD if keep is None else masked_(x_TD.clone(), keep)
        summed = torch.add(residual_TD, dropped, alpha=scale)
        out, mean, rstd = torch.native_layer_norm(summed, [summed.shape[-1]], weight, bias, epsilon)
        ctx.save_for_backward(summed, mean, rstd, weight, bias, *([] if keep is None else [keep]))
        ctx.scale, ctx.dtypes = scale, [one.dtype for one in parameters]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        summed, mean, rstd, weight, bias, *keep = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            gradients[0], summed, [summed.shape[-1]], mean, rstd, weight, bias, [True, needed[7], needed[8]])
        grad_x = masked_(grad * ctx.scale, keep[0]) if keep else grad
        return (grad_x, grad, None, None, None, None, None,
                *[None if one is None else one.to(dtype)
                  for one, dtype in zip((grad_weight, grad_bias), ctx.dtypes, strict=True)])


def add_norm(x_TD: Tensor, residual_TD: Tensor, dropout: Dropout, site: int, norm: nn.LayerNorm,
             working: WorkingWeights) -> Tensor:
    """norm(residual + dropout(x)), (T, D)."""
    keep = dropout.hidden_keep(site, x_TD.shape[1])
    out: Tensor = _AddNorm.apply(x_TD, residual_TD, keep, dropout.hidden, norm.eps, *working(norm), norm.weight,
                                 norm.bias)
    return out


# --- attention ------------------------------------------------------------------------------------
class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_T3D: Tensor, blocks: Sequence[Block], heads: int, dropout: Dropout, site: int) -> Tensor:
        width = qkv_T3D.shape[1] // 3
        out_TD, saved = qkv_T3D.new_empty(qkv_T3D.shape[0], width), []
        for block in blocks:
            query, key, value = split_heads(block, qkv_T3D, heads).contiguous()
            weights = torch.softmax(block.masked_((query * query.shape[-1]**-0.5) @ key.transpose(-1, -2)), dim=-1)
            keep = _attention_keep(block, dropout, site, heads)
            mixed = _dropped(weights, keep) @ value
            if keep is not None:
                mixed *= keep_scale(dropout.attention)
            block.scatter(mixed.transpose(1, 2), out_TD)
            saved += [query, key, value, weights, *([] if keep is None else [keep])]
        ctx.save_for_backward(*saved)
        ctx.blocks, ctx.scale, ctx.kept = blocks, keep_scale(dropout.attention), keep is not None
        return out_TD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        grad_TD = gradients[0]
        out_T3D = grad_TD.new_empty(grad_TD.shape[0], 3 * grad_TD.shape[1])
        saved, each = ctx.saved_tensors, 5 if ctx.kept else 4
        for number, block in enumerate(ctx.blocks):
            query, key, value, weights, *keeps = saved[number * each:(number + 1) * each]
            keep, heads, size = keeps[0] if keeps else None, query.shape[1], query.shape[-1]
            grad = block.gather(grad_TD).view(block.texts, block.length, heads, size).transpose(1, 2)
            if block.padding is not None:   # the places of padding repeat a token whose gradient counts once
                grad = grad * (block.padding == 0).to(grad.dtype).transpose(-1, -2)
            if keep is not None:
                grad = grad * ctx.scale
            grad_weights = _dropped_(grad @ value.transpose(-1, -2), keep)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_scores *= size**-0.5
            parts = torch.stack([grad_scores @ key, grad_scores.transpose(-1, -2) @ query,
                                 _dropped(weights, keep).transpose(-1, -2) @ grad])
            block.scatter(parts.permute(1, 3, 0, 2, 4), out_T3D)
        return out_T3D, None, None, None, None


def split_heads(block: Block, qkv_T3D: Tensor, heads: int) -> Tensor:
    """Queries, keys and values of a block, (3, texts, heads, length, size)."""
    size = qkv_T3D.shape[1] // 3 // heads
    return block.gather(qkv_T3D).view(block.texts, block.length, 3, heads, size).permute(2, 0, 3, 1, 4)


def _attention_keep(block: Block, dropout: Dropout, site: int, heads: int) -> Tensor | None:
    if dropout.keys is None or not dropout.attention:
        return None
    keys_NL = block.gather(dropout.keys.unsqueeze(-1)).squeeze(-1)
    keys_NHL = keys_NL[:, None, :] + torch.arange(heads, device=keys_NL.device)[None, :, None]
    return keep_mask(keys_NHL, site, block.length, dropout.attention)


def _dropped(weights: Tensor, keep: Tensor | None) -> Tensor:
    return weights if keep is None else masked_(weights.clone(), keep)


def _dropped_(weights: Tensor, keep: Tensor | None) -> Tensor:
    return weights if keep is None else masked_(weights, keep)


def attend(qkv_T3D: Tensor, blocks: Sequence[Block], heads: int, dropout: Dropout, site: int) -> Tensor:
    """Self-attention inside each text, (T, D), from the queries, keys and values of packed texts."""
    out: Tensor = _Attend.apply(qkv_T3D, blocks, heads, dropout, site)
    return out


def attend_first(query_RD: Tensor, both_T2D: Tensor, blocks: Sequence[Block], heads: int, dropout: Dropout, site: int,
                 rows: Sequence[int] = (0,)) -> Tensor:
    """What some tokens of each text attend to, (R, D), from their queries and all keys and values.

    `rows` are their places in a text, the first one unless said otherwise; all of a text follow each other.
    `dropout` has the keys of these tokens; the masks are those that `attend` draws for them.
    """
    width, parts, start = query_RD.shape[1], [], 0
    size, each = width // heads, len(rows)
    for block in blocks:
        key, value = block.gather(both_T2D).view(block.texts, block.length, 2, heads, size).permute(2, 0, 3, 1, 4)
        end = start + block.texts * each
        query = query_RD[start:end].view(block.texts, each, heads, size).transpose(1, 2)
        weights = torch.softmax(block.masked_((query * size**-0.5) @ key.transpose(-1, -2), rows), dim=-1)
        if dropout.keys is not None and dropout.attention:
            keys_NHF = dropout.keys[start:end].view(block.texts, 1, each) + torch.arange(
                heads, device=weights.device)[None, :, None]
            keep = keep_mask(keys_NHF, site, block.length, dropout.attention)
            weights = weights * masked_(torch.full_like(weights, keep_scale(dropout.attention)), keep)
        parts.append((weights @ value).transpose(1, 2).reshape(block.texts * each, width))
        start = end
    return torch.cat(parts)


def attend_fused(qkv_T3D: Tensor, blocks: Sequence[Block], heads: int, dropout: Dropout) -> Tensor:
    """The same through torch's own kernels, which never hold the scores; their dropout draws from torch's generator."""
    rate, parts = dropout.attention if dropout.keys is not None else 0.0, []
    for block in blocks:
        query, key, value = split_heads(block, qkv_T3D, heads)
        unseen = None
        if block.padding is not None or block.mask is not None:
            unseen = block.masked_(query.new_zeros(block.texts, 1, block.length, block.length))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=unseen, dropout_p=rate)
        flat_TD = mixed.transpose(1, 2).reshape(block.texts * block.length, -1)
        parts.append(flat_TD if block.places is None else flat_TD.index_select(0, block.places))
    return torch.cat(parts)
