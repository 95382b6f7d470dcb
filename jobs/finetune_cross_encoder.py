"""Fine-tune a cross-encoder on lists of candidates; run again, a killed run continues.

    ray job submit --working-dir . -- python jobs/finetune_cross_encoder.py \
        --config configs/finetune_cross_encoder/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.training.cross_encoder import FinetuneCrossEncoderConfig as JobConfig
from recsys_ray.training.cross_encoder_run import finetune_cross_encoder as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
