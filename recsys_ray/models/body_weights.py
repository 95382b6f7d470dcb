"""The tensors of a transformer body straight from its files, without building the model.

Building a model object through the model hub's library takes two CPU-seconds a process, more than
reading MiniLM's weights and tokenising with them; a job starts one process a core.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys_ray.models.sentence_layout import EncoderError, SentenceLayout

PREFIXES = ("bert.", "roberta.")        # of checkpoints saved with a head on top
# names of the normalisation's weights in checkpoints converted from TensorFlow
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def read_body(layout: SentenceLayout) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by the body's own names, its config.json) of a BERT, RoBERTa or XLM-RoBERTa encoder.

    Errors: `EncoderError` when a file cannot be read, or when a tensor that the configuration asks
    for is missing (it would silently be random) or has another shape.
    """
    weights: dict[str, Tensor] = {}
    for path in layout.weights:
        weights |= {_own_name(name): tensor for name, tensor in _read(path).items()}
    body: dict[str, Any] = json.loads((layout.transformer / "config.json").read_text(encoding="utf-8"))
    _refuse_other(weights, body, layout.transformer)
    return weights, body


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        read: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return read
    except Exception as error:  # the two readers raise their own kinds for a torn or foreign file
        raise EncoderError(f"{path}: cannot be read as weights ({type(error).__name__}: "
                           f"{(str(error).splitlines() or ['no reason given'])[0]}); fetch the model again") from None


def _own_name(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _refuse_other(weights: Mapping[str, Tensor], body: Mapping[str, Any], where: Path) -> None:
    needed = _shapes(body)
    missing = sorted(name for name in needed if name not in weights)
    if missing:
        raise EncoderError(f"{where}: the weights lack {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; "
                           "the file does not belong to this configuration")
    for name, shape in needed.items():
        if tuple(weights[name].shape) != shape:
            raise EncoderError(f"{where}: {name} has shape {tuple(weights[name].shape)}, config.json asks for {shape}; "
                               "the file does not belong to this configuration")


def _shapes(body: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the body and its shape, by the sizes in config.json."""
    width, inner = body["hidden_size"], body["intermediate_size"]
    linear = {"attention.self.query": (width, width), "attention.self.key": (width, width),
              "attention.self.value": (width, width), "attention.output.dense": (width, width),
              "intermediate.dense": (inner, width), "output.dense": (width, inner)}
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (body["vocab_size"], width),
        "embeddings.position_embeddings.weight": (body["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (body.get("type_vocab_size", 2), width)}
    norms = ["embeddings.LayerNorm"]
    for number in range(body["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        for name, shape in linear.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    return shapes | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
