"""Makes the detailed part of the report for one run: results, charts, warnings and its picture."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from tools.report.page import Chart, Picture, RunPage, Series
from tools.runs.records import Run, duration

MAX_PIXELS = 40_000_000
MAX_PNG_BYTES = 250_000  # larger pictures are encoded as JPEG
JPEG_QUALITY = 88
ACCURACIES = (("top-1", "test_acc1"), ("top-1, EMA", "test_ema_acc1"))
TERMS = (
    ("classification", "train_loss_cls"),
    ("fine-grained", "train_loss_fine"),
    ("consistency", "train_loss_con"),
)
HEAD_ROWS = (
    "images",
    "model",
    "input",
    "mixing",
    "total batch",
    "steps",
    "peak learning rate",
    "precision",
    "device",
)


def run_page(
    run: Run, number: int, rows: str, state: str, flags: list[tuple[str, str, str]]
) -> RunPage:
    """The detailed part of the page for one run.

    Args:
        rows: the rows of the paper that the run belongs to, as text.
        state: the progress of the run, as text.
        flags: the flags that differ from the defaults: name, value, default.
    """
    picture, problem = read_picture(run.picture)
    return RunPage(
        number=number,
        name=run.name,
        state=state,
        is_finished=run.is_finished,
        facts=[("counts in", rows), *_facts(run)],
        setting=list(_setting(run)),
        warnings=[*_problems(run), *([problem] if problem else []), *run.warnings],
        flags=flags,
        charts=charts(run),
        picture=picture,
    )


def charts(run: Run) -> list[Chart]:
    """Charts of a run over its epochs, counted from 1."""

    def lines(names: Iterable[tuple[str, str]]) -> list[Series]:
        return [
            Series(name, [(line["epoch"] + 1, line.get(key)) for line in run.epochs])
            for name, key in names
            if any(line.get(key) is not None for line in run.epochs)
        ]

    return [
        Chart("Top-1 on the validation set", "%", lines(ACCURACIES)),
        Chart("Training loss", "mean of the epoch", lines([("loss", "train_loss")])),
        Chart("Terms of the loss", "mean of the epoch", lines(TERMS)),
        Chart("Learning rate", "at the start of the epoch", lines([("learning rate", "lr")])),
    ]


def _facts(run: Run) -> Iterable[tuple[str, str]]:
    accuracies = [("top-1", run.top1), ("top-1, EMA", run.ema), ("top-5", run.last("test_acc5"))]
    for name, value in accuracies:
        if value is not None:
            yield f"{name}, last epoch", f"{value:.2f} %"
    best = [
        (line["test_acc1"], -line["epoch"])
        for line in run.epochs
        if line.get("test_acc1") is not None
    ]
    if best:
        value, epoch = max(best)
        yield (
            "best top-1 of any epoch",
            f"{value:.2f} % in epoch {1 - epoch}; in no table, because it is chosen on the "
            "validation set",
        )
    yield "seed", str(run.args["seed"])
    if seconds := sum(start.seconds for start in run.counted_starts):
        count = len(run.counted_starts)
        starts = f" in {count} starts" if count > 1 else ""
        yield "duration, from train.log", duration(seconds) + starts
    yield "status", str(run.status.get("state", "not recorded"))


def _setting(run: Run) -> Iterable[tuple[str, str]]:
    """Data, model, device and versions, without folders: a report can be given to others."""
    yield "data", run.args["data_set"]
    yield from ((name, run.start.head[name]) for name in HEAD_ROWS if name in run.start.head)
    yield "commit", run.versions.get("commit", "not recorded")
    others = [f"{name} {version}" for name, version in run.versions.items() if name != "commit"]
    yield "versions", ", ".join(others) or "not recorded"


def _problems(run: Run) -> Iterable[str]:
    if skipped := run.last("skipped_steps"):
        yield f"{skipped:.0f} skipped steps: their gradient was NaN or inf"
    state = run.status.get("state")
    if state == "failed":
        code = run.status.get("exit_code", "unknown")
        reason = run.status.get("error", "no reason recorded")
        yield f"the run failed, exit code {code}: {reason}"
    elif state == "preempted" and not run.is_finished:
        yield "the run saved and stopped on a signal; resume it with --auto-resume"
    elif state == "running" and not run.is_finished:
        yield "status.json says running: the run is still in progress, or was killed"
    if run.missing:
        yield f"log.txt lacks epochs {run.missing[0]} to {run.missing[-1]}, counted from 0"
    if not run.starts:
        yield "train.log has no table of a start: data, total batch and duration are not known"


def read_picture(path: Path | None) -> tuple[Picture | None, str]:
    """Reads the picture of a run. Large pictures become JPEGs.

    Returns:
        The picture, or None with the problem; None and an empty text if the run has no picture.
    """
    if path is None:
        return None, ""
    try:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=["PNG"])
            width, height = image.size
            if width * height > MAX_PIXELS:
                return None, f"{path.name} has {width} x {height} pixels, too many for the report"
            image.load()
        if len(data) <= MAX_PNG_BYTES:
            return Picture("png", data, width, height), ""
        stream = io.BytesIO()
        image.convert("RGB").save(stream, format="JPEG", quality=JPEG_QUALITY, optimize=True)
        return Picture("jpeg", stream.getvalue(), width, height), ""
    except (
        OSError,
        ValueError,
        SyntaxError,
        UnidentifiedImageError,
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
    ) as error:
        return None, f"{path.name} cannot be read: {type(error).__name__}"
