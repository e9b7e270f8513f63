"""Training and evaluation: flags -> objects -> epochs.

    torchrun --nproc_per_node=4 main.py --model deit_small_patch16_224 --data-path /imagenet --output_dir output

Flags become objects here and in `assembly.py`; the parsed namespace never leaves these two. No tensor arithmetic here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
    total_batch,
)
from corrupt import CorruptImages
from health import NonFiniteLoss
from logs import RunLog, write_json
from meters import Meters
from mixers.interface import NoMixing, StepRandom
from mixers.switch import Switch
from models.build import build_model, list_models, load_foreign, restore_model, use_float32_attention
from options import check_args, explicit_flags, get_args_parser
from run_folder import RunFolder
from utils import Processes
from watch import Stopped, Watch, Watched


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


@dataclass
class Run:
    """A training run under way: what is trained, on what, how far it has come, and where that is kept.

    Args:
        folder: of rank 0, if there is an output folder.
        steps: optimizer steps per epoch.
        total_batch: images of all ranks per step.
    """

    args: argparse.Namespace
    training: engine.Training
    mixer: Switch
    train_loader: Any
    val_loader: Any
    identity: resume.Identity
    progress: resume.Progress
    schedule: optim.Schedule
    watch: Watch
    log: RunLog
    folder: RunFolder | None
    show: Callable[[int], torch.Tensor | None]
    corrupt: CorruptImages | None
    steps: int
    total_batch: int

    def train(self) -> str:
        """To the last epoch, or until the ranks agree to stop; returns `done` or `preempted`."""
        while self.progress.epoch < self.args.epochs:
            try:
                self.run_epoch()
            except Stopped:
                self.share_bad_images()
                self.save()
                where = f"epoch {self.progress.epoch}, step {self.progress.step}"
                reason = self.watch.reason or "another process was asked to"
                self.log.say(f"stopped at {where} ({reason}); the same command with --auto-resume goes on from here")
                return "preempted"
        return "done"

    def run_epoch(self) -> None:
        """Trains what is left of this epoch, evaluates, and saves."""
        progress, groups = self.progress, self.training.optimizer.param_groups
        if progress.samples == 0 or progress.first_rate is None:
            progress.first_rate = groups[0]["lr"]
        self.training.mixer = self.mixer.at(progress.epoch)
        loaders.set_epoch(self.train_loader, progress.epoch, progress.samples)
        done, began, count = progress.step, time.perf_counter(), len(self.train_loader)
        batches = self.log.progress(self.train_loader, count, f"epoch {progress.epoch}")
        if engine.train_one_epoch(
            self.training, batches, first_step=progress.step, meters=progress.meters, on_log=self.on_log,
            after_step=self.after_step, log_every=self.args.log_every,
        ):  # fmt: skip
            raise Stopped
        self.on_log(progress.step - 1, {}, self.training.health.check())
        self.share_bad_images()
        images = (progress.step - done) * self.total_batch
        seconds = time.perf_counter() - began
        watched = Watched(self.watch, self.val_loader, loaders.largest_share(self.val_loader))
        figures = progress.meters.copy().reduce(self.training.processes).read()
        stats = {
            "epoch": progress.epoch,
            "lr": progress.first_rate,
            **{f"train_{name}": value for name, value in figures.items()},
            "train_images_per_second": images / seconds,
            **engine.evaluate_all(self.training, watched),
            "n_parameters": sum(p.numel() for p in self.training.module.parameters() if p.requires_grad),
            "skipped_steps": int(self.training.health.told),
            "peak_memory_mb": utils.peak_memory_mb(self.training.processes.device),
        }
        self.end_epoch(stats)

    def on_log(self, step: int, means: dict[str, float], trouble: str | None) -> None:
        if trouble is not None:
            self.log.say(f"warning: {trouble}")
        if means:
            values = {**means, "lr": self.training.optimizer.param_groups[0]["lr"]}
            self.log.note(values)
            self.log.scalars(step, values)

    def after_step(self, indices: torch.Tensor) -> bool:
        """Counts a step, saves where that is due, and says whether all ranks stop."""
        progress, every = self.progress, self.args.save_steps
        progress.step, progress.samples = progress.step + 1, progress.samples + self.total_batch
        agreed = self.watch.agree(0 if self.corrupt is None else self.corrupt.see(indices))
        if agreed.bad_images:
            self.share_bad_images()
        if agreed.save or (every and progress.step % every == 0 and not agreed.stop):
            self.save()
        return agreed.stop

    def share_bad_images(self) -> None:
        """Tells all ranks which images could not be read, says it once, and stops the run if they are too many."""
        if self.corrupt is None:
            return
        new = self.corrupt.merge(self.training.processes.gather(self.corrupt.state()))
        if new:
            self.log.say(f"warning: {self.corrupt.report(new)}")
        self.progress.bad_images = self.corrupt.state()
        self.corrupt.stop_if_too_many()

    def end_epoch(self, stats: dict[str, Any]) -> None:
        progress = self.progress
        self.schedule.after_epoch(progress.epoch)
        is_best = stats["test_acc1"] >= progress.best_acc1
        progress.best_acc1 = max(progress.best_acc1, stats["test_acc1"])
        self.log.epoch(stats)
        self.log.say(f"epoch {progress.epoch}: top-1 {stats['test_acc1']:.2f} %, best {progress.best_acc1:.2f} %")
        if self.folder is not None and (picture := self.show(progress.epoch)) is not None:
            pictures.save_png(picture, self.folder.path / "mixing.png")
            self.log.picture("mixing", picture, progress.epoch)
        progress.epoch, progress.samples, progress.meters = progress.epoch + 1, 0, Meters()
        self.save("checkpoint.pth", *(["best_checkpoint.pth"] if is_best else []))

    def save(self, *names: str) -> None:
        """Keeps the run as it is now; all ranks call it."""
        if not self.args.output_dir:
            return
        if self.progress.samples and not loaders.can_start_within(self.train_loader):
            self.log.say("a stream cannot be gone on with in the middle of an epoch: nothing is saved now")
            return
        resume.save(self.folder, self.training, self.progress, self.identity, names)
        self.watch.saved()
        if self.folder is not None:
            self.folder.status("running", epoch=self.progress.epoch, step=self.progress.step)


def train(args: argparse.Namespace, processes: Processes, log: RunLog) -> None:
    """From flags to the last epoch, with everything that ends with it."""
    folder = RunFolder(args.output_dir, args.keep_checkpoints) if args.output_dir and processes.is_main else None
    with ExitStack() as ending:
        processes.from_main(lambda: folder and folder.open())
        if folder is not None:
            ending.callback(folder.close)
        path, notes = processes.from_main(lambda: resume.find(args.output_dir, args.resume, args.auto_resume))
        for note in notes:
            log.say(f"warning: {note}")
        try:
            run = make_run(args, processes, log, folder, path)
            if folder is not None:
                folder.status("running", epoch=run.progress.epoch, step=run.progress.step)
            with loaders.closing(run.train_loader, run.val_loader), run.watch:
                state = run.train()
        except BaseException as error:
            if folder is not None:
                code = error.exit_code if isinstance(error, utils.StopRun) else 1
                folder.status("failed", exit_code=code, error=str(error).splitlines()[:1])
            if isinstance(error, NonFiniteLoss):
                keep_evidence(args.output_dir, processes.rank, error)
            raise
        if folder is not None:
            folder.status(state, epoch=run.progress.epoch, step=run.progress.step)


def keep_evidence(output_dir: str, rank: int, failure: NonFiniteLoss) -> None:
    """Each rank that met a loss that was not finite writes what it was given."""
    if output_dir and failure.evidence is not None:
        checkpoints.save_checkpoint(Path(output_dir) / f"not_finite_rank{rank}.pth", failure.evidence)


def make_run(
    args: argparse.Namespace, processes: Processes, log: RunLog, folder: RunFolder | None, resume_from: str
) -> Run:
    """Everything a run needs, put back to where `resume_from` left it."""
    resume.check_agreement(resume_from, processes)
    checkpoint, accepted = resume.read(resume_from) if resume_from else None, args.accept_changes or ()
    if checkpoint is not None:
        shares = {"batch_size": args.batch_size, "accum_steps": args.accum_steps}
        for name, value in resume.keep_total_batch(checkpoint, shares, processes.world_size, accepted).items():
            log.say(f"{processes.world_size} processes instead of {checkpoint['world_size']}: --{name} is now {value}")
            setattr(args, name, value)
    train_images, val_images = open_images(args, train=True), open_images(args, train=False)
    datasets.check_same_classes(train_images.class_names, val_images.class_names)
    num_classes = len(train_images.class_names)
    model = make_model(args, num_classes, processes, log, load_weights=not resume_from)
    spec = datasets.image_spec_for(args.data_set, model.input_size, args.eval_crop_ratio)
    train_loader = make_train_loader(args, train_images, spec, processes)
    val_loader = make_eval_loader(args, val_images, spec, processes)
    mixer = make_mixer(args, model, spec, processes)
    training = make_training(args, model, mixer, processes)
    data = {"class_names": train_images.class_names, "image_spec": spec.to_plain()}
    identity = resume.Identity(
        vars(args), model_config(args, num_classes), {**data, "num_images": train_images.num_images},
        utils.describe_versions(),
    )  # fmt: skip
    steps = loaders.steps_per_epoch(train_loader)
    log.table(summary.describe_run(identity, training, steps, (train_images.num_images, val_images.num_images)))
    for warning in summary.warnings(identity.args, steps):
        log.say(f"warning: {warning}")
    progress = resume.Progress(args.start_epoch, args.start_epoch * steps)
    if checkpoint is not None:
        progress = resume.load(checkpoint, f"--resume {resume_from}", training, identity, accepted)
        within = f" after {progress.samples} images" if progress.samples else ""
        log.say(
            f"resumed from {resume_from}; next is epoch {progress.epoch}{within}, best top-1 {progress.best_acc1:.2f}"
        )
        if checkpoint["versions"] != identity.versions:
            changed = [f"{k} {v}" for k, v in identity.versions.items() if checkpoint["versions"].get(k) != v]
            log.say(f"warning: the run was begun with other versions than {', '.join(changed)}")
    log.drop_epochs_from(progress.epoch, progress.step)
    if folder is not None:
        write_json(folder.path / "args.json", identity.args)
        write_json(folder.path / "environment.json", identity.versions)
    if progress.epoch >= args.epochs:
        log.say(f"nothing left to do: all {args.epochs} epochs are done")
    schedule = optim.Schedule(
        training.optimizer, schedule_settings(args, processes), steps, progress.epoch, progress.step
    )
    training.after_update = schedule.after_update
    samples = val_loader.dataset if folder else None  # what nobody keeps is not drawn
    show = make_painter(training, mixer, samples, spec, train_images.class_names, processes)
    corrupt = CorruptImages(train_images.num_images, train_images.name_of) if args.skip_corrupt else None
    if corrupt is not None:
        corrupt.load(progress.bad_images)
    return Run(
        args, training, mixer, train_loader, val_loader, identity, progress, schedule,
        Watch(processes, args.save_minutes), log, folder, show, corrupt, steps, total_batch(args, processes),
    )  # fmt: skip


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
        if args.attn_fp32:
            use_float32_attention(model, args.model)
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
