"""What a demo shop should be like: its size, its mode, and how clear or noisy it is."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from recsys_ray.config import Config

FULL_PRODUCTS, FULL_REVIEWS = 112_590, 701_528      # All_Beauty's own size
TABLES = Path(__file__).parent / "tables"
Share = Annotated[float, Field(ge=0, le=1)]


class DemoShopError(ValueError):
    """A shop that cannot be made or is not what it says; the message names the file or key and the mend."""


class Clarity(Config):
    """How much the texts tell; `tables/presets.yaml` says what each number means."""

    generic_share: Share
    reviews_per_user: float = Field(gt=0)
    taste: float = Field(ge=0)
    say_type: Share
    say_facets: float = Field(ge=0, le=6)
    say_brand: Share
    say_line: Share
    filler: float = Field(ge=0, le=0.9)
    catalogue_words: Share
    wrong_facet: Share
    title_facets: Share
    typo: Share
    label_noise: Share
    price: Share
    features: Share
    description: Share
    store: Share
    ingredients: Share
    image_noise: float = Field(ge=0)
    duplicates: float = Field(ge=0, le=0.5)
    dirty: float = Field(ge=0, le=0.5)
    cold: float = Field(ge=0, le=0.18)


class RealTexts(Config):
    """A folder of real product texts for the semi-synthetic mode."""

    family: Literal["esci", "icecat", "goodbooks"]
    path: Path

    @property
    def file(self) -> Path:
        """The family's table of products."""
        return self.path / ("books.parquet" if self.family == "goodbooks" else "products.parquet")


class DemoShopConfig(Config):
    """A shop, fully: equal configurations (but for `output`) give the same bytes."""

    output: Path
    seed: int = Field(default=7, ge=0)
    products: int = Field(default=3_000, ge=500, le=FULL_PRODUCTS)
    reviews: int = Field(default=24_000, ge=1_000, le=FULL_REVIEWS)
    mode: Literal["planted", "semi_synthetic", "null"] = "planted"
    preset: Literal["easy", "realistic", "hard"] = "realistic"
    change: dict[str, float] = Field(default_factory=dict)      # single numbers of the preset
    top_share: float = Field(default=0.10, ge=0, lt=0.5)        # of all reviews, for the one most popular product
    texts: RealTexts | None = None                              # only of the semi-synthetic mode
    queries: int = Field(default=300, ge=0, le=20_000)          # graded shopper queries
    image_products: int = Field(default=0, ge=0)                # how many products get an image
    image_side: int = Field(default=80, ge=32, le=256)          # pixels

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if (self.mode == "semi_synthetic") != (self.texts is not None):
            raise ValueError("texts (family, path) is needed by mode semi_synthetic and by no other")
        if self.texts is not None and self.image_products:
            raise ValueError("image_products must be 0 in mode semi_synthetic: pictures are drawn of invented products")
        clarity(self.preset, tuple(self.change.items()))
        return self

    @property
    def clarity(self) -> Clarity:
        """The preset with its changes."""
        return clarity(self.preset, tuple(self.change.items()))

    def identity(self) -> dict[str, Any]:
        """Everything that decides the shop's bytes, apart from the generator itself and the real texts' content."""
        return self.model_dump(mode="json", exclude={"output": True, "texts": {"path"}})


@cache
def clarity(preset: str, changes: tuple[tuple[str, float], ...] = ()) -> Clarity:
    """The named parameter set with single numbers changed."""
    named = yaml.safe_load((TABLES / "presets.yaml").read_text(encoding="utf-8"))
    return Clarity.model_validate({**named[preset], **dict(changes)})
