"""Optimizer and learning rate through timm's factories, and averaged weights. Knows no flags and no training step."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

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
            return _with_momentum(create_optimizer_v2(model, **settings, fused=True))
        except (TypeError, RuntimeError):  # it has none
            return create_optimizer_v2(model, **settings)
    except (ValueError, AssertionError, TypeError) as error:
        raise InputError(f"--opt {settings.get('opt')} with these --opt-* settings: {error}") from error


def _with_momentum(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """SGD begins with momentum 0: torch's fused form leaves it uninitialised where the very first update is skipped."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else []:
        for parameter in group["params"] if group["momentum"] else []:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@torch.no_grad()
def update_average(average: Any, module: nn.Module, good: Tensor) -> None:
    """timm's `ModelEmaV3.update`, but for a step that was left out: then the average stays as it is.

    Args:
        good: 1 or 0, on the device; it is not read.
    """
    pairs = list(zip(average.module.state_dict().values(), module.state_dict().values(), strict=True))
    for held, current in pairs:
        if not held.is_floating_point():
            held.copy_(current)
    held, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    weight = ((1.0 - average.decay) * good).to(held[0].device)
    current = [value.to(held[0].device, non_blocking=True) for value in current]
    # Not lerp: with a weight on the device that is a kernel for each tensor, these are a few for all.
    change = torch._foreach_sub(current, held)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(held, change)


class Schedule:
    """timm's schedule of learning rates, a function of how far a run is and no state to save.

    By epoch (DeiT): stepped after each epoch with that epoch's number, so that rates lag by one epoch. By update (Swin;
    `step_on_epochs` false): stepped after each update with that update's number.

    Args:
        settings: keywords of timm's `create_scheduler_v2` (`sched`, `num_epochs`, `warmup_epochs`, ...).
        steps: updates per epoch.
        done_epochs, done_updates: how many of either are done already.

    Raises:
        InputError: a schedule that timm does not have or that needs a metric.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        steps: int,
        done_epochs: int = 0,
        done_updates: int = 0,
    ) -> None:
        name, self.by_epoch = settings.get("sched"), settings.get("step_on_epochs", True)
        try:
            made = None if name == "plateau" else create_scheduler_v2(optimizer, **settings, updates_per_epoch=steps)[0]
        except (ValueError, AssertionError, TypeError) as error:
            raise InputError(f"--sched {name} with these settings: {error}") from error
        if made is None:
            raise InputError(f"--sched {name}: not offered; use cosine, tanh, step, multistep or poly")
        self.timm: Scheduler = made
        if done_epochs:
            self.after_epoch(done_epochs - 1)
        if done_updates:
            self.after_update(done_updates - 1)

    def after_epoch(self, epoch: int) -> None:
        if self.by_epoch:
            self.timm.step(epoch)

    def after_update(self, update: int) -> None:
        if not self.by_epoch:
            self.timm.step_update(update)
