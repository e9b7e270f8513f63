"""The rows of `recipes/tables.yaml`, and `python -m tools.tables`, which lists and runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from config.checks import check_args
from config.flags import get_args_parser
from errors import InputError
from mixers.registry import all_flags
from tests.image_folders import make_image_folder, message_of
from tests.runs import run_main
from tools.runs.matching import flags_of
from tools.runs.rows import FOLDER, read_tables
from tools.tables import __main__ as command
from tools.tables import finished
from tools.tables.jobs import Failed, run_all
from tools.tables.plan import PlannedRun, Planner

TABLES = read_tables()

# The paper's top-1 on ImageNet-1k, typed from its tables; one figure per column.
PAPER: dict[str, dict[str, list[float | None]]] = {
    "table1": {
        "cutmix": [72.2, 79.8, 81.8, 77.6, 79.1, 75.1, 79.8, 81.2, 81.7, 81.2],
        "transmix": [72.6, 80.7, 82.4, None, 79.8, 75.5, 80.5, 82.1, 82.4, None],
        "tokenmix": [73.2, 80.8, 82.9, 78.0, None, 75.6, None, None, None, 81.6],
        "smmix": [73.6, 81.1, 82.9, 78.9, 80.2, 76.4, 81.0, 82.2, 82.7, 81.8],
    },
    "table2": {
        "vanilla": [75.7, 80.2],
        "cutmix": [79.8, 81.2],
        "attentivemix": [80.3, 81.3],
        "saliencymix": [79.9, 81.4],
        "puzzlemix": [80.5, 81.5],
        "fmix": [77.4, 79.6],
        "resizemix": [78.6, 81.4],
        "automix": [80.8, 81.8],
        "smmix": [81.1, 81.8],
    },
    "table6": {"transmix": [81.1], "tokenmix": [81.2], "smmix": [81.1]},
    "table7": {
        "none": [79.8],
        "mixing": [80.4],
        "consistency": [80.3],
        "mixing_fine": [80.9],
        "mixing_consistency": [80.8],
        "all": [81.1],
    },
    "table8": {"fixed": [81.0], "u01": [81.0], "default": [81.1]},
    "table9": {"deit_tiny": [73.5], "deit_small": [74.1], "self": [73.6], "ema": [None]},
    "tablea4": {
        "random_corr": [74.2],
        "random_max": [73.8],
        "random_min": [74.5],
        "max_corr": [74.4],
        "max_max": [74.3],
        "max_min": [74.7],
    },
    "tablea5": {
        "none": [80.7],
        "block3": [81.0],
        "block6": [81.1],
        "block9": [81.1],
        "block12": [81.1],
        "rollout": [81.1],
    },
}
TO_COME = {
    ("table1", "tokenmix"),
    ("table2", "puzzlemix"),
    ("table2", "automix"),
    ("table6", "tokenmix"),
}

# The benchmark's recipe (Open-Mixup's files for DeiT-S and Swin-T) as each row of Table 2 must
# spell it out.
TABLE_2_RECIPE: dict[str, Any] = {
    "data_set": "IMNET",
    "input_size": (224, 224),
    "eval_crop_ratio": 0.875,
    "epochs": 300,
    "total_batch": 1024,
    "amp": "fp16",
    "auto_resume": True,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "weight_decay": 0.05,
    "clip_grad": 5.0,
    "lr": 5e-4,
    "sched": "cosine",
    "min_lr": 1e-5,
    "sched_on_updates": True,
    "drop": 0.0,
    "model_ema": False,
    "aa": "rand-m9-mstd0.5-inc1",
    "train_interpolation": "bicubic",
    "repeated_aug": False,
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_mode": "batch",
    "side_ratio": [0.25, 0.75],
}
TABLE_2_MODELS: dict[str, dict[str, Any]] = {
    "deit_small": {"drop_path": 0.0, "warmup_epochs": 5, "warmup_lr": 1e-8},
    "swin_tiny": {"drop_path": 0.2, "warmup_epochs": 20, "warmup_lr": 1e-9},
}
TABLE_2_ROWS: dict[str, dict[str, Any]] = {
    "vanilla": {"mixer": "none"},
    "cutmix": {"mixer": "cutmix"},
    "attentivemix": {
        "mixer": "attentivemix",
        "mix_protocol": "single",
        "mix_alpha": [2.0, 8.0],
        "attentive_teacher": "resnet50.tv_in1k",
    },
    "saliencymix": {"mixer": "saliencymix", "mix_protocol": "single", "mix_alpha": [0.2]},
    "fmix": {"mixer": "fmix", "mix_protocol": "single", "mix_alpha": [0.2], "fmix_decay": 3.0},
    "resizemix": {
        "mixer": "resizemix",
        "mix_protocol": "single",
        "resize_scope": [0.1, 0.8],
        "resize_placement": "clipped",
    },
    "smmix": {"mixer": "smmix"},
}
# The recipe of TransMix's authors (Beckschen/TransMix, configs/ and the defaults of train.py).
TRANSMIX_RECIPE: dict[str, Any] = {
    "data_set": "IMNET",
    "input_size": (224, 224),
    "eval_crop_ratio": 0.875,
    "epochs": 300,
    "total_batch": 1024,
    "amp": "fp16",
    "auto_resume": True,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "lr": 1e-3,
    "unscale_lr": True,
    "sched": "cosine",
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "drop": 0.0,
    "drop_path": 0.1,
    "model_ema": True,
    "model_ema_decay": 0.99996,
    "aa": "rand-m9-mstd0.5-inc1",
    "train_interpolation": "random",
    "repeated_aug": False,
    "reprob": 0.0,
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.8,
    "mixup_mode": "batch",
    "mixer": "transmix",
    "relabel_ratio": 0.5,
}
TRANSMIX_MODELS: dict[str, dict[str, Any]] = {
    "deit_tiny": {"weight_decay": 0.03, "warmup_epochs": 20},
    "deit_small": {"weight_decay": 0.03, "warmup_epochs": 20},
    "deit_base": {"weight_decay": 0.05, "warmup_epochs": 5},
}
TABLE_6_ROWS: dict[str, dict[str, Any]] = {
    "transmix": {"mixer": "smmix", "relabel": "transmix", "relabel_ratio": 0.5},
    "smmix": {"mixer": "smmix"},
}
# What each row of the study adds to the recipe of its model's script.
STUDY: dict[str, dict[str, dict[str, Any]]] = {
    "table1": {"cutmix": {"mixer": "cutmix"}, "smmix": {"mixer": "smmix"}},
    "table6": TABLE_6_ROWS,
    "table7": {
        "none": {"mixer": "cutmix", "con_weight": 0.0},
        "mixing": {"mixer": "smmix", "fine_weight": 0.0, "con_weight": 0.0},
        "consistency": {"mixer": "cutmix", "con_weight": 1.0},
        "mixing_fine": {"mixer": "smmix", "fine_weight": 1.0, "con_weight": 0.0},
        "mixing_consistency": {"mixer": "smmix", "fine_weight": 0.0, "con_weight": 1.0},
        "all": {"mixer": "smmix", "fine_weight": 1.0, "con_weight": 1.0},
    },
    "table8": {
        "fixed": {"mixer": "smmix", "side_ratio": [0.5, 0.5]},
        "u01": {"mixer": "smmix", "side_ratio": [0.0, 1.0]},
        "default": {"mixer": "smmix", "side_ratio": [0.25, 0.75]},
    },
    "table9": {
        "deit_tiny": {"mixer": "smmix", "motivator": "deit_tiny_patch16_224.fb_in1k"},
        "deit_small": {"mixer": "smmix", "motivator": "deit_small_patch16_224.fb_in1k"},
        "self": {"mixer": "smmix", "motivator": "self"},
        "ema": {"mixer": "smmix", "motivator": "ema", "model_ema": True},
    },
    "tablea4": {
        f"{source}_{target}": {
            "mixer": "smmix",
            "epochs": 100,
            "source_region": source,
            "target_region": target,
        }
        for source in ("random", "max")
        for target in ("corr", "max", "min")
    },
    "tablea5": {
        "none": {"mixer": "smmix", "score": "random"},
        **{f"block{depth}": {"mixer": "smmix", "score_block": depth} for depth in (3, 6, 9)},
        "block12": {"mixer": "smmix"},
        "rollout": {"mixer": "smmix", "score": "rollout"},
    },
}
TINY = "--batch-size 8 --total-batch 8 --subset 40 --num-workers 0 --device cpu"  # a second's work


def flags(table: str, name: str, model: str = "deit_small") -> dict[str, Any]:
    return flags_of(TABLES.tables[table].find(name, model).arguments, "cuda")


def plan(table: str, *words: str | Path, output: Path | str = "out") -> list[PlannedRun]:
    given = ["run", table, "--data-path", "data", "--output", output, *words]
    args, rest = command.get_args_parser().parse_known_args(list(map(str, given)))
    return Planner(TABLES, TABLES.tables[table], args, rest).runs()


def refusal(table: str, *words: str | Path) -> str:
    return message_of(InputError, plan, table, *words)


def parse(run: PlannedRun) -> Any:
    args = get_args_parser().parse_args(run.arguments)
    check_args(args)
    return args


# --------------------------------------------------------------------- rows and figures


def test_the_figures_are_the_papers() -> None:
    ours = {"deit3", "study"}
    assert TABLES.tables.keys() == PAPER.keys() | ours
    for name, rows in PAPER.items():
        table = TABLES.tables[name]
        found = {
            row: [table.find(row, column).figure for column in table.columns]
            for row in table.names()
        }
        assert found == rows
        listed = command.list_table(TABLES, table)
        for row, figures in rows.items():
            (line,) = [line for line in listed.splitlines() if f"  {row} " in line]
            assert all(str(figure) in line for figure in figures if figure is not None)
            assert ("not available yet" in line) == ((name, row) in TO_COME)
    assert {row.figure for name in ours for row in TABLES.tables[name].rows} == {None}


@pytest.mark.parametrize("model", TABLE_2_MODELS)
@pytest.mark.parametrize("row", TABLE_2_ROWS)
def test_a_row_of_table_2_has_the_benchmarks_recipe(row: str, model: str) -> None:
    wanted = {**TABLE_2_RECIPE, **TABLE_2_MODELS[model], **TABLE_2_ROWS[row]}
    found = flags("table2", row, model)
    assert {name: as_list(found[name]) for name in wanted} == {
        name: as_list(value) for name, value in wanted.items()
    }
    assert not found["scale_schedule"]


@pytest.mark.parametrize("model", TRANSMIX_MODELS)
def test_a_transmix_row_has_the_authors_recipe(model: str) -> None:
    wanted = {**TRANSMIX_RECIPE, **TRANSMIX_MODELS[model], "total_batch": 256}
    found = flags("table1", "transmix", model)
    assert {name: as_list(found[name]) for name in wanted} == {
        name: as_list(value) for name, value in wanted.items()
    }
    own = flags("table1", "smmix", "pvt_tiny")
    other = flags("table1", "transmix", "pvt_tiny")
    different = {name for name in own if own[name] != other[name]} - {"config"}
    assert different <= {"mixer", "consistency", *all_flags()}


@pytest.mark.parametrize(
    ("table", "row"), [(table, row) for table in STUDY for row in STUDY[table]]
)
def test_a_row_adds_its_flags_to_the_recipe_of_its_model(table: str, row: str) -> None:
    model = TABLES.tables[table].columns[0]
    found, recipe = flags(table, row, model), flags("table1", "smmix", model)
    added = STUDY[table][row]
    assert {name: as_list(found[name]) for name in added} == {
        name: as_list(value) for name, value in added.items()
    }
    follows = {
        "config",
        "mixer",
        "con_weight",
        *(all_flags() if added["mixer"] != "smmix" else ()),
    }
    assert {name for name in found if found[name] != recipe[name]} <= added.keys() | follows


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_the_recipe_of_2022_is_the_published_one() -> None:
    found = flags("deit3", "smmix", "deit3_small")
    published = {
        "epochs": 800,
        "total_batch": 2048,
        "opt": "lamb",
        "lr": 4e-3,
        "unscale_lr": True,
        "weight_decay": 0.05,
        "warmup_epochs": 5,
        "drop_path": 0.05,
        "bce_loss": True,
        "smoothing": 0.0,
        "reprob": 0.0,
        "repeated_aug": True,
        "aa": "3a",
        "mixup": 0.8,
        "cutmix": 1.0,
    }
    assert {name: found[name] for name in published} == published


def test_rows_that_are_one_recipe_are_named() -> None:
    notes = command.list_notes(TABLES, TABLES.tables["table7"])
    assert "on deit_small: table1 cutmix, table7 none." in notes
    same = "table1 smmix, table6 smmix, table7 all, table8 default, tablea5 block12"
    assert f"on deit_small: {same}." in notes
    assert "table1 smmix, table9 self" in command.list_notes(TABLES, TABLES.tables["table9"])
    assert "table2" not in notes


# --------------------------------------------------------------------- mistakes in the file


def changed(folder: Path, old: str, new: str) -> str:
    """The message of a tables.yaml with one change."""
    for recipe in FOLDER.glob("*.yaml"):
        text = recipe.read_text()
        if recipe.name == "tables.yaml":
            assert old in text
            text = text.replace(old, new, 1)
        (folder / recipe.name).write_text(text)
    return message_of(InputError, read_tables, folder / "tables.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "    columns: [deit_tiny]",
            "    colums: [deit_tiny]",
            "colums: no such key; did you mean columns?",
        ),
        (
            "columns: [deit_tiny]",
            "columns: [deit_tyni]",
            "deit_tyni: no such recipe; did you mean deit_tiny?",
        ),
        (
            "recipe: openmixup",
            "recipe: openmix",
            "openmix: no such recipe; did you mean openmixup?",
        ),
        ("paper: [75.7, 80.2]", "paper: [75.7]", "row vanilla: has 1 figures for 2 columns"),
        ("flags: --mixer none", "flags: 3", "row vanilla: 3: flags are text"),
        (
            "      vanilla:\n        label: Vanilla\n",
            "      vanilla:\n",
            "row vanilla: the key label is missing",
        ),
        ("      fixed:\n", "      default:\n", "default: is in the file twice"),
        ("rows: [cutmix, smmix", "rows: [cutmx, smmix", "queue: cutmx: the table has no such row"),
        ("tables:\n", "tables: [\n", "is not YAML"),
    ],
)
def test_a_mistake_is_named_with_its_place(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    said = changed(tmp_path, old, new)
    assert message in said
    assert "tables.yaml" in said


# --------------------------------------------------------------------- what is chosen


def test_every_available_row_is_planned_once_with_its_own_folder() -> None:
    for name, table in TABLES.tables.items():
        runs = plan(name)
        folders = [run.folder for run in runs]
        assert len(set(folders)) == len(folders)
        if name == "study":
            continue
        available = [row for row in table.names() if (name, row) not in TO_COME]
        assert [path.name for path in folders] == [
            f"{model}_{row}" for row in available for model in table.columns
        ]
        for run in runs:
            args = parse(run)
            assert (args.data_path, args.output_dir) == ("data", str(run.folder))


def test_rows_columns_and_seeds_are_chosen() -> None:
    runs = plan(
        "table2", "--row", "smmix,1", "--row", "cutmix", "--model", "swin_tiny", "--seed", "0,2"
    )
    assert [run.folder.as_posix() for run in runs] == [
        f"out/table2/swin_tiny_{row}{suffix}"
        for suffix in ("", "_seed2")
        for row in ("smmix", "vanilla", "cutmix")
    ]
    assert [parse(run).seed for run in runs] == [0, 0, 0, 2, 2, 2]
    assert plan("table7", "--nproc", "3")[0].command[2:4] == ["--nproc", "3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--row", "nosuch"],
            "--row nosuch: table2 has no such row; its rows: 1 vanilla, 2 cutmix",
        ),
        (["--row", "99"], "--row 99: table2 has no such row"),
        (["--row", "puzzlemix"], "puzzlemix of table2 is not available yet"),
        (["--model", "deit_huge"], "its columns: deit_small, swin_tiny"),
        (["--steps", "2"], "--steps 2: only a rehearsal is cut short; add --small"),
        (["--small", "--model", "swin_tiny"], "--model: all rehearsals have one model"),
        (["--mixer", "smmix"], "--mixer: the rows of table2 set it; choose rows with --row"),
        (["--weights", "x"], "--weights x: must be NAME=FILE"),
        (["--weights", "x=nosuch.pth"], "nosuch.pth: no such file"),
        (["--weights", f"x={__file__}"], "the chosen rows name no such network; theirs: resnet50"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    assert message in refusal("table2", *words)


def test_flags_that_rows_set_need_another_output_or_are_refused() -> None:
    words = ["run", "table2", "--data-path", "data", "--mix-protocol", "switch"]
    args, rest = command.get_args_parser().parse_known_args(words)
    assert "give another --output too" in message_of(
        InputError, Planner, TABLES, TABLES.tables["table2"], args, rest
    )
    runs = plan("table2", "--mix-protocol", "switch")
    assert {parse(run).mix_protocol for run in runs} == {"switch"}
    for table, flag in (
        ("table7", "--con-weight 0.5"),
        ("table8", "--side-ratio 0 1"),
        ("tablea5", "--score-block 2"),
        ("table9", "--model-ema-decay 0.9"),
    ):
        assert f"the rows of {table} set it" in refusal(table, *flag.split())


def test_own_flags_win_over_the_recipe_and_reach_only_rows_that_use_them() -> None:
    words = [
        "--lr",
        "1e-3",
        "--variant",
        "released",
        "--con-temperature",
        "2",
        "--score",
        "rollout",
        "--epochs",
        "3",
    ]
    runs = {run.folder.name.removeprefix("deit_small_"): run for run in plan("table7", *words)}
    for name, run in runs.items():
        args = parse(run)
        is_smmix = name not in ("none", "consistency")
        has_con = name in ("consistency", "mixing_consistency", "all")
        assert (args.lr, args.epochs) == (1e-3, 3)
        assert (args.variant == "released") == (args.score == "rollout") == is_smmix
        assert (args.con_temperature == 2) == has_con
    assert runs["none"].left_out == tuple(words[2:8])
    assert runs["consistency"].left_out == (*words[2:4], *words[6:8])
    (run,) = plan(
        "table1",
        "--row",
        "cutmix",
        "--model",
        "pvt_tiny",
        "--con-temperature",
        "2",
        "--con-weight",
        "1",
    )
    assert (parse(run).con_temperature, run.left_out) == (2, ())
    (run,) = plan("tablea4", "--row", "random_corr", "--score", "rollout")
    assert run.left_out == ("--score", "rollout")


def test_weights_replace_the_download(tmp_path: Path) -> None:
    file = tmp_path / "deit_small.pth"
    file.touch()
    runs = plan("table9", "--row", "1,2", "--weights", f"deit_small_patch16_224={file}")
    assert [parse(run).motivator for run in runs] == [
        "deit_tiny_patch16_224.fb_in1k",
        f"deit_small_patch16_224={file}",
    ]


def test_a_rehearsal_trains_the_networks_that_its_rows_need_first() -> None:
    runs = plan("table9", "--small", "--steps", "3", "--variant", "released", "--seed", "1")
    folders = [run.folder.relative_to("out/small").as_posix() for run in runs]
    assert folders == [
        "pretrained/cutmix_vit_mini",
        "pretrained/cutmix_deit_tiny",
        *(f"table9/{row}_seed1" for row in PAPER["table9"]),
    ]
    args = [parse(run) for run in runs]
    assert [one.motivator for one in args[2:4]] == [
        f"out/small/{folder}/checkpoint.pth" for folder in folders[:2]
    ]
    assert {(one.max_steps, one.val_subset) for one in args} == {(3, 100)}
    assert [one.variant for one in args] == ["paper", "paper", *["released"] * 4]
    assert [one.seed for one in args] == [0, 0, 1, 1, 1, 1]


def test_the_queue_of_the_study_begins_with_its_pilots() -> None:
    names = [run.folder.as_posix().removeprefix("out/study/") for run in plan("study")]
    assert names[:2] == ["cutmix", "smmix"]
    assert [run.folder.name for run in plan("study", "--row", "smmix", "--seed", "4")] == [
        "smmix_seed4"
    ]
    assert "study is small already" in refusal("study", "--small")


# --------------------------------------------------------------------- what is finished


def leave(run: PlannedRun, epochs: int, status: dict[str, Any], **different: Any) -> None:
    """A folder as main.py leaves it after so many epochs."""
    run.folder.mkdir(parents=True)
    values = {**flags_of(run.arguments, "cpu"), **different}
    (run.folder / "args.json").write_text(json.dumps(values))
    lines = [json.dumps({"epoch": epoch, "test_acc1": 9.0}) for epoch in range(epochs)]
    (run.folder / "log.txt").write_text("\n".join(lines))
    (run.folder / "status.json").write_text(json.dumps(status))
    (run.folder / "train.log").write_text(
        f"2026-01-01 10:00:00 data  x\n2026-01-01 10:00:00 total batch  = {values['total_batch']}\n"
    )


@pytest.mark.parametrize(
    ("made", "done", "now", "expected"),
    [
        ("", (2, 40), "", True),
        ("", (1, 20), "", False),
        ("", (2, 40), "--num-workers 3 --device cpu --log-every 3", True),
        ("", (2, 40), "--lr 9", "--lr 0.001 (this command has 9.0)"),
        ("--variant released", (2, 40), "", "--variant released (this command has paper)"),
        ("", (2, 40), "--total-batch 50", "total batch 100 (this command has 50)"),
        ("--steps 3", (0, 3), "--steps 2", "--max-steps 3 (this command has 2)"),
        ("--steps 2", (0, 2), "--steps 2", True),
        ("--steps 2", (0, 2), "--steps 3", False),
        ("--steps 2", (0, 2), "", False),
    ],
)
def test_a_run_is_finished_only_if_this_command_would_make_it(
    made: str, done: tuple[int, int], now: str, expected: bool | str, tmp_path: Path
) -> None:
    (old,) = plan(
        "table7", "--small", "--row", "all", "--epochs", "2", *made.split(), output=tmp_path
    )
    (new,) = plan(
        "table7", "--small", "--row", "all", "--epochs", "2", *now.split(), output=tmp_path
    )
    epochs, step = done
    state = {"state": "done" if epochs != 1 else "running", "epoch": epochs, "step": step}
    leave(old, max(epochs, 1), state)
    steps = parse(new).max_steps
    if isinstance(expected, str):
        assert expected in message_of(InputError, finished.is_finished, new, steps)
    else:
        assert finished.is_finished(new, steps) == expected


def test_all_wrong_recipes_are_named_before_anything_runs(tmp_path: Path) -> None:
    runs = plan("table8", "--epochs", "1", output=tmp_path)
    for run in runs[:2]:
        leave(run, 1, {"state": "done", "epoch": 1, "step": 10}, lr=9.0)
    said = message_of(InputError, finished.split, runs, None)
    assert said.count("--lr 9.0 (this command has 0.0005)") == 2
    (runs[0].folder / "args.json").write_text("{}")
    assert "cannot be read" in message_of(InputError, finished.split, runs, None)


# --------------------------------------------------------------------- running


def script(folder: Path, name: str, body: str) -> PlannedRun:
    """A run whose command is a Python script."""
    file = folder / f"{name}.py"
    file.write_text(f"import json, pathlib, signal, sys, time\n{body}\n")

    class Fake(PlannedRun):
        @property
        def command(self) -> list[str]:
            return [sys.executable, str(file)]

    return Fake(name, folder / name, ())


@pytest.mark.parametrize("jobs", [None, 2])
def test_runs_end_in_order_and_a_failure_stops_the_rest(
    jobs: int | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [
        script(tmp_path, "first", ""),
        script(tmp_path, "second", "time.sleep(0.5); print('the reason'); sys.exit(7)"),
        script(tmp_path, "third", "time.sleep(30)"),
        script(tmp_path, "fourth", "pathlib.Path(__file__).with_suffix('.ran').touch()"),
    ]
    ended: list[str] = []
    with pytest.raises(Failed, match="second: stopped with exit code 7, see above") as failed:
        run_all(runs, jobs, lambda run, seconds: ended.append(run.what))
    assert (failed.value.exit_code, ended) == (7, ["first"])
    assert "the reason" in "".join(capfd.readouterr())
    assert not (tmp_path / "fourth.ran").exists()


def test_a_run_that_a_signal_stopped_stops_the_table(tmp_path: Path) -> None:
    run = script(tmp_path, "run", "")
    run.folder.mkdir()
    (run.folder / "status.json").write_text(json.dumps({"state": "preempted"}))
    with pytest.raises(Failed, match="stopped by a signal before its end"):
        run_all([run], None, lambda run, seconds: None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_reaches_the_runs_and_waits_for_them_unless_it_is_ignored(
    number: signal.Signals, ignored: bool, tmp_path: Path
) -> None:
    body = (
        "def stop(*_):\n    pathlib.Path(__file__).with_suffix('.saved').touch()\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path(__file__).with_suffix('.begun').touch()\n"
        f"time.sleep({0.5 if ignored else 60})"
    )
    runs = [script(tmp_path, name, body) for name in ("one", "two")]
    pid = os.fork()
    if pid == 0:
        code = 99
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
        try:
            run_all(runs, 2, lambda run, seconds: None)
            code = 0
        except Failed as failed:
            code = failed.exit_code
        finally:
            os._exit(code)
    while len(list(tmp_path.glob("*.begun"))) < 2:
        time.sleep(0.05)
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if ignored else 128 + number)
    assert len(list(tmp_path.glob("*.saved"))) == (0 if ignored else 2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes, as CIFAR-10 has."""
    classes = [f"class{number}" for number in range(10)]
    root = tmp_path_factory.mktemp("rehearsal")
    return make_image_folder(root, classes, per_class=10, size=(32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("table", [name for name in TABLES.tables if name != "study"])
def test_every_row_takes_two_steps(
    table: str, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As the command would run them, but in this process, which saves each run its start."""
    torch.manual_seed(0)
    output = tmp_path_factory.getbasetemp() / "rows"
    words = ["--small", "--steps", "2", "--data-path", str(photos), *TINY.split()]
    for run in plan(table, *words, output=output):
        if run.folder.exists():  # a frozen network of an earlier table
            continue
        done = run_main(*map(Path, run.arguments))  # paths are kept whole
        assert done.code == 0, f"{run.what}: {done.err}"
        (line,) = (run.folder / "log.txt").read_text().splitlines()
        assert json.loads(line)["train_loss"] > 0
        assert json.loads((run.folder / "status.json").read_text())["step"] == 2


@pytest.mark.slow
def test_the_command_runs_resumes_and_skips(photos: Path, tmp_path: Path) -> None:
    """`run` as a user types it: two steps, skipped, then resumed to its end."""
    begin = [sys.executable, "-m", "tools.tables", "run", "table8", "--row", "default", "--small"]
    rest = ["--data-path", photos, "--output", tmp_path / "my runs", *TINY.split(), "--epochs", "1"]

    def run(*words: str) -> str:
        done = subprocess.run(
            [*begin, *words, *map(str, rest)], cwd=FOLDER.parent, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("--steps", "2")
    assert "finished in" in run("--steps", "2")
    assert "small, table8, row 3, default: top-1" in run("--jobs", "1")
    status = json.loads((tmp_path / "my runs/small/table8/default/status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 5)
