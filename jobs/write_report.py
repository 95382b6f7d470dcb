"""Write one HTML page with the figures, plots, examples, audit and lineage of a run, and the same as JSON.

    ray job submit --working-dir . -- python jobs/write_report.py --config configs/write_report/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.evaluation.report import ReportConfig as JobConfig
from recsys_ray.evaluation.report import write_report as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
