"""Users and items, or judged queries -> (query, text, label) rows to train a reranker on.

    ray job submit --working-dir . -- python jobs/make_reranker_pairs.py --config configs/make_reranker_pairs/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.data.reranker_data import MakeRerankerPairsConfig as JobConfig
from recsys_ray.data.reranker_data import make_reranker_pairs as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
