"""Vectors and product texts -> an index of segments; run again after a change, it brings the index up to date.

    ray job submit --working-dir . -- python jobs/build_index.py --config configs/build_index/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.retrieval.index_build import BuildIndexConfig as JobConfig
from recsys_ray.retrieval.index_build import build_index as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
