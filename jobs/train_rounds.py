"""Mine hard negatives, train, mine with what was trained, train again, as long as the validation improves.

    ray job submit --working-dir . -- python jobs/train_rounds.py --config configs/train_rounds/demo.yaml
"""

from recsys_ray.config import main
from recsys_ray.training.rounds import TrainRoundsConfig as JobConfig
from recsys_ray.training.rounds import train_rounds as run

if __name__ == "__main__":
    raise SystemExit(main(JobConfig, run))
