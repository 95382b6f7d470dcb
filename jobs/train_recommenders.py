"""Fit popularity, ItemKNN and EASE to users' histories, their settings tuned on validation users.

    ray job submit --working-dir . -- python jobs/train_recommenders.py --config configs/train_recommenders/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.ranking.train_recommenders import TrainRecommendersConfig as JobConfig
from recsys_ray.ranking.train_recommenders import train_recommenders as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
