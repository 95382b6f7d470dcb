"""`search_products` over a hybrid index: by words, by picture, by both, like a product; what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_pictures import WITHOUT, ColourTower, build_small_hybrid, photograph
from small_shop import WordEncoder

from recsys_ray.data.images import ImageError
from recsys_ray.retrieval.filters import Filters
from recsys_ray.retrieval.hybrid_index import open_hybrid
from recsys_ray.retrieval.hybrid_search import HybridSearcher
from recsys_ray.retrieval.hybrid_vectors import HybridError, Weights


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> HybridSearcher:
    index = open_hybrid(build_small_hybrid(tmp_path_factory.mktemp("hybrid")))
    return HybridSearcher(index, WordEncoder(), ColourTower())  # type: ignore[arg-type]


def titles(answer: list[dict[str, object]]) -> list[str]:
    return [str(one["title"]) for one in answer]


def test_the_index_holds_every_product_and_says_what_it_lacks(searcher: HybridSearcher) -> None:
    rows = searcher.index.rows
    assert rows.num_rows == 120
    assert sum(rows["has_image"].to_pylist()) == WITHOUT


def test_a_picture_finds_its_colour_and_words_beside_it_the_thing(searcher: HybridSearcher) -> None:
    assert all("blue" in one for one in titles(searcher.search_products(picture=photograph("blue"), top_k=10)))
    both = titles(searcher.search_products("mirror", 5, picture=photograph("green")))
    assert all("green mirror" in one for one in both[:3])
    filtered = searcher.search_products(picture=photograph("blue"), top_k=5, filters=Filters(category=("seating",)))
    assert {one["category"] for one in filtered} == {"seating"}


def test_words_meet_pictures_by_the_learned_guess_alone(searcher: HybridSearcher, tmp_path: Path) -> None:
    by_guess = searcher.search_products("red", 10, weights=Weights(text=0, image=1))
    assert sum("red" in one for one in titles(by_guess)) >= 8
    plain = HybridSearcher(open_hybrid(build_small_hybrid(tmp_path, learn=False)), WordEncoder(),  # type: ignore[arg-type]
                           ColourTower())  # type: ignore[arg-type]
    assert "red" in titles(plain.search_products("red sofa", 10))[0]        # words meet words all the same
    with pytest.raises(HybridError, match="no text tower"):
        plain.search_products("red", 10, weights=Weights(text=0, image=1))


def test_a_product_finds_those_like_it_and_not_itself(searcher: HybridSearcher) -> None:
    alike = searcher.search_products(like="P001", top_k=4)
    assert [one["rank"] for one in alike] == [1, 2, 3, 4]
    assert "P001" not in {one["product_id"] for one in alike}
    looks = searcher.search(searcher.looks_of("P001"), 6)[0]
    assert looks.product_ids[0] == "P001"
    np.testing.assert_allclose(looks.scores[0], 0.5, atol=1e-5)      # the weight of a picture's likeness, which is 1
    with pytest.raises(HybridError, match="has no picture"):
        searcher.looks_of(f"P{WITHOUT}")


def test_bad_questions_are_refused(searcher: HybridSearcher) -> None:
    with pytest.raises(ImageError, match="does not decode"):
        searcher.search_products(picture=b"no picture")
    with pytest.raises(ValueError, match="nothing is asked"):
        searcher.search_products("  ")
    with pytest.raises(KeyError):
        searcher.search_products(like="P999")
    other = WordEncoder()
    other.identity = {"model": "others", "dimension": 32}
    with pytest.raises(HybridError, match="built with another encoder"):
        HybridSearcher(searcher.index, other)  # type: ignore[arg-type]
