"""One vector a product from prepared product texts.

    ray job submit --working-dir . -- python jobs/embed.py --config configs/embed/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.retrieval.embed import EmbedConfig as JobConfig
from recsys_ray.retrieval.embed import embed_products as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
