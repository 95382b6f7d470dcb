"""A source -> clean products, reviews by time split, product texts, statistics, quarantine and audit.

    ray job submit --working-dir . -- python jobs/prepare.py --config configs/prepare/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.data.pipeline import PrepareConfig as JobConfig
from recsys_ray.data.pipeline import prepare as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
