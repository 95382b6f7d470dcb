"""One side of the training benchmark in a process of its own: `python benchmarks/train_sides.py TASK.json`.

Writes measured.json beside the task: cpu_s, wall_s, tokens and losses of one epoch, or step_s of distributed runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

LEARNING_RATE = 2e-5
TEMPERATURE = 0.05      # sentence-transformers' own scale of 20
WARM_STEPS = 2


class Clock:
    """CPU and wall seconds of this process, added up over the blocks it is held in."""

    def __init__(self) -> None:
        self.seconds = {"cpu_s": 0.0, "wall_s": 0.0}

    def __enter__(self) -> None:
        self._begun = time.process_time(), time.perf_counter()

    def __exit__(self, *error: object) -> None:
        for name, now, begun in zip(self.seconds, (time.process_time(), time.perf_counter()), self._begun, strict=True):
            self.seconds[name] += now - begun


def ours(task: dict[str, Any]) -> dict[str, Any]:
    """Our loop in this process: tokenising into shards, then the steps; loading is not timed, nor on the other side."""
    import torch

    torch.set_num_threads(task["threads"])
    directory, clock = Path(task["directory"]), Clock()
    train_shards(task, task["pairs"][:task["batch_size"]], directory / "warm", Clock())
    lines = train_shards(task, task["pairs"][task["batch_size"]:], directory / "run", clock)
    return {**clock.seconds, "tokens": sum(line["tokens"] for line in lines),
            "losses": [line["loss"] for line in lines]}


def train_shards(task: dict[str, Any], pairs: list[tuple[str, str]], directory: Path, clock: Clock
                 ) -> list[dict[str, Any]]:
    """Tokenise and train one epoch; returns the lines of the curve."""
    from recsys_ray.artifacts import stage
    from recsys_ray.config import Config
    from recsys_ray.training.bge import build_task
    from recsys_ray.training.loop import Loop, RunFiles
    from recsys_ray.training.pair_shards import KIND, PairTokenizer, open_pair_shards, write_shard
    from recsys_ray.training.trackers import read_curve

    config, table = finetune_config(task, directory, directory), pair_table(pairs)
    tokenizer = PairTokenizer(config.shard_settings())
    with stage(directory / "shards", KIND, "bench") as staging:
        with clock:
            entries = write_shard(table, tokenizer, staging.path, "train/bench")
        staging.commit(entries, config=Config(), facts={"settings": {}})
    train, valid = (open_pair_shards(directory / "shards", split) for split in ("train", "valid"))
    built = build_task(config, train, valid, "cpu")
    files = RunFiles(directory)
    loop = Loop(built.task(), config, files, "bench", {})
    loop._save = lambda: None   # the other side saves nothing either
    with clock:
        loop.run()
    return [line for line in read_curve(files.curve) if "loss" in line]


def finetune_config(task: dict[str, Any], pairs: Path, output: Path, **changes: Any) -> Any:
    """One epoch without evaluation."""
    from recsys_ray.training.bge import FinetuneBgeConfig

    return FinetuneBgeConfig.model_validate({
        "pairs": pairs, "output": output, "encoder": {"model": task["model"], "device": "cpu"},
        "query_tokens": task["max_tokens"], "document_tokens": task["max_tokens"], "epochs": 1,
        "optim": {"learning_rate": LEARNING_RATE}, "checkpoint_every": 1_000_000, "seed": task["seed"],
        "sampler": {"batch_size": task["batch_size"]}, "trackers": {"tensorboard": False},
        "contrastive": {"temperature": TEMPERATURE, "mini_batch": task["mini_batch"]}, **changes})


def st(task: dict[str, Any]) -> dict[str, Any]:
    """SentenceTransformerTrainer with (Cached)MultipleNegativesRankingLoss and otherwise its defaults."""
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments

    torch.set_num_threads(task["threads"])
    model = SentenceTransformer(str(model_path(task)), device="cpu")
    model.max_seq_length = task["max_tokens"]
    if task["mini_batch"] is None:
        loss = losses.MultipleNegativesRankingLoss(model)
    else:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=task["mini_batch"])

    def train(pairs: list[tuple[str, str]]) -> dict[str, Any]:
        lengths = [len(one) for one in model.tokenizer([document for _, document in pairs], truncation=True,
                                                       max_length=task["max_tokens"])["input_ids"]]
        sampler = {"batch_sampler": grouped_sampler(lengths)} if task["grouped"] else {}
        arguments = SentenceTransformerTrainingArguments(
            output_dir=task["directory"], per_device_train_batch_size=task["batch_size"], num_train_epochs=1,
            bf16=task["bf16"], learning_rate=LEARNING_RATE, warmup_steps=0.1, save_strategy="no", report_to="none",
            disable_tqdm=True, logging_steps=1, use_cpu=True, seed=task["seed"], dataloader_drop_last=True, **sampler)
        data = Dataset.from_dict({"anchor": [query for query, _ in pairs], "positive": [text for _, text in pairs]})
        trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
        clock = Clock()
        trainer.add_callback(timed(clock))
        trainer.train()
        return {**clock.seconds, "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line]}

    train(task["pairs"][:task["batch_size"]])
    pairs = task["pairs"][task["batch_size"]:]
    texts = [text for pair in pairs for text in pair]
    tokens = sum(map(len, model.tokenizer(texts, truncation=True, max_length=task["max_tokens"])["input_ids"]))
    return {**train(pairs), "tokens": tokens}


def timed(clock: Clock) -> Any:
    """A callback that holds the clock from the begin of training, when all is set up, to its end."""
    from transformers import TrainerCallback

    class Timed(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.__enter__()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            clock.__exit__()

    return Timed()


def grouped_sampler(lengths: list[int]) -> Any:
    """Batches of like length over the whole data: the least padding that any grouping gives."""
    from sentence_transformers.base.sampler import DefaultBatchSampler

    class ByLength(DefaultBatchSampler):
        def __init__(self, dataset: Any, batch_size: int, drop_last: bool, valid_label_columns: Any = None,
                     generator: Any = None, seed: int = 0) -> None:
            order = np.argsort(lengths, kind="stable")
            batches = [order[start:start + batch_size].tolist() for start in range(0, len(order), batch_size)]
            self.batches = [batches[place] for place in np.random.default_rng(seed).permutation(len(batches))]
            super().__init__(range(len(order)), batch_size=batch_size, drop_last=drop_last)

        def __iter__(self) -> Iterator[list[int]]:
            yield from self.batches

        def __len__(self) -> int:
            return len(self.batches)

    return ByLength


# --- several workers ------------------------------------------------------------------------------
def torchrun(task: dict[str, Any]) -> dict[str, Any]:
    """The very worker function of the job, started by torch.distributed.run."""
    from recsys_ray.artifacts import open_artifact
    from recsys_ray.training import launch

    directory = Path(task["directory"])
    write_pairs(directory / "pairs", task["pairs"])
    config = finetune_config(task, directory / "pairs", directory / "encoder",
                             workers={"count": 0, "threads": task["threads"]}).resolved()
    shards = launch._tokenised(config, open_artifact(config.pairs, "pairs"))
    (directory / "worker.json").write_text(json.dumps(
        {"config": config.model_dump(mode="json"), "staging": str(directory / "run"),
         "shards": shards.manifest.version}))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                    str(task["workers"]), __file__, str(directory / "worker.json"), "worker"], check=True)
    return {"cpu_s": 0.0, "wall_s": time.perf_counter() - start, **step_times(directory / "run" / "run")}


def worker(settings: dict[str, Any]) -> None:
    """One process of `torchrun`."""
    import torch.distributed as dist

    from recsys_ray.training.bge import FinetuneBgeConfig
    from recsys_ray.training.encoder_run import train_worker

    dist.init_process_group("gloo")
    train_worker(FinetuneBgeConfig.model_validate(settings["config"]), settings["staging"], settings["shards"], "bench")
    dist.destroy_process_group()


def ray(task: dict[str, Any]) -> dict[str, Any]:
    """The job on Ray Train."""
    from recsys_ray.training.launch import finetune_bge

    directory = Path(task["directory"])
    write_pairs(directory / "pairs", task["pairs"])
    config = finetune_config(task, directory / "pairs", directory / "encoder", ray={"progress": False},
                             workers={"count": task["workers"], "threads": task["threads"]})
    start = time.perf_counter()
    artifact = finetune_bge(config)
    return {"cpu_s": 0.0, "wall_s": time.perf_counter() - start, **step_times(artifact.path)}


def step_times(directory: Path) -> dict[str, Any]:
    """The wall seconds of a step, the first ones left out, from the curve of the run."""
    from recsys_ray.training.trackers import read_curve

    seconds = [line["seconds"] for line in read_curve(directory / "metrics.jsonl") if "loss" in line]
    return {"step_s": statistics.mean(seconds[WARM_STEPS:]), "steps": len(seconds)}


def write_pairs(root: Path, pairs: list[tuple[str, str]]) -> None:
    """A `pairs` artefact of training pairs, each of its own product."""
    from recsys_ray.artifacts import stage
    from recsys_ray.config import Config

    with stage(root, "pairs", "bench") as staging:
        entry = staging.write_table("pairs/train/bucket-00000.parquet", pair_table(pairs))
        staging.commit([entry], config=Config(), facts={})


def pair_table(pairs: list[tuple[str, str]]) -> Any:
    """The pairs as TRAINING_PAIR rows."""
    import pyarrow as pa

    from recsys_ray.schema import TRAINING_PAIR

    rows = [{"pair_id": str(number), "query": query, "query_type": "title", "row_id": number, "product_id": str(number),
             "group_id": number, "text": text, "negative_row_ids": [], "negative_texts": [], "negative_group_ids": [],
             "split": "train"} for number, (query, text) in enumerate(pairs)]
    return pa.Table.from_pylist(rows, TRAINING_PAIR)


def model_path(task: dict[str, Any]) -> Path:
    """The directory of the model."""
    from recsys_ray.models.sentence_layout import find_model

    return find_model(task["model"])


SIDES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ours": ours, "st": st, "torchrun": torchrun, "ray": ray}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = json.loads(Path(sys.argv[1]).read_bytes())
    if sys.argv[2:] == ["worker"]:
        worker(settings)
    else:
        os.environ["OMP_NUM_THREADS"] = str(settings["threads"])    # of what it starts; its own are set by torch
        result = SIDES[settings["side"]](settings)
        (Path(settings["directory"]) / "measured.json").write_text(json.dumps(result))
