"""Times the stages of the input pipeline per image, DeiT's and ours, in CPU seconds."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torchvision.datasets.folder import pil_loader

from pipeline import images
from pipeline.images import decode_simplejpeg
from pipeline.pillow import decode_pillow
from pipeline.spec import ImageSpec
from tools.bench import pipeline
from tools.bench.pipeline import Inputs

STAGES = {  # class of a step of a transform -> its stage
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
ORDER = ("decode", *dict.fromkeys(STAGES.values()), REST, ALL)

Stages = dict[str, dict[str, float]]  # pipeline -> stage of `ORDER` -> CPU seconds per image


class Stopwatch:
    """CPU seconds of this process by stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, stage: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, which adds its time to a stage."""

        def call(*args: Any, **keywords: Any) -> Any:
            begun = time.process_time()
            result = run(*args, **keywords)
            self.seconds[stage] += time.process_time() - begun
            return result

        return call

    def time_steps(self, transform: Any) -> None:
        """Times each step of a composed transform."""
        transform.transforms = [
            self.timed(STAGES[type(step).__name__], step) for step in transform.transforms
        ]


def deit_pipeline(inputs: Inputs, stopwatch: Stopwatch) -> Callable[[], Any]:
    """DeiT's pipeline with timed stages."""
    transform = pipeline.plain_transform(inputs)
    stopwatch.time_steps(transform)
    return pipeline.plain_batches(inputs, transform, stopwatch.timed("decode", pil_loader))


def our_pipeline(
    inputs: Inputs, stopwatch: Stopwatch, decode: images.Decode, resize: str
) -> Callable[[], Any]:
    """The worker's part of our pipeline with timed stages."""
    samples = inputs.samples(stopwatch.timed("decode", decode), resize)
    stopwatch.time_steps(samples.transform)
    return pipeline.our_batches(inputs, samples)


def pipelines(inputs: Inputs) -> dict[str, tuple[Stopwatch, Callable[[], Any]]]:
    """The pipelines by name, DeiT's first: a stopwatch, and the function that makes a batch."""
    kinds: list[tuple[str, images.Decode, str]] = [("pillow", decode_pillow, "pillow")]
    if images.simplejpeg is not None:
        kinds += [
            ("simplejpeg", decode_simplejpeg, "pillow"),
            ("simplejpeg, --resize torch", decode_simplejpeg, "torch"),
        ]
    stopwatch = Stopwatch()
    made = {"DeiT's": (stopwatch, deit_pipeline(inputs, stopwatch))}
    for name, decode, resize in kinds:
        stopwatch = Stopwatch()
        made[name] = stopwatch, our_pipeline(inputs, stopwatch, decode, resize)
    return made


def time_batch(stopwatch: Stopwatch, run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one batch: each stage, the rest and the sum."""
    stopwatch.seconds.clear()
    begun = time.process_time()
    pipeline.in_a_worker(run)()
    total = time.process_time() - begun
    return {**stopwatch.seconds, REST: total - sum(stopwatch.seconds.values()), ALL: total}


def measure(data_path: str, size: int, rounds: int) -> Stages:
    """Medians over rounds in which the pipelines alternate, after one round to warm up.

    Arguments are those of `pipeline.cases`.
    """
    pipelines_by_name = pipelines(Inputs(pipeline.find_files(data_path), ImageSpec((size, size))))
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines_by_name}
    for _ in range(rounds + 1):
        for name, (stopwatch, run) in pipelines_by_name.items():
            measured[name].append(time_batch(stopwatch, run))
    return {
        name: {
            stage: statistics.median(batch[stage] for batch in batches[1:]) / pipeline.BATCH
            for stage in ORDER
            if stage in batches[0]
        }
        for name, batches in measured.items()
    }


def to_markdown(found: Stages) -> str:
    """A table: milliseconds per image of each stage, with a column for each pipeline."""
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
