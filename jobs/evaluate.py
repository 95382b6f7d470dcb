"""Score retrieved candidates against judgments, or concerns against labels; prints the figures with their intervals.

    python jobs/evaluate.py --config configs/evaluate/esci.yaml judgments.path=FILE
    ray job submit --working-dir . -- python jobs/evaluate.py --config configs/evaluate/demo.yaml
"""

import sys

from recsys_ray.config import main
from recsys_ray.evaluation.tasks import EvaluationConfig as JobConfig
from recsys_ray.evaluation.tasks import evaluate_task


def run(config: JobConfig) -> None:
    """Evaluate and print."""
    sys.stdout.write(evaluate_task(config))


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
