"""The stage that answers pictures: a hybrid index and its picture network, behind one question and one answer.

A picture that cannot be used comes back as a reason, not as an exception: it is that request's failure alone, and the
client is told what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from recsys_ray.config import Config
from recsys_ray.data.images import ImageError, ImageLimits, decode_image
from recsys_ray.models.attribute_adapter import ImageTowerConfig, load_image_tower
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.hybrid_index import open_hybrid
from recsys_ray.retrieval.hybrid_search import HybridSearcher
from recsys_ray.retrieval.hybrid_vectors import HybridError
from recsys_ray.serving.loading import PartStatus

Floats = npt.NDArray[np.float32]
SENT = ImageLimits(max_bytes=5 << 20, max_pixels=25_000_000)    # a telephone's photograph, but no poster


class PicturesConfig(Config):
    """What pictures are looked for in, and what may be sent."""

    index: Path                                     # artefact of build_hybrid, over the products of the text index
    tower: ImageTowerConfig = ImageTowerConfig()    # the network of its picture half
    limits: ImageLimits = SENT

    def resolved(self) -> Self:
        """The same with absolute paths: replicas start in other directories."""
        tower = self.tower
        pretrained, adapter = _absolute(tower.encoder.pretrained), _absolute(tower.adapter)
        return self.replace(index=self.index.resolve(), tower=tower.replace(
            encoder=tower.encoder.replace(pretrained=pretrained), adapter=adapter))


def _absolute(place: str | None) -> str | None:
    return str(Path(place).resolve()) if place and Path(place).exists() else place


@dataclass(frozen=True)
class PictureQuestion:
    """A picture, with the vector of words beside it where there are some; or a product that others shall look like."""

    count: int
    filters: Filters
    picture: bytes | None = None
    words: Floats | None = None         # (1, D), of the text encoder
    like: str | None = None             # product id


@dataclass(frozen=True)
class PictureAnswer:
    """Products, best first."""

    product_ids: list[str]
    scores: Floats
    complete: bool      # no further product has a picture or meets the filters


@dataclass(frozen=True)
class NoPicture:
    """In the place of an answer: the code and the reason, fit for the client."""

    code: str
    reason: str


@dataclass(frozen=True)
class PictureCalls:
    """What the stage can be asked."""

    ask: Callable[[PictureQuestion], Awaitable[PictureAnswer | NoPicture]]
    status: Callable[[], Awaitable[PartStatus]]


class PictureSearch:
    """A loaded hybrid index and its picture network."""

    def __init__(self, config: PicturesConfig, version: str | None = None) -> None:
        """Errors: `HybridError` when the network is not the one that the index was built with."""
        index = open_hybrid(config.index, version)
        self.searcher = HybridSearcher(index, None, load_image_tower(config.tower), config.limits)

    def ask(self, question: PictureQuestion) -> PictureAnswer | NoPicture:
        """The `count` best products, or why there are none."""
        searcher = self.searcher
        try:
            if question.like is not None:
                asked = searcher.looks_of(question.like)
            else:
                pixels = [decode_image(question.picture or b"", searcher.limits)]
                asked = (searcher.of_pictures(pixels) if question.words is None
                         else searcher.of_both(question.words, pixels))
        except ImageError as error:
            return NoPicture("bad_picture", f"picture: {error}")
        except HybridError as error:
            return NoPicture("no_picture", str(error))
        except KeyError:
            return NoPicture("no_picture", "the product has no picture")
        found = searcher.search(asked, question.count, None, question.filters)[0]
        return PictureAnswer(found.product_ids, found.scores, len(found.product_ids) < question.count)
