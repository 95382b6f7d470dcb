"""Loss and gradients of the contrastive step, in every form, against one plain full batch.

    python benchmarks/exactness.py --config configs/bench_exactness/full.yaml

Forms: 1, 2 and 4 gloo workers under DistributedDataParallel (with unequal shares of the queries), the
batch at once or cached in mini-batches, with and without hard negatives, dropout off and on, in
float64 and float32. What is compared are the loss and the gradient of every parameter of a BERT and
of an XLM-RoBERTa with random weights; every worker compares its own copy of the gradients. The batch
holds products and texts twice, which are masked.

The other side shares no code of the step: the whole batch in one forward pass, masks and softmax
written out per query, torch's autograd, one process, the same precision.

- Dropout off: the reference is transformers' own forward pass with padding, for our packed encoder too.
- Dropout on, "keyed": what is dropped in a text is a function of the step and the text. torch draws
  from one stream, so two ways of cutting a batch draw different numbers and nothing could be compared.
  "packed" is our encoder with its own dropout, the reference being its single pass over everything.
  "hub" is transformers' model with torch's dropout, one text at a time, the generator seeded by the text.
- Dropout on, "drawn": transformers' model with torch's dropout as it comes, one worker, cached; the
  reference keeps the graph of the same chunks in the same order. This is what replaying the random
  numbers in the second pass has to achieve.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recsys_ray.config import Config, main
from recsys_ray.evaluation.results import write_result
from recsys_ray.models.trainable_bert import TrainableBert, TrainableConfig
from recsys_ray.training.contrastive import ContrastiveConfig, PairBatch, contrastive_backward

log = logging.getLogger(__name__)

VOCABULARY, TEMPERATURE = 500, 0.05
LIMITS = {"float64": 1e-9, "float32": 1e-5}
WORKER_TIMEOUT_S = 1800


class JobConfig(Config):
    """Which forms are compared, on what."""

    result: Path = Path("benchmarks/results/exactness.json")
    work: Path = Path("runs/bench_exactness")
    bodies: tuple[Literal["bert", "xlm-roberta"], ...] = ("bert", "xlm-roberta")
    workers: tuple[int, ...] = (1, 2, 4)
    mini_batches: tuple[int, ...] = (1, 5, 16)      # texts of a chunk in the cached form; the plain one runs too
    queries: int = Field(default=11, ge=5)          # of all workers; no multiple of 2 or 4
    hard_negatives: int = Field(default=2, ge=1)    # at most, of a query
    dropout: float = Field(default=0.1, gt=0, lt=1)
    seed: int = 7


@dataclass(frozen=True)
class Setting:
    """One side-by-side: everything but the form of the step."""

    body: str
    encoder: Literal["packed", "hub"]
    dropout: Literal["off", "keyed", "drawn"]
    hard: bool
    precision: str


class HubEncoder(nn.Module):
    """transformers' own body, mean over the tokens, unit length; padded, or (keyed) one text at a time."""

    def __init__(self, root: Path, keyed: bool, rate: float) -> None:
        super().__init__()
        from transformers import AutoModel

        self.body = AutoModel.from_pretrained(str(root), add_pooling_layer=False, hidden_dropout_prob=rate,
                                              attention_probs_dropout_prob=rate)
        self.keyed = keyed

    def forward(self, token_ids: Sequence[np.ndarray]) -> Tensor:
        return torch.cat([self._alone(one) for one in token_ids]) if self.keyed else self._padded(token_ids)

    def _alone(self, tokens: np.ndarray) -> Tensor:
        key = int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=7).digest(), "little")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key)
            return self._padded([tokens])

    def _padded(self, token_ids: Sequence[np.ndarray]) -> Tensor:
        rows = [torch.from_numpy(one).long() for one in token_ids]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.body.config.pad_token_id)
        lengths = torch.tensor([len(one) for one in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        hidden = self.body(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return F.normalize((hidden * mask[..., None]).sum(dim=1) / lengths[:, None], dim=-1)


def run(config: JobConfig) -> None:
    """Compare everything, write the result file, and raise `ValueError` if a difference is above its limit."""
    torch.set_num_threads(1)
    config.work.mkdir(parents=True, exist_ok=True)
    for body in config.bodies:
        write_encoder(config.work / body, body, config.seed)
    torch.save([reference(config, setting) for setting in settings(config)], config.work / "references.pt")
    rows = _drawn(config)
    for world in config.workers:
        rows += compared(config, 0, 1) if world == 1 else _spawned(config, world)
        log.info("%d worker(s): %d comparisons so far", world, len(rows))
    worst = {name: max((row for row in rows if row["precision"] == name),
                       key=lambda row: max(row["diff_loss"], row["diff_grad"])) for name in LIMITS}
    headline: dict[str, float | int] = {"comparisons": len(rows)}
    for name, suffix in (("float64", ""), ("float32", "_float32")):
        some = [row for row in rows if row["precision"] == name]
        headline |= {f"max_abs_diff_{part}{suffix}": max(row[f"diff_{part}"] for row in some)
                     for part in ("loss", "grad")}
        headline[f"max_rel_diff_grad{suffix}"] = max(row["diff_grad"] / row["largest_grad"] for row in some)
    tables = {"limits": LIMITS, "worst": worst, "by_setting": _largest(rows, tuple(Setting.__dataclass_fields__)),
              "by_form": _largest(rows, ("workers", "mini_batch", "precision")),
              "other_steps": _other_steps(config),
              "setting": config.model_dump(mode="json", exclude={"result", "work"})}
    write_result(config.result, command=f"python benchmarks/exactness.py {' '.join(sys.argv[1:])}",
                 headline=headline, tables=tables, seeds=[config.seed])
    for name, row in worst.items():
        if max(row["diff_loss"], row["diff_grad"]) > LIMITS[name]:
            raise ValueError(f"{name}: further from the plain full batch than {LIMITS[name]:g}: {row}")


def settings(config: JobConfig) -> list[Setting]:
    """All side-by-sides with dropout off or keyed."""
    return [Setting(body, encoder, dropout, hard, precision)    # type: ignore[arg-type]
            for body in config.bodies for encoder in ("packed", "hub") for dropout in ("off", "keyed")
            for hard in (False, True) for precision in LIMITS]


def write_encoder(root: Path, body: str, seed: int) -> None:
    """A small BERT or XLM-RoBERTa with random weights, in the layout that encoders are loaded from."""
    from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
             "intermediate_size": 96, "max_position_embeddings": 66, "initializer_range": 0.1}
    torch.manual_seed(seed)
    model = (BertModel(BertConfig(**sizes), add_pooling_layer=False) if body == "bert"
             else XLMRobertaModel(XLMRobertaConfig(**sizes, type_vocab_size=1), add_pooling_layer=False))
    model.save_pretrained(root)
    chain = [("base.modules.transformer.Transformer", ""),
             ("sentence_transformer.modules.pooling.Pooling", "1_Pooling"),
             ("base.modules.normalize.Normalize", "2_Normalize")]
    documents: dict[str, Any] = {
        "modules.json": [{"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.{kind}"}
                         for place, (kind, path) in enumerate(chain)],
        "sentence_bert_config.json": {"max_seq_length": 64},
        "1_Pooling/config.json": {"embedding_dimension": 48, "pooling_mode": "mean", "include_prompt": True},
        "2_Normalize/config.json": {}}
    for name, document in documents.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(document))


def encoder_of(config: JobConfig, setting: Setting) -> nn.Module:
    """The encoder of a setting, its weights as written."""
    rate = 0.0 if setting.dropout == "off" else config.dropout
    root = config.work / setting.body
    if setting.encoder == "hub":
        model: nn.Module = HubEncoder(root, setting.dropout == "keyed", rate)
    else:
        model = TrainableBert.load(TrainableConfig(model=str(root), device="cpu", dtype="float32", dropout=rate))
        model.dropout_seed = config.seed
    return model.to(getattr(torch, setting.precision)).train()


def whole_batch(config: JobConfig, hard: bool) -> PairBatch:
    """Queries of all workers; two positives are of one product, two others have one text, as has a hard negative."""
    rng = np.random.default_rng(config.seed)

    def text() -> np.ndarray:
        return rng.integers(4, VOCABULARY, size=rng.integers(3, 40)).astype(np.int32)

    count = config.queries
    each = rng.integers(0, config.hard_negatives + 1, size=count) if hard else np.zeros(count, dtype=np.int64)
    each[0] = config.hard_negatives if hard else 0
    owners = np.repeat(np.arange(count), each)
    documents = [text() for _ in range(count + len(owners))]
    groups = np.arange(len(documents))
    groups[count - 1] = groups[0]
    documents[count - 2] = documents[1]
    if hard:
        documents[count] = documents[2]
    texts = [int.from_bytes(hashlib.blake2b(one.tobytes(), digest_size=7).digest(), "little") for one in documents]
    return PairBatch([text() for _ in range(count)], documents, positive=np.arange(count),
                     query_group=groups[:count].copy(), document_group=groups, document_text=np.array(texts),
                     negative_of=np.concatenate([np.full(count, -1), owners]))


def share_of(whole: PairBatch, rank: int, world: int) -> PairBatch:
    """One worker's queries with their positives and hard negatives."""
    mine = np.array_split(np.arange(len(whole.query_tokens)), world)[rank]
    hard = np.flatnonzero(np.isin(whole.negative_of, mine))
    places = np.concatenate([mine, hard])
    return PairBatch([whole.query_tokens[one] for one in mine], [whole.document_tokens[one] for one in places],
                     positive=np.arange(len(mine)), query_group=whole.query_group[mine],
                     document_group=whole.document_group[places], document_text=whole.document_text[places],
                     negative_of=np.concatenate([np.full(len(mine), -1), whole.negative_of[hard] - mine[0]]))


def reference(config: JobConfig, setting: Setting, chunk: int | None = None) -> dict[str, Any]:
    """Loss and gradients of the plain full batch (`chunk`: encoded so many texts at a time, in one graph)."""
    if setting.dropout == "off":
        setting = Setting(setting.body, "hub", "off", setting.hard, setting.precision)
    model, batch = encoder_of(config, setting), whole_batch(config, setting.hard)

    def encode(texts: Sequence[np.ndarray]) -> Tensor:
        size = chunk or len(texts)
        return torch.cat([model(texts[start: start + size]) for start in range(0, len(texts), size)])

    if setting.encoder == "packed":
        both = model([*batch.query_tokens, *batch.document_tokens])     # one forward pass of everything
        query, document = both[: len(batch.query_tokens)], both[len(batch.query_tokens):]
    else:
        query, document = encode(batch.query_tokens), encode(batch.document_tokens)
    loss = torch.stack(list(_query_losses(query @ document.T / TEMPERATURE, batch))).mean()
    loss.backward()
    return {"loss": float(loss.detach()), "gradients": [one.grad for one in model.parameters()]}


def _query_losses(logits: Tensor, batch: PairBatch) -> Iterator[Tensor]:
    for query, positive in enumerate(batch.positive):
        kept = [positive, *(place for place in range(len(batch.document_tokens)) if place != positive
                            and batch.document_group[place] != batch.query_group[query]
                            and batch.document_text[place] != batch.document_text[positive])]
        yield -torch.log_softmax(logits[query, kept], dim=0)[0]


def compared(config: JobConfig, rank: int, world: int) -> list[dict[str, Any]]:
    """Every setting in every form on this worker, each with its distance from the reference."""
    references = torch.load(config.work / "references.pt", weights_only=True)
    rows = []
    for setting, wanted in zip(settings(config), references, strict=True):
        batch = share_of(whole_batch(config, setting.hard), rank, world)
        for mini_batch in (None, *config.mini_batches):
            model: Any = encoder_of(config, setting)
            if world > 1:
                model = DistributedDataParallel(model, broadcast_buffers=False)
            step = ContrastiveConfig(temperature=TEMPERATURE, mini_batch=mini_batch)
            found = contrastive_backward(model, model, batch, step, sync=model.no_sync if world > 1 else nullcontext)
            rows.append(_row(setting, world, mini_batch, found.loss, model, wanted))
    return rows


def _drawn(config: JobConfig) -> list[dict[str, Any]]:
    """torch's own dropout, one worker: the cached step against one graph of the same chunks."""
    rows = []
    for body in config.bodies:
        for hard in (False, True):
            for precision in LIMITS:
                for mini_batch in config.mini_batches:
                    setting = Setting(body, "hub", "drawn", hard, precision)
                    torch.manual_seed(config.seed)
                    wanted = reference(config, setting, mini_batch)
                    torch.manual_seed(config.seed)
                    model = encoder_of(config, setting)
                    step = ContrastiveConfig(temperature=TEMPERATURE, mini_batch=mini_batch)
                    found = contrastive_backward(model, model, whole_batch(config, hard), step)
                    rows.append(_row(setting, 1, mini_batch, found.loss, model, wanted))
    return rows


def _other_steps(config: JobConfig) -> list[dict[str, Any]]:
    """How far from the reference steps are that compute something else."""
    setting = Setting(config.bodies[0], "packed", "off", True, "float64")
    wanted, whole = reference(config, setting), whole_batch(config, True)
    step = ContrastiveConfig(temperature=TEMPERATURE)
    shares = [share_of(whole, rank, 2) for rank in range(2)]
    forms = {"no masks": ([whole], step.replace(mask_same_product=False, mask_same_text=False)),
             "halves that do not meet": (shares, step)}
    rows = []
    for name, (batches, form) in forms.items():
        model = encoder_of(config, setting)
        parts = [len(batch.query_tokens) / config.queries for batch in batches]
        loss = sum(part * contrastive_backward(model, model, batch, form, scale=part).loss
                   for part, batch in zip(parts, batches, strict=True))
        row = _row(setting, 1, None, loss, model, wanted)
        rows.append({"step": name, **{key: row[key] for key in ("diff_loss", "diff_grad")}})
    return rows


def _row(setting: Setting, world: int, mini_batch: int | None, loss: float, model: nn.Module,
         wanted: dict[str, Any]) -> dict[str, Any]:
    pairs = list(zip(model.parameters(), wanted["gradients"], strict=True))
    gradients = [(one.grad, other) for one, other in pairs if one.grad is not None and other is not None]
    if len(gradients) != len(pairs):
        raise ValueError(f"{setting}: {len(pairs) - len(gradients)} parameters without a gradient")
    return {**vars(setting), "workers": world, "mini_batch": mini_batch, "loss": wanted["loss"],
            "diff_loss": abs(loss - wanted["loss"]),
            "diff_grad": max(float((one - other).abs().max()) for one, other in gradients),
            "largest_grad": max(float(other.abs().max()) for _, other in gradients)}


def _largest(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The largest differences of the rows that agree in `keys`."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [{**dict(zip(keys, values, strict=True)), "comparisons": len(some),
             **{name: max(row[name] for row in some) for name in ("diff_loss", "diff_grad", "largest_grad")}}
            for values, some in groups.items()]


def _spawned(config: JobConfig, world: int) -> list[dict[str, Any]]:
    """The rows of all workers of a group of processes."""
    import torch.multiprocessing as mp

    meeting = config.work.resolve() / f"meeting-{world}"
    meeting.unlink(missing_ok=True)
    mp.start_processes(_worker, (world, config.model_dump(mode="json"), str(meeting)), nprocs=world,
                       start_method="spawn")
    return [row for rank in range(world) for row in json.loads((config.work / f"rows-{world}-{rank}.json").read_text())]


def _worker(rank: int, world: int, values: dict[str, Any], meeting: str) -> None:
    config = JobConfig.model_validate(values)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world,
                            timeout=timedelta(seconds=WORKER_TIMEOUT_S))
    rows = compared(config, rank, world)
    (config.work / f"rows-{world}-{rank}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
