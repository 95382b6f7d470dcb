"""The stage behind the evaluate job: its artefact, its page, its job configuration, and input that does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from recsys_ray.artifacts import Artifact, stage
from recsys_ray.config import Config, ConfigError, load_config
from recsys_ray.data.concern_data import LabelConcernsConfig, label_concerns
from recsys_ray.evaluation.concern_section import ConcernSectionConfig, concern_section, section_figures
from recsys_ray.evaluation.concerns import MACRO, ConcernMetricError
from recsys_ray.evaluation.evaluate_concerns import EvaluateConcernsConfig, concern_summary, evaluate_concerns
from recsys_ray.evaluation.retrieval import EvaluateConfig, read_evaluation
from recsys_ray.evaluation.tasks import EvaluationConfig

ACTIVES = ["Retinol", "Bakuchiol", "Salicylic Acid", "Niacinamide", "Sodium Hyaluronate", "Filler"]
KINDS = ["Serums", "Serums", "Shampoos", "Eye Creams"]


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("labels")
    rows = [{"product_id": f"p{at}", "title": f"Product {at}", "category": KINDS[at % 4],
             "ingredients": ", ".join(["Aqua", ACTIVES[at % 6], *(f"plant{at}{one}" for one in "abcdefgh")])}
            for at in range(160)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "shop.parquet")
    return label_concerns(LabelConcernsConfig.model_validate({
        "products": {"path": str(folder / "shop.parquet")}, "concerns": ["wrinkle", "acne", "moisture"], "mode": "seed",
        "withheld_rules": ["ingredient/bakuchiol"], "split": {"train": 0.4, "valid": 0.3},
        "output": str(folder / "out")}))


def root(artifact: Artifact) -> str:
    return str(artifact.path.parents[1])


def write_scores(path: Path, labels: Artifact, **changes: Any) -> Path:
    """What a model that knows the labels would say, a row a product and concern."""
    rows = labels.table("labels.parquet").to_pylist()
    rng = np.random.default_rng(0)
    said = [{"product_id": row["product_id"], "concern": row["concern"], "threshold": 0.6,
             "probability": float(0.7 * (row["label"] or 0) + 0.3 * rng.random())} for row in rows]
    pq.write_table(pa.Table.from_pylist([{**row, **changes} for row in said]), path)
    return path


def run(tmp_path: Path, labels: Artifact, **options: Any) -> Artifact:
    return evaluate_concerns(EvaluateConcernsConfig.model_validate({
        "name": "small shop", "labels": root(labels), "output": str(tmp_path / "out"), "samples": 100, **options}))


def test_a_table_of_scores_is_measured_beside_the_baselines(tmp_path: Path, labels: Artifact) -> None:
    options: dict[str, Any] = {"systems": {"ours": str(write_scores(tmp_path / "scores.parquet", labels))},
                               "baselines": ["ingredients", "rules"]}
    made = run(tmp_path, labels, **options)
    document = read_evaluation(made)
    assert document["systems"] == ["ours", "majority", "fuzzy", "ingredients", "rules"]
    ap = {row["system"]: row["mean"] for row in document["means"] if (row["concern"], row["metric"]) == (MACRO, "AP")}
    assert ap["ours"] == 1
    assert ap["majority"] < 0.6
    assert set(document["comparisons"]) == {"ours", "rules"}
    assert document["held_out"]["positives"] > 0
    held = {row["system"]: row["mean"] for row in document["held_out"]["means"]
            if (row["concern"], row["metric"]) == ("wrinkle", "AP")}
    assert held["ours"] > held["rules"]         # the rules that remain say nothing of it
    assert document["held_out"]["lists"]["ours"][0].keys() >= {"precision model", "overlap", "duplicates rules"}
    page = made.file("index.html").read_text("utf-8")
    assert page.count("<svg") == 3              # curves, calibration, confusion
    assert not re.search(r"<script|https?://", page.replace("http://www.w3.org", ""))
    assert "ours" in concern_summary(document)
    rows = made.table("per_product.parquet")
    assert {"probability ours", "threshold majority", "label"} <= set(rows.column_names)
    assert run(tmp_path, labels, **options).manifest.version == made.manifest.version


def test_scores_may_be_an_artefact_of_the_scoring_job(tmp_path: Path, labels: Artifact) -> None:
    """A column a concern, thresholds in the model's card; other products and concerns may be in it."""
    rows = labels.table("labels.parquet").to_pylist()
    said = {(row["product_id"], row["concern"]): 0.4 if row["label"] else 0.1 for row in rows}
    ids = sorted({row["product_id"] for row in rows})
    wide = pa.table({"product_id": [*ids, "another"], **{
        name: pa.array([*(said[one, name] for one in ids), 0.5], pa.float32()) for name in ("acne", "wrinkle")}})
    facts = {"concerns": ["acne", "wrinkle"],
             "model": {"card": {"calibration": {"thresholds": {"acne": 0.3, "wrinkle": 0.3}}}}}
    with stage(tmp_path / "scores", "concern_scores", "f" * 16) as staging:
        staging.commit([staging.write_table("scores/part-00000.parquet", wide)], config=Config(), facts=facts)
    made = run(tmp_path, labels, systems={"ours": str(tmp_path / "scores")}, concerns=["wrinkle", "acne"])
    assert made.manifest.parents["scores ours"].startswith("concern_scores/")
    means = {row["metric"]: row["mean"] for row in read_evaluation(made)["means"]
             if (row["system"], row["concern"]) == ("ours", MACRO)}
    assert (means["AP"], means["F1"], means["accuracy"]) == (1, 1, 1)
    with pytest.raises(ConcernMetricError, match="ours: no probabilities of 'moisture'; it has acne, wrinkle"):
        run(tmp_path, labels, systems={"ours": str(tmp_path / "scores")})


def test_a_report_shows_what_was_found(tmp_path: Path, labels: Artifact) -> None:
    """Counts, the surest products of a known kind with what the rules say and why, and pictures."""
    ids = labels.table("products.parquet").sort_by("product_id")["product_id"].to_pylist()[:4]
    scores = pa.table({"product_id": [*ids, "unknown kind"], "acne": pa.array([0.9, 0.2, 0.8, 0.7, 0.95], pa.float32()),
                       "addresses": [["acne"], [], ["acne"], ["acne"], ["acne"]],
                       "has_ingredients": [True, True, True, False, True]})
    reasons = pa.table({"product_id": [ids[0]] * 2, "concern": ["acne"] * 2, "method": ["occlusion", "attention"],
                        "rank": [1, 1], "ingredient": ["Salicylic Acid", "Aqua"], "weight": [0.4, 0.9]})
    for name, table, file in (("concern_scores", scores, "scores/bucket-00000.parquet"),
                              ("concern_explanations", reasons, "explanations.parquet")):
        with stage(tmp_path / name, name, "f" * 16) as staging:
            staging.commit([staging.write_table(file, table)], config=Config(),
                           facts={"concerns": ["acne"], "model": {"sha": "a"}})
    config = ConcernSectionConfig.model_validate({
        "labels": root(labels), "scores": tmp_path / "concern_scores", "reasons": tmp_path / "concern_explanations",
        "evaluation": run(tmp_path, labels).path.parents[1]})
    artifacts = config.opened()
    section = concern_section(artifacts, 2)
    acne = section["concerns"][0]
    assert [one["product_id"] for one in acne["surest"]] == [ids[0], ids[2]]
    assert [one["because"] for one in acne["surest"]] == [["Salicylic Acid"], []]
    assert (acne["addressed"], sum(acne["bins"])) == (3, 4)
    assert {one["system"] for one in acne["ap"]} == {"majority", "fuzzy", "ingredients"}
    assert section["counts"]["products scored"] == 5
    assert len(section_figures(section, artifacts)) > 2


def test_what_is_right_may_come_from_elsewhere(tmp_path: Path, labels: Artifact) -> None:
    products = labels.table("products.parquet").to_pylist()
    truth = [{"product_id": row["product_id"], "concern": concern, "helps": at % 4 == 0, "other": 1}
             for at, row in enumerate(products) for concern in ("wrinkle", "acne", "cellulite")]
    pq.write_table(pa.Table.from_pylist(truth), tmp_path / "truth.parquet")
    document = read_evaluation(run(tmp_path, labels, truth={"path": str(tmp_path / "truth.parquet"),
                                                            "columns": {"label": "helps"}}))
    rows = {row["concern"]: row for row in document["means"] if (row["system"], row["metric"]) == ("majority", "AP")}
    assert rows["wrinkle"]["rows"] == document["counts"]["products"]
    assert rows["moisture"]["mean"] is None     # nobody said what is right
    assert document["without_positives"] == ["moisture"]
    json.dumps(document, allow_nan=False)


def test_input_that_does_not_fit_is_named(tmp_path: Path, labels: Artifact) -> None:
    partial = pq.read_table(write_scores(tmp_path / "all.parquet", labels))
    tested = labels.table("labels.parquet").filter(pc.equal(labels.table("labels.parquet")["split"], "test"))
    pq.write_table(partial.filter(pc.not_equal(partial["product_id"], tested["product_id"][0])),
                   tmp_path / "part.parquet")
    with pytest.raises(ConcernMetricError, match="ours: no probability for product"):
        run(tmp_path, labels, systems={"ours": str(tmp_path / "part.parquet")})
    pq.write_table(partial.filter(pc.equal(partial["concern"], "acne")), tmp_path / "acne.parquet")
    with pytest.raises(ConcernMetricError, match="ours: no probability"):
        run(tmp_path, labels, systems={"ours": str(tmp_path / "acne.parquet")})
    run(tmp_path, labels, systems={"ours": str(tmp_path / "acne.parquet")}, concerns=["acne"])
    with pytest.raises(ConcernMetricError, match="unknown concern 'cellulite'; the labels have acne, moisture"):
        run(tmp_path, labels, concerns=["cellulite"])


# --- the job's configuration ----------------------------------------------------------------------
def config(tmp_path: Path, text: str) -> Path:
    (tmp_path / "c.yaml").write_text(text)
    return tmp_path / "c.yaml"


def test_the_task_chooses_the_family(tmp_path: Path) -> None:
    repo = Path(__file__).parents[2]
    assert isinstance(load_config(EvaluationConfig, repo / "configs/evaluate/concerns.yaml"), EvaluateConcernsConfig)
    assert isinstance(load_config(EvaluationConfig, repo / "configs/evaluate/demo.yaml"), EvaluateConfig)
    with pytest.raises(ConfigError, match="no evaluation 'rankings'; there are attributes, concerns, retrieval"):
        load_config(EvaluationConfig, config(tmp_path, "task: rankings"))
    with pytest.raises(ConfigError, match=r"lables: unknown key; did you mean 'labels'"):
        load_config(EvaluationConfig, config(tmp_path, "{task: concerns, name: x, lables: a, labels: a, output: b}"))


@pytest.mark.parametrize(("text", "message"), [
    ("systems: {majority: x}", "'majority' is the name of a baseline"),
    ("baseline: rules", "baseline 'rules' is not among fuzzy, ingredients, majority"),
])
def test_names_must_make_sense(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(EvaluationConfig, config(tmp_path, f"task: concerns\nname: x\nlabels: a\noutput: b\n{text}"))
