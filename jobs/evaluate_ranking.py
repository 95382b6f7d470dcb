"""Figures of systems that scored the same candidates: ROC AUC and AP over all rows, MAP and nDCG per user.

    ray job submit --working-dir . -- python jobs/evaluate_ranking.py --config configs/evaluate_ranking/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.evaluation.evaluate_ranking import EvaluateRankingConfig as JobConfig
from recsys_ray.evaluation.evaluate_ranking import evaluate_ranking as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
