"""Pairs scored a CPU-second: ours beside a dynamically padded forward pass through plain Transformers, alternating."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys_ray.models.bt_bert_input import fronts_of
from recsys_ray.models.bt_bert_scorer import BtBertConfig, BtBertScorer
from recsys_ray.models.fronts import hub_inputs
from recsys_ray.models.sentence_layout import find_model

BATCH = 32


def speed(model: Path, ingredients: Sequence[str], titles: Sequence[str], labels: np.ndarray[Any, Any], rounds: int
          ) -> dict[str, Any]:
    """The ratios of CPU time, the median of the rounds, and the largest difference of a concern's ROC AUC."""
    from sklearn.metrics import roc_auc_score

    scorer = BtBertScorer(BtBertConfig(model=str(model), device="cpu"))
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: scorer.logits(ingredients, titles),
        **{name: _plain(model, scorer, ingredients, titles, dtype)
           for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}}
    took: dict[str, list[float]] = {name: [] for name in sides}
    logits: dict[str, Any] = {}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start = time.process_time()
            logits[name] = side()
            if turn:        # the first round warms up
                took[name].append(time.process_time() - start)
    ratio = {name: [one / ours for one, ours in zip(took[name], took["ours"], strict=True)]
             for name in ("fp32", "bf16")}
    columns = [place for place in range(labels.shape[1]) if 0 < labels[:, place].sum() < len(labels)]
    auc = {name: np.array([roc_auc_score(labels[:, one], found[:, one]) for one in columns])
           for name, found in logits.items()}
    return {"ratio_fp32": float(np.median(ratio["fp32"])), "ratio_bf16": float(np.median(ratio["bf16"])),
            "rounds": ratio, "pairs": int(labels.size),
            "auc_difference": {name: float(np.abs(auc["ours"] - auc[name]).max()) for name in ratio},
            "pairs_per_cpu_second": {name: labels.size / float(np.median(some)) for name, some in took.items()}}


def _plain(model: Path, scorer: BtBertScorer, ingredients: Sequence[str], titles: Sequence[str], dtype: torch.dtype
           ) -> Callable[[], Any]:
    """Tokenise, pad each batch to its longest, run every layer, and read the scores of token 0 off the last layer.

    An input is a pair; where the model's products do not see the query, a mask says so.
    """
    from transformers import AutoModel

    hub = AutoModel.from_pretrained(str(find_model(str(model), "bt_bert")), dtype=dtype, local_files_only=True).eval()
    heads, last = hub.config.num_attention_heads, hub.encoder.layer[-1].attention.self
    fronts = fronts_of(scorer.card.style, 1)

    @torch.inference_mode()
    def logits() -> Any:
        tokens = scorer.tokenizer
        queries = [tokens.query(one.query) for one in scorer.card.concerns]
        ids = [tokens.pair(query, one).ids for one in tokens.products(ingredients, titles) for query in queries]
        out = []
        for start in range(0, len(ids), BATCH):
            some = ids[start:start + BATCH]
            padded = torch.zeros(len(some), max(map(len, some)), dtype=torch.int64)
            mask = torch.zeros_like(padded)
            for row, one in enumerate(some):
                padded[row, :len(one)], mask[row, :len(one)] = torch.from_numpy(one.astype(np.int64)), 1
            told = {"attention_mask": mask} | hub_inputs(fronts, padded.shape[1])
            if fronts is not None:
                unseen = torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None]
                told["attention_mask"] = (told["attention_mask"] + unseen).to(dtype)
            found = hub(input_ids=padded, output_hidden_states=True, **told)
            first = found.hidden_states[-2][:, 0]
            query, key = (part(first).view(len(some), heads, -1).float() for part in (last.query, last.key))
            out.append((query * key).sum(-1).sum(-1) * query.shape[-1] ** -0.5)
        return torch.cat(out).numpy().reshape(len(titles), len(queries))

    return logits
