"""Training and evaluation: flags -> objects -> epochs.

    torchrun --nproc_per_node=4 main.py --model deit_small_patch16_224 --data-path /imagenet
    --output_dir output

Flags become objects here and in `config/build.py`; the parsed namespace never leaves these two. No
tensor arithmetic here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import datasets
import engine
import utils
from config.build import (
    make_eval_loader,
    make_mixer,
    make_model,
    make_train_loader,
    make_training,
    model_config,
    open_images,
    resolve_defaults,
    schedule_settings,
    total_batch,
)
from config.flags import check_args, explicit_flags, get_args_parser
from mixers.interface import NoMixing, StepRandom
from mixers.switch import Switch
from models.build import build_model, list_models, use_float32_attention
from models.weights import load_foreign, restore_model
from pipeline import loaders
from pipeline.bad_images import CorruptImages
from pipeline.samples import EvalSamples
from pipeline.spec import ImageSpec
from run import pictures, saved_flags, summary
from run import state as run_state
from run.agreement import Watch
from run.folder import RunFolder, leave_word
from run.log import RunLog
from run.loop import Rules, Run
from storage import checkpoints
from storage.files import write_json
from training import optim, precision
from training.nonfinite import NonFiniteLoss
from utils import Processes


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. With `--eval`, what it leaves out comes from the checkpoint if
    that is ours."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.eval and args.resume:
        checkpoint = checkpoints.load_checkpoint(args.resume)
        if run_state.is_ours(checkpoint):
            saved = saved_flags.flags_for_evaluation(
                checkpoint["args"], explicit_flags(parser, argv)
            )
            args = argparse.Namespace(**{**vars(args), **saved})
            parser.check_kinds(args)
    check_args(args)
    return args


def train(args: argparse.Namespace, processes: Processes, log: RunLog) -> None:
    """From flags to the last epoch, with everything that ends with it."""
    folder = (
        RunFolder(args.output_dir, args.keep_checkpoints)
        if args.output_dir and processes.is_main
        else None
    )
    with ExitStack() as ending:
        processes.from_main(lambda: None if folder is None else folder.open())
        if folder is not None:
            ending.callback(folder.close)
        path, notes = processes.from_main(
            lambda: run_state.find(args.output_dir, args.resume, args.auto_resume)
        )
        for note in notes:
            log.say(f"warning: {note}")
        run = None
        try:
            run = make_run(args, processes, log, folder, path)
            if folder is not None:
                folder.status("running", epoch=run.progress.epoch, step=run.progress.step)
            with loaders.closing(run.train_loader, run.val_loader), run.watch:
                state = run.train()
                if folder is not None:
                    folder.status(state, epoch=run.progress.epoch, step=run.progress.step)
        except BaseException as error:
            with suppress(utils.StopRun):  # of a full disk, say: the first cause has the word
                tell_failure(args.output_dir, folder, processes.rank, error, run is not None)
            if isinstance(error, NonFiniteLoss):
                keep_evidence(args.output_dir, processes.rank, error)
            raise


def tell_failure(
    output_dir: str, folder: RunFolder | None, rank: int, error: BaseException, has_begun: bool
) -> None:
    """What ended the run goes into `status.json`, also where it happened on another rank, which
    leaves word of it.

    Raises:
        InputError: it cannot be written.
    """
    text = error.text if isinstance(error, utils.StopRun) else str(error)
    cause = {
        "exit_code": error.exit_code if isinstance(error, utils.StopRun) else 1,
        "error": (text or type(error).__name__).splitlines()[0],
    }
    if folder is not None:
        folder.fail(cause, has_begun, utils.is_lost_peer(error))
    elif output_dir and not utils.is_lost_peer(error):
        leave_word(Path(output_dir), rank, cause)


def keep_evidence(output_dir: str, rank: int, failure: NonFiniteLoss) -> None:
    """Each rank that met a loss that was not finite writes what it was given."""
    if output_dir and failure.evidence is not None:
        checkpoints.save_checkpoint(
            Path(output_dir) / f"not_finite_rank{rank}.pth", failure.evidence
        )


def make_run(
    args: argparse.Namespace,
    processes: Processes,
    log: RunLog,
    folder: RunFolder | None,
    resume_from: str,
) -> Run:
    """Everything a run needs, put back to where `resume_from` left it."""
    run_state.check_agreement(resume_from, processes)
    checkpoint, accepted = (
        run_state.read(resume_from) if resume_from else None,
        args.accept_changes or (),
    )
    shares = {"batch_size": args.batch_size, "accum_steps": args.accum_steps}
    if checkpoint is not None:
        for name, value in run_state.keep_total_batch(
            checkpoint, shares, processes.world_size, accepted
        ).items():
            log.say(
                f"{processes.world_size} processes instead of {checkpoint['world_size']}: --{name} "
                f"is now {value}"
            )
            setattr(args, name, value)
    train_images, val_images = open_images(args, train=True), open_images(args, train=False)
    datasets.check_same_classes(train_images.class_names, val_images.class_names)
    num_classes = len(train_images.class_names)
    model = make_model(args, num_classes, processes, log, load_weights=not resume_from)
    spec = datasets.image_spec_for(args.data_set, model.input_size, args.eval_crop_ratio)
    train_loader = make_train_loader(args, train_images, spec, processes)
    val_loader = make_eval_loader(args, val_images, spec, processes)
    mixer = make_mixer(args, model, spec, processes)
    training = make_training(args, model, mixer, spec, processes)
    data = {"class_names": train_images.class_names, "image_spec": spec.to_plain()}
    data |= {
        "num_images": train_images.num_images,
        "fingerprint": processes.from_main(train_images.fingerprint),
    }
    identity = run_state.Identity(
        vars(args), model_config(args, num_classes), data, utils.describe_versions(), shares
    )
    steps = loaders.steps_per_epoch(train_loader)
    log.table(
        summary.describe_run(
            identity, training, steps, (train_images.num_images, val_images.num_images)
        )
    )
    for warning in summary.warnings(identity.args, steps, training):
        log.say(f"warning: {warning}")
    progress = run_state.Progress(args.start_epoch, args.start_epoch * steps)
    if checkpoint is not None:
        progress = run_state.load(
            checkpoint, f"--resume {resume_from}", training, identity, accepted
        )
        for line in summary.describe_going_on(resume_from, checkpoint, progress, identity):
            log.say(line)
    done = end_reached(args, progress)
    if not done:
        log.drop_epochs_from(progress.epoch, progress.step)
    if folder is not None:
        for path in (
            []
            if checkpoint is None
            else folder.go_on_from(Path(resume_from), progress.step, checkpoint.get("names", ()))
        ):
            log.say(f"warning: a later checkpoint is set aside as {path}")
        write_json(folder.path / "args.json", identity.args)
        write_json(folder.path / "environment.json", identity.versions)
    if done:
        log.say(f"nothing left to do: {done} are done")
    schedule = optim.Schedule(
        training.optimizer, schedule_settings(args, processes), steps, progress.epoch, progress.step
    )
    training.after_update = schedule.after_update
    samples = val_loader.dataset if folder else None  # what nobody keeps is not drawn
    show = make_painter(training, mixer, samples, spec, train_images.class_names, processes)
    corrupt = (
        CorruptImages(train_images.num_images, train_images.name_of) if args.skip_corrupt else None
    )
    if corrupt is not None:
        corrupt.load(progress.bad_images)
    rules = Rules(args.epochs, args.log_every, args.save_steps, args.max_steps, args.eval_every)
    return Run(
        rules,
        training,
        mixer,
        train_loader,
        val_loader,
        identity,
        progress,
        schedule,
        Watch(processes, args.save_minutes),
        log,
        bool(args.output_dir),
        folder,
        show,
        corrupt,
        steps,
        total_batch(args, processes),
    )


def end_reached(args: argparse.Namespace, progress: run_state.Progress) -> str:
    """Which end a run has come to, if any."""
    if progress.epoch >= args.epochs:
        return f"all {args.epochs} epochs"
    return (
        f"{progress.step} steps"
        if args.max_steps is not None and progress.step >= args.max_steps
        else ""
    )


def make_painter(
    training: engine.Training,
    mixer: Switch,
    samples: Any,
    spec: ImageSpec,
    class_names: list[str],
    processes: Processes,
) -> Callable[[int], torch.Tensor | None]:
    """A function from an epoch to the picture of what the mixer makes of the same four validation
    images."""
    if isinstance(mixer.first, NoMixing) or not isinstance(samples, EvalSamples):
        return lambda epoch: None
    images, labels = engine.to_device(processes.device, *pictures.spread_samples(samples, 8))

    def show(epoch: int) -> torch.Tensor:
        random = utils.keyed_generator("picture", training.seed, epoch)
        batch = mixer.first(images, labels, training.guide, StepRandom(random, random))
        batch = engine.settle_labels(training.module, batch, training.autocast)
        return pictures.mixing_picture(
            images,
            batch,
            labels,
            spec=spec,
            class_names=class_names,
            grid_size=training.module.grid_size,
        )

    return show


def evaluate(args: argparse.Namespace, processes: Processes, log: RunLog) -> None:
    """`--eval`: figures of a checkpoint, and of its averaged weights, with the input it was trained
    for.

    Another project's weights (DeiT's, timm's) say nothing of their model and input: `--model` and
    the like do.
    """
    checkpoint, images = checkpoints.load_checkpoint(args.resume), open_images(args, train=False)
    if run_state.is_ours(checkpoint):
        spec = ImageSpec.from_plain(checkpoint["data"]["image_spec"])
        spec = replace(spec, crop_ratio=args.eval_crop_ratio or spec.crop_ratio)
        datasets.check_same_classes(checkpoint["data"]["class_names"], images.class_names)
        names = [name for name in ("model", "ema") if checkpoint[name] is not None]
        models = {name: restore_model(checkpoint, name == "ema") for name in names}
    else:
        model = build_model(**model_config(args, len(images.class_names)))
        load_foreign(model, checkpoint, args.resume, fresh_heads=False)
        spec = datasets.image_spec_for(args.data_set, model.input_size, args.eval_crop_ratio)
        models = {"model": model}
    loader, autocast = (
        make_eval_loader(args, images, spec, processes),
        precision.make_autocast(processes.device, args.amp),
    )
    for name, model in models.items():
        if args.attn_fp32:
            use_float32_attention(model, args.model)
        with loaders.closing(loader):
            figures = engine.evaluate(model.to(processes.device), loader, processes, autocast)
        log.say(
            f"{args.resume} ({name}): top-1 {figures['acc1']:.3f} %, top-5 {figures['acc5']:.3f} "
            "%, "
            f"loss {figures['loss']:.4f} on {figures['images']:.0f} images"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command line on this process. `utils.run_command` turns its errors into messages."""
    args = read_args(argv)
    if args.list_models:
        for row in list_models():
            print("{:<26} {:<56} {:<9} {}".format(*row), flush=True)
        return
    processes = utils.init_processes(args.device, args.data_timeout)
    resolve_defaults(args, processes)
    with RunLog(args.output_dir or None, processes) as log:
        (evaluate if args.eval else train)(args, processes, log)


if __name__ == "__main__":
    raise SystemExit(utils.run_command(main))
