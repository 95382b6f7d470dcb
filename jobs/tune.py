"""Sweep over a retriever's training and write the best trial as a configuration for finetune_bge.

    python jobs/tune.py --config configs/tune/demo.yaml
    ray job submit --working-dir . -- python jobs/tune.py --config configs/tune/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.training.sweep import SweepConfig as JobConfig
from recsys_ray.training.sweep import sweep as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
