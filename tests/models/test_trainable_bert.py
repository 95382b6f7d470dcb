"""The packed encoder in training against the model hub's own forward and backward passes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from recsys_ray.models.packed_layers import plan_blocks
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.sentence_layout import EncoderError
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.models.trainable_bert import LoraSettings, TrainableBert, TrainableConfig

LENGTHS = (5, 17, 3, 17, 40, 9, 5, 64)
TinyModel = Callable[..., Path]


def texts(lengths: tuple[int, ...] = LENGTHS, words: int = 36, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(4, words, length).astype(np.int32) for length in lengths]


def load(root: Path, **settings: object) -> TrainableBert:
    return TrainableBert.load(TrainableConfig.model_validate(
        {"model": str(root), "device": "cpu", "dtype": "float32", **settings}))


def hub_embeddings(body: torch.nn.Module, token_ids: list[np.ndarray], pooling: str, pad: int) -> Tensor:
    longest = max(map(len, token_ids))
    ids = torch.full((len(token_ids), longest), pad)
    mask = torch.zeros(len(token_ids), longest, dtype=torch.long)
    for place, tokens in enumerate(token_ids):
        ids[place, :len(tokens)] = torch.from_numpy(tokens)
        mask[place, :len(tokens)] = 1
    hidden = body(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(pooled, dim=-1)


@pytest.mark.parametrize(("body", "pooling"), [("bert", "mean"), ("bert", "cls"), ("xlm-roberta", "cls")])
@pytest.mark.parametrize("settings", [{}, {"tokens_at_once": 30}, {"gradient_checkpointing": True},
                                      {"attention": "fused"}])
def test_embeddings_and_gradients_are_those_of_the_hubs_model(
        tiny_text_model: TinyModel, body: str, pooling: str, settings: dict[str, object]) -> None:
    root = tiny_text_model(body=body, pooling=pooling)
    ours = load(root, dropout=0.0, **settings).train()
    theirs = AutoModel.from_pretrained(str(root), add_pooling_layer=False, dtype=torch.float32).eval()
    token_ids, weights = texts(), torch.randn(len(LENGTHS), 32)
    found = ours(token_ids)
    wanted = hub_embeddings(theirs, token_ids, pooling, theirs.config.pad_token_id)
    assert torch.allclose(found, wanted, atol=1e-5)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for (name, one), (_, other) in zip(ours.body.named_parameters(), theirs.named_parameters(), strict=True):
        largest = other.grad.abs().max()
        assert torch.allclose(one.grad, other.grad, atol=1e-5 * max(1.0, largest)), name


def test_in_float64_the_gradients_agree_to_the_last_digits(tiny_text_model: TinyModel) -> None:
    root = tiny_text_model()
    ours = load(root, dropout=0.0).double().train()
    theirs = AutoModel.from_pretrained(str(root), add_pooling_layer=False, dtype=torch.float64).eval()
    weights = torch.randn(len(LENGTHS), 32, dtype=torch.float64)
    (ours(texts()) * weights).sum().backward()
    (hub_embeddings(theirs, texts(), "mean", 0) * weights).sum().backward()
    for (name, one), (_, other) in zip(ours.body.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-10), name


def test_dropout_is_the_same_however_the_texts_are_put_together(tiny_text_model: TinyModel) -> None:
    model = load(tiny_text_model(), dropout=0.2).double().train()
    token_ids = texts()
    model.dropout_seed = 5
    together = model(token_ids)
    apart = torch.cat([model([tokens]) for tokens in token_ids])
    model.config = model.config.replace(tokens_at_once=20)
    portioned = model(token_ids[::-1]).flip(0)
    assert torch.allclose(together, apart, atol=1e-12)
    assert torch.allclose(together, portioned, atol=1e-12)
    model.dropout_seed = 6
    assert not torch.allclose(together, model(token_ids), atol=1e-3)
    assert not torch.allclose(together, model.eval()(token_ids), atol=1e-3)


def test_gradients_under_dropout_are_those_of_the_masked_function(tiny_text_model: TinyModel) -> None:
    model = load(tiny_text_model(), dropout=0.3).double().train()
    token_ids, weights = texts((7, 12, 12, 4)), torch.randn(4, 32, dtype=torch.float64)
    weight = model.body.encoder.layer[0].attention.self.key.weight
    (model(token_ids) * weights).sum().backward()
    found = weight.grad[3, 5].item()
    sides = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight[3, 5] += step
            sides.append((model(token_ids) * weights).sum().item())
            weight[3, 5] -= step
    assert found == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5)


def test_bf16_gradients_point_the_same_way(tiny_text_model: TinyModel) -> None:
    root, gradients = tiny_text_model(), []
    for dtype in ("float32", "bfloat16"):
        model = load(root, dtype=dtype, dropout=0.0).train()
        (model(texts()) * torch.arange(32)).sum().backward()
        gradients.append(torch.cat([one.grad.flatten() for one in model.parameters()]))
        assert all(one.dtype == torch.float32 and one.grad.dtype == torch.float32 for one in model.parameters())
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("part", ["attention.self.query.weight", "intermediate.dense.bias", "output.LayerNorm.weight"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_converted_weights_follow_a_fused_optimizer(tiny_text_model: TinyModel, dtype: str, part: str) -> None:
    model = load(tiny_text_model(), dtype=dtype, dropout=0.0).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(part))
    before = model(texts())
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1, fused=True)
    (before * torch.arange(32)).sum().backward()
    optimizer.step()
    assert not torch.allclose(before, model(texts()), atol=1e-2)


def test_hidden_states_come_in_the_order_of_the_texts(tiny_text_model: TinyModel) -> None:
    model, token_ids = load(tiny_text_model()).eval(), texts()
    states, lengths = model.hidden_states(token_ids)
    assert lengths == [len(one) for one in token_ids]
    for part, tokens in zip(states.split(lengths), token_ids, strict=True):
        assert torch.allclose(part, model.hidden_states([tokens])[0], atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"tokens_at_once": 30}, {"gradient_checkpointing": True}])
def test_the_last_layer_of_first_tokens_alone_is_that_of_all_tokens(tiny_text_model: TinyModel,
                                                                    settings: dict[str, object]) -> None:
    """Dropout on, in float64: states and gradients to the last digits."""
    model = load(tiny_text_model(pooling="cls"), dropout=0.3, similarity="dot", **settings).double().train()
    model.unit_length = False
    token_ids, weights = texts(), torch.randn(len(LENGTHS), 32, dtype=torch.float64)
    found = []
    for whole in (False, True):
        if whole:
            states, lengths = model.hidden_states(token_ids)
            first = torch.stack([one[0] for one in states.split(lengths)])
        else:
            first = model(token_ids)
        model.zero_grad()
        (first * weights).sum().backward()
        found.append([first.detach(), *(one.grad.clone() for one in model.parameters())])
    for alone, among in zip(*found, strict=True):
        assert torch.allclose(alone, among, atol=1e-12)


def test_frozen_token_embeddings_get_no_gradient(tiny_text_model: TinyModel) -> None:
    model = load(tiny_text_model(), freeze_token_embeddings=True).train()
    model(texts()).sum().backward()
    frozen = [name for name, one in model.body.named_parameters() if one.grad is None]
    assert frozen == ["embeddings.word_embeddings.weight"]


def test_a_saved_model_is_loaded_by_every_reader(tiny_text_model: TinyModel, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = load(tiny_text_model(prompts={"query": "q "})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    model.save(tmp_path, "# A card\n")
    words = ["a red shoe", "b", "some longer text about shoes and more"]
    ours = build_text_encoder(TextEncoderConfig(model=str(tmp_path), device="cpu", dtype="float32"))
    assert ours.identity["query_prompt"] == "q "
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    token_ids = [np.array(theirs.tokenizer(word)["input_ids"], dtype=np.int32) for word in words]
    with torch.no_grad():
        wanted = model(token_ids).numpy()
    assert np.allclose(ours.encode_documents(words), wanted, atol=1e-5)
    assert np.allclose(theirs.encode(words), wanted, atol=1e-5)
    assert (tmp_path / "README.md").read_text() == "# A card\n"
    reloaded = load(tmp_path)
    assert torch.equal(reloaded.body.embeddings.word_embeddings.weight, model.body.embeddings.word_embeddings.weight)


def test_low_rank_adapters_train_alone_and_are_merged_when_saved(tiny_text_model: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = load(tiny_text_model(), dropout=0.0, lora=LoraSettings(rank=2, modules=("query", "value"))).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    base = model(texts()).detach()
    (model(texts()) * torch.arange(32)).sum().backward()
    assert {name.split(".")[-3] for name, one in model.named_parameters() if one.grad is not None} == {
        "lora_A", "lora_B"}
    optimizer.step()
    tuned = model.eval()(texts()).detach()
    assert not torch.allclose(base, tuned, atol=1e-3)
    model.save(tmp_path)
    assert torch.allclose(load(tmp_path).eval()(texts()), tuned, atol=1e-5)
    assert not list(tmp_path.glob("*adapter*"))


def test_an_encoder_that_cannot_run_packed_is_refused(tiny_text_model: TinyModel) -> None:
    root = tiny_text_model()
    pooling = root / "1_Pooling/config.json"
    pooling.write_text(json.dumps({"embedding_dimension": 32, "pooling_mode": "max"}))
    with pytest.raises(EncoderError, match="cannot be trained here: its pooling is 'max'"):
        load(root)


def test_blocks_hold_every_token_once_and_little_padding() -> None:
    lengths = sorted(np.random.default_rng(0).integers(3, 200, 300).tolist(), reverse=True)
    blocks = plan_blocks(lengths, torch.device("cpu"))
    assert blocks[0].start == 0
    assert all(one.end == other.start for one, other in itertools.pairwise(blocks))
    assert blocks[-1].end == sum(lengths)
    packed = torch.arange(sum(lengths), dtype=torch.float32)[:, None]
    out = torch.full_like(packed, -1)
    for block in blocks:
        block.scatter(block.gather(packed), out)
    assert torch.equal(out, packed)
    padded = sum(block.texts * block.length**2 for block in blocks)
    assert padded < 1.25 * sum(length**2 for length in lengths)
    assert len(blocks) < 60
