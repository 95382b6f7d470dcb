"""Point an artefact back at an earlier version: the one before, or the one named by version=...

    python jobs/rollback.py --config configs/rollback/demo.yaml
    ray job submit --working-dir . -- python jobs/rollback.py --config configs/rollback/demo.yaml version=NAME
"""

import logging
from pathlib import Path

from recsys_ray.artifacts import rollback
from recsys_ray.config import Config, main


class JobConfig(Config):
    """Which artefact, and which of its versions (None: the one before the current one)."""

    root: Path
    version: str | None = None


def run(config: JobConfig) -> None:
    """Roll back."""
    logging.getLogger(__name__).info("current is now %s", rollback(config.root, config.version).reference)


if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
