"""Keywords of reviews without a language model: who, when and why a product is useful, in the shopper's words.

Phrases of up to three words between stop words and punctuation (Rose et al., "Automatic Keyword
Extraction from Individual Documents", 2010), without the words that every review says. A review's
keywords depend on that review alone, so leaving one review out of a product's text is exact.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

MAX_WORDS = 3
MIN_CHARS = 3
PER_REVIEW = 12
_WORD = re.compile(r"[a-z][a-z'-]*[a-z]|[.,;:!?()\n]")
_ANY_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|['-])*[^\W\d_]|[.,;:!?()\n]")     # slower: any alphabet

# What reviews say about anything; with the stop words these end a phrase.
_EMPTY_WORDS = frozenset("""
love loved loves like liked likes great good nice best better amazing awesome excellent perfect perfectly wonderful
fantastic bad worst terrible horrible awful okay ok fine happy pleased satisfied disappointed disappointing recommend
recommended highly product products item items thing things stuff buy bought buying purchase purchased purchasing order
ordered ordering arrived arrive came come get got gets getting use used uses using try tried trying work works worked
working really very much many lot lots bit little definitely absolutely totally actually pretty super quite so far
money price worth value quality star stars review reviews seller shipping shipped package packaging amazon time times
day days week weeks month months year years one two three first second last again also still even ever never always
would could should might may will can cant dont didnt doesnt isnt wasnt wont couldnt say said think thought know knew
make makes made making want wanted need needed give gave feel feels felt look looks looked looking see saw seem seems
way well back put keep kept going went go did does doing done just finally especially maybe
""".split())  # noqa: SIM905 - a list of two hundred quoted words is no easier to read


@cache
def _breaks() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS) | _EMPTY_WORDS


def review_keywords(text: str | None, limit: int = PER_REVIEW) -> list[str]:
    """At most `limit` different phrases of one review, in reading order."""
    phrases: dict[str, None] = {}
    phrase: list[str] = []
    breaks = _breaks()
    lowered = (text or "").lower().replace("\u2019", "'")
    for word in [*(_WORD if lowered.isascii() else _ANY_WORD).findall(lowered), "."]:
        meant = len(word) > 1 and word not in breaks and not ("'" in word and _is_empty_contraction(word, breaks))
        if meant and len(phrase) < MAX_WORDS:
            phrase.append(word)
            continue
        if phrase and sum(map(len, phrase)) >= MIN_CHARS:
            phrases.setdefault(" ".join(phrase))
            if len(phrases) >= limit:
                break
        phrase = [word] if meant else []
    return list(phrases)[:limit]


def keyword_query(keywords: Sequence[str], limit: int = PER_REVIEW) -> str:
    """The first keywords of a review as a shopper would type them: the query of training and of evaluation."""
    return " ".join(keywords[:limit])


def content_words(text: str) -> set[str]:
    """The different words of a text that are neither stop words nor said of anything."""
    breaks = _breaks()
    return {word for word in _ANY_WORD.findall(text.lower()) if len(word) > 1 and word not in breaks}


def _is_empty_contraction(word: str, breaks: frozenset[str]) -> bool:
    """Whether "don't" or "I'd" is one of the words that say nothing, or begins with one."""
    return word.replace("'", "") in breaks or word.partition("'")[0] in breaks


def top_keywords(reviews: Sequence[Sequence[str]], limit: int) -> list[str]:
    """The `limit` phrases that most of a product's reviews share, equal counts by length (longer first), then name."""
    counts = Counter(phrase for review in reviews for phrase in set(review))
    ranked = sorted(counts, key=lambda phrase: (-counts[phrase], -phrase.count(" "), phrase))
    return ranked[:limit]
