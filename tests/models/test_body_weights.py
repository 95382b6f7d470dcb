"""Weights straight from their files: every tensor found, of the right shape, in any of the formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recsys_ray.models.body_weights import read_body
from recsys_ray.models.sentence_layout import EncoderError, read_layout


@pytest.fixture
def model(tiny_text_model: Callable[..., Path]) -> Path:
    return tiny_text_model()


def test_tensors_are_those_of_the_library(model: Path) -> None:
    from transformers import AutoModel

    weights, body = read_body(read_layout(model))
    expected = AutoModel.from_pretrained(str(read_layout(model).transformer)).state_dict()
    assert body["hidden_size"] == read_layout(model).dimension
    for name, tensor in expected.items():
        if not name.startswith("pooler.") and tensor.is_floating_point():
            assert torch.equal(weights[name], tensor), name


def test_a_head_on_top_and_the_older_format_are_read(model: Path) -> None:
    layout = read_layout(model)
    expected, _ = read_body(layout)
    (file,) = layout.weights
    older = {f"bert.{name.replace('LayerNorm.weight', 'LayerNorm.gamma')}": one for name, one in expected.items()}
    torch.save({**older, "cls.predictions.bias": torch.zeros(3)}, file.with_name("pytorch_model.bin"))
    file.unlink()
    found, _ = read_body(read_layout(model))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.bias"])
def test_a_missing_or_misshapen_tensor_is_named(model: Path, name: str) -> None:
    (file,) = read_layout(model).weights
    weights = load_file(file)
    save_file({key: tensor for key, tensor in weights.items() if key != name}, file)
    with pytest.raises(EncoderError, match=f"lack {name}"):
        read_body(read_layout(model))
    save_file({**weights, name: weights[name][:1].clone()}, file)
    with pytest.raises(EncoderError, match=rf"{name} has shape .*config.json asks for"):
        read_body(read_layout(model))


def test_a_torn_file_is_named(model: Path) -> None:
    (file,) = read_layout(model).weights
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(EncoderError, match=r"model.safetensors: cannot be read as weights"):
        read_body(read_layout(model))
