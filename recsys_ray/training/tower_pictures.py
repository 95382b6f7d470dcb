"""The pictures that a network is trained on: decoded and framed once, in one file that every worker maps."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_ray.config import ConfigError
from recsys_ray.data.attribute_items import Items
from recsys_ray.data.image_files import ImageTable, chosen_images
from recsys_ray.data.images import Pixels
from recsys_ray.models.image_encoder import Framing, ImageEncoder

log = logging.getLogger(__name__)

FILE = "pictures.npy"
CHECKED = 8         # pictures whose vectors are computed again before anything is trained
AS_BEFORE = 0.98    # similarity of the two: half precision and another machine round differently

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """M framed pictures on disk."""

    pixels: Pixels      # (M, side, side, 3)
    places: Ints        # (M,) which of the items they are, sorted

    def framed(self, places: Ints) -> list[Pixels]:
        """The pictures of some items, in their order; read when they are used."""
        return [self.pixels[row] for row in np.searchsorted(self.places, places)]


def open_pictures(directory: Path, items: Items, places: Ints, images: ImageTable, encoder: ImageEncoder) -> Pictures:
    """The pictures of the items at `places`, from `directory`, written there first if they are not there yet.

    Errors: `ConfigError` when a picture can no longer be read, or is not the one that its vector was made of.
    """
    if items.image_ids is None:
        raise ValueError("these items were made without the ids of their pictures")
    places = np.unique(places)
    file = directory / FILE
    if not file.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        _write(file, items.image_ids.take(pa.array(places)), images, encoder.framing)
    found = Pictures(np.load(file, mmap_mode="r"), places)
    some = places[np.linspace(0, len(places) - 1, min(CHECKED, len(places))).astype(np.int64)]
    alike = (encoder.encode_framed(found.framed(some)) * items.vectors[some]).sum(axis=1)
    if alike.min() < AS_BEFORE:
        raise ConfigError(f"tower.images: {items.image_ids[int(some[alike.argmin()])]} is not the picture that its "
                          f"vector was made of (similarity {alike.min():.2f}); embed the pictures again")
    return found


def _write(file: Path, image_ids: pa.Array, images: ImageTable, framing: Framing) -> None:
    """Decode M pictures into `file`, uint8 (M, side, side, 3), in the order of their ids: whole, or not at all."""
    row_of = {one: row for row, one in enumerate(image_ids.to_pylist())}
    if len(row_of) < len(image_ids):
        raise ConfigError(f"tower: {len(image_ids) - len(row_of)} pictures have the id of another one; image_id has to "
                          "tell them apart")
    partial = file.with_name(f".{file.name}-{os.getpid()}")
    pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8,
                                       shape=(len(row_of), framing.side, framing.side, 3))
    reasons = dict.fromkeys(row_of, "the table has no such picture")
    for usable, framed, refused in chosen_images(images, image_ids, framing.frame):
        reasons |= dict(zip(refused["key"].to_pylist(), refused["reason"].to_pylist(), strict=True))
        for image_id, one in zip(usable["image_id"].to_pylist(), framed, strict=True):
            pixels[row_of[image_id]] = one
            reasons.pop(image_id, None)
    if reasons:
        partial.unlink()
        first = next(iter(reasons))
        raise ConfigError(f"tower.images: {len(reasons)} pictures of the vectors cannot be read now; the first, "
                          f"{first}: {reasons[first]}. Bring them back, or embed the pictures again")
    pixels.flush()
    os.replace(partial, file)
    log.info("%d pictures decoded, %.1f MB", len(row_of), pixels.nbytes / 1e6)
