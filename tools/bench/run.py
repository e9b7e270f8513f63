"""Runs the benchmarks of `docs/performance.md` in one process.

    python -m tools.bench.run --model deit_tiny_patch16_224 --batch-size 32 --output output/bench
    python -m tools.bench.run --model vit_nano_patch4_32 --quick

It writes OUTPUT/bench.json and OUTPUT/bench.md with hardware and versions after each part, so that
results are kept if a later part fails or is interrupted. Without --output it only prints the
tables.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import utils
from config.parser import Parser
from errors import InputError, run_command
from tools.bench import pipeline, stages, steps
from tools.bench.results import Found, Results
from tools.bench.timing import Case, describe_machine, measure

MODEL_PARTS: dict[str, Callable[[steps.Bench], list[Case]]] = {
    "step": steps.step_cases,
    "guide": steps.guide_cases,
    "update": steps.update_cases,
    "paste": steps.paste_cases,
}
WITH_MEMORY = ("step", "guide")  # parts that also measure peak memory
PARTS = (*MODEL_PARTS, "pipeline", "stages", "finish")


def get_args_parser() -> Parser:
    parser = Parser(
        "python -m tools.bench.run",
        description="Times the training step, the mixing and the input.",
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm's name")
    parser.add_argument(
        "--input-size", type=int, help="side of the images; default: the model's own"
    )
    parser.add_argument("--batch-size", default=32, type=int)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument(
        "--amp", choices=["fp16", "bf16", "none"], help="default: fp16 on CUDA, none elsewhere"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the step and the motivating pass"
    )
    parser.add_argument("--rounds", default=15, type=int, help="measurements of each case")
    parser.add_argument("--threads", default=1, type=int, help="threads of torch on the CPU")
    parser.add_argument(
        "--data-path", default="", help="folder of JPEGs for the input; default: generated pictures"
    )
    parser.add_argument(
        "--parts", default=list(PARTS), nargs="+", choices=PARTS, help="what to time"
    )
    parser.add_argument(
        "--quick", action="store_true", help="3 rounds: checks that it runs, too few for figures"
    )
    parser.add_argument("--output", default="", help="folder for bench.json and bench.md")
    return parser


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        InputError: a number is not above 0.
    """
    args = get_args_parser().parse_args(argv)
    for name in ("batch_size", "rounds", "threads"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    if args.quick:
        args.rounds = 3
    return args


def check_folders(args: argparse.Namespace) -> None:
    """Checks before hours of timing that images exist and results can be written.

    Raises:
        InputError: --data-path holds no image, or --output cannot be written.
    """
    if args.data_path:
        pipeline.find_files(args.data_path)
    if args.output:
        try:
            Path(args.output).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=args.output):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                f"--output {args.output}: cannot be written ({reason}); choose another folder"
            ) from error


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """CPU time for one thread, else wall time: CPU times of threads add up, and waiting counts."""
    return time.process_time if args.threads == 1 else time.perf_counter


def time_model(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Found]]:
    """Times the chosen parts about training. The model is built only if there is one."""
    parts = [part for part in MODEL_PARTS if part in args.parts]
    if not parts:
        return
    bench = steps.Bench(
        args.model, device, args.batch_size, args.amp, args.compile, args.input_size
    )
    for part in parts:
        cases, with_memory = MODEL_PARTS[part](bench), part in WITH_MEMORY
        clock = clock_of(args)
        timings = measure(cases, device, args.rounds, clock=clock, with_memory=with_memory)
        yield part, timings


def time_input(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Found]]:
    """Times the chosen parts about the input; only `finish` uses the device."""
    size = args.input_size or 224
    if "finish" in args.parts:
        finishing = pipeline.finish_cases(args.data_path, size, args.batch_size, device)
        yield "finish", measure(finishing, device, args.rounds, clock=clock_of(args))
    if "pipeline" in args.parts:
        cases = pipeline.cases(args.data_path, size)
        yield "pipeline", measure(cases, torch.device("cpu"), args.rounds, clock=time.process_time)
    if "stages" in args.parts:
        yield "stages", stages.measure(args.data_path, size, args.rounds)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_args(argv)
    check_folders(args)
    device = torch.device(utils.pick_device(args.device))
    args.amp = args.amp or ("fp16" if device.type == "cuda" else "none")
    torch.set_num_threads(args.threads)
    results = Results(describe_machine(device, args.threads), vars(args))
    print(results.head(), flush=True)
    for part, found in itertools.chain(time_model(args, device), time_input(args, device)):
        results.add(part, found)
        print(results.section(part), flush=True)
        if args.output:
            results.save(Path(args.output))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
