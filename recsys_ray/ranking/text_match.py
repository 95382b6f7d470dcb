"""How the words of a query meet the words of a field, for all candidates of one query: (C,) arrays.

Words are lower-cased runs of letters and digits, stemmed, without stop words. A share whose denominator is
empty (a field that is not there, a query of stop words) is NaN: unknown, not bad.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import fsum  # exact, so the order in which a set gives its words does not matter
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys_ray.retrieval.lexical import LexicalConfig

Floats = npt.NDArray[np.float32]
REMEMBERED_TEXTS = 1 << 16      # products come up again and again
BM25 = LexicalConfig()          # its constants
_WORD = re.compile(r"\w+")
_LIMIT = re.compile(r"(?:under|below|(?:less|cheaper) than|up to|at most)\s*(?:[$€£]|usd|eur)?\s*(\d{1,6}(?:\.\d\d?)?)",
                    re.IGNORECASE)
_local = threading.local()      # a stemmer must not be used by two threads


@dataclass(frozen=True)
class Words:
    """The words of one text in reading order, which ones there are, and how often each."""

    listed: tuple[str, ...]
    known: frozenset[str]
    counts: Mapping[str, int]


@lru_cache(maxsize=REMEMBERED_TEXTS)
def words(text: str) -> Words:
    """The words of a text."""
    from bm25s.stopwords import STOPWORDS_EN

    found = [one for one in _WORD.findall(text.lower()) if one not in STOPWORDS_EN]
    listed = tuple(_stemmer().stemWords(found))
    return Words(listed, frozenset(listed), Counter(listed))


def _stemmer() -> Any:
    if not hasattr(_local, "stemmer"):
        import Stemmer

        _local.stemmer = Stemmer.Stemmer("english")
    return _local.stemmer


def price_limit(query: str) -> float:
    """The most that a query wants to pay ("a lamp under $40" -> 40), NaN when it says nothing of it."""
    found = _LIMIT.search(query)
    return float(found[1]) if found else float("nan")


class QueryWords:
    """The different words of a query and where the C candidates have them; fields by name, and `any` of them."""

    def __init__(self, query: str, fields: Mapping[str, Sequence[Words]]) -> None:
        self.listed = tuple(dict.fromkeys(words(query).listed))
        known = frozenset(self.listed)
        self._fields = fields
        self._hits = {name: [known & one.known for one in field] for name, field in fields.items()}
        self._hits["any"] = [frozenset[str]().union(*parts) for parts in zip(*self._hits.values(), strict=True)]
        count, seen = len(self._hits["any"]), Counter(word for one in self._hits["any"] for word in one)
        self._rarity = {word: float(np.log(1 + (count - seen[word] + 0.5) / (seen[word] + 0.5)))
                        for word in self.listed}      # inverse document frequency among the candidates
        self._next = dict(zip(self.listed, self.listed[1:], strict=False))

    @property
    def rarity(self) -> float:
        """How rare the words are among the candidates, all together."""
        return fsum(self._rarity.values())

    def coverage(self, name: str) -> Floats:
        """Share of the query's words that the field has."""
        return _shares([len(one) for one in self._hits[name]], len(self.listed))

    def rare_coverage(self, name: str) -> Floats:
        """The same, a word weighing what its rarity is."""
        return _shares([fsum(self._rarity[word] for word in one) for one in self._hits[name]], self.rarity)

    def bm25(self, name: str) -> Floats:
        """BM25 of the query in the field, its frequencies and lengths taken from the candidates.

        Lucene's form (Kamphuis et al., ECIR 2020). A word's rarity is that of all fields together, as in BM25F:
        in which field a word is rare tells little of what it is worth.
        """
        lengths = np.array([len(one.listed) for one in self._fields[name]], dtype=np.float64)
        there = lengths > 0
        mean = lengths[there].mean() if there.any() else 1.0
        damping = BM25.k1 * (1 - BM25.b + BM25.b * lengths / mean)
        found = [fsum(self._rarity[word] * one.counts[word] / (one.counts[word] + damped) for word in hit)
                 for one, hit, damped in zip(self._fields[name], self._hits[name], damping, strict=True)]
        return np.where(there, found, np.nan).astype(np.float32)

    def said(self, name: str) -> Floats:
        """Share of the field's different words that the query has."""
        return _shares([len(one) for one in self._hits[name]], [len(one.known) for one in self._fields[name]])

    def order(self, name: str) -> Floats:
        """Share of the query's neighbouring words that are neighbours in the field, in the same order."""
        return _shares([self._pairs(one) if len(hit) > 1 else 0
                        for one, hit in zip(self._fields[name], self._hits[name], strict=True)], len(self.listed) - 1)

    def _pairs(self, one: Words) -> int:
        following = self._next
        return len({word for word, after in zip(one.listed, one.listed[1:], strict=False)
                    if following.get(word) == after})

    def first(self, name: str) -> Floats:
        """How far into the field the first of the query's words stands: 0 at its begin, 1 when it has none."""
        return _shares([next(place for place, word in enumerate(one.listed) if word in hit) if hit else len(one.listed)
                        for one, hit in zip(self._fields[name], self._hits[name], strict=True)],
                       [len(one.listed) for one in self._fields[name]])

    def numbers(self) -> Floats:
        """Share of the query's words with a digit (sizes, models) that some field has."""
        wanted = frozenset(word for word in self.listed if any(letter.isdigit() for letter in word))
        return _shares([len(wanted & one) for one in self._hits["any"]], len(wanted))


def named(said: Floats) -> tuple[Floats, Floats]:
    """(whether the query says the whole value of a field, whether it says another candidate's and not this one's).

    `said` is `QueryWords.said` of the field. Both are NaN where the field is not there.
    """
    whole = said == 1.0
    conflict = whole.any() & ~whole
    return (np.where(np.isnan(said), np.nan, whole).astype(np.float32),
            np.where(np.isnan(said), np.nan, conflict).astype(np.float32))


def _shares(parts: Sequence[float], wholes: Sequence[float] | float) -> Floats:
    part, whole = np.array(parts, dtype=np.float64), np.broadcast_to(np.asarray(wholes, dtype=np.float64), len(parts))
    found: Floats = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0).astype(np.float32)
    return found
