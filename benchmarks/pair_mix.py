"""Training pairs of several artefacts as one, each thinned to a number by hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from recsys_ray.artifacts import Artifact, find_artifact, open_artifact, stage
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.pairs import draws
from recsys_ray.schema import TRAINING_PAIR

KIND = "pairs"


class Part(Config):
    """Pairs, and how many of the train ones are taken."""

    pairs: Path
    most: int | None = None


class MixConfig(Config):
    """Which pairs, where to."""

    prepared: Path          # that all were made from
    parts: tuple[Part, ...]
    output: Path
    seed: int = 7


def mix_pairs(config: MixConfig) -> Artifact:
    """The `pairs` artefact with the train pairs of all parts, thinned.

    Valid pairs stay away: whoever trains on these chooses by whole lists of judged queries, and a query
    with many right products tells little when one of them at a time is looked for among the others.
    """
    found = [open_artifact(part.pairs, KIND) for part in config.parts]
    key = fingerprint({"parts": [[one.manifest.fingerprint, part.most]
                                 for one, part in zip(found, config.parts, strict=True)], "seed": config.seed})
    if (done := find_artifact(config.output, KIND, key)) is not None:
        return done
    train = [thinned(_train_pairs(one), part.most, config.seed)
             for one, part in zip(found, config.parts, strict=True)]
    with stage(config.output, KIND, key) as staging:
        files = [staging.write_table(f"pairs/{split}/mixed.parquet", pa.concat_tables(tables))
                 for split, tables in (("train", train), ("valid", [TRAINING_PAIR.empty_table()]))]
        prepared = open_artifact(config.prepared, "prepared")
        facts = {"train pairs of each part": [table.num_rows for table in train], "form": "triplet"}
        return staging.commit(files, config=config, parents={"prepared": prepared.manifest}, facts=facts)


def thinned(pairs: pa.Table, most: int | None, seed: int) -> pa.Table:
    """At most `most` of the pairs, those of the lowest draws, in their order."""
    if most is None or pairs.num_rows <= most:
        return pairs
    order = np.argsort(draws(pairs["pair_id"].to_pylist(), seed), kind="stable")
    return pairs.take(pa.array(np.sort(order[:most])))


def _train_pairs(pairs: Artifact) -> pa.Table:
    return pa.concat_tables([TRAINING_PAIR.empty_table(),
                             *(table.cast(TRAINING_PAIR) for table in pairs.tables("pairs/train/"))])
