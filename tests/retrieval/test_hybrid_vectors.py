"""Hybrid vectors: weights are those of the similarities, halves may be missing, one half is guessed from the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from recsys_ray.retrieval.hybrid_vectors import (
    Half,
    HybridError,
    Weights,
    behaviour_half,
    category_half,
    fit_projection,
    fit_space,
    load_space,
    save_space,
    space_facts,
)


def random_half(rows: int, dimension: int, seed: int) -> Half:
    return Half.of(np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32) + 0.5)


def cosines(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
    unit = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (queries, items)]
    return unit[0] @ unit[1].T


def test_alpha_beta_and_gamma_are_the_weights_of_the_similarities() -> None:
    text, image = random_half(40, 7, 1), random_half(40, 19, 2)
    category = category_half(["a", "b"] * 20, ["a", "b"])
    weights = Weights(text=0.7, image=0.3, category=0.2)
    space = fit_space({"text": text, "image": image, "category": category}, weights)
    vectors = space.items(space.directions({"text": text, "image": image, "category": category}))
    asked = {"text": random_half(5, 7, 3), "image": random_half(5, 19, 4),
             "category": category_half(["a"] * 5, ["a", "b"])}
    mean = image.vectors.mean(axis=0)
    expected = [cosines(asked["text"].vectors, text.vectors), cosines(asked["image"].vectors - mean,
                                                                      image.vectors - mean),
                np.tile([1.0, 0.0], (5, 20))]
    found = space.questions(space.directions(asked)) @ vectors.T
    np.testing.assert_allclose(found, 0.7 * expected[0] + 0.3 * expected[1] + 0.2 * expected[2], atol=2e-6)
    other = space.questions(space.directions(asked), Weights(text=0.1, image=0.9, category=0))
    np.testing.assert_allclose(other @ vectors.T, 0.1 * expected[0] + 0.9 * expected[1], atol=2e-6)


def test_what_is_not_there_counts_nothing() -> None:
    text, image = random_half(6, 4, 1), random_half(6, 8, 2)
    image.known[:3] = False
    image.vectors[0] = np.nan
    space = fit_space({"text": text, "image": image}, Weights())
    vectors = space.items(space.directions({"text": text, "image": image}))
    asked = space.directions({"text": random_half(2, 4, 3), "image": random_half(2, 8, 4)})
    scores = space.questions(asked) @ vectors.T
    alone = cosines(asked["text"].vectors, text.vectors)
    np.testing.assert_allclose(scores[:, :3], 0.7 * alone[:, :3], atol=1e-6)    # of products without a picture
    words = space.questions(space.directions({"text": asked["text"]})) @ vectors.T
    np.testing.assert_allclose(words, 0.7 * alone, atol=1e-6)                   # of queries without one
    halves = space.split(vectors)
    assert halves["image"].known.tolist() == [False] * 3 + [True] * 3
    np.testing.assert_allclose(halves["text"].vectors, space.directions({"text": text})["text"].vectors, atol=1e-6)


def test_a_weight_without_its_half_is_refused_by_name() -> None:
    text = random_half(6, 4, 1)
    with pytest.raises(HybridError, match=r"weights\.image is 0\.3, but no product"):
        fit_space({"text": text}, Weights())
    space = fit_space({"text": text}, Weights(image=0))
    with pytest.raises(HybridError, match="image: has no weight in the index"):
        space.questions(space.directions({"text": text}), Weights())
    with pytest.raises(HybridError, match="8 dimensions where the index has 4"):
        space.directions({"text": random_half(2, 8, 1)})
    with pytest.raises(ValidationError, match="every weight is 0"):
        Weights(text=0, image=0)


def test_pictures_are_guessed_from_texts_where_one_follows_from_the_other() -> None:
    random = np.random.default_rng(0)
    text = random_half(400, 12, 1)
    image = Half.of(text.vectors @ random.standard_normal((12, 20)).astype(np.float32))
    found = fit_projection(text, image)
    assert found.held_out_cosine > 0.9
    shuffled = Half(image.vectors[random.permutation(400)], image.known)
    assert abs(fit_projection(text, shuffled).held_out_cosine) < 0.2
    constant = np.full((400, 1), 9, np.float32)     # what all have in common is no guess
    narrow = [Half.of(np.hstack([one.vectors, constant])) for one in (text, image)]
    assert fit_projection(*narrow).held_out_cosine == pytest.approx(found.held_out_cosine, abs=0.02)
    with pytest.raises(HybridError, match="3 products have both"):
        fit_projection(*(Half(one.vectors[:3], one.known[:3]) for one in (text, image)))


def test_products_bought_by_the_same_people_are_alike() -> None:
    users = np.repeat(np.arange(40), 3)
    items = np.array([[0, 1, 2] if user % 2 else [3, 4, 5] for user in range(40)]).ravel()
    half = behaviour_half(users, items, 8, 4)
    assert half.known.tolist() == [True] * 6 + [False] * 2
    alike = cosines(half.vectors[:6], half.vectors[:6])
    assert alike[0, 1] > 0.9
    assert abs(alike[0, 3]) < 0.1


def test_a_space_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    halves = {"text": random_half(50, 4, 1), "image": random_half(50, 6, 2)}
    space = fit_space(halves, Weights())
    directions = space.directions(halves)
    learned = {("text", "image"): fit_projection(halves["text"], halves["image"])}
    save_space(space, learned, tmp_path / "space.npz")
    again, projections = load_space(space_facts(space, learned), tmp_path / "space.npz")
    np.testing.assert_array_equal(again.items(again.directions(halves)), space.items(directions))
    for one in (projections, learned):
        assert one["text", "image"].guess(halves["text"]).known.all()
    np.testing.assert_array_equal(projections["text", "image"].guess(halves["text"]).vectors,
                                  learned["text", "image"].guess(halves["text"]).vectors)
