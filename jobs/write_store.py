"""Write the vectors of an index into a vector store: FAISS files, Chroma or Pinecone; only what changed is sent.

    ray job submit --working-dir . -- python jobs/write_store.py --config configs/write_store/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.retrieval.write_store import WriteStoreConfig as JobConfig
from recsys_ray.retrieval.write_store import write_store as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
