"""Times everything that `docs/performance.md` speaks of, side by side in this process.

    python -m benchmarks.run --model deit_tiny_patch16_224 --batch-size 32 --output output/bench
    python -m benchmarks.run --model vit_nano_patch4_32 --quick

Writes OUTPUT/bench.json and OUTPUT/bench.md with hardware and versions; without --output it prints the tables only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import utils
from benchmarks import pipeline, stages, steps
from benchmarks.timing import Timing, describe_machine, measure, to_markdown
from checkpoints import write_atomically
from logs import write_json
from options import Parser
from utils import InputError, run_command

PARTS = ("step", "guide", "update", "paste", "pipeline", "stages", "finish")


def get_args_parser() -> Parser:
    parser = Parser("python -m benchmarks.run", description="Times the training step, the mixing and the input.")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm's name")
    parser.add_argument("--input-size", type=int, help="side of the images; default: the model's own")
    parser.add_argument("--batch-size", default=32, type=int)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--amp", choices=["fp16", "bf16", "none"], help="default: fp16 on CUDA, none elsewhere")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step and the motivating pass")
    parser.add_argument("--rounds", default=15, type=int, help="measurements of each case")
    parser.add_argument("--threads", default=1, type=int, help="of torch on the CPU")
    parser.add_argument("--data-path", default="", help="folder of JPEGs for the input; default: pictures made up")
    parser.add_argument("--parts", default=list(PARTS), nargs="+", choices=PARTS, help="what to time")
    parser.add_argument("--quick", action="store_true", help="3 rounds: to see that it runs, not for figures")
    parser.add_argument("--output", default="", help="folder for bench.json and bench.md")
    return parser


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        InputError: a number that makes no sense.
    """
    args = get_args_parser().parse_args(argv)
    for name in ("batch_size", "rounds", "threads"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    if args.quick:
        args.rounds = 3
    return args


def switched(timings: list[Timing]) -> dict[str, float]:
    """What a run with Mixup at switch probability 0.5 costs, over CutMix with Mixup: the mean of two kinds of step.

    Where each batch is split between the two there is one kind.
    """
    seconds = {timing.name.removeprefix("step with "): timing.seconds[0] for timing in timings}
    base = seconds["cutmix"] + seconds["mixup"]
    both = {name: value + seconds["mixup"] for name, value in seconds.items() if name not in ("mixup", "none")}
    if steps.SPLIT in both:
        both[steps.SPLIT] = 2 * seconds[steps.SPLIT]
    return {name: value / base for name, value in both.items()}


def main(argv: Sequence[str] | None = None) -> None:
    args = read_args(argv)
    device = torch.device(utils.pick_device(args.device))
    torch.set_num_threads(args.threads)
    amp = args.amp or ("fp16" if device.type == "cuda" else "none")
    machine = describe_machine(device, args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter  # several threads add up, and wait busily
    results: dict[str, list[Timing]] = {}
    if set(args.parts) - {"pipeline", "stages", "finish"}:
        bench = steps.Bench(args.model, device, args.batch_size, amp, args.compile, args.input_size)
        makers: dict[str, Callable[[steps.Bench], Any]] = {
            "step": steps.step_cases, "guide": steps.guide_cases, "update": steps.update_cases,
            "paste": steps.paste_cases,
        }  # fmt: skip
        for part, cases in makers.items():
            if part in args.parts:
                in_memory = part in ("step", "guide")
                results[part] = measure(cases(bench), device, args.rounds, clock=clock, with_memory=in_memory)
    size = args.input_size or 224
    if "finish" in args.parts:
        finishing = pipeline.finish_cases(args.data_path, size, args.batch_size, device)
        results["finish"] = measure(finishing, device, args.rounds, clock=clock)
    if "pipeline" in args.parts:
        cases_of_pipeline = pipeline.cases(args.data_path, size)
        results["pipeline"] = measure(cases_of_pipeline, torch.device("cpu"), args.rounds, clock=time.process_time)
    timed = "CUDA events" if device.type == "cuda" else "CPU time" if args.threads == 1 else "wall clock"
    words = [
        f"{machine['device']}, {args.threads} threads ({timed})", args.model, f"batch {args.batch_size}", amp,
        *(["compiled"] if args.compile else []), f"{args.rounds} rounds", f"torch {machine['torch']}",
        f"timm {machine['timm']}",
    ]  # fmt: skip
    lines = [", ".join(words)]
    for part, timings in results.items():
        lines += ["", f"## {part}", "", to_markdown(timings)]
    if "stages" in args.parts:
        lines += ["", "## stages of the input, CPU time per image", "", stages.table(args.data_path, size, args.rounds)]
    if "step" in results:
        shares = ", ".join(f"{name} {ratio:.2f}" for name, ratio in switched(results["step"]).items())
        lines += ["", f"Half of the steps by Mixup, over CutMix with Mixup: {shares}"]
    print("\n".join(lines))
    if args.output:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        plain = {part: [timing.to_plain() for timing in timings] for part, timings in results.items()}
        write_json(folder / "bench.json", {"machine": machine, "flags": vars(args), "results": plain})
        write_atomically(folder / "bench.md", lambda stream: stream.write(("\n".join(lines) + "\n").encode()))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
