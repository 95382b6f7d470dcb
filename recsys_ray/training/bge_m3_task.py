"""Training of BGE-M3's three scores at once: the task of a fine-tuning whose encoder has, or is to get, both heads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from recsys_ray.models.bge_m3 import BgeM3, TokenIds, TokenStates
from recsys_ray.models.bge_m3_heads import BgeM3Heads, multi_dimension
from recsys_ray.models.sentence_layout import find_model, read_layout
from recsys_ray.training.bge import (
    BgeTask,
    FinetuneBgeConfig,
    false_negative_share,
    refuse_other_similarity,
    tokens_of,
    trainable_config,
)
from recsys_ray.training.bge_m3 import Scores, bge_m3_backward, joined_states, scores
from recsys_ray.training.distributed import rank, world_size
from recsys_ray.training.mini_catalogue import TEXTS_AT_ONCE, figures
from recsys_ray.training.pair_shards import PairShards

log = logging.getLogger(__name__)

COUNTED_TEXTS = 20_000      # documents whose words are counted for the first sparse head
FITTED_TEXTS = 256          # documents on whose tokens it is fitted
EVALUATED_QUERIES = 64      # scored at once with the whole mini-catalogue


@dataclass
class BgeM3Task(BgeTask):
    """The model with its heads, the batches and their losses, on one worker."""

    model: BgeM3    # type: ignore[assignment]  # gives the states of tokens in the place of embeddings

    def backward(self, number: int, scale: float) -> Mapping[str, float]:
        """Add this worker's gradients of a batch; returns the figures of the whole batch."""
        config = self.config
        batch = self.train.batch(self.sampler.share(number, rank(), world_size()), config.negatives)
        several = {"sync": self.wrapped.no_sync} if world_size() > 1 else {}
        found, parts = bge_m3_backward(self.wrapped, batch, config.heads, config.contrastive, scale=scale, **several)
        return {"loss": found.loss, "accuracy": found.accuracy, "masked_share": found.masked_share,
                **{f"loss_{name}": value for name, value in parts.items()},
                "false_negative_share": false_negative_share(batch), "tokens": float(tokens_of(batch))}

    @torch.no_grad()
    def evaluate(self) -> Mapping[str, float]:
        """The figures of the mini-catalogue by the ensemble of the three scores, and the mrr of each of them."""
        assert self.catalogue is not None
        documents = _states(self.model, self.catalogue.documents)
        texts = self.catalogue.queries
        blocks = [scores(self.model(texts[start:start + EVALUATED_QUERIES]), documents)
                  for start in range(0, len(texts), EVALUATED_QUERIES)]
        found = Scores(*(torch.cat([getattr(one, name) for one in blocks]) for name in ("dense", "sparse", "multi")))
        ensemble = found.ensemble(self.config.heads.ensemble)
        values = figures(self.catalogue.ranks_by(lambda rows: ensemble[rows]), self.config.validation.cutoffs)
        for name, single in (("dense", found.dense), ("sparse", found.sparse), ("multi", found.multi)):
            values[f"mrr_{name}"] = float((1 / self.catalogue.ranks_by(lambda rows, one=single: one[rows])).mean())  # type: ignore[misc]
        return values


def _states(model: BgeM3, texts: Sequence[npt.NDArray[np.int32]]) -> TokenStates:
    return joined_states([model(texts[start:start + TEXTS_AT_ONCE]) for start in range(0, len(texts), TEXTS_AT_ONCE)])


def build_bge_m3_task(config: FinetuneBgeConfig, train: PairShards, valid: PairShards,
                      device: Literal["auto", "cpu", "cuda"]) -> BgeM3Task:
    """The task on this worker: the encoder is loaded with its heads, or gets heads to begin with.

    Errors: `ValueError` when the heads that are there give token vectors of another size than configured.
    """
    torch.manual_seed(config.seed)
    layout = read_layout(find_model(config.encoder.model))
    wanted, has = config.heads.multi_dimension, BgeM3Heads.there(layout.root)
    if has and wanted is not None and wanted != (found := multi_dimension(layout.root, layout.dimension)):
        raise ValueError(f"heads.multi_dimension: {wanted}, but {layout.root} has token vectors of {found}; leave it "
                         "out to train them further")
    model = BgeM3.load(trainable_config(config, device), None if has else wanted or layout.dimension)
    refuse_other_similarity(config, model.body.similarity)
    if not has:
        log.info("%s has no heads: token vectors start from its states, token weights from the rarity of words",
                 layout.root)
        fit_rarity(model, train, config.seed)
    return BgeM3Task(config, model, train, valid)


@torch.no_grad()
def fit_rarity(model: BgeM3, train: PairShards, seed: int) -> None:
    """Let the sparse head begin as BM25's weight of a word, as far as the states of tokens know it.

    That is ln(1 + (N - n + 1/2) / (n + 1/2)) for a token in n of N documents, divided by the mean length of
    the documents' vectors of such weights: a document's product with itself is then about 1, as a cosine's.
    """
    drawn = np.random.default_rng([seed, 2]).permutation(len(train))[:COUNTED_TEXTS].astype(np.int64)
    texts, rows = train.documents_of(drawn)
    texts = [texts[place] for place in np.sort(np.unique(rows, return_index=True)[1])]
    different = [np.setdiff1d(one, model.special_ids) for one in texts]
    tokens, counts = np.unique(np.concatenate(different), return_counts=True)
    rarity = np.log1p((len(texts) - counts + 0.5) / (counts + 0.5))
    lengths = [np.sqrt(np.square(rarity[np.searchsorted(tokens, one)]).sum()) for one in different if len(one)]
    if not lengths:
        return
    some: TokenIds = texts[:FITTED_TEXTS]
    found = np.concatenate(some)
    known = np.isin(found, tokens)
    wanted = rarity[np.searchsorted(tokens, found[known])] / np.mean(lengths)
    training = model.training
    model.eval()
    hidden_TD, _ = model.body.hidden_states(some)
    model.train(training)
    kept = torch.from_numpy(np.flatnonzero(known)).to(hidden_TD.device)
    model.heads.fit_sparse(hidden_TD[kept], torch.from_numpy(wanted).to(hidden_TD.device))
