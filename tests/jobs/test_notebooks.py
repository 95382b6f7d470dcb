"""The notebooks run from top to bottom on what the jobs write."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from recsys_ray.artifacts import stage
from recsys_ray.config import Config
from recsys_ray.schema import CONCERN_LABEL

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artefacts of the right form with three products, as the jobs write them for thousands."""
    import pyarrow as pa

    root = tmp_path_factory.mktemp("run")
    card = {"calibration": {"temperature": 1.0, "thresholds": {"acne": 0.4}}}
    rows = [{"product_id": f"p{number}", "concern": name, "label": label, "rules": [], "conflict": False,
             "held_out": False, "split": "test"}
            for number, label in enumerate((1, 0, None)) for name in ("acne", "age")]
    scores = pa.table({"product_id": ["p0", "p1", "p2"], "acne": [0.9, 0.2, 0.5], "age": [0.1, 0.2, 0.3]})
    answers = [{"product_id": "p0", "title": "<i>gel</i>", "concern": "acne", "probability": 0.9,
                "ingredients": ["Aqua", "Salicylic Acid"],
                "weights": {"occlusion": [-0.1, 2.0], "attention": [0.1, 0.4]}}]
    means = [{"system": system, "concern": name, "metric": "AP", "mean": 0.5} for system in ("bt_bert", "majority")
             for name in ("acne", "age", "macro")]
    texts = {"concern-explanations": ("concern_explanations", "explanations.json", answers),
             "evaluation/concerns": ("concern_evaluation", "metrics.json", {"means": means, "held_out": {
                 "lists": {"bt_bert": [{"concern": "acne", "k": 2, "precision model": 0.5, "precision rules": 0.0}]}}})}
    for folder, (kind, name, document) in texts.items():
        with stage(root / folder, kind, "f") as staging:
            (staging.path / name).write_text(json.dumps(document))
            staging.commit([staging.entry(name)], config=Config())
    with stage(root / "concern-labels", "concern_labels", "f") as staging:
        staging.commit([staging.write_table("labels.parquet", pa.Table.from_pylist(rows, CONCERN_LABEL))],
                       config=Config())
    with stage(root / "concern-scores", "concern_scores", "f") as staging:
        staging.commit([staging.write_table("scores/part-00000.parquet", scores)], config=Config(),
                       facts={"concerns": ["acne", "age"], "model": {"card": card}})
    return root


def test_the_analysis_of_concerns_runs(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_RAY_RUN", str(run_directory))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = nbformat.read(NOTEBOOKS / "bt_bert_analysis.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without their outputs"
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "Salicylic Acid" in shown
    assert "&lt;i&gt;gel" in shown
    assert "precision model" in shown
