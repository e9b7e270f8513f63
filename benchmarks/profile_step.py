"""Where the time of one SMMix step goes, by torch.profiler: as parts of the step, and as operations.

python -m benchmarks.profile_step --model deit_tiny_patch16_224 --batch-size 32
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import utils
from benchmarks.steps import Bench
from benchmarks.timing import describe_machine
from options import Parser
from utils import run_command

PARTS = ("motivating pass", "mixing without the pass", "forward", "losses", "backward", "update")


def get_args_parser() -> Parser:
    parser = Parser("python -m benchmarks.profile_step", description="Profiles a training step with SMMix.")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm's name")
    parser.add_argument("--batch-size", default=32, type=int)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--amp", default="none", choices=["fp16", "bf16", "none"])
    parser.add_argument("--steps", default=3, type=int)
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--rows", default=15, type=int, help="operations to list")
    return parser


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    return get_args_parser().parse_args(argv)


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under a name that the profile shows."""

    def shown(*given: Any, **more: Any) -> Any:
        with record_function(name):
            return function(*given, **more)

    return shown


def name_parts(bench: Bench) -> None:
    """Lets the parts of a step appear in a profile; backward is what lies between the losses and the update."""
    training = bench.training
    bench.guide = named("motivating pass", bench.guide)
    training.criterion = named("losses", training.criterion)
    learn, look = (named(name, training.model.forward) for name in ("forward", "forward of the pass"))
    training.model.forward = lambda *given, **more: (learn if training.model.training else look)(*given, **more)
    torch.Tensor.backward = named("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    training.scaler.unscale_ = named("update", training.scaler.unscale_)  # type: ignore[method-assign]
    training.scaler.step = named("update", training.scaler.step)  # type: ignore[method-assign]


def main(argv: Sequence[str] | None = None) -> None:
    args = read_args(argv)
    device = torch.device(utils.pick_device(args.device))
    torch.set_num_threads(args.threads)
    bench = Bench(args.model, device, args.batch_size, args.amp)
    name_parts(bench)
    mixer = bench.mixer("smmix")
    mix: Any = named("mixing", mixer.__call__)
    bench.take_step(mix)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        for _ in range(args.steps):
            with record_function("step"):
                bench.take_step(mix)
    print(describe_machine(device, args.threads))
    print("\n".join(part_lines(found.key_averages(), device.type == "cuda", args.steps)))
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=args.rows, max_name_column_width=40))


def part_lines(averages: Any, on_device: bool, steps: int) -> list[str]:
    """Milliseconds and share of the step, of each part."""
    total = {row.key: (row.device_time_total if on_device else row.cpu_time_total) / 1000 / steps for row in averages}
    total["mixing without the pass"] = total["mixing"] - total["motivating pass"]
    lines = ["| part | ms | share of the step |", "| --- | --- | --- |"]
    return lines + [f"| {name} | {total[name]:.1f} | {100 * total[name] / total['step']:.1f} % |" for name in PARTS]


if __name__ == "__main__":
    raise SystemExit(run_command(main))
