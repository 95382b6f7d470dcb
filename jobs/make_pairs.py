"""Prepared reviews and products -> (query, positive text) pairs to train a retriever on.

    ray job submit --working-dir . -- python jobs/make_pairs.py --config configs/make_pairs/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.data.training_pairs import MakePairsConfig as JobConfig
from recsys_ray.data.training_pairs import make_pairs as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
