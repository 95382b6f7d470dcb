"""Where pictures are -> their bytes: in the table itself, in local files, on S3, or behind URLs.

Places come from a shop's table, so none is trusted: a local place stays below the table's `root`, a URL is
fetched only when `urls` allows it, only from a public address that is looked up once and then connected to,
without redirects, and never more than the limit of bytes.
"""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pydantic import Field

from recsys_ray.config import Config
from recsys_ray.data.images import ImageError, ImageLimits, Kept, decoded_images
from recsys_ray.data.sources.blocks import Recipe, pieces_of, read_piece
from recsys_ray.data.sources.config import SourceError, TableSource
from recsys_ray.data.sources.files import file_system, find_files
from recsys_ray.data.sources.plan import mapped_recipe
from recsys_ray.schema import IMAGE

LOCATION = pa.field("location", pa.string())    # a path below `root`, s3://..., or a URL
TABLE = pa.schema([*(field.with_nullable(field.name != "image_id") for field in IMAGE), LOCATION])
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
Lookup = Callable[[str, int], Sequence[str]]


class UrlConfig(Config):
    """How pictures are fetched from the web; nothing is unless `allowed`."""

    allowed: bool = False
    at_once: int = Field(default=8, ge=1)           # of one worker
    timeout_s: float = Field(default=10.0, gt=0)
    retries: int = Field(default=2, ge=0)           # after a refusal that may pass
    private_addresses: bool = False                 # also of one's own network; only for a shop that is one's own


class ImageTable(Config):
    """A table of pictures: Parquet, CSV or JSONL with image_id and either data (the bytes) or location."""

    path: str
    columns: dict[str, str] = Field(default_factory=dict)   # ours (image_id, product_id, group_id, label, data,
    root: str = "."                                         # location): theirs; places are below root
    limits: ImageLimits = ImageLimits()
    urls: UrlConfig = UrlConfig()

    def recipe(self) -> Recipe:
        """How the table is read, checked: the files exist and hold the columns."""
        files = find_files(self.path)
        return mapped_recipe(files, "images", dict(self.columns), TABLE, ("image_id",), TableSource(products=self.path))


def with_bytes(rows: pa.Table, table: ImageTable) -> pa.Table:
    """IMAGE rows with `_error` and `_source` from rows of TABLE: what is not in the table is fetched, some at once."""
    def one(data: bytes | None, location: str | None, error: str | None) -> tuple[bytes | None, str | None]:
        if error or data:
            return data, error
        try:
            return fetch(location, table), None
        except ImageError as reason:
            return None, str(reason)

    columns = [rows[name].to_pylist() for name in ("data", "location", "_error")]
    with ThreadPoolExecutor(table.urls.at_once) as pool:
        found = list(pool.map(one, *columns))
    filled = {"data": pa.array([data for data, _ in found], pa.large_binary()),
              "_error": pa.array([error for _, error in found], pa.string())}
    names = [*IMAGE.names, "_error", "_source"]
    return pa.table({name: filled.get(name, rows[name]) for name in names})


def chosen_images(table: ImageTable, image_ids: pa.Array, then: Callable[[Image.Image], Kept]
                  ) -> Iterator[tuple[pa.Table, list[Kept], pa.Table]]:
    """What `decoded_images` makes of the pictures with these ids, block by block; the others are not decoded."""
    for block in _blocks(table):
        rows = block.filter(pc.is_in(block["image_id"].cast(pa.string()), value_set=image_ids))
        if rows.num_rows:
            yield decoded_images(with_bytes(rows, table), then, table.limits)


def unpack_images(table: ImageTable, folder: Path) -> int:
    """Write the pictures of a table as files named by their image ids, those that are there already left alone.

    Returns how many the table has. Errors: `ImageError` for an id that is no plain file name, or without its bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for block in _blocks(table):
        for row in with_bytes(block, table).select(["image_id", "data", "_error"]).to_pylist():
            if row["_error"] or not _is_file_name(row["image_id"]):
                raise ImageError(f"{table.path}: image {row['image_id']!r} cannot become a file: "
                                 f"{row['_error'] or 'its id is no plain file name'}")
            if not (target := folder / row["image_id"]).is_file():
                partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")     # never half there
                partial.write_bytes(row["data"])
                os.replace(partial, target)
            count += 1
    return count


def _blocks(table: ImageTable) -> Iterator[pa.Table]:
    recipe = table.recipe()
    for piece in (one for file in recipe.files for one in pieces_of(file)):
        yield from read_piece(piece, recipe)


def _is_file_name(text: str) -> bool:
    return text not in {"", ".", ".."} and PurePosixPath(text).name == text


def fetch(location: str | None, table: ImageTable) -> bytes:
    """The bytes at a place; raises `ImageError` with the reason why there are none."""
    if not location:
        raise ImageError("neither data nor a location")
    if location.startswith(("http://", "https://")):
        if not table.urls.allowed:
            raise ImageError("is behind a URL; fetching is off, images.urls.allowed turns it on")
        return fetch_url(location, table.limits.max_bytes, table.urls)
    return _stored(location, table)


def _stored(location: str, table: ImageTable) -> bytes:
    protocol, separator, rest = location.partition("://")
    if separator and protocol != "s3":
        raise ImageError(f"{protocol}:// is not read; use a path below root, s3:// or a URL")
    if ".." in PurePosixPath(rest if separator else location).parts or (not separator and location.startswith("/")):
        raise ImageError(f"{location!r} leaves the root; give places relative to images.root")
    place = location if separator else f"{table.root.rstrip('/')}/{location}"
    if "://" not in place and not Path(place).resolve().is_relative_to(Path(table.root).resolve()):
        raise ImageError(f"{location!r} is a link out of the root")
    try:
        system, inner = file_system(place)
        size = int(system.info(inner)["size"])
        if size > table.limits.max_bytes:
            raise ImageError(f"{size} bytes; the limit is {table.limits.max_bytes}")
        with system.open(inner, "rb") as stream:
            found: bytes = stream.read(table.limits.max_bytes + 1)
    except (OSError, SourceError) as error:
        raise ImageError(f"cannot be read: {type(error).__name__}") from None
    return found


# --- URLs -----------------------------------------------------------------------------------------
def fetch_url(url: str, max_bytes: int, config: UrlConfig, lookup: Lookup | None = None) -> bytes:
    """The body behind a URL, tried again after a refusal that may pass; raises `ImageError` with the last reason."""
    reason = ImageError("was not tried")
    for turn in range(config.retries + 1):
        try:
            return _download(url, max_bytes, config, lookup or _addresses)
        except _TryAgainError as error:
            reason = ImageError(str(error))
            if turn < config.retries:
                time.sleep(min(5.0, 0.2 * 2**turn) * (0.5 + random.random()))
    raise reason


class _TryAgainError(Exception):
    """A refusal that may pass."""


def _download(url: str, max_bytes: int, config: UrlConfig, lookup: Lookup) -> bytes:
    import httpx

    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise ImageError("is not a URL") from None
    if not host or parts.username or parts.password:
        raise ImageError("is not a URL, or holds a password")
    address = _allowed_address(host, port, config, lookup)
    # Connected to by the address that was checked: asked again, the name could say another one.
    shown = f"[{address}]" if ":" in address else address
    target = parts._replace(netloc=f"{shown}:{port}", fragment="").geturl()
    headers = {"host": parts.netloc, "accept": "image/*"}
    body = bytearray()
    try:
        with httpx.Client(timeout=config.timeout_s, follow_redirects=False, trust_env=False) as client, client.stream(
                "GET", target, headers=headers, extensions={"sni_hostname": host}) as answer:
            if answer.status_code in RETRIED:
                raise _TryAgainError(f"status {answer.status_code}")
            if answer.status_code != 200:
                raise ImageError(f"status {answer.status_code}" + ("; redirects are not followed"
                                                                   if answer.has_redirect_location else ""))
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > max_bytes:
                    raise ImageError(f"more than {max_bytes} bytes")
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise _TryAgainError(f"cannot be fetched: {type(error).__name__}") from None
    return bytes(body)


def _addresses(host: str, port: int) -> Sequence[str]:
    found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(one[4][0]) for one in found]


def _allowed_address(host: str, port: int, config: UrlConfig, lookup: Lookup) -> str:
    try:
        found = lookup(host, port)
    except (OSError, UnicodeError):
        raise _TryAgainError("its host is not known") from None
    for address in found:
        if config.private_addresses or ipaddress.ip_address(address.partition("%")[0]).is_global:
            return address
    raise ImageError("its host has no public address; images.urls.private_addresses allows those of one's own network")
