"""Optimizer and learning rate through timm's factories, and averaged weights. Knows no flags and no
training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from utils import InputError, first_of, is_ordinary


def scale_rate(rate: float, total_batch: int) -> float:
    """DeiT's linear rule: `rate` is meant for a total batch of 512 images."""
    return rate * total_batch / 512


def make_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """timm's optimizer, fused where it has such a form (AdamW: one kernel per step, on CPU too).

    One-dimensional parameters, biases and what the model names in `no_weight_decay` are not
    decayed.

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
        raise InputError(
            f"--opt {settings.get('opt')} with these --opt-* settings: {error}"
        ) from error


def _with_momentum(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """SGD begins with momentum 0: torch's fused form leaves it uninitialised where the very first
    update is skipped."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else []:
        for parameter in group["params"] if group["momentum"] else []:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@torch.no_grad()
def update_average(average: Any, module: nn.Module, good: Tensor) -> None:
    """timm's `ModelEmaV3.update`, but for a step that was left out: then the average stays as it
    is.

    Args:
        good: 1 or 0, on the device; it is not read.
    """
    pairs = list(
        zip(average.module.state_dict().values(), module.state_dict().values(), strict=True)
    )
    for held, current in pairs:
        if not held.is_floating_point():
            held.copy_(current)
    held, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    weight = ((1.0 - average.decay) * good).to(held[0].device)
    current = [value.to(held[0].device, non_blocking=True) for value in current]
    # Not lerp: with a weight on the device that is a kernel for each tensor, these are a few for
    # all.
    change = torch._foreach_sub(current, held)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(held, change)


class Schedule:
    """timm's schedule of learning rates, a function of how far a run is and no state to save.

    By epoch (DeiT): stepped after each epoch with that epoch's number, so that rates lag by one
    epoch. By update (Swin; `step_on_epochs` false): stepped after each update with that update's
    number.

    Args:
        settings: keywords of timm's `create_scheduler_v2` (`sched`, `num_epochs`, `warmup_epochs`,
            ...).
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
            made = (
                None
                if name == "plateau"
                else create_scheduler_v2(optimizer, **settings, updates_per_epoch=steps)[0]
            )
        except (ValueError, AssertionError, TypeError) as error:
            raise InputError(f"--sched {name} with these settings: {error}") from error
        if made is None:
            raise InputError(
                f"--sched {name}: not offered; use cosine, tanh, step, multistep or poly"
            )
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


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], source: str) -> None:
    """Puts back what an optimizer has gathered; its settings (learning rate, weight decay, ...)
    stay its own.

    To be called on a new one, before the weights are loaded: it takes a step on gradients of 0,
    which shows what its state looks like. A fused kernel would go by that and read, and write,
    beyond a smaller tensor.

    Args:
        saved: its `state_dict()`.

    Raises:
        InputError: that is of another optimizer, or of other parameters.
    """
    settings = [{**group} for group in optimizer.state_dict()["param_groups"]]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    own = optimizer.state_dict()
    try:
        odd = [
            index
            for index, entries in saved["state"].items()
            if not _fits(entries, own["state"][index])
        ]
        groups = []
        for before, after, there in zip(
            settings, own["param_groups"], saved["param_groups"], strict=True
        ):
            counted = {
                name: there[name]
                for name in after
                if name not in before or before[name] != after[name]
            }
            odd += [name for name, value in counted.items() if not _fits(value, after[name])]
            groups.append({**before, **counted})  # some count their steps there
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{source}: its optimizer state is of another optimizer or another model: {error}"
        ) from error
    if odd:
        raise InputError(
            f"{source}: its optimizer state does not fit in {first_of([str(name) for name in odd])}"
        )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _fits(saved: Any, own: Any) -> bool:
    """Whether a piece of an optimizer's state is made like another."""
    if isinstance(own, Tensor):
        alike = is_ordinary(saved) and saved.is_floating_point() == own.is_floating_point()
        return alike and saved.shape == own.shape
    if isinstance(own, dict):
        return (
            isinstance(saved, dict)
            and saved.keys() == own.keys()
            and all(_fits(saved[key], own[key]) for key in own)
        )
    if isinstance(own, (list, tuple)):
        return (
            isinstance(saved, type(own)) and len(saved) == len(own) and all(map(_fits, saved, own))
        )
    return type(saved) is type(own) or {type(saved), type(own)} <= {int, float}
