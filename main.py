"""Training and evaluation: flags -> objects -> epochs.

    torchrun --nproc_per_node=4 main.py --model deit_small_patch16_224 --data-path /imagenet \\
        --output-dir output

This file defines the order in which the parts of a run are made. `config/` makes each part, and
`run/` trains.
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
from config import build
from config.checks import check_args
from config.flags import get_args_parser
from config.parser import explicit_flags
from config.resolve import Flags, left_out, model_config, resolve
from errors import STOPPED, StopRun, is_lost_peer, run_command
from mixers.interface import NoMixing, StepRandom
from models.build import build_model, list_models, use_float32_attention
from models.weights import load_foreign, restore_model
from pipeline import loaders
from pipeline.bad_images import BadImages
from pipeline.samples import EvalSamples
from pipeline.spec import ImageSpec
from run import pictures, same_start, saved_flags, summary
from run import state as run_state
from run.agreement import RankAgreement
from run.folder import RunFolder, write_failure
from run.log import RunLog
from run.loop import Data, Output, Rules, Run
from storage.checkpoints import (
    CheckpointReader,
    ReadCheckpoint,
    load_checkpoint,
    save_checkpoint,
)
from storage.plain_data import write_json
from training import precision
from training.nonfinite import NonFiniteLoss
from utils import Processes

SPLITS = ("training", "validation")


def read_args(
    argv: Sequence[str] | None, read: ReadCheckpoint = load_checkpoint
) -> argparse.Namespace:
    """Parses and checks the command line.

    With `--eval`, flags that are not on the command line are taken from the checkpoint, if it is
    one of this project.
    """
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.eval and args.resume:
        checkpoint = read(args.resume)
        if run_state.is_own_checkpoint(checkpoint):
            given = explicit_flags(parser, argv)
            saved = {**vars(parser.parse_args([])), **checkpoint["args"]}  # it may lack new flags
            saved = saved_flags.flags_for_evaluation(saved, given)
            args = argparse.Namespace(**{**vars(args), **saved})
            parser.check_kinds(args)
    check_args(args)
    return args


def with_younger_flags(checkpoint: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint, in which flags that did not exist yet have the values of a run without them.

    The default of an unset size, precision or data set is not known for an older run; they stay
    absent.
    """
    defaults, saved = get_args_parser().parse_args([]), checkpoint["args"]
    names = vars(defaults).keys() - saved.keys() - {"input_size", "amp", "data_set"}
    return {**checkpoint, "args": {**left_out(args, names, defaults), **saved}}


# --------------------------------------------------------------------------------------- training


def train(
    args: argparse.Namespace, processes: Processes, log: RunLog, read: CheckpointReader
) -> None:
    """Makes a run and trains it to its end. An error is recorded in the output folder."""
    has_folder = args.output_dir and processes.is_main
    folder = RunFolder(args.output_dir, args.keep_checkpoints) if has_folder else None
    with ExitStack() as ending:
        processes.from_main(lambda: None if folder is None else folder.open())
        if folder is not None:
            ending.callback(folder.close)
        path, notes = processes.from_main(
            lambda: run_state.find(args.output_dir, args.resume, args.auto_resume, read)
        )
        for note in notes:
            log.say(f"warning: {note}")
        run = None
        try:
            run = make_run(args, processes, log, folder, path, read)
            read.forget()
            run.write_status("running")
            with loaders.closing(run.data.train_loader, run.data.val_loader), run.agreement:
                run.write_status(run.train())
        except BaseException as error:
            # Recording may fail, for example on a full disk. The first error must be reported.
            with suppress(StopRun):
                record_failure(args.output_dir, folder, processes.rank, error, run is not None)
            if isinstance(error, NonFiniteLoss):
                save_bad_batch(args.output_dir, processes.rank, error)
            raise


def make_run(
    args: argparse.Namespace,
    processes: Processes,
    log: RunLog,
    folder: RunFolder | None,
    resume_from: str,
    read: CheckpointReader,
) -> Run:
    """Makes everything that a run needs, and loads the checkpoint `resume_from` if it is not ""."""
    run_state.check_visible_to_all(resume_from, processes)
    checkpoint = None
    if resume_from:
        checkpoint = with_younger_flags(run_state.read(resume_from, read), args)
    changes = shares_of_resumed(args, checkpoint, processes, log)
    flags = resolve(args, processes.world_size, processes.device.type, changes)

    # Data, model and training.
    opened = open_images(flags, processes, log, read, checkpoint)
    train_images, val_images = (opened.images[name] for name in SPLITS)
    datasets.check_same_classes(train_images.class_names, val_images.class_names)
    num_classes = len(train_images.class_names)
    read_weights = None if resume_from else read
    model = build.make_model(flags, num_classes, processes, log.say, read_weights)
    spec = datasets.image_spec_for(flags.data_set, model.input_size, flags.eval_crop_ratio)
    data = Data(
        train_loader=build.make_train_loader(flags, train_images, spec, processes),
        val_loader=build.make_eval_loader(flags, val_images, spec, processes),
        total_batch=flags.total_batch,
    )
    if flags.skip_corrupt:
        bad_images = BadImages(train_images.num_images, train_images.name_of)
        data = data._replace(bad_images=bad_images)
    training = build.make_training(flags, model, spec, processes, data.steps, read, log.say)

    # The settings of the run, and how far it has come.
    identity = make_identity(args, flags, train_images, opened.fingerprints["training"], spec)
    num_images = train_images.num_images, val_images.num_images
    highest = build.highest_rate(flags, data.steps)
    log.table(summary.describe_run(identity, training, data.steps, num_images, highest))
    for warning in summary.warnings(identity.args, data.steps, training, highest):
        log.say(f"warning: {warning}")
    progress = run_state.Progress(flags.start_epoch, flags.start_epoch * data.steps)
    if checkpoint is not None:
        accepted, source = args.accept_changes or (), f"--resume {resume_from}"
        progress = run_state.load(checkpoint, source, training, identity, accepted)
        for line in summary.describe_resuming(resume_from, checkpoint, progress, identity):
            log.say(line)
    if data.bad_images is not None:
        data.bad_images.load(progress.bad_images)
    end = end_of(flags, progress)
    prepare_output(log, folder, resume_from, checkpoint, progress, identity, end)
    schedule = build.make_schedule(flags, training, data.steps, progress)

    samples = data.val_loader.dataset if folder else None  # without a folder no picture is saved
    draw_picture = make_picture_drawer(training, samples, spec, train_images.class_names)
    return Run(
        rules=Rules.of(flags),
        training=training,
        data=data,
        identity=identity,
        progress=progress,
        schedule=schedule,
        agreement=RankAgreement(processes, flags.save_minutes),
        output=Output(log, folder, bool(flags.output_dir), draw_picture),
    )


def open_images(
    flags: Flags,
    processes: Processes,
    log: RunLog,
    read: CheckpointReader,
    checkpoint: dict[str, Any] | None = None,
    names: Sequence[str] = SPLITS,
) -> same_start.Opened:
    """Opens the images of these splits on all ranks, and says what was passed over in folders."""
    opened = same_start.open_images(
        processes,
        lambda: {name: build.open_images(flags, name == "training", read) for name in names},
        checkpoint,
    )
    for name, images in opened.images.items():
        if images.note:
            log.say(f"{name} images: {images.note}")
    return opened


def make_identity(
    args: argparse.Namespace,
    flags: Flags,
    train_images: Any,
    fingerprint: str,
    spec: ImageSpec,
) -> run_state.Identity:
    """The settings of the run, as its checkpoints keep them."""
    return run_state.Identity(
        args=vars(flags),
        model_config=model_config(flags, len(train_images.class_names)),
        data={
            "class_names": train_images.class_names,
            "image_spec": spec.to_plain(),
            "num_images": train_images.num_images,
            "fingerprint": fingerprint,
        },
        versions=utils.describe_versions(),
        asked={"batch_size": args.batch_size, "accum_steps": args.accum_steps},
    )


def shares_of_resumed(
    args: argparse.Namespace,
    checkpoint: dict[str, Any] | None,
    processes: Processes,
    log: RunLog,
) -> dict[str, int]:
    """`batch_size` and `accum_steps` of a run that is resumed with another number of processes.

    They keep its total batch. The result is empty if the command line is already right.
    """
    if checkpoint is None:
        return {}
    asked = {"batch_size": args.batch_size, "accum_steps": args.accum_steps}
    if args.total_batch is not None:
        asked["total_batch"] = args.total_batch
    changes = run_state.keep_total_batch(
        checkpoint, asked, processes.world_size, args.accept_changes or ()
    )
    size, old_size = processes.world_size, checkpoint.get("world_size")
    reason = f"{size} processes instead of {old_size}"
    if size == old_size:  # the run was started with --total-batch, which is left out now
        reason = "the total batch stays as it was"
    for name, value in changes.items():
        log.say(f"{reason}: --{name} is now {value}")
    return changes


def end_of(flags: Flags, progress: run_state.Progress) -> str:
    """The end that the run has already reached, as text; "" if it has not ended."""
    if progress.epoch >= flags.epochs:
        return f"all {flags.epochs} epochs"
    if flags.max_steps is not None and progress.step >= flags.max_steps:
        return f"{progress.step} steps"
    return ""


def prepare_output(
    log: RunLog,
    folder: RunFolder | None,
    resume_from: str,
    checkpoint: dict[str, Any] | None,
    progress: run_state.Progress,
    identity: run_state.Identity,
    end: str,
) -> None:
    """Restores log and output folder to the state of the checkpoint, and writes the settings.

    Args:
        resume_from: the path of `checkpoint`.
        end: the result of `end_of`; if it is not "", the log is not changed.
    """
    if not end:
        log.drop_epochs_from(progress.epoch, progress.step)
    if folder is not None:
        if checkpoint is not None:
            names = checkpoint.get("names", ())
            for path in folder.rewind_to(Path(resume_from), progress.step, names):
                log.say(f"warning: a later checkpoint was renamed to {path}")
        write_json(folder.path / "args.json", identity.args)
        environment = {**identity.versions, "draws": run_state.DRAWS}
        write_json(folder.path / "environment.json", environment)
    if end:
        log.say(f"nothing left to do: {end} are done")


def make_picture_drawer(
    training: engine.Training, samples: Any, spec: ImageSpec, class_names: list[str]
) -> Callable[[int], torch.Tensor | None]:
    """A function that draws the picture of a mixed batch: epoch -> picture or None.

    Every epoch uses the same 8 validation images, in 4 pairs. The function returns None if nothing
    is mixed, or if the validation images are a stream.

    Args:
        samples: the validation samples; None if no picture is saved.
    """
    mixer = training.mixer.first
    if isinstance(mixer, NoMixing) or not isinstance(samples, EvalSamples):
        return lambda epoch: None
    device = training.processes.device
    images, labels = engine.to_device(device, *pictures.spread_samples(samples, 8))

    def draw(epoch: int) -> torch.Tensor:
        random = utils.keyed_generator("picture", training.seed, epoch)
        # Not by the compiled guide: these 8 images would make rank 0 compile it once more.
        with torch.compiler.set_stance("force_eager"):
            batch = mixer(images, labels, training.guide, StepRandom(random, random))
        batch = engine.settle_labels(training.module, batch, training.autocast)
        return pictures.mixing_picture(
            images,
            batch,
            labels,
            spec=spec,
            class_names=class_names,
            grid_size=training.module.grid_size,
        )

    return draw


def record_failure(
    output_dir: str, folder: RunFolder | None, rank: int, error: BaseException, has_begun: bool
) -> None:
    """Writes the error that ended the run into `status.json`, by way of rank 0.

    Raises:
        InputError: the file cannot be written.
    """
    text = error.text if isinstance(error, StopRun) else str(error)
    other_code = STOPPED if isinstance(error, KeyboardInterrupt) else 1
    cause = {
        "exit_code": error.exit_code if isinstance(error, StopRun) else other_code,
        "error": (text or type(error).__name__).splitlines()[0],
    }
    if folder is not None:
        folder.fail(cause, has_begun, is_lost_peer(error))
    elif output_dir and not is_lost_peer(error):
        write_failure(Path(output_dir), rank, cause)


def save_bad_batch(output_dir: str, rank: int, failure: NonFiniteLoss) -> None:
    """Writes the micro-batch whose loss was not finite, on each rank that had such a loss."""
    if output_dir and failure.evidence is not None:
        save_checkpoint(Path(output_dir) / f"not_finite_rank{rank}.pth", failure.evidence)


# ------------------------------------------------------------------------------------- evaluation


def evaluate(
    args: argparse.Namespace, processes: Processes, log: RunLog, read: CheckpointReader
) -> None:
    """`--eval`: prints the accuracy and loss of a checkpoint, and of its average.

    The model and its input are those of the checkpoint. Weights of other projects (DeiT, timm) do
    not describe them; then the flags do.
    """
    flags = resolve(args, processes.world_size, processes.device.type)
    checkpoint = read(args.resume)
    opened = open_images(flags, processes, log, read, names=("validation",))
    images = opened.images["validation"]
    if run_state.is_own_checkpoint(checkpoint):
        spec = ImageSpec.from_plain(checkpoint["data"]["image_spec"])
        spec = replace(spec, crop_ratio=flags.eval_crop_ratio or spec.crop_ratio)
        datasets.check_same_classes(checkpoint["data"]["class_names"], images.class_names)
        names = [name for name in ("model", "ema") if checkpoint[name] is not None]
        models = {name: restore_model(checkpoint, name == "ema") for name in names}
    else:
        model = build_model(**model_config(flags, len(images.class_names)))
        for note in load_foreign(model, checkpoint, flags.resume, fresh_heads=False):
            log.say(f"{flags.resume}: {note}")
        spec = datasets.image_spec_for(flags.data_set, model.input_size, flags.eval_crop_ratio)
        models = {"model": model}
    loader = build.make_eval_loader(flags, images, spec, processes)
    autocast = precision.make_autocast(processes.device, flags.amp)
    for name, model in models.items():
        if flags.attn_fp32:
            use_float32_attention(model, flags.model)
        with loaders.closing(loader):
            figures = engine.evaluate(model.to(processes.device), loader, processes, autocast)
        missing = images.num_images - round(figures["images"])  # only streams leave images out
        log.say(
            f"{flags.resume} ({name}): top-1 {figures['acc1']:.3f} %, "
            f"top-5 {figures['acc5']:.3f} %, loss {figures['loss']:.4f} "
            f"on {figures['images']:.0f} images"
            + (f"; {missing} of {images.num_images} were left out" if missing > 0 else "")
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command line in this process. `errors.run_command` turns errors into messages."""
    read = CheckpointReader()
    args = read_args(argv, read)
    if args.list_models:
        for row in list_models():
            print("{:<26} {:<56} {:<9} {}".format(*row), flush=True)
        return
    processes = utils.init_processes(args.device, args.data_timeout)
    with RunLog(args.output_dir or None, processes) as log:
        if args.config:
            log.say(f"flags from {', '.join(args.config)}, then the command line")
        same_start.check_command(args, processes)
        (evaluate if args.eval else train)(args, processes, log, read)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
