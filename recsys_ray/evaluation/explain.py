"""Which ingredients made a concern model say yes, by its attention and by leaving them out, and how right that is.

Three ways give each ingredient of a list a weight: what the query's tokens attend to in the layer before the last
(`ranked_attention`), how much the logit falls when the ingredient is left out (`occlusion`), and chance
(`chance_weights`, the control). `attended_tokens` is the published method, which gives an unordered set of
sub-words ("Beauty Beyond Words", arXiv 2409.13628, algorithm 2). Weights are scored against ingredients that are
known to act: `precision`, and the areas under the curves of deletion and insertion (Petsiuk et al., RISE, arXiv
1806.07421).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.models.bt_bert import Concern
from recsys_ray.models.bt_bert_input import BtBertTokenizer, PairInput, fronts_of
from recsys_ray.models.bt_bert_scorer import BtBertScorer
from recsys_ray.models.fronts import hub_inputs

Floats = npt.NDArray[np.floating[Any]]
SEPARATOR = ", "
LEFT_OUT = frozenset({"(", ")", ","})       # besides the special tokens: the published list


@dataclass(frozen=True)
class Listed:
    """A product as it is explained: its ingredients one by one, and its title."""

    ingredients: tuple[str, ...]
    title: str

    def text(self, kept: Collection[int] | None = None) -> str:
        """The list as the model reads it, whole or with the ingredients at some places only."""
        return SEPARATOR.join(one for place, one in enumerate(self.ingredients) if kept is None or place in kept)


class AttentionReader:
    """The attentions of a model's layers, by the model hub's own code."""

    def __init__(self, folder: Path, tokenizer: BtBertTokenizer) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._body = AutoModel.from_pretrained(str(folder), attn_implementation="eager", local_files_only=True).eval()
        self._words = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.tokenizer = tokenizer

    def attention(self, ids: npt.NDArray[np.int32]) -> Floats:
        """The attention of the layer before the last, after the softmax, (heads, rows, columns)."""
        import torch

        settings = self._body.config
        first_place = 0 if settings.model_type == "bert" else int(settings.pad_token_id) + 1
        told = hub_inputs(fronts_of(self.tokenizer.style, 1), len(ids), first_place)
        with torch.inference_mode():
            found = self._body(input_ids=torch.from_numpy(ids.astype(np.int64))[None], output_attentions=True, **told)
        layer: Floats = found.attentions[-2][0].float().numpy()
        return layer

    def tokens(self, ids: npt.NDArray[np.int32]) -> list[str]:
        """The tokens as the vocabulary writes them."""
        return [str(one) for one in self._words.convert_ids_to_tokens(ids.tolist())]

    @property
    def special(self) -> frozenset[str]:
        """The vocabulary's special tokens."""
        return frozenset(self._words.all_special_tokens)

    def pair(self, concern: Concern, listed: Listed) -> tuple[PairInput, npt.NDArray[np.int32]]:
        """(the input of a concern and a product, the ingredient of each of its tokens of ingredients, -1 between)."""
        explicit = self.tokenizer.style == "explicit"
        product = self.tokenizer.products([listed.text()], [listed.title])[0]
        pair = self.tokenizer.pair(None if explicit else self.tokenizer.query(concern.query), product)
        kept = pair.ingredients.stop - pair.ingredients.start
        return pair, _owners(product.spans[:kept], listed)


def _owners(spans: npt.NDArray[np.int32], listed: Listed) -> npt.NDArray[np.int32]:
    lengths = np.array([len(one) for one in listed.ingredients])
    starts = np.cumsum(lengths + len(SEPARATOR)) - lengths - len(SEPARATOR)
    owner = np.searchsorted(starts, spans[:, 0], side="right") - 1
    inside = spans[:, 0] < starts[owner] + lengths[owner] if len(spans) else np.zeros(0, bool)
    found: npt.NDArray[np.int32] = np.where(inside, owner, -1).astype(np.int32)
    return found


def attended_tokens(attention_HLL: Floats, tokens: Sequence[str], special: Collection[str], k: int) -> list[str]:
    """The published explanation: the tokens that are among the k most attended of any row of any head, in order."""
    rows = attention_HLL.reshape(-1, attention_HLL.shape[-1])
    k = min(k, rows.shape[1])
    columns = np.unique(np.argpartition(-rows, k - 1, axis=1)[:, :k])
    return [tokens[column] for column in columns.tolist()
            if tokens[column] not in special and tokens[column] not in LEFT_OUT]


def ranked_attention(attention_HLL: Floats, pair: PairInput, owners: npt.NDArray[np.int32], count: int) -> Floats:
    """What the query's tokens give each of `count` ingredients, all heads and sub-words together, (I,).

    An explicit model has no query; its row is that of [CLS].
    """
    rows = attention_HLL[:, pair.query if pair.query.stop > pair.query.start else slice(0, 1)]
    given_T = rows[:, :, pair.ingredients].sum(axis=(0, 1))
    weights = np.zeros(count)
    np.add.at(weights, owners[owners >= 0], given_T[owners >= 0])
    return weights


def occlusion(scorer: BtBertScorer, concern: Concern, listed: Listed) -> Floats:
    """How much the logit falls when an ingredient is left out, (I,)."""
    places = range(len(listed.ingredients))
    texts = [listed.text(), *(listed.text(set(places) - {one}) for one in places)]
    logits = scorer.logits(texts, [listed.title] * len(texts), (concern,))[:, 0]
    fallen: Floats = logits[0] - logits[1:]
    return fallen


def chance_weights(listed: Listed, seed: int) -> Floats:
    """Weights drawn by chance, (I,): what any explanation has to beat."""
    return np.random.default_rng([seed, len(listed.ingredients)]).random(len(listed.ingredients))


# --- how right they are ---------------------------------------------------------------------------
def order_of(weights: Floats) -> npt.NDArray[np.int64]:
    """The places from the largest weight down, equal ones as listed."""
    found: npt.NDArray[np.int64] = np.argsort(-weights, kind="stable").astype(np.int64)
    return found


def precision(weights: Floats, acting: Collection[int], k: int = 3) -> float:
    """The share of acting ones among the first min(k, how many act); NaN when none acts.

    With the usual division by k a product with one active ingredient could not reach more than 1 / k.
    """
    first = min(k, len(acting))
    if not first:
        return float("nan")
    return float(np.mean([place in acting for place in order_of(weights)[:first].tolist()]))


def deletion_insertion(scorer: BtBertScorer, concern: Concern, listed: Listed, weights: Floats) -> tuple[float, float]:
    """Areas under the probability while ingredients are taken away, and put in, from the most important down.

    Both from 0 to 1 over the share of ingredients moved; a good explanation has a small first and a large second.
    """
    order = order_of(weights).tolist()
    texts = [listed.text(set(order[moved:])) for moved in range(len(order) + 1)]
    texts += [listed.text(set(order[:moved])) for moved in range(len(order) + 1)]
    found = scorer.score(texts, [listed.title] * len(texts), (concern,))[:, 0].astype(np.float64)
    half = len(order) + 1
    if half == 1:
        return float(found[0]), float(found[0])
    step = 1 / (half - 1)
    return float(np.trapezoid(found[:half], dx=step)), float(np.trapezoid(found[half:], dx=step))
