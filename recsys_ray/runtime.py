"""Ray at the edge: connect to a cluster or start a local one with the settings that keep it honest."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray

from recsys_ray.config import Config, ConfigError

log = logging.getLogger(__name__)

MIN_LOGICAL_CPUS = 4  # with fewer, an actor pool can starve the read task that feeds it, without an error
UNSAFE_SWITCHES = (   # each lets Ray Data unpickle what a file says
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA", "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR", "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
)
PORTS = range(15_000, 30_000)   # below those that the kernel gives away: a Ray that starts takes them by the dozen


class RayConfig(Config):
    """How a job reaches Ray."""

    address: str | None = None          # None: RAY_ADDRESS if set (as inside a submitted job), else a local Ray
    num_cpus: int | None = None         # logical CPUs of a local Ray; None: at least MIN_LOGICAL_CPUS
    object_store_mb: int = 512          # of a local Ray
    no_progress_timeout_s: int = 120    # Ray Data gives up on a stuck pipeline after this long
    progress: bool = True
    worker_logs: bool = False           # show what workers log; their errors reach the driver in any case


@contextmanager
def connected(config: RayConfig) -> Iterator[None]:
    """A Ray to work on: an already running or configured one, else a local one that ends with the block."""
    switched_on = [name for name in UNSAFE_SWITCHES if os.environ.get(name)]
    if switched_on:
        raise ConfigError(f"{', '.join(switched_on)}: unset it; it lets data files run code")
    if ray.is_initialized():
        _configure_data(config)
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        with _session(address=address, log_to_driver=config.worker_logs):
            _configure_data(config)
            yield
        return
    with _local_ray(config):
        _configure_data(config)
        yield


@contextmanager
def _local_ray(config: RayConfig) -> Iterator[None]:
    # A private, short temp dir: other Rays on the machine stay untouched and socket paths stay under 107 bytes.
    temp_dir = tempfile.mkdtemp(prefix="rr-")
    num_cpus = config.num_cpus or max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)
    try:
        with _session(address="local", num_cpus=num_cpus, object_store_memory=config.object_store_mb << 20,
                      include_dashboard=False, _temp_dir=temp_dir, log_to_driver=config.worker_logs,
                      logging_level=logging.WARNING):
            yield
    finally:
        shutil.rmtree(temp_dir, ignore_errors=True)


@contextmanager
def _session(**options: Any) -> Iterator[None]:
    # ray.init installs a native SIGTERM handler, which prints a crash report and aborts the process 3 s later,
    # in the midst of whatever it cleans up. Here SIGTERM interrupts as Ctrl-C does, and every `finally` runs.
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        try:
            ray.init(**options)
        except (KeyboardInterrupt, SystemExit):
            if in_main_thread:
                signal.alarm(0)  # that handler's, if it was in place already
            raise
        if in_main_thread:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    finally:
        ray.shutdown()
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def core_cpus() -> float:
    """The logical CPUs of one core: a local Ray declares more than there are cores, a cluster does not.

    Short tasks that ask for as many run one a core; each further one would start a process of its own,
    which costs a CPU-second of imports before it works.
    """
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    return max(1.0, resources.get("CPU", 1) / (os.cpu_count() or 1)) if nodes == 1 else 1.0


def _configure_data(config: RayConfig) -> None:
    context = ray.data.DataContext.get_current()
    context.execution_no_progress_timeout_s = config.no_progress_timeout_s
    # Bars are for people at a terminal; everywhere else the stages log their own progress.
    context.enable_progress_bars = config.progress and sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context.execution_options.preserve_order = False  # tables carry ids; nothing may rely on order


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nobody listens on, all different; `OSError` if there are not so many."""
    found = list[int]()
    with ExitStack() as stack:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            if len(found) == count:
                break
            probe = stack.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    if len(found) < count:
        raise OSError(f"127.0.0.1 has {len(found)} free ports from {PORTS.start} to {PORTS.stop}, {count} are needed")
    return found
