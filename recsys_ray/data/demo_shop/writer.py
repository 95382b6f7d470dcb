"""The files of a shop, streamed chunk by chunk into a directory that appears whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from recsys_ray.artifacts import sha256_of, write_text
from recsys_ray.data.demo_shop.config import DemoShopConfig, DemoShopError
from recsys_ray.data.demo_shop.identity import GENERATOR_VERSION, generator_hash
from recsys_ray.data.demo_shop.people import open_market
from recsys_ray.data.demo_shop.real_texts import RealStock
from recsys_ray.data.demo_shop.records import write_products, write_queries, write_reviews, write_users
from recsys_ray.data.demo_shop.stock import PlantedStock, Stock
from recsys_ray.data.demo_shop.survey import take_survey
from recsys_ray.data.demo_shop.truth import FOLDER, TruthWriter

log = logging.getLogger(__name__)

SHOP_FILE = "public/shop.json"


def make_demo_shop(config: DemoShopConfig) -> Path:
    """The directory of the shop that `config` describes, made now or found as it was made before.

    Errors: `DemoShopError` when `output` holds something that is no demo shop.
    """
    output = config.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.parent / f".{output.name}.lock"):
        if _made_before(output, config):
            log.info("%s: as configured, nothing to do", config.output)
            return output
        partial = output.parent / f".{output.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write_shop(partial, config)
            _replace_directory(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return output


def _made_before(output: Path, config: DemoShopConfig) -> bool:
    if not output.exists():
        return False
    wanted = _identity(config)
    try:
        known = json.loads((output / SHOP_FILE).read_text(encoding="utf-8"))
        return bool(all(known[key] == value for key, value in wanted.items()))
    except (OSError, ValueError, KeyError, TypeError):
        if any(output.iterdir()):
            raise DemoShopError(f"{output}: not empty and no demo shop ({SHOP_FILE} is missing or unreadable); "
                                "name another output or remove it") from None
        return False


def _identity(config: DemoShopConfig) -> dict[str, Any]:
    identity = {"generator_version": GENERATOR_VERSION, "generator_hash": generator_hash(), "config": config.identity()}
    if config.texts is not None:
        if not config.texts.file.is_file():
            raise DemoShopError(f"texts.path: {config.texts.file} is missing; name the folder that holds it")
        identity["texts_sha256"] = sha256_of(config.texts.file)
    return identity


def _replace_directory(partial: Path, output: Path) -> None:
    old = output.parent / f".{output.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.rename(output, old)
    os.rename(partial, output)
    shutil.rmtree(old, ignore_errors=True)


def open_stock(config: DemoShopConfig) -> Stock:
    """What the shop sells."""
    return RealStock(config) if config.mode == "semi_synthetic" else PlantedStock(config)


def _write_shop(root: Path, config: DemoShopConfig) -> None:
    stock = open_stock(config)
    market = open_market(stock.catalogue, config)
    (root / "public").mkdir(parents=True)
    with TruthWriter(root) as truth:
        log.info("who buys what: %d reviews of %d products by about %d people", config.reviews, len(stock.catalogue),
                 market.users)
        survey = take_survey(market, config)
        counts = write_products(root / "public", stock, config, survey, truth)
        counts |= write_reviews(root / "public", stock, market, config, truth)
        counts |= write_queries(stock, truth)
        write_users(stock, market, truth)
    write_text(root / SHOP_FILE, json.dumps({**_identity(config), "counts": counts}, indent=1) + "\n")
    write_text(root / FOLDER / "shop.json", json.dumps({**_identity(config), "rows": truth.rows}, indent=1) + "\n")
    log.info("%s: %s", config.output, counts)

