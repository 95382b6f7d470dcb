"""Fine-tune BT-BERT on concern labels; run again, a killed run continues.

    ray job submit --working-dir . -- python jobs/finetune_bt_bert.py --config configs/finetune_bt_bert/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.training.bt_bert import FinetuneBtBertConfig as JobConfig
from recsys_ray.training.bt_bert_run import finetune_bt_bert as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
