"""Artefacts: published whole or not at all, and refused when anything differs from the manifest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.artifacts import (
    Artifact,
    ArtifactError,
    current_version,
    find_artifact,
    list_versions,
    open_artifact,
    prune,
    rollback,
    stage,
)
from recsys_ray.config import Config

TABLE = pa.table({"row_id": pa.array([1, 2, 3], pa.int64()), "text": ["a", "b", "c"]})


class Options(Config):
    buckets: int = 2


def publish(root: Path, fingerprint: str = "f" * 16, table: pa.Table = TABLE) -> Artifact:
    with stage(root, "texts", fingerprint) as staging:
        return staging.commit([staging.write_table("part/one.parquet", table)], config=Options(), facts={"dim": 3})


def test_a_published_version_reads_back_with_its_identity(tmp_path: Path) -> None:
    publish(tmp_path)
    artifact = open_artifact(tmp_path, "texts")
    assert artifact.table("part/one.parquet").equals(TABLE)
    assert artifact.manifest.rows("part/") == 3
    assert artifact.manifest.config == {"buckets": 2}
    assert artifact.manifest.facts == {"dim": 3}
    assert len(artifact.manifest.git_sha) >= 7


def test_equal_fingerprint_is_found_and_another_is_not(tmp_path: Path) -> None:
    assert find_artifact(tmp_path, "texts", "a") is None
    publish(tmp_path, "a")
    assert find_artifact(tmp_path, "texts", "a") is not None
    assert find_artifact(tmp_path, "texts", "b") is None


def test_another_kind_is_refused(tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(ArtifactError, match="holds a 'texts' artefact where 'index' is needed"):
        open_artifact(tmp_path, "index")


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "swap_manifest", "escape"])
def test_damage_is_refused_and_named(tmp_path: Path, damage: str) -> None:
    path = publish(tmp_path).path
    file = path / "part/one.parquet"
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "delete":
        file.unlink()
    else:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        if damage == "escape":
            manifest["files"][0]["path"] = "../../../etc/passwd"
        else:
            del manifest["files"]
        (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"one\.parquet|MANIFEST\.json"):
        open_artifact(tmp_path, "texts").file("part/one.parquet")


def test_every_single_byte_flip_is_caught(tmp_path: Path) -> None:
    file = publish(tmp_path).path / "part/one.parquet"
    original = file.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(original), 100):
        mutated = bytearray(original)
        mutated[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(mutated)
        with pytest.raises(ArtifactError, match="SHA-256"):
            open_artifact(tmp_path, "texts").file("part/one.parquet")


def test_only_files_in_the_manifest_are_read(tmp_path: Path) -> None:
    path = publish(tmp_path).path
    (path / "part/stray.parquet").write_bytes(b"torn")
    artifact = open_artifact(tmp_path, "texts")
    assert artifact.names() == ["part/one.parquet"]
    with pytest.raises(ArtifactError, match="names no file"):
        artifact.file("part/stray.parquet")


@pytest.mark.parametrize("name", ["../x", "/etc", "A", "a/b", "", "x" * 65])
def test_a_version_name_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    publish(tmp_path)
    (tmp_path / "CURRENT").write_text(name)
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path, "texts")


def test_rollback_and_prune(tmp_path: Path) -> None:
    first, second, third = (publish(tmp_path, name).manifest.version for name in "abc")
    assert [manifest.version for manifest in list_versions(tmp_path)] == [first, second, third]
    assert rollback(tmp_path).version == second == current_version(tmp_path)
    assert rollback(tmp_path, third).version == third
    assert prune(tmp_path, keep=2) == [first]
    rollback(tmp_path)
    with pytest.raises(ArtifactError, match="no version before"):
        rollback(tmp_path)
    with pytest.raises(ArtifactError, match="no version 'nope'"):
        rollback(tmp_path, "nope")


def test_a_damaged_version_does_not_bar_the_way_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = (publish(tmp_path, name).manifest.version for name in "abc")
    (tmp_path / "versions" / second / "MANIFEST.json").write_text("{")
    assert rollback(tmp_path).version == first
    assert f"{second}/MANIFEST.json: not a valid manifest" in caplog.text
    with pytest.raises(ArtifactError, match="no version"):
        rollback(tmp_path, second)
    assert rollback(tmp_path, third).version == third


def test_a_second_writer_is_turned_away(tmp_path: Path) -> None:
    code = ("import sys; from recsys_ray.artifacts import stage\n"
            "with stage(sys.argv[1], 'texts', 'b'): pass")
    with stage(tmp_path, "texts", "a"):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "another process is writing" in other.stderr


def test_staged_work_survives_and_foreign_work_is_swept(tmp_path: Path) -> None:
    with stage(tmp_path, "texts", "a") as staging:
        staging.write_table("x.parquet", TABLE)
    with stage(tmp_path, "texts", "a") as staging:
        assert staging.entry("x.parquet", 3).rows == 3
    with stage(tmp_path, "texts", "b") as staging:
        staging.write_table("x.parquet", TABLE)
    assert [path.name for path in (tmp_path / "staging").iterdir()] == ["b"]


CRASHING = """
import sys
import threading
from recsys_ray.artifacts import stage
from recsys_ray.config import Config
import pyarrow as pa
with stage(sys.argv[1], "texts", "second") as staging:
    staging.commit([staging.write_table("part/one.parquet", pa.table({"row_id": [9]}))], config=Config())
"""


@pytest.mark.parametrize("point", ["before_manifest", "before_publish", "before_current", "after_current"])
def test_a_writer_killed_while_publishing_leaves_old_or_new_never_a_mix(tmp_path: Path, point: str) -> None:
    publish(tmp_path, "first")
    environment = {**os.environ, "RECSYS_CRASH_AT": point}
    command = [sys.executable, "-c", CRASHING, str(tmp_path)]
    assert subprocess.run(command, env=environment, check=False).returncode == 137
    artifact = open_artifact(tmp_path, "texts")
    artifact.verify()
    assert artifact.manifest.fingerprint == ("second" if point == "after_current" else "first")
    assert subprocess.run(command, check=False).returncode == 0
    assert open_artifact(tmp_path, "texts").table("part/one.parquet").to_pydict() == {"row_id": [9]}


def test_a_writer_that_waits_gets_its_turn(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with stage(tmp_path, "texts", "b", wait_s=30):
            order.append("second")

    with stage(tmp_path, "texts", "a"):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join(30)
    assert order == ["first", "second"]
