"""Optimizer and learning rate through timm's factories. Knows no flags and no training step."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from utils import InputError


def scale_rate(rate: float, total_batch: int) -> float:
    """DeiT's linear rule: `rate` is meant for a total batch of 512 images."""
    return rate * total_batch / 512


def make_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """timm's optimizer, fused where it has such a form (AdamW: one kernel per step, on CPU too).

    One-dimensional parameters, biases and what the model names in `no_weight_decay` are not decayed.

    Args:
        settings: keywords of timm's `create_optimizer_v2` (`opt`, `lr`, `weight_decay`, ...).

    Raises:
        InputError: timm does not know the optimizer or one of its settings.
    """
    try:
        try:
            return create_optimizer_v2(model, **settings, fused=True)
        except (TypeError, RuntimeError):  # it has none
            return create_optimizer_v2(model, **settings)
    except (ValueError, AssertionError, TypeError) as error:
        raise InputError(f"--opt {settings.get('opt')} with these --opt-* settings: {error}") from error


def make_schedule(optimizer: torch.optim.Optimizer, settings: dict[str, Any], last_epoch: int = -1) -> Scheduler:
    """timm's schedule, to be stepped after each epoch with that epoch's number, as DeiT does: rates lag by one epoch.

    Args:
        settings: keywords of timm's `create_scheduler_v2` (`sched`, `num_epochs`, `warmup_epochs`, ...).
        last_epoch: the last epoch that is done, -1 for none. The schedule is a function of it, not a state to save.

    Raises:
        InputError: a schedule that timm does not have or that needs a metric.
    """
    name = settings.get("sched")
    try:
        schedule = None if name == "plateau" else create_scheduler_v2(optimizer, **settings)[0]
    except (ValueError, AssertionError, TypeError) as error:
        raise InputError(f"--sched {name} with these settings: {error}") from error
    if schedule is None:
        raise InputError(f"--sched {name}: not offered; use cosine, tanh, step, multistep or poly")
    if last_epoch >= 0:
        schedule.step(last_epoch)
    return schedule
