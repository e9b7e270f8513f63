"""Flags -> objects: what a run is made of. With `main.py` the only place that sees the parsed
namespace.

No tensor arithmetic and no training here.
"""

from __future__ import annotations

import argparse
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
from config.build_mixer import Settings, Surroundings, build_mixer
from config.mixing_flags import weight_of_con
from config.second_networks import build_feature_map, build_teacher, check_motivator_classes
from losses import Criterion, DistillationLoss, SMMixLoss
from mixers.switch import Switch
from models.build import (
    build_model,
    use_distillation,
    use_float32_attention,
    use_grad_checkpointing,
)
from models.interface import ImageModel
from models.weights import load_foreign
from pipeline import erasing, loaders, randaugment_pixels, samples, transforms
from pipeline.images import pick_decoder, take_subset
from pipeline.spec import Augment, ImageSpec
from run.log import RunLog
from storage.checkpoints import load_checkpoint
from training import optim, precision
from training.nonfinite import Health
from utils import Processes


def resolve_defaults(args: argparse.Namespace, processes: Processes) -> None:
    """Fills in what depends on the machine or on other flags; the result is what is shown and
    saved."""
    args.data_set = args.data_set or ("IMNET" if args.data_path else "DIGITS")
    args.amp = args.amp or ("fp16" if processes.device.type == "cuda" else "none")
    if args.num_workers is None:
        args.num_workers = min(10, utils.cores_per_process())
    settings = Settings.from_flags(vars(args))
    if args.mixer == "smmix":
        vars(args).update(vars(settings.arithmetic))
    elif settings.has_con:
        args.consistency = settings.arithmetic.consistency
    args.con_weight = weight_of_con(args.mixer, args.con_weight)


def model_config(args: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    """The keywords of `models.build.build_model`; every checkpoint keeps them, so that it can be
    built again."""
    return {
        "name": args.model,
        "num_classes": num_classes,
        "input_size": None if args.input_size is None else utils.as_pair(args.input_size),
        "patch_size": args.patch_size,
        "drop": args.drop,
        "drop_path": args.drop_path,
        "separate_region_head": args.mixer == "smmix"
        and args.region_head == "separate"
        and args.fine_weight > 0,
    }


def make_model(
    args: argparse.Namespace,
    num_classes: int,
    processes: Processes,
    log: RunLog,
    load_weights: bool,
) -> ImageModel:
    """The model on its device, alike on all ranks; with `load_weights`, from the weights of
    `--finetune`."""
    utils.seed_globals("init", args.seed)
    model = build_model(**model_config(args, num_classes))
    args.input_size = list(model.input_size)
    if args.distillation_type != "none":
        use_distillation(model, args.model)
    if args.grad_checkpointing:
        use_grad_checkpointing(model, args.model)
    if args.attn_fp32:
        use_float32_attention(model, args.model)
    if args.finetune and load_weights:
        log.say(
            "\n  ".join(
                [
                    f"weights from {args.finetune}",
                    *load_foreign(model, load_checkpoint(args.finetune), args.finetune),
                ]
            )
        )
    model.to(processes.device)
    return model.to(
        memory_format=torch.channels_last if args.channels_last else torch.contiguous_format
    )


def open_images(args: argparse.Namespace, train: bool) -> Any:
    """One half of the data: to train on, with `--subset` a part of it, or to evaluate on, always
    all of it.

    Raises:
        InputError: it cannot be opened, or `--motivator` predicts other classes than those to train
            on.
    """
    images = datasets.open_images(
        args.data_set,
        args.data_path,
        train,
        inat_category=args.inat_category,
        num_classes=args.nb_classes,
        batch_size=args.batch_size,
        seed=args.seed,
        decode=pick_decoder(args.decoder if train else "pillow"),
    )
    if train and args.motivator not in ("self", "ema") and uses_predictions(args):
        check_motivator_classes(args.motivator, images.class_names)
    return images if args.subset is None or not train else take_subset(images, args.subset)


def make_eval_loader(
    args: argparse.Namespace, val: Any, spec: ImageSpec, processes: Processes
) -> Any:
    return loaders.build_eval_loader(
        samples.eval_samples(val, transforms.build_eval_transform(spec)),
        batch_size=int(1.5 * args.batch_size),
        rank=processes.rank,
        world_size=processes.world_size,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and processes.device.type == "cuda",
        timeout=args.data_timeout,
    )


def make_train_loader(
    args: argparse.Namespace, train: Any, spec: ImageSpec, processes: Processes
) -> Any:
    augment = Augment(
        aa=args.aa,
        color_jitter=args.color_jitter,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
        interpolation=args.train_interpolation,
        resize=args.resize,
        randaugment=args.randaugment,
    )
    if augment.randaugment == "device" and processes.device.type == "mps":
        raise utils.InputError(
            "--randaugment device: mps has no float64, which the warps need; use --randaugment cpu"
        )
    transform = transforms.build_train_transform(spec, datasets.augment_for(args.data_set, augment))
    erase = erasing.Erasing(augment.reprob, augment.recount)
    return loaders.build_train_loader(
        samples.train_samples(train, transform, args.seed, args.skip_corrupt, erase),
        seed=args.seed,
        batch_size=args.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        num_workers=args.num_workers,
        repeats=args.repeats if args.repeated_aug else 1,
        layout=args.repeat_layout,
        accum_steps=args.accum_steps,
        pin_memory=args.pin_mem and processes.device.type == "cuda",
        timeout=args.data_timeout,
    )


def make_finish(args: argparse.Namespace, spec: ImageSpec) -> Callable[..., torch.Tensor]:
    """What becomes of a training batch on its device: see `engine.Training.finish`."""
    fill = transforms.fill_color(spec)

    def finish(images: torch.Tensor, boxes: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        augmented = randaugment_pixels.apply(images, drawn, fill) if drawn.shape[1] else images
        return erasing.erase(transforms.normalise(augmented, spec), boxes, args.remode)

    return finish


def make_criterion(
    args: argparse.Namespace,
    model: ImageModel,
    autocast: precision.Autocast,
    device: torch.device,
    spec: ImageSpec,
) -> Criterion:
    """The sum of Eq. 15, inside DeiT's distillation if that is asked for."""
    base = SMMixLoss(
        args.bce_loss,
        args.fine_weight,
        args.con_weight,
        fine_temperature=args.fine_temperature,
        con_temperature=args.con_temperature,
    )
    if args.distillation_type == "none":
        return base
    teacher = build_teacher(
        args.teacher_model, args.teacher_path, model.num_classes, model.input_size, spec
    )
    return DistillationLoss(
        base,
        engine.make_teacher(teacher.to(device), autocast),
        args.distillation_type,
        args.distillation_alpha,
        args.distillation_tau,
    )


def make_mixer(
    args: argparse.Namespace, model: ImageModel, spec: ImageSpec, processes: Processes
) -> Switch:
    """What mixes the batches of a run."""
    teacher = None
    if args.mixer == "attentivemix":
        network = build_feature_map(args.attentive_teacher, model.input_size, spec).to(
            processes.device
        )
        teacher = engine.make_teacher(network, precision.make_autocast(processes.device, args.amp))
    around = Surroundings(
        model.num_classes, model.grid_size, partial(transforms.denormalise, spec=spec), teacher
    )
    return build_mixer(Settings.from_flags(vars(args)), around)


def total_batch(args: argparse.Namespace, processes: Processes) -> int:
    """Images per optimizer step, over all ranks."""
    return args.batch_size * processes.world_size * args.accum_steps


def peak_rate(args: argparse.Namespace, processes: Processes) -> float:
    return args.lr if args.unscale_lr else optim.scale_rate(args.lr, total_batch(args, processes))


def schedule_settings(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Keywords of timm's schedule; with `--scale-schedule` its ends grow with the total batch like
    the peak."""
    settings = scheduler_kwargs(args)
    if args.scale_schedule:
        for name in ("warmup_lr", "min_lr"):
            settings[name] = optim.scale_rate(settings[name], total_batch(args, processes))
    return settings


def make_training(
    args: argparse.Namespace,
    model: ImageModel,
    mixer: Switch,
    spec: ImageSpec,
    processes: Processes,
) -> engine.Training:
    """Everything the step touches."""
    device, autocast = processes.device, precision.make_autocast(processes.device, args.amp)
    average = None
    if args.model_ema:
        average = ModelEmaV3(
            model,
            decay=args.model_ema_decay,
            device=torch.device("cpu") if args.model_ema_force_cpu else None,
        )
    wrapped: torch.nn.Module = model
    if processes.world_size > 1:
        wrapped = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )
    training = engine.Training(
        module=model,
        model=cast(torch.nn.Module, torch.compile(wrapped)) if args.compile else wrapped,
        criterion=make_criterion(args, model, autocast, device, spec),
        mixer=mixer,
        guide=make_guide(args, model, device, average, spec),
        optimizer=optim.make_optimizer(
            model, {**optimizer_kwargs(args), "lr": peak_rate(args, processes)}
        ),
        scaler=precision.make_scaler(device, args.amp),
        autocast=autocast,
        processes=processes,
        ema=average,
        clip_grad=args.clip_grad,
        accum_steps=args.accum_steps,
        seed=args.seed,
        train_mode=args.train_mode,
        health=Health(processes, args.max_bad_steps),
        fixed_scale=args.amp != "fp16",
        memory_format=torch.channels_last if args.channels_last else torch.contiguous_format,
        finish=make_finish(args, spec),
    )
    engine.warm_up(training, model.input_size)
    return training
