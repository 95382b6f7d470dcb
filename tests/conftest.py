"""Fixtures of the whole suite: one local Ray, the real data sets, and small well-formed tables."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None)   # a busy machine is no failure
settings.load_profile("suite")
os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch: test files run beside one another, one core each

REPO = Path(__file__).resolve().parents[1]


# Begun first, so that the two processes of `make test` end together; the longest of them take minutes.
LONG_FILES = ("jobs/test_smoke.py", "training/test_launch.py", "training/test_sweep.py", "cluster/test_two_nodes.py",
              "retrieval/test_embed.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, each whole; the others in their order."""
    rank = {REPO / "tests" / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray with 4 logical CPUs for the whole run."""
    from recsys_ray.runtime import RayConfig, connected

    with connected(RayConfig(num_cpus=4, progress=False)):
        yield


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("esci_us_subset")`: the folder of a real data set, or a skip that says what is missing."""
    root = Path(os.environ.get("RECSYS_DATA", REPO.parent / "shared" / "data"))

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"real data set {name!r} not found; set RECSYS_DATA to the folder that holds it")
        return root / name

    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_clip(name)`: a random OpenCLIP network, registered as architecture `name`, in a checkpoint: its file."""
    def write(name: str) -> Path:
        import open_clip
        import torch

        root = tmp_path_factory.mktemp("clip")
        (root / f"{name}.json").write_text(json.dumps({
            "embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16,
                                            "patch_size": 16},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}))
        open_clip.add_model_config(root)
        torch.manual_seed(0)
        torch.save(open_clip.create_model(name).state_dict(), root / "tiny.pt")
        return root / "tiny.pt"

    return write


@pytest.fixture(scope="session")
def tiny_text_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_text_model(body="bert" | "xlm-roberta", pooling=..., prompts=..., seed=...)`: a directory.

    A random encoder of 32 dimensions in sentence-transformers' layout, so the real loading code runs.
    """
    def write(body: str = "bert", pooling: str = "mean", normalise: bool = True, similarity: str = "cosine",
              prompts: dict[str, str] | None = None, max_tokens: int = 64, seed: int = 0) -> Path:
        root = tmp_path_factory.mktemp("encoder")
        _write_tiny_body(root, body, max_tokens, seed)
        chain = [("base.modules.transformer.Transformer", ""),
                 ("sentence_transformer.modules.pooling.Pooling", "1_Pooling")]
        if normalise:
            chain.append(("base.modules.normalize.Normalize", "2_Normalize"))
        documents: dict[str, object] = {
            "modules.json": [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
                             for i, (kind, path) in enumerate(chain)],
            "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": False},
            "1_Pooling/config.json": {"embedding_dimension": 32, "pooling_mode": pooling, "include_prompt": True},
            "2_Normalize/config.json": {},
            "config_sentence_transformers.json": {"prompts": prompts or {}, "similarity_fn_name": similarity},
        }
        for name, document in documents.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(json.dumps(document))
        return root

    return write


@pytest.fixture(scope="session")
def tiny_pair_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_pair_model(body="bert" | "xlm-roberta", seed=...)`: the directory of a random cross-encoder of logits."""
    def write(body: str = "bert", max_tokens: int = 48, seed: int = 0) -> Path:
        import torch
        from transformers import AutoModelForSequenceClassification

        root = tmp_path_factory.mktemp("pair")
        _write_tiny_body(root, body, max_tokens, seed)
        model = AutoModelForSequenceClassification.from_pretrained(str(root), num_labels=1)
        for name, parameter in model.named_parameters():
            if "classifier" in name or "pooler" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root)
        config = json.loads((root / "config.json").read_text())
        config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity"}
        (root / "config.json").write_text(json.dumps(config))
        return root

    return write


def _write_tiny_body(root: Path, body: str, max_tokens: int, seed: int) -> None:
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(seed)
    if body == "bert":
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        vocabulary = [*names.values(), *letters, *(f"##{letter}" for letter in letters)]
        tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        model = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=max_tokens, **sizes))
    else:
        names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
        vocabulary = [*names.values(), "\u2581", *letters]
        tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in vocabulary], unk_id=3))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        model = XLMRobertaModel(XLMRobertaConfig(vocab_size=len(vocabulary), max_position_embeddings=max_tokens + 2,
                                                 type_vocab_size=1, **sizes))
    tokenizer.normalizer = normalizers.Lowercase()
    first, last = names["cls_token"], names["sep_token"]
    second = f"$B:1 {last}:1" if body == "bert" else f"{last} $B {last}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} {second}",
        special_tokens=[(one, vocabulary.index(one)) for one in (first, last)])
    for parameter in model.parameters():  # wide enough that texts differ and a wrong position shows
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(root)
    inputs = ["input_ids", *(["token_type_ids"] if body == "bert" else []), "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_tokens, model_input_names=inputs,
                            **names).save_pretrained(root)
