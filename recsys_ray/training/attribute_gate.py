"""Whether an adapter may be published: its metadata is its pictures', and no declared slice is decidably worse.

The judging pictures search one another, frozen and adapted; `evaluation.slice_gate` compares the two with groups as
units and bounds that hold for all slices at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from recsys_ray.config import Config, ConfigError
from recsys_ray.data.attribute_items import Floats, Ints, Items
from recsys_ray.evaluation.attributes import aligned, attribute_figures, chance_level
from recsys_ray.evaluation.slice_gate import scoreboard

log = logging.getLogger(__name__)

Figures = Mapping[str, npt.NDArray[np.float64]]

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
    """What was found of each declared slice that some query is in."""

    board: dict[str, Any]       # `scoreboard`: chance, frozen and trained with intervals, verdicts, targets

    def of(self, outcome: str) -> list[str]:
        """The slices with this outcome, each with its figures."""
        return [f"{row['slice']} ({row['verdict']['reason']})" for row in self._rows(outcome)]

    def names(self, outcome: str) -> list[str]:
        """The slices with this outcome."""
        return [row["slice"] for row in self._rows(outcome)]

    def as_dict(self) -> dict[str, list[str]]:
        """The slices by outcome."""
        return {outcome: self.names(outcome) for outcome in ("worse", "undecidable", "kept", "improved")}

    def _rows(self, outcome: str) -> list[dict[str, Any]]:
        return [row for row in self.board["rows"] if row["verdict"]["outcome"] == outcome]


def judge_slices(items: Items, adapted: Floats, config: SliceGateConfig, seed: int) -> SliceVerdicts:
    """Adapted vectors of pictures beside their frozen ones. Errors: `SliceError` for a slice that no query is in."""
    if len(items) < 2:
        log.warning("there are no pictures to judge the adapter by: nothing is decided")
        return SliceVerdicts({"rows": []})
    asked = _asked(items, config, seed)
    rows = items.rows.take(asked)
    frozen, trained = (attribute_figures(vectors[asked], rows, vectors, items.rows)
                       for vectors in (items.vectors, adapted))
    return SliceVerdicts(_board(frozen, trained, items, asked, config, config.slices))


def judge_texts(items: Items, pictures: Floats, texts: Floats, config: SliceGateConfig, seed: int,
                frozen: Floats | None) -> dict[str, Any]:
    """How well products' texts find pictures, attribute by attribute, as `scoreboard` has it.

    `pictures` and `texts` are adapted. `frozen` are the texts' frozen vectors where they share the pictures' space; of
    other texts there is no frozen model, and chance stands in its place.
    """
    asked = _asked(items, config, seed)
    asked = asked[(items.texts[asked] != 0).any(axis=1)] if items.texts is not None else asked
    rows = items.rows.take(asked)
    trained = attribute_figures(texts[asked], rows, pictures, items.rows)
    base = (chance_level(rows, items.rows) if frozen is None else
            attribute_figures(frozen[asked], rows, items.vectors, items.rows))
    return _board(base, trained, items, asked, config, tuple(items.values))


def _asked(items: Items, config: SliceGateConfig, seed: int) -> Ints:
    return np.sort(np.random.default_rng([seed, 4]).permutation(len(items))[:config.queries])


def _board(frozen: Figures, trained: Figures, items: Items, asked: Ints, config: SliceGateConfig,
           slices: tuple[str, ...] | None) -> dict[str, Any]:
    rows = items.rows.take(asked)
    found = scoreboard(frozen, trained, chance_level(rows, items.rows), rows, items.groups[asked], slices,
                       margin=config.margin, min_units=config.min_units, alpha=config.alpha)
    told: dict[str, Any] = _numbers({**found, "rows": [row for row in found["rows"] if row["rows"]]})
    return told


def _numbers(value: Any) -> Any:
    """The same for JSON: null where a number is none."""
    if isinstance(value, dict):
        return {name: _numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
