"""Processes that were started differently are refused, by rank and by what differs."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import main
from config.flags import get_args_parser
from errors import InputError
from pipeline.images import Images
from run import same_start
from tests.image_folders import make_image_folder
from tests.launches import Ranks
from tests.runs import SMALL, split
from utils import Processes, describe_versions


class OneOfTwo(Processes):
    """One rank of two, in this process: what the other one sends is given."""

    def gather(self, value: Any) -> list[Any]:
        sent.append(value)
        return [*sent[:1], value]


sent: list[Any] = []  # by the ranks of one exchange


def both(check: Any, of_rank_0: Any, of_rank_1: Any) -> str:
    """What rank 1 is refused with if the ranks call `check(value, processes)`; "" if it is not."""
    sent.clear()
    for rank, value in enumerate((of_rank_0, of_rank_1)):
        try:
            check(value, OneOfTwo(rank, 2, torch.device("cpu")))
        except InputError as error:
            assert rank == 1
            return error.text
    return ""


def test_every_flag_counts_but_those_of_one_machine() -> None:
    args = get_args_parser().parse_args([])
    for name in vars(args):
        other = get_args_parser().parse_args([])
        setattr(other, name, "another")
        text = both(same_start.check_command, args, other)
        if name in same_start.FREE - {"output_dir"}:
            assert text == ""
            continue
        flag = f"--{name.replace('_', '-')}"
        assert text.startswith(f"rank 1 has {flag} "), name
        assert f", rank 0 has {flag} " in text
    there = get_args_parser().parse_args(["--output-dir", "a"])
    elsewhere = get_args_parser().parse_args(["--output-dir", "b"])
    assert both(same_start.check_command, there, elsewhere) == ""


def test_both_values_and_the_fix_are_said() -> None:
    zero, one = (get_args_parser().parse_args(["--seed", seed]) for seed in "01")
    assert both(same_start.check_command, zero, one) == (
        "rank 1 has --seed 1, rank 0 has --seed 0: start all processes with the same command"
    )


@pytest.mark.parametrize(("name", "other", "told"), [("torch", "1.0", 1), ("commit", "unknown", 0)])
def test_versions_count(name: str, other: str, told: int) -> None:
    args, own = get_args_parser().parse_args([]), {**describe_versions(), "commit": "a"}
    versions = [own, {**own, name: other}]
    with patch.object(same_start, "describe_versions", lambda: dict(versions[len(sent)])):
        text = both(same_start.check_command, args, args)
    assert text.count(f"rank 1 has {name} {other}, rank 0 has {name} {own[name]}") == told


def images_named(*names: str) -> Images:
    labels = [0] * len(names)
    return Images(len(names), int, ["ant"], name_of=names.__getitem__, labels=labels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "fragment"),
    [
        (("/b/1.jpg", "/b/2.jpg"), ""),  # in another folder
        (("/a/1.jpg", "/a/3.jpg"), "hash of the training images' names"),
        (("/a/2.jpg", "/a/1.jpg"), "hash of the training images' names"),
        (("/a/1.jpg",), "rank 1 has number of training images 1, hash"),
    ],
)
def test_images_count_but_not_their_folder(other: tuple[str, ...], fragment: str) -> None:
    def check(names: tuple[str, ...], processes: Processes) -> None:
        same_start.open_images(processes, lambda: {"training": images_named(*names)})

    text = both(check, ("/a/1.jpg", "/a/2.jpg"), other)
    assert (fragment in text) if fragment else text == ""


def test_another_checkpoint_of_the_same_name_counts() -> None:
    def check(step: int, processes: Processes) -> None:
        same_start.open_images(processes, dict, {"step": step, "best_acc1": 1.0})

    assert both(check, 7, 7) == ""
    assert "rank 1 has step of the checkpoint 8, rank 0 has" in both(check, 7, 8)


def start_differently(others: list[str], words: list[str]) -> None:
    """`main.py` whose rank 1 has more words."""
    main.main([*words, *(others if os.environ["RANK"] == "1" else [])])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["batch size", "shorter", "another name", "no folder"])
def test_two_ranks_are_refused_and_none_waits(case: str, tmp_path: Path) -> None:
    photos = make_image_folder(tmp_path / "a", ("ant", "bee"), per_class=4, size=(20, 20))
    other = tmp_path / "b"
    if case == "another name":
        shutil.copytree(photos, other)
        (other / "train" / "bee" / "3.jpg").rename(other / "train" / "bee" / "4.jpg")
    words, fragment = {
        "batch size": ("--batch-size 3", "rank 1 has --batch-size 3, rank 0 has --batch-size 2"),
        "shorter": ("--max-steps 1 --seed 1", "rank 1 has --seed 1, --max-steps 1, rank 0"),
        "another name": (f"--data-path {other}", "rank 1 has hash of the training images' names"),
        "no folder": (f"--data-path {other}", f"rank 1: --data-path {other}: no such folder"),
    }[case]
    line = split(SMALL, "--batch-size 2 --data-path", photos)
    ranks = Ranks(2, tmp_path, *line, command=partial(start_differently, split(words)))
    assert ranks.wait(60) == [2, 2], [ranks.said(rank)[-2000:] for rank in range(2)]
    assert f"error: {fragment}" in ranks.said(0)
    assert "error: " not in ranks.said(1)
