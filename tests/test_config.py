"""The configuration loader: strict, coercing, and its errors name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from recsys_ray.config import Config, ConfigError, fingerprint, load_config, main


class Optim(Config):
    lr: float = 1e-3
    steps: int = Field(10, gt=0)


class Job(Config):
    name: str = "run"
    optim: Optim = Optim()
    tags: tuple[str, ...] = ()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_that_yaml_reads_as_text_become_floats(tmp_path: Path) -> None:
    config = load_config(Job, write(tmp_path / "a.yaml", "optim: {lr: 3e-4}"))
    assert config.optim.lr == 3e-4


def test_overrides_reach_nested_keys_and_win(tmp_path: Path) -> None:
    config = load_config(Job, write(tmp_path / "a.yaml", "name: x\noptim: {steps: 5}"),
                         ["optim.steps=7", "tags=[a, b]", "name=s3://bucket/key"])
    assert (config.optim.steps, config.tags, config.name) == (7, ("a", "b"), "s3://bucket/key")


@pytest.mark.parametrize(("text", "message"), [
    ("optim: {stepz: 5}", "optim.stepz: unknown key; did you mean 'steps'?"),
    ("optim: {steps: 0}", "optim.steps: .*greater than 0.*got 0"),
    ("optim: {lr: fast}", "optim.lr: .*valid number.*got 'fast'"),
    ("- a", "expected a mapping"),
    ("a: [", "not valid YAML"),
    ("name: !!python/object/apply:os.getcwd []", "not valid YAML"),
])
def test_a_bad_file_is_refused_by_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Job, write(tmp_path / "a.yaml", text))


@pytest.mark.parametrize(("override", "message"), [
    ("optim.steps", "key.path=value"), ("name.first=a", "holds a value"), ("nmae=a", "did you mean 'name'"),
])
def test_a_bad_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Job, write(tmp_path / "a.yaml", "name: x"), [override])


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such"):
        load_config(Job, "nowhere.yaml")


def test_resolved_yaml_reads_back_equal_and_digest_follows_content(tmp_path: Path) -> None:
    config = Job(optim=Optim(lr=2e-5), tags=("ü",))
    again = load_config(Job, write(tmp_path / "a.yaml", config.to_yaml()))
    assert again == config
    assert again.digest() == config.digest() != Job().digest()


def test_fingerprint_ignores_key_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 2, "b": 2})


def test_main_prints_config_and_turns_user_errors_into_exit_2(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "a.yaml", "name: x"))

    def run(config: Job) -> None:
        raise ValueError(f"{config.name}: no such catalogue")

    assert main(Job, run, ["--config", path, "--print-config", "optim.steps=3"]) == 0
    assert "steps: 3" in capsys.readouterr().out
    assert main(Job, run, ["--config", path]) == 2
    assert "error: x: no such catalogue" in capsys.readouterr().err
