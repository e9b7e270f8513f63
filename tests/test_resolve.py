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
from errors import InputError
from run.state import keep_total_batch
from storage import safe_load
from tests.image_folders import make_image_folder
from tests.runs import Outcome, run_small, split
from utils import Processes

CPU = Processes(0, 1, torch.device("cpu"))
TINY = "--model vit_nano_patch4_32 --input-size 16"


def flags_of(words: str, **changes: int) -> Flags:
    return resolve(get_args_parser().parse_args(split(TINY, words)), 1, "cpu", changes)


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
    assert resolve(args, 1, "cpu").input_size == (224, 224)
    assert args.input_size is None  # the command line stays as it was


def test_a_resumed_run_changes_its_shares_and_nothing_else() -> None:
    plain, changed = flags_of("--batch-size 8"), flags_of("--batch-size 8", batch_size=4)
    differing = {name for name in vars(plain) if vars(plain)[name] != vars(changed)[name]}
    assert differing == {"batch_size", "total_batch"}


@pytest.mark.parametrize(
    ("words", "processes", "shares"),
    [
        ("--batch-size 8", 1, (8, 1, 8)),
        ("--batch-size 8 --accum-steps 3", 2, (8, 3, 48)),
        ("--total-batch 128 --batch-size 128", 1, (128, 1, 128)),
        ("--total-batch 128 --batch-size 127", 1, (64, 2, 128)),
        ("--total-batch 128 --batch-size 32", 2, (32, 2, 128)),
        ("--total-batch 128 --batch-size 33", 2, (32, 2, 128)),
        ("--total-batch 96 --batch-size 20", 3, (16, 2, 96)),
        ("--total-batch 1024", 4, (64, 4, 1024)),
        ("--total-batch 7 --batch-size 4", 1, (1, 7, 7)),
        ("--total-batch 3", 3, (1, 1, 3)),
    ],
)
def test_the_total_batch_is_shared_out(
    words: str, processes: int, shares: tuple[int, int, int]
) -> None:
    args = get_args_parser().parse_args(split(TINY, words))
    flags = resolve(args, processes, "cpu")
    assert (flags.batch_size, flags.accum_steps, flags.total_batch) == shares


@pytest.mark.parametrize(
    ("total", "processes", "advice"), [(100, 8, "use 96 or 104"), (3, 4, "use 4, or a number")]
)
def test_a_total_batch_that_cannot_be_shared_is_refused(
    total: int, processes: int, advice: str
) -> None:
    args = get_args_parser().parse_args(split(TINY, f"--total-batch {total}"))
    with pytest.raises(InputError, match=f"--total-batch {total}: {processes} .*{advice}"):
        resolve(args, processes, "cpu")


@pytest.mark.parametrize("accum", [1, 2])
def test_accumulation_beside_the_total_batch_is_refused(accum: int) -> None:
    with pytest.raises(InputError, match=f"--accum-steps {accum}: contradicts --total-batch 8"):
        flags_of(f"--accum-steps {accum} --total-batch 8")


SAVED = {"args": {"batch_size": 4, "accum_steps": 2}, "samples_in_epoch": 16}
ASKED = {"batch_size": 4, "accum_steps": 1}  # with --total-batch 16, on 2 processes


@pytest.mark.parametrize(
    ("flags", "processes", "accepted", "wanted"),
    [
        ({"total_batch": 16}, 2, (), {}),
        ({"total_batch": 16}, 1, (), {}),
        ({"total_batch": 16, "batch_size": 8}, 4, (), {}),
        ({"total_batch": 16}, 3, (), "which 3 processes cannot share"),
        ({"total_batch": 32}, 2, (), "--total-batch 32: the run .* of 16; .*-changes total-batch"),
        ({"total_batch": 8}, 1, ("total-batch",), {}),
        ({"total_batch": 8}, 1, ("all",), {}),
        ({"batch_size": 8}, 1, ("total_batch",), {}),
        ({"total_batch": 32}, 2, ("batch-size",), "16 images of the current epoch are done"),
        ({}, 2, (), {"batch_size": 4, "accum_steps": 2}),
        ({}, 1, (), {"batch_size": 4, "accum_steps": 4}),
        ({"batch_size": 3}, 2, (), "--batch-size x --accum-steps x processes must be equal"),
    ],
)
def test_a_resumed_run_keeps_its_total_batch(
    flags: dict[str, int], processes: int, accepted: tuple[str, ...], wanted: Any
) -> None:
    checkpoint = {**SAVED, "world_size": 2, "asked": ASKED}
    line = (checkpoint, {**ASKED, **flags}, processes, accepted)
    if isinstance(wanted, dict):
        assert keep_total_batch(*line) == wanted
        return
    with pytest.raises(InputError, match=wanted):
        keep_total_batch(*line)


def test_a_checkpoint_of_older_code_keeps_its_total_batch_too() -> None:
    shares = {"batch_size": 4, "accum_steps": 2}
    assert keep_total_batch(SAVED, shares, 1, ()) == {}
    assert keep_total_batch({**SAVED, "world_size": 2}, shares, 1, ()) == {
        "batch_size": 4,
        "accum_steps": 4,
    }


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
