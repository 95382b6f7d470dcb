"""The families of evaluations that one job runs, told apart by `task`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from recsys_ray.config import Config, ConfigError


class EvaluationConfig(Config):
    """What jobs/evaluate.py reads; `task` says which family it is.

    - `retrieval` (the default): candidates against judgments, `EvaluateConfig`
    - `concerns`: probabilities of concerns against labels, `EvaluateConcernsConfig`
    - `attributes`: vectors of pictures, frozen and adapted, against attributes, `EvaluateAttributesConfig`
    """

    task: str

    @classmethod
    def chosen_for(cls, values: Mapping[str, Any]) -> type[Self]:
        """The configuration of the family that the values name; raises `ConfigError` for an unknown one."""
        if cls is not EvaluationConfig:
            return cls
        from recsys_ray.evaluation.evaluate_attributes import EvaluateAttributesConfig
        from recsys_ray.evaluation.evaluate_concerns import EvaluateConcernsConfig
        from recsys_ray.evaluation.retrieval import EvaluateConfig

        families: dict[str, Any] = {"retrieval": EvaluateConfig, "concerns": EvaluateConcernsConfig,
                                    "attributes": EvaluateAttributesConfig}
        task = str(values.get("task", "retrieval"))
        if task not in families:
            raise ConfigError(f"task: no evaluation {task!r}; there are {', '.join(families)}")
        found: type[Self] = families[task]
        return found


def evaluate_task(config: EvaluationConfig) -> str:
    """Run the evaluation; returns its figures as text for a terminal."""
    from recsys_ray.evaluation.evaluate_attributes import (
        EvaluateAttributesConfig,
        attribute_summary,
        evaluate_attributes,
    )
    from recsys_ray.evaluation.evaluate_concerns import EvaluateConcernsConfig, concern_summary, evaluate_concerns
    from recsys_ray.evaluation.retrieval import EvaluateConfig, evaluate, read_evaluation
    from recsys_ray.evaluation.summary import terminal_summary

    if isinstance(config, EvaluateAttributesConfig):
        return attribute_summary(read_evaluation(evaluate_attributes(config)))
    if isinstance(config, EvaluateConcernsConfig):
        return concern_summary(read_evaluation(evaluate_concerns(config)))
    if isinstance(config, EvaluateConfig):
        return terminal_summary(read_evaluation(evaluate(config)))
    raise TypeError(f"{type(config).__name__} is no evaluation")
