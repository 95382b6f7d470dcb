"""Rows of all workers, with gradients, over torch.distributed; without a process group there is one worker.

Workers may bring different numbers of rows. Collectives are called by every worker in the same
order and sizes are exchanged first, so that a fault of one worker's rows is an error of all and not a hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """The number of this worker, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many workers there are, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class RowCounts:
    """How many rows each worker brings, in the order of their ranks."""

    counts: tuple[int, ...]
    rank: int

    @property
    def total(self) -> int:
        """Rows of all workers."""
        return sum(self.counts)

    @property
    def own(self) -> slice:
        """Where this worker's rows are among all."""
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])


def exchange_counts(own: Sequence[int], device: torch.device) -> list[RowCounts]:
    """The counts of all workers for each of this worker's: every worker gives as many numbers."""
    if world_size() == 1:
        return [RowCounts((count,), 0) for count in own]
    mine = torch.tensor(list(own), dtype=torch.int64, device=device)
    found = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(found, mine)
    return [RowCounts(tuple(column), rank()) for column in torch.stack(found, dim=1).tolist()]


def gather_rows(rows: Tensor, counts: RowCounts) -> Tensor:
    """The rows (n, ...) of all workers one after the other, (total, ...), with gradients to every worker's own.

    The gradient of a worker's rows is the sum of what all workers' losses ask of them: with F_w the
    loss of worker w, backward gives d(sum_w F_w) / d(rows).
    """
    if len(counts.counts) == 1:
        return rows
    if len(rows) != counts.counts[counts.rank]:
        raise ValueError(f"{len(rows)} rows where {counts.counts[counts.rank]} were announced")
    gathered: Tensor = _GatherRows.apply(rows, counts)
    return gathered


def sum_over_workers(values: Tensor) -> Tensor:
    """The sum of `values` over the workers, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


class _GatherRows(torch.autograd.Function):
    """All rows; backward sums the gradients of all workers and keeps those of the own rows.

    torch's own gathering wants equal sizes, so rows are padded to the most that a worker has. The sum
    is an all-reduce: gloo has no reduce-scatter, and embeddings are small beside a model's gradients.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: RowCounts) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros((max(counts.counts), *rows.shape[1:]))
        padded[: len(rows)] = rows.detach()
        found = [torch.empty_like(padded) for _ in counts.counts]
        dist.all_gather(found, padded)
        return torch.cat([one[:count] for one, count in zip(found, counts.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed[ctx.counts.own].contiguous(), None
