"""The loop over the epochs of a run: training, evaluation, logging, saving and stopping.

`main.py` builds the objects that a `Run` holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import engine
import utils
from pipeline import loaders
from pipeline.bad_images import BadImages
from pipeline.samples import Batch
from run import pictures, state
from run.agreement import RankAgreement, StoppableLoader, Stopped
from run.folder import RunFolder
from run.log import RunLog
from training import optim
from training.meters import Meters

# A warning is printed if the waiting for data takes more than this share of an epoch and also more
# than this number of seconds.
LONG_WAIT_SHARE, LONG_WAIT_SECONDS = 0.1, 5.0


class TimedLoader:
    """Yields the batches of an epoch and measures how long the host waits for each.

    The workers start during the first wait of an epoch. It counts in `mean`, but not in `is_long`.
    These times are not saved in checkpoints.
    """

    def __init__(self, loader: Iterable[Batch] = ()) -> None:
        self.loader = loader
        self.seconds = self.first = self.reported_seconds = 0.0
        self.batches = self.reported_batches = 0

    def __iter__(self) -> Iterator[Batch]:
        batches = None
        while True:
            began = time.perf_counter()
            batches = iter(self.loader) if batches is None else batches  # starts the workers
            batch = next(batches, None)
            if batch is None:
                return
            waited = time.perf_counter() - began
            self.first = self.first if self.batches else waited
            self.seconds, self.batches = self.seconds + waited, self.batches + 1
            yield batch

    def mean(self) -> float:
        """Seconds of waiting per batch, over all batches so far."""
        return self.seconds / max(self.batches, 1)

    def recent(self) -> float:
        """Seconds of waiting per batch since the last call."""
        seconds = self.seconds - self.reported_seconds
        batches = self.batches - self.reported_batches
        self.reported_seconds, self.reported_batches = self.seconds, self.batches
        return seconds / max(batches, 1)

    def is_long(self, seconds: float) -> bool:
        """Whether an epoch of this many seconds spent too many of them waiting for data."""
        waited = self.seconds - self.first
        is_large_share = waited > LONG_WAIT_SHARE * (seconds - self.first)
        return waited > LONG_WAIT_SECONDS and is_large_share


class Rules(NamedTuple):
    """The flags that decide where a run ends and how often it logs, evaluates and saves."""

    epochs: int
    log_every: int  # steps
    save_steps: int  # steps; 0 saves only after epochs
    max_steps: int | None = None
    eval_every: int = 1  # epochs

    @classmethod
    def of(cls, flags: Any) -> Rules:
        """From resolved flags of the same names."""
        return cls(*(getattr(flags, name) for name in cls._fields))


class Data(NamedTuple):
    """The loaders of a run, and its unreadable images."""

    train_loader: loaders.Loader
    val_loader: loaders.Loader
    total_batch: int  # images of all ranks per step
    bad_images: BadImages | None = None  # None without `--skip-corrupt`

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return loaders.steps_per_epoch(self.train_loader)


class Output(NamedTuple):
    """Where a run prints and saves."""

    log: RunLog
    folder: RunFolder | None  # None on ranks other than 0, and without `--output-dir`
    is_kept: bool  # whether the run has an output folder; equal on all ranks
    draw_picture: Callable[[int], torch.Tensor | None]  # epoch -> picture of a mixed batch


@dataclass
class Run:
    """A run with everything that it needs: rules, model, data, progress and output."""

    rules: Rules
    training: engine.Training
    data: Data
    identity: state.Identity
    progress: state.Progress
    schedule: optim.Schedule
    agreement: RankAgreement
    output: Output
    timed: TimedLoader = field(default_factory=TimedLoader)
    has_warned_of_waits: bool = False

    def train(self) -> str:
        """Trains to the last epoch or step, or until the ranks agree to stop.

        Returns:
            `done` or `preempted`.
        """
        while self.progress.epoch < self.rules.epochs and not self.at_last_step:
            try:
                self.run_epoch()
            except Stopped:
                self.save()
                where = f"epoch {self.progress.epoch}, step {self.progress.step}"
                reason = self.agreement.reason or "requested by another rank"
                self.output.log.say(
                    f"stopped at {where} ({reason}); resume with the same command and --auto-resume"
                )
                return "preempted"
        return "done"

    @property
    def at_last_step(self) -> bool:
        return self.rules.max_steps is not None and self.progress.step >= self.rules.max_steps

    def run_epoch(self) -> None:
        """Trains the rest of the current epoch, evaluates, and saves a checkpoint.

        Raises:
            Stopped: all ranks have agreed to stop, and no checkpoint is saved yet.
        """
        progress = self.progress
        if progress.samples == 0 or progress.first_rate is None:
            progress.first_rate = optim.largest_rate(self.training.optimizer)
        self.training.mixer.set_epoch(progress.epoch)
        loaders.set_epoch(self.data.train_loader, progress.epoch, progress.samples)
        done, began, count = progress.step, time.perf_counter(), len(self.data.train_loader)
        self.timed = TimedLoader(self.data.train_loader)
        batches = self.output.log.progress(self.timed, count, f"epoch {progress.epoch}")
        stopped = engine.train_one_epoch(
            self.training,
            batches,
            first_step=progress.step,
            meters=progress.meters,
            on_log=self.on_log,
            after_step=self.after_step,
            log_every=self.rules.log_every,
        )
        if stopped and not self.at_last_step:
            raise Stopped
        self.on_log(progress.step - 1, {}, self.training.nonfinite.check())
        self.share_bad_images()
        images = (progress.step - done) * self.data.total_batch
        seconds = time.perf_counter() - began
        means = self.read_meters(seconds)
        trained = [p for p in self.training.module.parameters() if p.requires_grad]
        stats = {
            "epoch": progress.epoch,
            "lr": progress.first_rate,
            **{f"train_{name}": value for name, value in means.items()},
            "train_images_per_second": images / seconds,
            **(self.evaluate() if self.is_evaluated else {}),
            "n_parameters": sum(p.numel() for p in trained),
            "skipped_steps": int(self.training.nonfinite.reported),
            "peak_memory_mb": utils.peak_memory_mb(self.training.processes.device),
        }
        self.end_epoch(stats)

    @property
    def is_evaluated(self) -> bool:
        """Whether the current epoch ends with an evaluation."""
        done = self.progress.epoch + 1
        return done % self.rules.eval_every == 0 or done == self.rules.epochs or self.at_last_step

    def evaluate(self) -> dict[str, float]:
        """The figures of the validation images, under the names of `log.txt`.

        Raises:
            Stopped: all ranks have agreed to stop.
        """
        loader = self.data.val_loader
        stoppable = StoppableLoader(self.agreement, loader, loaders.largest_share(loader))
        return engine.evaluate_all(self.training, stoppable)

    def read_meters(self, seconds: float) -> dict[str, float]:
        """The epoch's means over all ranks. Warns about long waits for data, once per run.

        Args:
            seconds: how long the training of this epoch took.
        """
        timed, meters = self.timed, self.progress.meters.copy()
        meters.update(timed.batches, data_wait=timed.mean() * self.training.accum_steps)
        if timed.is_long(seconds) and not self.has_warned_of_waits:
            self.has_warned_of_waits = True
            self.output.log.say(
                f"warning: {timed.seconds / seconds:.0%} of this epoch's time was spent waiting "
                "for data; raise --num-workers, or see --decoder, --resize and --randaugment"
            )
        return meters.reduce(self.training.processes).read()

    def on_log(self, step: int, means: dict[str, float], warning: str | None) -> None:
        """Prints a warning and the means since the last logging step, if there are any."""
        if warning is not None:
            self.output.log.say(f"warning: {warning}")
        if means:
            wait = self.timed.recent() * self.training.accum_steps
            rate = optim.largest_rate(self.training.optimizer)
            values = {**means, "data_wait": wait, "lr": rate}
            self.output.log.note(values)
            self.output.log.scalars(step, values)

    def after_step(self, batches: list[Batch]) -> bool:
        """Counts a step, and saves a checkpoint if one is due. Returns whether to stop now."""
        progress, every = self.progress, self.rules.save_steps
        progress.step += 1
        progress.samples += self.data.total_batch
        agreed = self.agreement.agree(sum(map(self.count_bad_images, batches)))
        if agreed.bad_images:
            self.share_bad_images()
        if agreed.save or (every and progress.step % every == 0 and not agreed.stop):
            self.save()
        return agreed.stop or self.at_last_step

    def count_bad_images(self, batch: Batch) -> int:
        """How many images of a batch are unreadable and were not known as such on this rank."""
        if self.data.bad_images is None or batch.replaced is None:
            return 0
        return self.data.bad_images.add(batch.indices, batch.replaced)

    def share_bad_images(self) -> None:
        """Gathers the unreadable images of all ranks, and warns about those that are new.

        Raises:
            InputError: too many images cannot be read.
        """
        bad = self.data.bad_images
        if bad is None:
            return
        new = bad.merge(self.training.processes.gather(bad.state()))
        if new:
            self.output.log.say(f"warning: {bad.report(new)}")
        self.progress.bad_images = bad.state()
        bad.stop_if_too_many()

    def end_epoch(self, stats: dict[str, Any]) -> None:
        """Logs the values of an epoch and saves a checkpoint.

        If `--max-steps` has cut the epoch short, the checkpoint is within the epoch, so that a run
        with more steps resumes there.
        """
        progress, log = self.progress, self.output.log
        log.epoch(stats)
        if progress.samples < self.data.steps * self.data.total_batch:
            steps = progress.step
            log.say(f"ended in epoch {progress.epoch} after {steps} steps because of --max-steps")
            self.save("checkpoint.pth")
            return
        self.schedule.after_epoch(progress.epoch)
        acc1 = stats.get("test_acc1", -1.0)  # without evaluation, lower than any accuracy
        is_best = acc1 >= progress.best_acc1
        progress.best_acc1 = max(progress.best_acc1, acc1)
        result = "not evaluated"
        if "test_acc1" in stats:
            result = f"top-1 {acc1:.2f} %, best {progress.best_acc1:.2f} %"
        log.say(f"epoch {progress.epoch}: {result}")
        self.save_picture()
        progress.epoch, progress.samples, progress.meters = progress.epoch + 1, 0, Meters()
        self.save("checkpoint.pth", *(["best_checkpoint.pth"] if is_best else []))

    def save_picture(self) -> None:
        """Saves the epoch's picture of a mixed batch to the output folder and TensorBoard."""
        if self.output.folder is None:
            return
        picture = self.output.draw_picture(self.progress.epoch)
        if picture is not None:
            pictures.save_png(picture, self.output.folder.path / "mixing.png")
            self.output.log.picture("mixing", picture, self.progress.epoch)

    def save(self, *names: str) -> None:
        """Writes a checkpoint of the current state. All ranks call it.

        Args:
            names: further names of this checkpoint in the output folder.
        """
        if not self.output.is_kept:
            return
        if self.progress.samples and not loaders.can_start_mid_epoch(self.data.train_loader):
            self.output.log.say(
                "a stream cannot be resumed in the middle of an epoch: no checkpoint is saved now"
            )
            return
        self.share_bad_images()
        self.output.log.flush()
        state.save(self.output.folder, self.training, self.progress, self.identity, names)
        self.agreement.saved()
        self.write_status("running")

    def write_status(self, status: str) -> None:
        """Writes `status.json`: `running`, `done` or `preempted`, with epoch and step."""
        if self.output.folder is not None:
            epoch, step = self.progress.epoch, self.progress.step
            self.output.folder.status(status, epoch=epoch, step=step)
