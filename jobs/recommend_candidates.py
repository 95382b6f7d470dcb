"""What a recommender lists for users whose next items are known: what the trees behind /v1/recommend learn from.

    ray job submit --working-dir . -- \
      python jobs/recommend_candidates.py --config configs/recommend_candidates/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.serving.recommend_candidates import RecommendCandidatesConfig as JobConfig
from recsys_ray.serving.recommend_candidates import recommend_candidates as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
