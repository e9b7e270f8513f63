"""Starts main.py on the GPUs of this machine, or on several machines.

    python scripts/launch.py --recipe deit_small --data-path /imagenet [--nproc N] [ARGUMENT ...]

One process runs as plain `python main.py`. Several run under torchrun; if a process fails, the last
line on the screen is the first cause, and the exit code is that of the process.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from errors import heeded_signals, show  # noqa: E402

EPILOG = """All other arguments go to main.py and win over the recipe.

Several machines: the same command on each, with NNODES=2 NODE_RANK=0 (then 1, ...) MASTER_ADDR=host
[MASTER_PORT=29500] in front of it. NNODES machines share the total batch of the recipe."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        stop(f"{message} (--help explains)")


def stop(message: str) -> NoReturn:
    show(f"error: {message}", "stderr")
    raise SystemExit(2)


def get_args_parser() -> Parser:
    parser = Parser(
        "launch.py",
        allow_abbrev=False,
        description="Starts main.py.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", metavar="NAME", help="a file of recipes/, without .yaml")
    parser.add_argument("--nproc", metavar="N", help="processes here; default: one per GPU")
    parser.add_argument(
        "--output",
        "--output-dir",
        metavar="DIR",
        help="folder of the run; default with --recipe: output/NAME_MIXER. The same command "
        "resumes an interrupted run",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the command and end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the run. Returns the exit code."""
    given = [_hyphenated(word) for word in (sys.argv[1:] if argv is None else argv)]
    args, words = get_args_parser().parse_known_args(given)
    arguments = main_arguments(args, words)
    nodes = positive("NNODES", os.environ.get("NNODES", "1"))
    count = count_gpus(words) if args.nproc is None else positive("--nproc", args.nproc)
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    launch = [] if count * nodes == 1 else torchrun_words(count, nodes)
    shown = ["torchrun", *launch, *command[1:]] if launch else command
    show(shlex.join(shown))
    if args.dry_run:
        return 0
    if launch:
        return run_several([*launch, *command[1:]])
    if os.name == "posix":
        os.execv(command[0], command)  # signals reach the run itself
    return os.spawnv(os.P_WAIT, command[0], command)


def main_arguments(args: argparse.Namespace, words: Sequence[str]) -> list[str]:
    """The arguments of main.py: the recipe, the words of the user, the output folder."""
    recipe: list[str] = []
    output = args.output
    if args.recipe is not None:
        path = ROOT / "recipes" / f"{args.recipe}.yaml"
        known = sorted({file.stem for file in path.parent.glob("*.yaml")} - {"tables"})
        if args.recipe not in known:
            stop(f"--recipe {args.recipe}: no such recipe; recipes: {', '.join(known)}")
        recipe = ["--config", str(path)]
        output = output or str(ROOT / "output" / f"{args.recipe}_{last_mixer(words)}")
    return [*recipe, *words, *(["--output-dir", output] if output else [])]


def last_mixer(words: Sequence[str]) -> str:
    """The value of the last --mixer; smmix is the default of main.py."""
    mixer = "smmix"
    for index, word in enumerate(words):
        if word.startswith("--mixer="):
            mixer = word.partition("=")[2]
        elif word == "--mixer" and index + 1 < len(words):
            mixer = words[index + 1]
    return mixer


def _hyphenated(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def positive(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        stop(f"{name} {text}: must be a whole number above 0")
    return int(text)


def count_gpus(words: Sequence[str]) -> int:
    """One process per GPU, and at least one."""
    if "--device=cpu" in words or "--device cpu" in " ".join(words):
        return 1
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, Windows under Linux
    if sys.platform == "linux" and not any(map(os.path.exists, drivers)):
        return 1
    import torch  # seconds

    return max(1, torch.cuda.device_count())


# ---------------------------------------------------------------------------------------- torchrun


def torchrun_words(count: int, nodes: int) -> list[str]:
    """The arguments of torchrun for `count` processes on each of `nodes` machines."""
    if nodes == 1:
        # gloo and NCCL listen on the loopback interface, unless the caller names another one.
        # torchrun's key store listens on every interface (pytorch issue 173909).
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, loopback)
        return ["--standalone", "--local_addr=127.0.0.1", f"--nproc_per_node={count}"]
    address, rank = os.environ.get("MASTER_ADDR"), os.environ.get("NODE_RANK")
    if not address or not rank:
        stop(
            f"NNODES={nodes} needs MASTER_ADDR (the address of the first machine) and NODE_RANK "
            "(0 there, then 1, 2, ...)"
        )
    if rank not in map(str, range(nodes)):
        stop(f"NODE_RANK {rank}: must be one of 0 to {nodes - 1}, because NNODES is {nodes}")
    port = positive("MASTER_PORT", os.environ.get("MASTER_PORT", "29500"))
    return [
        f"--nnodes={nodes}",
        f"--node_rank={rank}",
        f"--master_addr={address}",
        f"--master_port={port}",
        f"--nproc_per_node={count}",
    ]


def run_several(words: list[str]) -> int:
    """Runs torchrun in this process. Prints the first cause of a failure as the last line."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun chooses the same, with a warning
    args = parse_args(words)
    # torchrun would also handle what `nohup` and shells make their programs ignore.
    heeded = heeded_signals(*args.signals_to_handle.split(","))
    args.signals_to_handle = ",".join(number.name for number in heeded)
    try:
        run(args)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        show(first_cause(rank, failure), "stderr")
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stopped:
        show(f"error: stopped by {stopped.sigval.name}", "stderr")
        return 128 + int(stopped.sigval)
    return 0


def first_cause(rank: int, failure: Any) -> str:
    """One line about the process that failed first."""
    message = failure.message
    if isinstance(message, dict):  # of an unexpected exception, whose traceback is on the screen
        message = str(message.get("message", "")).partition("\n")[0]
    elif message.startswith("error: "):  # written by the run itself, for the user
        return message
    elif failure.exitcode > 0:  # torchrun's own words say how to get a traceback
        message = f"ended with exit code {failure.exitcode}"
    return f"error: process {rank}: {message}"


if __name__ == "__main__":
    raise SystemExit(main())
