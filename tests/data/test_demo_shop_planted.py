"""What is planted can be learned, and in the null shop nothing can: tastes, concerns, words, images, queries."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from recsys_ray.data.demo_shop import DemoShopConfig, make_demo_shop
from recsys_ray.data.demo_shop.catalogue import build_catalogue, recipes
from recsys_ray.data.demo_shop.formulas import effects
from recsys_ray.data.demo_shop.images import draw
from recsys_ray.data.demo_shop.people import affinities, open_market, purchases, tastes
from recsys_ray.data.demo_shop.products import products
from recsys_ray.data.demo_shop.queries import Wish, grade, graded_queries
from recsys_ray.data.demo_shop.reviews import generic_review, told_review
from recsys_ray.data.demo_shop.streams import bits, dice, permuted, shop_ids, uniforms, user_ids
from recsys_ray.data.demo_shop.vocabulary import MAX_FACETS, departments, formulary, palette
from recsys_ray.data.sources import AmazonReviewsSource, SourceError
from recsys_ray.data.sources.files import find_files

PACKAGE = Path(__file__).resolve().parents[2] / "recsys_ray"
MAY_SPEAK_OF_TRUTH = ("data/demo_shop/", "data/sources/", "evaluation/")


def config(**changes: object) -> DemoShopConfig:
    sizes = {"output": "unused", "products": 2000, "reviews": 6000, "queries": 40}
    return DemoShopConfig.model_validate({**sizes, **changes})


# --- random numbers by address ---------------------------------------------------------------------
def test_a_row_gets_its_numbers_whatever_else_is_drawn() -> None:
    whole = bits(7, "some", np.arange(100), 5)
    assert np.array_equal(whole[40:60], bits(7, "some", np.arange(40, 60), 5))
    assert not np.array_equal(whole, bits(8, "some", np.arange(100), 5))
    assert not np.array_equal(whole, bits(7, "other", np.arange(100), 5))


def test_uniform_numbers_are_uniform_in_every_column() -> None:
    drawn = uniforms(7, "some", np.arange(20_000), 3)
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.03


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 4097])
def test_a_permutation_meets_every_number_once(size: int) -> None:
    assert sorted(permuted(7, "order", np.arange(size), size).tolist()) == list(range(size))


def test_ids_never_meet_and_look_random() -> None:
    ids = shop_ids(7, np.concatenate([np.arange(50_000), (1 << 40) + np.arange(50_000)]))
    assert len(set(ids)) == 100_000
    assert all(len(one) == 10 and one.startswith("B0") for one in ids[:100])
    assert len(set(user_ids(7, np.arange(10_000)))) == 10_000


# --- tastes ----------------------------------------------------------------------------------------
def mean_edge(mode: str) -> float:
    """How much better bought products fit their buyers than other buyers' products, in standard deviations."""
    shop = config(mode=mode)
    market = open_market(build_catalogue(shop), shop)
    bought = purchases(market, shop, np.arange(shop.reviews))
    who = tastes(market.catalogue, bought.user)
    others = np.roll(bought.product, 1)
    fit = affinities(market.catalogue, who, np.stack([bought.product, others], axis=1))
    return float((fit[:, 0] - fit[:, 1]).mean() / fit.std())


def test_people_buy_what_they_like_and_in_the_null_shop_anything() -> None:
    assert mean_edge("planted") > 0.5
    assert abs(mean_edge("null")) < 0.05


def test_the_null_shop_talks_of_other_products_and_favours_none() -> None:
    shop = config(mode="null")
    market = open_market(build_catalogue(shop), shop)
    bought = purchases(market, shop, np.arange(shop.reviews))
    assert (bought.about == bought.product).mean() < 0.01
    assert np.bincount(bought.product).max() < 20
    early, late = bought.product[bought.when < 0.5], bought.product[bought.when >= 0.5]
    assert abs(early.mean() - late.mean()) < 40


# --- concerns --------------------------------------------------------------------------------------
def test_an_antagonist_or_a_late_place_spoils_an_active() -> None:
    concern = next(one for one in formulary().concerns if one.key == "acne")
    rest = [f"Filler {number}" for number in range(9)]
    active, antagonist = concern.actives[0], sorted(concern.antagonists)[0]

    def strength(listed: list[str]) -> float:
        return effects(listed, [concern])[0].strength

    assert strength([rest[0], active, *rest[1:]]) == 1.0
    assert strength([*rest, active]) == pytest.approx(0.2)
    assert strength([antagonist, active, *rest]) == pytest.approx(0.2)
    assert strength([active, *rest, antagonist]) == 1.0     # in traces it does no harm
    assert strength(rest) == 0.0
    assert not effects([*rest, active], [concern])[0].helps


def test_many_claims_are_true_and_many_are_not() -> None:
    shop = config()
    catalogue = build_catalogue(shop)
    beauty = np.flatnonzero((catalogue.department == 0) & (catalogue.content == np.arange(len(catalogue))))
    claimed, helped = (np.bitwise_count(mask[beauty]) for mask in (catalogue.claims, catalogue.helps))
    kept = np.bitwise_count(catalogue.claims[beauty] & catalogue.helps[beauty]).sum() / claimed.sum()
    assert 0.4 < kept < 0.8
    assert helped.sum() > 0
    made = recipes(shop.seed, beauty[:50], catalogue.kind, catalogue.facets, catalogue.claims)
    assert all(len(set(one)) == len(one) >= 10 for one in made)


def test_labels_are_wrong_as_often_as_the_preset_says(tmp_path: Path) -> None:
    shop = make_demo_shop(config(output=tmp_path / "shop", change={"label_noise": 0.1}))
    rows = pq.read_table(shop / "truth/concerns.parquet").to_pylist()
    assert np.mean([row["helps"] != row["label"] for row in rows]) == pytest.approx(0.1, abs=0.02)


# --- words -----------------------------------------------------------------------------------------
def test_tables_are_complete() -> None:
    assert [one.key for one in departments()] == ["beauty", "fashion", "furniture", "books"]
    assert sum(one.share for one in departments()) == pytest.approx(1)
    for department in departments():
        assert len(department.facets) <= MAX_FACETS
        slots = {segment[segment.index("{") + 1:segment.index("}")] for segment in department.title}
        assert slots <= {"brand", "line", "type", "concern", *(facet.key for facet in department.facets)}
        for facet in department.facets:
            assert all("{w}" in saying for saying in facet.sayings)
            if facet.key == "colour":
                assert set(facet.values) <= set(palette())


def test_shoppers_use_other_words_than_the_catalogue() -> None:
    clear = config(change={"catalogue_words": 0.0, "say_type": 1.0, "typo": 0.0}).clarity
    catalogue = build_catalogue(config())
    sofas = [one for one in products(catalogue, np.arange(2000)) if one.kind.key == "sofa"]
    texts = " ".join(told_review(sofas[0], (), 5, clear, one).text.lower() for one in dice(7, "some", np.arange(200)))
    assert texts.count("couch") > 50
    assert "settee" not in texts


def test_generic_reviews_name_nothing() -> None:
    rolls = dice(7, "some", np.arange(300))
    told = [generic_review(rating, one) for rating, one in zip([1, 3, 5] * 100, rolls, strict=True)]
    words = {word.lower() for department in departments() for kind in department.kinds for word in kind.words.catalogue}
    assert not [one.text for one in told if any(word in one.text.lower() for word in words)]
    assert all(one.generic and not one.facets for one in told)
    assert len({one.text for one in told}) > 150


def test_an_answerable_review_speaks_of_its_product() -> None:
    clear = config(change={"wrong_facet": 0.0}).clarity
    many = products(build_catalogue(config()), np.arange(300))
    rolls = dice(7, "some", np.arange(300))
    told = [told_review(product, (), 5, clear, one) for product, one in zip(many, rolls, strict=True)]
    assert all(one.says_kind or one.facets or one.concern for one in told)
    assert np.mean([len(one.facets) for one in told]) == pytest.approx(clear.say_facets, abs=0.3)
    assert len({one.text for one in told}) > 290


# --- images ----------------------------------------------------------------------------------------
def test_an_image_shows_colour_pattern_neckline_sleeve_and_material() -> None:
    catalogue = build_catalogue(config())
    fashion = departments()[1]
    shirt = next(one for one in products(catalogue, np.arange(2000)) if one.kind.key == "t_shirt")

    def picture(**values: str) -> np.ndarray:
        base = {"colour": "red", "pattern": "solid", "neckline": "crew", "sleeve": "long", "material": "polyester",
                **values}
        numbers = tuple(facet.values.index(base[facet.key]) if facet.key in base else 0 for facet in fashion.facets)
        product = type(shirt)(**{**shirt.__dict__, "values": numbers})
        return draw(product, 64, 0.0, np.full(4, 0.5), 7).astype(float)

    plain = picture()
    middle = plain[34:40, 28:36].mean(axis=(0, 1))
    assert middle[0] > middle[1] + 80                                           # red
    for change in ({"colour": "navy"}, {"pattern": "stripe"}, {"material": "velvet"}):
        assert np.abs(picture(**change) - plain)[30:44, 24:40].mean() > 5, change   # seen on the body
    assert np.abs(picture(neckline="v_neck") - plain)[8:24, 24:40].max() > 100      # seen at the neck
    assert np.abs(picture(sleeve="sleeveless") - plain)[12:46, 4:18].max() > 100    # seen at the side


# --- queries ---------------------------------------------------------------------------------------
def test_grades_follow_from_the_truth() -> None:
    shop = config()
    catalogue = build_catalogue(shop)
    place = int(np.flatnonzero((catalogue.department == 1) & (catalogue.facets[:, :2] >= 0).all(axis=1))[0])
    wish = Wish(1, int(catalogue.kind[place]), tuple((at, int(catalogue.facets[place, at])) for at in (0, 1)), ())
    numbers, grades = grade(catalogue, wish, 0, shop.seed)
    assert grades[numbers == place].tolist() == [3]
    kinds = departments()[1].kinds
    for number, given in zip(numbers.tolist(), grades.tolist(), strict=True):
        same = catalogue.kind[number] == wish.kind
        misses = sum(catalogue.facets[number, at] != value for at, value in wish.values)
        akin = kinds[catalogue.kind[number]].group == kinds[wish.kind].group
        expected = 3 if same and not misses else 2 if same and misses == 1 else 1 if akin and not misses else 0
        assert given == expected
    assert len(set(numbers.tolist())) == len(numbers)


def test_every_query_has_an_exact_answer_and_is_not_the_title() -> None:
    shop = config()
    asked = list(graded_queries(build_catalogue(shop), shop))
    assert len(asked) == shop.queries
    assert all((query.grades == 3).any() for query in asked)
    slices = {name for query in asked for name in query.slices}
    assert slices >= {"beauty", "fashion", "other words", "needs", "concern"}
    assert len({query.text for query in asked}) > 30


# --- the truth stays apart -------------------------------------------------------------------------
def test_only_the_generator_and_evaluation_speak_of_truth() -> None:
    """Training, retrieval and serving have no name for the folder; sources know it only to refuse it."""
    speakers = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        words: set[object] = set()
        for node in ast.walk(tree):
            words |= {getattr(node, field, None) for field in ("id", "attr", "arg", "value", "name", "module")
                      if isinstance(getattr(node, field, None), str)}
        if any("truth" in str(one).lower() for one in words):
            speakers.add(path.relative_to(PACKAGE).as_posix())
    assert not {one for one in speakers if not one.startswith(MAY_SPEAK_OF_TRUTH)}
    assert "data/demo_shop/truth.py" in speakers


def test_sources_never_open_the_truth(tmp_path: Path) -> None:
    shop = make_demo_shop(config(output=tmp_path / "shop"))
    for path in (shop / "truth", shop / "truth" / "products.parquet", shop):
        with pytest.raises(SourceError, match="truth"):
            find_files(str(path))
    (tmp_path / "innocent").symlink_to(shop / "truth")
    with pytest.raises(SourceError, match="truth"):
        find_files(str(tmp_path / "innocent" / "products.parquet"))
    public = AmazonReviewsSource(products=str(shop / "public"))
    assert all("truth" not in file.path for file in find_files(public.products))


# --- real texts ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "folder"), [("esci", "esci_us_subset"), ("icecat", "chorus_icecat"),
                                                ("goodbooks", "goodbooks")])
def test_real_texts_get_planted_reviewers(family: str, folder: str, real_data: Callable[[str], Path],
                                          tmp_path: Path) -> None:
    shop = make_demo_shop(config(output=tmp_path / "shop", mode="semi_synthetic", products=600, reviews=2000,
                                 texts={"family": family, "path": real_data(folder)}))
    document = json.loads((shop / "public/shop.json").read_text())
    assert document["counts"]["products"] == 600
    assert document["texts_sha256"]
    reviews = pq.read_table(shop / "truth/reviews.parquet").to_pylist()
    wanted = config(output=tmp_path).clarity.generic_share
    assert 0.8 * wanted < np.mean([row["generic"] for row in reviews]) < 1.5 * wanted
    topics = {row["product_id"]: dict(row["attributes"]).values() for row in
              pq.read_table(shop / "truth/products.parquet").to_pylist()}
    told = [row for row in reviews if row["facets"]]
    assert all(set(row["facets"]) <= set(topics[row["about_product_id"]]) for row in told)
    grades = pq.read_table(shop / "truth/judgments.parquet")["gain"].to_pylist()
    assert {0.0, 3.0} <= set(grades)
