"""Pairs with hard negatives -> the same pairs with the scores of a teacher that is better than the student.

    ray job submit --working-dir . -- python jobs/score_pairs.py --config configs/score_pairs/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.training.pair_passes import score_pairs as run
from recsys_ray.training.teacher import ScorePairsConfig as JobConfig

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
