"""Flags are resolved once into a frozen record, which checkpoints keep; a command reads each
checkpoint once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from config.flags import get_args_parser
from config.resolve import Flags, resolve
from storage import safe_load
from tests.image_folders import make_image_folder
from tests.runs import Outcome, run_small, split
from utils import Processes

CPU = Processes(0, 1, torch.device("cpu"))
TINY = "--model vit_nano_patch4_32 --input-size 16"


def flags_of(words: str, **changes: int) -> Flags:
    return resolve(get_args_parser().parse_args(split(TINY, words)), CPU, changes)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("", "data_set", "DIGITS"),
        ("--data-path photos", "data_set", "IMNET"),
        ("", "amp", "none"),
        ("--input-size 16", "input_size", (16, 16)),
        ("--model vit_nano_patch4_32", "input_size", (16, 16)),
        ("", "con_weight", 1.0),
        ("--mixer cutmix", "con_weight", 0.0),
        ("--mixer cutmix --con-weight 0.5", "consistency", "probs"),
        ("--variant released", "region_head", "separate"),
        ("--variant released --region-head shared", "region_head", "shared"),
        ("--side-ratio 0.3 0.5", "side_ratio", (0.3, 0.5)),
    ],
)
def test_what_is_left_open_is_filled_in(words: str, name: str, value: Any) -> None:
    assert getattr(flags_of(words), name) == value


def test_the_models_own_size_is_taken_where_none_is_given() -> None:
    args = get_args_parser().parse_args(["--model", "pvt_tiny"])
    assert resolve(args, CPU).input_size == (224, 224)
    assert args.input_size is None  # the command line stays as it was


def test_a_resumed_run_changes_its_shares_and_nothing_else() -> None:
    plain, changed = flags_of("--batch-size 8"), flags_of("--batch-size 8", batch_size=4)
    differing = {name for name in vars(plain) if vars(plain)[name] != vars(changed)[name]}
    assert differing == {"batch_size"}


def test_resolved_flags_are_not_written() -> None:
    flags = flags_of("")
    with pytest.raises(AttributeError, match="batch_size"):
        flags.batch_size = 3
    assert not [name for name, value in vars(flags).items() if isinstance(value, list)]


# ------------------------------------------------------------------------------------- one reading


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """How often each file was read as a checkpoint."""
    counts: Counter[str] = Counter()
    real = safe_load.read

    def read(file: Path) -> Any:
        counts[os.path.realpath(file)] += 1
        return real(file)

    with patch.object(safe_load, "read", read):
        yield counts


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("photos") / "images", per_class=8)


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run after 1 of its 2 epochs."""
    folder = tmp_path_factory.mktemp("run")
    done = run_small("--epochs 1 --data-path", photos, "--output-dir", folder)
    assert done.code == 0, done.err
    return folder


def expect_one_reading(done: Outcome, counts: Counter[str], file: Path) -> None:
    assert done.code == 0, done.err
    assert counts == {os.path.realpath(file): 1}


def test_an_evaluation_reads_its_checkpoint_once(run: Path) -> None:
    with counted_reads() as counts:
        done = run_small("--eval --resume", run / "checkpoint.pth")
    expect_one_reading(done, counts, run / "checkpoint.pth")


@pytest.mark.parametrize(
    "words",
    [
        "--finetune {file}",
        "--motivator {file}",
        "--motivator {file} --finetune {file}",
        "--motivator vit_nano_patch4_32={file}",
        "--resume {file} --accept-changes epochs --epochs 2",
        "--resume {file} --motivator {file} --accept-changes all --epochs 2",
    ],
)
def test_a_training_reads_each_checkpoint_once(words: str, run: Path, photos: Path) -> None:
    file = run / "best_checkpoint.pth"
    with counted_reads() as counts:
        done = run_small(words.format(file=file), "--data-path", photos)
    expect_one_reading(done, counts, file)


def test_a_resumed_run_reads_the_newest_checkpoint_once(photos: Path, tmp_path: Path) -> None:
    words = split("--epochs 2 --max-steps 1 --data-path", photos, "--output-dir", tmp_path)
    assert run_small(*words).code == 0
    newest = next((tmp_path / "checkpoints").glob("*.pth"))
    with counted_reads() as counts:
        done = run_small(*words, "--max-steps 2 --auto-resume")
    assert done.code == 0, done.err
    assert counts == {os.path.realpath(newest): 1}
