"""Describe products by a language model, believing only what their own fields say; off unless a server is named.

    ray job submit --working-dir . -- python jobs/write_copy.py --config configs/write_copy/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.data.product_copy import WriteCopyConfig as JobConfig
from recsys_ray.data.product_copy import write_copy as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
