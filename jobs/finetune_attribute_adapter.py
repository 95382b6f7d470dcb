"""Train the adapter of pictures on their attributes; refused where a declared slice falls below the frozen model.

    python jobs/finetune_attribute_adapter.py --config configs/finetune_attribute_adapter/demo.yaml
    ray job submit --working-dir . -- python jobs/finetune_attribute_adapter.py \
        --config configs/finetune_attribute_adapter/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.training.attribute_adapter import FinetuneAttributeAdapterConfig as JobConfig
from recsys_ray.training.attribute_adapter_run import finetune_attribute_adapter as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
