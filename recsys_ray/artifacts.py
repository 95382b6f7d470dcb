"""Versioned artefacts: a directory, one manifest that names every file, and a CURRENT pointer.

    root/
      CURRENT                      the name of the version readers use, replaced atomically
      versions/<version>/          immutable, appears by one rename
        MANIFEST.json              kind, fingerprint, config, git sha, parents, facts, files with sha256
        ...                        only files that the manifest names are ever read
      staging/<fingerprint>/       work in progress; survives a crash, so a rerun continues it

A killed writer leaves the old version or the new one, never a mix. `root` is a local path or a
mount that every node shares.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from pydantic import ValidationError

from recsys_ray.config import Config

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
CURRENT = "CURRENT"
VERSION_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class ArtifactError(ValueError):
    """An artefact that is missing, damaged or of another kind; the message names the file and why."""


class FileEntry(Config):
    """One file of an artefact: relative POSIX path, size in bytes, SHA-256, rows if it is a table."""

    path: str
    bytes: int
    sha256: str
    rows: int | None = None


class Manifest(Config):
    """What an artefact is and what it was made from."""

    kind: str
    version: str
    fingerprint: str                # of the inputs: equal fingerprint = nothing to do again
    created: str                    # ISO 8601, UTC
    git_sha: str
    config: dict[str, Any]
    parents: dict[str, str]         # name -> "<kind>/<version>" of each artefact it was built from
    facts: dict[str, Any]           # identity and counts, e.g. encoder, text template, dimension
    files: tuple[FileEntry, ...]

    @property
    def reference(self) -> str:
        """How a child names this artefact as its parent."""
        return f"{self.kind}/{self.version}"

    def rows(self, prefix: str = "") -> int:
        """Total rows of the files whose path starts with `prefix`."""
        return sum(entry.rows or 0 for entry in self.files if entry.path.startswith(prefix))


@dataclass(frozen=True)
class Artifact:
    """One opened, complete version. Files are checked against their SHA-256 at first use."""

    path: Path
    manifest: Manifest
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    def names(self, prefix: str = "") -> list[str]:
        """The manifest's file names below `prefix`, sorted."""
        return sorted(entry.path for entry in self.manifest.files if entry.path.startswith(prefix))

    def file(self, name: str) -> Path:
        """The path of a file named by the manifest, after its size and SHA-256 were found right."""
        entry = next((entry for entry in self.manifest.files if entry.path == name), None)
        if entry is None:
            raise ArtifactError(f"{self.path}: the manifest names no file {name!r}")
        path = self.path / name
        if name not in self._verified:
            check_file(path, entry)
            self._verified.add(name)
        return path

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """One Parquet file of the artefact as a table."""
        return pq.ParquetFile(self.file(name), page_checksum_verification=True).read(
            columns=list(columns) if columns is not None else None)

    def tables(self, prefix: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The Parquet files below `prefix`, one table each, in name order: memory of one file at a time."""
        for name in self.names(prefix):
            yield self.table(name, columns)

    def verify(self) -> None:
        """Check every file; raises `ArtifactError` naming the first that is damaged."""
        for entry in self.manifest.files:
            check_file(self.path / entry.path, entry)
            self._verified.add(entry.path)


def check_file(path: Path, entry: FileEntry) -> None:
    """Raise `ArtifactError` unless `path` is the very file that `entry` describes."""
    if not path.is_file():
        raise ArtifactError(f"{path}: missing, although the manifest names it; restore it or rebuild the artefact")
    size = path.stat().st_size
    if size != entry.bytes:
        raise ArtifactError(f"{path}: {size} bytes where the manifest says {entry.bytes}: truncated or replaced")
    if sha256_of(path) != entry.sha256:
        raise ArtifactError(f"{path}: SHA-256 differs from the manifest: damaged or tampered with")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_artifact(root: str | Path, kind: str, version: str | None = None) -> Artifact:
    """The current (or the named) version below `root`, its manifest checked and every file present.

    Errors: `ArtifactError` when nothing was published there, the manifest is unreadable, the kind is
    another one, or a file is missing or has the wrong size.
    """
    root = Path(root)
    name = version or current_version(root)
    if name is None:
        raise ArtifactError(f"{root}: no {kind} artefact was published here (no {CURRENT} file); run its job first")
    if not VERSION_NAME.fullmatch(name):
        raise ArtifactError(f"{root}: {name!r} is not a version name")
    artifact = _open_version(root / "versions" / name)
    if artifact.manifest.kind != kind:
        raise ArtifactError(f"{artifact.path}: holds a {artifact.manifest.kind!r} artefact where {kind!r} is needed")
    for entry in artifact.manifest.files:
        path = artifact.path / entry.path
        if not path.is_file() or path.stat().st_size != entry.bytes:
            check_file(path, entry)
    return artifact


def find_artifact(root: str | Path, kind: str, fingerprint: str) -> Artifact | None:
    """The current version below `root` if it was made from the inputs with this fingerprint, else None."""
    if current_version(Path(root)) is None:
        return None
    artifact = open_artifact(root, kind)
    if artifact.manifest.fingerprint != fingerprint:
        return None
    log.info("%s is there already", artifact.manifest.reference)
    return artifact


def current_version(root: Path) -> str | None:
    """The version that CURRENT names, or None when nothing was published."""
    pointer = Path(root) / CURRENT
    return pointer.read_text(encoding="ascii", errors="replace").strip() if pointer.is_file() else None


def list_versions(root: str | Path) -> list[Manifest]:
    """The manifests of all complete versions below `root`, oldest first; a damaged one is left out with a warning."""
    found = []
    for path in (Path(root) / "versions").glob("*"):
        if (path / MANIFEST).is_file():
            try:
                found.append(_open_version(path).manifest)
            except ArtifactError as error:  # one damaged version must not bar the way back to a whole one
                log.warning("left out: %s", error)
    return sorted(found, key=lambda manifest: (manifest.created, manifest.version))


def rollback(root: str | Path, version: str | None = None) -> Manifest:
    """Point CURRENT at `version`, or at the one published before the current one; returns its manifest."""
    root = Path(root)
    names = [manifest.version for manifest in list_versions(root)]
    if version is None:
        current = current_version(root)
        position = names.index(current) if current in names else 0
        if position == 0:
            raise ArtifactError(f"{root}: there is no version before {current}; versions: {', '.join(names) or 'none'}")
        version = names[position - 1]
    if version not in names:
        raise ArtifactError(f"{root}: no version {version!r}; versions: {', '.join(names) or 'none'}")
    artifact = _open_version(root / "versions" / version)
    artifact.verify()
    _replace_text(root / CURRENT, version)
    return artifact.manifest


def prune(root: str | Path, keep: int) -> list[str]:
    """Delete the oldest versions beyond `keep`, never the current one; returns the deleted names."""
    root = Path(root)
    names = [manifest.version for manifest in list_versions(root) if manifest.version != current_version(root)]
    doomed = names[: max(0, len(names) - max(0, keep - 1))]
    for name in doomed:
        shutil.rmtree(root / "versions" / name)
    return doomed


def _open_version(path: Path) -> Artifact:
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise ArtifactError(f"{manifest_path}: missing: not a complete artefact")
    try:
        manifest = Manifest.model_validate_json(manifest_path.read_bytes())
    except ValidationError as error:
        raise ArtifactError(f"{manifest_path}: not a valid manifest: {error.errors()[0]['msg']}") from None
    for entry in manifest.files:
        _safe_relative(entry.path, manifest_path)
    return Artifact(path, manifest)


def _safe_relative(name: str, where: Path) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name or name in ("", "."):
        raise ArtifactError(f"{where}: names the file {name!r}, which leads outside the artefact")


class Staging:
    """Work in progress towards one version; entered with `stage`, ended with `commit`.

    The directory is kept when the writer dies, so whoever stages the same fingerprint again finds
    the files that were finished. Each file appears under its name only when whole.
    """

    def __init__(self, root: Path, kind: str, fingerprint: str) -> None:
        self.root, self.kind, self.fingerprint = root, kind, fingerprint
        self.path = root / "staging" / fingerprint
        self.path.mkdir(parents=True, exist_ok=True)

    def write_table(self, name: str, table: pa.Table) -> FileEntry:
        """Write one Parquet file (zstd, page checksums); returns its manifest entry."""
        return write_table(self.path, name, table)

    def entry(self, name: str, rows: int | None = None) -> FileEntry:
        """The manifest entry of a file already in staging: its size and SHA-256 as they are now."""
        return file_entry(self.path, name, rows)

    def commit(self, files: Sequence[FileEntry], *, config: Config, parents: Mapping[str, Manifest] | None = None,
               facts: Mapping[str, Any] | None = None) -> Artifact:
        """Publish the staged files as a new version and point CURRENT at it.

        After the directory rename the version is complete; after the replacement of CURRENT readers see
        it. Files that `files` does not name are deleted only then: until the version is out, they are
        what a rerun would continue from.
        """
        manifest = Manifest(
            kind=self.kind, version=self._free_version(), fingerprint=self.fingerprint,
            created=datetime.now(UTC).isoformat(timespec="microseconds"), git_sha=git_sha(),
            config=config.model_dump(mode="json"),
            parents={name: parent.reference for name, parent in (parents or {}).items()},
            facts=dict(facts or {}), files=tuple(sorted(files, key=lambda entry: entry.path)))
        crash_point("before_manifest")
        _replace_text(self.path / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True))
        crash_point("before_publish")
        target = self.root / "versions" / manifest.version
        target.parent.mkdir(exist_ok=True)
        os.rename(self.path, target)
        _sync_directory(target.parent)
        crash_point("before_current")
        _replace_text(self.root / CURRENT, manifest.version)
        crash_point("after_current")
        _remove_unnamed(target, {MANIFEST, *(entry.path for entry in manifest.files)})
        log.info("published %s: %d files, %d rows", manifest.reference, len(manifest.files), manifest.rows())
        return Artifact(target, manifest)

    def _free_version(self) -> str:
        stamp = f"{datetime.now(UTC):%Y%m%dt%H%M%S}-{self.fingerprint[:8]}"
        taken = {path.name for path in (self.root / "versions").glob(f"{stamp}*")}
        return stamp if stamp not in taken else f"{stamp}-{len(taken)}"


@contextmanager
def stage(root: str | Path, kind: str, fingerprint: str, wait_s: float = 0.0) -> Iterator[Staging]:
    """The staging directory for these inputs, held by one writer at a time.

    A second writer gets `ArtifactError` at once, or after `wait_s` seconds; one that waited should look whether
    the version it wanted is there now. The lock is the operating system's, so it ends with
    the process that holds it, however that ends. Abandoned work of other fingerprints is deleted: what is begun
    is of these inputs, or of none.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        raise ArtifactError(f"{root}: another process is writing a version here; wait for it or end it") from None
    try:
        for path in (root / "staging").glob("*"):
            if path.name != fingerprint:
                shutil.rmtree(path, ignore_errors=True)
        yield Staging(root, kind, fingerprint)
    finally:
        lock.release()


def write_table(directory: Path, name: str, table: pa.Table) -> FileEntry:
    """Write `directory/name` as Parquet so that it appears whole or not at all; returns its entry."""
    target = directory / name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
    _publish_file(partial, target)
    return file_entry(directory, name, table.num_rows)


def file_entry(directory: Path, name: str, rows: int | None = None) -> FileEntry:
    """The manifest entry of `directory/name`."""
    path = directory / name
    return FileEntry(path=name, bytes=path.stat().st_size, sha256=sha256_of(path), rows=rows)


def write_text(path: Path, text: str) -> None:
    """Write a small text file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace_text(path, text)


def _remove_unnamed(directory: Path, named: set[str]) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):  # what lies in a directory comes before it
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(directory).as_posix() not in named:
            path.unlink()


def _publish_file(partial: Path, target: Path) -> None:
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, target)


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def crash_point(name: str) -> None:
    """End the process as `kill -9` would when RECSYS_CRASH_AT names this point (crash tests only)."""
    if os.environ.get("RECSYS_CRASH_AT") == name:
        os._exit(137)


@cache
def git_sha() -> str:
    """The commit of the running code, with `+dirty` for uncommitted changes; `unknown` outside a checkout.

    A Ray job's working directory holds no .git, so the submitter's RECSYS_GIT_SHA is taken first.
    """
    if sha := os.environ.get("RECSYS_GIT_SHA"):
        return sha
    here = Path(__file__).resolve().parent
    try:
        sha = _git(here, "rev-parse", "HEAD")
        return sha + ("+dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
