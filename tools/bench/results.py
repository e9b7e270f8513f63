"""The results of a run of the benchmarks, as data and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage.files import write_atomically
from storage.plain_data import write_json
from tools.bench import stages, steps
from tools.bench.stages import Stages
from tools.bench.timing import Timing, to_markdown

Found = list[Timing] | Stages  # the result of one part


class Results:
    """Results of the parts that are done, in the order in which they were added.

    Attributes:
        machine: hardware and versions, see `timing.describe_machine`.
        flags: the flags of the run, by name.
        timings: the timings of each part that compares cases.
        half_mixup: the cost of each method in half of the steps, see `steps.switched`; None if
            steps were not timed.
        stages: CPU seconds per image by pipeline and stage; None if stages were not timed.
    """

    def __init__(self, machine: dict[str, Any], flags: dict[str, Any]) -> None:
        self.machine, self.flags = machine, flags
        self.timings: dict[str, list[Timing]] = {}
        self.half_mixup: dict[str, float] | None = None
        self.stages: Stages | None = None

    def add(self, part: str, found: Found) -> None:
        if isinstance(found, dict):
            self.stages = found
            return
        self.timings[part] = found
        if part == "step":
            self.half_mixup = steps.switched(found)

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON, with times in seconds and without parts that were not measured."""
        plain = {
            part: [timing.to_plain() for timing in timings]
            for part, timings in self.timings.items()
        }
        more = {"half_mixup": self.half_mixup, "stages": self.stages}
        known = {name: value for name, value in more.items() if value is not None}
        return {"machine": self.machine, "flags": self.flags, "results": plain, **known}

    def head(self) -> str:
        """One line: machine, clock, model and versions."""
        flags, machine = self.flags, self.machine
        clock = "CPU time" if flags["threads"] == 1 else "wall clock"
        if machine["type"] == "cuda":
            clock = "CUDA events"
        parts = [
            f"{machine['device']}, {flags['threads']} threads ({clock})",
            flags["model"],
            f"batch {flags['batch_size']}",
            flags["amp"],
            *(["compiled"] if flags["compile"] else []),
            f"{flags['rounds']} rounds",
            f"torch {machine['torch']}",
            f"timm {machine['timm']}",
        ]
        return ", ".join(parts)

    def section(self, part: str) -> str:
        """One part as Markdown, after an empty line."""
        if part == "stages":
            assert self.stages is not None
            table = stages.to_markdown(self.stages)
            return f"\n## stages of the input, CPU time per image\n\n{table}"
        text = f"\n## {part}\n\n{to_markdown(self.timings[part])}"
        if part != "step" or self.half_mixup is None:
            return text
        shares = ", ".join(f"{name} {ratio:.2f}" for name, ratio in self.half_mixup.items())
        return f"{text}\n\nHalf of the steps by Mixup, over CutMix with Mixup: {shares}"

    def save(self, folder: Path) -> None:
        """Writes or replaces bench.json and bench.md in an existing folder.

        Raises:
            InputError: the files cannot be written.
        """
        parts = [*self.timings, *(["stages"] if self.stages is not None else [])]
        text = "\n".join([self.head(), *map(self.section, parts)]) + "\n"
        write_json(folder / "bench.json", self.to_plain())
        write_atomically(folder / "bench.md", lambda stream: stream.write(text.encode()))
