"""Errors, how a command reports them, and small helpers.

Importing this file does not import torch, so that the parser, the checks and the lists of commands
start at once.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's variable: where a rank describes its error
STOPPED = 128 + 2  # exit code of a command that Ctrl-C ends, as shells give it
NO_READER = 128 + 13  # exit code of a command that SIGPIPE ends, as shells give it


class StopRun(Exception):
    """Ends a run with a message instead of a traceback, and with `exit_code`."""

    exit_code = 1

    @property
    def text(self) -> str:
        """The message alone, also after a loader worker has wrapped it in its own traceback."""
        return re.split(r"(?:InputError|SampleError): ", str(self))[-1].strip()


class InputError(StopRun):
    """The user's input is wrong. The message names the flag, file or value, and the fix."""

    exit_code = 2


class SampleError(InputError):
    """One image cannot be used. Only the rank that reads this image raises the error."""


# ---------------------------------------------------------------------------------------- a command


def run_command(command: Callable[[], None]) -> int:
    """Runs the body of a command and prints the message of a `StopRun`. Returns the exit code.

    All ranks raise a `StopRun` alike, and rank 0 prints it; a `SampleError` is printed by the rank
    that raises it. Under torchrun the message is also in the launcher's closing summary.

    A command whose output nobody reads any more (`| head`) ends without a message.
    """
    _prepare_streams()

    def guarded() -> int:
        try:
            command()
            sys.stdout.flush()
            return 0
        except StopRun as error:
            _report(error)
            return error.exit_code
        except KeyboardInterrupt:
            _report(StopRun("stopped by SIGINT"))
            return STOPPED
        except OSError:
            if (lost := _lost_output("\n")) is None:
                raise
            if isinstance(lost, BrokenPipeError):
                return NO_READER
            _report(StopRun(f"cannot print: {lost.strerror or lost}"))
            return StopRun.exit_code
        except RuntimeError as error:
            if is_lost_peer(error):
                # Another rank failed first; wait so that its error is the one torchrun reports.
                time.sleep(5)
            raise

    with suppress(OSError, RuntimeError):  # stderr may be no file
        faulthandler.enable()  # so that a crash in a library prints a traceback
    run: Callable[[], int | None] = guarded
    if ERROR_FILE in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        run = record(guarded)  # so that torchrun prints the traceback of an unexpected error
    try:
        return run() or 0
    finally:
        _lost_output()  # so that python, which flushes at its end, does not fail
        close_processes()


def _report(error: StopRun) -> None:
    """Writes the message for torchrun, and prints it on the rank that is responsible for it."""
    if path := os.environ.get(ERROR_FILE):
        entry = {"message": f"error: {error.text}", "timestamp": int(time.time())}
        Path(path).write_text(json.dumps(entry))
    if os.environ.get("RANK", "0") == "0" or isinstance(error, SampleError):
        show(f"error: {error.text}", "stderr")
    else:
        # The launcher ends all ranks when the first one exits. Wait until rank 0 has printed.
        time.sleep(2)


def show(text: str, stream: str = "stdout") -> None:
    """Prints `text` to `stdout` or `stderr`. What cannot be printed is dropped, then and later.

    For what a run prints: a closed terminal or a full disk behind it must not end the run.
    """
    with dropping(stream):
        print(printable(text), file=getattr(sys, stream), flush=True)


@contextmanager
def dropping(stream: str) -> Iterator[None]:
    """A context in which the stream may fail; what is printed to it is dropped from then on."""
    try:
        yield
    except OSError:
        _drop(getattr(sys, stream))


def _lost_output(text: str = "") -> OSError | None:
    """Prints `text`. Returns the error if that fails; the rest of the output is then dropped."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        _drop(sys.stdout)
        return error
    return None


def _drop(stream: TextIO) -> None:
    """Sends what is printed to `stream` nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _prepare_streams() -> None:
    """Makes stdout and stderr take any text, also in a process that has none (`2>&-`)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8


def is_lost_peer(error: BaseException) -> bool:
    """Whether this error is the result of another rank that ended or does not answer.

    Gloo raises a RuntimeError ("connection closed") then, and NCCL a DistBackendError.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)


def close_processes() -> None:
    """Leaves the process group, if this process is in one."""
    if "torch.distributed" not in sys.modules:  # so it is in none
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------- text, values and cores


def flag_name(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def printable(text: str, keep: str = "\n") -> str:
    """`text` with control characters, and bytes of names that are not UTF-8, as escapes.

    Names of files and classes may hold sequences that command a terminal.

    Args:
        keep: the control characters that stay.
    """
    return re.sub(
        "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(),
        text,
    )


def as_written(name: str, value: Any) -> str:
    """A flag and its value as on a command line."""
    words = value if isinstance(value, (list, tuple)) else [value]
    return " ".join(map(str, (flag_name(name), *words)))


def as_pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one side of a square, or from a sequence of one or two sides."""
    if isinstance(value, int):
        return value, value
    height, width = value if len(value) == 2 else (value[0], value[0])
    return int(height), int(width)


def first_of(texts: list[str], separator: str = ", ", limit: int = 8) -> str:
    """The first `limit` texts, joined, and the number of the others."""
    rest = len(texts) - limit
    return separator.join(texts[:limit]) + (f"{separator}and {rest} more" if rest > 0 else "")


def heeded_signals(*names: str) -> list[signal.Signals]:
    """The signals of these names that this system has and this process does not ignore.

    `nohup` and shells that start a job in the background ignore some for their programs. Such a
    signal must get no handler.
    """
    found = [signal.Signals[name] for name in names if hasattr(signal, name)]
    return [number for number in found if signal.getsignal(number) is not signal.SIG_IGN]


def cores_per_process() -> int:
    """The CPU cores of this machine divided by the number of its processes, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
