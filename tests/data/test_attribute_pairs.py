"""Pairs by kind: each is what it says, the mix, what is mined, splits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from recsys_ray.artifacts import stage
from recsys_ray.config import Config
from recsys_ray.data.attribute_data import KIND as ATTRIBUTES_KIND
from recsys_ray.data.attribute_pair_data import MakeAttributePairsConfig, make_attribute_pairs
from recsys_ray.data.attribute_pairs import AttributePairError, PairConfig, PairMix, check_pairs, make_pairs
from recsys_ray.data.attributes import split_of_group
from recsys_ray.schema import ATTRIBUTE_PAIR, ATTRIBUTE_ROW, conform

VALUES = {"category2": ["dress", "shirt", "graphic", None], "material": ["silk", "wool", None],
          "pattern": ["solid", "dots", None], "neckline": ["crew", "v neck", None], "sleeve": ["long", "cap", None]}


def shop(count: int = 400, seed: int = 5) -> pa.Table:
    """Products with random attributes; each tenth has a second view."""
    random = np.random.default_rng(seed)
    drawn = {name: [values[one] for one in random.integers(0, len(values), count)] for name, values in VALUES.items()}
    group = [f"g{at // 2}" if at % 10 < 2 else None for at in range(count)]
    return conform(pa.table({
        "product_id": [f"p{at}" for at in range(count)], **drawn, "evidence": [[]] * count, "group_key": group,
        "group_confidence": pa.array([None if one is None else 0.9 for one in group], pa.float32())}),
        ATTRIBUTE_ROW, "rows")


def vectors_of(count: int, seed: int = 2) -> np.ndarray:
    found = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


ROWS, VECTORS = shop(), vectors_of(400)
BY_ID = {row["product_id"]: row for row in ROWS.to_pylist()}


def told(kind: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """The kinds again, in plain words."""
    looks = ("material", "pattern", "neckline", "sleeve")
    same = {name for name in looks if one[name] is not None and one[name] == other[name]}
    against = {name for name in looks if None not in (one[name], other[name]) and one[name] != other[name]}
    kinds = [one["category2"], other["category2"]]
    kind_known = "graphic" not in kinds and None not in kinds
    category = kind_known and kinds[0] == kinds[1]
    group = one["group_key"] is not None and one["group_key"] == other["group_key"]
    if kind == "strong_group":
        return group
    if kind == "easy":
        return kind_known and not category and not group
    if kind.startswith("hard_"):
        return category and not group and kind.removeprefix("hard_") in against
    if not category or group or against:
        return False
    strong = len(same) >= 3
    return {"strong_attributes": strong, "medium": not strong and "material" in same,
            "weak": not strong and "material" not in same and bool(same - {"material"})}[kind]


def test_every_pair_is_what_its_kind_says_and_the_mix_is_kept() -> None:
    pairs, statistics = make_pairs(ROWS, 600, PairConfig(), VECTORS)
    assert pairs.schema == ATTRIBUTE_PAIR
    made = {row["kind"]: row for row in statistics}
    for row in pairs.to_pylist():
        assert told(row["kind"], BY_ID[row["anchor_id"]], BY_ID[row["other_id"]]), row
        assert row["label"] == int(not row["kind"].startswith(("hard", "easy")))
    assert made["strong_group"]["made"] == 40           # all there are; attributes make up for the rest
    assert made["strong_group"]["made"] + made["strong_attributes"]["made"] == 210
    assert {kind: made[kind]["made"] for kind in ("medium", "weak", "hard_material", "easy")} == {
        "medium": 120, "weak": 60, "hard_material": 60, "easy": 30}
    again, _ = make_pairs(ROWS, 600, PairConfig(), VECTORS)
    assert again.equals(pairs)


def test_hard_negatives_are_the_confusers_of_the_current_vectors() -> None:
    _, statistics = make_pairs(ROWS, 300, PairConfig(), VECTORS)
    near = {row["kind"]: row["median_similarity"] for row in statistics}
    assert min(near["hard_material"], near["hard_neckline"], near["hard_pattern"]) > near["easy"] + 0.3
    twins = VECTORS.copy()
    twins[1::2] = twins[::2]        # every second product is its neighbour under another id: too near to be a negative
    pairs, _ = make_pairs(ROWS, 300, PairConfig(), twins)
    hard = pairs.filter(pc.starts_with(pairs["kind"], "hard"))
    for one, other in zip(hard["anchor_id"].to_pylist(), hard["other_id"].to_pylist(), strict=True):
        assert int(one[1:]) // 2 != int(other[1:]) // 2


def test_a_product_without_a_vector_is_not_mined_for() -> None:
    some = VECTORS.copy()
    some[:200] = np.nan
    pairs, _ = make_pairs(ROWS, 300, PairConfig(), some)
    hard = pairs.filter(pc.starts_with(pairs["kind"], "hard"))
    ids = [*hard["anchor_id"].to_pylist(), *hard["other_id"].to_pylist()]
    assert ids
    assert min(int(one[1:]) for one in ids) >= 200


def test_contradicting_positives_only_when_asked_for() -> None:
    kept, _ = make_pairs(ROWS, 600, PairConfig(contradictions="kept"), VECTORS)
    with pytest.raises(AttributePairError, match="is not"):
        check_pairs(kept, ROWS, PairConfig())


def test_what_there_is_too_little_of_stays_short() -> None:
    pairs, statistics = make_pairs(ROWS.slice(0, 30), 1000, PairConfig(), VECTORS[:30])
    made = {row["kind"]: (row["wanted"], row["made"]) for row in statistics}
    assert made["medium"][0] == 200 > made["medium"][1]
    assert pairs.num_rows == sum(one for _, one in made.values())


@pytest.mark.parametrize(("change", "message"), [
    ({"label": 0}, "is not"), ({"kind": "easy"}, "is not"), ({"kind": "odd"}, "unknown kind"),
    ({"other_id": "p9999"}, "has no attributes"),
])
def test_a_wrong_pair_is_named(change: dict[str, Any], message: str) -> None:
    pairs, _ = make_pairs(ROWS, 100, PairConfig(mix=PairMix(strong=1, medium=0, weak=0, hard=0, easy=0)))
    rows = pairs.to_pylist()
    rows[3] |= change
    with pytest.raises(AttributePairError, match=message):
        check_pairs(pa.Table.from_pylist(rows, schema=ATTRIBUTE_PAIR), ROWS, PairConfig())


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(AttributePairError, match=r"mix\.hard=0"):
        make_pairs(ROWS, 100, PairConfig())
    with pytest.raises(ValueError, match=r"add up to 1\.1"):
        PairMix(easy=0.15)
    silent = conform(pa.table({"product_id": ["a", "b"], "evidence": [[], []]}), ATTRIBUTE_ROW, "rows")
    with pytest.raises(AttributePairError, match="no two are alike"):
        make_pairs(silent, 10, PairConfig(mix=PairMix(hard=0, strong=0.65)))


class _Nothing(Config):
    pass


def write_artifacts(folder: Path) -> None:
    with stage(folder / "attributes", ATTRIBUTES_KIND, "a") as staging:
        staging.commit([staging.write_table("attributes.parquet", ROWS)], config=_Nothing())
    ids = [f"p{at // 2}" for at in range(700)]      # two pictures of a product, none of the last fifty
    vectors = np.repeat(VECTORS, 2, axis=0)[:700] + 0.1 * np.tile([[1], [-1]], (350, 6))
    table = pa.table({"product_id": ids, "vector": pa.FixedSizeListArray.from_arrays(
        pa.array(vectors.reshape(-1).astype(np.float32)), 6)})
    with stage(folder / "images", "image_vectors", "v") as staging:
        staging.commit([staging.write_table("vectors/part-00000.parquet", table)], config=_Nothing(),
                       facts={"dimension": 6})


def test_the_stage_makes_pairs_of_each_split_alone(tmp_path: Path) -> None:
    write_artifacts(tmp_path)
    config = MakeAttributePairsConfig.model_validate({
        "attributes": tmp_path / "attributes", "vectors": {"images": tmp_path / "images"}, "output": tmp_path / "pairs",
        "pairs": {"pairs": 500}})
    made = make_attribute_pairs(config)
    counts = made.manifest.facts["counts"]
    assert counts["without a vector"] == 50
    for split in ("train", "valid", "test"):
        pairs = made.table(f"pairs/{split}.parquet")
        assert pairs.num_rows == counts[f"{split} pairs"] > 20
        for one in {*pairs["anchor_id"].to_pylist(), *pairs["other_id"].to_pylist()}:
            assert split_of_group(BY_ID[one]["group_key"] or one, 7) == split
            assert int(one[1:]) < 350
    assert json.loads(made.file("statistics.json").read_text())["counts"] == counts
    assert make_attribute_pairs(config).manifest.version == made.manifest.version
