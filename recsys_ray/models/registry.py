"""From a configuration to a loaded model, importing the heavy libraries only then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recsys_ray.models.text_encoder import TextEncoder, TextEncoderConfig

if TYPE_CHECKING:
    from recsys_ray.models.cross_encoder import CrossEncoder, CrossEncoderConfig


def build_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """The text encoder of `config`, its weights in memory; raises `EncoderError` when it cannot be loaded.

    A `BgeM3Encoder` when token weights or token vectors are asked for.
    """
    if config.sparse or config.multi_vector:
        from recsys_ray.models.bge_m3 import BgeM3Encoder

        return BgeM3Encoder(config)
    return TextEncoder(config)


def build_cross_encoder(config: CrossEncoderConfig) -> CrossEncoder:
    """The cross-encoder of `config`, its weights in memory; raises `EncoderError` when it cannot be loaded."""
    from recsys_ray.models.cross_encoder import CrossEncoder

    return CrossEncoder(config)
