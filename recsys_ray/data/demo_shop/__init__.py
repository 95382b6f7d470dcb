"""The demo shop: a seeded generator of a whole shop, with the truth behind it kept apart.

    <output>/public/   Demo_Shop.jsonl.gz, meta_Demo_Shop.jsonl.gz (Amazon Reviews 2023), images/, shop.json
    <output>/truth/    what was planted: products, concerns, users, reviews, queries, judgments, dirty rows

Every row is a function of (seed, stream name, row number) alone, so any row can be made without the
rows before it, memory does not grow with the reviews, and the same configuration gives the same bytes.
"""

from recsys_ray.data.demo_shop.config import DemoShopConfig, DemoShopError
from recsys_ray.data.demo_shop.identity import GENERATOR_VERSION, generator_hash
from recsys_ray.data.demo_shop.writer import make_demo_shop

__all__ = ["GENERATOR_VERSION", "DemoShopConfig", "DemoShopError", "generator_hash", "make_demo_shop"]
