"""Training of the sequence model: each next item of a history against sampled ones, corrected for their popularity."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field
from torch import Tensor, nn

from recsys_ray.artifacts import Artifact, find_artifact, open_artifact, stage, write_text
from recsys_ray.config import fingerprint
from recsys_ray.evaluation.metrics import score_all
from recsys_ray.evaluation.ranking import SPECS, whole_ranking
from recsys_ray.models.sequence import SequenceConfig, SequenceModel, SequenceRecommender, padded
from recsys_ray.ranking.histories import Asked, Histories, HistorySource, read_histories
from recsys_ray.runtime import RayConfig
from recsys_ray.training.bge import WorkersConfig
from recsys_ray.training.distributed import rank, sum_over_workers, world_size
from recsys_ray.training.loop import Loop, LoopConfig, RunFiles, Task, best_weights
from recsys_ray.training.optim import OptimConfig

log = logging.getLogger(__name__)

KIND = "sequence_model"
STAGE_VERSION = 1       # raise it when the same inputs would give another model
FOLDER = "model"
RESULT = "result.json"
METRICS = tuple(spec.name for spec in SPECS)


class FinetuneSequenceConfig(LoopConfig):
    """Which histories and item texts, which model, and how it learns."""

    histories: HistorySource
    embeddings: Path                        # artefact of the embed job: the items' text vectors
    output: Path
    model: SequenceConfig = SequenceConfig()
    batch_size: int = Field(default=128, ge=1)      # users
    negatives: int = Field(default=512, ge=1)       # sampled for each batch
    power: float = Field(default=0.75, ge=0, le=1)  # they are drawn by popularity to this power
    valid_users: int = Field(default=1000, ge=1)
    epochs: float = Field(default=20.0, gt=0)
    optim: OptimConfig = OptimConfig(learning_rate=1e-3, weight_decay=0.01)
    patience: int | None = Field(default=4, ge=1)
    workers: WorkersConfig = WorkersConfig()
    ray: RayConfig = RayConfig()

    def resolved(self) -> Self:
        """The same with absolute paths: workers start in other directories."""
        return self.replace(histories=self.histories.replace(path=self.histories.path.resolve()),
                            embeddings=self.embeddings.resolve(), output=self.output.resolve())


def finetune_sequence(config: FinetuneSequenceConfig) -> Artifact:
    """The `sequence_model` artefact: model/ (for `SequenceRecommender.load`) and metrics.jsonl (the curve).

    Facts: steps, best_step, best_value, base_value, objective, items, cold_items, users, cpu_seconds.
    A killed run continues when the same configuration is run again.
    """
    here = config.resolved()
    parents = {"histories": open_artifact(here.histories.path, here.histories.format).manifest,
               "embeddings": open_artifact(here.embeddings, "embeddings").manifest}
    away = {"histories", "embeddings", "output", "workers", "ray", "trackers", "checkpoint_every"}
    key = fingerprint({"stage": STAGE_VERSION, "parents": {name: one.fingerprint for name, one in parents.items()},
                       "histories": here.histories.model_dump(mode="json", exclude={"path"}),
                       "config": here.model_dump(mode="json", exclude=away)})
    if (done := find_artifact(here.output, KIND, key)) is not None:
        return done
    with stage(here.output, KIND, key) as staging:
        settings = {"config": here.model_dump(mode="json"), "staging": str(staging.path), "key": key}
        if here.workers.count == 0:
            train_worker(settings)
        else:
            from recsys_ray.runtime import connected
            from recsys_ray.training.launch import run_workers

            with connected(here.ray):
                run_workers(train_worker, settings, here.workers, staging.path)
        shutil.copyfile(RunFiles(staging.path / "run").curve, staging.path / "metrics.jsonl")
        facts = json.loads((staging.path / RESULT).read_bytes())
        log.info("%d steps, nDCG@10 %.4f at step %d", facts["steps"], facts["best_value"] or 0.0, facts["best_step"])
        names = sorted(path.relative_to(staging.path).as_posix() for path in (staging.path / FOLDER).iterdir())
        return staging.commit([staging.entry(name) for name in (*names, "metrics.jsonl")], config=config,
                              parents=parents, facts=facts)


def open_sequence_model(artifact: Artifact) -> SequenceRecommender:
    """The trained model, its files checked."""
    paths = [artifact.file(name) for name in artifact.names(f"{FOLDER}/")]
    return SequenceRecommender.load(paths[0].parent)


def train_worker(settings: dict[str, Any]) -> None:
    """Train, or go on with a run that was stopped; the first worker writes the model into the staging directory."""
    config = FinetuneSequenceConfig.model_validate(settings["config"])
    if config.workers.threads is not None:
        torch.set_num_threads(config.workers.threads)
    histories, _ = read_histories(config.histories)
    task = SequenceTask(config, histories, text_vectors(open_artifact(config.embeddings, "embeddings"),
                                                        histories.items))
    directory = Path(settings["staging"])
    files = RunFiles(directory / "run")
    progress = Loop(task.task(), config, files, settings["key"], {}).run()
    if rank():
        return
    if (best := best_weights(files)) is not None:
        task.model.load_state_dict(best)
    task.model.save(directory / FOLDER, histories.items, task.popularity)
    found = asdict(progress)
    write_text(directory / RESULT, json.dumps({
        "steps": found["step"], **{name: found[name] for name in ("best_step", "best_value", "base_value",
                                                                  "cpu_seconds")},
        "objective": "nDCG@10", "items": len(histories.items), "cold_items": int((task.popularity == 0).sum()),
        "users": len(histories.train), "timed": histories.timed}))


def text_vectors(embeddings: Artifact, items: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """The text vector of each item, (I, T). Errors: `ValueError` naming the first items without one."""
    table = pa.concat_tables(embeddings.tables("vectors/", ["product_id", "vector"]))
    places = pc.index_in(pa.array(items, pa.string()), value_set=table["product_id"].combine_chunks())
    if places.null_count:
        missing = [item for item, place in zip(items, places.to_pylist(), strict=True) if place is None]
        raise ValueError(f"{embeddings.path}: {len(missing)} items have no embedding, e.g. {', '.join(missing[:3])}; "
                         "embed the catalogue the histories are of")
    column = table["vector"].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(table), -1)
    return np.ascontiguousarray(vectors[places.to_numpy()], dtype=np.float32)


class SequenceTask:
    """The model, its batches and their loss, on one worker."""

    def __init__(self, config: FinetuneSequenceConfig, histories: Histories, text_IT: npt.NDArray[np.float32]) -> None:
        """Users with one item teach nothing and are left out."""
        self.config, self.histories = config, histories
        train = histories.train
        self.users = np.flatnonzero(np.diff(train.offsets) > 1)
        counts = np.bincount(train.items, minlength=len(histories.items))
        self.popularity = (counts / max(1, len(train))).astype(np.float32)
        model = config.model.replace(ordered=config.model.ordered and histories.timed)
        device = torch.device("cuda" if config.workers.gpus else "cpu")
        torch.manual_seed(config.seed)
        self.model = SequenceModel(model, torch.from_numpy(text_IT), torch.from_numpy(counts > 0)).to(device)
        self.wrapped: Any = nn.parallel.DistributedDataParallel(self.model) if world_size() > 1 else self.model
        drawn = counts.astype(np.float64) ** config.power * (counts > 0)
        self.chance_I = torch.from_numpy((drawn / drawn.sum()).astype(np.float32)).to(device)
        self.valid: Asked = histories.asked["valid"].drawn(config.valid_users, config.seed)

    def task(self) -> Task:
        """What the loop runs."""
        no_sync = self.wrapped.no_sync if world_size() > 1 else nullcontext
        return Task(model=self.model, batches_per_epoch=max(1, len(self.users) // self.config.batch_size),
                    backward=self.backward, evaluate=self.evaluate, objective="nDCG@10", begin=lambda number: None,
                    no_sync=no_sync)

    def batch(self, number: int) -> npt.NDArray[np.int64]:
        """This worker's sequences of a batch, (B, L + 1): a function of the number and the seed."""
        per_epoch = max(1, len(self.users) // self.config.batch_size)
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(self.users)
        mine = order[place * self.config.batch_size:(place + 1) * self.config.batch_size][rank()::world_size()]
        found = [self.histories.train.of(int(user)) for user in mine]
        if not self.model.config.ordered:
            generator = np.random.default_rng([self.config.seed, number, rank()])
            found = [generator.permutation(one) for one in found]
        return padded(found, self.model.config.max_items + 1)

    def backward(self, number: int, scale: float) -> Mapping[str, float]:
        """Add this worker's gradients of a batch; returns the figures of the whole batch."""
        items_BL = torch.from_numpy(self.batch(number)).to(self.chance_I.device)
        inputs, targets = items_BL[:, :-1], items_BL[:, 1:]
        real = targets >= 0
        drawn_N = torch.multinomial(self.chance_I, self.config.negatives, replacement=True)
        asked = torch.cat([targets[real], drawn_N])
        states_BLD, vectors, biases = self.wrapped(inputs, asked)
        count = len(asked) - len(drawn_N)
        losses = sampled_softmax(states_BLD[real], (vectors[:count], biases[:count]), (vectors[count:], biases[count:]),
                                 asked[:count], drawn_N, self.chance_I)
        total = sum_over_workers(torch.tensor([float(count)], device=losses.device))
        loss = losses.sum() / total[0]
        (loss * scale * world_size()).backward()   # type: ignore[no-untyped-call]
        return {"loss": float(sum_over_workers(loss.reshape(1))[0]), "tokens": float(count)}

    def evaluate(self) -> Mapping[str, float]:
        """The metrics of validation users over all items that may be shown."""
        known = [self.valid.known.of(row) for row in range(len(self.valid.known))]
        scores = SequenceRecommender(self.model, self.histories.items, self.popularity).score(known)
        ranked = whole_ranking(self.valid.known.users, scores, [one.tolist() for one in self.valid.relevant],
                               self.valid.allowed(self.histories.eligible))
        return dict(zip(METRICS, score_all(ranked, SPECS).mean(axis=0).tolist(), strict=True))


def sampled_softmax(states_ND: Tensor, positive: tuple[Tensor, Tensor], negative: tuple[Tensor, Tensor],
                    targets_N: Tensor, drawn_S: Tensor, chance_I: Tensor) -> Tensor:
    """-log softmax of each target among itself and the drawn items, (N,).

    Each logit is lessened by the log of how often its item is expected among the drawn ones, so that the sampled
    softmax estimates the full one (Bengio and Senécal 2008; Yi et al., RecSys 2019) instead of punishing popular
    items for being drawn often. A drawn item that is the target is left out of that row.
    """
    expected = (chance_I * len(drawn_S)).clamp(min=1e-12).log()
    own_N = (states_ND * positive[0]).sum(dim=1) + positive[1] - expected[targets_N]
    other_NS = states_ND @ negative[0].T + negative[1] - expected[drawn_S]
    other_NS = other_NS.masked_fill(targets_N[:, None] == drawn_S[None, :], float("-inf"))
    return torch.logsumexp(torch.cat([own_N[:, None], other_NS], dim=1), dim=1) - own_N
