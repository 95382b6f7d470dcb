"""Queries in front of a product that is computed once: none learns of another, and each is as if it stood alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys_ray.models.body_weights import read_body
from recsys_ray.models.fronts import Fronts, hub_inputs
from recsys_ray.models.packed_bert import PackedBert
from recsys_ray.models.sentence_layout import read_pair_layout
from recsys_ray.models.trainable_bert import TrainableBert, TrainableConfig, load_body

FRONTS = Fronts(3, 2)
TinyModel = Callable[..., Path]


def texts() -> list[np.ndarray[Any, Any]]:
    """Six tokens of three fronts, and bodies of 4 to 9, by falling length."""
    random = np.random.default_rng(0)
    asked = random.integers(5, 30, 6)
    return [np.concatenate([asked, random.integers(5, 30, size)]).astype(np.int32) for size in (9, 7, 7, 4)]


def trainable(root: Path, **options: Any) -> TrainableBert:
    layout = read_pair_layout(root)
    config = TrainableConfig.model_validate({"model": str(root), "dropout": 0.0, **options})
    return TrainableBert(load_body(layout), layout, config, "float32")


def test_what_sees_what() -> None:
    mask = Fronts(2, 2).mask(6)
    assert (mask == 0).int().tolist() == [[1, 1, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1], [0, 0, 1, 1, 0, 1],
                                          [0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert Fronts(2, 2).places(7).tolist() == [1, 2, 1, 2, 0, 3, 4]     # the body's first token is before them
    assert Fronts(2, 2).firsts == [0, 2]


@pytest.mark.parametrize("body", ["bert", "xlm-roberta"])
def test_every_front_is_the_hubs_with_the_same_mask(tiny_text_model: TinyModel, body: str) -> None:
    """All states of the hub's plain forward pass, given the mask and the places; packed, trained and for scoring."""
    from transformers import AutoModel

    root = tiny_text_model(body)
    hub = AutoModel.from_pretrained(str(root), attn_implementation="eager").eval()
    model = trainable(root).eval()
    first = 0 if body == "bert" else int(hub.config.pad_token_id) + 1
    wanted = []
    with torch.no_grad():
        for one in texts():
            wanted.append(hub(input_ids=torch.from_numpy(one.astype(np.int64))[None],
                              **hub_inputs(FRONTS, len(one), first)).last_hidden_state[0])
        states, lengths = model.hidden_states(texts(), FRONTS)
        torch.testing.assert_close(states, torch.cat(wanted), rtol=1e-4, atol=1e-5)
        firsts = torch.stack([one[FRONTS.firsts] for one in wanted])
        torch.testing.assert_close(model(texts(), fronts=FRONTS), firsts, rtol=1e-4, atol=1e-5)
    weights, settings = read_body(read_pair_layout(root))
    packed = PackedBert(weights, settings, "cls", torch.float32, torch.device("cpu"))
    np.testing.assert_allclose(packed(texts(), fronts=FRONTS), firsts.flatten(0, 1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(packed.hidden_states(texts(), fronts=FRONTS), torch.cat(wanted), rtol=1e-3, atol=1e-4)
    assert lengths == [15, 13, 13, 10]


def test_a_front_does_not_learn_of_another(tiny_text_model: TinyModel) -> None:
    """Neither from its tokens nor from its being there; the body learns of none."""
    model = trainable(tiny_text_model()).eval()
    with torch.no_grad():
        told = model(texts(), fronts=FRONTS)
        other = [np.concatenate([np.int32([7, 8]), one[2:]]) for one in texts()]
        torch.testing.assert_close(model(other, fronts=FRONTS)[:, 1:], told[:, 1:], rtol=1e-5, atol=1e-6)
        alone = [one[4:] for one in texts()]
        torch.testing.assert_close(model(alone, fronts=Fronts(1, 2))[:, 0], told[:, 2], rtol=1e-5, atol=1e-6)
        body, _ = model.hidden_states(texts(), FRONTS)
        changed, _ = model.hidden_states(other, FRONTS)
    rows = [*range(6, 15), *range(21, 28), *range(34, 41), *range(47, 51)]      # of the bodies
    torch.testing.assert_close(changed[rows], body[rows], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(changed[:2], body[:2], atol=1e-3)


@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_gradients_do_not_depend_on_the_batch(tiny_text_model: TinyModel, attention: str) -> None:
    """Padding and masks of a batch of several lengths leave the gradient that the texts have one by one."""
    model = trainable(tiny_text_model(), attention=attention).train()
    found = []
    for batches in ([texts()], [[one] for one in texts()]):
        model.zero_grad()
        for some in batches:
            model(some, fronts=FRONTS).pow(2).sum().backward()
        found.append([one.grad.clone() for one in model.parameters() if one.grad is not None])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_dropout_of_the_last_layer_is_that_of_all_tokens(tiny_text_model: TinyModel) -> None:
    model = trainable(tiny_text_model(), dropout=0.3).train()
    states, lengths = model.hidden_states(texts(), FRONTS)
    wanted = torch.stack([one[FRONTS.firsts] for one in states.split(lengths)])
    torch.testing.assert_close(model(texts(), fronts=FRONTS), wanted, rtol=1e-4, atol=1e-5)
