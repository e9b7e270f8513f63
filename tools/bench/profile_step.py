"""Profiles one SMMix step: the time of its parts, and of its operations by torch.profiler.

    python -m tools.bench.profile_step --model deit_tiny_patch16_224 --batch-size 32

On a CPU torch.profiler times the parts. On CUDA events time them, in separate steps without the
profiler; `tools.bench.recorders` gives the reason. The CUDA path has not been run on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

import utils
from config.parser import Parser
from errors import run_command
from tools.bench.recorders import ByProfiler, Recorder, by_cuda_events
from tools.bench.steps import Bench
from tools.bench.timing import describe_machine

PARTS = ("motivating pass", "mixing without the pass", "forward", "losses", "backward", "update")


def get_args_parser() -> Parser:
    parser = Parser(
        "python -m tools.bench.profile_step", description="Profiles a training step with SMMix."
    )
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


def named(recorder: Recorder, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which records its work under a name."""

    def recorded(*args: Any, **keywords: Any) -> Any:
        with recorder.during(name):
            return function(*args, **keywords)

    return recorded


@contextmanager
def name_parts(bench: Bench, recorder: Recorder) -> Iterator[None]:
    """Records the parts of a step within this context."""
    training = bench.training
    model, scaler = training.model, training.scaler
    name = partial(named, recorder)
    forward = name("forward", model.forward)
    forward_of_pass = name("forward of the pass", model.forward)

    def forward_by_mode(*args: Any, **keywords: Any) -> Any:
        return (forward if model.training else forward_of_pass)(*args, **keywords)

    with ExitStack() as patches:
        for owner, attribute, part in (
            (bench, "guide", name("motivating pass", bench.guide)),
            (training, "criterion", name("losses", training.criterion)),
            (model, "forward", forward_by_mode),
            (torch.Tensor, "backward", name("backward", torch.Tensor.backward)),
            (scaler, "unscale_", name("update", scaler.unscale_)),
            (scaler, "step", name("update", scaler.step)),
        ):
            patches.enter_context(patch.object(owner, attribute, part))
        yield


def time_parts(bench: Bench, steps: int, recorder: Recorder) -> dict[str, float]:
    """Mean milliseconds of each of `PARTS` and of the whole `step`, over steps with SMMix."""
    mixer = bench.mixer("smmix")
    mixing = patch.object(mixer.first, "mix", named(recorder, "mixing", mixer.first.mix))
    with mixing, name_parts(bench, recorder), recorder:
        for _ in range(steps):
            with recorder.during("step"):
                bench.take_step(mixer)
    total = recorder.total()
    total["mixing without the pass"] = total["mixing"] - total["motivating pass"]
    return {name: total[name] / steps for name in (*PARTS, "step")}


def main(argv: Sequence[str] | None = None) -> None:
    args = read_args(argv)
    device = torch.device(utils.pick_device(args.device))
    torch.set_num_threads(args.threads)
    bench = Bench(args.model, device, args.batch_size, args.amp)
    bench.take_step(bench.mixer("smmix"))
    profiler = ByProfiler(device)
    times = time_parts(bench, args.steps, profiler)
    if device.type == "cuda":
        times = time_parts(bench, args.steps, by_cuda_events(device))
    print(describe_machine(device, args.threads))
    print("\n".join(part_lines(times)))
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    operations = profiler.profile.key_averages()
    print(operations.table(sort_by=by, row_limit=args.rows, max_name_column_width=40))


def part_lines(times: Mapping[str, float]) -> list[str]:
    """A table of the parts: milliseconds and share of the step."""
    lines = ["| part | ms | share of the step |", "| --- | --- | --- |"]
    return lines + [
        f"| {name} | {times[name]:.1f} | {100 * times[name] / times['step']:.1f} % |"
        for name in PARTS
    ]


if __name__ == "__main__":
    raise SystemExit(run_command(main))
