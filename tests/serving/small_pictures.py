"""Pictures of the small shop: plain colours, a network that sees nothing else, and a hybrid index."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from fastapi import FastAPI
from PIL import Image
from small_shop import COLOURS, LIMITS, Parts, build_small_index, catalogue, ready

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config
from recsys_ray.models.attribute_adapter import ImageTowerConfig
from recsys_ray.models.image_encoder import ImageEncoder, ImageEncoderConfig
from recsys_ray.models.sentence_layout import EncoderError
from recsys_ray.retrieval.hybrid_build import BuildHybridConfig, build_hybrid
from recsys_ray.retrieval.hybrid_index import open_hybrid
from recsys_ray.retrieval.hybrid_search import HybridSearcher
from recsys_ray.retrieval.hybrid_vectors import Name, Weights
from recsys_ray.serving.pictures import SENT, PictureCalls, PictureQuestion, PicturesConfig, PictureSearch
from recsys_ray.serving.routes import create_api

SHADES = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 180, 30), "oak": (150, 110, 60),
          "white": (240, 240, 240)}
PICTURE_LIMITS = LIMITS.replace(max_picture_bytes=20_000)
WITHOUT = 100       # products from here on have no picture


class ColourTower:
    """Pictures as their mean colour and a constant: no model; texts are not known."""

    identity = {"model": "colours", "dimension": 4}     # noqa: RUF012 - a constant

    def encode(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Vectors (N, 4)."""
        colours = np.array([one.reshape(-1, 3).mean(axis=0) for one in pictures]) / 255
        return np.column_stack([colours, np.ones(len(colours))]).astype(np.float32)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Never anything."""
        raise EncoderError("colours knows pictures alone")


def photograph(colour: str, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    """An encoded picture of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, SHADES[colour]).save(stream, kind)
    return stream.getvalue()


def write_pictures(root: Path, count: int = WITHOUT, encoder: ImageEncoder | None = None) -> Artifact:
    """An `image_vectors` artefact of the first products, each a little different, and of one that nobody sells."""
    shades = [np.array(SHADES[COLOURS[number % len(COLOURS)]]) + zlib.crc32(b"%d" % number) % 7
              for number in range(count)]
    pictures = [np.broadcast_to(shade.astype(np.uint8), (40, 30, 3)) for shade in shades]
    tower = ColourTower()
    vectors = tower.encode(pictures) if encoder is None else encoder.encode_images(pictures)
    rows = [{"image_id": f"i{number}", "product_id": product["product_id"], "group_id": None, "label": None,
             "width": 30, "height": 40, "vector": vector.tolist()}
            for number, (product, vector) in enumerate(zip(catalogue(), vectors, strict=False))]
    rows.append({**rows[0], "image_id": "stray", "product_id": "nobody sells it"})
    table = pa.Table.from_pylist(rows)
    table = table.set_column(table.column_names.index("vector"), "vector", table["vector"].cast(
        pa.list_(pa.float32(), vectors.shape[1])))
    with stage(root, "image_vectors", "small") as staging:
        return staging.commit([staging.write_table("vectors/part-00000.parquet", table)], config=Config(), facts={
            "encoder": (encoder or tower).identity, "dimension": vectors.shape[1]})


def build_real_hybrid(root: Path, index: Path) -> PicturesConfig:
    """A hybrid index over `index`, with pictures of 25 products as the packaged network sees them."""
    tower = ImageTowerConfig(encoder=ImageEncoderConfig(device="cpu"))
    write_pictures(root / "pictures", 25, ImageEncoder(tower.encoder))
    build_hybrid(BuildHybridConfig(index=index, images=root / "pictures", output=root / "hybrid"))
    return PicturesConfig(index=root / "hybrid", tower=tower)


def build_small_hybrid(root: Path, *, learn: bool = True, centred: tuple[Name, ...] | None = None) -> Path:
    """The root of a hybrid index over the small shop."""
    build_small_index(root / "index")
    write_pictures(root / "pictures")
    build_hybrid(BuildHybridConfig(index=root / "index", images=root / "pictures", output=root / "hybrid",
                                   weights=Weights(text=0.5, image=0.5), learn=learn, centred=centred))
    return root / "hybrid"


def pictured(parts: Parts, hybrid: Path) -> FastAPI:
    """The application with a picture stage in its process."""
    search = PictureSearch.__new__(PictureSearch)       # with a network that needs no weights
    search.searcher = HybridSearcher(open_hybrid(hybrid), None, ColourTower(), SENT)  # type: ignore[arg-type]

    async def ask(question: PictureQuestion) -> Any:
        return search.ask(question)

    gateway = parts.gateway()
    gateway.pictures = PictureCalls(ask, ready)
    return create_api(gateway, PICTURE_LIMITS)
