"""The training step, the motivating pass and evaluation.

Owns device moves, autocast, eval mode and non-finite values. Knows no model family, no mixing
method and no flags, and writes no files. Nothing here reads a device value outside logging steps:
values stay on the device until `Meters` reads them. Optimizers without a fused form are the
exception: torch's scaler then reads once per step whether to skip it.

Letters: B batch, C channels, H height, W width, K classes, M boxes, L operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import utils
from errors import InputError
from losses import Criterion, Terms
from mixers.interface import Guide, MixedBatch, StepRandom
from mixers.switch import Switch
from models.interface import GuideOutput, ImageModel, ScoreBlock, resample_score
from pipeline.samples import Batch
from training import optim
from training.buffers import Buffers
from training.meters import Meters
from training.nonfinite import NonFiniteGuard
from training.precision import Autocast, eval_mode


def make_guide(
    model: ImageModel,
    autocast: Autocast,
    call: Callable[..., GuideOutput] | None = None,
    size: tuple[int, int] | None = None,
    block: ScoreBlock = None,
    predict: bool = True,
    grid: tuple[int, int] | None = None,
) -> Guide:
    """The guide: clean images (B, C, H, W) -> their score and logits.

    It runs the motivating pass: one forward pass in eval mode without gradients, normally through
    the (unwrapped) model being trained.

    Args:
        model: the motivator.
        autocast: the run's own, or that of another precision for this pass alone.
        call: called instead of `model.motivating_pass`, such as its compiled form.
        size: height and width in pixels to which the images are resized; default: not resized.
        block: the block whose attention is the score; default: the last.
        predict: false ends the pass where the score is known; there are no logits then.
        grid: the grid that the score is wanted on, if it is not the model's own.
    """
    motivating_pass, own_grid = call or model.motivating_pass, model.grid_size

    def guide(images: Tensor) -> GuideOutput:
        # Its own autocast context: a weight that is cast here, without gradient, must not be taken
        # from autocast's cache in the forward pass that needs its gradient.
        with eval_mode(model), torch.no_grad(), autocast():
            output = motivating_pass(images, size, block, predict)
        if grid in (None, own_grid):
            return output
        score = resample_score(output.image_attention, own_grid, grid)
        return GuideOutput(output.logits, score)

    return guide


def make_teacher(model: nn.Module, autocast: Autocast) -> Callable[[Tensor], Tensor]:
    """A frozen network as a function without gradient: images -> its logits or features."""
    model.eval().requires_grad_(False)

    def teacher(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast():
            return model(images)

    return teacher


def settle_labels(model: ImageModel, batch: MixedBatch, autocast: Autocast) -> MixedBatch:
    """The batch with its final labels, outside training: some need a forward pass (TransMix)."""
    if batch.relabel is None:
        return batch
    with eval_mode(model), torch.no_grad(), autocast():
        return batch.after_forward(model(**batch.forward_inputs()))


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies to the device; from pinned memory the host does not wait."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


@dataclass
class Training:
    """Everything one optimizer step needs.

    Args:
        module: the model without wrappers, which `ema` averages.
        model: what the step calls: `module` itself, or its DDP or compiled form.
        mixer: clean images and labels, guide and generators -> `MixedBatch`.
        ema: the average (timm's `ModelEmaV3`), updated after each step; None for none.
        accum_steps: micro-batches per step.
        nonfinite: skips steps whose gradient is NaN or inf, and counts them.
        fixed_scale: the loss is not scaled (all but fp16), so the scaler must keep its scale of 1.
        memory_format: of the images; the model's.
        finish: (images (B, C, H, W) uint8 and boxes (B, M, 4) on the device, operations (B, L, 8)
            on the host) -> images as the model takes them: augmented, normalised, erased.
        before_step: called with the step number before its first micro-batch, as a criterion wants.
        after_update: called with the step number after every update, such as a schedule's.
    """

    module: ImageModel
    model: nn.Module
    criterion: Criterion
    mixer: Switch
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
    before_step: Callable[[int], None] | None = None
    after_update: Callable[[int], None] | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    finish: Callable[..., Tensor] | None = None
    nonfinite: NonFiniteGuard = field(default=cast(Any, None))

    def __post_init__(self) -> None:
        self.nonfinite = self.nonfinite or NonFiniteGuard(self.processes)
        self.buffers = Buffers(self.module, self.processes)

    def random(self, step: int, micro: int) -> StepRandom:
        """The generators of one micro-batch, keyed by its place alone."""
        shared = utils.keyed_generator("shared", self.seed, step, micro)
        own = utils.keyed_generator("mix", self.seed, step, micro, self.processes.rank)
        return StepRandom(shared, own)

    def sync_gradients(self, micro: int) -> AbstractContextManager[None]:
        """DDP sums gradients over ranks in the last backward of a step only."""
        is_last = micro == self.accum_steps - 1
        if is_last or self.processes.world_size == 1:
            return nullcontext()
        return cast(Any, self.model).no_sync()


# ------------------------------------------------------------------------------------- the step


def train_step(training: Training, batches: Sequence[Batch], step: int, meters: Meters) -> None:
    """One optimizer step: the paper's Eq. 15 on each micro-batch, then one update.

    Args:
        batches: the micro-batches, on the host.
        step: its number since the beginning of the run; with the rank it keys all randomness.
        meters: receives the loss terms as device tensors.
    """
    if training.before_step is not None:
        training.before_step(step)
    training.buffers.begin_step()
    for micro, batch in enumerate(batches):
        meters.update(**forward_backward(training, batch, step, micro))
    meters.update(grad_norm=update_weights(training))
    if training.after_update is not None:
        training.after_update(step)


def forward_backward(training: Training, batch: Batch, step: int, micro: int) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch. Returns its loss terms for the log."""
    # The last micro-batch was kept for a report on non-finite values; this one needs its memory.
    training.nonfinite.release()

    # Receive: pixels to the device, augmented and normalised there.
    images, labels = receive(training, batch, step, micro)

    # Mix (Sec. 4.1). The mixer calls the guide if it needs it: the model's score and logits on the
    # clean images, from one extra forward pass without gradient.
    utils.seed_globals("forward", training.seed, step, micro, training.processes.rank)
    mixed = training.mixer(images, labels, training.guide, training.random(step, micro))

    with training.sync_gradients(micro):
        # Forward: logits of the mixed images and, where the batch has a mask, of its two regions.
        with training.autocast():
            output = training.model(**mixed.forward_inputs())
        mixed = mixed.after_forward(output)  # TransMix's labels depend on this forward pass

        # Loss, in float32: L_total = L_cls + L_fine + L_con (Eq. 15).
        terms = training.criterion(output, mixed)

        # A loss that is NaN or inf makes all gradients of this step NaN, and the step is skipped.
        loss = training.nonfinite.guard(terms, step, batch, mixed)

        # Backward. Micro-batches add up to the mean gradient of the step. Activations that are
        # computed again here must not update batch norm a second time.
        buffers = training.buffers.read()
        training.scaler.scale(loss / training.accum_steps).backward()
        training.buffers.write(buffers)
    return loss_terms(terms, mixed, labels)


def receive(training: Training, batch: Batch, step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) and labels of one micro-batch, on the device.

    Float images are taken as they are. Pixels are finished there: RandAugment if it was left to
    the device, normalised, erased. The noise that fills erased boxes is keyed by the step.
    """
    images, labels = to_device(training.processes.device, batch.images, batch.labels)
    images = images.contiguous(memory_format=training.memory_format)
    if images.is_floating_point():
        return images, labels
    assert training.finish is not None, "pixels need `finish`"
    (boxes,) = to_device(training.processes.device, cast(Tensor, batch.boxes))
    utils.seed_globals("erase", training.seed, step, micro, training.processes.rank)
    return training.finish(images, boxes, batch.operations), labels


def update_weights(training: Training) -> Tensor:
    """Unscale, clip, step, clear, average. Returns the gradient's norm before clipping.

    The norm stays on the device. Where it is not finite nothing changes: no weight, no buffer, no
    average, no state of the optimizer.
    """
    groups = training.optimizer.param_groups
    held = (parameter for group in groups for parameter in group["params"])
    parameters = [parameter for parameter in held if parameter.grad is not None]
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    norm = get_total_norm(gradients)
    # The scaler skips a step by the values of the gradient. If only their norm overflows, it must
    # see NaN, or it would make a step that counts as skipped.
    gradients[0].add_(0.0 * norm)
    training.scaler.unscale_(training.optimizer)
    norm = norm / training.scaler.scale(torch.ones_like(norm))
    if training.clip_grad is not None:
        clip_grads_with_norm_(parameters, training.clip_grad, norm)
    if training.scaler.is_enabled() or bool(norm.isfinite()):
        training.scaler.step(training.optimizer)
        keep_scale = training.fixed_scale and training.scaler.is_enabled()
        training.scaler.update(1.0 if keep_scale else None)
    training.optimizer.zero_grad(set_to_none=True)
    was_updated = training.nonfinite.count(norm)
    training.buffers.end_step(was_updated)
    if training.ema is not None:
        optim.update_average(training.ema, training.module, was_updated)
    return norm


def loss_terms(terms: Terms, mixed: MixedBatch, labels: Tensor) -> dict[str, Tensor]:
    """The loss terms under the names of the log, and the guide's top-1 on the clean images."""
    values = {
        "loss" if name == "total" else f"loss_{name}": term.detach() for name, term in terms.items()
    }
    if mixed.clean_logits is not None and labels.ndim == 1:
        values["clean_acc1"] = (mixed.clean_logits.argmax(dim=-1) == labels).float().mean() * 100
    return values


# ------------------------------------------------------------------------------ epochs, evaluation


def train_one_epoch(
    training: Training,
    loader: Iterable[Batch],
    *,
    first_step: int,
    meters: Meters,
    on_log: Callable[[int, dict[str, float], str | None], None],
    after_step: Callable[[list[Batch]], bool] = lambda batches: False,
    log_every: int = 10,
) -> bool:
    """Trains on every batch of the loader, or until `after_step` says stop.

    Args:
        loader: micro-batches; their number is a multiple of `training.accum_steps`.
        first_step: number of the first step, since the beginning of the run.
        meters: receives the loss terms; it may hold those of the epoch's first part already.
        on_log: called every `log_every` steps with the step, the means since the last call, and a
            warning about skipped steps or None. It is also called, with empty means, when so many
            steps may have been skipped in a row that the run must end.
        after_step: called after each step with its micro-batches, on the host; true stops.

    Returns:
        Whether `after_step` stopped it.

    Raises:
        NonFiniteLoss: see `training.nonfinite.NonFiniteGuard.check`.
    """
    training.model.train(training.train_mode)
    micro_batches = iter(loader)
    for step in itertools.count(first_step):
        batches = list(itertools.islice(micro_batches, training.accum_steps))
        if not batches:
            break
        train_step(training, batches, step, meters)
        is_logged = (step + 1) % log_every == 0
        if is_logged or (step + 1) % training.nonfinite.limit == 0:
            on_log(step, meters.recent() if is_logged else {}, training.nonfinite.check())
        if after_step(batches):
            return True
    return False


def warm_up(training: Training, image_size: tuple[int, int]) -> None:
    """One forward and backward pass through DDP without any effect, before the first step.

    DDP orders its gradient buckets anew after its first pass. A resumed run starts with the first
    order again. With three ranks or more it would therefore add gradients in another order than a
    run that was never interrupted.

    Args:
        image_size: height and width in pixels.
    """
    if training.processes.world_size == 1:
        return
    wrapped = getattr(training.model, "_orig_mod", training.model)  # not its compiled form
    buffers = training.buffers.read()
    wrapped.train(training.train_mode)
    with training.autocast():
        images = torch.zeros(2, 3, *image_size, device=training.processes.device)
        output = wrapped(images.contiguous(memory_format=training.memory_format))
    given = [part for part in (output.logits, output.distillation_logits) if part is not None]
    (0.0 * torch.stack([logits.float().sum() for logits in given]).sum()).backward()
    training.optimizer.zero_grad(set_to_none=True)
    training.buffers.write(buffers)


def evaluate_all(training: Training, loader: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Figures of the model, `test_*`, and of its average if there is one, `test_ema_*`."""
    models = {"test": training.module}
    if training.ema is not None:
        models["test_ema"] = training.ema.module
    stats = {}
    for prefix, model in models.items():
        figures = evaluate(model, loader, training.processes, training.autocast)
        for name in ("acc1", "acc5", "loss"):
            stats[f"{prefix}_{name}"] = figures[name]
    return stats


def evaluate(
    model: ImageModel,
    loader: Iterable[tuple[Tensor, Tensor]],
    processes: utils.Processes,
    autocast: Autocast,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and mean cross entropy over all ranks' images.

    Each image counts once: hits are summed over ranks, averages are not averaged. With fewer than
    five classes `acc5` counts a hit in any of them.

    Returns:
        `acc1`, `acc5`, `loss`, and `images`, their number.

    Raises:
        InputError: there was no image, on all ranks.
    """
    device = next(model.parameters()).device  # an average may live in host memory
    # Images, top-1 hits, top-5 hits, loss; float32 counts exactly up to 2^24.
    sums = torch.zeros(4, device=device)
    with eval_mode(model), torch.no_grad():
        for batch in loader:
            images, labels = to_device(device, *batch)
            with autocast():
                logits = model(images).logits.float()  # (B, K)
            indices = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
            best = indices == labels[:, None]  # (B, 5)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            count = torch.full((), float(len(labels)), device=device)
            sums += torch.stack((count, best[:, 0].sum().float(), best.sum().float(), loss))
    total, top1, top5, loss_sum = processes.sum(sums.to(processes.device)).tolist()
    if not total:
        raise InputError(
            "no image was evaluated: the data set gave none; a stream leaves out images that it "
            "cannot read, with a warning of its own for each"
        )
    return {
        "acc1": 100 * top1 / total,
        "acc5": 100 * top5 / total,
        "loss": loss_sum / total,
        "images": total,
    }
