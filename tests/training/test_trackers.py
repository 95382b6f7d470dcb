"""The curve on disk, TensorBoard's files, MLflow's store."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from recsys_ray.training.trackers import Curve, MlflowConfig, Trackers, TrackersConfig, followed, read_curve

STEP = {"loss": 0.5, "accuracy": 0.25, "learning_rate": 1e-4, "progress": 0.1, "tokens": 100.0, "seconds": 0.5}


def test_a_curve_goes_on_behind_the_step_it_resumes_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Curve(path, 0)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')     # the process was killed here
    again = Curve(path, 2)
    again.log(3, {"loss": float("nan")})
    again.close()
    assert read_curve(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": None}]


def test_a_curve_that_others_write_is_said_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("recsys_ray.training.trackers.FOLLOW_EVERY_S", 0.01)
    path = tmp_path / "metrics.jsonl"
    with caplog.at_level("INFO"), followed(path):
        curve = Curve(path, 0)
        curve.log(7, STEP)
        curve.log(7, {"mrr": 0.25})
        curve.close()
        ends = time.monotonic() + 10
        while "mrr" not in caplog.text and time.monotonic() < ends:
            time.sleep(0.01)
    assert "step 7, 10 % done: loss 0.5000, accuracy 0.250, rate 1.00e-04, 200 tokens a second" in caplog.text
    assert "step 7: mrr 0.2500" in caplog.text


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    with Trackers(TrackersConfig(), tmp_path, 0, "name", {}) as trackers:
        trackers.log(1, STEP)
        trackers.log(1, {"recall@10": 0.5})
    content = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train/loss" in content
    assert b"valid/recall_10" in content


def test_mlflow_goes_on_in_the_run_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")   # a server's database needs more packages than its client
    uri = (tmp_path / "mlruns").as_uri()
    client = MlflowClient(uri)
    config = TrackersConfig(tensorboard=False, mlflow=MlflowConfig(tracking_uri=uri, experiment="shop"))
    for step in (1, 2):
        with Trackers(config, tmp_path, step - 1, "key", {"seed": 7}) as trackers:
            trackers.log(step, STEP)
    experiment = client.get_experiment_by_name("shop")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    assert runs[0].data.params == {"seed": "7"}
    assert [one.step for one in client.get_metric_history(runs[0].info.run_id, "train_loss")] == [1, 2]
