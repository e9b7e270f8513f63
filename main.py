"""Training and evaluation: flags -> objects -> epochs.

    torchrun --nproc_per_node=4 main.py --model deit_small_patch16_224 --data-path /imagenet --output_dir output

The only place where flags become objects; the parsed namespace never leaves this file. No tensor arithmetic here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from timm.optim import optimizer_kwargs
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import checkpoints
import datasets
import engine
import loaders
import optim
import pictures
import resume
import summary
import transforms
import utils
from logs import RunLog, write_json
from losses import Criterion, DistillationLoss, SMMixLoss
from mixers.build import build_mixer
from mixers.interface import NoMixing, StepRandom
from mixers.switch import Switch
from models.build import (
    build_model,
    build_teacher,
    list_models,
    load_foreign,
    restore_model,
    use_distillation,
    use_grad_checkpointing,
)
from models.interface import ImageModel
from options import VARIANT_FLAGS, check_args, explicit_flags, get_args_parser
from smmix import VARIANTS, Variant
from utils import Processes


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. With `--eval`, what it leaves out comes from the checkpoint if that is ours."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.eval and args.resume:
        checkpoint = checkpoints.load_checkpoint(args.resume)
        if resume.is_ours(checkpoint):
            saved = resume.flags_for_evaluation(checkpoint["args"], explicit_flags(parser, argv))
            args = argparse.Namespace(**{**vars(args), **saved})
    check_args(args)
    return args


def resolve_defaults(args: argparse.Namespace, processes: Processes) -> None:
    """Fills in what depends on the machine or on other flags; the result is what is shown and saved."""
    args.data_set = args.data_set or ("IMNET" if args.data_path else "DIGITS")
    args.amp = args.amp or ("fp16" if processes.device.type == "cuda" else "none")
    if args.num_workers is None:
        args.num_workers = min(10, utils.cores_per_process())
    for name in VARIANT_FLAGS if args.mixer == "smmix" else ():
        setattr(args, name, getattr(args, name) or getattr(VARIANTS[args.variant], name))


def model_config(args: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    """The keywords of `models.build.build_model`; every checkpoint keeps them, so that it can be built again."""
    return {
        "name": args.model,
        "num_classes": num_classes,
        "input_size": None if args.input_size is None else utils.as_pair(args.input_size),
        "patch_size": args.patch_size,
        "drop": args.drop,
        "drop_path": args.drop_path,
        "separate_region_head": args.mixer == "smmix" and args.region_head == "separate",
    }


def make_model(
    args: argparse.Namespace, num_classes: int, processes: Processes, log: RunLog, load_weights: bool
) -> ImageModel:
    """The model on its device, alike on all ranks; with `load_weights`, from the weights of `--finetune`."""
    utils.seed_globals("init", args.seed)
    model = build_model(**model_config(args, num_classes))
    args.input_size = list(model.input_size)
    if args.distillation_type != "none":
        use_distillation(model, args.model)
    if args.grad_checkpointing:
        use_grad_checkpointing(model, args.model)
    if args.finetune and load_weights:
        log.say("\n  ".join([f"weights from {args.finetune}", *load_foreign(model, args.finetune)]))
    model.to(processes.device)
    return model.to(memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)


def open_images(args: argparse.Namespace, train: bool) -> Any:
    return datasets.open_images(
        args.data_set, args.data_path, train, inat_category=args.inat_category, num_classes=args.nb_classes,
        batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip


def make_eval_loader(args: argparse.Namespace, val: Any, spec: transforms.ImageSpec, processes: Processes) -> Any:
    return loaders.build_eval_loader(
        loaders.eval_samples(val, transforms.build_eval_transform(spec)), batch_size=int(1.5 * args.batch_size),
        rank=processes.rank, world_size=processes.world_size, num_workers=args.num_workers,
        pin_memory=args.pin_mem and processes.device.type == "cuda",
    )  # fmt: skip


def make_train_loader(args: argparse.Namespace, train: Any, spec: transforms.ImageSpec, processes: Processes) -> Any:
    augment = transforms.Augment(
        aa=args.aa, color_jitter=args.color_jitter, reprob=args.reprob, remode=args.remode, recount=args.recount,
        interpolation=args.train_interpolation,
    )  # fmt: skip
    transform = transforms.build_train_transform(spec, datasets.augment_for(args.data_set, augment))
    return loaders.build_train_loader(
        loaders.train_samples(train, transform, args.seed), batch_size=args.batch_size, seed=args.seed,
        rank=processes.rank, world_size=processes.world_size, num_workers=args.num_workers,
        repeats=args.repeats if args.repeated_aug else 1, accum_steps=args.accum_steps,
        pin_memory=args.pin_mem and processes.device.type == "cuda",
    )  # fmt: skip


def make_criterion(
    args: argparse.Namespace, model: ImageModel, autocast: engine.Autocast, device: torch.device
) -> Criterion:
    """The sum of Eq. 15, inside DeiT's distillation if that is asked for."""
    base = SMMixLoss(bce=args.bce_loss)
    if args.distillation_type == "none":
        return base
    teacher = build_teacher(args.teacher_model, args.teacher_path, model.num_classes, model.input_size)
    return DistillationLoss(
        base, engine.make_teacher(teacher.to(device), autocast), args.distillation_type, args.distillation_alpha,
        args.distillation_tau,
    )  # fmt: skip


def total_batch(args: argparse.Namespace, processes: Processes) -> int:
    """Images per optimizer step, over all ranks."""
    return args.batch_size * processes.world_size * args.accum_steps


def peak_rate(args: argparse.Namespace, processes: Processes) -> float:
    return args.lr if args.unscale_lr else optim.scale_rate(args.lr, total_batch(args, processes))


def schedule_settings(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Keywords of timm's schedule; with `--scale-schedule` its ends grow with the total batch like the peak."""
    settings = scheduler_kwargs(args)
    if args.scale_schedule:
        for name in ("warmup_lr", "min_lr"):
            settings[name] = optim.scale_rate(settings[name], total_batch(args, processes))
    return settings


def make_training(args: argparse.Namespace, model: ImageModel, processes: Processes) -> engine.Training:
    """Everything the step touches."""
    device, autocast = processes.device, engine.make_autocast(processes.device, args.amp)
    average = None
    if args.model_ema:
        average = ModelEmaV3(
            model, decay=args.model_ema_decay, device=torch.device("cpu") if args.model_ema_force_cpu else None
        )
    wrapped: torch.nn.Module = model
    if processes.world_size > 1:
        wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    arithmetic = (args.region_head, args.consistency, args.region_size)
    variant = Variant(*arithmetic) if args.mixer == "smmix" else Variant()
    mixer = build_mixer(
        args.mixer, model.num_classes, model.grid_size, smoothing=args.smoothing, variant=variant,
        side_ratio=tuple(args.side_ratio), mixup_alpha=args.mixup, cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax, mixup_prob=args.mixup_prob, switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
    )  # fmt: skip
    return engine.Training(
        module=model,
        model=cast(torch.nn.Module, torch.compile(wrapped)) if args.compile else wrapped,
        criterion=make_criterion(args, model, autocast, device),
        mixer=mixer,
        guide=engine.make_guide(model, autocast, torch.compile(model) if args.compile else None),
        optimizer=optim.make_optimizer(model, {**optimizer_kwargs(args), "lr": peak_rate(args, processes)}),
        scaler=engine.make_scaler(device, args.amp),
        autocast=autocast,
        processes=processes,
        ema=average,
        clip_grad=args.clip_grad,
        accum_steps=args.accum_steps,
        seed=args.seed,
        train_mode=args.train_mode,
        watch_gradients=args.amp != "fp16",
        memory_format=torch.channels_last if args.channels_last else torch.contiguous_format,
    )


def train(args: argparse.Namespace, processes: Processes, log: RunLog) -> None:
    """From flags to the last epoch."""
    folder = Path(args.output_dir) if args.output_dir and processes.is_main else None  # rank 0 alone writes
    resume_from = resume.find(args.output_dir, args.resume, args.auto_resume)
    resume.check_agreement(processes.gather(resume_from), args.output_dir)
    train_images, val_images = open_images(args, train=True), open_images(args, train=False)
    datasets.check_same_classes(train_images.class_names, val_images.class_names)
    num_classes = len(train_images.class_names)
    model = make_model(args, num_classes, processes, log, load_weights=not resume_from)
    spec = datasets.image_spec_for(args.data_set, model.input_size, args.eval_crop_ratio)
    train_loader = make_train_loader(args, train_images, spec, processes)
    val_loader = make_eval_loader(args, val_images, spec, processes)
    training = make_training(args, model, processes)
    identity = resume.Identity(
        vars(args), model_config(args, num_classes),
        {"class_names": train_images.class_names, "image_spec": spec.to_plain()}, utils.describe_versions(),
    )  # fmt: skip
    steps = loaders.steps_per_epoch(train_loader)
    log.table(summary.describe_run(identity, training, steps, (train_images.num_images, val_images.num_images)))
    for warning in summary.warnings(identity.args, steps):
        log.say(f"warning: {warning}")
    progress = resume.Progress(args.start_epoch, args.start_epoch * steps)
    if resume_from:
        progress, changes = resume.load(resume_from, training, identity)
        log.say(f"resumed from {resume_from}; next is epoch {progress.epoch}, best top-1 {progress.best_acc1:.2f}")
        for change in changes:
            log.say(f"  changed since then: {change}")
    log.drop_epochs_from(progress.epoch, progress.step)
    if folder is not None:
        checkpoints.remove_stale(folder)
        write_json(folder / "args.json", identity.args)
        write_json(folder / "environment.json", identity.versions)
    if progress.epoch >= args.epochs:
        log.say(f"nothing left to do: all {args.epochs} epochs are done")
        return
    schedule = optim.Schedule(training.optimizer, schedule_settings(args, processes), steps, progress.epoch)
    training.after_update = schedule.after_update
    samples = val_loader.dataset if folder else None  # what nobody keeps is not drawn
    show = make_painter(training, samples, spec, train_images.class_names, processes)
    while progress.epoch < args.epochs:
        stats = run_epoch(args, training, (train_loader, val_loader), progress, log)
        schedule.after_epoch(progress.epoch)
        is_best = stats["test_acc1"] >= progress.best_acc1
        progress.best_acc1 = max(progress.best_acc1, stats["test_acc1"])
        log.epoch(stats)
        log.say(f"epoch {progress.epoch}: top-1 {stats['test_acc1']:.2f} %, best {progress.best_acc1:.2f} %")
        if folder is not None and (picture := show(progress.epoch)) is not None:
            pictures.save_png(picture, folder / "mixing.png")
            log.picture("mixing", picture, progress.epoch)
        progress.epoch, progress.step = progress.epoch + 1, progress.step + steps
        if folder is not None:
            resume.save(folder, training, progress, identity, is_best)


def run_epoch(
    args: argparse.Namespace,
    training: engine.Training,
    train_and_val: tuple[Any, Any],
    progress: resume.Progress,
    log: RunLog,
) -> dict[str, Any]:
    """Trains and evaluates one epoch; returns its line of `log.txt`."""
    train_loader, val_loader = train_and_val
    groups = training.optimizer.param_groups
    first_rate = groups[0]["lr"]

    def on_log(step: int, means: dict[str, float]) -> None:
        values = {**means, "lr": groups[0]["lr"]}
        log.note(values)
        log.scalars(step, values)

    loaders.set_epoch(train_loader, progress.epoch)
    batches = log.progress(train_loader, len(train_loader), f"epoch {progress.epoch}")
    figures = engine.train_one_epoch(
        training, batches, first_step=progress.step, on_log=on_log, log_every=args.log_every
    )
    return {
        "epoch": progress.epoch,
        "lr": first_rate,
        **{f"train_{name}": value for name, value in figures.items()},
        **engine.evaluate_all(training, val_loader),
        "n_parameters": sum(p.numel() for p in training.module.parameters() if p.requires_grad),
        "peak_memory_mb": utils.peak_memory_mb(training.processes.device),
    }


def make_painter(
    training: engine.Training, samples: Any, spec: transforms.ImageSpec, class_names: list[str], processes: Processes
) -> Callable[[int], torch.Tensor | None]:
    """A function from an epoch to the picture of what the mixer makes of the same four validation images."""
    mixer = cast(Switch, training.mixer).first
    if isinstance(mixer, NoMixing) or not isinstance(samples, loaders.EvalSamples):
        return lambda epoch: None
    images, labels = engine.to_device(processes.device, *pictures.spread_samples(samples, 8))

    def show(epoch: int) -> torch.Tensor:
        random = utils.keyed_generator("picture", training.seed, epoch)
        return pictures.picture_of_mixing(
            mixer, training.guide, images, labels, spec=spec, class_names=class_names,
            grid_size=training.module.grid_size, random=StepRandom(random, random),
        )  # fmt: skip

    return show


def evaluate(args: argparse.Namespace, processes: Processes, log: RunLog) -> None:
    """`--eval`: figures of a checkpoint, and of its averaged weights, with the input it was trained for.

    Another project's weights (DeiT's, timm's) say nothing of their model and input: `--model` and the like do.
    """
    checkpoint, images = checkpoints.load_checkpoint(args.resume), open_images(args, train=False)
    if resume.is_ours(checkpoint):
        spec = transforms.ImageSpec.from_plain(checkpoint["data"]["image_spec"])
        spec = replace(spec, crop_ratio=args.eval_crop_ratio or spec.crop_ratio)
        datasets.check_same_classes(checkpoint["data"]["class_names"], images.class_names)
        names = [name for name in ("model", "ema") if checkpoint[name] is not None]
        models = {name: restore_model(checkpoint, name == "ema") for name in names}
    else:
        model = build_model(**model_config(args, len(images.class_names)))
        load_foreign(model, args.resume, fresh_heads=False)
        spec = datasets.image_spec_for(args.data_set, model.input_size, args.eval_crop_ratio)
        models = {"model": model}
    loader, autocast = make_eval_loader(args, images, spec, processes), engine.make_autocast(processes.device, args.amp)
    for name, model in models.items():
        figures = engine.evaluate(model.to(processes.device), loader, processes, autocast)
        log.say(
            f"{args.resume} ({name}): top-1 {figures['acc1']:.3f} %, top-5 {figures['acc5']:.3f} %, "
            f"loss {figures['loss']:.4f} on {figures['images']:.0f} images"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command line on this process. `utils.run_command` turns its errors into messages."""
    args = read_args(argv)
    if args.list_models:
        for row in list_models():
            print("{:<26} {:<56} {:<9} {}".format(*row), flush=True)
        return
    processes = utils.init_processes(args.device)
    resolve_defaults(args, processes)
    with RunLog(args.output_dir or None, processes) as log:
        (evaluate if args.eval else train)(args, processes, log)


if __name__ == "__main__":
    raise SystemExit(utils.run_command(main))
