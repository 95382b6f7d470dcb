"""Label products with the concerns they address, by rules or from a table of your own, and split and audit the labels.

    python jobs/label_concerns.py --config configs/label_concerns/demo.yaml products.path=FILE labels.path=FILE
    ray job submit --working-dir . -- python jobs/label_concerns.py --config configs/label_concerns/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.data.concern_data import LabelConcernsConfig as JobConfig
from recsys_ray.data.concern_data import label_concerns as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
