"""What the configurations of all evaluations share, so that one job can run any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from recsys_ray.config import Config, ConfigError


class EvaluationConfig(Config):
    """One of the evaluations; each names itself by its own `task`."""

    task: str

    @classmethod
    def chosen_for(cls, values: Mapping[str, Any]) -> type[Self]:
        """The configuration that the values name by `task`, "retrieval" without one; else `ConfigError`."""
        known = {one.model_fields["task"].default: one for one in cls.__subclasses__()}
        if not known:
            return cls
        task = str(values.get("task", "retrieval"))
        if task not in known:
            raise ConfigError(f"task: no evaluation {task!r}; there are {', '.join(sorted(known))}")
        return known[task]
