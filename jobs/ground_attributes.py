"""Draw a sample of attributes to judge by hand (review.csv), or analyse the review when it is filled in.

    python jobs/ground_attributes.py --config configs/ground_attributes/demo.yaml
    python jobs/ground_attributes.py --config configs/ground_attributes/demo.yaml completed=review.csv
    ray job submit --working-dir . -- python jobs/ground_attributes.py --config configs/ground_attributes/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.data.ground_attributes import GroundAttributesConfig as JobConfig
from recsys_ray.data.ground_attributes import ground_attributes as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
