"""Which concerns a query names: "cream for fine lines" asks for wrinkles."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache

from recsys_ray.data.concern_rulebook import load_rules
from recsys_ray.ranking.text_match import words

Phrase = tuple[str, ...]


@lru_cache(maxsize=1)
def packaged_phrases() -> Mapping[Phrase, str]:
    """The words of the packaged rule tables for each concern, stemmed; shared words are the first one's."""
    found: dict[Phrase, str] = {}
    for name, said in load_rules().concerns.items():
        for text in (said.query, *said.paraphrases):
            found.setdefault(words(text).listed, name)
    return found


def named_concerns(query: str, known: Collection[str]) -> frozenset[str]:
    """Those of the `known` concerns that the query names: by their name, their word or a paraphrase.

    A phrase inside a longer one of another concern is not meant ("spots" in "age spots").
    """
    phrases = {**{words(one.replace("_", " ")).listed: one for one in known}, **packaged_phrases()}
    listed = words(query.replace("_", " ")).listed
    spans = [(start, start + size, phrases[listed[start : start + size]])
             for size in {*map(len, phrases)} - {0} for start in range(len(listed) - size + 1)
             if listed[start : start + size] in phrases]
    meant = {name for start, stop, name in spans
             if not any(low <= start and stop <= high and high - low > stop - start for low, high, _ in spans)}
    return frozenset(meant & set(known))
