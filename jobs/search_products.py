"""Ask a hybrid index for products by words, by a picture, by both, or like a product.

    ray job submit --working-dir . -- python jobs/search_products.py --config configs/search_products/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.retrieval.hybrid_search import SearchProductsConfig as JobConfig
from recsys_ray.retrieval.hybrid_search import search_products as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
