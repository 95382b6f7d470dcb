"""Turn a table of pictures into vectors by a frozen network; run again, a killed run continues.

    ray job submit --working-dir . -- python jobs/embed_images.py --config configs/embed_images/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.retrieval.embed_images import EmbedImagesConfig as JobConfig
from recsys_ray.retrieval.embed_images import embed_images as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
