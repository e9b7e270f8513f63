"""The training step, the motivating pass and evaluation.

Owns device moves, autocast, eval mode and finiteness. Knows no model family, no mixing method, no
flags and writes no files. Nothing here reads a device value outside logging steps: values stay on
the device until `Meters` reads them. Optimizers without a fused form are the exception: torch's
scaler then reads once per step whether to skip it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import utils
from losses import Criterion, Terms
from mixers.interface import Guide, MixedBatch, StepRandom
from models.interface import Depth, Glance, ImageModel, resample_score
from training import optim
from training.meters import Meters
from training.nonfinite import Health, Seen
from training.precision import Autocast, eval_mode

LOADED = (
    "images",
    "labels",
    "indices",
    "boxes",
    "operations",
)  # what a loader gives: the first three, or all


def make_guide(
    model: ImageModel,
    autocast: Autocast,
    call: Callable[..., Glance] | None = None,
    size: tuple[int, int] | None = None,
    block: Depth = None,
    predict: bool = True,
    grid: tuple[int, int] | None = None,
) -> Guide:
    """The motivating pass: a model, as a rule that under training, unwrapped, in eval mode, without
    gradient.

    Args:
        autocast: the run's, or that of another precision for this pass alone.
        call: what to call in the place of `model.look`, such as its compiled form.
        size: height and width in pixels to show the images at; default: as they are.
        block, predict: where the score is read, and whether the pass goes on to the prediction; see
            `look`.
        grid: where the score is used, if that is not the model's own token grid.
    """
    look, own = call or model.look, model.grid_size

    def guide(images: Tensor) -> Glance:
        # An autocast context of its own: weights cast under no_grad must not be cached for the pass
        # that learns.
        with eval_mode(model), torch.no_grad(), autocast():
            seen = look(images, size, block, predict)
        return (
            seen
            if grid in (None, own)
            else Glance(seen.logits, resample_score(seen.image_attention, own, grid))
        )

    return guide


def make_teacher(model: nn.Module, autocast: Autocast) -> Callable[[Tensor], Tensor]:
    """A frozen network as a function from images (B, C, height, width) to what it gives: logits, or
    features."""
    model.eval().requires_grad_(False)

    def teacher(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast():
            return model(images)

    return teacher


def settle_labels(model: ImageModel, batch: MixedBatch, autocast: Autocast) -> MixedBatch:
    """The batch with its final labels, outside training: some are known only after the model has
    seen it."""
    if batch.relabel is None:
        return batch
    with eval_mode(model), torch.no_grad(), autocast():
        return batch.after_forward(model(**batch.forward_inputs()))


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Moves without waiting (from pinned memory)."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


@dataclass
class Training:
    """Everything one optimizer step touches.

    Args:
        model: what the step calls: the model itself, or its DDP or compiled form.
        mixer: images, labels, guide and generators -> `MixedBatch`.
        ema: updated after each step if there is one (timm's `ModelEmaV3`).
        module: the unwrapped model, which `ema` averages.
        accum_steps: micro-batches per optimizer step.
        health: counts the updates that were left out because they were not finite.
        fixed_scale: the loss is not scaled (all but fp16), so nothing may change its scale of 1.
        memory_format: of the images, to match the model's.
        finish: pixels (B, C, height, width) uint8 and boxes (B, M, 4), both on the device, and
            operations (B, L, 8) on the host -> images as the model takes them: augmented,
            normalised, erased. Float images are taken as they come.
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
    fixed_scale: bool = True
    after_update: Callable[[int], None] | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    finish: Callable[..., Tensor] | None = None
    health: Health = field(default=cast(Any, None))

    def __post_init__(self) -> None:
        self.health = self.health or Health(self.processes)

    def random(self, step: int, micro: int) -> StepRandom:
        """The generators of one micro-batch, from its position alone."""
        shared = utils.keyed_generator("shared", self.seed, step, micro)
        return StepRandom(
            shared, utils.keyed_generator("mix", self.seed, step, micro, self.processes.rank)
        )

    def syncing(self, micro: int) -> AbstractContextManager[None]:
        """DDP adds gradients over ranks in the last backward of a step only."""
        last = micro == self.accum_steps - 1
        return (
            nullcontext()
            if last or self.processes.world_size == 1
            else cast(Any, self.model).no_sync()
        )


def warm_up(training: Training, image_size: tuple[int, int]) -> None:
    """One forward and backward pass through DDP without any effect, before the first step.

    DDP orders its gradient buckets anew after its first pass. A run that goes on begins again with
    the first order, and with three ranks or more would add its gradients in another order than one
    that was never interrupted.

    Args:
        image_size: height and width in pixels.
    """
    if training.processes.world_size == 1:
        return
    wrapped = getattr(training.model, "_orig_mod", training.model)  # not its compiled form
    buffers = {name: value.clone() for name, value in training.module.named_buffers()}
    wrapped.train(training.train_mode)
    with training.autocast():
        images = torch.zeros(2, 3, *image_size, device=training.processes.device)
        output = wrapped(images.contiguous(memory_format=training.memory_format))
    given = [logits for logits in (output.logits, output.distillation_logits) if logits is not None]
    (0.0 * torch.stack([logits.float().sum() for logits in given]).sum()).backward()
    training.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, value in training.module.named_buffers():
            value.copy_(buffers[name])


def receive(
    training: Training, micro_batch: tuple[Tensor, ...], step: int, micro: int
) -> tuple[Tensor, Tensor]:
    """Images and labels of one micro-batch on the device; pixels are finished there, with noise
    keyed by the step."""
    host_images, host_labels, _, *rest = micro_batch
    images, labels, *boxes = to_device(
        training.processes.device, host_images, host_labels, *rest[:1]
    )
    images = images.contiguous(memory_format=training.memory_format)
    if not images.is_floating_point():
        assert training.finish is not None, "pixels need `finish`"
        utils.seed_globals("erase", training.seed, step, micro, training.processes.rank)
        images = training.finish(images, *boxes, *rest[1:])
    return images, labels


def train_step(
    training: Training, micro_batches: list[tuple[Tensor, ...]], step: int, meters: Meters
) -> None:
    """One optimizer step.

    Args:
        micro_batches: (images (B, C, height, width), labels (B,), indices (B,)) each, on the host;
            with uint8 images also the boxes (B, M, 4) to erase and the operations (B, L, 8).
        step: number of the step since the beginning of the run; with the rank it keys all of its
            randomness.
        meters: receives the loss terms as device tensors.
    """
    for micro, micro_batch in enumerate(micro_batches):
        meters.update(**_learn(training, micro_batch, step, micro))
    meters.update(grad_norm=update_weights(training))
    if training.after_update is not None:
        training.after_update(step)


def _learn(
    training: Training, micro_batch: tuple[Tensor, ...], step: int, micro: int
) -> dict[str, Tensor]:
    """Adds the gradients of one micro-batch; returns what the log has of it. Nothing else of it
    stays in memory, but what a report would need, until the next one comes."""
    training.health.let_go()
    images, labels = receive(training, micro_batch, step, micro)
    utils.seed_globals(
        "forward", training.seed, step, micro, training.processes.rank
    )  # dropout, drop path
    batch = training.mixer(images, labels, training.guide, training.random(step, micro))
    with training.syncing(micro):
        with training.autocast():
            output = training.model(**batch.forward_inputs())
        batch = batch.after_forward(output)
        terms = training.criterion(output, batch)
        seen = Seen(step, micro_batch[2], {name: term.detach() for name, term in terms.items()})
        mixed = {"mixed_images": batch.images, "mixed_labels": batch.labels}
        factor = training.health.watch(seen, dict(zip(LOADED, micro_batch, strict=False)), mixed)
        training.scaler.scale(terms["total"] * factor / training.accum_steps).backward()
    return _logged(terms, batch, labels)


def update_weights(training: Training) -> Tensor:
    """Unscale, clip, step, clear, average. Returns the gradient's norm before clipping, on the
    device.

    Where the norm is not finite nothing changes: no weight, no average, no state of the optimizer.
    """
    training.scaler.unscale_(training.optimizer)
    held = (parameter for group in training.optimizer.param_groups for parameter in group["params"])
    parameters = [parameter for parameter in held if parameter.grad is not None]
    norm = get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
    if training.clip_grad is not None:
        clip_grads_with_norm_(parameters, training.clip_grad, norm)
    if training.scaler.is_enabled() or bool(norm.isfinite()):
        training.scaler.step(training.optimizer)
        training.scaler.update(
            1.0 if training.fixed_scale and training.scaler.is_enabled() else None
        )
    training.optimizer.zero_grad(set_to_none=True)
    good = training.health.count(norm)
    if training.ema is not None:
        optim.update_average(training.ema, training.module, good)
    return norm


def _logged(terms: Terms, batch: MixedBatch, labels: Tensor) -> dict[str, Tensor]:
    """The loss terms under the names of the log, and the guide's accuracy on the clean images,
    which costs nothing."""
    values = {
        "loss" if name == "total" else f"loss_{name}": term.detach() for name, term in terms.items()
    }
    if batch.clean_logits is not None and labels.ndim == 1:
        values["clean_acc1"] = (batch.clean_logits.argmax(dim=-1) == labels).float().mean() * 100
    return values


def train_one_epoch(
    training: Training,
    loader: Iterable[tuple[Tensor, ...]],
    *,
    first_step: int,
    meters: Meters,
    on_log: Callable[[int, dict[str, float], str | None], None],
    after_step: Callable[[Tensor], bool] = lambda indices: False,
    log_every: int = 10,
) -> bool:
    """Trains on everything the loader has, or until it is told to stop.

    Args:
        loader: micro-batches; their number is a multiple of `training.accum_steps`.
        first_step: number of the first step, since the beginning of the run.
        meters: receives the loss terms; goes on where an interrupted epoch left it.
        on_log: called every `log_every` steps with the step, the means since the last call, and
            what is to be said of updates that were left out; also, without means, where so many
            could have been left out in a row that training ends.
        after_step: called after each step with the indices of its images (B * accum_steps,), on the
            host; true stops.

    Returns:
        Whether it was told to stop.

    Raises:
        NonFiniteLoss: see `training.nonfinite.Health.check`.
    """
    training.model.train(training.train_mode)
    batches = iter(loader)
    for step in itertools.count(first_step):
        micro_batches = list(itertools.islice(batches, training.accum_steps))
        if not micro_batches:
            break
        train_step(training, micro_batches, step, meters)
        is_logged = (step + 1) % log_every == 0
        if is_logged or (step + 1) % training.health.limit == 0:
            on_log(step, meters.recent() if is_logged else {}, training.health.check())
        if after_step(torch.cat([batch[2] for batch in micro_batches])):
            return True
    return False


def evaluate_all(training: Training, loader: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Figures of the model, `test_*`, and of its average where there is one, `test_ema_*`; see
    `evaluate`."""
    models = {"test": training.module}
    if training.ema is not None:
        models["test_ema"] = training.ema.module
    stats = {}
    for prefix, model in models.items():
        figures = evaluate(model, loader, training.processes, training.autocast)
        stats.update(
            {f"{prefix}_{name}": value for name, value in figures.items() if name != "images"}
        )
    return stats


def evaluate(
    model: ImageModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    processes: utils.Processes,
    autocast: Autocast,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and cross entropy over the ranks' shares of a validation
    set.

    Every image that some rank's loader gives counts once: hits are added, not averages averaged.
    With fewer than five classes `acc5` asks for one of all of them.

    Returns:
        `acc1`, `acc5`, `loss`, and `images`, how many were counted.
    """
    device = next(model.parameters()).device  # an average may live in host memory
    sums = torch.zeros(
        4, device=device
    )  # images, top-1 hits, top-5 hits, loss; float32 counts exactly up to 2^24
    with eval_mode(model), torch.no_grad():
        for batch in loader:
            images, labels = to_device(device, *batch)
            with autocast():
                logits = model(images).logits.float()  # (B, K)
            best = (
                logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
            )  # (B, 5)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            count = torch.full((), float(len(labels)), device=device)
            sums += torch.stack((count, best[:, 0].sum().float(), best.sum().float(), loss))
    total, top1, top5, loss_sum = processes.sum(sums.to(processes.device)).tolist()
    count = max(total, 1)
    return {
        "acc1": 100 * top1 / count,
        "acc5": 100 * top5 / count,
        "loss": loss_sum / count,
        "images": total,
    }
