"""Losses of listed candidates: G queries with up to L scored candidates each -> one number a query.

Scores and labels are (G, L); `real_GL` is False where a query has fewer candidates. Labels are 0 or 1, or
gains. sentence-transformers has all but the last; its classes are the tests' oracle, and are not used because
they tokenise and run the model themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

LossName = Literal["bce", "lambda", "listnet", "ranknet", "infonce"]
RankingLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
MU = 10.0       # weight of the NDCG-Loss2 part of NDCG-Loss2++
AWAY = -1e30    # a score that no real one reaches


def bce(scores_GL: Tensor, labels_GL: Tensor, real_GL: Tensor) -> Tensor:
    """The mean binary cross-entropy of each query's candidates, (G,); a label between 0 and 1 is a probability."""
    each_GL = F.binary_cross_entropy_with_logits(scores_GL, labels_GL, reduction="none")
    return (each_GL * real_GL).sum(dim=1) / real_GL.sum(dim=1)


def listnet(scores_GL: Tensor, labels_GL: Tensor, real_GL: Tensor) -> Tensor:
    """The cross-entropy of softmax(scores) under softmax(labels), (G,). Cao et al., ICML 2007, top-one form."""
    wanted_GL = labels_GL.masked_fill(~real_GL, -torch.inf).softmax(dim=1)
    return -(wanted_GL * scores_GL.masked_fill(~real_GL, AWAY).log_softmax(dim=1)).sum(dim=1)


def ranknet(scores_GL: Tensor, labels_GL: Tensor, real_GL: Tensor) -> Tensor:
    """The mean of log2(1 + exp(s_j - s_i)) over pairs with y_i > y_j, (G,); 0 without pairs. Burges et al., 2005."""
    return _pairwise(scores_GL, labels_GL, real_GL, lambda ranked_GL: torch.ones((), device=ranked_GL.device))


def lambda_loss(scores_GL: Tensor, labels_GL: Tensor, real_GL: Tensor) -> Tensor:
    """RankNet's pairs weighted by NDCG-Loss2++, (G,); 0 without pairs. Wang et al., CIKM 2018, section 4.3.

        w_ij = (mu |1/D(|i - j|) - 1/D(|i - j| + 1)| + |1/D(i) - 1/D(j)|) |G_i - G_j|

    with ranks i, j under the scores as they are, D(r) = log2(1 + r), gains G = (2^y - 1) / ideal DCG.
    """
    return _pairwise(scores_GL, labels_GL, real_GL, _lambda_weights)


def _pairwise(scores_GL: Tensor, labels_GL: Tensor, real_GL: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    ranked_GL, order_GL = scores_GL.masked_fill(~real_GL, AWAY).sort(dim=1, descending=True, stable=True)
    labels_GL = labels_GL.masked_fill(~real_GL, -torch.inf).gather(1, order_GL)
    better_GLL = (labels_GL[:, :, None] > labels_GL[:, None, :]) & torch.isfinite(labels_GL)[:, None, :]
    margins_GLL = (ranked_GL[:, :, None] - ranked_GL[:, None, :]).masked_fill(~better_GLL, 0)
    losses_GLL = -(weigh(labels_GL.clamp(min=0)) * F.logsigmoid(margins_GLL) / math.log(2)).masked_fill(~better_GLL, 0)
    return losses_GLL.sum(dim=(1, 2)) / better_GLL.sum(dim=(1, 2)).clamp(min=1)


def _lambda_weights(labels_GL: Tensor) -> Tensor:
    """Of the labels in order of the scores, (G, L, L)."""
    ranks_L = torch.arange(1, labels_GL.shape[1] + 1, device=labels_GL.device)
    inverse_L = 1 / torch.log2(1.0 + ranks_L)
    ideal_G1 = ((2 ** labels_GL.sort(dim=1, descending=True).values - 1) * inverse_L).sum(dim=1, keepdim=True)
    gains_GL = (2 ** labels_GL - 1) / ideal_G1.clamp(min=1e-10)
    apart_LL = (ranks_L[:, None] - ranks_L[None, :]).abs()
    further_LL = 1 / torch.log2(1.0 + apart_LL.clamp(min=1)) - 1 / torch.log2(2.0 + apart_LL)
    further_LL = further_LL.masked_fill(apart_LL == 0, 0)
    swap_LL = (inverse_L[:, None] - inverse_L[None, :]).abs()
    return (MU * further_LL + swap_LL) * (gains_GL[:, :, None] - gains_GL[:, None, :]).abs()


def infonce(scores_GL: Tensor, labels_GL: Tensor, real_GL: Tensor) -> Tensor:
    """How surprising each better candidate is among itself and all worse ones, (G,); 0 without both.

        l = sum_i y_i log(1 + sum_{j: y_j < y_i} exp(s_j - s_i)) / sum_i y_i

    over the candidates i that are better than some other. Several positives do not compete with each
    other; one positive gives the usual listwise InfoNCE (arXiv 2409.07691, section 3).
    """
    worse_GLL = (labels_GL[:, None, :] < labels_GL[:, :, None]) & real_GL[:, None, :] & real_GL[:, :, None]
    margins_GLL = (scores_GL[:, None, :] - scores_GL[:, :, None]).masked_fill(~worse_GLL, -torch.inf)
    own_GL1 = torch.zeros_like(scores_GL)[:, :, None]
    each_GL = torch.cat([own_GL1, margins_GLL], dim=2).logsumexp(dim=2)
    weights_GL = labels_GL * worse_GLL.any(dim=2)
    return (weights_GL * each_GL).sum(dim=1) / weights_GL.sum(dim=1).clamp(min=1e-10)


LOSSES: dict[str, RankingLoss] = {
    "bce": bce, "lambda": lambda_loss, "listnet": listnet, "ranknet": ranknet, "infonce": infonce}


def in_rows(values: Tensor, sizes: list[int]) -> Tensor:
    """Values of groups end to end, (N,), as (G, L) filled up with 0."""
    return torch.nn.utils.rnn.pad_sequence(list(torch.split(values, sizes)), batch_first=True)
