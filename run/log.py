"""The output of a run: printed lines, `train.log`, `log.txt`, TensorBoard, the progress bar."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from errors import InputError, StopRun, dropping, printable, show
from storage.files import refused, write_atomically
from storage.plain_data import to_json, to_plain
from utils import Processes

Item = TypeVar("Item")


class RunLog:
    """Prints and records the progress of a run on rank 0. On other ranks each method does nothing.

    It writes these files into `output_dir`: `train.log` (the printed lines with their time),
    `log.txt` (one JSON object per epoch), and TensorBoard events (values per epoch in the folder
    itself, values per step in `steps/`). These are two TensorBoard runs, because TensorBoard hides
    the values of a resumed run from one step number on, and epochs and steps have other numbers.

    Args:
        output_dir: the folder for the files; None for no files.

    Raises:
        InputError: a file in `output_dir` cannot be written; any method may raise this.
    """

    def __init__(
        self, output_dir: str | Path | None, processes: Processes, tensorboard: bool = True
    ) -> None:
        self._active = processes.is_main
        self._folder = Path(output_dir) if output_dir is not None and self._active else None
        self._writers: dict[str, Any] = {}
        self._tensorboard = tensorboard and self._folder is not None
        self._purge_steps: dict[str, int | None] = {}
        self._bar: Any = None
        self._has_printed = False
        self._position = ""  # format of the position in the current loop, such as "epoch 3 [{}/9]"
        self._done = 0
        if self._folder is not None:
            # Only now: a folder that is renamed during the run must not be made again.
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise refused("write", self._folder, error) from error
        self._append("train.log", "")  # raises now if the file cannot be written

    def _append(self, name: str, text: str) -> None:
        """Appends to a file of the folder.

        The file is opened each time, so that a killed run loses no text.
        """
        if self._folder is None:
            return
        try:
            with open(self._folder / name, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise refused("write", self._folder / name, error) from error

    def say(self, text: str) -> None:
        """Prints `text` to stdout (above the progress bar) and appends it to `train.log`."""
        if not self._active:
            return
        self._has_printed, text = True, printable(text)
        if self._bar is not None:
            with dropping("stdout"):
                self._bar.write(text, file=sys.stdout)
                sys.stdout.flush()
        else:
            show(text)
        self._append_with_time(text)

    def _append_with_time(self, text: str) -> None:
        """Appends `text` to `train.log`, each line with the time."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = printable(text).splitlines()
        self._append("train.log", "".join(f"{now} {line}\n" for line in lines))

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Prints the rows as two aligned columns."""
        width = max((len(name) for name, _ in rows), default=0)
        lines = (f"{name:<{width}}  {printable(value, keep='')}".rstrip() for name, value in rows)
        self.say("\n".join(lines))

    # ---- progress

    def progress(
        self, iterable: Iterable[Item], total: int | None, description: str
    ) -> Iterator[Item]:
        """Yields the items of `iterable` and counts them.

        A progress bar is drawn if stderr is a terminal and tqdm is installed. Otherwise `note`
        prints plain lines.

        Args:
            total: number of items; None if it is not known.
            description: name of the loop, such as `epoch 3`.
        """
        if not self._active:
            yield from iterable
            return
        self._close_bar()  # the last loop may have ended early
        self._bar = _open_bar(total, description)
        count = "{}" if total is None else f"{{}}/{total}"
        self._position = f"{description} [{count}]"
        self._done = 0
        try:
            for item in iterable:
                yield item
                self._done += 1
                if self._bar is not None:
                    self._bar.update()
        finally:
            self._close_bar()

    def note(self, values: Mapping[str, Any]) -> None:
        """Writes current values into the bar or a printed line, and always into `train.log`.

        The line begins with the position in the loop of `progress`.
        """
        if not self._active:
            return
        texts = {
            name: f"{value:.4g}" if isinstance(value, float) else str(value)
            for name, value in values.items()
        }
        # The current item counts as done, because the caller has finished its work on it.
        position = self._position.format(self._done + 1) + " " if self._position else ""
        line = position + "  ".join(f"{name} {text}" for name, text in texts.items())
        if self._bar is None:
            self.say(line)
            return
        self._bar.set_postfix(texts, refresh=False)  # the bar redraws itself at its own rate
        self._append_with_time(line)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._position = None, ""

    # ---- numbers

    def epoch(self, stats: Mapping[str, Any]) -> None:
        """Appends the values of an epoch to `log.txt`, and its numbers to TensorBoard.

        NaN and inf are null in `log.txt`.

        Args:
            stats: the values by name; `epoch` is one of them.
        """
        if self._folder is None:
            return
        self._append("log.txt", to_json(stats) + "\n")
        values = to_plain(stats)
        epoch = int(values.pop("epoch"))
        self._write_scalars("", epoch, values)
        self.flush()

    def flush(self) -> None:
        """Writes TensorBoard's pending events to disk, so that a killed run does not lose them."""
        for run in list(self._writers):
            self._use_writer(run, lambda writer: writer.flush())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values of one training step to the TensorBoard run `steps`."""
        self._write_scalars("steps", step, to_plain(values))

    def picture(self, tag: str, image: Tensor, epoch: int) -> None:
        """Adds a (3, H, W) uint8 image to TensorBoard."""
        self._use_writer("", lambda writer: writer.add_image(tag, image.cpu(), epoch))

    def drop_epochs_from(self, epoch: int, step: int | None = None) -> None:
        """Removes epoch `epoch` and later ones from `log.txt`, and hides them in TensorBoard.

        Call it before these epochs are run again. Lines that cannot be read, such as the last line
        of a killed run, are removed too, with a warning.

        Args:
            epoch: the first epoch to be run again.
            step: the first step to be run again; None keeps all values per step.

        Raises:
            InputError: `log.txt` cannot be read or written.
        """
        if self._folder is None:
            return
        if (path := self._folder / "log.txt").exists():
            self._cut(path, epoch)
        self._close_writers()
        self._purge_steps = {"": epoch, "steps": step}

    def _cut(self, path: Path, epoch: int) -> None:
        """Removes all lines from the file at `path` but those of epochs before `epoch`."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise refused("read", path, error) from error
        lines = [(line, _epoch_of(line)) for line in content.splitlines()]
        kept = b"".join(
            line + b"\n"
            for line, line_epoch in lines
            if line_epoch is not None and line_epoch < epoch
        )
        write_atomically(path, lambda stream: stream.write(kept))
        damaged = [
            f"line {number} ({line[:40]!r})"
            for number, (line, line_epoch) in enumerate(lines, start=1)
            if line_epoch is None and line.strip()
        ]
        if damaged:
            rest = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
            names = ", ".join(damaged[:5]) + rest
            self.say(f"warning: {path}: removed lines that cannot be read: {names}")

    def _write_scalars(self, run: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._use_writer(run, partial(_add_scalar, name=name, value=value, step=step))

    def _use_writer(self, run: str, use: Callable[[Any], object]) -> None:
        """Calls `use` with the TensorBoard writer of a run, if there is one.

        If TensorBoard fails, for example on a full disk, it gets no more values, and the run goes
        on.
        """
        try:
            if (writer := self._writer(run)) is not None:
                use(writer)
        except Exception as error:
            self._tensorboard = False
            self._close_writers()
            self.say(
                f"warning: TensorBoard gets no more values: {error}. log.txt has the same numbers "
                "per epoch"
            )

    def _writer(self, run: str) -> Any:
        """The TensorBoard writer of one run; None without a folder or without TensorBoard.

        Args:
            run: "" for the folder itself, or the name of a folder in it.
        """
        if not self._tensorboard or self._folder is None:
            return None
        if run not in self._writers:
            # Imported here because the import takes seconds and TensorBoard may be missing. If it
            # does not fit to another package's version, the import may raise any error.
            try:
                from torch.utils.tensorboard import SummaryWriter
            except Exception as error:
                self._tensorboard = False
                self.say(
                    f"no TensorBoard ({error}); pip install tensorboard. log.txt has the same "
                    "numbers per epoch"
                )
                return None
            # Removed, so that a writer that is opened later does not hide the values since then.
            purge_step = self._purge_steps.pop(run, None)
            self._writers[run] = SummaryWriter(str(self._folder / run), purge_step=purge_step)
        return self._writers[run]

    # ---- end

    def _close_writers(self) -> None:
        for writer in self._writers.values():
            with suppress(Exception):  # a full disk: `_use_writer` has said so, or it is the end
                writer.close()
        self._writers = {}

    def close(self) -> None:
        """Closes the bar and the TensorBoard writers. It may be called twice."""
        self._close_bar()
        self._close_writers()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # `errors.run_command` prints the message. A run that is refused before it has printed
        # anything writes nothing.
        if isinstance(error, StopRun) and self._has_printed:
            with suppress(InputError):  # the first error must be reported
                self._append_with_time(f"error: {error.text}")
        self.close()


def _add_scalar(writer: Any, name: str, value: float, step: int) -> None:
    writer.add_scalar(name, value, step)


def _open_bar(total: int | None, description: str) -> Any:
    """A tqdm bar; None if stderr is not a terminal or tqdm is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=description, dynamic_ncols=True)


def _epoch_of(line: bytes) -> int | None:
    """The epoch of a line of `log.txt`; None if the line cannot be read."""
    try:
        epoch = json.loads(line.decode())["epoch"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return epoch if type(epoch) is int and epoch >= 0 else None
