"""What every room needs and no room owns: processes, devices, keyed randomness, errors, versions.

Level 0: imports nothing from the project. It knows ranks, seeds and messages; it must not know what
an image, a class token, a mixer or a loss is.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import get_worker_info

Made = TypeVar("Made")
PEER_TIMEOUT = timedelta(minutes=10)  # the least of any message between ranks


class StopRun(Exception):
    """Ends a run with a message instead of a traceback, and with `exit_code`."""

    exit_code = 1

    @property
    def text(self) -> str:
        """The message alone, also after a loader worker has wrapped it in its own traceback."""
        return re.split(r"(?:InputError|SampleError): ", str(self))[-1].strip()


class InputError(StopRun):
    """Something the user gave is wrong. The message names the flag, file or value, and the fix."""

    exit_code = 2


class SampleError(InputError):
    """One file is bad: only the rank that read it knows."""


# ---------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Processes:
    """Where this process stands among its peers. `device` is the one it computes on; for a peer's
    message it waits no longer than `timeout`."""

    rank: int
    world_size: int
    device: torch.device
    timeout: timedelta = PEER_TIMEOUT

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all ranks, as a new tensor; itself with one process."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def from_main(self, make: Callable[[], Made]) -> Made:
        """What rank 0 makes (anything picklable), on all ranks; a `StopRun` of its is raised by all
        alike."""
        made: Any = None
        if self.is_main:
            try:
                made = make()
            except StopRun as error:
                made = error
        made = self.gather(made)[0]
        if isinstance(made, StopRun):
            raise made
        return made

    def gather(self, value: Any) -> list[Any]:
        """`value` (anything picklable) of every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def pick_device(name: str) -> str:
    """Turns `--device` into a device type: `auto` is the first of CUDA, MPS, CPU that is there.

    Raises:
        InputError: the device that was asked for is not available.
    """
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    available["cpu"] = lambda: True
    if name == "auto":
        return next(kind for kind, is_there in available.items() if is_there())
    if not available[name]():
        raise InputError(
            f"--device {name}: this machine or this build of torch has none; use --device auto"
        )
    return name


def peer_timeout(data_timeout: float) -> timedelta:
    """How long a rank waits for its peers: longer than a peer may wait for its data, whose message
    names the cause.

    Args:
        data_timeout: seconds, 0 for ever.
    """
    return (
        max(PEER_TIMEOUT, timedelta(seconds=1.1 * data_timeout))
        if data_timeout
        else timedelta(days=365)
    )


def init_processes(device_name: str, data_timeout: float = 600) -> Processes:
    """Joins the process group that torchrun described in the environment; one process needs none.

    Rank and world size come from `RANK`, `WORLD_SIZE` and `LOCAL_RANK` only. NCCL on CUDA, gloo
    elsewhere.

    Args:
        data_timeout: see `peer_timeout`.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    kind = pick_device(device_name)
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} has no GPU: torchrun started more processes than the "
            f"{torch.cuda.device_count()} "
            "GPUs here; lower --nproc_per_node"
        )
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(
            backend="nccl" if kind == "cuda" else "gloo",
            timeout=peer_timeout(data_timeout),
            device_id=device if kind == "cuda" else None,
            **_store_of_this_attempt(rank, world_size),
        )
    return Processes(rank, world_size, device, peer_timeout(data_timeout))


def is_lost_peer(error: BaseException) -> bool:
    """Whether a rank ends because another one did or is silent: gloo's "connection closed", NCCL's
    DistBackendError."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return (
        not alone
        and isinstance(error, RuntimeError)
        and (isinstance(error, dist.DistError) or "gloo" in str(error))
    )


def _store_of_this_attempt(rank: int, world_size: int) -> dict[str, Any]:
    """Arguments that give each attempt of `torchrun --max-restarts` keys of its own.

    All attempts share the launcher's store, where a new rank could read the address of its dead
    predecessor. The count of attempts is one node's, so on several nodes
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is what helps.
    """
    environment = os.environ
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is None or environment.get("LOCAL_WORLD_SIZE") != str(world_size):
        return {}
    is_launchers = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if is_launchers:
        _check_launcher(address, port)
    is_master = rank == 0 and not is_launchers
    store = dist.TCPStore(address, port, world_size, is_master=is_master, timeout=PEER_TIMEOUT)
    return {
        "store": dist.PrefixStore(f"attempt{attempt}", store),
        "rank": rank,
        "world_size": world_size,
    }


def _check_launcher(address: str, port: int) -> None:
    """Its store was there before its ranks. Torch would ask again and again until the time is up.

    Raises:
        StopRun: nobody answers.
    """
    try:
        socket.create_connection((address, port), timeout=30).close()
    except OSError as error:
        raise StopRun(
            f"the launcher is gone: its store, {address}:{port}, gives no answer ({error})"
        ) from error


def cores_per_process() -> int:
    """How many cores this process may count as its own, its peers on the machine having as many."""
    there = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def close_processes() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------- keyed randomness
# A draw depends on its position (seed, epoch, index, step, rank, ...) and on nothing that happened
# before it, so that resuming, another number of workers or another world size leave it as it is.


def key_seed(*key: int | str) -> int:
    """Hashes a position to a seed of 32 bits, all that torch's CPU generator reads of one."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator for the draws at one position. Reading its numbers on the host never waits
    for a device."""
    return torch.Generator().manual_seed(key_seed(*key))


def seed_globals(*key: int | str, device: bool = True) -> None:
    """Seeds python's, numpy's and torch's own generators, which libraries we call draw from
    (dropout, RandAugment).

    Args:
        device: torch's device generators too; without them the call is 100 times cheaper.
    """
    seed = key_seed(*key)
    random.seed(seed)
    np.random.seed(seed)
    if device:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def keyed_globals(*key: int | str) -> Iterator[None]:
    """Inside, the global generators are those of one position; in the main process they are put
    back afterwards."""
    if get_worker_info() is not None:  # a worker has no other use for them
        seed_globals(*key, device=False)
        yield
        return
    python, numpy_state, torch_state = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
    )
    try:
        seed_globals(*key, device=False)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


# ----------------------------------------------------------------------------------------- the rest


def as_pair(value: int | Sequence[int]) -> tuple[int, int]:
    """One side or (height, width) as (height, width)."""
    if isinstance(value, int):
        return value, value
    height, width = value if len(value) == 2 else (value[0], value[0])
    return int(height), int(width)


def describe_versions() -> dict[str, str]:
    """Versions of what shapes a result, and the commit of this code (`unknown` outside a git
    checkout)."""
    packages = ("torch", "torchvision", "timm", "numpy", "pillow")
    versions = {name: metadata.version(name) for name in packages}
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    return {"python": platform.python_version(), **versions, "commit": commit}


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on a CUDA device, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    )  # bytes on macOS, KiB on Linux


def run_command(command: Callable[[], None]) -> int:
    """Runs a command's body and turns a `StopRun` into its message. Returns the exit code.

    All ranks meet a `StopRun` alike and rank 0 prints it; a `SampleError` is printed by the rank
    that met it. Under torchrun the message also stands in the launcher's closing summary.
    """

    @record  # lets torchrun show the traceback of what nobody foresaw
    def guarded() -> int:
        try:
            command()
            return 0
        except StopRun as error:
            _report(error)
            return error.exit_code
        except RuntimeError as error:
            if is_lost_peer(error):
                time.sleep(
                    5
                )  # the peer that left first has the word: the launcher ends this one meanwhile
            raise

    try:
        return guarded() or 0
    finally:
        close_processes()


def _report(error: StopRun) -> None:
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(
            json.dumps({"message": f"error: {error.text}", "timestamp": int(time.time())})
        )
    if os.environ.get("RANK", "0") == "0" or isinstance(error, SampleError):
        print(f"error: {error.text}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # the launcher ends all ranks with the first that leaves: rank 0 has the word


def first_of(texts: list[str], separator: str = ", ", limit: int = 8) -> str:
    rest = len(texts) - limit
    return separator.join(texts[:limit]) + (f"{separator}and {rest} more" if rest > 0 else "")


# The numbers that a tensor of weights may be made of.
NUMBERS = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}


def is_ordinary(value: Any) -> bool:
    """Whether it is a tensor that can be copied into a module: with content, in rows, of real
    numbers."""
    ordinary = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    return ordinary and value.dtype in NUMBERS
