"""Mining on Ray with a real index: what is found obeys every rule, and a run that died ends the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config
from recsys_ray.data.negatives import ceiling
from recsys_ray.data.pairs import PairError
from recsys_ray.data.pipeline import PrepareConfig, prepare
from recsys_ray.data.training_pairs import MakePairsConfig, make_pairs
from recsys_ray.models.registry import build_text_encoder
from recsys_ray.models.text_encoder import TextEncoderConfig
from recsys_ray.retrieval import mining
from recsys_ray.retrieval.embed import EmbedConfig, embed_products
from recsys_ray.retrieval.index_build import BuildIndexConfig, build_index
from recsys_ray.retrieval.mining import MineNegativesConfig, mine_negatives
from recsys_ray.retrieval.segments import IndexMismatch, open_index

pytestmark = pytest.mark.ray

START, HOUR_MS = 1_500_000_000_000, 3_600_000
COLOURS, KINDS = ("red", "blue", "green", "white"), ("dress", "shoe", "hat", "table", "lamp")
QUIET = {"progress": False}


def write_shop(folder: Path) -> dict[str, str]:
    """Twenty products with their own words, a near-duplicate of the first, one that nobody has reviewed yet."""
    names = [(f"{colour}-{kind}", f"{colour} {kind}") for colour in COLOURS for kind in KINDS]
    products = [{"parent_asin": name, "title": text, "features": [f"a {text} like no other",
                 " ".join(f"word{number}x{k}" for k in range(20))]} for number, (name, text) in enumerate(names)]
    products.append({**products[0], "parent_asin": "red-dress-copy"})
    products.append({"parent_asin": "late", "title": "red dress of the future"})
    said = [{"parent_asin": names[number % 20][0], "asin": "V", "user_id": f"U{number}", "rating": 5.0, "title": "t",
             "text": "a lovely gift" if number % 7 == 0 else f"the {names[number % 20][1]} suits my sister number",
             "verified_purchase": True, "timestamp": START + number * HOUR_MS, "helpful_vote": 0}
            for number in range(100)]
    said.append({**said[0], "parent_asin": "red-dress-copy", "user_id": "other"})
    said.append({**said[0], "parent_asin": "late", "timestamp": START + 99 * HOUR_MS})
    for name, rows in (("meta", products), ("reviews", said)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"format": "amazon_reviews", **{kind: str(folder / f"{name}.jsonl")
                                           for kind, name in (("products", "meta"), ("reviews", "reviews"))}}


@pytest.fixture(scope="module")
def shop(local_ray: None, tmp_path_factory: pytest.TempPathFactory,
         tiny_text_model: Callable[..., Path]) -> tuple[Path, TextEncoderConfig]:
    """The folder with prepared products, pairs and an index, and the encoder of its vectors."""
    root = tmp_path_factory.mktemp("shop")
    encoder = TextEncoderConfig(model=str(tiny_text_model()), device="cpu", dtype="float32")
    prepare(PrepareConfig.model_validate({
        "source": write_shop(root), "output": root / "prepared", "num_buckets": 2, "ray": QUIET,
        "split": {"train_end_ms": START + 80 * HOUR_MS, "valid_end_ms": START + 90 * HOUR_MS}}))
    make_pairs(MakePairsConfig.model_validate({"prepared": root / "prepared", "output": root / "pairs", "ray": QUIET}))
    embed_products(EmbedConfig.model_validate({"prepared": root / "prepared", "output": root / "embeddings",
                                               "encoder": encoder, "ray": QUIET}))
    build_index(BuildIndexConfig.model_validate({"prepared": root / "prepared", "embeddings": root / "embeddings",
                                                 "output": root / "index", "rows_per_segment": 15, "ray": QUIET}))
    return root, encoder


def config_for(shop: tuple[Path, TextEncoderConfig], output: Path, **change: Any) -> MineNegativesConfig:
    root, encoder = shop
    return MineNegativesConfig.model_validate({
        "pairs": root / "pairs", "prepared": root / "prepared", "index": root / "index", "output": output,
        "encoder": encoder, "mined": 3, "random": 2, "max_score_ratio": 1.0, "rows_per_unit": 30, "workers": 1,
        "ray": QUIET, **change})


def rows_of(artifact: Artifact, split: str = "train") -> list[dict[str, Any]]:
    rows = [row for table in artifact.tables(f"pairs/{split}/") for row in table.to_pylist()]
    return sorted(rows, key=lambda row: row["pair_id"])


def test_every_negative_obeys_the_rules(shop: tuple[Path, TextEncoderConfig], tmp_path: Path) -> None:
    root, encoder_config = shop
    mined = mine_negatives(config_for(shop, tmp_path / "mined"))
    before = make_pairs(MakePairsConfig.model_validate({"prepared": root / "prepared", "output": root / "pairs",
                                                        "ray": QUIET}))
    rows, originals = rows_of(mined), rows_of(before)
    assert [row["pair_id"] for row in rows] == [row["pair_id"] for row in originals]
    assert rows_of(mined, "valid") == rows_of(before, "valid")
    index, encoder = open_index(root / "index"), build_text_encoder(encoder_config)
    late, copy, first = (index.product(name) for name in ("late", "red-dress-copy", "red-dress"))
    assert late is not None
    groups: dict[str, set[int]] = {}
    for row in rows:
        groups.setdefault(row["query"].lower(), set()).add(row["group_id"])
    assert max(len(found) for found in groups.values()) > 5     # the generic query has many right answers
    texts = {row["row_id"]: row["text"] for segment in index.segments for row in segment.rows.to_pylist()}
    for row in rows:
        assert late["row_id"] not in row["negative_row_ids"]
        assert not groups[row["query"].lower()] & set(row["negative_group_ids"])
        assert len(set(row["negative_group_ids"])) == len(row["negative_group_ids"])
        assert row["negative_texts"] == [texts[one] for one in row["negative_row_ids"]]
        hard = row["negative_texts"][: max(0, len(row["negative_texts"]) - 2)]
        query, positive = encoder.encode_queries([row["query"]])[0], encoder.encode_documents([row["text"]])[0]
        limit = ceiling(float(query @ positive), 1.0)
        assert all(float(query @ vector) < limit + 1e-5 for vector in encoder.encode_documents(hard))
    of_first = [row for row in rows if first is not None and row["row_id"] == first["row_id"]]
    assert of_first
    assert copy is not None
    assert all(copy["row_id"] not in row["negative_row_ids"] for row in of_first)
    facts = mined.manifest.facts["negatives"]
    assert facts["pairs"] == len(rows)
    assert facts["mined"] + facts["random"] == sum(len(row["negative_row_ids"]) for row in rows)
    assert facts["mined"] > 0 < facts["random"]
    assert {"pairs", "index", "prepared"} == set(mined.manifest.parents)


def test_a_run_that_died_continues_and_a_second_one_reuses(
    shop: tuple[Path, TextEncoderConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = mine_negatives(config_for(shop, tmp_path / "a"))
    assert mine_negatives(config_for(shop, tmp_path / "a")).manifest.version == first.manifest.version
    monkeypatch.setattr(mining, "_copied", lambda *_: 1 / 0)      # dies when every unit is mined
    with pytest.raises(ZeroDivisionError):
        mine_negatives(config_for(shop, tmp_path / "b"))
    monkeypatch.undo()
    files = sorted((tmp_path / "b").rglob("pairs/train/*.parquet"))
    assert len(files) > 2
    files[0].write_bytes(b"torn")
    kept = files[1].stat().st_mtime_ns
    second = mine_negatives(config_for(shop, tmp_path / "b"))
    assert (second.path / "pairs/train" / files[1].name).stat().st_mtime_ns == kept
    assert rows_of(second) == rows_of(first)
    assert second.manifest.facts["negatives"] == first.manifest.facts["negatives"]


def test_mining_again_adds_or_replaces(shop: tuple[Path, TextEncoderConfig], tmp_path: Path) -> None:
    once = mine_negatives(config_for(shop, tmp_path / "once", mined=0, random=1))
    assert {len(row["negative_row_ids"]) for row in rows_of(once)} == {1}
    options: dict[str, Any] = {"pairs": tmp_path / "once", "mined": 0, "random": 2}
    added = mine_negatives(config_for(shop, tmp_path / "added", **options))
    for row, earlier in zip(rows_of(added), rows_of(once), strict=True):
        assert row["negative_row_ids"][:1] == earlier["negative_row_ids"]
        assert len(set(row["negative_group_ids"])) == 3
    replaced = mine_negatives(config_for(shop, tmp_path / "replaced", keep_earlier=False, **options))
    assert {len(row["negative_row_ids"]) for row in rows_of(replaced)} == {2}


def test_the_indexed_positive_scores_higher_than_the_one_without_the_query_s_words(
    shop: tuple[Path, TextEncoderConfig], tmp_path: Path,
) -> None:
    honest = mine_negatives(config_for(shop, tmp_path / "a")).manifest.facts["negatives"]
    indexed = mine_negatives(config_for(shop, tmp_path / "b", positive_score="index")).manifest.facts["negatives"]
    assert indexed["positive_score"] > honest["positive_score"]
    assert np.isfinite(indexed["hardest_score"])


def test_what_was_not_made_from_one_another_is_refused(
    shop: tuple[Path, TextEncoderConfig], tmp_path: Path, tiny_text_model: Callable[..., Path],
) -> None:
    root, _ = shop
    other = TextEncoderConfig(model=str(tiny_text_model(seed=5)), device="cpu", dtype="float32")
    with pytest.raises(IndexMismatch, match="another encoder"):
        mine_negatives(config_for(shop, tmp_path / "x", encoder=other))
    (tmp_path / "shop").mkdir()
    prepare(PrepareConfig.model_validate({"source": write_shop(tmp_path / "shop"), "output": tmp_path / "prepared",
                                          "num_buckets": 1, "ray": QUIET}))
    make_pairs(MakePairsConfig.model_validate({"prepared": tmp_path / "prepared", "output": tmp_path / "pairs",
                                               "ray": QUIET}))
    with pytest.raises(PairError, match="make both from the same products"):
        mine_negatives(config_for(shop, tmp_path / "x", pairs=tmp_path / "pairs"))
    assert (root / "index").is_dir()


def test_pairs_with_a_teachers_scores_are_refused(shop: Any, tmp_path: Path) -> None:
    with stage(tmp_path / "scored", "pairs", "one") as staging:
        staging.commit([], config=Config(), facts={"teacher": {}})
    with pytest.raises(PairError, match="then score the mined ones"):
        mine_negatives(config_for(shop, tmp_path / "x", pairs=tmp_path / "scored"))
