"""BT-BERT: does a product help against a concern? The answer is what the query's first token sends to itself.

The label is part of the input, so a new concern is a new query and no new output. Of the last layer only attention
is computed, and of attention one entry: the row and the column of token 0. For an input of L tokens the layer before
gives states S (L, D); head h = 1..H of the last layer makes of them queries and keys Q_h, K_h (L, d), d = D / H. Its
scores are Q_h K_h^T / sqrt(d), (L, L); of them the row of token 0 is s_hj = q_h . k_hj / sqrt(d), (L,), with q_h the
query of token 0 (d,) and k_hj the key of token j (d,), and its first entry s_h = s_h0 needs the state of token 0 alone,
(D,). After the softmax over j the entry is x_h = exp(s_h0) / sum_j exp(s_hj), between 0 and 1, and needs all L states.
Values, output projection and feed-forward network of the last layer play no part. The logit z of a pair, (), is one of

    presoftmax          a * sum_h s_h + b       needs the states of token 0 alone: the layer before is short, too
    literal_softmax16   16 * sum_h x_h          as published; in [0, 16 H], and sigmoid(z) >= sigmoid(0) = 1/2
    affine16            16 a * sum_h x_h + b    the same with a learned scale and bias
    logodds             a * log(x / (1 - x)) + b, with x = mean_h x_h
    explicit            w_c . state of [CLS] + b_c      an ordinary output for each concern, (C,): the baseline

The published listing reads attentions after the softmax and multiplies by 16 ("Beauty Beyond Words", arXiv
2409.13628, algorithm 1). Scale a and bias b start so that the mean prediction equals the share of positives.

How it learns. What tells products apart is small in a score: with MiniLM the states of token 0 in front of [CLS], where
unneeded attention goes, differ by 1 % of their length between products, and in layout `shared` (`Fronts`) by 20 %;
scores are about 32 and spread by 0.1. So the gradient is nearly all about moving scores together, and an optimizer that
divides by its size learns nothing else. Against that

- a new model begins as low-rank adapters do, with one factor at zero: the last layer's keys are, so all scores are, and
  until the keys have learned what to ask for, the body has no gradient. The scale says how fast that goes
  (`_first_scale`). After the softmax scores are bounded; there keys stay, and logits begin nearly equal;
- a running mean of the batches is taken off in training, a * (raw - mean) + level, and what is saved is
  b = level - a * mean. (Not the mean of the very batch: where products of like length come together, it is part of the
  answer.) So the gradient of the mean of all scores is left out;
- where an input is a whole product, what would move all scores of a concern counts a tenth (`_balanced`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recsys_ray.config import Config
from recsys_ray.models.bt_bert_input import BtBertTokenizer, Layout, Style, Tokens, fronts_of
from recsys_ray.models.fronts import Fronts
from recsys_ray.models.sentence_layout import EncoderError, SentenceLayout, find_model, read_pair_layout
from recsys_ray.models.trainable_bert import TrainableBert, TrainableConfig, TrainableOptions, load_body, with_lora

KIND = "bt_bert"                # of the artefact, and the name of its directory
HEAD, CARD = "bt_bert.safetensors", "bt_bert.json"
Mode = Literal["presoftmax", "literal_softmax16", "logodds", "affine16", "explicit"]
PUBLISHED_SCALE = 16.0
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "sentencepiece", "unigram")
EPSILON = 1e-6
FOLLOW = 0.1        # weight of a batch in the running mean of raw scores
DIFFERENT = 0.5     # of an output's states is taken to differ between products; tried on validation: half was slower
TOGETHER = 0.1      # of the gradient's part that moves all of a concern's scores together
FIRST_SPREAD = 0.1  # of the logits after the softmax: what they differ by at first has nothing to do with the answer


class Concern(Config):
    """One concern and the words that ask for it."""

    name: str
    query: str


class Calibration(Config):
    """What turns logits into probabilities and probabilities into a decision; found on validation products."""

    temperature: float = Field(default=1.0, gt=0)       # logits are divided by it
    thresholds: dict[str, float] = Field(default_factory=dict)      # by concern; one half where none is given


class BtBertCard(Config):
    """All that is needed beside the weights to score with them."""

    mode: Mode = "presoftmax"
    layout: Layout = "paper"                # of the input; explicit models have no query in it
    max_tokens: int = Field(default=512, ge=16)
    concerns: tuple[Concern, ...]
    calibration: Calibration = Calibration()

    @property
    def style(self) -> Style:
        """How inputs are put together."""
        return "explicit" if self.mode == "explicit" else self.layout

    @property
    def whole(self) -> bool:
        """Whether an input is a product, with a logit for each concern, and not a pair of the two."""
        return self.style in ("explicit", "shared")

    def names(self) -> list[str]:
        """The concerns by name, in the order of the outputs."""
        return [one.name for one in self.concerns]


class BtBert(nn.Module):
    """Token ids of N inputs -> logits with gradients: float32 (N,), or (N, C) where an input is a whole product."""

    encoder: TrainableBert
    mean: Tensor        # of the raw scores

    def __init__(self, body: Any, layout: SentenceLayout, card: BtBertCard, options: TrainableOptions, dtype: str
                 ) -> None:
        super().__init__()
        if layout.not_packed:
            raise EncoderError(f"{layout.root}: cannot be used here: {layout.not_packed}")
        self.card, self.layout = card, layout
        self.mean_of: Callable[[Tensor], Tensor] = mean_of_rows     # of a batch; of several workers' all parts of it
        self._whole: list[Any] = []     # the last layer, for saving; of it only the parts below are used
        if card.mode != "explicit":
            if len(body.encoder.layer) < 2:
                raise EncoderError(f"{layout.root}: has one layer; the logit needs a layer after another")
            last = body.encoder.layer[-1]
            body.encoder.layer = body.encoder.layer[:-1]
            self._whole = [last]
            self.query, self.key = last.attention.self.query, last.attention.self.key
        if options.freeze_token_embeddings:
            body.embeddings.word_embeddings.requires_grad_(False)
        outputs, width = len(card.concerns), int(body.config.hidden_size)
        adapted = body if options.lora is None else with_lora(body, options.lora)
        self.encoder = TrainableBert(adapted, layout, TrainableConfig(**options.model_dump()), dtype)
        if card.mode == "explicit":
            self.output = nn.Linear(width, outputs)
        elif card.mode != "literal_softmax16":
            self.scale, self.level = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
            self.register_buffer("mean", torch.zeros(()))

    @classmethod
    def load(cls, model: str, card: BtBertCard | None, options: TrainableOptions, dtype: str, device: str) -> Self:
        """A BT-BERT folder or artefact with its head, or any BERT-family body with a new one.

        `card`: the concerns and the mode; None: those of the folder. Where the folder's mode is the same its scale
        and bias are kept, and of an explicit model the outputs of the concerns that it knows.
        """
        root = find_model(model, KIND)
        layout = read_pair_layout(root)
        own = read_card(root) if (root / CARD).is_file() else None
        wanted = card or own
        if wanted is None:
            raise EncoderError(f"{root}: has no {CARD}, so it is a bare body: say which concerns it is to know")
        found = cls(load_body(layout), layout, wanted, options, dtype)
        if own is not None and own.mode == wanted.mode:
            found.take_head(own, load_file(root / HEAD))
        return found.to(device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.encoder.device

    @property
    def head_names(self) -> tuple[str, ...]:
        """How the names of the trained parameters beside the body begin."""
        if self.card.mode == "explicit":
            return ("output.",)
        return () if self.card.mode == "literal_softmax16" else ("scale", "level")

    def head(self) -> dict[str, Tensor]:
        """The parameters beside the body: scale and bias, or the outputs."""
        if self.card.mode == "explicit":
            return {"output.weight": self.output.weight, "output.bias": self.output.bias}
        return {} if self.card.mode == "literal_softmax16" else {
            "scale": self.scale, "bias": self.level - self.scale * self.mean}

    @torch.no_grad()
    def take_head(self, card: BtBertCard, head: dict[str, Tensor]) -> None:
        """Take over a head; of an explicit model the outputs of the concerns that both know."""
        if self.card.mode != "explicit":
            if self.card.mode != "literal_softmax16":
                self.scale.copy_(head["scale"])
                self.level.copy_(head["bias"])
                self.mean.zero_()
            return
        known = card.names()
        for place, name in enumerate(self.card.names()):
            if name in known:
                self.output.weight[place] = head["output.weight"][known.index(name)]
                self.output.bias[place] = head["output.bias"][known.index(name)]

    def forward(self, token_ids: Sequence[Tokens]) -> Tensor:
        """The logits of N inputs."""
        raw = self.raw(token_ids)
        if self.card.mode == "literal_softmax16":
            return PUBLISHED_SCALE * raw
        if self.training and raw.requires_grad:
            raw.register_hook(self._balanced)   # type: ignore[no-untyped-call]
        if self.card.mode == "explicit":
            return raw
        if self.training:
            self.mean.lerp_(self.mean_of(raw.detach()).mean(), FOLLOW)
        return self.scale * (raw - self.mean) + self.level

    def _balanced(self, gradient: Tensor) -> Tensor:
        """The gradient of a batch's raw scores with less of what would move those of a concern, or all, together.

        It keeps the sign of a concern's mean, so what is right for it stays right. Pairs that do not count, whose
        gradient is zero, are left alone.
        """
        counted = (gradient != 0).to(gradient.dtype)
        share = self.mean_of(counted)
        if gradient.ndim == 2:
            gradient = gradient - (1 - TOGETHER) * counted * self.mean_of(gradient) / share.clamp(min=EPSILON)
        if self.card.mode == "explicit":
            return gradient
        return gradient - counted * self.mean_of(gradient).mean() / share.mean().clamp(min=EPSILON)

    def raw(self, token_ids: Sequence[Tokens]) -> Tensor:
        """What the network gives before its learned scale and bias: float32 (N,), or (N, C) of whole products."""
        mode, fronts = self.card.mode, fronts_of(self.card.style, len(self.card.concerns))
        if mode == "explicit":
            outputs_NC: Tensor = self.output(self.encoder(token_ids))
            return outputs_NC
        if mode == "presoftmax":
            first_XD = self.encoder(token_ids, fronts=fronts)
            return first_scores(self._heads(self.query(first_XD)), self._heads(self.key(first_XD))).sum(dim=-1)
        x_XH = self._self_attention(token_ids, fronts)
        if mode == "logodds":
            x_X = x_XH.mean(dim=-1).clamp(EPSILON, 1 - EPSILON)
            return torch.log(x_X) - torch.log1p(-x_X)
        return x_XH.sum(dim=-1) * (PUBLISHED_SCALE if mode == "affine16" else 1.0)

    def _self_attention(self, token_ids: Sequence[Tokens], fronts: Fronts | None) -> Tensor:
        states_TD, lengths = self.encoder.hidden_states(token_ids, fronts)
        states_TD = states_TD.float()
        found = self_attention(self._heads(self.query(states_TD)), self._heads(self.key(states_TD)), lengths, fronts)
        return found if fronts is not None else found[:, 0]

    def _heads(self, states_XD: Tensor) -> Tensor:
        return states_XD.view(*states_XD.shape[:-1], self.encoder.heads, -1)

    @torch.no_grad()
    def start(self, token_ids: Sequence[Tokens], prior: Tensor, rate: float = 1.0) -> None:
        """Set a new head so that the mean prediction over these inputs equals `prior`.

        `prior`: the share of positives, () or, of an explicit model, (C,). `rate`: of an explicit model's output, as a
        multiple of the body's; the logits of mode presoftmax will follow their keys as fast.
        """
        wanted = torch.logit(prior.double().clamp(EPSILON, 1 - EPSILON)).float().to(self.device)
        if self.card.mode == "explicit":
            self.output.weight.mul_(0.0)
            self.output.bias.copy_(wanted.expand_as(self.output.bias))
        elif self.card.mode != "literal_softmax16":
            self.scale.fill_(self._first_scale(token_ids, rate))
            self._set_level(self.raw(token_ids), float(torch.sigmoid(wanted)))

    def _first_scale(self, token_ids: Sequence[Tokens], rate: float) -> float:
        """The scale to begin with; the keys of mode presoftmax are set to zero.

        A step of e in every key weight then tells two products' scores apart by e |q|_1 |s|_1 / sqrt(d) at most, |.|_1
        the sum of absolute values and s what their states differ by, a small part of them. An output of `rate` tells
        products apart by e rate DIFFERENT |state|_1, if that part of states differs: the scale makes both the same.
        """
        if self.card.mode == "presoftmax":
            first_XD = self.encoder(token_ids, fronts=fronts_of(self.card.style, len(self.card.concerns)))
            whole, own = (one.abs().sum(dim=-1).mean() for one in (first_XD, first_XD - first_XD.mean(dim=0)))
            query = self.query(first_XD).abs().sum(dim=-1).mean()
            for parameter in self.key.parameters():
                parameter.zero_()
            size = first_XD.shape[-1] // self.encoder.heads
            return rate * DIFFERENT * math.sqrt(size) * float(whole / (query * own + EPSILON))
        spread = float(self.raw(token_ids).std(correction=0))
        return FIRST_SPREAD / spread if spread > EPSILON else 1.0

    @torch.no_grad()
    def settle(self, token_ids: Sequence[Tokens], prior: float) -> None:
        """Set mean and level so that the mean prediction over these inputs equals `prior`; the scale stays."""
        if "scale" in self.head():
            self._set_level(self.raw(token_ids), prior)

    @torch.no_grad()
    def recenter(self, token_ids: Sequence[Tokens]) -> None:
        """Set the mean to that of these inputs and change no prediction: before a trained model learns more."""
        if "scale" in self.head():
            mean = self.raw(token_ids).mean()
            self.level.add_(self.scale * (mean - self.mean))
            self.mean.copy_(mean)

    def _set_level(self, raw: Tensor, share: float) -> None:
        self.mean.copy_(raw.mean())
        self.level.copy_(_bias_for(self.scale * (raw - self.mean), share))

    def tokenizer(self) -> BtBertTokenizer:
        """What makes this model's inputs."""
        return BtBertTokenizer(self.layout, self.card.style, self.card.max_tokens)

    def save(self, root: Path, calibration: Calibration, card: str = "") -> None:
        """Write an ordinary Transformers folder with the head beside it, and `card` as its README.md."""
        target = Path(root)
        target.mkdir(parents=True, exist_ok=True)
        for path in self.layout.transformer.iterdir():
            if path.name.startswith(TOKENIZER_FILES) and path.suffix in {".json", ".txt", ".model"}:
                shutil.copyfile(path, target / path.name)
        body = self.encoder.body if self.encoder.config.lora is None else _merged(self.encoder.body)
        layers = body.encoder.layer
        body.encoder.layer = nn.ModuleList([*layers, *self._whole])
        try:
            body.save_pretrained(target)
        finally:
            body.encoder.layer = layers
        save_file({name: one.detach().cpu().contiguous() for name, one in self.head().items()}, target / HEAD)
        described = self.card.replace(calibration=calibration)
        (target / CARD).write_text(described.model_dump_json(indent=2), encoding="utf-8")
        if card:
            (target / "README.md").write_text(card, encoding="utf-8")


def mean_of_rows(rows: Tensor) -> Tensor:
    """The mean over the first axis."""
    return rows.mean(dim=0)


def first_scores(query_XHd: Tensor, key_XHd: Tensor) -> Tensor:
    """Attention scores of query and key of the same row, before any softmax, (..., H)."""
    scores_XH: Tensor = (query_XHd * key_XHd).sum(dim=-1) * query_XHd.shape[-1] ** -0.5
    return scores_XH


def self_attention(query_THd: Tensor, key_THd: Tensor, lengths: Sequence[int], fronts: Fronts | None) -> Tensor:
    """How much of the first token's attention is on itself, after the softmax, (N, F, H) of N texts end to end.

    F: the first token of each of the fronts, or of the text alone.
    """
    firsts, found = [0] if fronts is None else fronts.firsts, []
    sizes = list(lengths)
    for query_LHd, key_LHd in zip(torch.split(query_THd, sizes), torch.split(key_THd, sizes), strict=True):
        scores_FHL = torch.einsum("fhd,lhd->fhl", query_LHd[firsts], key_LHd) * query_LHd.shape[-1] ** -0.5
        if fronts is not None:
            scores_FHL = scores_FHL + fronts.mask(len(key_LHd))[firsts, None].to(scores_FHL.device)
        found.append(torch.softmax(scores_FHL, dim=-1)[range(len(firsts)), :, firsts])
    return torch.stack(found)


def _bias_for(scores: Tensor, share: float) -> Tensor:
    """The bias with which the mean of sigmoid(scores + bias) is `share`, by bisection."""
    low, high = -60.0 - float(scores.max()), 60.0 - float(scores.min())
    for _ in range(80):
        middle = (low + high) / 2
        if float(torch.sigmoid(scores.double() + middle).mean()) < share:
            low = middle
        else:
            high = middle
    return torch.tensor((low + high) / 2, dtype=scores.dtype, device=scores.device)


def _merged(body: Any) -> Any:
    import copy

    return copy.deepcopy(body).merge_and_unload()


def read_card(root: Path) -> BtBertCard:
    """What a BT-BERT folder says of itself; raises `EncoderError` when it is none."""
    path = Path(root) / CARD
    if not path.is_file():
        raise EncoderError(f"{path}: missing; this is no BT-BERT model: train one with jobs/finetune_bt_bert.py")
    try:
        return BtBertCard.model_validate(json.loads(path.read_bytes()))
    except ValueError as error:
        raise EncoderError(f"{path}: {error}") from None


def probabilities(logits: np.ndarray[Any, Any], temperature: float) -> np.ndarray[Any, Any]:
    """Logits (N, C) -> probabilities, float32."""
    found: np.ndarray[Any, Any] = (1.0 / (1.0 + np.exp(-np.clip(logits / temperature, -60, 60)))).astype(np.float32)
    return found
