"""The sample that a reviewer gets, and what the filled-in review says."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from recsys_ray.data.attribute_data import AttributeDataError, LabelAttributesConfig, label_attributes
from recsys_ray.data.ground_attributes import GroundAttributesConfig, ground_attributes
from recsys_ray.data.grounding import GroundingError, analyse, columns, read_review, stratified_sample
from recsys_ray.data.proportions import weighted_share, wilson
from recsys_ray.schema import ATTRIBUTE_ROW, conform


def write_shop(folder: Path) -> Path:
    rows = [f'{{"product_id": "d{at}", "title": "Dress {at} in silk", "text": "Lined in cotton"}}' for at in range(60)]
    rows += [f'{{"product_id": "s{at}", "title": "=Shirt {at}", "text": "Soft wool, crew neck"}}' for at in range(6)]
    rows += ['{"product_id": "x", "title": "Teapot"}', '{"product_id": "d1", "title": "Dress again"}', '{"title": "?"}']
    path = folder / "shop.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def attributes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attributes")
    label_attributes(LabelAttributesConfig.model_validate({
        "products": {"path": str(write_shop(folder)), "columns": {"description": "text"}}, "output": folder / "out"}))
    return folder / "out"


def test_a_table_is_read_labelled_and_audited(attributes: Path) -> None:
    from recsys_ray.data.attribute_data import open_attributes

    artifact, rows = open_attributes(attributes)
    assert rows.num_rows == 66
    reasons = Counter(artifact.table("quarantine.parquet")["reason"].to_pylist())
    assert reasons["no kind of garment in its words"] == reasons["a second row with this id"] == 1
    assert reasons.total() == 3
    assert artifact.manifest.facts["known"]["material"] == 1.0
    page = artifact.file("audit.html").read_text("utf-8")
    assert "silk" in page
    assert "<script" not in page


def test_a_shop_without_garments_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shop.csv").write_text("product_id,title\nx,Teapot\n")
    with pytest.raises(AttributeDataError, match="no garment is left"):
        label_attributes(LabelAttributesConfig.model_validate({
            "products": {"path": str(tmp_path / "shop.csv")}, "output": tmp_path / "out"}))


def test_every_kind_is_in_the_sample() -> None:
    strata = ["tee"] * 900 + ["coat"] * 99 + ["cape"]
    drawn = Counter(strata[at] for at in stratified_sample(strata, 50, 7))
    assert drawn.total() == 50
    assert drawn["cape"] == 1
    assert 40 <= drawn["tee"] <= 45
    assert stratified_sample(strata, 50, 7) == stratified_sample(strata, 50, 7) != stratified_sample(strata, 50, 8)
    assert len(stratified_sample(["a", "b", "c"], 2, 7)) == 2
    assert len(stratified_sample(["a", "b"], 10, 7)) == 2


def filled(text: str, verdict: str = "right", **own: str) -> str:
    """The review with a verdict beside every value; own: column -> what one row gets instead."""
    rows = list(csv.DictReader(io.StringIO(text)))
    for row in rows:
        for name in ("category2", "material", "neckline"):
            row[f"{name} verdict"] = verdict if row[name] else ""
    rows[0] |= {key.replace("_verdict", " verdict"): value for key, value in own.items()}
    out = io.StringIO()
    writer = csv.DictWriter(out, columns())
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def test_from_sample_to_analysis(attributes: Path, tmp_path: Path) -> None:
    config = GroundAttributesConfig(attributes=attributes, sample=20, output=tmp_path / "grounding")
    sample = ground_attributes(config)
    text = sample.file("review.csv").read_text("utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 20
    assert sum(float(row["weight"]) for row in rows) == pytest.approx(66)
    assert all(row["title"].startswith("'=") for row in rows if row["stratum"] == "shirt")      # no formula
    assert {row["material words"] for row in rows if row["stratum"] == "shirt"} == {'description ("wool")'}
    (tmp_path / "review.csv").write_text(filled(text), encoding="utf-8-sig")
    made = ground_attributes(config.replace(completed=tmp_path / "review.csv"))
    facts = made.manifest.facts
    assert facts["step"] == "analysis"
    assert facts["attributes"][0]["right"]["share"] == 1.0
    assert facts["attributes"][0]["judged"] == 20
    assert "Grounding" in made.file("grounding.html").read_text("utf-8")


def test_contamination_is_traced_to_its_words_and_advice_follows(attributes: Path, tmp_path: Path) -> None:
    text = ground_attributes(GroundAttributesConfig(attributes=attributes, sample=66, output=tmp_path / "out")).file(
        "review.csv").read_text("utf-8")
    from recsys_ray.data.attribute_data import open_attributes

    artifact, rows = open_attributes(attributes)
    review = read_review(filled(text), rows)
    for row in review:
        if row["stratum"] == "shirt":
            row |= {"material verdict": "other", "material should be": "hemp"}
    found = analyse(review, artifact.manifest.facts["values"])
    material = next(row for row in found["attributes"] if row["attribute"] == "material")
    assert material["right"]["share"] == pytest.approx(60 / 66)
    assert material["contaminated"]["share"] == pytest.approx(6 / 66)
    assert found["contamination"] == [
        {"attribute": "material", "value": "wool", "words": 'description ("wool")', "rows": 6}]
    advice = "\n".join(found["advice"])
    assert "take description out of `read` in material.yaml" in advice
    assert '"wool" was read as wool and is not in 6 of 6 rows' in advice
    assert "'hemp' is no value yet and was wanted in 6 row(s)" in advice
    assert found["strata"][0]["stratum"] == "shirt"


@pytest.mark.parametrize(("own", "message"), [
    ({"material_verdict": "maybe"}, "row 2, material verdict: 'maybe' is none of"),
    ({"material": "gold"}, "row 2: material is 'gold' here"), ({"product_id": "zz"}, "not among the attributes"),
    ({"weight": "much"}, "row 2, weight"),
])
def test_a_bad_review_is_named(attributes: Path, tmp_path: Path, own: dict[str, str], message: str) -> None:
    config = GroundAttributesConfig(attributes=attributes, sample=10, output=tmp_path / "out")
    text = ground_attributes(config).file("review.csv").read_text("utf-8")
    (tmp_path / "review.csv").write_text(filled(text, **own))
    with pytest.raises(GroundingError, match=message):
        ground_attributes(config.replace(completed=tmp_path / "review.csv"))


def test_an_empty_review_is_refused() -> None:
    rows = conform(pa.table({"product_id": ["a"], "evidence": [[]]}), ATTRIBUTE_ROW, "rows")
    with pytest.raises(GroundingError, match="no column 'product_id'"):
        read_review("a,b\n1,2\n", rows)
    text = ",".join(columns()) + "\n" + ",".join("a" if one == "product_id" else "1" if one == "weight" else ""
                                                 for one in columns()) + "\n"
    with pytest.raises(GroundingError, match="no verdict"):
        read_review(text, rows)


def test_intervals_of_shares() -> None:
    """Wilson's worked numbers: 8 of 10 is .490 to .943; equal weights change nothing, uneven ones widen it."""
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    even = weighted_share([True] * 8 + [False] * 2, [3.0] * 10)
    assert even is not None
    assert (even.low, even.high) == pytest.approx((low, high))
    uneven = weighted_share([True] * 8 + [False] * 2, [1.0] * 5 + [10.0] * 5)
    assert uneven is not None
    assert uneven.high - uneven.low > high - low
    assert weighted_share([], []) is None
