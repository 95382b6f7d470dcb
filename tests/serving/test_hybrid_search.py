"""`search_products` over a hybrid index: by words, by picture, by both, like a product; what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_pictures import SHADES, WITHOUT, ColourTower, build_small_hybrid, photograph
from small_shop import NOUNS, WordEncoder, catalogue

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config
from recsys_ray.data.images import ImageError
from recsys_ray.ids import row_ids
from recsys_ray.retrieval import hybrid_build, hybrid_search
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


class ReadingTower(ColourTower):
    """A network whose texts lie in the pictures' space."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """The colour that a text names."""
        shades = [next((SHADES[one] for one in SHADES if one in text), (128, 128, 128)) for text in texts]
        return self.encode([np.full((2, 2, 3), shade) for shade in shades])


def test_a_text_tower_is_asked_where_the_network_has_one(tmp_path: Path) -> None:
    index = open_hybrid(build_small_hybrid(tmp_path, learn=False, centred=()))
    reading = HybridSearcher(index, WordEncoder(), ReadingTower())  # type: ignore[arg-type]
    by_pictures = titles(reading.search_products("blue", 10, weights=Weights(text=0, image=1)))
    assert all("blue" in one for one in by_pictures)
    alone = HybridSearcher(index, None, ReadingTower())  # type: ignore[arg-type]
    assert "red" in titles(alone.search_products("red", 3))[0]
    with pytest.raises(HybridError, match="no text encoder, and the picture network has no text tower"):
        HybridSearcher(index, None, ColourTower()).search_products("red")  # type: ignore[arg-type]


def write_queries(root: Path) -> tuple[Path, Path]:
    """Colours as queries, judged by the titles."""
    queries = [{"query_id": f"{colour} {number}", "query": f"{colour} {noun}"} for colour in SHADES
               for number, noun in enumerate(NOUNS)]
    judgments = [{"query_id": one["query_id"], "product_id": row["product_id"], "gain": 1.0}
                 for one in queries for row in catalogue() if str(row["title"]).startswith(one["query"])]
    for name, rows in (("queries", queries), ("judgments", judgments)):
        pq.write_table(pa.Table.from_pylist(rows), root / f"{name}.parquet")
    return root / "queries.parquet", root / "judgments.parquet"


def write_purchases(root: Path) -> None:
    """People who buy things of one noun."""
    rows = [{"row_id": int(row_ids([str(row["product_id"])])[0]), "user_id": f"u{number % 6}-{user}"}
            for number, row in enumerate(catalogue()[:90]) for user in range(4)]
    with stage(root, "prepared", "small") as staging:
        staging.commit([staging.write_table("reviews/train/bucket-00000.parquet", pa.Table.from_pylist(rows))],
                       config=Config())


def test_alpha_is_tuned_on_judged_queries_and_kept_and_other_halves_have_their_weights(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hybrid_build, hybrid_search):
        monkeypatch.setattr(module, "build_text_encoder", lambda _: WordEncoder())
    build_small_hybrid(tmp_path)
    queries, judgments = write_queries(tmp_path)
    write_purchases(tmp_path / "prepared")
    config = hybrid_build.BuildHybridConfig.model_validate({
        "index": tmp_path / "index", "images": tmp_path / "pictures", "output": tmp_path / "tuned",
        "weights": {"text": 0.5, "image": 0.2, "category": 0.1, "behaviour": 0.2},
        "behaviour": {"prepared": tmp_path / "prepared", "dimension": 6},
        "tune": {"queries": {"path": str(queries)}, "judgments": {"path": str(judgments)}, "alphas": [0, 0.5, 1]}})
    made = hybrid_build.build_hybrid(config)
    assert hybrid_build.build_hybrid(config).manifest.version == made.manifest.version
    facts = made.manifest.facts
    assert facts["known"] == {"text": 120, "image": WITHOUT, "behaviour": 90}
    curve = dict(facts["tuned"]["curve"])
    assert curve[facts["text_weights"]["text"]] == max(curve.values()) > curve[0.0]    # a picture does not say sofa
    index = open_hybrid(tmp_path / "tuned")
    assert index.text_weights == Weights(text=facts["text_weights"]["text"], image=facts["text_weights"]["image"])
    halves = index.product("P012")
    assert halves is not None
    alike = index.search(index.space.questions(halves, Weights(text=0, image=0, category=0, behaviour=1)), 12)[0]
    assert {int(one[1:]) % 6 for one in alike.product_ids} == {0}

    found = hybrid_search.search_products(hybrid_search.SearchProductsConfig.model_validate({
        "index": tmp_path / "tuned", "queries": {"path": str(queries)}, "output": tmp_path / "found", "top_k": 7}))
    assert isinstance(found, Artifact)
    table = found.table("candidates-00000.parquet")
    assert table.num_rows == 7 * len(SHADES) * len(NOUNS)
    assert max(table["rank"].to_pylist()) == 7
