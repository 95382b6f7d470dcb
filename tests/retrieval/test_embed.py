"""The embedding job on a local Ray: rows, resume, carry-over, quarantine, kills."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray

from recsys_ray.artifacts import Artifact, open_artifact, stage
from recsys_ray.config import Config, fingerprint
from recsys_ray.ids import bucket_of, row_ids
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.retrieval import embed
from recsys_ray.retrieval.embed import EmbedConfig, embed_products
from recsys_ray.schema import PRODUCT_TEXT, conform

pytestmark = pytest.mark.ray

BUCKETS = 4
REPO = Path(__file__).resolve().parents[2]


def prepared(root: Path, texts: dict[str, str]) -> Path:
    ids = row_ids(texts)
    table = conform(pa.table({
        "row_id": ids, "product_id": list(texts), "text": list(texts.values()), "lexical_text": list(texts.values()),
        "text_hash": [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts.values()],
    }), PRODUCT_TEXT, "texts")
    buckets = bucket_of(ids, BUCKETS)
    with stage(root, "prepared", fingerprint(texts)) as staging:
        files = [staging.write_table(f"product_text/bucket-{bucket:05d}.parquet",
                                     table.filter(pa.array(buckets == bucket)).sort_by("row_id"))
                 for bucket in range(BUCKETS)]
        staging.commit(files, config=Config(), facts={"num_buckets": BUCKETS})
    return root


def shop(count: int, changed: Iterable[int] = ()) -> dict[str, str]:
    marks = dict.fromkeys(changed, "new")
    return {f"p{i}": f"item {i} " + "soft velvet " * (i % 7) + marks.get(i, "") for i in range(count)}


def config_of(tmp_path: Path, model: Path, **changes: object) -> EmbedConfig:
    return EmbedConfig.model_validate({
        "prepared": tmp_path / "prepared", "output": tmp_path / "embeddings", "workers": 2, "unit_rows": 16,
        "encoder": {"model": str(model), "device": "cpu"}, "ray": {"progress": False, "num_cpus": 4}, **changes})


def rows_of(artifact: Artifact) -> dict[str, tuple[float, ...]]:
    tables = pa.concat_tables(artifact.tables("vectors/")).to_pylist()
    found = {row["product_id"]: tuple(row["vector"]) for row in tables}
    assert len(found) == len(tables)
    return found


@pytest.fixture
def model(tiny_text_model: Callable[..., Path]) -> Path:
    return tiny_text_model()


def test_every_product_gets_its_vector_once(tmp_path: Path, model: Path, local_ray: None) -> None:
    texts = {**shop(70), "empty": "  ", "giant": "velvet " * 9000}
    prepared(tmp_path / "prepared", texts)
    config = config_of(tmp_path, model)
    artifact = embed_products(config)
    found = rows_of(artifact)
    assert set(found) == set(texts) - {"empty"}
    names = [name for name in texts if name != "empty"]
    expected = build_text_encoder(config.encoder).encode_documents([texts[name] for name in names])
    cosines = (np.array([found[name] for name in names]) * expected).sum(axis=1)
    assert cosines.min() > 0.999
    facts = artifact.manifest.facts
    assert (facts["embedded_now"], facts["reused"], facts["quarantined"], facts["clipped"]) == (71, 0, 1, 1)
    assert facts["units_recomputed"] == 0
    assert artifact.table("quarantine.parquet")["key"].to_pylist() == ["empty"]
    assert sorted(path.name for path in artifact.path.iterdir()) == ["MANIFEST.json", "quarantine.parquet", "vectors"]
    again = embed_products(config)
    assert again.manifest.version == artifact.manifest.version


def test_one_percent_of_changes_embeds_exactly_those(tmp_path: Path, model: Path, local_ray: None,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path / "prepared", shop(200))
    first = embed_products(config_of(tmp_path, model))
    prepared(tmp_path / "prepared", shop(200, changed=[5, 130]))
    second = embed_products(config_of(tmp_path, model))
    assert (second.manifest.facts["embedded_now"], second.manifest.facts["reused"]) == (2, 198)
    before, after = rows_of(first), rows_of(second)
    assert {name for name in before if before[name] != after[name]} == {"p5", "p130"}
    links = [(second.path / name).stat().st_nlink for name in second.names("vectors/")]
    assert sorted(links)[-1] == 2  # a bucket without a change is the very file of the earlier version


def test_a_run_that_died_before_the_merge_continues_and_another_encoder_starts_anew(
        tmp_path: Path, tiny_text_model: Callable[..., Path], local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path / "prepared", shop(90))
    config = config_of(tmp_path, tiny_text_model(seed=1))

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed, "_merge", dies)
        with pytest.raises(KeyboardInterrupt):
            embed_products(config)
    assert not (tmp_path / "embeddings" / "CURRENT").exists()
    shards = sorted((tmp_path / "embeddings" / "staging").rglob("shards/*.parquet"))
    assert len(shards) >= 6
    content = bytearray(shards[1].read_bytes())
    content[len(content) // 2] ^= 1
    shards[0].unlink()
    shards[1].write_bytes(content)
    shards[2].write_bytes(content[:-5])
    shards[3].with_suffix(".json").write_text("{")
    artifact = embed_products(config)
    assert artifact.manifest.facts["units_recomputed"] == 4
    assert set(rows_of(artifact)) == set(shop(90))

    other = embed_products(config_of(tmp_path, tiny_text_model(seed=2)))
    assert (other.manifest.facts["embedded_now"], other.manifest.facts["reused"]) == (90, 0)
    assert other.manifest.facts["encoder"] != artifact.manifest.facts["encoder"]


def test_a_run_that_died_while_publishing_embeds_nothing_again(tmp_path: Path, model: Path, local_ray: None,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path / "prepared", shop(40))
    config = config_of(tmp_path, model)
    for point in ("before_manifest", "before_publish", "before_current"):
        def die(name: str, here: str = point) -> None:
            if name == here:
                raise KeyboardInterrupt

        monkeypatch.setattr("recsys_ray.artifacts.crash_point", die)
        with pytest.raises(KeyboardInterrupt):
            embed_products(config)
        assert not (tmp_path / "embeddings" / "CURRENT").exists()
        monkeypatch.setattr(embed, "_embed", lambda config, job, units: pytest.fail("embeds again") if units else None)
    monkeypatch.setattr("recsys_ray.artifacts.crash_point", lambda name: None)
    assert set(rows_of(embed_products(config))) == set(shop(40))


def test_losses_without_progress_end_the_run(tmp_path: Path, model: Path, local_ray: None,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path / "prepared", shop(10))
    tries = []

    def lose(*_: object) -> None:
        tries.append(1)
        raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(embed, "_embed", lose)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        embed_products(config_of(tmp_path, model))
    assert len(tries) == embed.LOSSES_WITHOUT_PROGRESS


def test_no_products_is_an_empty_artefact(tmp_path: Path, model: Path, local_ray: None) -> None:
    prepared(tmp_path / "prepared", {})
    artifact = embed_products(config_of(tmp_path, model))
    assert artifact.manifest.facts["rows"] == 0
    assert rows_of(artifact) == {}


@pytest.mark.parametrize("victim", ["worker", "all"])  # the driver alone: tests/cluster and `make chaos`
def test_a_killed_run_ends_with_the_rows_of_an_uninterrupted_one(tmp_path: Path, model: Path, victim: str) -> None:
    texts = {f"p{i}": "velvet sofa with brass legs " * 12 + str(i) for i in range(1500)}
    prepared(tmp_path / "prepared", texts)
    settings = config_of(tmp_path, model, unit_rows=64)
    file = tmp_path / "embed.yaml"
    file.write_text(settings.to_yaml())
    command = [sys.executable, str(REPO / "jobs/embed.py"), "--config", str(file)]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    _wait_for_shards(tmp_path / "embeddings", 2, process)
    tree = psutil.Process(process.pid).children(recursive=True)
    actors = [child for child in tree if "_UnitEmbedder" in " ".join(child.cmdline())]
    assert actors
    if victim == "worker":
        actors[0].send_signal(signal.SIGKILL)
        assert process.wait(120) == 0  # Ray starts the actor again
    else:
        for one in [*tree, psutil.Process(process.pid)]:
            _kill(one)
        assert process.wait(60) == -signal.SIGKILL
        assert not (tmp_path / "embeddings" / "CURRENT").exists()
        _end(tree)
        subprocess.run(command, cwd=tmp_path, check=True, stderr=subprocess.DEVNULL, timeout=200)
    artifact = open_artifact(tmp_path / "embeddings", "embeddings")
    artifact.verify()
    assert set(rows_of(artifact)) == set(texts)
    assert artifact.manifest.facts["units_recomputed"] <= 4


def _wait_for_shards(output: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(list((output / "staging").rglob("shards/*.json"))) < count:
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _end(tree: list[psutil.Process]) -> None:
    """What a killed driver leaves behind ends by itself; wait for it, then insist."""
    _, alive = psutil.wait_procs(tree, timeout=20)
    for process in alive:
        _kill(process)
