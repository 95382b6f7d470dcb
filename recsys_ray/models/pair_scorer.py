"""What says how well a text answers a query: a text encoder or a cross-encoder behind one method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from pydantic import model_validator

from recsys_ray.config import Config
from recsys_ray.models.cross_encoder import CrossEncoderConfig, cross_encoder_identity
from recsys_ray.models.registry import build_cross_encoder, build_text_encoder
from recsys_ray.models.sentence_layout import CROSS_ENCODER_KIND, ENCODER_KIND, find_model
from recsys_ray.models.text_encoder import TextEncoder, TextEncoderConfig, encoder_identity

Floats = npt.NDArray[np.float32]


class PairScorer(Protocol):
    """Scores (query, text) pairs."""

    def score(self, queries: Sequence[str], texts: Sequence[str]) -> Floats:
        """The score of each text for its query, float32 (N,), higher is better."""


class PairScorerConfig(Config):
    """Which model scores: one of the two."""

    encoder: TextEncoderConfig | None = None
    cross_encoder: CrossEncoderConfig | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.encoder is None) == (self.cross_encoder is None):
            raise ValueError("encoder, cross_encoder: give one of the two")
        return self

    def pinned(self) -> Self:
        """The same at absolute paths: of one version, whatever is published meanwhile."""
        found: dict[str, Any] = {}
        for name, kind in (("encoder", ENCODER_KIND), ("cross_encoder", CROSS_ENCODER_KIND)):
            model = getattr(self, name)
            if model is not None and Path(model.model).is_dir():
                found[name] = model.replace(model=str(find_model(model.model, kind)))
        return self.replace(**found)

    def identity(self) -> dict[str, Any]:
        """What decides the scores, JSON-able, without loading the weights."""
        if self.encoder is not None:
            return {"kind": "encoder", "dtype": self.encoder.dtype, **encoder_identity(self.encoder)}
        assert self.cross_encoder is not None
        return {"kind": "cross_encoder", "dtype": self.cross_encoder.dtype,
                **cross_encoder_identity(self.cross_encoder)}


class EncoderScorer:
    """A text encoder as a scorer: the inner product of its vectors, a cosine where it says so."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def score(self, queries: Sequence[str], texts: Sequence[str]) -> Floats:
        """The score of each text for its query, float32 (N,); every different text is embedded once."""
        found: Floats = np.einsum("nd,nd->n", self._encoder.encode_queries(queries),
                                  self._encoder.encode_documents(texts))
        return found


def build_pair_scorer(config: PairScorerConfig) -> PairScorer:
    """The scorer of `config`, its weights in memory; raises `EncoderError` when it cannot be loaded."""
    if config.encoder is not None:
        return EncoderScorer(build_text_encoder(config.encoder))
    assert config.cross_encoder is not None
    return build_cross_encoder(config.cross_encoder)
