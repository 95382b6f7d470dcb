"""Gathering of rows and its gradient: alone, and among workers that bring different numbers of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contrastive_cases import GATHERED, gather, start_workers

from recsys_ray.training.distributed import (
    RowCounts,
    exchange_counts,
    gather_rows,
    rank,
    sum_over_workers,
    world_size,
)


def test_without_a_group_there_is_one_worker() -> None:
    assert (rank(), world_size()) == (0, 1)
    (counts,) = exchange_counts([3], torch.device("cpu"))
    assert (counts.total, counts.own) == (3, slice(0, 3))
    rows = torch.ones(3, 2, requires_grad=True)
    assert gather_rows(rows, counts) is rows
    assert sum_over_workers(torch.tensor([1.0, 2.0])).tolist() == [1, 2]


def test_own_rows_follow_those_of_lower_ranks() -> None:
    counts = RowCounts((2, 0, 5), 2)
    assert (counts.total, counts.own) == (7, slice(2, 7))
    assert RowCounts((2, 0, 5), 1).own == slice(2, 2)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return start_workers(gather, len(GATHERED), tmp_path_factory.mktemp("gather"))


def test_every_worker_has_the_rows_of_all_in_order(workers: list[dict[str, Any]]) -> None:
    """Worker w brings GATHERED[w] rows that hold 10 w, 10 w + 1, ..."""
    wanted = [[10.0 * worker + row] * 2 for worker, count in enumerate(GATHERED) for row in range(count)]
    for number, found in enumerate(workers):
        assert found["rows"].tolist() == wanted
        assert found["ids"].tolist() == [int(one[0]) for one in wanted]
        assert found["counts"] == [list(GATHERED), [7] * len(GATHERED)]
        assert found["sum"].tolist() == [sum(range(len(GATHERED))), len(GATHERED)]
        assert found["rank"] == number


def test_a_row_gets_the_gradients_of_all_workers(workers: list[dict[str, Any]]) -> None:
    """F_w = (w + 1) sum_k (k + 1) x_k^2 / 2 over all rows k: d sum_w F_w / d x_k = (k + 1) x_k sum_w (w + 1)."""
    factor, place = sum(range(1, len(GATHERED) + 1)), 0
    for number, found in enumerate(workers):
        for row in range(GATHERED[number]):
            assert found["gradient"][row].tolist() == [(place + 1) * (10.0 * number + row) * factor] * 2
            place += 1


def test_rows_have_to_be_as_many_as_announced(workers: list[dict[str, Any]], tmp_path: Path) -> None:
    assert all("were announced" in found["error"] for found in workers)
