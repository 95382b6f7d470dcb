"""Start and stop a local Ray cluster with token authentication, beside whatever else runs on the machine.

    python cluster/local.py up [--nodes 2] [--cpus 4]    # make cluster-up
    source .cluster/env                                  # RAY_ADDRESS and the token for `ray job submit`
    python cluster/local.py down                         # make cluster-down

Own ports, own temporary directory, a token file that only its owner can read, dashboard on
127.0.0.1. `down` ends the processes that `up` started and no others: `ray stop` would end every Ray
of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from recsys_ray.runtime import free_ports

DEFAULT_STATE = Path(__file__).resolve().parents[1] / ".cluster"
START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 3      # for drivers and workers to end by themselves; nothing of the cluster is kept
OBJECT_STORE_BYTES = 512 << 20
PORTS = ("gcs", "client", "dashboard", "agent_http", "agent_grpc", "node_manager", "object_manager", "metrics",
         "runtime_env")


class ClusterError(RuntimeError):
    """A cluster that is already there, is not there, or did not come up; the message says what to do."""


def up(state_dir: Path, nodes: int = 1, cpus: int = 4) -> dict[str, str]:
    """The environment variables by which clients reach the new cluster; also written to `state_dir`/env."""
    if (state_dir / "state.json").exists():
        raise ClusterError(f"{state_dir}: a cluster was started here; stop it first: python cluster/local.py down")
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    token_file = _write_token(state_dir / "token")
    temp_dir = Path(tempfile.mkdtemp(prefix="rr-"))  # short: socket paths must stay under 107 bytes
    names = [f"{name}-{node}" for node in range(nodes) for name in PORTS]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    state: dict[str, Any] = {"temp_dir": str(temp_dir), "processes": []}
    _write_private(state_dir / "state.json", json.dumps(state))
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file),
           "RAY_ADDRESS": f"http://127.0.0.1:{ports['dashboard-0']}"}
    try:
        for node in range(nodes):
            process = _start_node(node, cpus, ports, temp_dir, state_dir, env)
            state["processes"].append({"pid": process.pid, "created": psutil.Process(process.pid).create_time()})
            _write_private(state_dir / "state.json", json.dumps(state))
            _wait_for_agent(process, ports[f"agent_http-{node}"], state_dir / f"node-{node}.log", token_file)
        _wait_for_jobs(env["RAY_ADDRESS"], token_file)
    except BaseException:
        down(state_dir)
        raise
    _write_private(state_dir / "env", "".join(f"export {name}={value}\n" for name, value in env.items()))
    return env


def down(state_dir: Path) -> None:
    """End the processes that `up` started, wait until they are gone, and delete their files."""
    state_file = state_dir / "state.json"
    if not state_file.exists():
        raise ClusterError(f"{state_dir}: no cluster was started here")
    state = json.loads(state_file.read_text("utf-8"))
    end_processes(members(state))
    end_processes(members(state))  # what a dying raylet may have started meanwhile
    if left := members(state):
        raise ClusterError(f"still running: {', '.join(str(one.pid) for one in left)}")
    shutil.rmtree(state["temp_dir"], ignore_errors=True)
    for name in ("state.json", "env", "token"):
        (state_dir / name).unlink(missing_ok=True)


def members(state: dict[str, Any]) -> list[psutil.Process]:
    """The running processes of the cluster: the recorded ones, their descendants, and those of their sessions."""
    roots = [root for one in state["processes"] if (root := _same_process(one["pid"], one["created"])) is not None]
    found = {process.pid: process for root in roots for process in [root, *_children(root)]}
    # Each recorded process leads a session of its own. Its number stays taken while the session has members, so
    # when another process has that number now, the session is over.
    sessions = {one["pid"] for one in state["processes"]
                if _same_process(one["pid"], one["created"]) is not None or not psutil.pid_exists(one["pid"])}
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in sessions:
                found[process.pid] = process
        except OSError:
            continue
    return [process for process in found.values() if _is_running(process)]


def end_processes(processes: list[psutil.Process]) -> None:
    """Ask the processes to end, wait, and end those that have not."""
    for name in ("terminate", "kill"):
        for process in filter(_is_running, processes):
            _signal(process, name)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while any(map(_is_running, processes)) and time.monotonic() < deadline:
            time.sleep(0.1)


def _start_node(node: int, cpus: int, ports: dict[str, int], temp_dir: Path, state_dir: Path,
                env: dict[str, str]) -> subprocess.Popen[bytes]:
    role = ["--head", f"--port={ports['gcs-0']}", f"--ray-client-server-port={ports['client-0']}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard-0']}", "--include-dashboard=true",
            f"--temp-dir={temp_dir}"] if node == 0 else [f"--address=127.0.0.1:{ports['gcs-0']}"]
    command = [
        str(Path(sys.executable).parent / "ray"), "start", *role, "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--min-worker-port=0", "--max-worker-port=0",
        f"--dashboard-agent-listen-port={ports[f'agent_http-{node}']}",
        f"--dashboard-agent-grpc-port={ports[f'agent_grpc-{node}']}",
        f"--node-manager-port={ports[f'node_manager-{node}']}",
        f"--object-manager-port={ports[f'object_manager-{node}']}",
        f"--metrics-export-port={ports[f'metrics-{node}']}", f"--runtime-env-agent-port={ports[f'runtime_env-{node}']}",
    ]
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    with (state_dir / f"node-{node}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                start_new_session=True, env={**inherited, **_without_address(env)})


def _without_address(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name != "RAY_ADDRESS"}


def _write_token(path: Path) -> Path:
    _write_private(path, secrets.token_hex(32))
    return path


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)


def _wait_for_agent(process: subprocess.Popen[bytes], port: int, log: Path, token_file: Path) -> None:
    """Jobs are run by a node's agent, which comes up some seconds after the node."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterError(f"ray start ended with {process.returncode}:\n{_tail(log)}")
        if _status(f"http://127.0.0.1:{port}/api/local_raylet_healthz", token_file) == 200:
            return
        time.sleep(0.3)
    raise ClusterError(f"no agent within {START_TIMEOUT_S} s:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text("utf-8", "replace")[-2000:]


def _wait_for_jobs(address: str, token_file: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while (status := _status(f"{address}/api/jobs/", token_file)) != 200:
        if time.monotonic() > deadline:
            raise ClusterError(f"{address}: the Jobs API answers {status} after {START_TIMEOUT_S} s")
        time.sleep(0.3)


def _status(url: str, token_file: Path) -> int | None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token_file.read_text('utf-8')}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _same_process(pid: int, created: float) -> psutil.Process | None:
    """The process, unless it is gone and its number was given to another."""
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - created) < 1 else None
    except psutil.NoSuchProcess:
        return None


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, name: str) -> None:
    with suppress(psutil.NoSuchProcess):
        getattr(process, name)()


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("up", "down"))
    parser.add_argument("--nodes", type=int, default=1, help="Ray nodes on this machine")
    parser.add_argument("--cpus", type=int, default=max(4, os.cpu_count() or 1), help="logical CPUs a node")
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE, help="where token and process ids are kept")
    args = parser.parse_args(argv)
    try:
        if args.command == "down":
            down(args.state.resolve())
            sys.stdout.write("stopped\n")
            return 0
        env = up(args.state.resolve(), args.nodes, args.cpus)
    except ClusterError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(
        f"running: {env['RAY_ADDRESS']} (dashboard and jobs; this machine only)\n"
        f"use it:  source {args.state / 'env'}\n"
        "         ray job submit --working-dir . -- python jobs/<job>.py --config configs/<job>/demo.yaml\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
