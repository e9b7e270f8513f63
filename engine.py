"""The training step, the motivating pass and evaluation.

Owns device moves, autocast, eval mode and finiteness. Knows no model family, no mixing method, no flags and writes no
files. Nothing here reads a device value outside logging steps: values stay on the device until `Meters` reads them.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import utils
from logs import Meters
from losses import Criterion, Terms
from mixers.interface import Guide, MixedBatch, StepRandom
from models.interface import ImageModel, ModelOutput

Autocast = Callable[[], AbstractContextManager[Any]]
AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class NonFiniteLoss(utils.StopRun):
    """The loss of some batch was not a finite number; no rank has updated anything since."""

    exit_code = 3


def make_autocast(device: torch.device, amp: str) -> Autocast:
    """A factory of autocast contexts for `--amp`: `fp16`, `bf16` or `none`."""
    return partial(torch.autocast, device.type, dtype=AMP_DTYPES.get(amp), enabled=amp != "none")


def make_scaler(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """fp16 needs its loss scaled. Elsewhere the scale stays one and only the scaler's other duty is left: skipping, on
    the device and without a read, an update whose gradient is not finite."""
    if amp == "fp16":
        return torch.amp.GradScaler(device.type)
    never = 2**31 - 1
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=never, enabled=device.type != "mps")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's own training flag is what it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def make_guide(model: ImageModel, autocast: Autocast, call: Callable[..., ModelOutput] | None = None) -> Guide:
    """The motivating pass: `model`, unwrapped, in eval mode, without gradient, under the run's autocast.

    Args:
        call: what to call in the model's place, for instance its compiled form.
    """

    show = model if call is None else call

    def guide(images: Tensor) -> ModelOutput:
        # An autocast context of its own: weights cast under no_grad must not be cached for the pass that learns.
        with eval_mode(model), torch.no_grad(), autocast():
            return show(images, need_attention="image")

    return guide


def make_teacher(model: nn.Module, autocast: Autocast) -> Callable[[Tensor], Tensor]:
    """A frozen network as a function from images (B, C, height, width) to what it gives: logits, or features."""
    model.eval().requires_grad_(False)

    def teacher(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast():
            return model(images)

    return teacher


def settle_labels(model: ImageModel, batch: MixedBatch, autocast: Autocast) -> MixedBatch:
    """The batch with its final labels, outside training: some are known only after the model has seen it."""
    if batch.relabel is None:
        return batch
    with eval_mode(model), torch.no_grad(), autocast():
        return batch.after_forward(model(**batch.forward_inputs()))


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Moves without waiting (from pinned memory)."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


class Seen(NamedTuple):
    """What a report on a failed step will need; device values, not read yet."""

    step: int
    indices: Tensor  # (B,)
    values: Terms


@dataclass
class Training:
    """Everything one optimizer step touches.

    Args:
        model: what the step calls: the model itself, or its DDP or compiled form.
        mixer: images, labels, guide and generators -> `MixedBatch`.
        ema: updated after each step if there is one (timm's `ModelEmaV3`).
        module: the unwrapped model, which `ema` averages.
        accum_steps: micro-batches per optimizer step.
        watch_gradients: a gradient that is not finite stops the run like such a loss. Not so under fp16, where it only
            means that the loss was scaled too far.
        memory_format: of the images, to match the model's.
        after_update: told the number of each step that is done; a schedule by update is.
    """

    module: ImageModel
    model: nn.Module
    criterion: Criterion
    mixer: Callable[[Tensor, Tensor, Guide, StepRandom], MixedBatch]
    guide: Guide
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: Autocast
    processes: utils.Processes
    ema: Any = None
    clip_grad: float | None = None
    accum_steps: int = 1
    seed: int = 0
    train_mode: bool = True
    watch_gradients: bool = True
    after_update: Callable[[int], None] | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    health: Tensor = field(init=False)  # 0; NaN for good once a loss was not finite
    unchecked: deque[Seen] = field(default_factory=deque)  # micro-batches since the last check

    def __post_init__(self) -> None:
        self.health = torch.zeros((), device=self.processes.device)

    def random(self, step: int, micro: int) -> StepRandom:
        """The generators of one micro-batch, from its position alone."""
        shared = utils.keyed_generator("shared", self.seed, step, micro)
        return StepRandom(shared, utils.keyed_generator("mix", self.seed, step, micro, self.processes.rank))

    def syncing(self, micro: int) -> AbstractContextManager[None]:
        """DDP adds gradients over ranks in the last backward of a step only."""
        last = micro == self.accum_steps - 1
        return nullcontext() if last or self.processes.world_size == 1 else cast(Any, self.model).no_sync()

    def stop_if_not_finite(self) -> None:
        """Reads whether any rank's loss (or gradient) was not finite since the last call, and stops all ranks then.

        Raises:
            NonFiniteLoss: with the first such step, its terms and the indices of its images, per rank.
        """
        if self.processes.sum(self.health).isfinite():
            self.unchecked.clear()
            return
        bad = (seen for seen in self.unchecked if not all(value.isfinite() for value in seen.values.values()))
        reports = self.processes.gather(next(map(_describe_failure, bad), None))
        lines = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report]
        raise NonFiniteLoss(
            "the loss is not finite; all ranks stopped before the update.\n  "
            + "\n  ".join(lines)
            + "\n  Try, in this order: --amp bf16, --clip-grad 1.0, a lower --lr."
        )


def _describe_failure(seen: Seen) -> str:
    values = ", ".join(f"{name} {float(value):g}" for name, value in seen.values.items())
    return f"step {seen.step}, {values}; images {seen.indices.tolist()}"


def train_step(
    training: Training, micro_batches: list[tuple[Tensor, Tensor, Tensor]], step: int, meters: Meters
) -> None:
    """One optimizer step.

    Args:
        micro_batches: (images (B, C, height, width), labels (B,), indices (B,)) each, on the host.
        step: number of the step since the beginning of the run; with the rank it keys all of its randomness.
        meters: receives the loss terms as device tensors.
    """
    device = training.processes.device
    for micro, (host_images, host_labels, indices) in enumerate(micro_batches):
        images, labels = to_device(device, host_images, host_labels)
        images = images.contiguous(memory_format=training.memory_format)
        utils.seed_globals("forward", training.seed, step, micro, training.processes.rank)  # dropout, drop path
        batch = training.mixer(images, labels, training.guide, training.random(step, micro))
        with training.syncing(micro):
            with training.autocast():
                output = training.model(**batch.forward_inputs())
            batch = batch.after_forward(output)
            terms = training.criterion(output, batch)
            # A loss that is not finite turns every gradient of this rank into NaN, DDP's sum carries that to all ranks,
            # and the scaler skips their updates on the device: no read, no message between ranks, until the next check.
            training.health += 0.0 * terms["total"].detach()
            loss = terms["total"] * (1.0 + training.health) / training.accum_steps
            training.scaler.scale(loss).backward()
        training.unchecked.append(Seen(step, indices, {name: term.detach() for name, term in terms.items()}))
        meters.update(**_logged(terms, batch, labels))
    norm = update_weights(training)
    if training.watch_gradients:
        training.health += 0.0 * norm
        training.unchecked[-1].values["grad_norm"] = norm
    meters.update(grad_norm=norm)
    if training.after_update is not None:
        training.after_update(step)


def update_weights(training: Training) -> Tensor:
    """Unscale, clip, step, clear, average. Returns the gradient's norm before clipping, on the device."""
    training.scaler.unscale_(training.optimizer)
    held = (parameter for group in training.optimizer.param_groups for parameter in group["params"])
    parameters = [parameter for parameter in held if parameter.grad is not None]
    norm = get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
    if training.clip_grad is not None:
        clip_grads_with_norm_(parameters, training.clip_grad, norm)
    if training.scaler.is_enabled() or bool(norm.isfinite()):
        training.scaler.step(training.optimizer)
        training.scaler.update()
    training.optimizer.zero_grad(set_to_none=True)
    if training.ema is not None:
        training.ema.update(training.module)
    return norm


def _logged(terms: Terms, batch: MixedBatch, labels: Tensor) -> dict[str, Tensor]:
    """The loss terms under the names of the log, and the guide's accuracy on the clean images, which costs nothing."""
    values = {"loss" if name == "total" else f"loss_{name}": term.detach() for name, term in terms.items()}
    if batch.clean_logits is not None and labels.ndim == 1:
        values["clean_acc1"] = (batch.clean_logits.argmax(dim=-1) == labels).float().mean() * 100
    return values


def train_one_epoch(
    training: Training,
    loader: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    first_step: int,
    on_log: Callable[[int, dict[str, float]], None],
    log_every: int = 10,
) -> dict[str, float]:
    """Trains on everything the loader has.

    Args:
        loader: micro-batches; their number is a multiple of `training.accum_steps`.
        first_step: number of this epoch's first step.
        on_log: called with the step and the means since the last call, every `log_every` steps.

    Returns:
        Means over the epoch and all ranks, and `images_per_second` of all ranks together.

    Raises:
        NonFiniteLoss: see `Training.stop_if_not_finite`.
    """
    training.model.train(training.train_mode)
    meters, images, started = Meters(), 0, time.perf_counter()
    batches = iter(loader)
    for step in itertools.count(first_step):
        micro_batches = list(itertools.islice(batches, training.accum_steps))
        if not micro_batches:
            break
        images += sum(len(batch[0]) for batch in micro_batches)
        train_step(training, micro_batches, step, meters)
        if (step + 1) % log_every == 0:
            training.stop_if_not_finite()
            on_log(step, meters.recent())
    training.stop_if_not_finite()
    means = meters.reduce(training.processes).read()
    seconds = time.perf_counter() - started
    return {**means, "images_per_second": images * training.processes.world_size / seconds}


def evaluate_all(training: Training, loader: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Figures of the model, `test_*`, and of its average where there is one, `test_ema_*`; see `evaluate`."""
    models = {"test": training.module}
    if training.ema is not None:
        models["test_ema"] = training.ema.module
    stats = {}
    for prefix, model in models.items():
        figures = evaluate(model, loader, training.processes, training.autocast)
        stats.update({f"{prefix}_{name}": value for name, value in figures.items() if name != "images"})
    return stats


def evaluate(
    model: ImageModel, loader: Iterable[tuple[Tensor, Tensor]], processes: utils.Processes, autocast: Autocast
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and cross entropy over the ranks' shares of a validation set.

    Every image that some rank's loader gives counts once: hits are added, not averages averaged. With fewer than five
    classes `acc5` asks for one of all of them.

    Returns:
        `acc1`, `acc5`, `loss`, and `images`, how many were counted.
    """
    device = next(model.parameters()).device  # an average may live in host memory
    sums = torch.zeros(4, device=device)  # images, top-1 hits, top-5 hits, loss; float32 counts exactly up to 2^24
    with eval_mode(model), torch.no_grad():
        for batch in loader:
            images, labels = to_device(device, *batch)
            with autocast():
                logits = model(images).logits.float()  # (B, K)
            best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]  # (B, 5)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            count = torch.full((), float(len(labels)), device=device)
            sums += torch.stack((count, best[:, 0].sum().float(), best.sum().float(), loss))
    total, top1, top5, loss_sum = processes.sum(sums.to(processes.device)).tolist()
    count = max(total, 1)
    return {"acc1": 100 * top1 / count, "acc5": 100 * top5 / count, "loss": loss_sum / count, "images": total}
