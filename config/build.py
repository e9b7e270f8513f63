"""Makes the objects of a run from the resolved flags: data, model, loss, mixer, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from timm.optim import optimizer_kwargs
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import datasets
import engine
import utils
from config.build_guide import make_guide, uses_predictions
from config.build_mixer import build_mixer
from config.resolve import Flags, model_config, peak_rate
from config.second_networks import (
    build_feature_map,
    build_teacher,
    check_motivator_classes,
    describe_files,
)
from errors import InputError
from losses import Criterion, DistillationLoss, SMMixLoss
from mixers.interface import MixerContext
from mixers.switch import Switch
from models.build import (
    build_model,
    use_distillation,
    use_float32_attention,
    use_grad_checkpointing,
)
from models.interface import ImageModel
from models.weights import load_foreign
from pipeline import erasing, loaders, samples, transforms
from pipeline.images import pick_decoder, take_subset
from pipeline.spec import Augment, ImageSpec
from samplers import count_groups
from storage.checkpoints import ReadCheckpoint
from training import optim, precision
from training.nonfinite import NonFiniteGuard
from training.total_batch import scale_rate
from utils import Processes


def make_model(
    flags: Flags,
    num_classes: int,
    processes: Processes,
    say: Callable[[str], None],
    read: ReadCheckpoint | None,
) -> ImageModel:
    """The model on its device, the same on all ranks.

    Args:
        say: prints the notes on the weights of `--finetune`.
        read: reads the file of `--finetune`. None for a run that is resumed: the weights stay
            initial until its checkpoint is loaded.
    """
    utils.seed_globals("init", flags.seed)
    model = build_model(**model_config(flags, num_classes))
    if flags.distillation_type != "none":
        use_distillation(model, flags.model)
    if flags.grad_checkpointing:
        use_grad_checkpointing(model, flags.model)
    if flags.attn_fp32:
        use_float32_attention(model, flags.model)
    if flags.finetune and read is not None:
        notes = load_foreign(model, read(flags.finetune), flags.finetune)
        say("\n  ".join([f"weights from {flags.finetune}", *notes]))
    model.to(processes.device)
    return model.to(memory_format=memory_format(flags))


def memory_format(flags: Flags) -> torch.memory_format:
    """The memory format of images and convolutions."""
    return torch.channels_last if flags.channels_last else torch.contiguous_format


def open_images(flags: Flags, train: bool, read: ReadCheckpoint) -> Any:
    """The images for training or for evaluation; `--subset` and `--val-subset` take a part of them.

    Raises:
        InputError: the data cannot be opened, or `--motivator` predicts other classes.
    """
    images = datasets.open_images(
        flags.data_set,
        flags.data_path,
        train,
        inat_category=flags.inat_category,
        num_classes=flags.nb_classes,
        batch_size=flags.batch_size,
        seed=flags.seed,
        decode=pick_decoder(flags.decoder if train else "pillow"),
    )
    if train and flags.motivator not in ("self", "ema") and uses_predictions(flags):
        check_motivator_classes(flags.motivator, images.class_names, read)
    count = flags.subset if train else flags.val_subset
    flag = "--subset" if train else "--val-subset"
    return images if count is None else take_subset(images, count, flag)


def make_eval_loader(flags: Flags, val: Any, spec: ImageSpec, processes: Processes) -> Any:
    """The loader of this rank's share of the evaluation images."""
    return loaders.build_eval_loader(
        samples.eval_samples(val, transforms.build_eval_transform(spec)),
        batch_size=int(1.5 * flags.batch_size),
        rank=processes.rank,
        world_size=processes.world_size,
        num_workers=flags.num_workers,
        pin_memory=flags.pin_mem and processes.device.type == "cuda",
        timeout=flags.data_timeout,
    )


def make_train_loader(flags: Flags, train: Any, spec: ImageSpec, processes: Processes) -> Any:
    """The loader of this rank's share of the training images.

    Raises:
        InputError: the device or the data set does not support a flag.
    """
    augment = Augment(
        aa=flags.aa,
        color_jitter=flags.color_jitter,
        reprob=flags.reprob,
        remode=flags.remode,
        recount=flags.recount,
        interpolation=flags.train_interpolation,
        resize=flags.resize,
        randaugment=flags.randaugment,
        src=flags.src,
    )
    if augment.randaugment == "device" and processes.device.type == "mps":
        raise InputError(
            "--randaugment device: needs float64, but mps has no float64; use --randaugment cpu"
        )
    transform = transforms.build_train_transform(
        spec, datasets.augment_for(flags.data_set, augment)
    )
    erase = erasing.Erasing(augment.reprob, augment.recount)
    return loaders.build_train_loader(
        samples.train_samples(train, transform, flags.seed, flags.skip_corrupt, erase),
        seed=flags.seed,
        batch_size=flags.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        num_workers=flags.num_workers,
        repeats=repeats_of(flags),
        layout=flags.repeat_layout,
        accum_steps=flags.accum_steps,
        pin_memory=flags.pin_mem and processes.device.type == "cuda",
        timeout=flags.data_timeout,
    )


def repeats_of(flags: Flags) -> int:
    """How many views of each image an epoch has."""
    return flags.repeats if flags.repeated_aug else 1


def make_loss(flags: Flags, steps: int) -> SMMixLoss:
    """The loss of Eq. 15.

    Args:
        steps: steps per epoch.
    """
    return SMMixLoss(
        flags.bce_loss,
        flags.fine_weight,
        flags.con_weight,
        fine_temperature=flags.fine_temperature,
        con_temperature=flags.con_temperature,
        con_warmup=flags.con_warmup_epochs * steps,
    )


def make_criterion(
    flags: Flags,
    base: SMMixLoss,
    model: ImageModel,
    autocast: precision.Autocast,
    device: torch.device,
    spec: ImageSpec,
    read: ReadCheckpoint,
) -> Criterion:
    """The loss, and DeiT's distillation around it with `--distillation-type`."""
    if flags.distillation_type == "none":
        return base
    teacher = build_teacher(
        flags.teacher_model, flags.teacher_path, model.num_classes, model.input_size, spec, read
    )
    return DistillationLoss(
        base,
        engine.make_teacher(teacher.to(device), autocast),
        flags.distillation_type,
        flags.distillation_alpha,
        flags.distillation_tau,
    )


def make_mixer(
    flags: Flags, model: ImageModel, spec: ImageSpec, processes: Processes, read: ReadCheckpoint
) -> Switch:
    """The mixer of a run, with the networks that it needs."""
    teacher = None
    if flags.mixer == "attentivemix":
        network = build_feature_map(flags.attentive_teacher, model.input_size, spec, read)
        autocast = precision.make_autocast(processes.device, flags.amp)
        teacher = engine.make_teacher(network.to(processes.device), autocast)
    to_pixels = partial(transforms.denormalise, spec=spec)
    groups = count_groups(repeats_of(flags), flags.repeat_layout)
    context = MixerContext(model.num_classes, model.grid_size, to_pixels, teacher, groups)
    return build_mixer(flags, context)


def schedule_settings(flags: Flags) -> dict[str, Any]:
    """The arguments of timm's schedule.

    With `--scale-schedule` its first and its last learning rate are scaled with the total batch, as
    the peak always is.
    """
    settings = scheduler_kwargs(flags)
    if flags.scale_schedule:
        for name in ("warmup_lr", "min_lr"):
            settings[name] = scale_rate(settings[name], flags.total_batch)
    return settings


def highest_rate(flags: Flags, steps: int) -> float:
    """The highest learning rate of the run, which may end before its warm-up does.

    Args:
        steps: steps per epoch.
    """
    updates = min(steps * flags.epochs, flags.max_steps or steps * flags.epochs)
    return optim.highest_rate(schedule_settings(flags), peak_rate(flags), steps, updates)


def make_schedule(
    flags: Flags, training: engine.Training, steps: int, progress: Any
) -> optim.Schedule:
    """The learning rate schedule; `training` calls it after every update from now on.

    Args:
        steps: steps per epoch.
        progress: epoch and step at which the run starts or resumes (`run/state.py:Progress`).
    """
    schedule = optim.Schedule(
        training.optimizer,
        schedule_settings(flags),
        steps,
        progress.epoch,
        progress.step,
    )
    training.after_update = schedule.after_update
    return schedule


def make_training(
    flags: Flags,
    model: ImageModel,
    spec: ImageSpec,
    processes: Processes,
    steps: int,
    read: ReadCheckpoint,
    say: Callable[[str], None],
) -> engine.Training:
    """Everything that the step needs, checked by one warm-up (`engine.py:warm_up`).

    Args:
        steps: steps per epoch.
        say: prints which weights of a second network's file are used, if it has several.
    """
    device, autocast = processes.device, precision.make_autocast(processes.device, flags.amp)
    average = None
    if flags.model_ema:
        average = ModelEmaV3(
            model,
            decay=flags.model_ema_decay,
            device=torch.device("cpu") if flags.model_ema_force_cpu else None,
        )
    wrapped: torch.nn.Module = model
    if processes.world_size > 1:
        wrapped = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )
    loss = make_loss(flags, steps)
    training = engine.Training(
        module=model,
        model=cast(torch.nn.Module, torch.compile(wrapped)) if flags.compile else wrapped,
        criterion=make_criterion(flags, loss, model, autocast, device, spec, read),
        mixer=make_mixer(flags, model, spec, processes, read),
        guide=make_guide(flags, model, device, average, spec, read),
        optimizer=optim.make_optimizer(model, {**optimizer_kwargs(flags), "lr": peak_rate(flags)}),
        scaler=precision.make_scaler(device, flags.amp),
        autocast=autocast,
        processes=processes,
        ema=average,
        clip_grad=flags.clip_grad,
        accum_steps=flags.accum_steps,
        seed=flags.seed,
        train_mode=flags.train_mode,
        before_step=loss.set_step,
        nonfinite=NonFiniteGuard(processes, flags.max_bad_steps),
        fixed_scale=flags.amp != "fp16",
        memory_format=memory_format(flags),
        finish=transforms.FinishBatch(spec, flags.remode),
    )
    engine.warm_up(training, model.input_size)
    for line in describe_files(vars(flags), read):
        say(line)
    return training
