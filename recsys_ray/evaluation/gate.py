"""Whether a candidate may replace a baseline: improved, worse, or undecidable, and never the last in silence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from recsys_ray.config import Config
from recsys_ray.evaluation.significance import Comparison


class GateError(ValueError):
    """A candidate that did not pass its gate; the message says which outcome and why."""


class GateConfig(Config):
    """What it takes to decide."""

    margin: float = Field(default=0.0, ge=0)        # a difference has to exceed this to count, either way
    min_units: int = Field(default=30, ge=1)        # fewer independent units decide nothing
    alpha: float = Field(default=0.05, gt=0, lt=1)  # the (adjusted) p-value has to be below


@dataclass(frozen=True)
class Verdict:
    """The outcome of one comparison and, in a sentence, why."""

    outcome: Literal["improved", "worse", "undecidable"]
    reason: str

    @property
    def passed(self) -> bool:
        """True only for an improvement that was shown."""
        return self.outcome == "improved"


def decide(comparison: Comparison, config: GateConfig, p_value: float | None = None) -> Verdict:
    """The verdict on `comparison`; `p_value` replaces its own, e.g. by one corrected for several comparisons.

    Improved (worse) needs the whole interval above +margin (below -margin), a p-value below alpha
    and at least `min_units` units. Whatever is left is undecidable, with the effect that could have
    been seen.
    """
    found = comparison.difference
    p_value = comparison.p_value if p_value is None else p_value
    figures = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}], p {p_value:.4f}, {found.units} units"
    if found.units < config.min_units:
        return Verdict("undecidable", f"{found.units} units, at least {config.min_units} are needed ({figures})")
    if p_value < config.alpha and found.low > config.margin:
        return Verdict("improved", figures)
    if p_value < config.alpha and found.high < -config.margin:
        return Verdict("worse", figures)
    if config.margin > 0 and -config.margin < found.low and found.high < config.margin:
        return Verdict("undecidable", f"no difference beyond the margin of {config.margin:g} ({figures})")
    return Verdict("undecidable", f"{figures}; an effect of {comparison.detectable:.4f} could have been seen")


def require(name: str, verdict: Verdict) -> None:
    """Return if `verdict` is an improvement; raise `GateError` for worse and for undecidable alike."""
    if not verdict.passed:
        raise GateError(f"{name}: {verdict.outcome}: {verdict.reason}")
