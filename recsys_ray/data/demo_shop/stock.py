"""What a shop sells and what is said about it: the planted stock. `real_texts` has the semi-synthetic one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from recsys_ray.data.demo_shop.catalogue import Catalogue, build_catalogue
from recsys_ray.data.demo_shop.config import DemoShopConfig
from recsys_ray.data.demo_shop.images import write_images
from recsys_ray.data.demo_shop.people import Purchases, tastes
from recsys_ray.data.demo_shop.products import Standing, listings, products, set_bits
from recsys_ray.data.demo_shop.queries import GradedQuery, graded_queries
from recsys_ray.data.demo_shop.reviews import Told, generic_review, told_review
from recsys_ray.data.demo_shop.streams import Integers, dice
from recsys_ray.data.demo_shop.survey import Survey
from recsys_ray.data.demo_shop.telling import concern_rows, product_rows, user_rows
from recsys_ray.data.demo_shop.truth import TruthWriter


class Stock(Protocol):
    """The texts of a shop."""

    catalogue: Catalogue

    def listings(self, numbers: Integers, standing: Standing) -> list[dict[str, Any]]:
        """The metadata records of some products."""
        ...

    def told(self, bought: Purchases) -> list[Told]:
        """The words of some reviews."""
        ...

    def queries(self) -> Iterator[GradedQuery]:
        """The shoppers' queries with their grades."""
        ...

    def tell_products(self, numbers: Integers, survey: Survey, imaged: int, truth: TruthWriter) -> None:
        """Write what was planted in some products; the first `imaged` have a picture."""
        ...

    def tell_users(self, users: Integers, truth: TruthWriter) -> None:
        """Write what some reviewers like."""
        ...

    def write_images(self, folder: Path) -> int:
        """The number of images written into `folder`."""
        ...


class PlantedStock:
    """Everything invented, so everything known."""

    def __init__(self, config: DemoShopConfig) -> None:
        self.config = config
        self.catalogue = build_catalogue(config)

    def listings(self, numbers: Integers, standing: Standing) -> list[dict[str, Any]]:
        """The metadata records of some products."""
        return listings(self.catalogue, self.config, numbers, standing)

    def told(self, bought: Purchases) -> list[Told]:
        """The words of some reviews."""
        rolls = dice(self.config.seed, "words", bought.row)
        wants = [set_bits(mask) for mask in tastes(self.catalogue, bought.user).concerns.tolist()]
        clear = self.config.clarity
        return [generic_review(rating, roll) if generic else told_review(product, mine, rating, clear, roll)
                for product, mine, rating, generic, roll in
                zip(products(self.catalogue, bought.about), wants, bought.rating.tolist(), bought.generic.tolist(),
                    rolls, strict=True)]

    def queries(self) -> Iterator[GradedQuery]:
        """The shoppers' queries with their grades."""
        return graded_queries(self.catalogue, self.config)

    def tell_products(self, numbers: Integers, survey: Survey, imaged: int, truth: TruthWriter) -> None:
        """Write what was planted in some products."""
        truth.add("products", product_rows(self.catalogue, numbers, survey, imaged))
        truth.add("concerns", concern_rows(self.catalogue, self.config, numbers))

    def tell_users(self, users: Integers, truth: TruthWriter) -> None:
        """Write what some reviewers like."""
        truth.add("users", user_rows(self.catalogue, users))

    def write_images(self, folder: Path) -> int:
        """The number of images written into `folder`."""
        return write_images(folder, self.catalogue, self.config)
