"""Training pairs -> the same pairs with hard negatives that the current model finds in its own index.

    ray job submit --working-dir . -- python jobs/mine_negatives.py --config configs/mine_negatives/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.retrieval.mining import MineNegativesConfig as JobConfig
from recsys_ray.retrieval.mining import mine_negatives as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
