"""Words of a text with their clause and sentence, and phrases found among them in one pass.

A phrase's word finds itself and its plural; a word that is written as a plural in the phrase ("shorts", "jeans") is
found only as written, so that "short sleeve" is no pair of shorts.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
_TOKEN = re.compile(r"\d+(?:[.,]\d+)?\s?%|[^\W_]+")
_SENTENCE = re.compile(r"[.;!?\n|\u2022]")
_CLAUSE = re.compile(r"[,:()\[\]\u2013\u2014]|\s-\s")


@dataclass(frozen=True)
class Token:
    """A word in lower case, its singular, and the numbers of its clause and sentence."""

    word: str
    singular: str
    clause: int
    sentence: int
    start: int          # in the text
    stop: int


@dataclass(frozen=True)
class Span(Generic[Key]):
    """A phrase found from token `start` up to, not including, `stop`."""

    start: int
    stop: int
    key: Key


def tokens(text: str) -> list[Token]:
    """The words of a text; "60 %" is one."""
    found: list[Token] = []
    clause = sentence = 0
    last = 0
    for match in _TOKEN.finditer(text):
        gap = text[last : match.start()]
        if found and _SENTENCE.search(gap):
            sentence, clause = sentence + 1, clause + 1
        elif found and _CLAUSE.search(gap):
            clause += 1
        word = match.group().casefold()
        found.append(Token(word, singular(word), clause, sentence, match.start(), match.end()))
        last = match.end()
    return found


def words_of(phrase: str) -> tuple[str, ...]:
    """The words of a phrase as they have to be found."""
    return tuple(one.word for one in tokens(phrase))


@lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """An English word without its plural's ending; short words and those in -ss stay."""
    if re.search(r"(?:sh|ch|x|ss)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


@dataclass
class PhraseTable(Generic[Key]):
    """Phrases with keys; one phrase may have several."""

    _by_first: dict[str, list[tuple[tuple[str, ...], Key]]] = field(default_factory=dict)

    def add(self, phrase: str, key: Key) -> None:
        """A further phrase."""
        words = words_of(phrase)
        if words:
            self._by_first.setdefault(words[0], []).append((words, key))

    def find(self, text: Sequence[Token]) -> list[Span[Key]]:
        """Every phrase that is in the text, in the order of the text; none reaches over a clause."""
        found = []
        for at, token in enumerate(text):
            for first in dict.fromkeys((token.word, token.singular)):
                for words, key in self._by_first.get(first, ()):
                    part = text[at : at + len(words)]
                    if len(part) == len(words) and part[-1].clause == token.clause and all(
                            word in (one.word, one.singular) for word, one in zip(words, part, strict=True)):
                        found.append(Span(at, at + len(words), key))
        return found


def longest(spans: Sequence[Span[Key]]) -> list[Span[Key]]:
    """The spans that lie in no longer one."""
    return [one for one in spans if not any(
        other.start <= one.start and one.stop <= other.stop and other.stop - other.start > one.stop - one.start
        for other in spans)]
