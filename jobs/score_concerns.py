"""Probabilities of concerns for any table of products, as Parquet and CSV; run again, a killed run continues.

    python jobs/score_concerns.py --config configs/score_concerns/demo.yaml products.path=FILE output=DIR
    ray job submit --working-dir . -- python jobs/score_concerns.py --config configs/score_concerns/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.ranking.concern_scores import ScoreConcernsConfig as JobConfig
from recsys_ray.ranking.concern_scores import score_concerns as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
