"""Keywords of reviews: which phrases, and which of them a product shows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from recsys_ray.data.keywords import MAX_WORDS, PER_REVIEW, review_keywords, top_keywords


def test_phrases_lie_between_empty_words_and_punctuation() -> None:
    text = "I love this soft cotton dress. Perfect for summer weddings, and the deep pockets hold my phone!"
    assert review_keywords(text) == ["soft cotton dress", "summer weddings", "deep pockets hold", "phone"]


def test_a_review_that_says_nothing_has_no_keywords() -> None:
    assert review_keywords("Love it!!! Great product, works very well, I'd highly recommend.") == []
    assert review_keywords(None) == review_keywords("") == review_keywords("...") == []


def test_repetitions_count_once_and_the_number_is_limited() -> None:
    assert review_keywords("Dry skin. dry skin, DRY SKIN") == ["dry skin"]
    many = ". ".join(f"{a}{b}cream" for a in "bcdf" for b in "ghjk")
    assert review_keywords(many) == [f"{a}{b}cream" for a in "bcdf" for b in "ghjk"][:PER_REVIEW]


def test_other_alphabets_have_keywords_too() -> None:
    assert review_keywords("crème brûlée; чёрная кружка") == ["crème brûlée", "чёрная кружка"]


def test_the_most_shared_phrases_come_first() -> None:
    reviews = [["gift", "dry skin"], ["dry skin", "dry skin"], ["winter"], ["gift"], ["very long phrase"]]
    # dry skin and gift: two reviews each (a repetition inside one review counts once), the longer first
    assert top_keywords(reviews, 3) == ["dry skin", "gift", "very long phrase"]
    assert top_keywords(reviews, 0) == top_keywords([], 5) == []


@given(st.text(max_size=200))
def test_phrases_are_short_different_and_words_of_the_text(text: str) -> None:
    found = review_keywords(text)
    assert len(found) == len(set(found)) <= PER_REVIEW
    assert all(1 <= len(phrase.split(" ")) <= MAX_WORDS for phrase in found)
    lowered = text.lower().replace("\u2019", "'")
    assert all(word in lowered for phrase in found for word in phrase.split(" "))
