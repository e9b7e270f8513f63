"""What a run tells: `log.txt`, `train.log`, TensorBoard, the progress bar.

Level 1: imports `utils`, and `checkpoints` for its atomic writer. It may not know what a value
means (a loss, an accuracy, a learning rate): names and numbers come from the caller.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from storage.files import to_json, to_plain, write_atomically
from utils import InputError, Processes, StopRun

Item = TypeVar("Item")


# -------------------------------------------------------------------------------------------- files


# ---------------------------------------------------------------------------------------------- run


class RunLog:
    """What the user sees of a run, on rank 0; on the other ranks every method does nothing.

    Files in `output_dir` (none if it is None): `train.log`, the printed lines with their time;
    `log.txt`, one JSON object per epoch; TensorBoard events, per epoch in the folder itself and per
    step in `steps/`. Two TensorBoard runs, because a resumed one hides everything from its first
    step on, and epochs and steps do not count alike.

    Raises:
        InputError: a file in `output_dir` cannot be written, at the beginning or later.
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
        self._has_spoken = False
        self._progress = ""  # description and total of the loop under way
        self._done = 0
        self._append("train.log", "")  # finds out now whether that is possible

    def _append(self, name: str, text: str) -> None:
        """Adds to a file of the folder. Opened each time, so that a kill loses nothing that was
        said."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / name, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise _refused("write", self._folder / name, error) from error

    def say(self, text: str) -> None:
        """Prints `text` to stdout, above the bar if there is one, and to `train.log`."""
        if not self._active:
            return
        self._has_spoken = True
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
        self._keep(text)

    def _keep(self, text: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._append("train.log", "".join(f"{now} {line}\n" for line in text.splitlines()))

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Says the rows as two aligned columns."""
        width = max((len(name) for name, _ in rows), default=0)
        self.say("\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows))

    # ---- progress

    def progress(
        self, iterable: Iterable[Item], total: int | None, description: str
    ) -> Iterator[Item]:
        """Passes the items on: under a bar if stderr is a terminal and tqdm is there, else `note`
        says plain lines."""
        if not self._active:
            yield from iterable
            return
        self._close_bar()  # of a loop that was left early
        self._bar = _open_bar(total, description)
        self._progress = (
            f"{description} [{{}}/{total}]" if total is not None else f"{description} [{{}}]"
        )
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
        """Shows current values: in the bar, or as a plain line with the position in the loop; in
        `train.log` always."""
        if not self._active:
            return
        shown = {
            name: f"{value:.4g}" if isinstance(value, float) else str(value)
            for name, value in values.items()
        }
        # the item in the caller's hands counts as done: notes come after its work
        where = self._progress.format(self._done + 1) + " " if self._progress else ""
        line = where + "  ".join(f"{name} {value}" for name, value in shown.items())
        if self._bar is None:
            self.say(line)
            return
        self._bar.set_postfix(shown, refresh=False)  # refreshed by the bar's own rhythm
        self._keep(line)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._progress = None, ""

    # ---- numbers

    def epoch(self, stats: Mapping[str, Any]) -> None:
        """Appends `stats`, which has an `epoch`, to `log.txt` (NaN and infinities as null) and its
        numbers, under the same names, to TensorBoard."""
        if self._folder is None:
            return
        self._append("log.txt", to_json(stats) + "\n")
        plain = to_plain(stats)
        self._write_scalars(
            "", int(plain["epoch"]), {k: v for k, v in plain.items() if k != "epoch"}
        )
        self.flush()

    def flush(self) -> None:
        """Writes out what TensorBoard holds, so that a kill does not lose it."""
        for writer in self._writers.values():
            writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values of one training step to the TensorBoard run `steps`."""
        self._write_scalars("steps", step, to_plain(values))

    def picture(self, tag: str, image: Tensor, epoch: int) -> None:
        """Adds a (3, H, W) uint8 image to TensorBoard."""
        if (writer := self._writer("")) is not None:
            writer.add_image(tag, image.cpu(), epoch)

    def drop_epochs_from(self, epoch: int, step: int | None = None) -> None:
        """Before epoch `epoch` is run again: takes it and later ones out of `log.txt`, and hides
        them in TensorBoard.

        Lines that cannot be read, such as one that a kill cut short, go too, and it is said which.

        Args:
            step: the first training step that will be run again; None leaves the step scalars as
                they are.

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
        """Leaves the lines of epochs before `epoch` in the file at `path`, as they are."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _refused("read", path, error) from error
        lines = [(line, _epoch_of(line)) for line in content.splitlines()]
        kept = b"".join(line + b"\n" for line, own in lines if own is not None and own < epoch)
        write_atomically(path, lambda stream: stream.write(kept))
        damaged = [
            number
            for number, (line, own) in enumerate(lines, start=1)
            if own is None and line.strip()
        ]
        if damaged:
            shown = ", ".join(
                f"line {number} ({lines[number - 1][0][:40]!r})" for number in damaged[:5]
            )
            rest = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
            self.say(f"warning: {path}: left out what cannot be read: {shown}{rest}")

    def _write_scalars(self, run: str, step: int, values: Mapping[str, Any]) -> None:
        if (writer := self._writer(run)) is None:
            return
        for name, value in values.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, step)

    def _writer(self, run: str) -> Any:
        """The TensorBoard writer of the folder itself (`run` is "") or of a folder in it; None if
        there is none."""
        if not self._tensorboard or self._folder is None:
            return None
        if run not in self._writers:
            try:
                from torch.utils.tensorboard import (
                    SummaryWriter,
                )  # seconds to import; and it may be absent
            except (
                Exception
            ) as error:  # absent (ImportError), or broken by another package's version (any error)
                self._tensorboard = False
                self.say(
                    f"no TensorBoard ({error}); pip install tensorboard. log.txt has the same "
                    "numbers per epoch"
                )
                return None
            # consumed, so that a writer reopened later does not hide what came in between
            purge_step = self._purge_steps.pop(run, None)
            try:
                self._writers[run] = SummaryWriter(str(self._folder / run), purge_step=purge_step)
            except OSError as error:
                raise _refused("write into", self._folder / run, error) from error
        return self._writers[run]

    # ---- end

    def _close_writers(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def close(self) -> None:
        """Closes the bar and writes out what TensorBoard still holds. Calling it twice does no
        harm."""
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
        if (
            isinstance(error, StopRun) and self._has_spoken
        ):  # printed by who catches it; a refused run leaves no trace
            self._keep(f"error: {error.text}")
        self.close()


def _open_bar(total: int | None, description: str) -> Any:
    """A tqdm bar, or None where it would not be seen or tqdm is missing."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=description, dynamic_ncols=True)


def _epoch_of(line: bytes) -> int | None:
    """The epoch that a line of `log.txt` is of; None if it cannot be read."""
    try:
        epoch = json.loads(line.decode())["epoch"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return epoch if type(epoch) is int and epoch >= 0 else None


def _refused(what: str, path: Path, error: OSError) -> InputError:
    """The message of what the system does not let us do with a file."""
    advice = "move it away" if os.path.exists(path) else "make room for it"
    return InputError(
        f"cannot {what} {path}: {error.strerror or error}; {advice}, or choose another output "
        "folder"
    )
