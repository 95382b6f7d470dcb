"""Paths to files, and files to pieces of work: local, `s3://` and `hf://` through one file system interface."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal

from recsys_ray.data.sources.config import SourceError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FileKind = Literal["jsonl", "csv", "parquet"]
KINDS: dict[str, FileKind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}
SPLIT_BYTES = 32 << 20      # of an uncompressed JSONL file or of Parquet row groups, in one piece of work
TRUTH_FOLDER = "truth"      # what a demo shop knows and no product or review reader may see


@dataclass(frozen=True)
class DataFile:
    """One file to read."""

    path: str                   # absolute, with its protocol unless local
    size: int                   # bytes
    state: str                  # changes when the content does: the store's own tag, else the time of change
    endpoint_url: str | None = None

    @property
    def gzipped(self) -> bool:
        """Whether the file is compressed as a whole and so can be read from its start only."""
        return self.path.lower().endswith(".gz")

    @property
    def kind(self) -> FileKind:
        """What the name says the file holds."""
        return KINDS[_suffix(self.path)]

    def open(self) -> IO[bytes]:
        """The file's bytes as stored, seekable."""
        system, inner = file_system(self.path, self.endpoint_url)
        stream: IO[bytes] = system.open(inner, "rb")
        return stream


def file_system(path: str, endpoint_url: str | None = None) -> tuple[AbstractFileSystem, str]:
    """The file system that holds `path`, and the path inside it.

    Errors: `SourceError` for a protocol other than none, file, s3 and hf, and for a URL with
    credentials in it.
    """
    import fsspec

    protocol, separator, rest = path.partition("://")
    if not separator:
        return fsspec.filesystem("file"), os.path.abspath(path)
    if "@" in rest.split("/")[0] and protocol != "hf":
        raise SourceError("a path must not hold credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    if protocol == "file":
        return fsspec.filesystem("file"), os.path.abspath(rest)
    if protocol == "s3":
        endpoint = endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
        # No cached listings: a file that changes while the process lives must be seen as it is.
        return fsspec.filesystem("s3", client_kwargs={"endpoint_url": endpoint} if endpoint else {},
                                 use_listings_cache=False), rest
    if protocol == "hf":
        from huggingface_hub import HfFileSystem

        return HfFileSystem(), rest
    raise SourceError(f"{path}: cannot read {protocol}://; use a local path, s3:// or hf://")


def find_files(
    path: str, endpoint_url: str | None = None, *, kinds: Sequence[FileKind] = ("jsonl", "csv", "parquet"),
    allow_truth: bool = False,
) -> list[DataFile]:
    """Every readable file of a file path, folder or glob, sorted by name.

    Errors: `SourceError` for a path that names nothing, an empty file, a file of another kind, and a
    path in a demo shop's truth folder (unless `allow_truth`).
    """
    system, inner = file_system(path, endpoint_url)
    try:
        entries = _entries(system, inner)
    except FileNotFoundError:
        entries = []
    if not entries:
        raise SourceError(f"{path}: no such file, folder or glob match")
    protocol = path.partition("://")[0] + "://" if "://" in path and not path.startswith("file://") else ""
    readable = [entry for entry in entries if KINDS.get(_suffix(str(entry["name"]))) in kinds]
    if not readable:
        found = ", ".join(sorted(PurePosixPath(str(entry["name"])).name for entry in entries)[:5])
        wanted = [suffix for suffix, kind in KINDS.items() if kind in kinds]
        raise SourceError(f"{path}: expected {' '.join(wanted)} (or .gz of a text file), found {found}")
    files = [_data_file(entry, protocol, endpoint_url) for entry in sorted(readable, key=lambda entry: entry["name"])]
    for file in files:
        if not allow_truth:
            refuse_truth(file.path)
        if not file.size:
            raise SourceError(f"{file.path}: the file is empty (0 bytes)")
    return files


def refuse_truth(path: str) -> None:
    """Nothing; raises `SourceError` when `path`, links followed, lies in a folder named `truth`."""
    real = path if "://" in path else str(Path(path).resolve())
    for candidate in {path, real}:
        if TRUTH_FOLDER in (part.lower() for part in PurePosixPath(candidate).parts):
            raise SourceError(f"{path}: lies in a demo shop's {TRUTH_FOLDER!r} folder, which no product or review "
                              "reader may open; read the shop's 'public' folder")


def _entries(system: AbstractFileSystem, inner: str) -> list[dict[str, Any]]:
    """The file system's own description of each file that `inner` names."""
    if any(character in inner for character in "*?[") and not system.exists(inner):
        found = system.glob(inner, detail=True)
        return [entry for entry in found.values() if entry["type"] == "file"]
    entry = system.info(inner)
    if entry["type"] == "file":
        return [entry]
    inside = system.find(inner, detail=True).values()
    root = len(PurePosixPath(str(entry["name"])).parts)
    hidden = {name for name in (str(one["name"]) for one in inside)
              if any(part.startswith((".", "_")) for part in PurePosixPath(name).parts[root:])}
    return [one for one in inside if one["type"] == "file" and str(one["name"]) not in hidden]


def _data_file(entry: dict[str, Any], protocol: str, endpoint_url: str | None) -> DataFile:
    state = entry.get("ETag") or entry.get("blob_id") or entry.get("mtime") or entry.get("LastModified") or ""
    return DataFile(protocol + str(entry["name"]), int(entry.get("size") or 0), str(state).strip('"'), endpoint_url)


def _suffix(path: str) -> str:
    name = PurePosixPath(path.lower())
    if name.suffix != ".gz":
        return name.suffix
    inner = name.with_suffix("").suffix
    return inner if KINDS.get(inner) in ("jsonl", "csv") else name.suffix


def byte_ranges(size: int, split_bytes: int = SPLIT_BYTES) -> list[tuple[int, int]]:
    """Half-open ranges [start, stop) that cover `size` bytes in nearly equal parts of at most `split_bytes`."""
    parts = max(1, -(-size // split_bytes))
    edges = [size * part // parts for part in range(parts + 1)]
    return list(pairwise(edges))
