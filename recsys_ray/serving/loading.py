"""A value loaded in a background thread, so that a replica answers from the start, if only "not yet"."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class PartStatus:
    """Whether a replica has loaded what it serves, and if it failed, why."""

    ready: bool
    problem: str | None = None


class NotLoadedError(RuntimeError):
    """The value is not there yet, or loading it failed; the message says which."""


class Background(Generic[T]):
    """What `load` returns, once it has."""

    def __init__(self, name: str, load: Callable[[], T]) -> None:
        self._name, self._load = name, load
        self._value: tuple[T] | None = None
        self._problem: str | None = None
        threading.Thread(target=self._run, name=f"load {name}", daemon=True).start()

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._value = (self._load(),)
        except Exception as error:  # a replica that cannot load stays up and says why
            log.exception("%s cannot be loaded", self._name)
            self._problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}; see the log"
        else:
            log.info("%s loaded in %.1f s", self._name, time.monotonic() - started)

    def get(self) -> T:
        """The value; `NotLoadedError` while there is none."""
        if self._value is None:
            raise NotLoadedError(f"{self._name}: {self._problem or 'still loading'}")
        return self._value[0]

    def status(self) -> PartStatus:
        """Whether the value is there, and why not if it never will be."""
        return PartStatus(self._value is not None, self._problem)
