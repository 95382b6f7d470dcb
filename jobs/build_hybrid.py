"""Put the text vectors of an index and vectors of pictures side by side; tune the weight of the text.

    ray job submit --working-dir . -- python jobs/build_hybrid.py --config configs/build_hybrid/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.retrieval.hybrid_build import BuildHybridConfig as JobConfig
from recsys_ray.retrieval.hybrid_build import build_hybrid as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
