"""When rounds end, and what a configuration of rounds fills in."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from recsys_ray.training import rounds
from recsys_ray.training.rounds import TrainRoundsConfig, goes_on


def test_rounds_end_when_validation_no_longer_improves() -> None:
    assert goes_on([0.2, 0.3], 0.0)
    assert not goes_on([0.2, 0.2], 0.0)
    assert not goes_on([0.2, 0.1], 0.0)
    assert goes_on([0.2, 0.3, 0.31], 0.0)
    assert not goes_on([0.2, 0.3, 0.31], 0.02)
    assert not goes_on([0.2, 0.35, 0.3], 0.0)       # better than the base, not than the round before
    assert goes_on([None, None, None], 0.0)


@pytest.mark.parametrize(("values", "made", "best"), [([0.3, 0.2, 0.9], 2, 1), ([0.1], 1, 1), ([0.3, 0.4, 0.5], 3, 3)])
def test_the_table_has_every_round_made_and_names_the_best(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[float], made: int, best: int) -> None:
    config = TrainRoundsConfig.model_validate({"work_dir": tmp_path, "prepared": "p", "pairs": "pairs",
                                               "finetune": {"encoder": {"device": "cpu"}}})
    assert config.finetune.pairs == Path("pairs")
    used: list[tuple[str, str]] = []

    class Trained:
        path = tmp_path / "version"

    def one(given, number, miner, start, rows):     # type: ignore[no-untyped-def]
        used.append((miner.model, start.model))
        rows.append({"round": number, "objective": "mrr", "base_value": 0.2, "best_value": values[number - 1],
                     "best_step": 1, "steps": 2, "encoder": f"round-{number}",
                     "negatives": {"hardest_score": 0.5, "positive_score": 0.6}})
        return Trained

    monkeypatch.setattr(rounds, "_round", one)
    monkeypatch.setattr(rounds, "connected", lambda ray: nullcontext())
    table = json.loads(rounds.train_rounds(config).read_text())
    assert [row["round"] for row in table["rounds"]] == list(range(1, made + 1))
    assert table["best"] == f"round-{best}"
    trained = str(tmp_path / "version" / "encoder")
    assert used == [("minilm", "minilm"), *[(trained, "minilm")] * (made - 1)]
    used.clear()
    rounds.train_rounds(config.replace(start="previous"))
    assert used == [("minilm", "minilm"), *[(trained, trained)] * (made - 1)]
