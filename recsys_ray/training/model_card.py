"""The README.md of a fine-tuned model, written from its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys_ray.artifacts import git_sha
from recsys_ray.models.sentence_layout import MINILM
from recsys_ray.training.bge import FinetuneBgeConfig

if TYPE_CHECKING:
    from recsys_ray.training.attribute_adapter import FinetuneAttributeAdapterConfig
    from recsys_ray.training.bt_bert import FinetuneBtBertConfig
    from recsys_ray.training.cross_encoder import FinetuneCrossEncoderConfig

MOST_ROWS = 12

CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, product-search]
base_model: {base}
---

# A retriever of products, fine-tuned from {base}

Turns a shopper's words and the texts of products into vectors, compared by {similarity}.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode_query(["gentle cleanser for dry skin"])
products = model.encode_document(["Cream cleanser ..."])
print(model.similarity(queries, products))
```

## Training

{train_pairs} pairs of query and product, {steps} steps of {batch} pairs{early}; code version {sha}.

| setting | value |
| --- | --- |
{settings}

The loss was {first_loss} over the first tenth of the steps and {last_loss} over the last.
{false_negatives} of the (query, other product) pairs in a batch were of one product group or one text{masked}.

## Validation

{validation}
"""


def model_card(config: FinetuneBgeConfig, values: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> str:
    """The card of a run: `values` are its progress and counts, `curve` its lines."""
    steps = max(1, values["step"])
    losses = [line["loss"] for line in curve if line.get("loss") is not None]
    tenth = max(1, len(losses) // 10)
    share = values["sums"].get("false_negative_share", 0.0) / steps
    return CARD.format(
        base=_base(config.encoder.model), similarity=config.contrastive.similarity,
        train_pairs=f"{values['train_pairs']:,}",
        steps=f"{values['step']:,}", batch=config.sampler.batch_size * config.accumulate,
        early=", stopped early" if values["stopped"] else "", sha=git_sha(), settings=_settings(config),
        first_loss=_mean(losses[:tenth]), last_loss=_mean(losses[-tenth:]), false_negatives=f"{share:.2%}",
        masked="; they were left out of the loss" if config.contrastive.mask_same_product else "",
        validation=_validation("Queries of the validation split against a small catalogue",
                               config.validation.objective, values, curve))


RERANKER_CARD = """---
library_name: sentence-transformers
pipeline_tag: text-ranking
tags: [sentence-transformers, cross-encoder, reranker]
base_model: {base}
---

# A reranker, fine-tuned from {base}

Reads a query (or what is known of a user) together with the text of a candidate and gives a score; only the order of
the scores of one query means something.

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("path/to/this/folder")
print(model.rank("Likes: Emma by Jane Austen.", ["Persuasion by Jane Austen.", "Dune by Frank Herbert."]))
```

## Training

{train_pairs} pairs in {train_groups} lists, {steps} steps of {batch} lists{early}; {tokens} tokens; code version {sha}.

| setting | value |
| --- | --- |
{settings}

The loss was {first_loss} over the first tenth of the steps and {last_loss} over the last.

## Validation

{validation}
"""


def reranker_card(config: FinetuneCrossEncoderConfig, values: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]
                  ) -> str:
    """The card of a cross-encoder's run: `values` are its progress and counts, `curve` its lines."""
    losses = [line["loss"] for line in curve if line.get("loss") is not None]
    tenth, optim = max(1, len(losses) // 10), config.optim
    settings = {
        "loss": config.loss, "learning rate": f"{optim.learning_rate:g}, {optim.schedule}, {optim.warmup:.0%} warm-up",
        "weight decay": optim.weight_decay, "longest pair": f"{config.max_tokens} tokens", "seed": config.seed}
    return RERANKER_CARD.format(
        base=_base(config.model), train_pairs=f"{values['train_pairs']:,}", train_groups=f"{values['train_groups']:,}",
        steps=f"{values['step']:,}", batch=config.sampler.batch_groups * config.accumulate,
        early=", stopped early" if values["stopped"] else "", tokens=f"{values['sums'].get('tokens', 0):,.0f}",
        sha=git_sha(), settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        first_loss=_mean(losses[:tenth]), last_loss=_mean(losses[-tenth:]),
        validation=_validation("Lists of the validation split", config.validation.objective, values, curve))


BT_BERT_CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags: [bt-bert, cosmetics, ingredients]
base_model: {base}
---

# Which concerns a beauty product addresses, fine-tuned from {base}

Reads the ingredients and the title of a product together with a concern ({concerns}) and gives the probability that
the product helps. The body is an ordinary Transformers folder; the logit ({mode}) is made of one entry of its last
layer's attention, with the numbers in `bt_bert.safetensors` and `bt_bert.json`.

```python
from recsys_ray.models.bt_bert_scorer import BtBertConfig, BtBertScorer

scorer = BtBertScorer(BtBertConfig(model="path/to/this/folder"))
print(scorer.score(["Aqua, Niacinamide, Zinc PCA"], ["Mattifying gel"]))     # (1, {count}) probabilities
```

## Training

{products} products, {pairs} examples, {steps} steps of {batch}{early}; {tokens} tokens; code version {sha}.

| setting | value |
| --- | --- |
{settings}

The loss was {first_loss} over the first tenth of the steps and {last_loss} over the last.

## Validation

{validation}

Logits are divided by {temperature:g}; a concern is said to be addressed from these probabilities on: {thresholds}.
These labels are what rules or annotators said, not what is known of a product.
"""


def bt_bert_card(config: FinetuneBtBertConfig, values: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> str:
    """The card of a BT-BERT's run: `values` are its progress and counts, `curve` its lines."""
    losses = [line["loss"] for line in curve if line.get("loss") is not None]
    tenth, optim, found = max(1, len(losses) // 10), config.optim, values["calibration"]
    settings = {
        "logit": config.mode, "input": "ingredients and title" if config.mode == "explicit" else config.layout,
        "learning rate": f"{optim.learning_rate:g}, {optim.schedule}, {optim.warmup:.0%} warm-up",
        "weight decay": optim.weight_decay, "longest input": f"{config.max_tokens} tokens", "seed": config.seed,
        "unlabelled pairs": ("as the labels' mode says" if config.unlabelled_weight is None
                             else f"negatives of weight {config.unlabelled_weight:g}")}
    return BT_BERT_CARD.format(
        base=_base(config.model), concerns=", ".join(values["concerns"]), count=len(values["concerns"]),
        mode=config.mode, products=f"{values['products']['train']:,}", pairs=f"{values['pairs']:,}",
        steps=f"{values['step']:,}", batch=config.sampler.batch_size * config.accumulate,
        early=", stopped early" if values["stopped"] else "", tokens=f"{values['sums'].get('tokens', 0):,.0f}",
        sha=git_sha(), settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        first_loss=_mean(losses[:tenth]), last_loss=_mean(losses[-tenth:]),
        validation=_validation("Products of the validation split", "macro_ap", values, curve) + _ages(values),
        temperature=found["temperature"], thresholds=", ".join(
            f"{name} {found['thresholds'].get(name, 0.5):.2f}" for name in values["concerns"]))


def _ages(values: Mapping[str, Any]) -> str:
    """What became of the concerns that the model knew, beside the new ones; nothing for a bare body."""
    told = {"old": "concerns it knew", "new": "new ones"}
    parts = [f"{told[age]}: {one['before']:.3f} before, {one['after']:.3f} after"
             for age, one in values["old_and_new"].items()]
    return f"\n\nMacro AP of {'; of '.join(parts)}." if parts else ""


ADAPTER_CARD = """---
library_name: recsys_ray
tags: [fashion, image-retrieval, attributes]
---

# Pictures of like attributes close together: an adapter on {base}

A residual head on the network's vectors; {attributes} values. Untrained it changes nothing.

```python
from recsys_ray.models.attribute_adapter import ImageTowerConfig, load_image_tower

tower = load_image_tower(ImageTowerConfig(adapter="path/to/this/folder"))
vectors = tower.encode(pictures)        # or tower.adapt(vectors) of the network alone
```

## Training

{pairs} pairs of {pictures} pictures, {steps} steps of {batch}{early}; code version {sha}.

| setting | value |
| --- | --- |
{settings}

The loss was {first_loss} over the first tenth of the steps and {last_loss} over the last.

## Validation

{validation}

Attributes were read from the products' words, so these are shares of what shops say, not of what can be seen.
"""


def adapter_card(config: FinetuneAttributeAdapterConfig, image: Mapping[str, Any], values: Mapping[str, Any],
                 curve: Sequence[Mapping[str, Any]]) -> str:
    """The card of an adapter's run: `image` is the identity of the tower at the start, `values` progress and counts."""
    losses = [line["loss"] for line in curve if line.get("loss") is not None]
    tenth, optim, loss = max(1, len(losses) // 10), config.optim, config.loss
    weighed = {name: getattr(loss, name) for name in ("image", "text", "fused", "attributes")}
    settings = {
        "network": _tower(config), "head": f"{config.head.kind}, {config.head.start} at the start",
        "temperature, kept": f"{loss.temperature:g}",
        "loss": ", ".join(f"{name} {weight:g}" for name, weight in weighed.items()),
        "attributes that count more": ", ".join(f"{name} {one:g}" for name, one in loss.attribute_weights.items()),
        "boosts": config.sampler.boosts or "none", "caps": config.sampler.caps or "none",
        "learning rate": f"{optim.learning_rate:g}, {optim.schedule}, {optim.warmup:.0%} warm-up",
        "weight decay": optim.weight_decay, "seed": config.seed}
    return ADAPTER_CARD.format(
        base=image["model"], attributes=", ".join(f"{name} {one}" for name, one in values["attributes"].items()),
        pairs=f"{sum(values['pairs'].values()):,}", pictures=f"{values['pictures']['train']:,}",
        steps=f"{values['step']:,}", batch=config.sampler.batch_size * config.accumulate,
        early=", stopped early" if values["stopped"] else "",
        sha=git_sha(), settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        first_loss=_mean(losses[:tenth]), last_loss=_mean(losses[-tenth:]),
        validation=_validation("Pictures of the validation split against each other", "attributes@10", values, curve))


def _tower(config: FinetuneAttributeAdapterConfig) -> str:
    tower = config.tower
    if tower is None:
        return "frozen"
    what = "all weights" if tower.train == "full" else f"LoRA of rank {tower.lora.rank}, merged"
    return f"trained: {what}, learning rate {tower.learning_rate:g}"


def _base(model: str) -> str:
    if model == MINILM:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return Path(model).name if Path(model).is_absolute() else model


def _settings(config: FinetuneBgeConfig) -> str:
    loss, optim = config.contrastive, config.optim
    rows = {
        "loss": "InfoNCE over the batch" if loss.in_batch else "InfoNCE over the query's own negatives",
        "temperature": loss.temperature,
        "hard negatives of a pair": "all" if config.negatives is None else config.negatives,
        "learning rate": f"{optim.learning_rate:g}, {optim.schedule}, {optim.warmup:.0%} warm-up",
        "weight decay": optim.weight_decay, "longest query, product": f"{config.query_tokens}, "
        f"{config.document_tokens} tokens", "seed": config.seed,
        "adapters": "none" if config.body.lora is None else f"LoRA of rank {config.body.lora.rank}, merged"}
    if config.encoder.sparse:
        dense, sparse, multi = config.heads.ensemble
        rows["heads"] = (f"token weights and token vectors, as BGE-M3's; together the score is {dense:g} dense + "
                         f"{sparse:g} sparse + {multi:g} multi-vector")
    if config.guide is not None:
        rows["guide"] = (f"{_base(config.guide.model)} took out documents that it scores above the positive less "
                         f"{loss.guide_margin:g}")
    if loss.distillation is not None:
        rows["teacher's scores"] = f"learned by {loss.distillation.kind}, weight {loss.distillation.weight:g}"
    if loss.matryoshka:
        rows["Matryoshka dimensions"] = ", ".join(map(str, loss.matryoshka))
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _validation(what: str, objective: str, values: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> str:
    rows = [line for line in curve if objective in line]
    if not rows:
        return "There were no validation pairs; these are the last weights."
    names = [name for name in rows[0] if name != "step"]
    shown = rows if len(rows) <= MOST_ROWS else [rows[0], *rows[-(MOST_ROWS - 1):]]
    table = [f"| step | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    table += [f"| {line['step']} | {' | '.join(f'{line[name]:.4f}' for name in names)} |" for line in shown]
    return (f"{what}; these are the weights of step {values['best_step']}, the best by {objective}. "
            "Step 0 is the base model.\n\n" + "\n".join(table))


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4f}" if values else "nothing"
