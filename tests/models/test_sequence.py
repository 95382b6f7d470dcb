"""The sequence model: causality, cold items by their text, its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recsys_ray.models.sequence import SequenceConfig, SequenceError, SequenceModel, SequenceRecommender, padded

ITEMS = tuple(f"i{one}" for one in range(12))


def model(ordered: bool = True, cold: int = 2, **changes: object) -> SequenceModel:
    torch.manual_seed(0)
    text = torch.randn(len(ITEMS), 6)
    warm = torch.arange(len(ITEMS)) < len(ITEMS) - cold
    config = SequenceConfig.model_validate({"dimension": 8, "max_items": 5, "ordered": ordered, **changes})
    built = SequenceModel(config, text, warm)
    with torch.no_grad():       # as after training
        built.residual.weight.normal_()
        built.residual_bias.weight.normal_()
    return built.eval()


def test_a_state_depends_on_nothing_behind_it_and_on_no_padding() -> None:
    built = model()
    one = built.states(torch.tensor([[3, 1, 4, -1], [3, 1, 9, 2]]))
    torch.testing.assert_close(one[0, :2], one[1, :2])
    torch.testing.assert_close(one[0, :3], built.states(torch.tensor([[3, 1, 4]]))[0])
    assert not torch.allclose(one[0, 2], one[1, 2])


def test_a_cold_item_is_scored_by_its_text_alone() -> None:
    """Whatever the table of residuals holds for it, and as a warm item of the same text without a residual."""
    built = model()
    history = [np.array([0, 3])]
    before = built.score(history)
    with torch.no_grad():
        built.residual.weight[10:] += 100
        built.residual_bias.weight[10:] += 100
    np.testing.assert_array_equal(built.score(history), before)
    with torch.no_grad():
        built.text[11] = built.text[5]
        built.residual.weight[5] = 0
        built.residual_bias.weight[5] = 0
    found = built.score(history)[0]
    assert found[11] == pytest.approx(found[5], rel=1e-5)
    assert found[10] == before[0, 10]


def test_a_cold_item_in_a_history_is_read_by_its_text() -> None:
    built = model()
    with torch.no_grad():
        built.text[11] = built.text[5]
        built.residual.weight[5] = 0
    np.testing.assert_allclose(built.score([np.array([5, 2])])[0], built.score([np.array([11, 2])])[0], rtol=1e-5)


def test_no_gradient_reaches_a_cold_residual() -> None:
    built = model()
    states, vectors, biases = built(torch.tensor([[0, 10, 11]]), torch.tensor([10, 1]))
    (states.sum() + (vectors.sum(dim=1) * 3 + biases).sum()).backward()
    assert not built.residual.weight.grad[10:].any()
    assert not built.residual_bias.weight.grad[10:].any()
    assert built.residual.weight.grad[:2].any()


def test_order_counts_only_where_it_is_known() -> None:
    one, other = [np.array([0, 3, 7])], [np.array([7, 0, 3])]
    assert not np.allclose(model().score(one), model().score(other))
    np.testing.assert_allclose(model(ordered=False).score(one), model(ordered=False).score(other), rtol=1e-5)


def test_only_the_latest_items_are_read() -> None:
    built = model()
    np.testing.assert_allclose(built.score([np.array([9, 8, 0, 1, 2, 3, 4])]), built.score([np.arange(5)]), rtol=1e-5)


def test_sequences_are_padded_behind_their_end() -> None:
    assert padded([np.array([1, 2, 3]), np.array([4])], 2).tolist() == [[2, 3], [4, -1]]
    assert padded([np.zeros(0, np.int64)], 3).tolist() == [[-1]]


def test_files_give_the_same_recommendations(tmp_path: Path) -> None:
    built, popularity = model(), np.linspace(0.1, 0.2, len(ITEMS)).astype(np.float32)
    built.save(tmp_path, ITEMS, popularity)
    again = SequenceRecommender.load(tmp_path)
    np.testing.assert_array_equal(again.score([np.array([1, 2])]), built.score([np.array([1, 2])]))
    ids, scores = again.recommend(["i1", "unheard of", "i2"], 4)
    assert len(ids) == 4
    assert not {"i1", "i2"} & set(ids)
    assert (np.diff(scores) <= 0).all()
    assert again.recommend([], 3)[0] == ["i11", "i10", "i9"]        # the popular ones
    assert len(again.recommend(["i1"], 99, exclude_seen=False)[0]) == len(ITEMS)


def test_files_of_another_catalogue_are_refused(tmp_path: Path) -> None:
    model().save(tmp_path, ITEMS, np.ones(12, np.float32))
    other = SequenceModel(SequenceConfig(dimension=8, max_items=5), torch.randn(3, 6), torch.ones(3))
    other.save(tmp_path / "other", ITEMS[:3], np.ones(3, np.float32))
    (tmp_path / "other/text.safetensors").replace(tmp_path / "text.safetensors")
    with pytest.raises(SequenceError, match="12 items but 3"):
        SequenceRecommender.load(tmp_path)


def test_a_width_that_heads_do_not_share_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of heads"):
        SequenceConfig(dimension=10, heads=4)
