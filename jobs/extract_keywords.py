"""Prepared reviews -> who, when and why keywords, long descriptions -> summaries, by a language model or offline.

    ray job submit --working-dir . -- python jobs/extract_keywords.py --config configs/extract_keywords/ollama.yaml
"""

from recsys_ray.config import main
from recsys_ray.data.extract_keywords import ExtractKeywordsConfig as JobConfig
from recsys_ray.data.extract_keywords import extract_keywords as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
