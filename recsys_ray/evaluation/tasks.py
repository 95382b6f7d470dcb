"""The evaluations that jobs/evaluate.py runs, told apart by `task`.

- `retrieval` (the default): candidates against judgments, `EvaluateConfig`
- `concerns`: probabilities of concerns against labels, `EvaluateConcernsConfig`
- `attributes`: vectors of pictures, frozen and adapted, against attributes, `EvaluateAttributesConfig`
"""

from __future__ import annotations

from recsys_ray.evaluation.attribute_tasks import EvaluateAttributesConfig
from recsys_ray.evaluation.evaluate_attributes import attribute_summary, evaluate_attributes
from recsys_ray.evaluation.evaluate_concerns import EvaluateConcernsConfig, concern_summary, evaluate_concerns
from recsys_ray.evaluation.evaluation_config import EvaluationConfig
from recsys_ray.evaluation.retrieval import EvaluateConfig, evaluate, read_evaluation
from recsys_ray.evaluation.summary import terminal_summary

__all__ = ["EvaluationConfig", "evaluate_task"]


def evaluate_task(config: EvaluationConfig) -> str:
    """Run the evaluation; returns its figures as text for a terminal."""
    if isinstance(config, EvaluateAttributesConfig):
        return attribute_summary(read_evaluation(evaluate_attributes(config)))
    if isinstance(config, EvaluateConcernsConfig):
        return concern_summary(read_evaluation(evaluate_concerns(config)))
    if isinstance(config, EvaluateConfig):
        return terminal_summary(read_evaluation(evaluate(config)))
    raise TypeError(f"{type(config).__name__} is no evaluation")
