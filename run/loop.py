"""A training run under way: its epochs, what is said and saved of them, and where it stops.

Knows no flags as such: those that govern a run are in `Rules`. What is trained was built elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import engine
import utils
from mixers.switch import Switch
from pipeline import loaders
from pipeline.bad_images import CorruptImages
from run import pictures, state
from run.agreement import Stopped, Watch, Watched
from run.folder import RunFolder
from run.log import RunLog
from training import optim
from training.meters import Meters

LONG_WAIT = (
    0.1,
    5.0,
)  # share of an epoch's time and seconds in it from which on waiting for data is spoken of


class Waits:
    """Passes an epoch's batches on and counts the seconds, on the host, from asking for one until
    it is there.

    The first wait of an epoch, in which workers start, counts in the mean and not in the share. A
    clock: no checkpoint keeps any of it.
    """

    def __init__(self, loader: Iterable[Any] = ()) -> None:
        self.loader = loader
        self.seconds = self.first = self.told_seconds = 0.0
        self.batches = self.told_batches = 0

    def __iter__(self) -> Iterator[Any]:
        batches = None
        while True:
            asked = time.perf_counter()
            batches = iter(self.loader) if batches is None else batches  # starts workers
            batch = next(batches, None)
            if batch is None:
                return
            waited = time.perf_counter() - asked
            self.first = self.first if self.batches else waited
            self.seconds, self.batches = self.seconds + waited, self.batches + 1
            yield batch

    def mean(self) -> float:
        """Seconds per batch so far."""
        return self.seconds / max(self.batches, 1)

    def recent(self) -> float:
        """Seconds per batch since the last call."""
        seconds, batches = self.seconds - self.told_seconds, self.batches - self.told_batches
        self.told_seconds, self.told_batches = self.seconds, self.batches
        return seconds / max(batches, 1)

    def is_long(self, seconds: float) -> bool:
        """Whether an epoch that took `seconds` spent too much of them waiting, its beginning left
        out."""
        waited = self.seconds - self.first
        return waited > LONG_WAIT[1] and waited > LONG_WAIT[0] * (seconds - self.first)


class Rules(NamedTuple):
    """The flags that say how far a run goes and how often it speaks and saves."""

    epochs: int
    log_every: int
    save_steps: int
    max_steps: int | None = None
    eval_every: int = 1  # epochs


@dataclass
class Run:
    """A training run under way: what is trained, on what, how far it has come, and where that is
    kept.

    Args:
        is_kept: whether there is an output folder.
        folder: it, on rank 0.
        steps: optimizer steps per epoch.
        total_batch: images of all ranks per step.
    """

    rules: Rules
    training: engine.Training
    mixer: Switch
    train_loader: Any
    val_loader: Any
    identity: state.Identity
    progress: state.Progress
    schedule: optim.Schedule
    watch: Watch
    log: RunLog
    is_kept: bool
    folder: RunFolder | None
    show: Callable[[int], torch.Tensor | None]
    corrupt: CorruptImages | None
    steps: int
    total_batch: int
    waits: Waits = field(default_factory=Waits)
    has_warned: bool = False  # of long waits

    def train(self) -> str:
        """To the last epoch or step, or until the ranks agree to stop; returns `done` or
        `preempted`."""
        while self.progress.epoch < self.rules.epochs and not self.at_last_step:
            try:
                self.run_epoch()
            except Stopped:
                self.save()
                where = f"epoch {self.progress.epoch}, step {self.progress.step}"
                reason = self.watch.reason or "another process was asked to"
                self.log.say(
                    f"stopped at {where} ({reason}); the same command with --auto-resume goes on "
                    "from here"
                )
                return "preempted"
        return "done"

    @property
    def at_last_step(self) -> bool:
        return self.rules.max_steps is not None and self.progress.step >= self.rules.max_steps

    def run_epoch(self) -> None:
        """Trains what is left of this epoch, evaluates, and saves."""
        progress, groups = self.progress, self.training.optimizer.param_groups
        if progress.samples == 0 or progress.first_rate is None:
            progress.first_rate = groups[0]["lr"]
        self.training.mixer = self.mixer.at(progress.epoch)
        loaders.set_epoch(self.train_loader, progress.epoch, progress.samples)
        done, began, count = progress.step, time.perf_counter(), len(self.train_loader)
        self.waits = Waits(self.train_loader)
        batches = self.log.progress(self.waits, count, f"epoch {progress.epoch}")
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
        self.on_log(progress.step - 1, {}, self.training.health.check())
        self.share_bad_images()
        images = (progress.step - done) * self.total_batch
        seconds = time.perf_counter() - began
        figures = self.read_meters(seconds)
        stats = {
            "epoch": progress.epoch,
            "lr": progress.first_rate,
            **{f"train_{name}": value for name, value in figures.items()},
            "train_images_per_second": images / seconds,
            **(self.evaluate() if self.is_evaluated else {}),
            "n_parameters": sum(
                p.numel() for p in self.training.module.parameters() if p.requires_grad
            ),
            "skipped_steps": int(self.training.health.told),
            "peak_memory_mb": utils.peak_memory_mb(self.training.processes.device),
        }
        self.end_epoch(stats)

    @property
    def is_evaluated(self) -> bool:
        """Whether the epoch under way ends with an evaluation."""
        done = self.progress.epoch + 1
        return done % self.rules.eval_every == 0 or done == self.rules.epochs or self.at_last_step

    def evaluate(self) -> dict[str, float]:
        watched = Watched(self.watch, self.val_loader, loaders.largest_share(self.val_loader))
        return engine.evaluate_all(self.training, watched)

    def read_meters(self, seconds: float) -> dict[str, float]:
        """The epoch's means over all ranks; says once per run if many of its `seconds` were spent
        waiting for data."""
        waits, meters = self.waits, self.progress.meters.copy()
        meters.update(waits.batches, data_wait=waits.mean() * self.training.accum_steps)
        if waits.is_long(seconds) and not self.has_warned:
            self.has_warned = True
            self.log.say(
                f"warning: {waits.seconds / seconds:.0%} of this epoch's time went by waiting for "
                "data; raise "
                "--num-workers, or see --decoder, --resize and --randaugment"
            )
        return meters.reduce(self.training.processes).read()

    def on_log(self, step: int, means: dict[str, float], trouble: str | None) -> None:
        if trouble is not None:
            self.log.say(f"warning: {trouble}")
        if means:
            wait = self.waits.recent() * self.training.accum_steps
            values = {
                **means,
                "data_wait": wait,
                "lr": self.training.optimizer.param_groups[0]["lr"],
            }
            self.log.note(values)
            self.log.scalars(step, values)

    def after_step(self, indices: torch.Tensor) -> bool:
        """Counts a step, saves where that is due, and says whether all ranks stop."""
        progress, every = self.progress, self.rules.save_steps
        progress.step, progress.samples = progress.step + 1, progress.samples + self.total_batch
        agreed = self.watch.agree(0 if self.corrupt is None else self.corrupt.see(indices))
        if agreed.bad_images:
            self.share_bad_images()
        if agreed.save or (every and progress.step % every == 0 and not agreed.stop):
            self.save()
        return agreed.stop or self.at_last_step

    def share_bad_images(self) -> None:
        """Tells all ranks which images could not be read, says it once, and stops the run if they
        are too many."""
        if self.corrupt is None:
            return
        new = self.corrupt.merge(self.training.processes.gather(self.corrupt.state()))
        if new:
            self.log.say(f"warning: {self.corrupt.report(new)}")
        self.progress.bad_images = self.corrupt.state()
        self.corrupt.stop_if_too_many()

    def end_epoch(self, stats: dict[str, Any]) -> None:
        progress = self.progress
        if progress.samples < self.steps * self.total_batch:
            self.log.epoch(stats)
            self.log.say(
                f"ended in epoch {progress.epoch} after {progress.step} steps, as --max-steps says"
            )
            self.save("checkpoint.pth")  # within the epoch, so that a longer run goes on there
            return
        self.schedule.after_epoch(progress.epoch)
        acc1 = stats.get("test_acc1", -1.0)  # below any, where it was not evaluated
        is_best = acc1 >= progress.best_acc1
        progress.best_acc1 = max(progress.best_acc1, acc1)
        self.log.epoch(stats)
        told = (
            f"top-1 {acc1:.2f} %, best {progress.best_acc1:.2f} %"
            if "test_acc1" in stats
            else "not evaluated"
        )
        self.log.say(f"epoch {progress.epoch}: {told}")
        if self.folder is not None and (picture := self.show(progress.epoch)) is not None:
            pictures.save_png(picture, self.folder.path / "mixing.png")
            self.log.picture("mixing", picture, progress.epoch)
        progress.epoch, progress.samples, progress.meters = progress.epoch + 1, 0, Meters()
        self.save("checkpoint.pth", *(["best_checkpoint.pth"] if is_best else []))

    def save(self, *names: str) -> None:
        """Keeps the run as it is now; all ranks call it."""
        if not self.is_kept:
            return
        if self.progress.samples and not loaders.can_start_within(self.train_loader):
            self.log.say(
                "a stream cannot be gone on with in the middle of an epoch: nothing is saved now"
            )
            return
        self.share_bad_images()
        self.log.flush()
        state.save(self.folder, self.training, self.progress, self.identity, names)
        self.watch.saved()
        if self.folder is not None:
            self.folder.status("running", epoch=self.progress.epoch, step=self.progress.step)
