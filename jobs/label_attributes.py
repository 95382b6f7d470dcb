"""Read in products' words what they look like (kind, material, pattern, neckline, sleeve) and which are one product.

    python jobs/label_attributes.py --config FILE products.prepared=null products.path=PRODUCTS
    ray job submit --working-dir . -- python jobs/label_attributes.py --config configs/label_attributes/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.data.attribute_data import LabelAttributesConfig as JobConfig
from recsys_ray.data.attribute_data import label_attributes as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
