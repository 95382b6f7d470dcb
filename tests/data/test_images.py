"""Decoding: what comes out, and what is refused before it costs memory."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recsys_ray.data.images import ImageError, ImageLimits, decode_image, decoded_images
from recsys_ray.schema import IMAGE, QUARANTINE


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing: a decompression bomb's first bytes."""
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_pixels_have_the_right_shape_and_colours() -> None:
    image = Image.new("RGB", (20, 10), "red")
    image.putpixel((19, 0), (0, 0, 255))
    pixels = decode_image(encoded(image))
    assert pixels.shape == (10, 20, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, 19].tolist() == [0, 0, 255]


def test_exif_turns_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6    # the camera was held upright: turn by 90 degrees clockwise
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))    # white on the left must come out on top
    pixels = decode_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert pixels.shape == (32, 16, 3)
    assert pixels[4, 8].min() > 200
    assert pixels[28, 8].max() < 50


def test_transparency_lies_on_white() -> None:
    pixels = decode_image(encoded(Image.new("RGBA", (10, 10), (255, 0, 0, 0))))
    assert pixels.min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(Image.new(mode, (10, 12)), kind)).shape == (12, 10, 3)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((10, 10), 0x8000, dtype=np.uint16))
    assert decode_image(encoded(grey))[0, 0].tolist() == [128, 128, 128]


@pytest.mark.parametrize(("data", "limits", "reason"), [
    (b"", {}, "no bytes"), (b"<html>not found</html>", {}, "does not decode"),
    (b"x" * 101, {"max_bytes": 100}, "101 bytes; the limit is 100"),
    (encoded(Image.new("RGB", (100, 100))), {"max_pixels": 9999}, "100 x 100 pixels; the limit is 9999"),
    (encoded(Image.new("RGB", (4, 100))), {}, "the shorter side must have 8"),
    (encoded(Image.new("RGB", (10, 300))), {}, "over 20 times"),
    (encoded(Image.new("RGB", (30, 30)), "JPEG")[:-200], {}, "does not decode"),
    (encoded(Image.new("RGB", (30, 30)), "TIFF"), {}, "does not decode"),
    (png_header(12_000, 9_000), {}, "12000 x 9000 pixels"), (png_header(60_000, 60_000), {}, "does not decode"),
])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_refused(data: bytes, limits: dict[str, int], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_image(data, ImageLimits(**limits))


@settings(max_examples=200)
@given(st.data())
def test_damaged_bytes_are_refused_or_decoded_never_anything_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]))
    original = bytearray(encoded(Image.new("RGB", (16, 16), "red"), kind))
    for at in data.draw(st.lists(st.integers(0, len(original) - 1), max_size=8)):
        original[at] = data.draw(st.integers(0, 255))
    try:
        pixels = decode_image(bytes(original), ImageLimits(max_pixels=1_000_000))
    except ImageError:
        return
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


def test_a_table_is_divided_into_usable_and_refused() -> None:
    raw = pa.table({
        "image_id": ["good", "bad", None], "data": pa.array([encoded(Image.new("RGB", (20, 10))), b"junk", None],
                                                            pa.large_binary()),
        "_error": [None, None, "image_id is missing"], "_source": ["f:1", "f:2", "f:3"],
    })
    kept, shapes, refused = decoded_images(raw, lambda image: (image.height, image.width, len(image.getbands())))
    assert kept.schema == IMAGE
    assert shapes == [(10, 20, 3)]
    assert kept.select(["image_id", "width", "height"]).to_pylist() == [{"image_id": "good", "width": 20, "height": 10}]
    assert refused.schema == QUARANTINE
    assert refused["source"].to_pylist() == ["f:2", "f:3"]
    assert refused["reason"][1].as_py() == "image_id is missing"
    assert b"junk" not in refused["row"][0].as_py().encode()


def test_real_photographs_decode(real_data: Callable[[str], Path]) -> None:
    photographs = next(pq.ParquetFile(real_data("clothing") / "images.parquet").iter_batches(50))
    for data, width, height in zip(photographs["jpeg"], photographs["width"], photographs["height"], strict=True):
        assert decode_image(data.as_py()).shape == (height.as_py(), width.as_py(), 3)
