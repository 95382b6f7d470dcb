"""(query, text) pairs -> relevance scores: a BERT or XLM-RoBERTa body reads both at once, a head its first token.

`CrossEncoder` scores: packed, without padding, in bf16 where the hardware has it; any other architecture
runs through sentence-transformers. `TrainableCrossEncoder` is the same with gradients; what it saves,
`sentence_transformers.CrossEncoder` loads and scores alike.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import Field
from torch import Tensor, nn

from recsys_ray.config import Config
from recsys_ray.models.body_weights import read_body
from recsys_ray.models.counter_dropout import keep_mask, keep_scale, masked_, token_keys
from recsys_ray.models.packed_bert import PackedBert
from recsys_ray.models.sentence_layout import (
    CROSS_ENCODER_KIND,
    EncoderError,
    SentenceLayout,
    find_model,
    read_pair_layout,
)
from recsys_ray.models.text_encoder import (
    CPU_TOKEN_BUDGET,
    GPU_TOKEN_BUDGET,
    TOKENIZE_TEXTS,
    UNLIMITED,
    TextEncoderConfig,
    device_of,
    dtype_of,
    prepare_text,
)
from recsys_ray.models.trainable_bert import SITES, TrainableBert, TrainableConfig, TrainableOptions

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]
ACTIVATIONS = {"Identity", "Sigmoid"}       # between the head's number and the score
SAVED_ACTIVATION = "torch.nn.modules.linear.Identity"   # scores are logits: losses and blends want them as they are
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "sentencepiece", "unigram")


class CrossEncoderConfig(Config):
    """Which cross-encoder, and how it is run."""

    model: str                                              # a local path, an artefact's root or a hub name
    max_tokens: int | None = Field(default=None, ge=8)      # of query and text together; None: the model's own limit
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    token_budget: int | None = Field(default=None, ge=1)    # tokens a forward pass; None: by device
    max_chars: int = Field(default=20_000, ge=1)            # of each text, before the tokenizer sees it


class PairTokenizer:
    """Pairs of texts -> token ids, and where the second text begins; the longer text is cut first."""

    def __init__(self, layout: SentenceLayout, max_tokens: int, max_chars: int) -> None:
        from transformers import AutoTokenizer

        whole = AutoTokenizer.from_pretrained(str(layout.transformer), local_files_only=True)
        self._tokenizer = whole.backend_tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens, strategy="longest_first")
        self._typed = "token_type_ids" in whole.model_input_names   # else the model was never told where it begins
        self._max_chars = max_chars

    def __call__(self, queries: Sequence[str], texts: Sequence[str]) -> tuple[list[Tokens], list[int]]:
        """(token ids of N pairs, the place of each second text: the end, where models are not told)."""
        ids, second = list[Tokens](), list[int]()
        for start in range(0, len(queries), TOKENIZE_TEXTS):
            pairs = [tuple(prepare_text(one, self._max_chars) for one in pair) for pair in zip(
                queries[start:start + TOKENIZE_TEXTS], texts[start:start + TOKENIZE_TEXTS], strict=True)]
            for one in self._tokenizer.encode_batch_fast(pairs):
                ids.append(np.array(one.ids, dtype=np.int32))
                second.append(len(one.ids) - (sum(one.type_ids) if self._typed else 0))
        return ids, second


# --- scoring --------------------------------------------------------------------------------------
class CrossEncoder:
    """A loaded cross-encoder."""

    def __init__(self, config: CrossEncoderConfig) -> None:
        """Errors: `EncoderError` for a model that cannot be loaded, or has no head that gives one number."""
        self.config = config
        self.layout = read_pair_layout(find_model(config.model, CROSS_ENCODER_KIND))
        self.identity = _identity(config, self.layout)
        self.max_tokens: int = self.identity["max_tokens"]
        running = TextEncoderConfig(device=config.device, dtype=config.dtype)
        self.device = device_of(running)
        self.dtype = dtype_of(running, self.device)
        activation = self.identity["activation"]
        reason = self.layout.not_packed or (None if activation in ACTIVATIONS else f"its activation is {activation}")
        if reason:
            log.info("%s runs through sentence-transformers: %s", self.layout.root, reason)
        self._runner: _Packed | _ThroughSentenceTransformers = (
            _ThroughSentenceTransformers(self) if reason else _Packed(self, activation))

    def score(self, queries: Sequence[str], texts: Sequence[str]) -> Floats:
        """The relevance of each text to its query, float32 (N,), higher is better; equal pairs score alike."""
        if len(queries) != len(texts):
            raise ValueError(f"{len(queries)} queries for {len(texts)} texts: give one query a text")
        return self._runner.scores(queries, texts) if len(texts) else np.zeros(0, np.float32)

    def warm_up(self) -> None:
        """Be ready for batches of any size: what is compiled for it is compiled now."""
        if isinstance(self._runner, _Packed):
            self._runner.warm_up()


class _Packed:
    """Sort by length, run `PackedBert` on batches of about a budget of tokens, and the head on what it gives."""

    def __init__(self, owner: CrossEncoder, activation: str) -> None:
        config, layout, device = owner.config, owner.layout, torch.device(owner.device)
        self._budget = config.token_budget or (GPU_TOKEN_BUDGET if owner.device == "cuda" else CPU_TOKEN_BUDGET)
        self._tokenise = PairTokenizer(layout, owner.max_tokens, config.max_chars)
        weights, body = read_body(layout)
        self._forward = PackedBert(weights, body, "cls", getattr(torch, owner.dtype), device)
        self._typed = weights["embeddings.token_type_embeddings.weight"].shape[0] > 1
        names = HEADS["bert" if body["model_type"] == "bert" else "roberta"]
        if missing := [name for name in names if f"{name}.weight" not in weights]:
            raise EncoderError(f"{layout.root}: has no {missing[0]}, so it gives no scores; fine-tune it first")
        if (numbers := weights[f"{names[1]}.weight"].shape[0]) != 1:
            raise EncoderError(f"{layout.root}: its head gives {numbers} numbers a pair; a reranker needs one")
        self._head = [weights[f"{name}.{part}"].float() for name in names for part in ("weight", "bias")]
        self._activation = activation

    def warm_up(self) -> None:
        """Compute a batch of every size once."""
        self._forward.warm_up(self._budget)

    def scores(self, queries: Sequence[str], texts: Sequence[str]) -> Floats:
        """Scores of N pairs, (N,)."""
        ids, second = self._tokenise(queries, texts)
        out = np.empty(len(ids), dtype=np.float32)
        order = np.argsort([-len(one) for one in ids], kind="stable")
        for batch in batches(order, [len(one) for one in ids], self._budget):
            states_ND = self._forward([ids[place] for place in batch],
                                      [second[place] for place in batch] if self._typed else None)
            out[batch] = self._scored(torch.from_numpy(states_ND)).numpy()
        return out

    def _scored(self, states_ND: Tensor) -> Tensor:
        inner_weight, inner_bias, weight, bias = self._head
        logits_N = F.linear(torch.tanh(F.linear(states_ND, inner_weight, inner_bias)), weight, bias)[:, 0]
        return torch.sigmoid(logits_N) if self._activation == "Sigmoid" else logits_N


class _ThroughSentenceTransformers:
    """Any other architecture, as sentence-transformers runs it."""

    def __init__(self, owner: CrossEncoder) -> None:
        from sentence_transformers import CrossEncoder as TheirCrossEncoder

        self._model = TheirCrossEncoder(str(owner.layout.root), device=owner.device, max_length=owner.max_tokens,
                                        local_files_only=True, model_kwargs={"dtype": getattr(torch, owner.dtype)})
        self._max_chars = owner.config.max_chars

    def scores(self, queries: Sequence[str], texts: Sequence[str]) -> Floats:
        """Scores of N pairs, (N,)."""
        pairs = [(prepare_text(query, self._max_chars), prepare_text(text, self._max_chars))
                 for query, text in zip(queries, texts, strict=True)]
        return np.asarray(self._model.predict(pairs, show_progress_bar=False), dtype=np.float32)


def batches(order: npt.NDArray[np.intp], lengths: Sequence[int], budget: int) -> list[npt.NDArray[np.intp]]:
    """`order` in pieces of at most `budget` tokens, or of one pair that is longer."""
    ends, tokens = [0], 0
    for at, place in enumerate(order.tolist()):
        if at > ends[-1] and tokens + lengths[place] > budget:
            ends.append(at)
            tokens = 0
        tokens += lengths[place]
    return np.split(order, ends[1:])


def pair_tokens(wanted: int | None, layout: SentenceLayout) -> int:
    """How many tokens a pair may have: as wanted, or the model's limit; raises `EncoderError` for more than that."""
    limit = layout.max_tokens
    if wanted is not None and limit is not None and wanted > limit:
        raise EncoderError(f"max_tokens: {wanted} is more than the {limit} that {layout.root} takes")
    found = wanted or limit
    if found is None or found > UNLIMITED:
        raise EncoderError(f"{layout.root}: declares no maximum length; set max_tokens")
    return found


def cross_encoder_identity(config: CrossEncoderConfig) -> dict[str, Any]:
    """What decides the scores, JSON-able, without loading the weights."""
    return _identity(config, read_pair_layout(find_model(config.model, CROSS_ENCODER_KIND)))


def _identity(config: CrossEncoderConfig, layout: SentenceLayout) -> dict[str, Any]:
    return {"weights_sha256": layout.weights_sha256(), "tokenizer_sha256": layout.tokenizer_sha256(),
            "max_tokens": pair_tokens(config.max_tokens, layout), "max_chars": config.max_chars,
            "activation": _activation(layout)}


def _activation(layout: SentenceLayout) -> str:
    """The class between logit and score that a folder declares, as sentence-transformers reads it; else Sigmoid."""
    own, body = layout.root / "config_sentence_transformers.json", layout.transformer / "config.json"
    known = json.loads(own.read_bytes()) if own.is_file() else {}
    described = json.loads(body.read_bytes())
    found = (known.get("activation_fn") or (described.get("sentence_transformers") or {}).get("activation_fn")
             or described.get("sbert_ce_default_activation_function") or "Sigmoid")
    return str(found).rsplit(".", 1)[-1]


# --- training -------------------------------------------------------------------------------------
HEADS = {"bert": ("pooler.dense", "classifier"), "roberta": ("classifier.dense", "classifier.out_proj")}


class TrainableCrossEncoder(nn.Module):
    """Token ids of N pairs -> N logits, float32 (N,), with gradients."""

    encoder: TrainableBert
    classifier: Any

    def __init__(self, model: Any, layout: SentenceLayout, options: TrainableOptions, dtype: str) -> None:
        super().__init__()
        if options.lora is not None:
            raise EncoderError("body.lora: adapters are for text encoders; a cross-encoder is trained whole")
        self._model = [model]       # for saving; its parts are registered below, each once
        self.layout = layout
        body = model.base_model
        if options.freeze_token_embeddings:
            body.embeddings.word_embeddings.requires_grad_(False)
        self.encoder = TrainableBert(body, layout, TrainableConfig(**options.model_dump()), dtype)
        self.classifier = model.classifier
        settings = model.config
        self._is_bert = settings.model_type == "bert"
        self._typed = settings.type_vocab_size > 1
        own = settings.classifier_dropout
        self._rate = float(settings.hidden_dropout_prob if own is None else own)
        if options.dropout is not None:
            self._rate = options.dropout
        self._first_site = 1 + SITES * settings.num_hidden_layers
        self.dropout_seed = 0       # set anew for every step

    @classmethod
    def load(cls, model: str, options: TrainableOptions, dtype: str, device: str) -> Self:
        """The cross-encoder of `model` on its device; a text encoder or a bare body is given a new head.

        The head is drawn from torch's generator: seed it first.
        """
        layout = read_pair_layout(find_base(model))
        if layout.not_packed:
            raise EncoderError(f"{layout.root}: cannot be trained here: {layout.not_packed}")
        return cls(_load_classifier(layout), layout, options, dtype).to(device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.encoder.device

    @property
    def dtype(self) -> str:
        """The type that products are computed in."""
        return self.encoder.dtype

    def forward(self, token_ids: Sequence[Tokens], second: Sequence[int]) -> Tensor:
        """Logits of N tokenised pairs, float32 (N,), in their order; `second` as `PairTokenizer` gives it."""
        self.encoder.dropout_seed = self.dropout_seed
        states_ND = self.encoder(token_ids, second if self._typed else None)
        if self._is_bert:
            inner_ND = torch.tanh(self.encoder.body.pooler.dense(states_ND))
            logits: Tensor = self.classifier(self._dropped(inner_ND, token_ids, 0))
        else:
            inner_ND = torch.tanh(self.classifier.dense(self._dropped(states_ND, token_ids, 0)))
            logits = self.classifier.out_proj(self._dropped(inner_ND, token_ids, 1))
        return logits[:, 0]

    def _dropped(self, states_ND: Tensor, token_ids: Sequence[Tokens], site: int) -> Tensor:
        if not self.training or not self._rate:
            return states_ND
        lengths = np.array([len(one) for one in token_ids])
        firsts = torch.from_numpy(np.cumsum(lengths) - lengths)
        keys_N = token_keys(token_ids, self.dropout_seed)[firsts].to(states_ND.device)
        keep = keep_mask(keys_N, self._first_site + site, states_ND.shape[1], self._rate)
        return states_ND * masked_(torch.full_like(states_ND, keep_scale(self._rate)), keep)

    def save(self, root: Path, max_tokens: int, card: str = "") -> None:
        """Write a folder that `sentence_transformers.CrossEncoder` loads; its scores are logits.

        `max_tokens` is where it cuts pairs, `card` its README.md.
        """
        target = Path(root)
        target.mkdir(parents=True, exist_ok=True)
        for path in self.layout.transformer.iterdir():
            if path.name.startswith(TOKENIZER_FILES) and path.suffix in {".json", ".txt", ".model"}:
                shutil.copyfile(path, target / path.name)
        self._model[0].save_pretrained(target)
        _change(target / "config.json", {"sentence_transformers": {"activation_fn": SAVED_ACTIVATION}})
        _change(target / "tokenizer_config.json", {"model_max_length": max_tokens})
        if card:
            (target / "README.md").write_text(card, encoding="utf-8")


def find_base(model: str) -> Path:
    """The directory that a training starts from: of a cross-encoder, or of a text encoder's transformer."""
    return read_pair_layout(find_model(model, CROSS_ENCODER_KIND)).transformer


def _load_classifier(layout: SentenceLayout) -> Any:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as hub_logging

    loud = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()       # type: ignore[no-untyped-call]  # a new head is what was asked for
    hub_logging.disable_progress_bar()      # type: ignore[no-untyped-call]
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            str(layout.transformer), num_labels=1, dtype=torch.float32, local_files_only=True,
            output_loading_info=True)
    finally:
        hub_logging.set_verbosity(loud)
        hub_logging.enable_progress_bar()   # type: ignore[no-untyped-call]
    lost = sorted(name for name in found["missing_keys"] if "classifier." not in name and ".pooler." not in name)
    if lost:
        raise EncoderError(f"{layout.transformer}: the weights lack {', '.join(lost[:3])}; they would be random")
    return model


def _change(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}, indent=2), encoding="utf-8")
