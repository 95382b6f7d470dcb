"""What a concern model must beat: the majority, fuzzy search, the rules, ingredients without their order.

Every baseline gives `ConcernScores` of the same products. Thresholds of those that score are set on validation, as the
model's are. `planted_oracle` is for benchmarks alone: it reads what the demo shop has planted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_ray.data.concerns import Labeller
from recsys_ray.data.ingredients import Synonyms, parse_ingredients
from recsys_ray.evaluation.concerns import ConcernScores, ConcernSheet, Floats

STRENGTHS = (0.1, 1.0, 10.0)    # inverse regularisation of the logistic regression, chosen on validation


@dataclass(frozen=True)
class Part:
    """The products of one split (CONCERN_PRODUCT) and what is right for them, in the same order."""

    products: pa.Table
    sheet: ConcernSheet


def majority(train: Part, asked: pa.Table) -> ConcernScores:
    """The prevalence in training for every product: no information, and "no" to all below one half."""
    share = [float(np.nanmean(column)) if np.isfinite(column).any() else 0.0 for column in train.sheet.target.T]
    return ConcernScores(np.tile(np.array(share), (asked.num_rows, 1)), np.full(len(share), 0.5))


def fuzzy_search(words: Mapping[str, Sequence[str]], valid: Part, asked: pa.Table) -> ConcernScores:
    """How well the best-fitting word for the concern occurs in title and ingredients (partial ratio of RapidFuzz).

    `words`: concern -> its query and paraphrases. A straw man, as in Table 1 of arXiv 2409.13628: shown, not feared.
    """
    found = _fuzzy(words, asked)
    return ConcernScores(found, _thresholds(valid.sheet, _fuzzy(words, valid.products)))


def _fuzzy(words: Mapping[str, Sequence[str]], products: pa.Table) -> Floats:
    from rapidfuzz import fuzz, process

    texts = [f"{row['title']} {row['ingredients'] or ''}".lower() for row in products.to_pylist()]
    columns = [process.cdist([one.lower() for one in spellings], texts, scorer=fuzz.partial_ratio).max(axis=0)
               if texts else np.zeros(0) for spellings in words.values()]
    return np.stack(columns, axis=1).astype(np.float64) / 100


def rules(labeller: Labeller, asked: pa.Table, withheld: Collection[str] = ()) -> ConcernScores:
    """The rules as a score: those for a concern among all that spoke and one more; a yes when none is against.

    One rule for and none against: 0.5; two: 0.67; none: 0. `withheld` rules do not speak.
    """
    rows = []
    for product in asked.to_pylist():
        found = [verdict.without(withheld) for verdict in labeller.read(product).values()]
        rows.append([len(one.speaks_for) / (len(one.rules) + 1) for one in found])
    width = len(labeller.rulebook.concerns)
    return ConcernScores(np.array(rows, dtype=np.float64).reshape(len(rows), width), np.full(width, 0.5))


def bag_of_ingredients(train: Part, valid: Part, asked: pa.Table, synonyms: Synonyms, seed: int = 7) -> ConcernScores:
    """Logistic regression on which ingredients a list has, without their order; one model a concern.

    The regularisation with the least log loss on validation is taken. A concern of which training has one class only
    gets the share of positives there.
    """
    names = _vocabulary(train.products, synonyms)
    seen, checked, wanted = (_presence(table, names, synonyms) for table in (train.products, valid.products, asked))
    columns, on_valid = [], []
    for place in range(len(train.sheet.concerns)):
        counted, label = train.sheet.column(place)
        if not 0 < label.sum() < len(label):
            share = float(label.mean()) if len(label) else 0.0
            columns.append(np.full(asked.num_rows, share))
            on_valid.append(np.full(valid.products.num_rows, share))
            continue
        model = _fitted(seen[counted], label, checked, valid.sheet, place, seed)
        columns.append(model.predict_proba(wanted)[:, 1])
        on_valid.append(model.predict_proba(checked)[:, 1])
    return ConcernScores(np.stack(columns, axis=1), _thresholds(valid.sheet, np.stack(on_valid, axis=1)))


def _fitted(features: Any, label: Any, checked: Any, valid: ConcernSheet, place: int, seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    models = [LogisticRegression(C=strength, max_iter=500, random_state=seed).fit(features, label)
              for strength in STRENGTHS]
    counted, right = valid.column(place)
    if not len(right):
        return models[1]
    losses = [log_loss(right, model.predict_proba(checked[counted])[:, 1], labels=[0, 1]) for model in models]
    return models[int(np.argmin(losses))]


def _vocabulary(products: pa.Table, synonyms: Synonyms) -> dict[str, int]:
    """The place of each ingredient that at least two training products have."""
    counts: dict[str, int] = {}
    for listed in products["ingredients"].to_pylist():
        for one in parse_ingredients(listed or "", synonyms):
            counts[one.name] = counts.get(one.name, 0) + 1
    return {name: place for place, name in enumerate(sorted(name for name, count in counts.items() if count > 1))}


def _presence(products: pa.Table, names: Mapping[str, int], synonyms: Synonyms) -> Any:
    from scipy.sparse import csr_array

    rows: list[int] = []
    places: list[int] = []
    for number, listed in enumerate(products["ingredients"].to_pylist()):
        found = [names[one.name] for one in parse_ingredients(listed or "", synonyms) if one.name in names]
        rows += [number] * len(found)
        places += found
    return csr_array((np.ones(len(rows)), (rows, places)), shape=(products.num_rows, max(1, len(names))))


def _thresholds(valid: ConcernSheet, probability: Floats) -> Floats:
    """The threshold of best F1 on validation of each concern; one half where that has one class only."""
    from recsys_ray.training.calibration import best_threshold

    found = []
    for place in range(len(valid.concerns)):
        counted, label = valid.column(place)
        both = 0 < label.sum() < len(label)
        found.append(best_threshold(probability[counted, place], label.astype(np.float64)) if both else 0.5)
    return np.array(found)


def planted_oracle(truth: pa.Table, product_ids: Iterable[str], concerns: Sequence[str]) -> ConcernScores:
    """What who knows the demo shop's planted strengths would say: s / (s + 1/2), one half where a product just helps.

    `truth` is the shop's truth/concerns.parquet; errors: `ValueError` for a product that it does not have.
    """
    columns = [truth[name].to_pylist() for name in ("product_id", "concern", "strength")]
    strength = {(product, concern): value for product, concern, value in zip(*columns, strict=True)}
    try:
        planted = np.array([[strength[one, concern] for concern in concerns] for one in product_ids], dtype=np.float64)
    except KeyError as error:
        raise ValueError(f"the truth has no strength of {error.args[0]}: is it of the same shop?") from None
    planted = planted.reshape(-1, len(concerns))
    return ConcernScores(planted / (planted + 0.5), np.full(len(concerns), 0.5))
