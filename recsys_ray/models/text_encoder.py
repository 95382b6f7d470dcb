"""Texts -> vectors with any sentence-transformers bi-encoder, fast where it can be.

BERT and XLM-RoBERTa bodies with CLS or mean pooling (MiniLM, E5, BGE and BGE-M3's dense output) run
packed, without padding, in bf16 where the hardware has it; any other model runs through
sentence-transformers itself. With cosine similarity every vector has unit length, so that the inner
product is the similarity whatever the encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from recsys_ray.artifacts import sha256_of
from recsys_ray.config import Config
from recsys_ray.models.sentence_layout import (
    MULTI_HEAD,
    SPARSE_HEAD,
    EncoderError,
    SentenceLayout,
    find_model,
    head_file,
    read_layout,
)
from recsys_ray.models.token_signals import Encoding

log = logging.getLogger(__name__)

CPU_TOKEN_BUDGET = 1024     # what a core's cache holds
GPU_TOKEN_BUDGET = 65_536
TOKENIZE_TEXTS = 2048       # texts handed to the tokenizer at once: bounds its intermediate memory
UNLIMITED = 1_000_000       # tokenizers without a limit declare 1e30

Vectors = npt.NDArray[np.float32]


class TextEncoderConfig(Config):
    """Which text encoder, and how it is run."""

    model: str = "minilm"               # "minilm" (package of the `demo` extra), a local path or a hub name
    max_tokens: int | None = Field(default=None, ge=3)      # None: the model's own limit
    query_prompt: str | None = None     # None: the model's own prompt
    document_prompt: str | None = None
    similarity: Literal["auto", "cosine", "dot"] = "auto"   # auto: what the model declares
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "packed", "sentence_transformers"] = "auto"
    token_budget: int | None = Field(default=None, ge=1)    # tokens a forward pass; None: by device
    max_chars: int = Field(default=20_000, ge=1)            # longer texts are cut before the tokenizer sees them
    sparse: bool = False                # also weights of tokens: only models with BGE-M3's heads have them
    multi_vector: bool = False          # also a vector for each token
    multi_vector_dtype: Literal["float16", "float32"] = "float16"   # as they are stored


class TextEncoder:
    """A loaded encoder; equal texts get equal vectors within one call."""

    def __init__(self, config: TextEncoderConfig) -> None:
        self.config = config
        self.layout = read_layout(find_model(config.model))
        self.identity: dict[str, Any] = _identity(config, self.layout)
        self.dimension: int = self.identity["dimension"]
        self.device = device_of(config)
        self.dtype = dtype_of(config, self.device)  # recorded with the vectors, not part of the identity
        backend = _backend(config, self.layout)
        self._runner = PackedRunner(self) if backend == "packed" else _ThroughSentenceTransformers(self)

    def encode_documents(self, texts: Sequence[str]) -> Vectors:
        """Vectors of N product texts, float32 (N, D)."""
        return self._encode(texts, self.identity["document_prompt"])

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """Vectors of N queries, float32 (N, D)."""
        return self._encode(texts, self.identity["query_prompt"])

    def encode_all_documents(self, texts: Sequence[str]) -> Encoding:
        """All that this encoder gives for N product texts: vectors, and signals where it has the heads."""
        return Encoding(self.encode_documents(texts))

    def encode_all_queries(self, texts: Sequence[str]) -> Encoding:
        """All that this encoder gives for N queries."""
        return Encoding(self.encode_queries(texts))

    def warm_up(self, tokens: int) -> None:
        """Be ready for batches of up to so many tokens: what is compiled for their sizes is compiled now."""
        if isinstance(self._runner, PackedRunner):
            self._runner.forward.warm_up(min(tokens, self._runner.token_budget))

    def _encode(self, texts: Sequence[str], prompt: str) -> Vectors:
        if not len(texts):
            return np.zeros((0, self.dimension), dtype=np.float32)
        different, index = prepare_texts(texts, self.config.max_chars)
        vectors = self._runner.vectors(different, prompt)
        if self.identity["normalise"]:
            vectors = unit_length(vectors)
        return np.asarray(vectors[index], dtype=np.float32)


def prepare_texts(texts: Sequence[str], max_chars: int) -> tuple[list[str], npt.NDArray[np.int64]]:
    """(the different texts, each cut and made valid; the place of every text among them)."""
    places: dict[str, int] = {}
    index = [places.setdefault(prepare_text(text, max_chars), len(places)) for text in texts]
    return list(places), np.array(index, dtype=np.int64)


def unit_length(vectors: Vectors) -> Vectors:
    """The vectors (N, D) divided by their lengths; zeros stay zeros."""
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    return np.divide(vectors, np.where(lengths > 0, lengths, 1), dtype=np.float32)


def encoder_identity(config: TextEncoderConfig) -> dict[str, Any]:
    """What decides whether two vectors may be compared, JSON-able, without loading the weights."""
    return _identity(config, read_layout(find_model(config.model)))


def _identity(config: TextEncoderConfig, layout: SentenceLayout) -> dict[str, Any]:
    similarity = layout.similarity if config.similarity == "auto" else config.similarity
    if similarity not in ("cosine", "dot"):
        raise EncoderError(f"{layout.root}: declares similarity {similarity!r}; "
                           "set encoder.similarity to cosine or dot")
    return {
        "weights_sha256": layout.weights_sha256(), "tokenizer_sha256": layout.tokenizer_sha256(),
        "pooling": layout.pooling, "normalise": layout.normalise or similarity == "cosine", "similarity": similarity,
        "query_prompt": layout.query_prompt if config.query_prompt is None else config.query_prompt,
        "document_prompt": layout.document_prompt if config.document_prompt is None else config.document_prompt,
        "max_tokens": _max_tokens(config, layout), "max_chars": config.max_chars, "dimension": layout.dimension,
        **_head_identity(config, layout),
    }


def _head_identity(config: TextEncoderConfig, layout: SentenceLayout) -> dict[str, Any]:
    """What the heads that are asked for add; nothing for an encoder of plain vectors."""
    found: dict[str, Any] = {}
    if config.sparse:
        found["sparse_sha256"] = sha256_of(head_file(layout.root / SPARSE_HEAD))
    if config.multi_vector:
        from recsys_ray.models.bge_m3_heads import multi_dimension

        found |= {"multi_vector_sha256": sha256_of(head_file(layout.root / MULTI_HEAD)),
                  "multi_vector_dimension": multi_dimension(layout.root, layout.dimension),
                  "multi_vector_dtype": config.multi_vector_dtype}
    return found


def _max_tokens(config: TextEncoderConfig, layout: SentenceLayout) -> int:
    limit = layout.max_tokens
    if config.max_tokens is not None and limit is not None and config.max_tokens > limit:
        raise EncoderError(f"encoder.max_tokens: {config.max_tokens} is more than the {limit} that {layout.root} takes")
    chosen = config.max_tokens or limit
    if chosen is None or chosen > UNLIMITED:
        raise EncoderError(f"{layout.root}: declares no maximum length; set encoder.max_tokens")
    return chosen


def prepare_text(text: str, max_chars: int) -> str:
    """The text cut to `max_chars`; lone surrogates, which no tokenizer takes, become question marks."""
    return text[:max_chars].encode("utf-8", "replace").decode("utf-8")


def _backend(config: TextEncoderConfig, layout: SentenceLayout) -> str:
    if config.backend == "packed" and layout.not_packed:
        raise EncoderError(f"encoder.backend: {layout.root} cannot run packed: {layout.not_packed}; "
                           "use backend=sentence_transformers")
    if config.backend != "auto":
        return config.backend
    if layout.not_packed:
        log.info("%s runs through sentence-transformers: %s", layout.root, layout.not_packed)
    return "sentence_transformers" if layout.not_packed else "packed"


def device_of(config: TextEncoderConfig) -> str:
    """cpu or cuda; raises `EncoderError` when a GPU is asked for and there is none."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise EncoderError("encoder.device: cuda was asked for, but torch finds no GPU here")
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(config: TextEncoderConfig, device: str) -> str:
    """The type that products are computed in: as configured, or the fastest of the device."""
    import torch

    if config.dtype != "auto":
        return config.dtype
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if _cpu_has_bf16() else "float32"


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware; without it bf16 is far slower than fp32."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


class PackedRunner:
    """Tokenise, sort by length, run `PackedBert` on batches of about `token_budget` tokens."""

    def __init__(self, encoder: TextEncoder) -> None:
        import torch

        from recsys_ray.models.body_weights import read_body
        from recsys_ray.models.packed_bert import PackedBert

        config, layout = encoder.config, encoder.layout
        default = GPU_TOKEN_BUDGET if encoder.device == "cuda" else CPU_TOKEN_BUDGET
        self.token_budget = config.token_budget or default
        self.max_tokens: int = encoder.identity["max_tokens"]
        self._tokenizer, self.special_ids = load_tokenizer(layout, self.max_tokens)
        weights, body = read_body(layout)
        self.forward = PackedBert(weights, body, layout.pooling, getattr(torch, encoder.dtype),
                                  torch.device(encoder.device))

    def vectors(self, texts: Sequence[str], prompt: str) -> Vectors:
        """Pooled vectors, float32 (N, D), of N prepared texts."""
        out = np.empty((len(texts), self.forward.dimension), dtype=np.float32)
        for batch, token_ids in self.batches(texts, prompt):
            out[batch] = self.forward(token_ids)
        return out

    def batches(self, texts: Sequence[str], prompt: str
                ) -> Iterator[tuple[npt.NDArray[np.intp], list[npt.NDArray[np.int32]]]]:
        """(places of the texts, their tokens by falling length) of each forward pass."""
        token_ids = self._tokenise(texts, prompt)
        order = np.argsort([-len(one) for one in token_ids], kind="stable")
        for batch in self._batches(order, token_ids):
            yield batch, [token_ids[place] for place in batch]

    def _tokenise(self, texts: Sequence[str], prompt: str) -> list[npt.NDArray[np.int32]]:
        token_ids = []
        for start in range(0, len(texts), TOKENIZE_TEXTS):
            some = [prompt + text for text in texts[start:start + TOKENIZE_TEXTS]]
            token_ids += [np.array(one.ids, dtype=np.int32) for one in self._tokenizer.encode_batch_fast(some)]
        return token_ids

    def _batches(self, order: npt.NDArray[np.intp], token_ids: Sequence[npt.NDArray[np.int32]]
                 ) -> Iterator[npt.NDArray[np.intp]]:
        start, tokens = 0, 0
        for end, place in enumerate(order):
            if end > start and tokens + len(token_ids[place]) > self.token_budget:
                yield order[start:end]
                start, tokens = end, 0
            tokens += len(token_ids[place])
        yield order[start:]


class _ThroughSentenceTransformers:
    """Any other architecture, as sentence-transformers runs it."""

    def __init__(self, encoder: TextEncoder) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(str(encoder.layout.root), device=encoder.device, local_files_only=True,
                                          model_kwargs={"dtype": getattr(torch, encoder.dtype)})
        self._model.max_seq_length = encoder.identity["max_tokens"]

    def vectors(self, texts: Sequence[str], prompt: str) -> Vectors:
        found = self._model.encode(list(texts), prompt=prompt, show_progress_bar=False, convert_to_tensor=True)
        vectors: Vectors = found.float().cpu().numpy()
        return vectors


def load_tokenizer(layout: SentenceLayout, max_tokens: int) -> tuple[Any, tuple[int, ...]]:
    """(the fast tokenizer, cut at `max_tokens`; the ids of its special tokens)."""
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(str(layout.transformer), local_files_only=True)
    tokenizer = whole.backend_tokenizer
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer, tuple(sorted(set(whole.all_special_ids)))
