"""Measure a demo shop beside real shops and write the realism card.

    python jobs/realism_card.py --config configs/realism_card/full.yaml
    ray job submit --working-dir . -- python jobs/realism_card.py --config configs/realism_card/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.evaluation.realism import RealismConfig as JobConfig
from recsys_ray.evaluation.realism import write_card as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
