"""timm's optimizers and learning rate schedules, and the average of the weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from errors import InputError, first_of
from utils import is_ordinary

# timm's optimizers that no run can use, by their class, and why.
REFUSED = {
    "Adahessian": "needs second derivatives, which no step computes",
    "Kron": "draws from a generator that is in no checkpoint, so that no run could be resumed",
}


def check_optimizer(name: str) -> None:
    """Refuses an optimizer that timm does not have, or with which a run cannot train and resume.

    Raises:
        InputError: names the reason, and what to use instead.
    """
    advice = "use adamw, sgd, lamb, lion or muon, or another of timm.optim.list_optimizers()"
    if name.lower().startswith("lookahead_"):
        reason = "Lookahead adds to its state after six steps, so that it cannot be resumed"
        raise InputError(f"--opt {name}: {reason}; leave the prefix out")
    if (known := name.lower()) not in (names := list_optimizers()):
        near = difflib.get_close_matches(known, [str(name) for name in names], 3)
        raise InputError(
            f"--opt {name}: timm has no such optimizer; "
            f"{f'did you mean {first_of(near)}?' if near else advice}"
        )
    made_by = get_optimizer_info(known).opt_class
    reason = f"needs {made_by}, with which no run was tested"  # a text: of APEX or bitsandbytes
    if not isinstance(made_by, str):
        reason = REFUSED.get(made_by.__name__, "")
    if reason:
        raise InputError(f"--opt {name}: {reason}; {advice}")


def make_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """timm's optimizer, in its fused form if it has one (AdamW has, for CPU and CUDA).

    One-dimensional parameters, biases and the parameters in the model's `no_weight_decay` get no
    weight decay. With `layer_decay` the layers are those of the model's `group_matcher`, and each
    group has an `lr_scale`, which timm's schedules apply.

    Args:
        settings: keywords of timm's `create_optimizer_v2` (`opt`, `lr`, `weight_decay`, ...).

    Raises:
        InputError: `check_optimizer` refuses the name, or timm a setting.
    """
    check_optimizer(settings["opt"])
    try:
        try:
            return _with_momentum(create_optimizer_v2(model, **settings, fused=True))
        except (TypeError, RuntimeError):  # no fused form
            return create_optimizer_v2(model, **settings)
    except (ValueError, AssertionError, TypeError) as error:
        raise InputError(f"--opt {settings['opt']} with these --opt-* settings: {error}") from error


def _with_momentum(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer, with the momentum of SGD set to 0.

    If the first update is skipped, torch's fused SGD would leave the momentum uninitialised.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else []:
        for parameter in group["params"] if group["momentum"] else []:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def largest_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the last layer and the head; of all parameters without layer decay."""
    return max(group["lr"] for group in optimizer.param_groups)


@torch.no_grad()
def update_average(average: Any, module: nn.Module, was_updated: Tensor) -> None:
    """timm's `ModelEmaV3.update`, except that the average does not change after a skipped step.

    Args:
        average: the `ModelEmaV3`.
        module: the model without wrappers.
        was_updated: 1, or 0 after a skipped step; on the device, and not read on the host.
    """
    averaged, trained = average.module.state_dict(), module.state_dict()
    pairs = list(zip(averaged.values(), trained.values(), strict=True))
    for held, current in pairs:
        if not held.is_floating_point():
            held.copy_(current)
    held, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    weight = ((1.0 - average.decay) * was_updated).to(held[0].device)
    current = [value.to(held[0].device, non_blocking=True) for value in current]
    # Not lerp: if its weight is on the device, it starts one kernel per tensor. These three calls
    # start a few kernels for all tensors.
    change = torch._foreach_sub(current, held)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(held, change)


class Schedule:
    """timm's learning rate schedule. It depends on the run's progress only and has no state.

    By epoch (DeiT): stepped after each epoch with the number of that epoch, so that the rate lags
    by one epoch. By update (Swin; `step_on_epochs` is false): stepped after each update with the
    number of that update.

    Args:
        settings: keywords of timm's `create_scheduler_v2` (`sched`, `num_epochs`, `warmup_epochs`,
            ...).
        steps: updates per epoch.
        done_epochs: number of finished epochs.
        done_updates: number of updates made so far.

    Raises:
        InputError: timm has no such schedule, or the schedule needs a metric.
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
        made: Scheduler | None = None
        try:
            if name != "plateau":
                made, _ = create_scheduler_v2(optimizer, **settings, updates_per_epoch=steps)
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


def highest_rate(settings: dict[str, Any], peak: float, steps: int, updates: int) -> float:
    """The highest learning rate that a run has, by a dry run of its schedule.

    By update, the rate is looked at where epochs begin: there a warm-up ends.

    Args:
        settings: see `Schedule`.
        peak: the learning rate that the schedule starts from.
        steps: updates per epoch.
        updates: number of updates of the run.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule, rates = Schedule(optimizer, settings, steps), [largest_rate(optimizer)]
    for first in range(steps, updates, steps):  # the first update of each further epoch
        schedule.after_epoch(first // steps - 1)
        for update in (first - 1, min(first, updates - 2)):
            schedule.after_update(update)
            rates.append(largest_rate(optimizer))
    schedule.after_update(max(0, updates - 2))
    return max(*rates, largest_rate(optimizer) if updates > 1 else 0.0)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], source: str) -> None:
    """Loads the saved state of an optimizer, but not its settings (learning rate, weight decay).

    The saved state is compared with the state after one step on gradients of 0. Without this check
    a fused kernel could read and write beyond the end of a tensor that is too small. The step
    changes the weights, so call this on a new optimizer, before the weights are loaded.

    Args:
        saved: the optimizer's `state_dict()` from the checkpoint.
        source: the path of the checkpoint, for messages.

    Raises:
        InputError: the state belongs to another optimizer or to other parameters.
    """
    settings = [{**group} for group in optimizer.state_dict()["param_groups"]]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    expected = optimizer.state_dict()
    try:
        saved_states, states = saved["state"].items(), expected["state"]
        wrong = [index for index, state in saved_states if not _fits(state, states[index])]
        groups = []
        group_triples = zip(settings, expected["param_groups"], saved["param_groups"], strict=True)
        for before, after, saved_group in group_triples:
            # Some optimizers count their steps in the group: entries that the step has changed.
            # If every step so far was skipped, an entry that the first step makes is not there yet.
            changed = [name for name in after if name not in before or before[name] != after[name]]
            if not saved["state"]:
                changed = [name for name in changed if name in before]
            counted = {name: saved_group[name] for name in changed}
            wrong += [name for name, value in counted.items() if not _fits(value, after[name])]
            groups.append({**before, **counted})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{source}: its optimizer state is of another optimizer or another model: {error}"
        ) from error
    if wrong:
        names = first_of([str(name) for name in wrong])
        raise InputError(f"{source}: its optimizer state does not fit in {names}")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _fits(saved: Any, expected: Any) -> bool:
    """Whether two parts of optimizer states have the same structure, shapes and kinds of number."""
    if isinstance(expected, Tensor):
        alike = is_ordinary(saved) and saved.is_floating_point() == expected.is_floating_point()
        return alike and saved.shape == expected.shape
    if isinstance(expected, dict):
        return (
            isinstance(saved, dict)
            and saved.keys() == expected.keys()
            and all(_fits(saved[key], expected[key]) for key in expected)
        )
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(saved, type(expected))
            and len(saved) == len(expected)
            and all(map(_fits, saved, expected))
        )
    return type(saved) is type(expected) or {type(saved), type(expected)} <= {int, float}
