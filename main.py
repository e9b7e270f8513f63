"""Training and evaluation: flags -> objects -> epochs.

    torchrun --nproc_per_node=4 main.py --model deit_small_patch16_224 --data-path /imagenet --output_dir output

Flags become objects here and in `assembly.py`; the parsed namespace never leaves these two. No tensor arithmetic here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

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
from assembly import (
    make_eval_loader,
    make_mixer,
    make_model,
    make_train_loader,
    make_training,
    model_config,
    open_images,
    resolve_defaults,
    schedule_settings,
)
from logs import RunLog, write_json
from mixers.interface import NoMixing, StepRandom
from mixers.switch import Switch
from models.build import build_model, list_models, load_foreign, restore_model
from options import check_args, explicit_flags, get_args_parser
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
    mixer = make_mixer(args, model, spec, processes)
    training = make_training(args, model, mixer, processes)
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
    show = make_painter(training, mixer, samples, spec, train_images.class_names, processes)
    while progress.epoch < args.epochs:
        training.mixer = mixer.at(progress.epoch)
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
    training: engine.Training, mixer: Switch, samples: Any, spec: transforms.ImageSpec, class_names: list[str],
    processes: Processes,
) -> Callable[[int], torch.Tensor | None]:  # fmt: skip
    """A function from an epoch to the picture of what the mixer makes of the same four validation images."""
    if isinstance(mixer.first, NoMixing) or not isinstance(samples, loaders.EvalSamples):
        return lambda epoch: None
    images, labels = engine.to_device(processes.device, *pictures.spread_samples(samples, 8))

    def show(epoch: int) -> torch.Tensor:
        random = utils.keyed_generator("picture", training.seed, epoch)
        batch = mixer.first(images, labels, training.guide, StepRandom(random, random))
        batch = engine.settle_labels(training.module, batch, training.autocast)
        return pictures.mixing_picture(
            images, batch, labels, spec=spec, class_names=class_names, grid_size=training.module.grid_size
        )

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
