"""Checks that all processes of a run were started alike, before they depend on each other.

Each machine has its own command, libraries and disks. Without these checks, ranks that differ wait
for each other somewhere in the run, or train together on what no command says.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from errors import InputError, StopRun, first_of, flag_name
from run.saved_flags import short
from utils import Processes, describe_versions, key_seed

# Flags that ranks may have with other values. Only rank 0 writes into the output folder; the others
# are facts of one machine: its paths, cores and decoder. They change no image and no step. The type
# of the device and the images themselves are compared.
FREE = {"config", "output_dir", "device", "num_workers", "pin_mem", "decoder", "data_path"}

SAME_COMMAND = "start all processes with the same command"
SAME_VERSIONS = "install the same versions on all machines"
SAME_FILES = "give all machines the same files, or one storage that they share"


class Opened(NamedTuple):
    """Images that are the same on all ranks."""

    images: dict[str, Any]  # by their name, such as "training"
    fingerprints: dict[str, str]  # see `pipeline.images.Images.fingerprint`


def check_command(args: argparse.Namespace, processes: Processes) -> None:
    """Compares the flags and the versions of all ranks. All ranks call it before anything else.

    Raises:
        InputError: a rank differs from rank 0; all ranks raise it.
    """
    if processes.world_size == 1:
        return
    flags = {flag_name(name): value for name, value in vars(args).items() if name not in FREE}
    flags["--output-dir"] = "given" if args.output_dir else "left out"  # whether the run saves
    flags["device type"] = processes.device.type
    versions = describe_versions()
    if versions["commit"] == "unknown":  # a copy without git may hold the same code
        del versions["commit"]
    ranks = processes.gather((flags, versions))
    refuse_other([rank[0] for rank in ranks], SAME_COMMAND)
    refuse_other([rank[1] for rank in ranks], SAME_VERSIONS)


def open_images(
    processes: Processes,
    open_all: Callable[[], dict[str, Any]],
    checkpoint: Mapping[str, Any] | None = None,
) -> Opened:
    """Opens the images on each rank, and compares them and the checkpoint. All ranks call it.

    Args:
        open_all: opens the images: name -> images.
        checkpoint: the content of the file from which the run is resumed.

    Raises:
        InputError: `open_all` raised it on any rank, or a rank differs from rank 0; all ranks
            raise it.
    """
    refusal, images = None, dict[str, Any]()
    try:
        images = open_all()
    except StopRun as error:
        refusal = error
    fingerprints = {name: one.fingerprint() for name, one in images.items()}
    facts = {}
    for name, one in images.items():
        facts[f"number of {name} images"] = one.num_images
        facts[f"hash of the {name} images' names"] = fingerprints[name]
        facts[f"hash of the {name} images' classes"] = key_seed(*one.class_names)
    for name in ("step", "best_acc1") if checkpoint is not None else ():
        facts[f"{name} of the checkpoint"] = (checkpoint or {})[name]
    ranks = processes.gather((refusal and refusal.text, facts))
    failed = [rank for rank, (text, _) in enumerate(ranks) if text]
    if refusal is not None and len(failed) == len(ranks):
        raise refusal
    if failed:
        raise InputError(f"rank {failed[0]}: {ranks[failed[0]][0]}")
    refuse_other([rank[1] for rank in ranks], SAME_FILES)
    return Opened(images, fingerprints)


def refuse_other(ranks: list[dict[str, Any]], advice: str) -> None:
    """Refuses the first rank whose facts (name -> value) differ from those of rank 0.

    Raises:
        InputError: names the rank, and both values of each fact.
    """
    for rank, facts in enumerate(ranks):
        both = facts.keys() & ranks[0].keys()
        names = [name for name in ranks[0] if name in both and facts[name] != ranks[0][name]]
        if names:
            own, first = (
                first_of([f"{name} {short(of[name])}" for name in names])
                for of in (facts, ranks[0])
            )
            raise InputError(f"rank {rank} has {own}, rank 0 has {first}: {advice}")
