"""Kills training runs at random, and asks that each ends bit for bit where one that nobody
disturbed ends.

    python -m tests.chaos                       # 20 runs, each with 3 kills and a polite stop
    python -m tests.chaos --elastic-restarts    # torchrun --max-restarts 3 begins again by itself
    python -m tests.chaos --short --runs 1      # half as many steps, no polite stops

Every run is `main.py` under torchrun on a generated image folder, by turns of a ViT and of a ResNet
with batch norm (in bf16), and with everything that draws or carries state: loader workers, repeated
augmentation, RandAugment, SMMix and Mixup, dropout, drop path, accumulation, fp16 with its loss
scale, an average, a schedule by update. After each blow the same command goes on, until
`status.json` says `done`. Compared are the SHA-256 of all parts of both checkpoints, `log.txt`
without clocks and TensorBoard's scalars of each step. One line per run and a summary; the exit code
is 1 unless all are exact. Linux only: processes are looked up in /proc.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.image_folders import make_image_folder
from tests.launches import Launch, read_status
from tests.runs import changed, fingerprint, split

NETWORKS = (  # one after the other
    "--model vit_nano_patch4_32 --input-size 24",
    # With running statistics, and activations that are computed again. Convolutions in fp16 take 50
    # times as long on a CPU.
    "--model test_resnet --input-size 64 --grad-checkpointing --amp bf16",
)
FLAGS = (
    "--batch-size 3 --accum-steps 2 --warmup-epochs 1 --sched-on-updates "
    "--amp fp16 --drop 0.1 --drop-path 0.2 --lr 0.05 --model-ema-decay 0.9 --num-workers 1 "
    "--data-timeout 60 "
    "--device cpu --save-steps 3 --log-every 1 --auto-resume"
)
EPOCHS, SHORT_EPOCHS = 3, 2  # of 13 steps on 3 ranks
LIMIT = 300.0  # seconds that a launch may take; one takes about twenty
GONE_WITHIN = 30.0  # seconds after the last launch until no process is left
SIGNALS = (signal.SIGTERM, signal.SIGINT)
DELAYS = {
    "while it starts": 8.0,
    "while it trains": 3.0,
    "in a save": 0.5,
}  # the longest, in seconds
CLASSES = ("ant", "bee", "cat", "dog")


class Unexpected(Exception):
    """A launch failed by itself, hangs, or left processes behind."""


@dataclass(frozen=True)
class Blow:
    """One disturbance: which processes get which signal, and when."""

    who: str
    when: str
    number: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        return f"{self.number.name} to {self.who} {self.when}"


def draw_kill(draw: random.Random, elastic: bool = False) -> Blow:
    """With `elastic`, one that torchrun can survive."""
    if draw.random() < 0.4:
        return Blow("the writer" if elastic else draw.choice(["the writer", "all"]), "in a save")
    who = (
        "a rank"
        if elastic
        else draw.choices(["a rank", "all", "the launcher", "a worker"], [4, 3, 3, 1])[0]
    )
    when = (
        "while it trains"
        if elastic or who == "a worker" or draw.random() < 0.8
        else "while it starts"
    )
    return Blow(who, when)


def draw_stop(draw: random.Random) -> Blow:
    return Blow(draw.choice(["the launcher", "a rank"]), "while it trains", draw.choice(SIGNALS))


def strike(blow: Blow, launch: Launch, folder: Path, draw: random.Random) -> str | None:
    """Waits for the blow's moment and deals it. Returns what was hit, or None if the launch ended
    before."""
    writer: list[int] = []

    def is_saving() -> bool:
        writer[:] = [pid for pid in writers(folder) if launch.is_running(pid)]
        return bool(writer)

    def is_training() -> bool:
        status = read_status(folder)
        return status.get("state") == "running" and status.get("pid") in launch.ranks()

    if blow.when != "while it starts" and not launch.wait_until(is_training, LIMIT):
        return None
    launch.wait_until(lambda: False, draw.uniform(0, DELAYS[blow.when]))
    if blow.when == "in a save":
        if not launch.wait_until(is_saving, LIMIT, pause=0.0003):
            return None
        time.sleep(draw.uniform(0, 0.004))
    if launch.process.poll() is not None:
        return None
    ranks, left = launch.ranks(), launch.left()
    workers = [pid for pid in left if pid not in (*ranks, launch.process.pid)]
    targets = {
        "the writer": writer,
        "all": [*writer, *left],
        "the launcher": [launch.process.pid],
        "a rank": draw.sample(ranks, min(1, len(ranks))),
        "a worker": draw.sample(workers, min(1, len(workers))),
    }[blow.who]
    for pid in targets:
        with suppress(ProcessLookupError):
            os.kill(pid, blow.number)
    return str(blow) if targets else None


def writers(folder: Path) -> list[int]:
    """The processes that are writing a checkpoint, or have left half of one behind."""
    return [int(path.name.split(".")[-3]) for path in (folder / "checkpoints").glob("*.tmp")]


@dataclass
class Result:
    blows: list[str]
    launches: int
    in_saves: int  # kills that left half a checkpoint behind


def disturbed(
    start: Callable[[], Launch], folder: Path, blows: list[Blow], draw: random.Random
) -> Result:
    """One run with these blows, begun again after each that ended it, to its end.

    Raises:
        Unexpected: see there.
    """
    result, waiting, launches = Result([], 0, 0), list(blows), list[Launch]()
    try:
        while result.launches < 3 * len(blows) + 3:
            launches.append(launch := start())
            result.launches, blow = result.launches + 1, None
            while waiting:
                blow = waiting.pop(0)
                hit = strike(blow, launch, folder, draw)
                if hit is not None:
                    result.blows.append(hit)
                    result.in_saves += blow.number == signal.SIGKILL and is_half_written(
                        folder, launch
                    )
                if (
                    hit is None or not launch.restarts
                ):  # under --max-restarts a launch outlives its blows
                    break
                launch.wait_until_replaced(LIMIT)
            if blow is not None and blow.who == "the launcher" and draw.random() < 0.5:
                continue  # its ranks may still be there
            code = launch.wait(LIMIT)
            if read_status(folder).get("state") == "done":
                for launch in launches:
                    if not launch.wait_until_gone(GONE_WITHIN):
                        raise Unexpected(f"left behind: {launch.left()}")
                return result
            if blow is None:
                raise Unexpected(
                    f"a launch nobody disturbed ended with code {code}, {read_status(folder)}"
                )
        raise Unexpected(f"not done after {result.launches} launches")
    except subprocess.TimeoutExpired as error:
        raise Unexpected(f"a launch took more than {LIMIT:g} s after {result.blows}") from error
    finally:
        for launch in launches:
            launch.kill()


def is_half_written(folder: Path, launch: Launch) -> bool:
    """Whether a dead process has left half a checkpoint."""
    time.sleep(0.05)
    return any(not launch.is_running(pid) for pid in writers(folder))


@dataclass(frozen=True)
class Chaos:
    """What all runs of one call have in common.

    Args:
        base: the folder of everything.
        wanted: what the undisturbed run of each network came to, as far as it was needed.
    """

    args: argparse.Namespace
    base: Path
    wanted: dict[str, dict[str, str]]

    def start(self, name: str, network: str) -> Launch:
        epochs = SHORT_EPOCHS if self.args.short else EPOCHS
        words = split(
            FLAGS,
            network,
            f"--epochs {epochs} --data-path",
            self.base / "photos",
            "--output-dir",
            self.base / name,
        )
        restarts = self.args.kills if self.args.elastic_restarts else 0
        return Launch(words, self.args.ranks, self.base / f"{name}.log", restarts)

    def undisturbed(self, network: str) -> dict[str, str]:
        """The fingerprint of a run that nobody disturbs."""
        if network not in self.wanted:
            name = f"whole{len(self.wanted)}"
            disturbed(lambda: self.start(name, network), self.base / name, [], random.Random())
            self.wanted[network] = fingerprint(self.base / name)
        return self.wanted[network]

    def run(self, number: int) -> tuple[Result, list[str]]:
        """One disturbed run. Returns what became of it, and what is not as it should be."""
        args, name, network = self.args, f"run{number}", NETWORKS[number % len(NETWORKS)]
        wanted = self.undisturbed(network)
        draw = random.Random(f"{args.seed} {number}")
        blows = [draw_kill(draw, args.elastic_restarts) for _ in range(args.kills)]
        if not (args.short or args.elastic_restarts):
            blows.insert(draw.randrange(len(blows) + 1), draw_stop(draw))
        try:
            result = disturbed(lambda: self.start(name, network), self.base / name, blows, draw)
        except Unexpected as error:
            return Result([], 0, 0), [str(error)]
        wrong = changed(wanted, fingerprint(self.base / name))
        begins = (self.base / f"{name}.log").read_text().count("\npeak learning rate")
        if args.elastic_restarts and begins != len(result.blows) + 1:
            wrong.append(f"{begins - 1} restarts for {len(result.blows)} kills")
        return result, wrong


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tests.chaos", description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", default=20, type=int, help="how many runs are disturbed")
    parser.add_argument("--seed", default=0, type=int, help="of the blows; the runs train alike")
    parser.add_argument("--ranks", default=3, type=int)
    parser.add_argument("--kills", default=3, type=int, help="SIGKILLs per run")
    parser.add_argument("--short", action="store_true", help="fewer steps, and no polite stops")
    parser.add_argument(
        "--elastic-restarts", action="store_true", help="under torchrun --max-restarts, ranks only"
    )
    return parser


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    return get_args_parser().parse_args(argv)


def prepare(args: argparse.Namespace, base: Path) -> Chaos:
    """The images."""
    make_image_folder(base / "photos", CLASSES, 60, ("train",), (40, 40))
    make_image_folder(base / "photos", CLASSES, 9, ("val",), (40, 40))
    return Chaos(args, base, {})


def main(argv: Sequence[str] | None = None) -> int:
    args = read_args(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # leaving no process behind
    begun, base = time.monotonic(), Path(tempfile.mkdtemp(prefix="chaos-"))
    chaos = prepare(args, base)
    exact, total = 0, Result([], 0, 0)
    for number in range(args.runs):
        run_begun = time.monotonic()
        result, wrong = chaos.run(number)
        verdict = (
            f"NOT EXACT: {', '.join(wrong)} (see {base}/run{number}.log)" if wrong else "exact"
        )
        blows, seconds = "; ".join(result.blows), time.monotonic() - run_begun
        print(
            f"run {number}: {blows}; {result.launches} launches, {verdict}, {seconds:.0f} s",
            flush=True,
        )
        exact += not wrong
        total = Result(
            *(
                one + other
                for one, other in zip(vars(total).values(), vars(result).values(), strict=True)
            )
        )
    kills = sum(blow.startswith("SIGKILL") for blow in total.blows)
    print(
        f"{exact} of {args.runs} exact, {kills} kills, {total.in_saves} during a save, "
        f"{len(total.blows) - kills} "
        f"polite stops, {total.launches} launches, {time.monotonic() - begun:.0f} s"
    )
    if exact == args.runs:
        shutil.rmtree(base)
    return int(exact != args.runs)


if __name__ == "__main__":
    sys.exit(main())
