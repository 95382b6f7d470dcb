"""Contrastive and distillation losses on scores, as pure functions of tensors.

Letters: B queries, C documents, D dimensions, s (B, C) scores, p(i) the place of query i's positive
among the documents. Every loss is given per query, (B,), so that the caller chooses over what it
averages: the queries of all workers, for example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from recsys_ray.evaluation.gate import GateConfig, decide
from recsys_ray.evaluation.significance import Comparison, Resampling, Units, compare

Similarity = Literal["cosine", "dot"]
GUIDE_ROUNDING = 1e-6       # of one score computed in two products


class TeacherError(ValueError):
    """A teacher that cannot be learned from: not shown to be better, or without the scores it should give."""


def scores(query_BD: Tensor, document_CD: Tensor, similarity: Similarity = "cosine") -> Tensor:
    """s_ic = q_i . d_c, (B, C); for `cosine` of both at unit length. Half precision is computed in float32."""
    query_BD, document_CD = _wide(query_BD), _wide(document_CD)
    if similarity == "cosine":
        query_BD, document_CD = F.normalize(query_BD, dim=-1), F.normalize(document_CD, dim=-1)
    return query_BD @ document_CD.T


def same_key(query_key_B: Tensor, document_key_C: Tensor) -> Tensor:
    """True where a document has the key of the query, (B, C): a near-duplicate group, or the hash of a text."""
    return query_key_B[:, None] == document_key_C[None, :]


def guided(guide_BC: Tensor, guide_positive_B: Tensor, margin: float = 0.0) -> Tensor:
    """True where g_ic >= g_ip(i) - margin, (B, C): the guide finds the document about as relevant as the positive.

    `guide_BC` are a guide's scores of the same pairs, `guide_positive_B` those of the positives.
    Solatorio, "GISTEmbed", arXiv 2402.16829, which leaves equal scores in; an exact duplicate has an
    equal score (up to rounding), so here it goes. True at the positive itself.
    """
    return guide_BC >= guide_positive_B[:, None] - margin - GUIDE_ROUNDING


def info_nce(scores_BC: Tensor, positive_B: Tensor, temperature: float, allowed_BC: Tensor | None = None,
             log_weights_BC: Tensor | None = None) -> Tensor:
    """The loss of each query, (B,): how surprising its positive is among its candidates.

        l_i = -log( exp(s_ip(i) / t) / sum_{c in A_i} w_ic exp(s_ic / t) )

    with the temperature t, the candidates A_i where `allowed_BC` is True (all without it; a positive
    always is one) and weights w = exp(log_weights_BC), 1 without it and for positives. A weight of n
    counts a document as n copies. van den Oord et al., arXiv 1807.03748; as "multiple negatives
    ranking" Henderson et al., arXiv 1705.00652, section 4.4.
    """
    logits_BC = scores_BC / temperature
    if log_weights_BC is not None:
        logits_BC = logits_BC + log_weights_BC
    if allowed_BC is not None:
        logits_BC = logits_BC.masked_fill(~allowed_BC, -torch.inf)
    return F.cross_entropy(logits_BC, positive_B, reduction="none")


def matryoshka(loss: Callable[[Tensor, Tensor], Tensor], query_BD: Tensor, document_CD: Tensor,
               weights: Mapping[int, float]) -> Tensor:
    """sum_d w_d loss(q[:d], x[:d]) over the first d dimensions of both, for each d -> w_d of `weights`.

    Kusupati et al., arXiv 2205.13147; a cosine is one of the shortened vectors. Raises `ValueError`
    for a d that the embeddings do not have.
    """
    wide = [size for size in weights if not 0 < size <= query_BD.shape[-1]]
    if wide or not weights:
        raise ValueError(f"matryoshka: sizes {wide or 'missing'}; embeddings have {query_BD.shape[-1]} dimensions")
    parts = [weight * loss(query_BD[..., :size], document_CD[..., :size]) for size, weight in weights.items()]
    return torch.stack(parts).sum(dim=0)


def margin_mse(student_BC: Tensor, teacher_BC: Tensor, positive_B: Tensor) -> Tensor:
    """The squared error of the margins of each query, (B,), over the documents that the teacher scored.

        l_i = mean_{c in T_i, c != p(i)} ( (s_ip(i) - s_ic) - (t_ip(i) - t_ic) )^2

    T_i are the documents whose teacher score is not NaN; a query without any but its positive gets 0.
    Hofstaetter et al., arXiv 2010.02666. Raises `TeacherError` where documents were scored and the positive was not.
    """
    known_BC = _known(teacher_BC, positive_B)
    others_BC = known_BC.scatter(1, positive_B[:, None], False)
    teacher_BC = torch.where(known_BC, teacher_BC, 0).to(student_BC.dtype)

    def margins(one_BC: Tensor) -> Tensor:
        return one_BC.gather(1, positive_B[:, None]) - one_BC

    error_BC = torch.where(others_BC, margins(student_BC) - margins(teacher_BC), 0) ** 2
    return error_BC.sum(dim=1) / others_BC.sum(dim=1).clamp(min=1)


def distillation_kl(student_BC: Tensor, teacher_BC: Tensor, positive_B: Tensor) -> Tensor:
    """KL divergence of the student's distribution from the teacher's for each query, (B,).

        l_i = sum_{c in T_i} P_ic (log P_ic - log S_ic),  P_i = softmax of t_i, S_i = softmax of s_i over T_i

    Both are logits: scores over their temperatures. T_i and errors as in `margin_mse`. Hinton et al.,
    arXiv 1503.02531; over a query's candidates Lin et al., arXiv 2010.11386.
    """
    known_BC = _known(teacher_BC, positive_B)
    alone_B = known_BC.sum(dim=1) < 2       # a distribution over one document teaches nothing, over none is NaN
    known_BC = known_BC | alone_B[:, None]
    teacher_BC = torch.where(known_BC, teacher_BC.nan_to_num(), -torch.inf).to(student_BC.dtype)
    student_BC = student_BC.masked_fill(~known_BC, -torch.inf)
    wanted_BC, got_BC = torch.log_softmax(teacher_BC, dim=1), torch.log_softmax(student_BC, dim=1)
    difference_BC = torch.where(known_BC, wanted_BC - got_BC, 0)    # -inf less -inf is no number
    return (wanted_BC.exp() * difference_BC).sum(dim=1).masked_fill(alone_B, 0)


def known_to_differ(anchor_BA: Tensor, positive_BA: Tensor, column_CA: Tensor) -> Tensor:
    """True where a column may stand as a row's negative, (B, C), judged by attributes; -1 stands for unknown.

    What makes a pair alike are the attributes on which anchor and positive are known to agree: a column that is not
    known to differ from the anchor in one of them may be as good as the positive. Where they agree on nothing that is
    known (views of one product), every column may.
    """
    shared_BA = (anchor_BA == positive_BA) & (anchor_BA >= 0)
    differ_BCA = (anchor_BA[:, None] != column_CA[None]) & (column_CA[None] >= 0) & shared_BA[:, None]
    return differ_BCA.any(dim=-1) | ~shared_BA.any(dim=-1)[:, None]


def attribute_cross_entropy(logits: Mapping[str, Tensor], codes_BA: Tensor, weights: Mapping[str, float]) -> Tensor:
    """The loss of each row, (B,): cross-entropies of its known attributes by weight (1 where none is given).

        l_i = sum_a w_a [a known] CE(logits_a, value_a) / sum_a w_a

    `logits` are (B, V) of each attribute in the order of the columns of `codes_BA`, -1 for an unknown value.
    """
    found = codes_BA.new_zeros(len(codes_BA), dtype=torch.float32)
    for column, (name, logits_BV) in enumerate(logits.items()):
        codes_B = codes_BA[:, column]
        each_B = F.cross_entropy(logits_BV.float(), codes_B.clamp(min=0), reduction="none")
        found = found + weights.get(name, 1.0) * torch.where(codes_B >= 0, each_B, 0.0)
    return found / max(sum(weights.get(name, 1.0) for name in logits), 1e-12)


def require_better_teacher(teacher: npt.ArrayLike, student: npt.ArrayLike, units: Units | None = None,
                           gate: GateConfig | None = None, resampling: Resampling | None = None) -> Comparison:
    """The paired comparison of a teacher with its student, if it shows the teacher to be better.

    `teacher` and `student` are one metric of the same N queries, (N,), higher is better, NaN where it is
    undefined; `units` are what the bootstrap draws (by default queries). Raises `TeacherError` when the
    difference is not above the gate's margin with its whole interval: a teacher that is as good as
    the student hands down its mistakes.
    """
    better, worse = np.asarray(teacher, dtype=np.float64), np.asarray(student, dtype=np.float64)
    if better.ndim != 1 or better.shape != worse.shape:
        raise TeacherError(f"a metric of shape {better.shape} for the teacher and {worse.shape} for the student: "
                           "give one value a query, in the same order")
    comparison = compare(better, worse, units or Units.rows(len(better)), resampling or Resampling())
    verdict = decide(comparison, gate or GateConfig())
    if not verdict.passed:
        raise TeacherError(f"the teacher is not measurably better than the student ({verdict.outcome}): "
                           f"{verdict.reason}. Take a better teacher, or more queries to tell them apart")
    return comparison


def _known(teacher_BC: Tensor, positive_B: Tensor) -> Tensor:
    """Where the teacher gave a score, (B, C)."""
    known_BC = ~teacher_BC.isnan()
    without = known_BC.any(dim=1) & ~known_BC.gather(1, positive_B[:, None])[:, 0]
    if without.any():
        raise TeacherError(f"the teacher scored documents of query {int(without.nonzero()[0])} and not its positive")
    return known_BC


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
