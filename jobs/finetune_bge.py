"""Fine-tune a text encoder on pairs; run again, a killed run continues.

    ray job submit --working-dir . -- python jobs/finetune_bge.py --config configs/finetune_bge/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.training.bge import FinetuneBgeConfig as JobConfig
from recsys_ray.training.launch import finetune_bge as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
