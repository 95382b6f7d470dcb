"""Encoded images -> pixels, refusing what is too large, too small, broken or no photograph at all.

The header is read first and the pixels only when it passes, so an image of a few kilobytes that
unpacks to gigabytes costs nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from recsys_ray.config import Config
from recsys_ray.schema import IMAGE, QUARANTINE

Pixels = npt.NDArray[np.uint8]      # (height, width, 3)
Kept = TypeVar("Kept")


class ImageLimits(Config):
    """What an image may be."""

    max_bytes: int = Field(default=20 << 20, gt=0)          # encoded
    max_pixels: int = Field(default=40_000_000, gt=0)       # width x height
    min_side: int = Field(default=8, ge=1)                  # of the shorter side, in pixels
    max_aspect: float = Field(default=20.0, ge=1)           # longer side / shorter side
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class ImageError(ValueError):
    """An image that is not used; the message is the reason."""


def decode_image(data: bytes, limits: ImageLimits | None = None) -> Pixels:
    """Pixels, uint8 of shape (height, width, 3), of `open_image`."""
    return np.asarray(open_image(data, limits), dtype=np.uint8)


def open_image(data: bytes, limits: ImageLimits | None = None) -> Image.Image:
    """A loaded RGB image, the way up that the camera's EXIF says; first frame only.

    Transparency lies on white. Errors: `ImageError` for anything outside `limits`, for another
    format, and for bytes that do not decode.
    """
    limits = limits or ImageLimits()
    if not data:
        raise ImageError("no bytes")
    if len(data) > limits.max_bytes:
        raise ImageError(f"{len(data)} bytes; the limit is {limits.max_bytes}")
    try:
        with Image.open(io.BytesIO(data), formats=limits.formats) as image:
            _check_size(image.width, image.height, limits)
            image.load()
            _turn_upright(image)
            return _in_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError:      # its own message names an object in memory
        raise ImageError(f"does not decode: none of {', '.join(limits.formats)}") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input; every one means this image
        raise ImageError(f"does not decode: {type(error).__name__}: {str(error)[:120]}") from None


def decoded_images(raw: pa.Table, then: Callable[[Image.Image], Kept], limits: ImageLimits | None = None
                   ) -> tuple[pa.Table, list[Kept], pa.Table]:
    """`raw` (IMAGE, with or without `_error` and `_source`) -> (usable IMAGE rows, what `then` made of each image, in
    RGB, QUARANTINE rows).

    Width and height of usable rows are those of the upright image. Bytes are kept as they came; the pixels of one image
    are held at a time.
    """
    kept: list[int] = []
    sizes: list[tuple[int, int]] = []
    made: list[Kept] = []
    refused: list[dict[str, Any]] = []
    columns = raw.column_names
    for at in range(raw.num_rows):
        error = raw["_error"][at].as_py() if "_error" in columns else None
        try:
            if error:
                raise ImageError(error)
            image = open_image(raw["data"][at].as_py() or b"", limits)
        except ImageError as reason:
            facts = {name: raw[name][at].as_py() for name in IMAGE.names if name in columns and name != "data"}
            refused.append({
                "table": "images", "source": raw["_source"][at].as_py() if "_source" in columns else None,
                "key": facts.get("image_id"), "reason": str(reason), "row": json.dumps(facts)[:2000],
            })
        else:
            kept.append(at)
            sizes.append(image.size)
            made.append(then(image))
    usable = raw.take(pa.array(kept, pa.int64()))
    measured = {"width": [width for width, _ in sizes], "height": [height for _, height in sizes]}
    filled = [pa.array(measured[field.name], field.type) if field.name in measured
              else usable[field.name].cast(field.type) if field.name in columns else pa.nulls(len(kept), field.type)
              for field in IMAGE]
    return pa.Table.from_arrays(filled, schema=IMAGE), made, pa.Table.from_pylist(refused, schema=QUARANTINE)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise ImageError(f"{width} x {height} pixels; the limit is {limits.max_pixels} in all")
    if min(width, height) < limits.min_side:
        raise ImageError(f"{width} x {height} pixels; the shorter side must have {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageError(f"{width} x {height} pixels; one side is over {limits.max_aspect:g} times the other")


def _turn_upright(image: Image.Image) -> None:
    with suppress(Exception):   # broken EXIF must not cost a good picture, and Pillow raises many types for it
        ImageOps.exif_transpose(image, in_place=True)


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):      # 16 bits a pixel: Pillow would clip them to white instead of scaling
        grey = (np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8).astype(np.uint8)
        return Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    return image if image.mode == "RGB" else image.convert("RGB")
