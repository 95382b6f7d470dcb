"""Serve an index over HTTP until SIGINT or SIGTERM.

    python jobs/serve.py --config configs/serve/demo.yaml
    ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml --no-wait -- \
      python jobs/serve.py --config configs/serve/demo.yaml index=/shared/runs/shop/index
"""

from recsys_ray.config import main
from recsys_ray.serving.app import run
from recsys_ray.serving.config import ServeConfig as JobConfig

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
