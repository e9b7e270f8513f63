"""One run in detail: its course as charts, what it was, what it warned of, its picture.

Level 2: from a `Run` to what the page shows. Reads one file, the picture, and trusts it no more
than the rest. It must not know the paper's tables, HTML or Markdown.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from tools.report.records import Chart, Picture, Run, RunPage, Series

MOST_PIXELS = 40_000_000
AS_IT_IS = 250_000  # bytes; larger pictures are encoded anew, as JPEG
QUALITY = 88
ACCURACIES = (("top-1", "test_acc1"), ("top-1, EMA", "test_ema_acc1"))
TERMS = (
    ("classification", "train_loss_cls"),
    ("fine-grained", "train_loss_fine"),
    ("consistency", "train_loss_con"),
)
HEAD = (
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
    run: Run, number: int, belongs: str, state: str, flags: list[tuple[str, str, str]]
) -> RunPage:
    """All that is said of a run.

    Args:
        belongs: where it counts, in words.
        state: how far it has come, in words.
        flags: those that differ from the defaults: name, value, default.
    """
    picture, trouble = read_picture(run.picture)
    told = [*_oddities(run), *([trouble] if trouble else []), *run.warnings]
    facts = [("counts in", belongs), *_facts(run)]
    setting = list(_setting(run))
    return RunPage(
        number, run.name, state, run.is_finished, facts, setting, told, flags, charts(run), picture
    )


def charts(run: Run) -> list[Chart]:
    """Its course over epochs, counted from 1."""

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
        Chart("Learning rate", "at the epoch's beginning", lines([("learning rate", "lr")])),
    ]


def _facts(run: Run) -> Iterable[tuple[str, str]]:
    for name, value in (
        ("top-1", run.top1),
        ("top-1, EMA", run.ema),
        ("top-5", run.last("test_acc5")),
    ):
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
            f"{value:.2f} % in epoch {1 - epoch}; chosen on the validation set, in no table",
        )
    yield "seed", str(run.args["seed"])
    if seconds := sum(start.seconds for start in run.course):
        starts = f" in {len(run.course)} starts" if len(run.course) > 1 else ""
        yield "duration, from train.log", duration(seconds) + starts
    yield "status", str(run.status.get("state", "not recorded"))


def _setting(run: Run) -> Iterable[tuple[str, str]]:
    """What it was, from the table at its head; without folders, so that a report can be passed
    on."""
    yield "data", run.args["data_set"]
    yield from ((name, run.start.head[name]) for name in HEAD if name in run.start.head)
    yield "commit", run.versions.get("commit", "not recorded")
    others = [f"{name} {version}" for name, version in run.versions.items() if name != "commit"]
    yield "versions", ", ".join(others) or "not recorded"


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s`, `16 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def _oddities(run: Run) -> Iterable[str]:
    if skipped := run.last("skipped_steps"):
        yield f"{skipped:.0f} steps were left out: they were not finite"
    state = run.status.get("state")
    if state == "failed":
        code = run.status.get("exit_code", "unknown")
        yield f"the run failed, exit code {code}: {run.status.get('error', 'no reason recorded')}"
    elif state == "preempted" and not run.is_finished:
        yield "the run was stopped politely; the same command with --auto-resume goes on"
    elif state == "running" and not run.is_finished:
        yield "status.json says running: it is still under way, or was killed"
    if run.missing:
        yield f"log.txt lacks epochs {run.missing[0]} to {run.missing[-1]}, counted from 0"
    if not run.starts:
        yield "train.log has no table of a start: data, total batch and duration are not known"


def read_picture(path: Path | None) -> tuple[Picture | None, str]:
    """The picture to show, or what is wrong with it; neither where there is none. Large ones become
    JPEGs."""
    if path is None:
        return None, ""
    try:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=["PNG"])
            width, height = image.size
            if width * height > MOST_PIXELS:
                return None, f"{path.name} has {width} x {height} pixels, too many to show"
            image.load()
        if len(data) <= AS_IT_IS:
            return Picture("png", data, width, height), ""
        stream = io.BytesIO()
        image.convert("RGB").save(stream, format="JPEG", quality=QUALITY, optimize=True)
        return Picture("jpeg", stream.getvalue(), width, height), ""
    except (
        OSError,
        ValueError,
        SyntaxError,
        UnidentifiedImageError,
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
    ) as error:
        return None, f"{path.name} cannot be shown: {type(error).__name__}"
