"""The whole flow of one shop: prepare, embed, index, evaluate, report, serve, ask.

    python jobs/run_shop.py --config configs/run_shop/demo.yaml
    ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- \
      python jobs/run_shop.py --config configs/run_shop/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.run_shop import RunShopConfig as JobConfig
from recsys_ray.run_shop import run_shop as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
