"""Shared helpers: process group, devices, keyed randomness, versions and memory.

Nothing here knows images, models, mixers or losses.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
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
from torch.utils.data import get_worker_info

from errors import InputError, StopRun

Made = TypeVar("Made")
PEER_TIMEOUT = timedelta(minutes=10)  # the shortest time that a rank waits for another rank

# The dtypes that a tensor of weights may have.
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


# --------------------------------------------------------------------------- devices and processes


@dataclass(frozen=True)
class Processes:
    """The process group as one process sees it; `world_size` is 1 without torchrun.

    Args:
        rank: number of this process.
        world_size: number of processes.
        device: the device that this process computes on.
        timeout: how long this process waits for a message of another rank.
    """

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
        """The sum of `values` over all ranks, as a new tensor; one process gets `values` back."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """The `values` of rank 0, written into those of this rank."""
        if self.world_size > 1:
            dist.broadcast(values, 0)
        return values

    def from_main(self, make: Callable[[], Made]) -> Made:
        """Calls `make` on rank 0 and returns its result (anything picklable) on all ranks.

        Raises:
            StopRun: `make` raised it on rank 0; then all ranks raise it.
        """
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
        """The `value` (anything picklable) of every rank, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def pick_device(name: str) -> str:
    """The device type for `--device`; `auto` is the first available of CUDA, MPS and CPU.

    Raises:
        InputError: the device `name` is not available.
    """
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    available["cpu"] = lambda: True
    if name == "auto":
        return next(kind for kind, is_available in available.items() if is_available())
    if not available[name]():
        raise InputError(
            f"--device {name}: this machine or this build of torch has none; use --device auto"
        )
    return name


def peer_timeout(data_timeout: float) -> timedelta:
    """How long a rank waits for another rank.

    It is longer than the other rank may wait for data, whose error message names the cause.

    Args:
        data_timeout: seconds; 0 means no limit.
    """
    if not data_timeout:
        return timedelta(days=365)
    return max(PEER_TIMEOUT, timedelta(seconds=1.1 * data_timeout))


def init_processes(device_name: str, data_timeout: float = 600) -> Processes:
    """Joins the process group that torchrun describes in the environment; one process needs none.

    Rank and world size come from `RANK`, `WORLD_SIZE` and `LOCAL_RANK` only. The backend is NCCL on
    CUDA and gloo elsewhere.

    Args:
        device_name: the value of `--device`.
        data_timeout: see `peer_timeout`.

    Raises:
        InputError: the device is not available, or this machine has fewer GPUs than processes.
        StopRun: the launcher does not answer.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    kind = pick_device(device_name)
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} has no GPU: torchrun started more processes than the "
            f"{torch.cuda.device_count()} GPUs here; lower --nproc_per_node"
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


def _store_of_this_attempt(rank: int, world_size: int) -> dict[str, Any]:
    """Arguments of `init_process_group` that give each attempt of `--max-restarts` its own keys.

    All attempts of torchrun share the launcher's store, where a new rank could read the address of
    the ended rank before it. Each node counts its own attempts, so on several nodes this does not
    help; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there.
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
    """Checks that the launcher's store answers.

    The launcher opens its store before it starts the ranks. If the store is gone, torch would try
    to connect until the timeout.

    Raises:
        StopRun: the store does not answer.
    """
    try:
        socket.create_connection((address, port), timeout=30).close()
    except OSError as error:
        raise StopRun(
            f"the launcher is gone: its store, {address}:{port}, gives no answer ({error})"
        ) from error


# --------------------------------------------------------------------------------- keyed randomness
# A draw depends on its place (seed, epoch, index, step, rank, ...) and not on earlier draws.
# Resuming, another number of workers or another world size do not change it.


def key_seed(*key: int | str) -> int:
    """A seed of 32 bits from the hash of a place. Torch's CPU generator uses no more bits."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def keyed_generator(*key: int | str) -> torch.Generator:
    """A generator for the draws of one place, on the CPU, so that no draw waits for a device."""
    return torch.Generator().manual_seed(key_seed(*key))


def seed_globals(*key: int | str, device: bool = True) -> None:
    """Seeds the global generators of Python, numpy and torch, for libraries that draw from them.

    Dropout and RandAugment are examples.

    Args:
        device: also seed torch's device generators; the call is 100 times faster without.
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
    """A context in which the global generators are seeded with one place.

    The main process restores their state afterwards. A loader worker does not: nothing else draws
    from them there.
    """
    if get_worker_info() is not None:
        seed_globals(*key, device=False)
        yield
        return
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    try:
        seed_globals(*key, device=False)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


# ------------------------------------------------------------------------------ versions and memory


def is_ordinary(value: Any) -> bool:
    """Whether `value` is a dense tensor of real numbers with data, fit to be copied into a module.

    Tensors that are sparse, quantized, complex or on the meta device are not.
    """
    ordinary = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    return ordinary and value.dtype in NUMBERS


def describe_versions() -> dict[str, str]:
    """The versions of Python, of the main libraries and of this code.

    The version of the code is its git commit, or `unknown` outside a git checkout.
    """
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
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return peak / unit
