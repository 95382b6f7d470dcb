"""Score retrieved candidates against judgments; prints the figures with their intervals.

    python jobs/evaluate.py --config configs/evaluate/esci.yaml judgments.path=FILE
    ray job submit --working-dir . -- python jobs/evaluate.py --config configs/evaluate/demo.yaml
"""

import sys

from recsys_ray.config import main
from recsys_ray.evaluation.retrieval import EvaluateConfig as JobConfig
from recsys_ray.evaluation.retrieval import evaluate, read_evaluation
from recsys_ray.evaluation.summary import terminal_summary


def run(config: JobConfig) -> None:
    """Evaluate and print."""
    sys.stdout.write(terminal_summary(read_evaluation(evaluate(config))))


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
