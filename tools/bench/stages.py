"""Where an image's time goes on its way into a batch, stage by stage: DeiT's pipeline and ours, in
CPU seconds."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torchvision.datasets.folder import pil_loader

from pipeline import images
from pipeline.images import decode_pillow, decode_simplejpeg
from pipeline.spec import ImageSpec
from tools.bench import pipeline
from tools.bench.pipeline import Inputs

NAMES = {  # class of a step of a transform -> its stage
    "RandomResizedCropAndInterpolation": "crop and resize",
    "CropAndResize": "crop and resize",
    "ResizeTo": "crop and resize",
    "RandomCrop": "crop and resize",
    "RandomHorizontalFlip": "flip",
    "RandAugment": "RandAugment",
    "MaybeToTensor": "to a tensor",
    "Normalize": "normalise",
    "RandomErasing": "erase",
    "function": "to a tensor",
}
REST, ALL = "the rest: batch, keys", "all"
ORDER = ("decode", *dict.fromkeys(NAMES.values()), REST, ALL)

Stages = dict[
    str, dict[str, float]
]  # pipeline -> stage, of those it has in `ORDER` -> CPU seconds per image


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
        transform.transforms = [
            self.timed(NAMES[type(step).__name__], step) for step in transform.transforms
        ]


def theirs(inputs: Inputs, watch: Stopwatch) -> Callable[[], Any]:
    """DeiT's pipeline, watched."""
    transform = pipeline.plain_transform(inputs)
    watch.watch_steps(transform)
    return pipeline.plain_batches(inputs, transform, watch.timed("decode", pil_loader))


def ours(inputs: Inputs, watch: Stopwatch, decode: images.Decode, resize: str) -> Callable[[], Any]:
    """Our workers' part, watched."""
    samples = inputs.samples(watch.timed("decode", decode), resize)
    watch.watch_steps(samples.transform)
    return pipeline.our_batches(inputs, samples)


def pipelines(inputs: Inputs) -> dict[str, tuple[Stopwatch, Callable[[], Any]]]:
    """What is compared: by name, a stopwatch and what makes a batch under it. DeiT's comes
    first."""
    kinds: list[tuple[str, images.Decode, str]] = [("pillow", decode_pillow, "pillow")]
    if images.simplejpeg is not None:
        kinds += [
            ("simplejpeg", decode_simplejpeg, "pillow"),
            ("simplejpeg, --resize torch", decode_simplejpeg, "torch"),
        ]
    watch = Stopwatch()
    made = {"DeiT's": (watch, theirs(inputs, watch))}
    for name, decode, resize in kinds:
        watch = Stopwatch()
        made[name] = watch, ours(inputs, watch, decode, resize)
    return made


def time_batch(watch: Stopwatch, run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of each stage of one batch, of the rest and of all."""
    watch.seconds.clear()
    begun = time.process_time()
    pipeline.in_a_worker(run)()
    total = time.process_time() - begun
    return {**watch.seconds, REST: total - sum(watch.seconds.values()), ALL: total}


def measure(data_path: str, size: int, rounds: int) -> Stages:
    """Medians over rounds in which the pipelines take turns, after one round to warm up; arguments
    as in `pipeline.cases`."""
    watched = pipelines(Inputs(pipeline.find_files(data_path), ImageSpec((size, size))))
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in watched}
    for _ in range(rounds + 1):
        for name, (watch, run) in watched.items():
            seen[name].append(time_batch(watch, run))
    return {
        name: {
            stage: statistics.median(batch[stage] for batch in batches[1:]) / pipeline.BATCH
            for stage in ORDER
            if stage in batches[0]
        }
        for name, batches in seen.items()
    }


def to_markdown(found: Stages) -> str:
    """A table: milliseconds per image of each stage, a column for each pipeline."""
    head = ["stage", *(f"{name}, ms" for name in found)]
    rows = [head, ["---"] * len(head)]
    for stage in ORDER:
        rows.append(
            [
                stage,
                *(f"{1000 * each[stage]:.2f}" if stage in each else "" for each in found.values()),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
