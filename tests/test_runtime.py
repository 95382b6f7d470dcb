"""The Ray edge: what it does to the process that connects."""

from __future__ import annotations

import signal
import socket

import pytest

from recsys_ray.runtime import PORTS, free_ports


@pytest.mark.ray
def test_sigterm_interrupts_and_no_alarm_waits_to_abort_the_cleaning_up(local_ray: None) -> None:
    running = signal.setitimer(signal.ITIMER_REAL, 0)  # the test runner's own alarm, if it has one
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert signal.setitimer(signal.ITIMER_REAL, 0)[0] == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, *running)


def test_free_ports_are_different_ones_that_can_be_had() -> None:
    ports = free_ports(30)
    assert len(set(ports)) == 30
    assert set(ports) <= set(PORTS)
    for port in ports:
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_too_few_free_ports_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_ray.runtime.PORTS", range(PORTS.start, PORTS.start + 2))
    with pytest.raises(OSError, match="free ports"):
        free_ports(3)
