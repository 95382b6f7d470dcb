"""Make pairs of garments that look alike, and mined pairs that must not be taken for each other.

    python jobs/make_attribute_pairs.py --config FILE pairs.pairs=100000
    ray job submit --working-dir . -- python jobs/make_attribute_pairs.py --config FILE
"""

from recsys_ray.config import main
from recsys_ray.data.attribute_pair_data import MakeAttributePairsConfig as JobConfig
from recsys_ray.data.attribute_pair_data import make_attribute_pairs as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
