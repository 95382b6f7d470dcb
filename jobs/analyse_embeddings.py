"""Figures of an embedding space and its drift since another version; with fail_on_drift a trigger to retrain.

    ray job submit --working-dir . -- python jobs/analyse_embeddings.py --config configs/analyse_embeddings/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.evaluation.analyse_embeddings import AnalyseConfig as JobConfig
from recsys_ray.evaluation.analyse_embeddings import analyse_embeddings as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
