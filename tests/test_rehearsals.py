"""The tables' scripts with `--small` and `--list-tsv`: each row's rehearsal, and the list that the
report reads."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from config.checks import check_args
from config.flags import get_args_parser
from config.parser import explicit_flags
from scripts.tables import _finished
from tests.image_folders import make_image_folder
from tests.runs import run_main
from tests.test_commands import ROOT
from tests.test_tables import (
    COLUMNS,
    CONSISTENCY_FLAGS,
    OF_SMMIX,
    PAPER,
    PATH,
    STUDY,
    TO_COME,
    Run,
    all_runs,
    ask,
    fake_python,
    leave,
    recipe_of,
    refusal,
    start,
)

tables = pytest.mark.parametrize("table", PAPER)
PRETRAINED = ("cutmix_vit_mini", "cutmix_deit_tiny", "test_resnet")
TINY = "--batch-size 8 --subset 40 --num-workers 0 --device cpu"  # a second's work
# Rows whose flags are others in a rehearsal, or that have no model of their own to name them by.
SMALL_ROWS = {"table1_transmix": ["transmix"]}
SMALL_FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "tablea5": {
        f"block{depth}": {"score_block": small}
        for depth, small in ((3, 2), (6, 3), (9, 5), (12, 6))
    },
    "tablea4": {row: {"epochs": 200} for row in PAPER["tablea4"]},
    "table9": {
        "deit_tiny": {"motivator": "cutmix_vit_mini"},
        "deit_small": {"motivator": "cutmix_deit_tiny"},
        "ema": {"model_ema_decay": 0.99},
    },
}


def rows_of(table: str) -> list[str]:
    """Those that a rehearsal has."""
    return SMALL_ROWS.get(table) or [row for row in PAPER[table] if row not in TO_COME[table]]


@cache
def listed(table: str, *words: str) -> list[list[str]]:
    done = start(table, "--list-tsv", *words, DRY_RUN="0")
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split("\t") for line in done.stdout.splitlines()]


def commands(printed: str) -> list[list[str]]:
    """The words that main.py is given in each command of a dry run."""
    found = [shlex.split(line) for line in printed.splitlines() if not line.startswith("== ")]
    assert all(words[:2] == ["python3", str(ROOT / "main.py")] for words in found)
    return [words[2:] for words in found]


def rehearsals(table: str, output: Path, *words: str, data: str = "/cifar") -> dict[str, list[str]]:
    """Each run's words by its folder below OUTPUT/small, in the order in which they run."""
    done = start(table, "--small", "--data-path", data, "--output", str(output), *words)
    assert done.returncode == 0, done.stderr
    folders = {}
    for given in commands(done.stdout):
        folder = Path(parse(given).output_dir)
        folders[folder.relative_to(output / "small").as_posix()] = given
    return folders


def parse(words: list[str]) -> argparse.Namespace:
    args = get_args_parser().parse_args(words)
    check_args(args)
    return args


# --------------------------------------------------------------------------------- the list to read


@tables
def test_the_list_has_a_line_for_each_run(table: str) -> None:
    lines = listed(table)
    if COLUMNS[table]:
        expected = [(row, model) for row in PAPER[table] for model in COLUMNS[table]]
        figures = [figure for _, *row in PAPER[table].values() for figure in row]
    else:
        expected = [("transmix", model) for model in PAPER[table]]
        figures = [figure for _, figure in PAPER[table].values()]
    assert [(row, model) for _, row, _, model, _, _ in lines] == expected
    assert {name for name, *_ in lines} == {table.split("_")[0]}
    assert [figure for *_, figure, _ in lines] == [
        "" if figure == "-" else figure for figure in figures
    ]
    assert all(label for _, _, label, *_ in lines)


@tables
def test_the_lists_arguments_are_those_of_the_runs(table: str) -> None:
    for _, row, _, model, _, words in listed(table):
        if row in TO_COME[table]:
            assert words == ""
            continue
        written = explicit_flags(get_args_parser(), words.split(" "))
        run = all_runs(table)[f"{model}_{row}"]
        known = {
            **recipe_of(run),
            **{name: run.written[name] for name in ("model", "batch_size", "accum_steps")},
        }
        assert written == {name: value for name, value in known.items() if name != "data_set"}
        parse([*words.split(" "), "--output-dir", "there"])


@tables
def test_the_list_of_rehearsals_is_what_they_run(table: str, tmp_path: Path) -> None:
    lines = listed(table, "--small", "--output", str(tmp_path))
    there = [line for line in lines if line[1] not in TO_COME[table]]
    assert [row for _, row, *_ in there] == rows_of(table)
    runs = rehearsals(table, tmp_path)
    for _, row, _, model, figure, words in there:
        assert (model, figure) == ("vit_mini_patch4_32", "")  # the paper has none of these
        own = explicit_flags(get_args_parser(), runs[f"{table.split('_')[0]}/{row}"])
        kept = {
            name: own[name] for name in own if name not in ("data_path", "data_set", "output_dir")
        }
        assert explicit_flags(get_args_parser(), words.split(" ")) == kept
    assert {line[5] for line in lines if line[1] in TO_COME[table]} <= {""}


def test_a_list_of_some_rows() -> None:
    assert [line[1] for line in listed("table7", "--row", "all,1")] == ["all", "none"]
    assert [line[3] for line in listed("table1", "--row", "smmix", "--model", "pvt_tiny")] == [
        "pvt_tiny"
    ]


# --------------------------------------------------------------------------------------- rehearsals


@tables
def test_a_rehearsal_is_short_of_data_and_in_one_process(table: str, tmp_path: Path) -> None:
    runs = rehearsals(table, tmp_path)
    own = {folder: words for folder, words in runs.items() if not folder.startswith("pretrained/")}
    assert list(own) == [f"{table.split('_')[0]}/{row}" for row in rows_of(table)]
    assert {folder.removeprefix("pretrained/") for folder in runs.keys() - own.keys()} <= set(
        PRETRAINED
    )
    for folder, words in own.items():
        args, row = parse(words), folder.split("/")[1]
        assert (args.model, args.subset, args.epochs, args.batch_size) == (
            "vit_mini_patch4_32",
            2000,
            200,
            128,
        )
        assert (args.seed, args.max_steps, args.auto_resume, args.data_set) == (
            0,
            None,
            True,
            "IMNET",
        )
        wanted = {**STUDY.get(table, {}).get(row, {}), **SMALL_FLAGS.get(table, {}).get(row, {})}
        for name, value in wanted.items():
            found = getattr(args, name)
            assert (Path(found).parent.name if str(found).endswith(".pth") else found) == value


def test_a_rehearsal_of_attentive_mix_has_a_classifier_of_its_own(tmp_path: Path) -> None:
    runs = rehearsals("table2", tmp_path, "--row", "attentivemix")
    assert list(runs) == ["pretrained/test_resnet", "table2/attentivemix"]
    teacher, row = map(parse, runs.values())
    assert row.attentive_teacher == f"{teacher.output_dir}/checkpoint.pth"
    assert (teacher.model, teacher.mixer, teacher.input_size, row.input_size) == (
        "test_resnet",
        "none",
        [128],
        [128],
    )
    assert row.patch_size == 16  # 64 tokens, as everywhere else


def test_a_seed_has_a_folder_of_its_own_and_shares_what_is_pretrained(tmp_path: Path) -> None:
    runs = rehearsals("table9", tmp_path, "--row", "1,3", "--seed", "2")
    assert list(runs) == [
        "pretrained/cutmix_vit_mini",
        "table9/deit_tiny_seed2",
        "table9/self_seed2",
    ]
    assert [parse(words).seed for words in runs.values()] == [0, 2, 2]
    full = start(
        "table7", "--data-path", "/imagenet", "--nproc", "4", "--row", "all", "--seed", "2"
    )
    assert f"{ROOT}/output/table7/deit_small_all_seed2 " in full.stdout


def test_cifars_own_files_are_known_by_their_folder(tmp_path: Path) -> None:
    (tmp_path / "cifar/cifar-10-batches-py").mkdir(parents=True)
    runs = rehearsals("table7", tmp_path, "--row", "none", data=str(tmp_path / "cifar"))
    assert parse(runs["table7/none"]).data_set == "CIFAR10"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--small", "--nproc", "2"], "--nproc 2: --small runs in one process; leave it out"),
        (
            ["--small", "--model", "deit_small"],
            "--small trains vit_mini_patch4_32 in every row; leave it out",
        ),
        (["--steps", "2"], "--steps 2: only a rehearsal is cut short; add --small"),
        (["--small", "--steps", "0"], "--steps 0: must be a whole number above 0"),
        (["--small", "--row", "nosuch"], "table7 has no such row"),
    ],
)
def test_what_a_rehearsal_cannot_do_is_refused(words: list[str], message: str) -> None:
    assert message in refusal("table7", "--data-path", "/cifar", *words)
    assert "--data-path DIR is missing" in refusal("table7", "--small")


# ------------------------------------------------------------------------------- flags of one's own


def test_a_network_to_look_through_gets_no_flag_that_is_for_rows(tmp_path: Path) -> None:
    own = ["--con-weight", "0.5", "--variant=released", "--lr", "3"]
    pretrained, row = map(parse, rehearsals("table9", tmp_path, "--row", "1", *own).values())
    assert (pretrained.mixer, pretrained.con_weight, pretrained.variant, pretrained.lr) == (
        "cutmix",
        None,
        "paper",
        3,
    )
    assert (row.mixer, row.con_weight, row.variant, row.lr) == ("smmix", 0.5, "released", 3)


def test_main_takes_every_rehearsal_whatever_is_given_for_some(tmp_path: Path) -> None:
    runs = rehearsals("table2", tmp_path, *OF_SMMIX, *CONSISTENCY_FLAGS)
    assert [folder for folder, words in runs.items() if parse(words).variant == "released"] == [
        "table2/smmix"
    ]
    assert list(runs) == list(rehearsals("table2", tmp_path))


# --------------------------------------------------------------------------------- what is finished


@pytest.mark.parametrize(
    ("made", "taken", "now", "expected"),
    [
        ("", 32, "", ""),
        ("", 32, "--num-workers 3 --device cpu --log-every 3", ""),
        ("--device cpu", 32, "--lr 9", "--lr 0.001 (this command has 9.0)"),
        ("--epochs 3", 48, "", "--epochs 3 (this command has 2)"),
        ("", 32, "--epochs 1", "--epochs 2 (this command has 1)"),
        ("", 32, "--steps 2", "--max-steps none (this command has 2)"),
        ("--steps 3", 3, "--steps 2", "--max-steps 3 (this command has 2)"),
        ("--steps 2", 2, "--steps 2", ""),
        ("--steps 40", 32, "", ""),  # its epochs were over before
        ("--steps 40", 32, "--steps 50", ""),
        ("", 32, "--batch-size 64", "total batch 128 (this command has 64)"),
    ],
)
def test_a_rehearsal_is_finished_only_as_it_would_be_run_now(
    made: str, taken: int, now: str, expected: str, tmp_path: Path
) -> None:
    both = [
        rehearsals("table7", tmp_path, "--row", "all", "--epochs", "2", *words.split())[
            "table7/all"
        ]
        for words in (made, now)
    ]
    epochs, folder = taken // 16, tmp_path / "run"
    lines = [json.dumps({"epoch": epoch, "test_acc1": 9.0}) for epoch in range(max(epochs, 1))]
    leave(Run(parse(both[0]), {}, 1), folder, *lines, input_size=[32, 32])
    (folder / "status.json").write_text(
        json.dumps({"state": "done", "epoch": epochs, "step": taken})
    )
    command = ["python3", "main.py", *both[1]]
    assert _finished.what_differs(_finished.Finished("row", folder, command)) == expected


def test_a_variant_is_not_taken_for_the_row(tmp_path: Path) -> None:
    own, other = (
        rehearsals("table7", tmp_path, "--row", "all", *words)["table7/all"]
        for words in ([], OF_SMMIX[:2])
    )
    leave(Run(parse(own), {}, 1), tmp_path / "run", '{"epoch": 199}')
    told = _finished.what_differs(_finished.Finished("row", tmp_path / "run", ["main.py", *other]))
    assert "--variant paper (this command has released)" in told
    assert "--region-head shared (this command has separate)" in told  # what the variant stands for


@pytest.mark.parametrize(
    ("state", "step", "finished"), [("done", 2, True), ("done", 1, False), ("running", 2, False)]
)
def test_steps_are_done_or_not(state: str, step: int, finished: bool, tmp_path: Path) -> None:
    assert ask('has_steps "$1" 2', tmp_path).returncode == 1
    (tmp_path / "status.json").write_text(json.dumps({"state": state, "epoch": 0, "step": step}))
    assert ask('has_steps "$1" 2', tmp_path).returncode == (0 if finished else 1)
    assert ask('has_steps "$1" ""', tmp_path).returncode == 1


def test_what_is_finished_is_compared_at_once_and_before_anything_runs(tmp_path: Path) -> None:
    words = ["--steps", "2", "--row", "1,3"]
    runs = rehearsals("table9", tmp_path, *words)
    for folder in ("pretrained/cutmix_vit_mini", "table9/self"):
        made = tmp_path / "small" / folder
        leave(
            Run(parse(runs[folder]), {}, 1),
            made,
            '{"epoch": 0, "test_acc1": 9.0}',
            input_size=[32, 32],
        )
        (made / "status.json").write_text(json.dumps({"state": "done", "epoch": 0, "step": 2}))
    path = f"{fake_python(tmp_path / 'bin', tmp_path / 'compared')}:{PATH}"
    given = ["--small", "--data-path", "/cifar", "--output", str(tmp_path), *words]
    done = start("table9", *given, PATH=path)
    assert done.stdout.count("finished, 2 steps are in") == 2
    assert [parse(words).output_dir for words in commands(done.stdout)] == [
        f"{tmp_path}/small/table9/deit_tiny"
    ]
    compared = list(_finished.read_words((tmp_path / "compared").read_text().split("\0")[1:-1]))
    assert [run.what for run in compared] == [
        "small, pre-training of cutmix_vit_mini",
        "small, table9, row 3, self",
    ]
    assert {_finished.what_differs(run) for run in compared} == {""}
    (tmp_path / "bin/python3").write_text("#!/bin/sh\nexit 2\n")
    refused = start("table9", *given, PATH=path)
    assert (refused.returncode, refused.stdout) == (2, "")
    (tmp_path / "bin/python3").write_text("#!/bin/sh\nexit 1\n")  # as without torch
    assert "the finished runs of table9 could not be compared" in refusal(
        "table9", *given, PATH=path
    )


# ---------------------------------------------------------------------------------------- two steps


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes, as CIFAR-10 has."""
    root = tmp_path_factory.mktemp("rehearsal")
    return make_image_folder(
        root, [f"class{number}" for number in range(10)], per_class=4, size=(32, 32)
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.mark.slow
@tables
def test_every_row_takes_two_steps(table: str, photos: Path, output: Path) -> None:
    """As the scripts would run them, but in this process, which saves each run its start."""
    torch.manual_seed(0)
    runs = rehearsals(table, output, "--steps", "2", *TINY.split(), data=str(photos))
    for folder, words in runs.items():
        done = run_main(*[Path(word) for word in words])  # paths are kept whole
        assert done.code == 0, f"{folder}: {done.err}"
        (line,) = (output / "small" / folder / "log.txt").read_text().splitlines()
        assert json.loads(line)["train_loss"] > 0
        assert json.loads((output / "small" / folder / "status.json").read_text())["step"] == 2
    if table == "table9":  # pre-trainings too; what is asked here is the same for all tables
        check_again(table, photos, output, len(runs))


def check_again(table: str, photos: Path, output: Path, count: int) -> None:
    """What the script makes of a table whose runs have all taken two steps."""
    words = [
        "--small",
        "--steps",
        "2",
        "--data-path",
        str(photos),
        "--output",
        str(output),
        *TINY.split(),
    ]
    again = start(table, *words)
    assert (again.returncode, commands(again.stdout)) == (0, [])
    assert again.stdout.count("finished, 2 steps are in") == count
    assert (
        len(rehearsals(table, output, "--epochs", "1", *TINY.split(), data=str(photos))) == count
    )  # it was cut
    assert len(rehearsals(table, output, "--steps", "3", *TINY.split(), data=str(photos))) == count


@pytest.mark.slow
def test_the_script_runs_its_rows_itself(photos: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("DRY_RUN", None)
    words = [
        "--small",
        "--steps",
        "2",
        "--data-path",
        photos,
        "--output",
        tmp_path / "my runs",
        "--row",
        "1",
    ]
    done = subprocess.run(
        ["bash", "scripts/tables/table9.sh", *map(str, words), *TINY.split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    made = sorted(path.parent.name for path in (tmp_path / "my runs").rglob("status.json"))
    assert made == ["cutmix_vit_mini", "deit_tiny"]
    assert json.loads((tmp_path / "my runs/small/table9/deit_tiny/args.json").read_text())[
        "motivator"
    ].endswith("my runs/small/pretrained/cutmix_vit_mini/checkpoint.pth")
