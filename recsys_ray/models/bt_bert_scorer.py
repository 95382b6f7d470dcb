"""Probabilities that products help against concerns: a trained BT-BERT, packed, without padding, in bf16 where it is.

Every (concern, product) pair is an input of its own; in layout `shared` a product is one, with all concerns in front
of it. A product is tokenised once; inputs are sorted by length and run in batches of about a budget of tokens; the
layer before the last one works on the first tokens alone where the mode needs no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from recsys_ray.config import Config
from recsys_ray.models.body_weights import read_body
from recsys_ray.models.bt_bert import (
    EPSILON,
    HEAD,
    KIND,
    PUBLISHED_SCALE,
    BtBertCard,
    Concern,
    first_scores,
    probabilities,
    read_card,
    self_attention,
)
from recsys_ray.models.bt_bert_input import BtBertTokenizer, Tokens, fronts_of
from recsys_ray.models.cross_encoder import batches
from recsys_ray.models.fronts import Fronts
from recsys_ray.models.packed_bert import PackedBert
from recsys_ray.models.sentence_layout import EncoderError, find_model, read_pair_layout
from recsys_ray.models.text_encoder import (
    CPU_TOKEN_BUDGET,
    GPU_TOKEN_BUDGET,
    TextEncoderConfig,
    device_of,
    dtype_of,
)

Floats = npt.NDArray[np.float32]


class BtBertConfig(Config):
    """Which BT-BERT, and how it is run."""

    model: str                                              # a folder, an artefact's root or a hub name
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    token_budget: int | None = Field(default=None, ge=1)    # tokens a forward pass; None: by device
    max_chars: int = Field(default=20_000, ge=1)            # of each text, before the tokenizer sees it


class BtBertScorer:
    """A loaded BT-BERT."""

    def __init__(self, config: BtBertConfig) -> None:
        """Errors: `EncoderError` for a folder that is no BT-BERT, or whose body cannot be run here."""
        root = find_model(config.model, KIND)
        self.card, layout = read_card(root), read_pair_layout(root)
        if layout.not_packed:
            raise EncoderError(f"{root}: cannot be run here: {layout.not_packed}")
        self.identity = bt_bert_identity(config)
        running = TextEncoderConfig(device=config.device, dtype=config.dtype)
        self.device = torch.device(device_of(running))
        self.dtype = dtype_of(running, self.device.type)
        self._budget = config.token_budget or (GPU_TOKEN_BUDGET if self.device.type == "cuda" else CPU_TOKEN_BUDGET)
        self.tokenizer = BtBertTokenizer(layout, self.card.style, self.card.max_tokens, config.max_chars)
        self._head = {name: one.to(self.device) for name, one in load_file(root / HEAD).items()}
        weights, body = read_body(layout)
        self._heads = int(body["num_attention_heads"])
        last = f"encoder.layer.{body['num_hidden_layers'] - 1}.attention.self"
        self._last = {name: (weights[f"{last}.{name}.weight"].float().to(self.device),
                             weights[f"{last}.{name}.bias"].float().to(self.device)) for name in ("query", "key")}
        layers = body["num_hidden_layers"] - (self.card.mode != "explicit")
        self._forward = PackedBert(weights, {**body, "num_hidden_layers": layers}, "cls", getattr(torch, self.dtype),
                                   self.device)

    def score(self, ingredients: Sequence[str | None], titles: Sequence[str | None],
              concerns: Sequence[Concern] | None = None) -> Floats:
        """Probabilities of N products against C concerns, float32 (N, C); of the model's own concerns when None.

        Other concerns than the model's own are asked for by their words: what it then says is a guess.
        """
        return probabilities(self.logits(ingredients, titles, concerns), self.card.calibration.temperature)

    def logits(self, ingredients: Sequence[str | None], titles: Sequence[str | None],
               concerns: Sequence[Concern] | None = None) -> Floats:
        """Logits of N products against C concerns, float32 (N, C), before calibration."""
        asked = self.card.concerns if concerns is None else tuple(concerns)
        products = self.tokenizer.products(ingredients, titles)
        if self.card.mode == "explicit":
            return self._explicit([self.tokenizer.pair(None, one).ids for one in products], asked)
        queries = [self.tokenizer.query(one.query) for one in asked]
        if queries and (fronts := fronts_of(self.card.style, len(queries))) is not None:
            return self._run([self.tokenizer.shared(queries, one) for one in products], len(queries), fronts)
        ids = [self.tokenizer.pair(query, one).ids for one in products for query in queries]
        return self._run(ids).reshape(len(products), len(asked))

    def _explicit(self, ids: list[Tokens], asked: Sequence[Concern]) -> Floats:
        names = self.card.names()
        if unknown := [one.name for one in asked if one.name not in names]:
            raise EncoderError(f"the explicit model has no output for {', '.join(unknown)}; it knows "
                               f"{', '.join(names)}")
        return self._run(ids, outputs=len(names))[:, [names.index(one.name) for one in asked]]

    def _run(self, ids: Sequence[Tokens], outputs: int | None = None, fronts: Fronts | None = None) -> Floats:
        out = np.empty((len(ids), outputs) if outputs else len(ids), dtype=np.float32)
        order = np.argsort([-len(one) for one in ids], kind="stable")
        for batch in batches(order, [len(one) for one in ids], self._budget) if len(ids) else ():
            found = self._batch([ids[place] for place in batch], fronts)
            out[batch] = found.float().cpu().numpy().reshape(len(batch), *out.shape[1:])
        return out

    @torch.inference_mode()
    def _batch(self, ids: Sequence[Tokens], fronts: Fronts | None) -> Tensor:
        mode, head = self.card.mode, self._head
        if mode in ("presoftmax", "explicit"):
            first_RD = torch.from_numpy(self._forward(ids, fronts=fronts)).to(self.device)
            if mode == "explicit":
                return F.linear(first_RD, head["output.weight"], head["output.bias"])
            return _affine(first_scores(self._part("query", first_RD), self._part("key", first_RD)).sum(dim=1), head)
        states_TD = self._forward.hidden_states(ids, fronts=fronts).float()
        x_RH = self_attention(self._part("query", states_TD), self._part("key", states_TD), [len(one) for one in ids],
                              fronts).flatten(0, 1)
        if mode == "literal_softmax16":
            return PUBLISHED_SCALE * x_RH.sum(dim=1)
        if mode == "affine16":
            return _affine(PUBLISHED_SCALE * x_RH.sum(dim=1), head)
        return _affine(torch.logit(x_RH.mean(dim=1), eps=EPSILON), head)

    def _part(self, name: str, states_ND: Tensor) -> Tensor:
        return F.linear(states_ND, *self._last[name]).view(len(states_ND), self._heads, -1)


def _affine(raw_N: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    return head["scale"] * raw_N + head["bias"]


def bt_bert_identity(config: BtBertConfig) -> dict[str, Any]:
    """What decides the probabilities, JSON-able, without loading the weights."""
    root = find_model(config.model, KIND)
    layout = read_pair_layout(root)
    return {"weights_sha256": layout.weights_sha256(), "tokenizer_sha256": layout.tokenizer_sha256(),
            "card": card_of(read_card(root)), "max_chars": config.max_chars}


def card_of(card: BtBertCard) -> dict[str, Any]:
    """The card as plain values."""
    return card.model_dump(mode="json")
