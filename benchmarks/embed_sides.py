"""One side of the embedding benchmark in a process of its own: `python benchmarks/embed_sides.py TASK.json`.

Writes measured.json (cpu_s, wall_s, ...) and vectors.npy beside the task.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

UNIT_ROWS = 1024    # rows a shard, as EmbedConfig has it
NUM_BUCKETS = 16
SAMPLE_S = 0.1
EMBEDDERS: list[Any] = []   # of a process of the plain job


class TreeCpu:
    """CPU seconds of this process and all its descendants, also of those that end meanwhile."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}
        self._sample()
        self._before = dict(self._seen)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def seconds(self) -> float:
        """CPU seconds since the start of the watch."""
        self._stop.set()
        self._thread.join()
        self._sample()
        return sum(value - self._before.get(key, 0.0) for key, value in self._seen.items())

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        root = psutil.Process()
        for process in [root, *root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:
                continue


def ceiling(task: dict[str, Any]) -> dict[str, Any]:
    """GFLOP/s of a 2048 x 2048 matrix product on one thread, per dtype: the best of ten."""
    import torch

    torch.set_num_threads(1)
    found = {}
    for name in ("float32", "bfloat16"):
        square = torch.randn(2048, 2048).to(getattr(torch, name))
        best = float("inf")
        for _ in range(10):
            start = time.process_time()
            torch.mm(square, square)
            best = min(best, time.process_time() - start)
        found[name] = 2 * 2048**3 / best / 1e9
    return found


def encode(task: dict[str, Any]) -> dict[str, Any]:
    """`SentenceTransformer.encode` with its defaults and all cores, in fp32 or bf16."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(model_path(task)), device="cpu",
                                model_kwargs={"dtype": getattr(torch, task["dtype"])})
    model.encode(task["texts"][:8], show_progress_bar=False)
    cpu, start = time.process_time(), time.perf_counter()
    vectors = model.encode(task["texts"], show_progress_bar=False)
    measured = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - start}
    save_vectors(task, np.asarray(vectors, dtype=np.float32))
    return {**measured, "threads": torch.get_num_threads()}


def plain(task: dict[str, Any]) -> dict[str, Any]:
    """Our encoder in worker processes of one thread each, timed once all are loaded and warm."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(task["workers"] + 1), context.Queue()
    parts = deal(task["texts"], task["workers"])
    workers = [context.Process(target=plain_worker, args=(task["encoder"], part, barrier, answers, number))
               for number, part in enumerate(parts)]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    found = sorted((answers.get() for _ in workers), key=lambda answer: int(answer["number"]))
    wall = time.perf_counter() - start
    for worker in workers:
        worker.join()
    order = np.argsort(np.concatenate(deal_places(len(task["texts"]), task["workers"])))
    save_vectors(task, np.concatenate([one["vectors"] for one in found])[order])
    return {"cpu_s": sum(one["cpu_s"] for one in found), "wall_s": max(wall, *(one["wall_s"] for one in found)),
            "tokens": sum(one["tokens"] for one in found), "flops": sum(one["flops"] for one in found),
            "dtype": found[0]["dtype"]}


def plain_worker(settings: dict[str, Any], texts: list[str], barrier: Any, answers: Any, number: int) -> None:
    encoder = load_encoder(settings)
    encoder.encode_documents(texts[:8])
    barrier.wait()
    cpu, start = time.process_time(), time.perf_counter()
    vectors = encoder.encode_documents(texts)
    measured = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - start}
    tokens, flops = work_of(encoder, texts)
    answers.put({**measured, "number": number, "vectors": vectors, "dtype": encoder.dtype, "tokens": tokens,
                 "flops": flops})


def plain_job(task: dict[str, Any]) -> dict[str, Any]:
    """The embedding stage without Ray: the very functions of the job in a pool of processes, one thread each.

    Everything but the dealing out is the same (plans, hashes, shards, checksums, merge), so that what
    the job takes longer is Ray's own share.
    """
    from recsys_ray.artifacts import open_artifact, stage
    from recsys_ray.retrieval import embed
    from recsys_ray.retrieval.embedding_store import plan_units

    directory = Path(task["directory"])
    write_prepared(directory / "prepared", task["texts"])
    watch, start = TreeCpu(), time.perf_counter()
    config = embed_config(task)
    prepared = open_artifact(config.prepared, "prepared")
    buckets = [Path(name).stem for name in prepared.names("product_text/")]
    context = multiprocessing.get_context("spawn")
    with stage(config.output, embed.KIND, "plain") as staging, context.Pool(task["workers"]) as pool:
        job = embed._Job(str(config.prepared), prepared.manifest.version, str(config.output), None, str(staging.path),
                         config.encoder.model_dump(mode="json"), embed.encoder_identity(config.encoder))
        plans = pool.starmap(embed._plan_bucket, [(job, bucket, config.unit_rows, config.encoder.max_chars)
                                                  for bucket in buckets])
        units = plan_units(plans, config.unit_rows)
        pool.starmap(plain_unit, [(job, unit) for unit in units], chunksize=1)
        units_of = {bucket: sorted({unit.name for unit in units for chunk in unit.chunks if chunk.bucket == bucket})
                    for bucket in buckets}
        merged = pool.starmap(embed._merge_bucket, [(job, plan, units_of[plan.bucket]) for plan in plans])
        staging.commit([entry for entry, _ in merged], config=config, facts={})
    return {"wall_s": time.perf_counter() - start, "cpu_s": watch.seconds()}


def plain_unit(job: Any, unit: Any) -> None:
    """Embed one unit with this process's own embedder, made at its first unit."""
    from recsys_ray.retrieval import embed

    if not EMBEDDERS:
        EMBEDDERS.append(embed._UnitEmbedder(job))
    EMBEDDERS[0]._embed(unit)


def embed_config(task: dict[str, Any]) -> Any:
    """The job's configuration; every worker has at least two units."""
    from recsys_ray.retrieval.embed import EmbedConfig
    from recsys_ray.runtime import RayConfig

    directory, rows = Path(task["directory"]), len(task["texts"])
    return EmbedConfig.model_validate({
        "prepared": directory / "prepared", "output": directory / "embeddings", "encoder": task["encoder"],
        "workers": task["workers"], "unit_rows": min(UNIT_ROWS, max(1, rows // (2 * task["workers"]))),
        "ray": RayConfig(progress=False)})


def ray(task: dict[str, Any]) -> dict[str, Any]:
    """Our job: `embed_products` on prepared texts; starting Ray is timed apart."""
    from recsys_ray.retrieval.embed import embed_products
    from recsys_ray.runtime import connected

    write_prepared(Path(task["directory"]) / "prepared", task["texts"])
    begun, config = time.perf_counter(), embed_config(task)
    with connected(config.ray):
        ray_start = time.perf_counter() - begun
        watch, start = TreeCpu(), time.perf_counter()
        artifact = embed_products(config)
        measured = {"wall_s": time.perf_counter() - start, "cpu_s": watch.seconds(), "ray_start_s": ray_start}
    rows = pa.concat_tables(artifact.tables("vectors/", ["product_id", "vector"])).sort_by("product_id")
    flat = rows.column("vector").combine_chunks().flatten().to_numpy()
    save_vectors(task, flat.reshape(rows.num_rows, -1))
    return measured


def usual_ray(task: dict[str, Any]) -> dict[str, Any]:
    """What Ray's examples do: `encode` inside `map_batches`, one actor a core, `write_parquet`."""
    import ray as rays

    from recsys_ray.runtime import RayConfig, connected

    directory = Path(task["directory"])
    pq.write_table(pa.table({"text": task["texts"]}), directory / "texts.parquet")
    batch_size, path = task["batch_size"], str(model_path(task))

    class Encoder:
        def __init__(self) -> None:
            from sentence_transformers import SentenceTransformer

            self.model = SentenceTransformer(path, device="cpu")

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            batch["vector"] = self.model.encode(list(batch["text"]), batch_size=min(batch_size, 32),
                                                show_progress_bar=False)
            return batch

    begun = time.perf_counter()
    with connected(RayConfig(progress=False)):
        ray_start = time.perf_counter() - begun
        watch, start = TreeCpu(), time.perf_counter()
        data = rays.data.read_parquet(str(directory / "texts.parquet")).repartition(2 * task["workers"])
        encoded = data.map_batches(Encoder, batch_size=batch_size, num_cpus=1,
                                   compute=rays.data.ActorPoolStrategy(size=task["workers"]))
        encoded.write_parquet(str(directory / "out"))
        return {"wall_s": time.perf_counter() - start, "cpu_s": watch.seconds(), "ray_start_s": ray_start}


def model_path(task: dict[str, Any]) -> Path:
    from recsys_ray.models.sentence_layout import find_model

    return find_model(task["encoder"]["model"])


def load_encoder(settings: dict[str, Any]) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    from recsys_ray.models.registry import build_text_encoder
    from recsys_ray.models.text_encoder import TextEncoderConfig

    torch.set_num_threads(1)
    return build_text_encoder(TextEncoderConfig.model_validate(settings))


def work_of(encoder: Any, texts: Sequence[str]) -> tuple[int, float]:
    """(tokens, floating point operations of the matrix products) of distinct `texts`."""
    from transformers import AutoConfig, AutoTokenizer

    body = AutoConfig.from_pretrained(str(encoder.layout.transformer))
    tokenizer = AutoTokenizer.from_pretrained(str(encoder.layout.transformer))
    limit = encoder.identity["max_tokens"]
    lengths = [len(ids) for ids in tokenizer(list(set(texts)), truncation=True, max_length=limit)["input_ids"]]
    a_token = 2 * body.num_hidden_layers * (4 * body.hidden_size**2 + 2 * body.hidden_size * body.intermediate_size)
    attention = 4 * body.num_hidden_layers * body.hidden_size
    return sum(lengths), float(sum(length * a_token + length**2 * attention for length in lengths))


def deal_places(count: int, workers: int) -> list[npt.NDArray[np.int64]]:
    """Which texts each worker gets: every worker the same mix."""
    return [np.arange(number, count, workers) for number in range(workers)]


def deal(texts: Sequence[str], workers: int) -> list[list[str]]:
    return [[texts[place] for place in places] for places in deal_places(len(texts), workers)]


def write_prepared(root: Path, texts: Sequence[str]) -> None:
    """A `prepared` artefact with nothing but product texts; product ids sort as the texts are numbered."""
    from recsys_ray.artifacts import stage
    from recsys_ray.config import Config
    from recsys_ray.ids import bucket_of, row_ids
    from recsys_ray.schema import PRODUCT_TEXT, conform

    names = [f"{number:09d}" for number in range(len(texts))]
    ids = row_ids(names)
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]
    table = conform(pa.table({"row_id": ids, "product_id": names, "text": texts, "text_hash": hashes}), PRODUCT_TEXT,
                    "texts")
    buckets = bucket_of(ids, NUM_BUCKETS)
    with stage(root, "prepared", "bench") as staging:
        files = [staging.write_table(f"product_text/bucket-{bucket:05d}.parquet",
                                     table.filter(pa.array(buckets == bucket)).sort_by("row_id"))
                 for bucket in range(NUM_BUCKETS)]
        staging.commit(files, config=Config(), facts={"num_buckets": NUM_BUCKETS})


def save_vectors(task: dict[str, Any], vectors: npt.NDArray[np.float32]) -> None:
    if len(vectors) < 10_000:  # enough for the cosines; the short texts are only timed
        np.save(Path(task["directory"]) / "vectors.npy", vectors)


SIDES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ceiling": ceiling, "encode": encode, "plain": plain, "plain_job": plain_job, "ray": ray, "usual_ray": usual_ray}


if __name__ == "__main__":
    the_task = json.loads(Path(sys.argv[1]).read_bytes())
    result = SIDES[the_task["side"]](the_task)
    (Path(the_task["directory"]) / "measured.json").write_text(json.dumps(result))
