"""Where an image's time goes on its way into a batch, stage by stage: DeiT's pipeline and ours, in CPU seconds."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torchvision.datasets.folder import pil_loader

import decoding
from benchmarks import pipeline
from benchmarks.pipeline import BATCH, Inputs
from decoding import decode_pillow, decode_simplejpeg
from transforms import ImageSpec

NAMES = {  # class of a step of a transform -> its stage
    "RandomResizedCropAndInterpolation": "crop and resize", "CropAndResize": "crop and resize",
    "ResizeTo": "crop and resize", "RandomCrop": "crop and resize",
    "RandomHorizontalFlip": "flip", "RandAugment": "RandAugment", "MaybeToTensor": "to a tensor",
    "Normalize": "normalise", "RandomErasing": "erase", "function": "to a tensor",
}  # fmt: skip
ORDER = ("decode", *dict.fromkeys(NAMES.values()), "the rest: batch, keys")


class Stopwatch:
    """Seconds of this process by stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, stage: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            begun = time.process_time()
            made = run(*given, **named)
            self.seconds[stage] += time.process_time() - begun
            return made

        return call

    def watch_steps(self, transform: Any) -> None:
        """Times each step of a composed transform."""
        transform.transforms = [self.timed(NAMES[type(step).__name__], step) for step in transform.transforms]


def theirs(inputs: Inputs, watch: Stopwatch) -> Callable[[], Any]:
    """DeiT's pipeline, watched."""
    transform = pipeline.plain_transform(inputs)
    watch.watch_steps(transform)
    return pipeline.plain_batches(inputs, transform, watch.timed("decode", pil_loader))


def ours(inputs: Inputs, watch: Stopwatch, decode: decoding.Decode, resize: str) -> Callable[[], Any]:
    """Our workers' part, watched."""
    samples = inputs.samples(watch.timed("decode", decode), resize)
    watch.watch_steps(samples.transform)
    return pipeline.our_batches(inputs, samples)


def table(data_path: str, size: int, rounds: int) -> str:
    """Milliseconds per image of each stage, medians over rounds in which the pipelines take turns, as Markdown."""
    inputs = Inputs(pipeline.find_files(data_path), ImageSpec((size, size)))
    watches = {"DeiT's": Stopwatch()}
    runs = {"DeiT's": theirs(inputs, watches["DeiT's"])}
    kinds: list[tuple[str, decoding.Decode, str]] = [("pillow", decode_pillow, "pillow")]
    if decoding.simplejpeg is not None:
        kinds += [
            ("simplejpeg", decode_simplejpeg, "pillow"),
            ("simplejpeg, --resize torch", decode_simplejpeg, "torch"),
        ]
    for name, decode, resize in kinds:
        watches[name] = Stopwatch()
        runs[name] = ours(inputs, watches[name], decode, resize)
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            watches[name].seconds.clear()
            begun = time.process_time()
            pipeline.in_a_worker(run)()
            total = time.process_time() - begun
            found = dict(watches[name].seconds)
            seen[name].append({**found, ORDER[-1]: total - sum(found.values())})
    head = ["stage", *(f"{name}, ms" for name in runs)]
    rows = [head, ["---"] * len(head)]
    for stage in ORDER:
        values = [statistics.median(1000 * one.get(stage, 0.0) / BATCH for one in each[1:]) for each in seen.values()]
        rows.append([stage, *(f"{value:.2f}" if value else "" for value in values)])
    totals = [statistics.median(1000 * sum(one.values()) / BATCH for one in each[1:]) for each in seen.values()]
    rows.append(["all", *(f"{value:.2f}" for value in totals)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
