"""A BERT or XLM-RoBERTa encoder to be trained: packed forward and backward passes over the model hub's own body.

The parameters are those of the hub's model under its own names, so that optimisers, `peft` and saving
need nothing special. Weights stay in float32; products are computed in the working type.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recsys_ray.config import Config
from recsys_ray.models.counter_dropout import keep_scale, masked_, token_keys
from recsys_ray.models.fronts import Fronts, places_of
from recsys_ray.models.packed_bert import token_types
from recsys_ray.models.packed_layers import (
    Block,
    Dropout,
    WorkingWeights,
    add_norm,
    attend,
    attend_first,
    attend_fused,
    linear,
    plan_blocks,
)
from recsys_ray.models.sentence_layout import EncoderError, SentenceLayout, find_model, read_layout
from recsys_ray.models.text_encoder import TextEncoderConfig, device_of, dtype_of

TokenIds = Sequence[npt.NDArray[np.int32]]
CPU_TOKENS_AT_ONCE = 2048       # that go through all layers together: what they leave in the cache is used again
GPU_TOKENS_AT_ONCE = 1 << 20
DESCRIPTIONS = ("modules.", "config", "sentence_", "tokenizer", "vocab", "merges", "special_tokens", "added_tokens",
                "sentencepiece", "unigram")
SITES = 3                       # of dropout in a layer: attention weights, attention output, feed-forward output


class LoraSettings(Config):
    """Low-rank adapters beside frozen weights (Hu et al., arXiv 2106.09685), through `peft`."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    modules: tuple[str, ...] = ("query", "key", "value", "dense")


class TrainableOptions(Config):
    """How an encoder's passes are computed in training."""

    dropout: float | None = Field(default=None, ge=0, lt=1)     # None: what the model was made with
    gradient_checkpointing: bool = False    # a third more time for a fraction of the memory
    freeze_token_embeddings: bool = False
    lora: LoraSettings | None = None
    # plain: scores are held, dropout is a function of the text; fused: torch's kernels, which need less memory.
    # auto: fused on a GPU
    attention: Literal["auto", "plain", "fused"] = "auto"
    tokens_at_once: int | None = Field(default=None, ge=1)      # that go through all layers together; None: by device


class TrainableConfig(TrainableOptions):
    """Which encoder is trained, and how its passes are computed."""

    model: str = "minilm"                   # "minilm", a local path or a hub name
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"   # of the products; weights are float32
    device: Literal["auto", "cpu", "cuda"] = "auto"
    similarity: Literal["auto", "cosine", "dot"] = "auto"   # auto: what the model declares


class TrainableBert(nn.Module):
    """Token ids of N texts -> N embeddings, float32 (N, D), with gradients.

    They have unit length where the model compares by cosine, and are as pooled otherwise.
    """

    body: Any

    def __init__(self, body: nn.Module, layout: SentenceLayout, config: TrainableConfig, dtype: str) -> None:
        super().__init__()
        if layout.not_packed:
            raise EncoderError(f"{layout.root}: cannot be trained here: {layout.not_packed}")
        self.body, self.layout, self.config = body, layout, config
        self.similarity = layout.similarity if config.similarity == "auto" else config.similarity
        self.unit_length = layout.normalise or self.similarity == "cosine"
        self.dropout_seed = 0       # set anew for every step: the masks are a function of it and the text
        settings = self.body.config
        self.heads = int(settings.num_attention_heads)
        self._first_position = 0 if settings.model_type == "bert" else int(settings.pad_token_id) + 1
        self._rates = (float(settings.hidden_dropout_prob), float(settings.attention_probs_dropout_prob))
        if config.dropout is not None:
            self._rates = (config.dropout, config.dropout)
        self.dtype = dtype          # of the products

    @classmethod
    def load(cls, config: TrainableConfig) -> Self:
        """The encoder of `config` on its device; raises `EncoderError` when it cannot be loaded or trained."""
        layout = read_layout(find_model(config.model))
        running = TextEncoderConfig(device=config.device, dtype=config.dtype)
        device = device_of(running)
        body = load_body(layout)
        if config.freeze_token_embeddings:
            body.embeddings.word_embeddings.requires_grad_(False)
        if config.lora is not None:
            body = with_lora(body, config.lora)
        return cls(body, layout, config, dtype_of(running, device)).to(device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(self, token_ids: TokenIds, second: Sequence[int] | None = None, fronts: Fronts | None = None) -> Tensor:
        """Embeddings of N tokenised texts, float32 (N, D), in their order.

        `second`: of pairs of texts, the place where the second begins, for bodies that are told by a token type.
        `fronts`: what stands in front of every text, (N, F, D): of each the first token's state.
        """
        order, parts = _by_length(token_ids), []
        places = None if second is None else [second[place] for place in order]
        first_only = self.layout.pooling == "cls" or fronts is not None
        for hidden, lengths in self._run([token_ids[place] for place in order], places, first_only, fronts):
            parts.append(hidden.to(_exact(hidden)) if first_only else self._mean(hidden, lengths))
        pooled_ND = torch.cat(parts)
        if fronts is not None:
            pooled_ND = pooled_ND.view(len(order), fronts.count, -1)
        pooled_ND = pooled_ND[_inverse(order).to(self.device)]
        return F.normalize(pooled_ND, dim=-1) if self.unit_length else pooled_ND

    def hidden_states(self, token_ids: TokenIds, fronts: Fronts | None = None) -> tuple[Tensor, list[int]]:
        """(the last layer's state of every token, (T, D), texts end to end in their order; tokens of each text)."""
        order = _by_length(token_ids)
        some = [token_ids[place] for place in order]
        packed_TD = torch.cat([hidden_TD for hidden_TD, _ in self._run(some, fronts=fronts)])
        lengths = np.array([len(one) for one in token_ids])
        starts = np.empty(len(lengths), dtype=np.int64)
        starts[order] = np.cumsum(lengths[order]) - lengths[order]
        rows = np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
        return packed_TD[torch.from_numpy(rows).to(self.device)], lengths.tolist()

    def _run(self, token_ids: TokenIds, second: Sequence[int] | None = None, first_only: bool = False,
             fronts: Fronts | None = None) -> Iterator[tuple[Tensor, list[int]]]:
        """The states of so many texts as go together, of all tokens or of each first one, and the texts' lengths.

        `token_ids` by falling length.
        """
        dropout = self._dropout(token_ids)
        working = WorkingWeights(None if self.dtype == "float32" else getattr(torch, self.dtype))
        hidden_TD = self._embed(token_ids, second, dropout, fronts)
        firsts = [0] if fronts is None else fronts.firsts
        hidden_TD = hidden_TD.to(working.dtype or hidden_TD.dtype)
        budget = self.config.tokens_at_once or (
            GPU_TOKENS_AT_ONCE if hidden_TD.device.type == "cuda" else CPU_TOKENS_AT_ONCE)
        for first, last, start, end in _portions([len(one) for one in token_ids], budget):
            lengths = [len(one) for one in token_ids[first:last]]
            blocks = plan_blocks(lengths, hidden_TD.device, fronts)
            rows = _rows_of(lengths, firsts).to(hidden_TD.device)
            some_TD, some_dropout = hidden_TD[start:end], dropout.take(start, end)
            layers = self._plain_body().encoder.layer
            for number, layer in enumerate(layers):
                ending = (rows, firsts) if first_only and number == len(layers) - 1 else None
                if self.config.gradient_checkpointing and torch.is_grad_enabled():
                    some_TD = checkpoint(self._layer, layer, number, some_TD, blocks, some_dropout, working, ending,
                                         use_reentrant=False)
                else:
                    some_TD = self._layer(layer, number, some_TD, blocks, some_dropout, working, ending)
            yield some_TD, lengths

    def _plain_body(self) -> Any:
        return self.body.get_base_model() if self.config.lora is not None else self.body

    def _dropout(self, token_ids: TokenIds) -> Dropout:
        hidden, attention = self._rates
        if not self.training or not (hidden or attention):
            return Dropout(None, 0.0, 0.0)
        return Dropout(token_keys(token_ids, self.dropout_seed).to(self.device), hidden, attention)

    def _embed(self, token_ids: TokenIds, second: Sequence[int] | None, dropout: Dropout, fronts: Fronts | None
               ) -> Tensor:
        parts = self._plain_body().embeddings
        ids = torch.from_numpy(np.concatenate(token_ids)).to(self.device)
        positions = np.concatenate([places_of(len(one), fronts) for one in token_ids]) + self._first_position
        summed = parts.word_embeddings(ids) + parts.position_embeddings(torch.from_numpy(positions).to(self.device))
        types = parts.token_type_embeddings.weight
        typed = types[0] if second is None else F.embedding(token_types(token_ids, second).to(self.device), types)
        hidden_TD: Tensor = parts.LayerNorm(summed + typed)
        keep = dropout.hidden_keep(0, hidden_TD.shape[1])
        if keep is not None:
            hidden_TD = hidden_TD * masked_(torch.full_like(hidden_TD, keep_scale(dropout.hidden)), keep)
        return hidden_TD

    def _layer(self, layer: Any, number: int, hidden_TD: Tensor, blocks: Sequence[Block], dropout: Dropout,
               working: WorkingWeights, ending: tuple[Tensor, list[int]] | None) -> Tensor:
        """A layer's states of all tokens, (T, D), or of the R that `ending` names, (R, D).

        `ending`: (their packed rows, their places in each text).
        """
        mixer, site = layer.attention.self, 1 + SITES * number
        way = self.config.attention
        if ending is not None:
            rows, places = ending
            both_T2D = linear(hidden_TD, working, mixer.key, mixer.value)
            hidden_TD, dropout = hidden_TD[rows], dropout.at(rows)
            attended_TD = attend_first(linear(hidden_TD, working, mixer.query), both_T2D, blocks, self.heads, dropout,
                                       site, places)
        else:
            qkv_T3D = linear(hidden_TD, working, mixer.query, mixer.key, mixer.value)
            if way == "fused" or (way == "auto" and hidden_TD.device.type == "cuda"):
                attended_TD = attend_fused(qkv_T3D, blocks, self.heads, dropout)
            else:
                attended_TD = attend(qkv_T3D, blocks, self.heads, dropout, site)
        mixed_TD = linear(attended_TD, working, layer.attention.output.dense)
        hidden_TD = add_norm(mixed_TD, hidden_TD, dropout, site + 1, layer.attention.output.LayerNorm, working)
        inner = F.gelu(linear(hidden_TD, working, layer.intermediate.dense))
        return add_norm(linear(inner, working, layer.output.dense), hidden_TD, dropout, site + 2,
                        layer.output.LayerNorm, working)

    def _mean(self, hidden_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        sizes = torch.tensor(lengths, device=hidden_TD.device)
        texts = torch.repeat_interleave(torch.arange(len(lengths), device=hidden_TD.device), sizes)
        summed = torch.zeros(len(lengths), hidden_TD.shape[1], dtype=_exact(hidden_TD), device=hidden_TD.device)
        return summed.index_add(0, texts, hidden_TD.to(summed.dtype)) / sizes[:, None]

    def save(self, root: Path, card: str = "", prompts: dict[str, str] | None = None) -> None:
        """Write a sentence-transformers folder: the source's files with these weights and `card` as its README.md.

        Low-rank adapters are merged into the weights they stand beside; `prompts` replace the source's own.
        """
        target = Path(root)
        for path in sorted(self.layout.root.rglob("*")):
            name = path.relative_to(self.layout.root)
            if path.is_file() and _is_description(path) and not {".git", ".cache"} & set(name.parts):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)
        body = self.body
        if self.config.lora is not None:
            body = copy.deepcopy(body).merge_and_unload()
        body.save_pretrained(target / self.layout.transformer.relative_to(self.layout.root))
        if prompts is not None:
            described = target / "config_sentence_transformers.json"
            values = json.loads(described.read_bytes()) if described.is_file() else {}
            described.write_text(json.dumps({**values, "prompts": prompts}, indent=2), encoding="utf-8")
        if card:
            (target / "README.md").write_text(card, encoding="utf-8")


def _is_description(path: Path) -> bool:
    """Whether a file describes the model or its tokenizer; weights and what tells of the source's training do not."""
    return path.suffix in {".json", ".txt", ".model"} and path.name.startswith(DESCRIPTIONS)


def load_body(layout: SentenceLayout) -> Any:
    """The model hub's own body in float32; raises `EncoderError` when the files lack some of its weights."""
    from transformers import AutoModel
    from transformers.utils import logging as hub_logging

    loud = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()       # type: ignore[no-untyped-call]  # it reports the pooler, which no sentence encoder uses
    hub_logging.disable_progress_bar()      # type: ignore[no-untyped-call]
    try:
        body, found = AutoModel.from_pretrained(
            str(layout.transformer), add_pooling_layer=False, dtype=torch.float32, local_files_only=True,
            output_loading_info=True)
    finally:
        hub_logging.set_verbosity(loud)
        hub_logging.enable_progress_bar()   # type: ignore[no-untyped-call]
    if found["missing_keys"]:
        raise EncoderError(f"{layout.transformer}: the weights lack {', '.join(sorted(found['missing_keys'])[:3])}; "
                           "they would be random")
    return body


def with_lora(body: Any, settings: LoraSettings) -> Any:
    """The body with frozen weights and adapters beside them; raises `EncoderError` without the package `peft`."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise EncoderError("lora: needs the package peft: pip install 'recsys_ray[train]'") from None
    return get_peft_model(body, LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
                                           target_modules=list(settings.modules), bias="none"))


def _by_length(token_ids: TokenIds) -> npt.NDArray[np.intp]:
    return np.argsort([-len(one) for one in token_ids], kind="stable")


def _rows_of(lengths: Sequence[int], places: Sequence[int]) -> Tensor:
    """The packed rows of the tokens at some places of every text, texts end to end, (R,)."""
    sizes = torch.tensor(lengths)
    return ((sizes.cumsum(0) - sizes)[:, None] + torch.tensor(places)).flatten()


def _inverse(order: npt.NDArray[np.intp]) -> Tensor:
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return torch.from_numpy(places)


def _portions(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, int, int, int]]:
    """(first text, text behind the last, first token, token behind the last) of texts that go together."""
    first, start, tokens = 0, 0, 0
    for place, length in enumerate(lengths):
        if place > first and tokens + length > budget:
            yield first, place, start, start + tokens
            first, start, tokens = place, start + tokens, 0
        tokens += length
    yield first, len(lengths), start, start + tokens


def _exact(hidden_TD: Tensor) -> torch.dtype:
    return torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
