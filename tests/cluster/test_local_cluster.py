"""The local cluster: jobs with the token run, without it they do not, and stopping leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

REPO = Path(__file__).resolve().parents[2]


def load_local() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cluster_local", REPO / "cluster" / "local.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


local = load_local()


def ray_command(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "ray"), *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(command, cwd=REPO, env={**clean, **env}, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A running cluster: its state directory and the environment for clients."""
    state = tmp_path_factory.mktemp("cluster")
    env = local.up(state, nodes=1, cpus=4)
    try:
        yield state, env
    finally:
        if (state / "state.json").exists():
            local.down(state)


@pytest.mark.ray
def test_a_job_runs_in_a_copy_of_the_code_that_holds_nothing_private(cluster: tuple[Path, dict[str, str]]) -> None:
    _, env = cluster
    code = "import os, recsys_ray; print('names', sorted(os.listdir('.')), recsys_ray.__file__)"
    done = ray_command("job", "submit", "--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml", "--",
                       "python", "-c", code, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("names"))
    assert "'jobs'" in line
    assert not [name for name in (".git'", ".venv", "'runs'", ".cluster") if name in line]
    assert "working_dir_files" in line.split("]")[1], "the job imported another copy of the package"


@pytest.mark.ray
def test_without_the_token_nothing_is_run(cluster: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    _, env = cluster
    marker = tmp_path / "ran"
    for wrong in ({"HOME": str(tmp_path)}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        refused = ray_command("job", "submit", "--", "touch", str(marker),
                              env={"RAY_ADDRESS": env["RAY_ADDRESS"], **wrong})
        assert refused.returncode != 0
        assert "Auth" in refused.stderr + refused.stdout
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{env['RAY_ADDRESS']}/api/jobs/", timeout=10)
    assert error.value.code == 401
    assert not marker.exists()


@pytest.mark.ray
def test_secrets_belong_to_the_owner_and_the_dashboard_to_this_machine(cluster: tuple[Path, dict[str, str]]) -> None:
    state, env = cluster
    for name in ("token", "env", "state.json"):
        assert stat.S_IMODE((state / name).stat().st_mode) == 0o600, name
    port = int(env["RAY_ADDRESS"].rsplit(":", 1)[1])
    listening = [one.laddr for one in psutil.net_connections("tcp") if one.status == "LISTEN"]
    assert [address.ip for address in listening if address.port == port] == ["127.0.0.1"]


@pytest.mark.ray
def test_a_second_start_is_refused_and_the_first_keeps_running(cluster: tuple[Path, dict[str, str]]) -> None:
    state, _ = cluster
    with pytest.raises(local.ClusterError, match="stop it first"):
        local.up(state)
    assert local.members(json.loads((state / "state.json").read_text()))


@pytest.mark.ray
def test_stopping_ends_every_process_of_the_cluster_and_no_other(cluster: tuple[Path, dict[str, str]]) -> None:
    state, _ = cluster
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", "ray start raylet gcs_server"])
    try:
        recorded = json.loads((state / "state.json").read_text())
        before = local.members(recorded)
        assert {"raylet", "gcs_server"} <= {process.name() for process in before}
        local.down(state)
        assert not [process for process in before if local._is_running(process)]
        assert not [one.pid for one in psutil.process_iter() if recorded["temp_dir"] in " ".join(command_line(one))]
        assert not Path(recorded["temp_dir"]).exists()
        assert not (state / "token").exists()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def command_line(process: psutil.Process) -> list[str]:
    try:
        return [] if process.status() == psutil.STATUS_ZOMBIE else process.cmdline()
    except psutil.Error:
        return []


def test_stopping_what_was_never_started_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(local.ClusterError, match="no cluster was started"):
        local.down(tmp_path)


def test_a_recorded_number_that_belongs_to_another_process_now_is_left_alone() -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        time.sleep(0.05)
        created = psutil.Process(other.pid).create_time()
        assert local.members({"processes": [{"pid": other.pid, "created": created - 1000}]}) == []
        mine = local.members({"processes": [{"pid": other.pid, "created": created}]})
        assert [process.pid for process in mine] == [other.pid]
    finally:
        other.kill()
        other.wait()
