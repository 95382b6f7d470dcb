"""The Ray edge: what it does to the process that connects."""

from __future__ import annotations

import signal

import pytest


@pytest.mark.ray
def test_sigterm_interrupts_and_no_alarm_waits_to_abort_the_cleaning_up(local_ray: None) -> None:
    running = signal.setitimer(signal.ITIMER_REAL, 0)  # the test runner's own alarm, if it has one
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert signal.setitimer(signal.ITIMER_REAL, 0)[0] == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, *running)
