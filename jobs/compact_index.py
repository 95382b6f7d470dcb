"""Merge the segments of an index and drop its dead rows.

    ray job submit --working-dir . -- python jobs/compact_index.py --config configs/compact_index/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.retrieval.index_build import CompactIndexConfig as JobConfig
from recsys_ray.retrieval.index_build import compact_index as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
