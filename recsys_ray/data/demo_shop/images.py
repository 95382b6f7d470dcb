"""Small pictures of products, in which colour, pattern, neckline, sleeve and material can be seen."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from recsys_ray.data.demo_shop.catalogue import Catalogue
from recsys_ray.data.demo_shop.config import DemoShopConfig
from recsys_ray.data.demo_shop.outlines import outline
from recsys_ray.data.demo_shop.products import Product, products
from recsys_ray.data.demo_shop.streams import uniforms
from recsys_ray.data.demo_shop.vocabulary import palette
from recsys_ray.schema import IMAGE

Pixels = npt.NDArray[np.float64]        # (side, side, 3), 0 to 255
SHARD_ROWS = 512
BRIGHTNESS, SHIFT = 0.15, 0.05          # photographs differ: light, and where the thing lies
WEAVES = {      # material -> how its surface varies: (grain, period in pixels, direction x, direction y, gloss)
    "cotton": (4, 0, 0, 0, 0), "linen": (10, 3, 1, 0, 0), "wool": (18, 0, 0, 0, 0), "denim": (9, 3, 1, 1, 0),
    "silk": (1, 26, 1, 2, 34), "knit": (4, 6, 1, 0, 20), "chiffon": (2, 30, 1, 0, 14), "leather": (3, 40, 1, 1, 44),
    "velvet": (7, 44, 0, 1, 30), "fleece": (26, 0, 0, 0, 0), "polyester": (1, 4, 0, 1, 6),
    "solid_wood": (5, 9, 0, 1, 18), "veneer": (2, 14, 0, 1, 8), "metal": (1, 30, 1, 0, 40), "glass": (1, 50, 1, 1, 56),
    "bonded_leather": (3, 36, 1, 1, 40), "boucle": (30, 0, 0, 0, 0), "rattan": (4, 5, 1, 1, 34),
    "marble": (3, 21, 2, 1, 26),
}


def write_images(folder: Path, catalogue: Catalogue, config: DemoShopConfig) -> int:
    """The number of images written, as IMAGE rows in Parquet shards: one of each of the first products."""
    count = min(config.image_products, len(catalogue))
    for shard, start in enumerate(range(0, count, SHARD_ROWS)):
        folder.mkdir(exist_ok=True)
        numbers = np.arange(start, min(start + SHARD_ROWS, count))
        ids = catalogue.ids(numbers)
        chance = uniforms(config.seed, "images", numbers, 4)
        pictures = [jpeg(draw(product, config.image_side, config.clarity.image_noise, chance[at], config.seed))
                    for at, product in enumerate(products(catalogue, numbers))]
        side = pa.array([config.image_side] * len(ids), pa.int32())
        table = pa.table({
            "image_id": [f"{one}.jpg" for one in ids], "product_id": ids,
            "group_id": pa.nulls(len(ids), pa.string()), "label": pa.nulls(len(ids), pa.string()),
            "width": side, "height": side, "data": pa.array(pictures, pa.large_binary())}, schema=IMAGE)
        pq.write_table(table, folder / f"images-{shard:05d}.parquet", compression="none", write_page_checksum=True)
    return count


def jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    """The picture as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def draw(product: Product, side: int, noise: float, chance: npt.NDArray[np.float64], seed: int
         ) -> npt.NDArray[np.uint8]:
    """The picture of a product, uint8 of shape (side, side, 3)."""
    values = {facet.key: facet.values[value] for facet, value in
              zip(product.department.facets, product.values, strict=True) if value >= 0}
    grain = np.sqrt(12) * (uniforms(seed, f"grain/{product.number}", np.arange(side), 2 * side) - 0.5)
    shades = list(palette().values())       # a book's or a bottle's colour is its maker's
    plain = shades[sum(product.brand.encode()) % len(shades)]
    cloth = surface(palette().get(values.get("colour", ""), plain), values, side, grain[:, :side])
    canvas = Image.new("L", (4 * side, 4 * side), 0)
    pen = ImageDraw.Draw(canvas)
    across, down = SHIFT * (chance[0] - 0.5), SHIFT * (chance[1] - 0.5)
    for points, filled in outline(product, values):
        pen.polygon([((x + across) * 4 * side, (y + down) * 4 * side) for x, y in points], fill=255 * filled)
    mask = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float64)[:, :, None] / 255
    ground = np.full((side, side, 3), 214.0 + 36.0 * chance[2])
    picture = mask * cloth * (1 + BRIGHTNESS * (chance[3] - 0.5)) + (1 - mask) * ground
    picture += noise * grain[:, side:, None]
    return np.asarray(np.clip(picture, 0, 255), np.uint8)


def surface(colour: tuple[int, int, int], values: dict[str, str], side: int, grain: Pixels) -> Pixels:
    """Colour, pattern and weave all over, before anything is cut out of it."""
    base = np.array(colour, np.float64)
    accent = 255 - base * 0.35 if base.mean() < 128 else base * 0.35
    y, x = np.mgrid[0:side, 0:side] * (80 / side)
    share = pattern(values.get("pattern", "solid"), x, y)[:, :, None]
    cloth = base * (1 - share) + accent * share
    roughness, period, right, down, gloss = WEAVES.get(values.get("material", ""), (3, 0, 0, 0, 0))
    cloth = cloth + (roughness * grain)[:, :, None]
    if period:
        cloth = cloth + (gloss + 4) * np.sin((right * x + down * y) * 2 * np.pi / period)[:, :, None]
    return np.asarray(cloth, np.float64)


def pattern(name: str, x: Pixels, y: Pixels) -> Pixels:
    """How much of the accent colour lies at each point, 0 to 1, shape (side, side)."""
    turned = np.arctan2(y % 18 - 9, x % 18 - 9)
    swirl = np.hypot(x - 40, y - 36) * 2 * np.pi / 22 + 2 * np.arctan2(y - 36, x - 40)
    shapes = {
        "stripe": y % 10 < 4,
        "check": ((x % 12 < 4).astype(float) + (y % 12 < 4)) / 2,
        "dots": (x % 11 - 5.5) ** 2 + (y % 11 - 5.5) ** 2 < 9,
        "floral": np.hypot(x % 18 - 9, y % 18 - 9) < 4.5 + 2.5 * np.cos(5 * turned),
        "leopard": np.abs(np.hypot((x + 3 * np.sin(y / 3)) % 13 - 6, y % 10 - 5) - 3.4) < 1.2,
        "chevron": (y + np.abs(x % 16 - 8)) % 12 < 5,
        "tie_dye": 0.5 + 0.5 * np.sin(swirl),
    }
    return np.asarray(shapes.get(name, np.zeros_like(x)), np.float64)
