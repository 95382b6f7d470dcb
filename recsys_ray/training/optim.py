"""AdamW with its parameter groups, and the learning rate as a function of how far a run has come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys_ray.config import Config

FACTOR = "factor"   # of the learning rate, in the groups of an optimizer


class OptimConfig(Config):
    """How weights follow their gradients."""

    learning_rate: float = Field(default=2e-5, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)     # of matrices; never of biases and norms
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = Field(default=1e-8, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(default=0.1, ge=0, lt=1)      # share of the run in which the rate rises from 0
    max_grad_norm: float | None = Field(default=1.0, gt=0)  # longer gradients are cut; None: never


def build_optimizer(model: nn.Module, config: OptimConfig, rates: Mapping[str, float] | None = None
                    ) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over the parameters that have a gradient.

    `rates` are factors of the learning rate of the parameters whose names begin so; all others have 1.
    """
    groups: list[dict[str, Any]] = []
    left = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for prefix, factor in {**(rates or {}), "": 1.0}.items():
        own = [left.pop(name) for name in list(left) if name.startswith(prefix)]
        extra = {FACTOR: factor} if prefix else {}
        groups += [{"params": [one for one in own if one.ndim >= 2], "weight_decay": config.weight_decay, **extra},
                   {"params": [one for one in own if one.ndim < 2], "weight_decay": 0.0, **extra}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate,
                             betas=config.betas, eps=config.epsilon, fused=True)


def rate_at(progress: float, config: OptimConfig) -> float:
    """The learning rate when the share `progress`, 0 to 1, of the run is done."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        return config.learning_rate * progress / config.warmup
    rest = (progress - config.warmup) / (1 - config.warmup)
    shape = {"linear": 1 - rest, "cosine": 0.5 * (1 + math.cos(math.pi * rest)), "constant": 1.0}[config.schedule]
    return config.learning_rate * shape


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of the optimizer this learning rate, times the factor of its own."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(FACTOR, 1.0)


def clip(parameters: Iterable[Tensor], longest: float | None) -> float:
    """The length of the gradient over all parameters; a longer one than `longest` is cut to it."""
    with_gradient = [one for one in parameters if one.grad is not None]
    norm = torch.nn.utils.get_total_norm([one.grad for one in with_gradient if one.grad is not None])
    if longest is not None and not norm <= longest:     # a NaN has to pass through here, not by
        torch.nn.utils.clip_grads_with_norm_(with_gradient, longest, norm)
    return float(norm)
