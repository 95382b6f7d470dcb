"""Whether an adapter may be published: its metadata is its pictures', and no declared slice is decidably worse.

The judging pictures search one another, frozen and adapted; `evaluation.slice_gate` compares the two with groups as
units and bounds that hold for all slices at once.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from recsys_ray.config import Config, ConfigError
from recsys_ray.evaluation.attributes import aligned, attribute_figures
from recsys_ray.evaluation.slice_gate import SliceVerdict, slice_gate, stack
from recsys_ray.training.attribute_data import Floats, Items

log = logging.getLogger(__name__)

FEWEST = 200        # pictures from which on shuffled metadata can be told from metadata that says little


class SliceGateConfig(Config):
    """What is declared, and what it takes to decide."""

    # "neckline", "material=denim", "neckline of category2=dress"; None: each attribute and each of its values
    slices: tuple[str, ...] | None = None
    margin: float = Field(default=0.03, ge=0)           # of value@10 that may be lost
    min_units: int = Field(default=30, ge=2)            # groups; fewer decide nothing
    alpha: float = Field(default=0.05, gt=0, lt=1)      # of all slices together
    queries: int = Field(default=2000, ge=1)            # of the judging pictures; all of them are searched


@dataclass(frozen=True)
class SliceVerdicts:
    """The verdict on each declared slice that some query is in."""

    verdicts: tuple[SliceVerdict, ...]

    def of(self, outcome: str) -> list[str]:
        """The slices with this outcome, each with its figures."""
        return [f"{one.slice} ({one.reason})" for one in self.verdicts if one.outcome == outcome]

    def names(self, outcome: str) -> list[str]:
        """The slices with this outcome."""
        return [one.slice for one in self.verdicts if one.outcome == outcome]

    def as_dict(self) -> list[dict[str, Any]]:
        """Plain values for JSON, without numbers that are none."""
        return [{name: None if isinstance(value, float) and not math.isfinite(value) else value
                 for name, value in one.as_dict().items()} for one in self.verdicts]


def judge_slices(items: Items, adapted: Floats, config: SliceGateConfig, seed: int) -> SliceVerdicts:
    """Adapted vectors of pictures beside their frozen ones. Errors: `SliceError` for a slice that no query is in."""
    if len(items) < 2:
        log.warning("there are no pictures to judge the adapter by: nothing is decided")
        return SliceVerdicts(())
    asked = np.sort(np.random.default_rng([seed, 4]).permutation(len(items))[:config.queries])
    rows = items.rows.take(asked)
    figures = {name: attribute_figures(vectors[asked], rows, vectors, items.rows)
               for name, vectors in (("frozen", items.vectors), ("trained", adapted))}
    stacked = stack(figures, rows, items.groups[asked], config.slices)
    found = slice_gate(stacked.values["frozen"], stacked.values["trained"], stacked.units, stacked.masks,
                       margin=config.margin, min_units=config.min_units, alpha=config.alpha)
    return SliceVerdicts(tuple(one for one in found if one.rows))


def require_alignment(items: Items, seed: int) -> None:
    """Raise `ConfigError` unless the rows speak of the vectors beside them; too few to tell are told in the log."""
    found = aligned(items.vectors, items.rows, seed)
    if found:
        return
    if len(items) < FEWEST:
        log.warning("%d pictures are too few to tell whether their metadata is theirs: %s", len(items), found.reason)
        return
    raise ConfigError(f"attributes: not aligned with the pictures: {found.reason}. Join them by product again, or "
                      "embed the pictures with a network that knows something of them")
