"""A model without layers, a batch with planted false negatives, and its division over two spawned workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from recsys_ray.models.bge_m3 import BgeM3
from recsys_ray.models.bge_m3_heads import BgeM3Heads
from recsys_ray.training.bge import FinetuneBgeConfig
from recsys_ray.training.bge_m3 import BgeM3LossConfig, bge_m3_backward
from recsys_ray.training.contrastive import ContrastiveConfig, PairBatch
from recsys_ray.training.encoder_run import train_worker

SPECIAL = (0, 1, 2)


class Lookup(torch.nn.Module):
    """A body without layers: the state of a token is its embedding and the mean of the text's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(12, 8)

    def hidden_states(self, token_ids: list[np.ndarray]) -> tuple[torch.Tensor, list[int]]:
        found = [self.embedding(torch.from_numpy(one)) for one in token_ids]
        return torch.cat([one + one.mean(dim=0) for one in found]), [len(one) for one in token_ids]


def a_model() -> BgeM3:
    torch.manual_seed(1)
    return BgeM3(Lookup(), BgeM3Heads.new(8, 4), SPECIAL).double()


def whole_batch() -> PairBatch:
    """Five queries; documents with a hard negative, a product that comes twice and a text that comes twice."""
    rng = np.random.default_rng(6)
    queries = [np.array([0, *rng.integers(3, 12, size), 2], np.int32) for size in (1, 3, 2, 5, 0)]
    documents = [np.array([0, *rng.integers(3, 12, size), 2], np.int32) for size in (4, 0, 6, 6, 1, 2, 9)]
    return PairBatch(queries, documents, positive=np.arange(5), query_group=np.array([1, 2, 1, 3, 4]),
                     document_group=np.array([1, 2, 1, 3, 4, 5, 2]), document_text=np.array([1, 2, 3, 4, 4, 5, 6]),
                     negative_of=np.array([-1, -1, -1, -1, -1, 0, 4]))


def share(rank: int) -> PairBatch:
    """What each of two workers brings of `whole_batch`: two queries and three, each with its hard negative."""
    whole = whole_batch()
    queries, documents = ([0, 1], [0, 1, 5]) if rank == 0 else ([2, 3, 4], [2, 3, 4, 6])
    return PairBatch([whole.query_tokens[i] for i in queries], [whole.document_tokens[i] for i in documents],
                     np.arange(len(queries)), whole.query_group[queries], whole.document_group[documents],
                     whole.document_text[documents],
                     np.array([-1] * len(queries) + [0 if rank == 0 else 2]))


def work(rank: int, world: int) -> dict[str, Any]:
    """The step of one of two workers through DistributedDataParallel, plain and in chunks."""
    found = {}
    for size in (None, 2):
        model = torch.nn.parallel.DistributedDataParallel(a_model())
        config = ContrastiveConfig(mini_batch=size, temperature=0.1)
        values, parts = bge_m3_backward(model, share(rank), BgeM3LossConfig(), config, sync=model.no_sync)
        found[str(size)] = {"loss": values.loss, "masked": values.masked_share, "accuracy": values.accuracy, **parts,
                            "gradients": [one.grad for one in model.parameters()]}
    return found


def train(settings: dict[str, Any], staging: str, shards_version: str, rank: int, world: int) -> dict[str, Any]:
    """One worker's part in a whole run."""
    train_worker(FinetuneBgeConfig.model_validate(settings), staging, shards_version, "a run")
    return {}
