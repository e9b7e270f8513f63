"""Times several cases in one process: in rounds, in a new random order each, with medians.

Quote only ratios of one run. A ratio is computed within each round, and its median is reported: if
the machine slows down for a while, it slows both sides.
"""

from __future__ import annotations

import itertools
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import utils


class Case(NamedTuple):
    """A function to time."""

    name: str
    run: Callable[[], Any]
    repeat: int = 1  # calls per measurement
    images: int | None = None  # images that one call processes


class Timing(NamedTuple):
    """Seconds per call of one case, and its ratio to the reference.

    Both are (median, first quartile, third quartile). `peak_mib` is the peak memory of tensors that
    one call adds.
    """

    name: str
    seconds: tuple[float, float, float]
    ratio: tuple[float, float, float]
    peak_mib: float | None = None
    images_per_second: float | None = None

    def to_plain(self) -> dict[str, Any]:
        return {**self._asdict(), "seconds": list(self.seconds), "ratio": list(self.ratio)}


def measure(
    cases: list[Case],
    device: torch.device,
    rounds: int,
    warm_up: int = 2,
    seed: int = 0,
    reference: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
    with_memory: bool = False,
) -> list[Timing]:
    """Times every case once per round. The reference is the first case, or the named one.

    On CUDA, events around each call are used, after synchronising. On the CPU `clock` is used:
    `time.process_time` does not count other processes.
    """
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for case in cases:
        for _ in range(warm_up):
            case.run()
    memory = {case.name: _peak_memory(case, device) if with_memory else None for case in cases}
    for _ in range(rounds):
        for case in order.sample(cases, len(cases)):
            seconds[case.name].append(_clock(case, device, clock))
    base = seconds[reference or cases[0].name]
    timings = []
    for case in cases:
        name, values = case.name, seconds[case.name]
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        middle, rate = _quartiles(values), None
        if case.images is not None:
            rate = case.images / middle[0]
        timings.append(Timing(name, middle, _quartiles(ratios), memory[name], rate))
    return timings


def _clock(case: Case, device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(case.repeat):
            case.run()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1000 / case.repeat
    begun = clock()
    for _ in range(case.repeat):
        case.run()
    return (clock() - begun) / case.repeat


def _peak_memory(case: Case, device: torch.device) -> float:
    """Peak memory of one call in MiB.

    CUDA's allocator reports it; on the CPU it is the sum of the profiler's memory events.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        case.run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        case.run()
    assert profiled.profiler is not None
    events = [
        event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    taken = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(taken), default=0) / 2**20


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return middle, first, third


def to_markdown(timings: list[Timing]) -> str:
    """A table: case, milliseconds per call, ratio; images per second and memory if known."""
    more = {
        "images/s": [timing.images_per_second for timing in timings],
        "peak MiB": [t.peak_mib for t in timings],
    }
    more = {
        name: values for name, values in more.items() if any(value is not None for value in values)
    }
    head = ["case", "ms", "ratio", *more]
    rows = [head, ["---"] * len(head)]
    for index, timing in enumerate(timings):
        middle, low, high = timing.ratio
        row = [
            timing.name,
            f"{1000 * timing.seconds[0]:.3g}",
            f"{middle:.2f} [{low:.2f}..{high:.2f}]",
        ]
        row += ["" if values[index] is None else f"{values[index]:.4g}" for values in more.values()]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Hardware and versions, which belong to every figure."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "type": device.type, "threads": threads, **utils.describe_versions()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
