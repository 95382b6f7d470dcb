"""Say which ingredients made a concern model say yes: CSV, JSON and a page of highlights.

    ray job submit --working-dir . -- python jobs/explain_concerns.py --config configs/explain_concerns/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.evaluation.explain_concerns import ExplainConcernsConfig as JobConfig
from recsys_ray.evaluation.explain_concerns import explain_concerns as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
