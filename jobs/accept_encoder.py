"""Compare a fine-tuned encoder with the one it would replace; publish it as the latest if it is better.

    python jobs/accept_encoder.py --config configs/accept_encoder/demo.yaml
    ray job submit --working-dir . -- python jobs/accept_encoder.py --config configs/accept_encoder/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.training.acceptance import AcceptConfig as JobConfig
from recsys_ray.training.acceptance import accept as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
