"""The best products of an index for every query of a query set.

    python jobs/retrieve_candidates.py --config configs/retrieve_candidates/esci.yaml retriever.mode=bm25 \
      output=runs/esci/candidates/bm25
    ray job submit --working-dir . -- \
      python jobs/retrieve_candidates.py --config configs/retrieve_candidates/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.retrieval.batch import RetrieveConfig as JobConfig
from recsys_ray.retrieval.batch import retrieve_candidates as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
