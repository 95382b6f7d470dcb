"""Train a text-initialised sequence model on users' histories; run again, a killed run continues.

    ray job submit --working-dir . -- python jobs/finetune_sequence.py --config configs/finetune_sequence/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.training.sequence import FinetuneSequenceConfig as JobConfig
from recsys_ray.training.sequence import finetune_sequence as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
