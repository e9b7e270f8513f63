"""Files and command lines that nobody wrote on purpose: each ends well, or with a message, and
soon.

    python -m tests.fuzz --cases 10000 --seed 0        prints counts and every counterexample; code
    1 if there is one python -m tests.fuzz --seed 0 --only checkpoint:17 --keep folder      one case
    again, with its traceback and file

A case is drawn from (seed, area, number) alone. Cases run in a child process, whose address space
is limited and which is replaced when it takes too long or dies.

Longer than the working limit: every area starts from the same world, and one command runs them all.
"""

from __future__ import annotations

import argparse
import copy
import io
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import timm
import torch

import main as main_py
import run_with_submitit
from config import flags as config_flags
from config import second_networks
from config.build_mixer import build_mixer
from config.checks import check_args
from errors import StopRun
from mixers.interface import MixerContext
from mixers.registry import METHODS
from models.build import build_model
from models.weights import load_foreign, pick_weights, restore_model
from pipeline import images as pipeline_images
from pipeline.spec import Augment, ImageSpec
from pipeline.transforms import build_train_transform
from run import state as run_state
from run.folder import RunFolder, step_file
from run.log import RunLog
from storage.checkpoints import load_checkpoint
from storage.plain_data import write_json
from tests import junk, recorded_runs
from tests.image_folders import make_image_folder
from tests.runs import run_small
from tools import check_data, export, show_mixing
from tools.report import __main__ as report_py
from utils import Processes

ROOT = Path(__file__).resolve().parent.parent
SHARES = {
    "checkpoint": 0.4,
    "image": 0.15,
    "flags": 0.15,
    "saved flags": 0.1,
    "run folder": 0.15,
    "tools": 0.05,
}
SECONDS, GIBIBYTES = 10.0, 3.0  # for one case: time, and memory beyond what torch itself takes
NETWORK = "deit_runs_distilled_patch4_16"  # from tests/runs.py: its checkpoint has 300 kB


class Outcome(NamedTuple):
    """What a step of a case came to: `done`, `refused`, or a counterexample with its traceback."""

    step: str
    kind: str
    detail: str = ""


# ----------------------------------------------------------------------------------------- one step


def attempt(step: str, call: Callable[[], object]) -> Outcome:
    """Runs one step; whatever is neither a success nor a refusal with a message is a
    counterexample."""
    told = io.StringIO()
    try:
        with redirect_stderr(told), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
        return Outcome(step, "done")
    except StopRun as error:
        return (
            Outcome(step, "refused")
            if error.text
            else Outcome(step, "a refusal without a message", repr(error))
        )
    except SystemExit as leaving:
        if leaving.code in (0, None):  # --help
            return Outcome(step, "done")
        fine = leaving.code == 2 and told.getvalue().startswith("error: ")
        return (
            Outcome(step, "refused")
            if fine
            else Outcome(step, f"exit code {leaving.code}", told.getvalue())
        )
    except Exception as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename.startswith(str(ROOT))
        ]
        place = next(
            (
                f"{Path(f.filename).name}:{f.name}"
                for f in reversed(frames)
                if "tests/" not in f.filename
            ),
            "?",
        )
        return Outcome(step, f"{type(error).__name__} in {place}", traceback.format_exc())


# ---------------------------------------------------------------------------------------- the areas


class World:
    """What all cases start from: a finished run of a second, and its training, put back after each
    use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        photos = make_image_folder(
            folder / "photos", ("ant", "bee", "cat"), per_class=4, size=(20, 20)
        )
        with patch.object(run_state, "save", wraps=run_state.save) as saved:
            run = run_small(
                f"--model {NETWORK} --data-path", photos, "--output-dir", folder / "run"
            )
        self.training = run.training
        (self.identity,) = (
            one for one in saved.call_args.args if isinstance(one, run_state.Identity)
        )
        self.content = (folder / "run" / "checkpoint.pth").read_bytes()
        self.checkpoint = load_checkpoint(folder / "run" / "checkpoint.pth")
        self.before = [self.training.module.state_dict(), self.training.optimizer.state_dict()]
        self.before = [
            torch.load(io.BytesIO(_saved(part)), weights_only=True) for part in self.before
        ]
        network = timm.create_model("test_resnet", num_classes=3)
        self.foreign = {
            "model": dict(network.state_dict()),
            "args": argparse.Namespace(lr=0.1),
            "epoch": 3,
        }
        self.fresh = build_model(NETWORK, 3, input_size=(16, 16))
        curve = recorded_runs.curve(80, 4)
        self.recorded = recorded_runs.write_run(
            folder / "recorded", recorded_runs.row("all"), curve, averages=curve
        )
        (self.recorded / "checkpoints").mkdir()
        step_file(self.recorded, 3).write_bytes(self.content)

    # ---------------------------------------------------------------------------- checkpoints

    def write_checkpoint(self, rng: random.Random, path: Path) -> None:
        if rng.random() < 0.2:
            path.write_bytes(junk.damaged(rng, self.content))
        elif rng.random() < 0.2:
            path.write_bytes(junk.rewritten_pickle(rng, self.content))
        else:
            state = junk.changed(rng, self.checkpoint if rng.random() < 0.8 else self.foreign)
            torch.save(state, path, _use_new_zipfile_serialization=rng.random() < 0.9)

    def checkpoints(self, rng: random.Random, folder: Path) -> Iterator[Outcome]:
        path = folder / "case.pth"
        self.write_checkpoint(rng, path)
        read: list[dict[str, Any]] = []
        yield attempt("load_checkpoint", lambda: read.append(load_checkpoint(path)))
        if not read:
            return
        (checkpoint,) = read
        yield attempt("pick_weights", lambda: pick_weights(checkpoint))
        yield attempt("as in --eval", lambda: _evaluate(checkpoint, []))
        yield attempt("restore_model", lambda: restore_model(checkpoint, ema=rng.random() < 0.5))
        yield attempt(
            "load_foreign",
            lambda: load_foreign(self.fresh, checkpoint, str(path), fresh_heads=rng.random() < 0.5),
        )
        yield attempt(
            "export",
            lambda: export.to_safetensors(export.read_plain(str(path), rng.random() < 0.5)),
        )
        yield attempt("show_mixing", lambda: show_mixing.restore(str(path), rng.random() < 0.5))
        yield attempt("as in --resume", lambda: self.go_on(str(path)))
        if "args" in checkpoint and "format" not in checkpoint:  # the other network's
            yield attempt(
                "teacher",
                lambda: second_networks.build_teacher("test_resnet", str(path), 3, (32, 32)),
            )
            yield attempt(
                "feature map",
                lambda: second_networks.build_feature_map(f"test_resnet={path}", (32, 32)),
            )

    def go_on(self, path: str) -> None:
        """What `main.py --resume` does before its first step, and that step's update."""
        training = replace(
            self.training, scaler=copy.deepcopy(self.training.scaler), nonfinite=cast(Any, None)
        )
        try:
            checkpoint = run_state.read(path)
            run_state.keep_total_batch(checkpoint, {"batch_size": 8, "accum_steps": 1}, 1, ())
            progress = run_state.load(checkpoint, path, training, self.identity)
            progress.meters.copy().reduce(training.processes).read()
            for parameter in training.module.parameters():
                parameter.grad = torch.zeros_like(parameter)
            training.scaler.scale(torch.zeros(()))  # else a copy has no scale yet
            training.scaler.step(training.optimizer)
            training.scaler.update()
        finally:
            training.module.load_state_dict(self.before[0])
            training.optimizer.load_state_dict(self.before[1])

    # ---------------------------------------------------------------------------- the rest

    def images(self, rng: random.Random, folder: Path) -> Iterator[Outcome]:
        path = folder / "case.jpg"
        path.write_bytes(junk.image(rng))
        samples, kinds = [(str(path), 0)], set()
        for name in ("pillow", "auto"):
            read = partial(
                pipeline_images.read_files, samples, decode=pipeline_images.pick_decoder(name)
            )
            found = pipeline_images.Images(
                1, read, ["a"], name_of=partial(pipeline_images.name_files, samples)
            )
            outcome = attempt(f"decoder {name}", partial(found.__getitem__, 0))
            kinds.add(outcome.kind)
            yield outcome
        if len(kinds) > 1:
            yield Outcome("both decoders", "one takes what the other refuses")

    def flags(self, rng: random.Random, folder: Path) -> Iterator[Outcome]:
        program = rng.choice((None, None, export, show_mixing))
        parser = config_flags.get_args_parser() if program is None else program.get_args_parser()
        words = junk.command_line(rng, parser)
        (folder / "case.txt").write_text("\n".join(words), encoding="utf-8", errors="replace")
        if program is not None:
            yield attempt(program.__name__, lambda: program.read_args(words))
        else:
            yield attempt("main.py", lambda: use_flags(_checked(parser.parse_args(words))))

    def saved_flags(self, rng: random.Random, folder: Path) -> Iterator[Outcome]:
        parser = config_flags.get_args_parser()
        saved = junk.changed(rng, self.checkpoint["args"])
        words = junk.command_line(rng, parser) if rng.random() < 0.3 else []
        (folder / "case.txt").write_text(
            f"{saved!r}\n{words!r}", encoding="utf-8", errors="replace"
        )

        torch.save({**self.checkpoint, "args": saved}, folder / "case.pth")
        yield attempt("saved flags", lambda: _evaluate(load_checkpoint(folder / "case.pth"), words))

    # --------------------------------------------------------------- run folders, and their readers

    def run_folders(self, rng: random.Random, folder: Path) -> Iterator[Outcome]:
        root = folder / "runs"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.recorded, root / "run")
        (folder / "case.txt").write_text("\n".join(junk.spoil(rng, root / "run")), encoding="utf-8")
        words = [str(root), "--output", str(folder / "report")]
        yield attempt("report", lambda: self.report(words))
        yield attempt("as in --auto-resume", lambda: take_up(root / "run", rng.randint(0, 4)))
        yield attempt("report, gone on", lambda: self.report(words))

    def report(self, words: list[str]) -> None:
        with patch.object(report_py, "read_tables", lambda: recorded_runs):  # few rows
            report_py.main(words)

    def tools(self, rng: random.Random, folder: Path) -> Iterator[Outcome]:
        """Command lines up to where work would begin: no process is started, nothing is
        submitted."""
        program = rng.choice((check_data, report_py, run_with_submitit))
        words = junk.command_line(rng, program.get_args_parser())
        if program is run_with_submitit:
            words += (
                junk.command_line(rng, config_flags.get_args_parser()) if rng.random() < 0.5 else []
            )
        flags = {
            check_data: ("--output", "--data-path"),
            report_py: ("", "--output"),
            run_with_submitit: ("--job-dir",),
        }
        words = [*junk.path_flags(rng, flags[program]), *words]
        (folder / "case.txt").write_text("\n".join(words), encoding="utf-8", errors="replace")
        with patch.object(subprocess, "Popen", side_effect=AssertionError("starts a process")):
            yield attempt(program.__name__, lambda: self.use_words(program, words))

    def use_words(self, program: Any, words: list[str]) -> None:
        if program is run_with_submitit:
            with patch.object(
                run_with_submitit, "make_executor", side_effect=AssertionError("submits")
            ):
                run_with_submitit.main(["--dry-run", *words])
            return
        args = program.read_args(words)
        if program is report_py and not os.path.isdir(args.root):
            self.report(words)


def take_up(folder: Path, epoch: int) -> None:
    """What `main.py --auto-resume` does to its folder around the steps of a run, which goes on in
    `epoch`."""
    place, step = RunFolder(folder), 3
    with RunLog(folder, Processes(0, 1, torch.device("cpu"))) as log, closing(place):
        place.open()
        found, notes = run_state.find(str(folder), "", automatic=True)
        log.say("\n".join([found, *notes]))
        log.drop_epochs_from(epoch, step)
        if found:
            place.rewind_to(Path(found), step, ("checkpoint.pth", "best_checkpoint.pth"))
        for name in ("args.json", "environment.json"):
            write_json(folder / name, {"epochs": 4})
        place.fail(
            {"exit_code": 2, "error": "a refused start"}, has_begun=False, is_consequence=False
        )
        place.status("running", epoch=epoch, step=step)
        log.scalars(step, {"lr": 1.0})
        place.save({"x": 1}, step + 1, ("checkpoint.pth", "best_checkpoint.pth"))
        log.epoch({"epoch": epoch, "test_acc1": 1.0})
        place.status("done", epoch=epoch + 1, step=step + 1)


def _saved(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    check_args(args)
    return args


def _evaluate(checkpoint: dict[str, Any], words: list[str]) -> None:
    """What `main.py --eval` reads of a checkpoint before it builds the model."""
    use_flags(main_py.read_args([*words, "--eval", "--resume", "x"], lambda path: checkpoint))
    if run_state.is_own_checkpoint(checkpoint):
        ImageSpec.from_plain(checkpoint["data"]["image_spec"])


def use_flags(args: argparse.Namespace) -> None:
    """What is made of flags before there are data or a model."""
    context = MixerContext(10, (14, 14), lambda pixels: pixels, lambda pixels: pixels)
    if args.mixer in METHODS:
        build_mixer(args, context)
    if not args.eval:
        augment = Augment(
            aa=args.aa,
            color_jitter=args.color_jitter,
            reprob=args.reprob,
            remode=args.remode,
            recount=args.recount,
            interpolation=args.train_interpolation,
            src=args.src,
        )
        build_train_transform(ImageSpec((16, 16)), augment)


def run_case(world: World, area: str, seed: int, number: int, folder: Path) -> list[Outcome]:
    """One case from its name alone; what it was made of is left in `folder`."""
    rng = random.Random(f"{seed} {area} {number}")
    torch.manual_seed(rng.getrandbits(32))
    draw = {"checkpoint": "checkpoints", "image": "images", "run folder": "run_folders"}
    return list(getattr(world, draw.get(area, area.replace(" ", "_")))(rng, folder))


# ---------------------------------------------------------------------------------------- all cases


def cases(count: int) -> Iterator[tuple[str, int]]:
    """Area and number of each case."""
    for area, share in SHARES.items():
        yield from ((area, number) for number in range(round(count * share)))


class Result(NamedTuple):
    """What became of a case. `memory`: the most that the process had taken by then, in GiB."""

    area: str
    number: int
    outcomes: list[Outcome]
    seconds: float
    memory: float = 0.0


def serve(world: World, seed: int, waiting: list[tuple[str, int]], pipe: Connection) -> None:
    """The child: runs cases and tells what became of them."""
    torch.set_num_threads(1)
    with suppress(OSError, ValueError):  # not every system limits it
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(GIBIBYTES * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        for area, number in waiting:
            outcomes = run_case(world, area, seed, number, Path(folder))
            pipe.send((outcomes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def run_all(world: World, seed: int, waiting: list[tuple[str, int]]) -> Iterator[Result]:
    """All these cases, as they end."""
    fork = multiprocessing.get_context("fork")
    while waiting:
        ours, theirs = fork.Pipe()
        child = fork.Process(target=serve, args=(world, seed, waiting, theirs))
        with warnings.catch_warnings():  # the child uses no thread of ours
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        theirs.close()
        lost = ""
        while waiting and not lost:
            begun, memory = time.monotonic(), 0.0
            try:
                lost = "" if ours.poll(SECONDS) else f"no end after {SECONDS:g} s"
                outcomes, memory = ([], 0.0) if lost else ours.recv()
            except EOFError:
                child.join()
                lost = f"the process died with code {child.exitcode}"
            if lost:
                outcomes = [Outcome("?", lost)]
            (area, number), waiting = waiting[0], waiting[1:]
            yield Result(area, number, outcomes, time.monotonic() - begun, memory)
        if lost:
            child.kill()
        child.join()
        ours.close()


def report(results: list[Result], seed: int) -> int:
    """Prints counts, and each kind of counterexample with how to see it again; returns how many
    there are."""
    tally: Counter[tuple[str, str, str]] = Counter()
    failures: dict[str, list[str]] = {}
    for result in results:
        for step, kind, _ in result.outcomes:
            fine = kind in ("done", "refused")
            tally[result.area, step, kind if fine else "COUNTEREXAMPLE"] += 1
            if not fine:
                failures.setdefault(f"{step}: {kind}", []).append(f"{result.area}:{result.number}")
    for (area, step, kind), times in sorted(tally.items()):
        print(f"{area:<12} {step:<24} {kind:<16} {times:>7}")
    for kind, which in sorted(failures.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(which)} x {kind}: {', '.join(which[:8])}")
        print(f"  again: python -m tests.fuzz --seed {seed} --only '{which[0]}'")
    slowest, memory = (
        max((getattr(one, name) for one in results), default=0) for name in ("seconds", "memory")
    )
    total = sum(map(len, failures.values()))
    print(
        f"\n{len(results)} cases, the slowest {slowest:.1f} s, at most {memory:.2f} GiB; "
        f"{total} counterexamples of {len(failures)} kinds"
    )
    return total


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz", description="Looks for input that breaks a promise."
    )
    parser.add_argument("--cases", default=10_000, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--only", help="AREA:NUMBER of one case, as a counterexample names it")
    parser.add_argument("--keep", type=Path, help="folder for what that case was made of")
    return parser


def main() -> int:
    args = get_args_parser().parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        world = World(folder)
        if args.only is None:
            begun = time.monotonic()
            total = report(list(run_all(world, args.seed, list(cases(args.cases)))), args.seed)
            print(f"{(time.monotonic() - begun) / 60:.1f} minutes")
            return 1 if total else 0
        area, _, number = args.only.rpartition(":")
        kept = args.keep or folder / "case"
        kept.mkdir(parents=True, exist_ok=True)
        for outcome in run_case(world, area, args.seed, int(number), kept):
            print(outcome.step, outcome.kind, outcome.detail, sep="\n  ")
        return 0
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
