"""Trees that reorder the candidates of a retrieval: features, LightGBM LambdaMART, figures on a later period.

    ray job submit --working-dir . -- python jobs/train_gbdt.py --config configs/train_gbdt/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.ranking.train_gbdt import TrainGbdtConfig as JobConfig
from recsys_ray.ranking.train_gbdt import train_gbdt as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
