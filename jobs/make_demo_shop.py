"""Make a demo shop: a seeded catalogue with reviews, and the truth behind it kept apart.

    python jobs/make_demo_shop.py --config configs/make_demo_shop/demo.yaml products=10000 reviews=80000
    ray job submit --working-dir . -- python jobs/make_demo_shop.py --config configs/make_demo_shop/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.data.demo_shop import DemoShopConfig as JobConfig
from recsys_ray.data.demo_shop import make_demo_shop as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
