"""Nested cross-validation of a fine-tuning: no query reports what it helped to make; pairs, weights, shelves."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys_ray.config import load_config
from recsys_ray.data.judged_pairs import JudgedQueries, judged_queries

REPO = Path(__file__).resolve().parents[2]


answers = import_module("judged_answers")
table = import_module("finetuned_table")
pair_mix = import_module("pair_mix")
shelves = import_module("shelves")
average = import_module("weight_average")
IDS = [f"q{number}" for number in range(40)]


def test_every_query_is_reported_once_and_never_trained_on_or_chosen_by_where_it_is() -> None:
    folds = answers.nested_folds(IDS, 3, 3, 7)
    assert sorted(one for fold in folds for one in fold.report) == sorted(IDS)
    for fold in folds:
        assert not set(fold.report) & set(fold.inner)
        assert not set(fold.choose) & set(fold.train)
        assert {*fold.report, *fold.choose, *fold.train} == set(IDS)
        assert min(map(len, (fold.report, fold.choose, fold.train))) >= 8


def test_the_pairs_are_of_the_queries_that_the_fold_says(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"query_id": IDS, "query": [f"red {one}" for one in IDS]}), tmp_path / "queries.parquet")
    pq.write_table(pa.table({"query_id": IDS, "product_id": ["p"] * 40, "gain": [1.0] * 40}),
                   tmp_path / "judgments.parquet")
    for fold in answers.nested_folds(IDS, 3, 4, 5):
        found = judged_queries(JudgedQueries(
            queries=str(tmp_path / "queries.parquet"), judgments=str(tmp_path / "judgments.parquet"),
            query_ids=fold.inner, folds=4, valid_folds=(0,), seed=5))
        assert tuple(one.query_id for one in found if one.split == "train") == fold.train
        assert tuple(one.query_id for one in found if one.split == "valid") == fold.choose


def cell(weights: list[float], best: dict[str, float]) -> dict[str, object]:
    """Figures that are 1 less the distance of the weight from each query's best one, both metrics alike."""
    hybrid = [[[1 - abs(weight - best[one])] * 2 for one in IDS] for weight in weights]
    return {"query_ids": IDS, "bm25": [[0.1, 0.1]] * 40, "dense": [[0.2, 0.2]] * 40, "hybrid": hybrid, "products": 9,
            "share": 1.0, "learning_rate": 1e-5, "training": dict.fromkeys(
                ("steps", "best_step", "base_value", "best_value", "cpu_seconds", "false_negative_share", "pairs"), 1)}


def test_the_weight_of_a_fold_is_chosen_by_its_choosing_queries_alone() -> None:
    folds, weights = answers.nested_folds(IDS, 2, 2, 7), [0.0, 0.25, 0.5, 0.75, 1.0]
    best = dict.fromkeys(IDS, 0.75) | dict.fromkeys(folds[0].choose, 0.25)
    found, taken = table.out_of_fold([cell(weights, best), cell(weights, best)], folds, weights)
    assert taken[0] == 0.25             # although all that are reported would have liked 0.75 better
    assert {one: found["hybrid"][one][0] for one in folds[0].report} == {
        one: 1 - abs(0.25 - best[one]) for one in folds[0].report}
    assert sorted(found["dense"]) == sorted(IDS)


def test_the_headline_is_the_paired_gain_out_of_fold() -> None:
    folds, weights = answers.nested_folds(IDS, 2, 2, 7), [0.0, 0.5, 1.0]
    base, trained = cell(weights, dict.fromkeys(IDS, 0.5)), cell(weights, dict.fromkeys(IDS, 0.5))
    trained["dense"] = [[0.2 + 0.01 * (number % 2), 0.2] for number in range(40)]
    headline, tables = table.summary(base, [trained, trained], folds, weights, 1.0)
    assert headline["ndcg10_zero_shot"] == headline["ndcg10_finetuned"] == 1.0
    assert headline["gain"] == headline["gain_ci_low"] == headline["detectable"] == 0.0
    assert tables["verdict"]["hybrid"]["ndcg10"] == "unchanged"
    assert headline["dense_gain"] == pytest.approx(0.005)
    assert headline["dense_gain_ci_low"] > 0
    assert tables["verdict"]["dense"]["ndcg10"] == "better"
    assert tables["verdict"]["dense"]["recall100"] == "unchanged"


def test_gains_and_losses_alike_decide_nothing() -> None:
    folds, weights = answers.nested_folds(IDS, 2, 2, 7), [0.0, 0.5, 1.0]
    base, trained = cell(weights, dict.fromkeys(IDS, 0.5)), cell(weights, dict.fromkeys(IDS, 0.5))
    trained["dense"] = [[0.2 + 0.1 * (-1) ** number, 0.1] for number in range(40)]
    headline, tables = table.summary(base, [trained, trained], folds, weights, 1.0)
    assert tables["verdict"]["dense"] == {"ndcg10": "undecided", "recall100": "worse"}
    assert headline["dense_detectable"] == pytest.approx(2.8 * 0.1 / 40 ** 0.5, rel=0.05)   # (1.96 + 0.84) errors


def test_a_query_without_a_relevant_product_counts_for_no_mean() -> None:
    folds, weights = answers.nested_folds(IDS, 2, 2, 7), [0.0, 1.0]
    one = cell(weights, dict.fromkeys(IDS, 1.0))
    one["dense"] = [[0.5, None], *[[0.5, 0.25]] * 39]
    headline, _ = table.summary(one, [one, one], folds, weights, 1.0)
    assert headline["dense_recall100_zero_shot"] == 0.25


def test_an_answer_lists_the_best_products_and_bm25_none_without_a_match() -> None:
    ranks = import_module("retriever_ranks")
    catalogue = ranks.Catalogue(np.arange(4), ["a", "b", "c", "d"], [""] * 4, [""] * 4, np.zeros(4, np.int64))
    scores = np.array([0.0, 2.0, 0.0, 3.0], np.float32)
    assert answers.answer("q", scores, catalogue)["product_id"].to_pylist() == ["d", "b", "a", "c"]
    matched = answers.answer("q", scores, catalogue, positive_only=True)
    assert matched["product_id"].to_pylist() == ["d", "b"]
    assert matched["rank"].to_pylist() == [1, 2]


def test_thinning_keeps_the_same_pairs_whatever_their_order() -> None:
    ids = [f"p{number}" for number in range(50)]
    some = pair_mix.thinned(pa.table({"pair_id": ids}), 10, 7)["pair_id"].to_pylist()
    turned = pair_mix.thinned(pa.table({"pair_id": ids[::-1]}), 10, 7)["pair_id"].to_pylist()
    assert len(some) == 10
    assert turned == some[::-1]
    assert pair_mix.thinned(pa.table({"pair_id": ids}), None, 7).num_rows == 50


def test_weights_in_between_are_on_the_line_from_base_to_trained(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    for name, value in (("base", 1.0), ("trained", 3.0)):
        (tmp_path / name).mkdir()
        save_file({"layer.weight": torch.full((2, 2), value)}, tmp_path / name / "model.safetensors")
    (tmp_path / "trained" / "modules.json").write_text("[]")
    found = average.averaged_encoder(str(tmp_path / "base"), tmp_path / "trained", 0.25, tmp_path / "between")
    assert load_file(found / "model.safetensors")["layer.weight"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert (found / "modules.json").is_file()
    whole = average.averaged_encoder(str(tmp_path / "base"), tmp_path / "trained", 1.0, tmp_path / "other")
    assert whole == tmp_path / "trained"
    save_file({"other.weight": torch.zeros(1)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"layer\.weight is none of the weights"):
        average.averaged_encoder(str(tmp_path / "base"), tmp_path / "trained", 0.5, tmp_path / "third")


def test_a_shelf_is_a_query_or_a_text_and_never_both() -> None:
    names = [f"genre-{letter}" for letter in "abcdefgh"]
    own = [[names[book % 8], names[(book + 3) % 8], "to-read", "2013", *(["fiction"] if book % 2 else [])]
           for book in range(16)]
    books = pa.table({"book_id": range(16), "title": ["t"] * 16, "authors": ["x"] * 16})
    config = shelves.ShelvesConfig(source=Path(), output=Path(), fewest=2, most=6)
    found = shelves.shelf_tables(books, own, config)
    asked = set(found["queries"]["query"].to_pylist())
    shown = {one for features in found["products"]["features"].to_pylist() for one in features}
    assert "fiction" in shown           # broad: half of the books have it
    shown -= {"fiction"}
    assert len(asked) == len(shown) == 4
    assert not asked & shown            # neither has "to read", which all books have, nor a year
    assert asked | shown == {one.replace("-", " ") for one in names}
    relevant = {(query, int(book)) for query, book in zip(found["judgments"]["query_id"].to_pylist(),
                                                          found["judgments"]["product_id"].to_pylist(), strict=True)}
    wanted = {name for name in names if name.replace("-", " ") in asked}
    assert relevant == {(name, book) for book in range(16) for name in own[book] if name in wanted}


def test_a_recipe_without_judgments_has_nothing_to_choose_by() -> None:
    module = import_module("finetuned_labels")
    with pytest.raises(ValueError, match="no query may choose"):
        module.Recipe.model_validate({"pairs": {}, "rates": [1e-5, 1e-4]})


def test_the_cells_of_a_configuration() -> None:
    module = import_module("finetuned_labels")
    config = load_config(module.JobConfig, REPO / "configs/bench_finetuned_labels/demo.yaml")
    assert module.final_cells(config) == ["all/base/0", "0/ours/1", "1/ours/1", "all/source/1", "all/mined/1"]
    other = config.model_copy(update={"seed": 8})
    changed = [name for name in module.final_cells(config)
               if module._identity(config, name) != module._identity(other, name)]
    assert changed == ["0/ours/1", "1/ours/1"]      # the folds are others; what knows no fold stays
