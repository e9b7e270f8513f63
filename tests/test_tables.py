"""The scripts of the paper's tables: rows and figures as printed in the paper, each row's command,
what is run again.

Commands are taken from what the scripts print with DRY_RUN=1 and parsed by main.py's own parser.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.distributed.run import parse_args as parse_torchrun

from config.flags import get_args_parser
from config.parser import explicit_flags
from config.resolve import resolve
from mixers.registry import METHODS, all_flags, flags_of_method
from scripts.tables import _finished
from tests.test_commands import RECIPE, ROOT, TABLE_1, check_command, commands_of_header, run_of
from training.total_batch import scale_rate

FOLDER = ROOT / "scripts/tables"
SCRIPTS = sorted(path for path in FOLDER.glob("*.sh") if not path.name.startswith("_"))
SHARED = sorted(FOLDER.glob("_*.sh"))
# What is shared code is tested on these: a recipe of its own and two columns, a model's script,
# rows that are models.
DIFFERENT = ["table2", "table7", "table1_transmix"]
PATH = (
    f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as where the environment is activated
)

# Rows in the paper's order: label and top-1, one per column.
PAPER: dict[str, dict[str, tuple[str, ...]]] = {
    "table2": {
        "vanilla": ("Vanilla", "75.7", "80.2"),
        "cutmix": ("CutMix", "79.8", "81.2"),
        "attentivemix": ("AttentiveMix", "80.3", "81.3"),
        "saliencymix": ("SaliencyMix", "79.9", "81.4"),
        "puzzlemix": ("PuzzleMix", "80.5", "81.5"),
        "fmix": ("F-Mix", "77.4", "79.6"),
        "resizemix": ("ResizeMix", "78.6", "81.4"),
        "automix": ("AutoMix", "80.8", "81.8"),
        "smmix": ("SMMix", "81.1", "81.8"),
    },
    "table1_transmix": {
        "deit_tiny": ("DeiT-T", "72.6"),
        "deit_small": ("DeiT-S", "80.7"),
        "deit_base": ("DeiT-B", "82.4"),
        "cait_xxs36": ("CaiT-XXS-36", "79.8"),
        "pvt_tiny": ("PVT-T", "75.5"),
        "pvt_small": ("PVT-S", "80.5"),
        "pvt_medium": ("PVT-M", "82.1"),
        "pvt_large": ("PVT-L", "82.4"),
    },
    "table6": {
        "transmix": ("transmix", "81.1"),
        "tokenmix": ("tokenmix", "81.2"),
        "smmix": ("smmix", "81.1"),
    },
    "table1": {
        "cutmix": (
            "CutMix",
            "72.2",
            "79.8",
            "81.8",
            "77.6",
            "79.1",
            "75.1",
            "79.8",
            "81.2",
            "81.7",
            "81.2",
        ),
        "smmix": (
            "SMMix",
            "73.6",
            "81.1",
            "82.9",
            "78.9",
            "80.2",
            "76.4",
            "81.0",
            "82.2",
            "82.7",
            "81.8",
        ),
    },
    "table7": {
        "none": ("none", "79.8"),
        "mixing": ("mixing", "80.4"),
        "consistency": ("consistency", "80.3"),
        "mixing_fine": ("mixing_fine", "80.9"),
        "mixing_consistency": ("mixing_consistency", "80.8"),
        "all": ("all", "81.1"),
    },
    "table8": {"fixed": ("fixed", "81.0"), "u01": ("u01", "81.0"), "default": ("default", "81.1")},
    "table9": {
        "deit_tiny": ("deit_tiny", "73.5"),
        "deit_small": ("deit_small", "74.1"),
        "self": ("self", "73.6"),
        "ema": ("ema", "-"),
    },
    "tablea4": {
        "random_corr": ("random_corr", "74.2"),
        "random_max": ("random_max", "73.8"),
        "random_min": ("random_min", "74.5"),
        "max_corr": ("max_corr", "74.4"),
        "max_max": ("max_max", "74.3"),
        "max_min": ("max_min", "74.7"),
    },
    "tablea5": {
        "none": ("none", "80.7"),
        "block3": ("block3", "81.0"),
        "block6": ("block6", "81.1"),
        "block9": ("block9", "81.1"),
        "block12": ("block12", "81.1"),
        "rollout": ("rollout", "81.1"),
    },
}
TO_COME: dict[str, list[str]] = {table: [] for table in PAPER}
TO_COME.update(table2=["puzzlemix", "automix"], table6=["tokenmix"])
COLUMNS = {
    **{table: ["deit_small"] for table in PAPER},
    "table1": list(TABLE_1),
    "table1_transmix": [],
    "table2": ["deit_small", "swin_tiny"],
    "table9": ["deit_tiny"],
}

# The benchmark's recipe (Open-Mixup's files for DeiT-S and Swin-T) as each row of Table 2 must
# spell it out.
TABLE_2_RECIPE: dict[str, Any] = {
    "data_set": "IMNET",
    "input_size": [224],
    "eval_crop_ratio": 0.875,
    "epochs": 300,
    "seed": 0,
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
    "variant": "paper",
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
    "input_size": [224],
    "eval_crop_ratio": 0.875,
    "epochs": 300,
    "seed": 0,
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
        **{f"block{depth}": {"mixer": "smmix", "score_block": depth} for depth in (3, 6, 9, 12)},
        "rollout": {"mixer": "smmix", "score": "rollout"},
    },
}
OF_THE_RUN = {"model", "batch_size", "accum_steps", "data_path", "output_dir"}


class Run(NamedTuple):
    """One training run that a table's script shows."""

    args: argparse.Namespace
    written: dict[str, Any]  # the flags that stand on the command line
    processes: int

    @property
    def folder(self) -> str:
        return self.args.output_dir

    @property
    def name(self) -> str:
        return Path(self.folder).name


def start(
    table: str, *words: str, cwd: Path | str = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The script, as a dry run unless the environment says otherwise."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NNODES", "NODE_", "MASTER_"))
    }
    return subprocess.run(
        ["bash", str(FOLDER / f"{table}.sh"), *words],
        cwd=cwd,
        env={**clean, "PATH": PATH, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
    )


def ask(code: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The shared part of the scripts by itself: `code`, with the words as its arguments."""
    command = [
        "bash",
        "-c",
        f'set -euo pipefail; source "{FOLDER}/_table.sh"; {code}',
        "bash",
        *map(str, words),
    ]
    return subprocess.run(command, capture_output=True, text=True)


def shown(
    table: str, *words: str, processes: str = "4", cwd: Path | str = ROOT, **environment: str
) -> str:
    """What a dry run prints."""
    done = start(
        table, "--data-path", "/imagenet", "--nproc", processes, *words, cwd=cwd, **environment
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def runs_in(printed: str) -> list[Run]:
    """The calls of main.py, as its own parser reads them; every other line is a message."""
    runs = []
    for line in printed.splitlines():
        if line.startswith("== "):
            continue
        (args,) = check_command(line)
        launch = parse_torchrun(shlex.split(line)[1:])
        written = explicit_flags(get_args_parser(), launch.training_script_args)
        runs.append(Run(args, written, int(launch.nproc_per_node)))
    return runs


@cache
def whole_table(table: str) -> str:
    """What a dry run without a choice prints."""
    return shown(table)


@cache
def all_runs(table: str) -> dict[str, Run]:
    """Every run of a table by its folder's name."""
    return {run.name: run for run in runs_in(whole_table(table))}


def refusal(table: str, *words: str, **environment: str) -> str:
    """The message of a script that refuses its arguments: exit code 2, and nothing was run."""
    refused = start(table, *words, **environment)
    assert refused.returncode == 2, refused.stdout
    assert "torchrun" not in refused.stdout
    return refused.stderr


def names(runs: list[Run]) -> list[str]:
    return [run.name for run in runs]


# --------------------------------------------------------------------------------- rows and figures


def test_every_table_is_tested() -> None:
    assert {path.stem for path in SCRIPTS} == set(PAPER)


@pytest.mark.parametrize("table", PAPER)
def test_a_list_numbers_the_rows_and_quotes_the_paper(table: str) -> None:
    done = start(table, "--list", DRY_RUN="0")
    assert (done.returncode, done.stderr) == (0, "")
    rows = re.findall(
        r"^ *(\d+) +(\w+) +.*?((?: {2,}(?:\d+\.\d|-))+)(   not available yet)?$",
        done.stdout,
        flags=re.M,
    )
    expected = [
        (
            str(number),
            name,
            " ".join(figures),
            "   not available yet" if name in TO_COME[table] else "",
        )
        for number, (name, (_, *figures)) in enumerate(PAPER[table].items(), start=1)
    ]
    assert [
        (number, name, " ".join(figures.split()), note) for number, name, figures, note in rows
    ] == expected
    assert "not run by us" in done.stdout


@pytest.mark.parametrize("table", PAPER)
def test_a_header_says_what_to_expect_and_that_it_was_not_run(table: str) -> None:
    header = re.sub(r"\n# *", " ", (FOLDER / f"{table}.sh").read_text().split("\nset -e")[0])
    for label, *figures in PAPER[table].values():
        together = (
            f"{', '.join(figures[:-1])} and {figures[-1]}" if len(figures) > 1 else figures[0]
        )
        assert together == "-" or f"{label} {together}" in header
    assert "Not run by us" in header


def test_the_figures_here_agree_with_the_ten_scripts() -> None:
    for model, column in (("deit_small", 1), ("swin_tiny", 2)):
        assert float(PAPER["table2"]["cutmix"][column]) == TABLE_1[model].cutmix
        assert float(PAPER["table2"]["smmix"][column]) == TABLE_1[model].smmix
    assert float(PAPER["table6"]["smmix"][1]) == TABLE_1["deit_small"].smmix
    for place, model in enumerate(COLUMNS["table1"], start=1):
        assert float(PAPER["table1"]["cutmix"][place]) == TABLE_1[model].cutmix
        assert float(PAPER["table1"]["smmix"][place]) == TABLE_1[model].smmix
    for table, row, known in (
        ("table7", "none", "cutmix"),
        ("table7", "all", "smmix"),
        ("table8", "default", "smmix"),
    ):
        assert float(PAPER[table][row][1]) == getattr(TABLE_1["deit_small"], known)
    assert float(PAPER["table9"]["self"][1]) == TABLE_1["deit_tiny"].smmix
    for model, (label, _) in PAPER["table1_transmix"].items():
        assert label == TABLE_1[model].name


# ------------------------------------------------------------------------------------- the commands


def recipe_of(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.written.items() if name not in OF_THE_RUN}


@pytest.mark.parametrize("model", TABLE_2_MODELS)
@pytest.mark.parametrize("row", TABLE_2_ROWS)
def test_a_row_of_table_2_spells_out_the_benchmarks_recipe(row: str, model: str) -> None:
    run = all_runs("table2")[f"{model}_{row}"]
    assert recipe_of(run) == {**TABLE_2_RECIPE, **TABLE_2_MODELS[model], **TABLE_2_ROWS[row]}
    assert run.args.model == TABLE_1[model].model


@pytest.mark.parametrize("model", PAPER["table1_transmix"])
def test_a_transmix_row_has_the_authors_recipe_or_its_models_own(model: str) -> None:
    run = all_runs("table1_transmix")[f"{model}_transmix"]
    if model in TRANSMIX_MODELS:
        expected = {**TRANSMIX_RECIPE, **TRANSMIX_MODELS[model]}
    else:
        own = {**RECIPE, **TABLE_1[model].differs, "mixer": "transmix"}
        expected = {name: value for name, value in own.items() if value is not None}
    assert recipe_of(run) == expected
    assert run.args.model == TABLE_1[model].model


@pytest.mark.parametrize(
    ("table", "row"), [(table, row) for table, rows in STUDY.items() for row in rows]
)
def test_a_row_of_the_study_is_the_recipe_of_its_models_script(table: str, row: str) -> None:
    for model in COLUMNS[table]:
        run = all_runs(table)[f"{model}_{row}"]
        own = {**RECIPE, **TABLE_1[model].differs, **STUDY[table][row]}
        assert recipe_of(run) == {name: value for name, value in own.items() if value is not None}
        script, _ = run_of(model, "--nproc", "4")
        assert (run.args.model, run.args.batch_size) == (script.model, script.batch_size)


def test_the_study_is_whole() -> None:
    for table, rows in STUDY.items():
        assert list(rows) == [row for row in PAPER[table] if row not in TO_COME[table]]


def test_motivators_are_files_where_these_are_given() -> None:
    words = ("--motivator-tiny", "a b.pth", "--motivator-small=c.pth")
    tiny, small, *_ = runs_in(shown("table9", *words))
    assert tiny.args.motivator == "deit_tiny_patch16_224=a b.pth"
    assert small.args.motivator == "deit_small_patch16_224=c.pth"
    assert "each row has its own" in refusal(
        "table9", "--data-path", "/imagenet", "--motivator", "ema"
    )


@pytest.mark.parametrize("processes", ["1", "2", "8", "16"])
@pytest.mark.parametrize("table", DIFFERENT)
def test_the_total_batch_and_the_peak_rate_hold_on_any_number_of_processes(
    table: str, processes: str
) -> None:
    for run in runs_in(shown(table, processes=processes)):
        by_authors = table == "table1_transmix" and run.name.startswith("deit_")
        total = run.args.batch_size * run.processes * run.args.accum_steps
        assert (run.processes, total) == (int(processes), 256 if by_authors else 1024)
        rate = run.args.lr if run.args.unscale_lr else scale_rate(run.args.lr, total)
        assert rate == pytest.approx(1e-3)
        (largest,) = (known.largest for known in TABLE_1.values() if known.model == run.args.model)
        assert run.args.batch_size <= largest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc", "3"], "does not divide evenly into 3 processes"),
        (["--nproc", "0"], "--nproc 0: must be"),
        (["--nproc", "4", "--batch-size", "x"], "--batch-size x: must be"),
    ],
)
@pytest.mark.parametrize("table", DIFFERENT)
def test_what_the_model_scripts_refuse_is_refused_here_too(
    table: str, words: list[str], message: str
) -> None:
    assert message in refusal(table, "--data-path", "/imagenet", *words)


@pytest.mark.parametrize("table", DIFFERENT)
def test_several_machines_share_a_row(table: str) -> None:
    cluster = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    printed = shown(table, "--row", "1", processes="8", **cluster)
    assert (
        "--nnodes=2 --node_rank=1 --master_addr=node0 --master_port=29500 --nproc_per_node=8"
        in printed
    )
    for run in runs_in(printed):
        assert run.args.batch_size * 16 * run.args.accum_steps == (
            256 if table == "table1_transmix" else 1024
        )


def test_ones_own_arguments_come_last_and_win() -> None:
    words = ("--mix-protocol", "switch", "--seed", "1", "--batch_size=128", "--output", "elsewhere")
    runs = runs_in(shown("table2", *words))
    assert len(runs) == 2 * len(TABLE_2_ROWS)
    assert {(run.args.mix_protocol, run.args.seed, run.args.batch_size) for run in runs} == {
        ("switch", 1, 128)
    }
    words = (
        "--row",
        "transmix",
        "--relabel-ratio",
        "0",
        "--weight_decay=0.1",
        "--output",
        "elsewhere",
    )
    (run,) = runs_in(shown("table6", *words))
    assert (run.args.relabel_ratio, run.args.weight_decay, run.args.relabel) == (
        0.0,
        0.1,
        "transmix",
    )


def test_what_is_of_the_recipe_and_not_of_the_row_is_open() -> None:
    assert {run.args.epochs for run in runs_in(shown("tablea4", "--epochs", "7"))} == {7}
    (run,) = runs_in(
        shown("table1_transmix", "--row", "deit_base", "--weight-decay", "0.1", "--warmup-epochs=1")
    )
    assert (run.args.weight_decay, run.args.warmup_epochs) == (0.1, 1)


@pytest.mark.parametrize(
    ("table", "flag", "words"),
    [
        ("table1", "--mixer", ["--mixer", "cutmix"]),
        ("table1_transmix", "--mixer", ["--mixer=cutmix"]),
        ("table2", "--fmix-decay", ["--fmix-decay", "2"]),
        ("table2", "--input-size", ["--small", "--input-size", "64"]),  # of a rehearsal alone
        ("table6", "--relabel", ["--relabel", "none"]),
        ("table7", "--con-weight", ["--con-weight", "0.5"]),
        ("table7", "--fine-weight", ["--lr", "1", "--fine_weight=0", "--output", "elsewhere"]),
        ("table8", "--side-ratio", ["--side-ratio", "0.1", "0.2"]),
        ("table9", "--no-model-ema", ["--no-model-ema"]),
        ("table9", "--model-ema-decay", ["--small", "--model-ema-decay", "0.9"]),
        ("tablea4", "--target-region", ["--target-region", "max"]),
        ("tablea5", "--score-block", ["--row", "none", "--score-block", "3"]),
    ],
)
def test_a_row_is_not_made_another_under_its_name(table: str, flag: str, words: list[str]) -> None:
    wanted = f"{flag}: the rows of {table.split('_')[0]} set it themselves; choose rows with --row"
    assert wanted in refusal(table, "--data-path", "/imagenet", *words)
    assert wanted in refusal(table, "--list-tsv", *words)


@pytest.mark.parametrize(
    ("table", "flag"), [("table2", "--mix-alpha"), ("table6", "--relabel-ratio")]
)
def test_another_value_of_some_flags_needs_a_folder_of_its_own(table: str, flag: str) -> None:
    message = refusal(table, "--data-path", "/imagenet", flag, "0.3")
    assert (
        f"{flag}: the rows of {table} set it themselves; for another value give another --output "
        "too" in message
    )


def test_which_mixer_has_a_use_for_a_flag_is_what_main_says() -> None:
    refused = [name for name, flag in all_flags().items() if not flag.ignorable]
    flags = ["--" + name.replace("_", "-") for name in refused]
    code = """pretraining=0 has_fine=1 has_score=1
    for mixer in $1; do for has_con in 0 1; do for flag in $2; do
      ! has_no_use "$flag" || echo "$mixer $has_con $flag"
    done; done; done"""
    said = ask(
        code, " ".join(METHODS), " ".join([*flags, "--side-ratio", "--lr", "--mixup"])
    ).stdout.splitlines()
    expected = [
        "smmix 0 --con-temperature"
    ]  # main.py refuses it beside --con-weight 0 by a rule of its own
    for mixer in METHODS:
        for has_con in (0, 1):
            given = {**dict.fromkeys(refused, "given"), "con_weight": float(has_con)}
            kept = flags_of_method(given, mixer)
            expected += [
                f"{mixer} {has_con} --{name.replace('_', '-')}"
                for name in refused
                if kept[name] != given[name]
            ]
            expected += [f"{mixer} {has_con} --side-ratio"] if mixer != "smmix" else []
    assert sorted(said) == sorted(expected)


OF_SMMIX = [
    "--variant",
    "released",
    "--region_head=separate",
    "--side-ratio",
    "0.3",
    "0.6",
    "--fine-temperature",
    "2",
]
CONSISTENCY_FLAGS = [
    "--consistency",
    "logits",
    "--con-temperature",
    "2",
    "--guide-size",
    "112",
    "112",
]


def test_a_flag_goes_to_the_rows_that_have_a_use_for_it() -> None:
    printed = shown("table7", *OF_SMMIX, "--lr", "1", *CONSISTENCY_FLAGS)
    runs = runs_in(printed)
    assert {run.args.lr for run in runs} == {1.0}
    kept = {
        run.name.removeprefix("deit_small_"): (
            run.args.variant,
            run.args.region_head,
            run.args.side_ratio,
            run.args.fine_temperature,
            run.args.consistency,
            run.args.con_temperature,
            run.args.guide_size,
        )
        for run in runs
    }
    smmix = ("released", "separate", [0.3, 0.6])
    assert kept == {
        "none": ("paper", None, [0.25, 0.75], 1.0, None, 1.0, None),
        "mixing": (*smmix, 1.0, "logits", 1.0, [112, 112]),
        "consistency": ("paper", None, [0.25, 0.75], 1.0, "logits", 2.0, [112, 112]),
        "mixing_fine": (*smmix, 2.0, "logits", 1.0, [112, 112]),
        "mixing_consistency": (*smmix, 1.0, "logits", 2.0, [112, 112]),
        "all": (*smmix, 2.0, "logits", 2.0, [112, 112]),
    }
    assert (
        f"== table7, row 3, consistency on deit_small: without {' '.join(OF_SMMIX)}, which it does "
        "not use" in printed
    )
    assert "row 6, all on deit_small: without" not in printed


@pytest.mark.parametrize("table", ["table1_transmix", "table2", "tablea4"])
def test_main_takes_every_row_whatever_is_given_for_some(table: str) -> None:
    score = ["--score", "random"] if table == "tablea4" else []
    own = ["--cutmix-minmax", "0.2", "0.8", "--con-weight", "0.5", "--attentive-cells", "6"]
    runs = runs_in(
        shown(
            table,
            *OF_SMMIX,
            *CONSISTENCY_FLAGS,
            *score,
            *own[: None if table == "table1_transmix" else 5],
        )
    )
    assert len(runs) == len(all_runs(table))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_commands_of_a_header_are_accepted(script: Path) -> None:
    commands = commands_of_header(script.read_text())
    assert any(command.endswith("--list") for command in commands)
    assert len(commands) > 1
    for command in commands:
        program, path, *words = shlex.split(command)
        assert (program, path) == ("bash", f"scripts/tables/{script.name}")
        if words != ["--list"]:
            done = start(script.stem, *words, *([] if "--small" in words else ["--nproc", "4"]))
            assert done.returncode == 0, done.stderr
            assert "main.py" in done.stdout
            if "--small" not in words:
                assert runs_in(done.stdout)


# ------------------------------------------------------------------------------ choosing and naming


@pytest.mark.parametrize("table", PAPER)
def test_without_a_choice_every_row_there_is_runs_into_a_folder_of_its_own(table: str) -> None:
    rows = [row for row in PAPER[table] if row not in TO_COME[table]]
    expected = [f"{model}_{row}" for row in rows for model in COLUMNS[table]] or [
        f"{row}_transmix" for row in rows
    ]
    printed, runs = whole_table(table), all_runs(table)
    assert list(runs) == expected
    folder = ROOT / "output" / table.split("_")[0]
    assert all(Path(run.folder).parent == folder for run in runs.values())
    for row in TO_COME[table]:
        assert re.search(
            rf"^== {table}, row \d, {row}: not available yet; left out$", printed, flags=re.M
        )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--row", "2"], ["cutmix"]),
        (["--row=smmix"], ["smmix"]),
        (["--row", "smmix,2"], ["smmix", "cutmix"]),
        (["--row", "smmix, 2"], ["smmix", "cutmix"]),
        (["--row", "vanilla", "--row", "7"], ["vanilla", "resizemix"]),
        (["--row", "2,cutmix", "--row", "2"], ["cutmix"]),
    ],
)
def test_rows_are_chosen_by_number_and_by_name(words: list[str], expected: list[str]) -> None:
    runs = runs_in(shown("table2", *words))
    assert names(runs) == [f"{model}_{row}" for row in expected for model in COLUMNS["table2"]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "swin_tiny"], ["swin_tiny"]),
        (["--model=deit_small"], ["deit_small"]),
        (["--model", "swin_tiny,deit_small", "--model", "swin_tiny"], ["swin_tiny", "deit_small"]),
    ],
)
def test_columns_are_chosen_by_model(words: list[str], expected: list[str]) -> None:
    assert names(runs_in(shown("table2", "--row", "9", *words))) == [
        f"{model}_smmix" for model in expected
    ]


@pytest.mark.parametrize("word", ["nosuch", "0", "10", "cut", "*", "2x"])
def test_an_unknown_row_is_refused_with_the_list_of_rows(word: str) -> None:
    message = refusal("table2", "--data-path", "/imagenet", "--row", f"cutmix,{word}")
    assert f"--row {word}: table2 has no such row" in message
    for number, row in enumerate(PAPER["table2"], start=1):
        assert f"{number} {row}" in message


@pytest.mark.parametrize(
    ("table", "row"), [(table, row) for table, rows in TO_COME.items() for row in rows]
)
def test_a_row_to_come_says_so_and_quotes_the_paper(table: str, row: str) -> None:
    number = str(list(PAPER[table]).index(row) + 1)
    for word in (row, number):
        message = refusal(table, "--data-path", "/imagenet", "--row", word)
        assert (
            f"{row} is not available yet; the paper has {' and '.join(PAPER[table][row][1:])}"
            in message
        )


@pytest.mark.parametrize(
    ("table", "words", "message"),
    [
        ("table2", ["--row", ""], "--row needs numbers or names"),
        ("table2", ["--row", ", ,"], "--row needs numbers or names"),
        ("table2", ["--row"], "--row needs a value"),
        ("table2", ["--model", "deit_tiny"], "its columns: deit_small swin_tiny"),
        ("table6", ["--model", "swin_tiny"], "its columns: deit_small"),
        (
            "table1_transmix",
            ["--model", "deit_tiny"],
            "the rows of table1 are its models; choose with --row",
        ),
        ("table2", ["--epochs", "x"], "--epochs x: must be a whole number above 0"),
        ("table6", ["--epochs=0"], "--epochs 0: must be a whole number above 0"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(
    table: str, words: list[str], message: str
) -> None:
    assert message in refusal(table, "--data-path", "/imagenet", "--nproc", "4", *words)


@pytest.mark.parametrize("table", DIFFERENT)
def test_a_table_without_data_says_so(table: str) -> None:
    assert "--data-path DIR is missing" in refusal(table, "--nproc", "4")


@pytest.mark.parametrize("table", DIFFERENT)
def test_every_path_holds_in_another_working_directory(table: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "another place"
    elsewhere.mkdir()
    assert start(table, "--list", cwd=elsewhere).stdout == start(table, "--list").stdout
    assert shown(table, cwd=elsewhere) == whole_table(
        table
    )  # by default the project's output folder
    relative = shown(table, "--output", "my runs/", cwd=elsewhere)
    assert {Path(run.folder).parts[:-1] for run in runs_in(relative)} == {
        ("my runs", table.split("_")[0])
    }
    assert "//" not in relative
    for line in relative.splitlines():
        assert line.startswith("== ") or f" {shlex.quote(str(ROOT / 'main.py'))} " in line


def test_the_processes_default_to_the_gpus_here_counted_once(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\necho asked >>"{tmp_path}/calls"\necho 2\n')
    python.chmod(0o755)
    done = start("table6", "--data-path", "/imagenet", PATH=f"{tmp_path}:{PATH}")
    assert {run.processes for run in runs_in(done.stdout)} == {2}
    assert (tmp_path / "calls").read_text().split() == ["asked"]


# ------------------------------------------------------------------------------------ running again


def leave(run: Run, folder: Path, *lines: str, **changed: Any) -> None:
    """What a run leaves behind: the lines of its log, and its recipe but for what is changed."""
    args = resolve(run.args, 1, "cpu")
    total = args.batch_size * args.accum_steps * run.processes
    told = {
        "data": "IMNET somewhere",
        "total batch": f"all of it = {total}",
        "device": "cpu, 4 loader processes",
    }
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({**vars(args), **changed}))
    (folder / "train.log").write_text(
        "".join(f"2026-01-01 10:00:00 {name:<18}  {told[name]}\n" for name in told)
    )
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines))


def fake_python(folder: Path, notes: Path) -> Path:
    """The folder, with a python3 in it that finds nothing wrong and notes its words, a zero byte
    behind each."""
    folder.mkdir(exist_ok=True)
    (folder / "python3").write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >>"{notes}"\n')
    (folder / "python3").chmod(0o755)
    return folder


def test_a_finished_row_is_left_out_and_one_that_is_not_goes_on(tmp_path: Path) -> None:
    words = ["--output", str(tmp_path / "my runs"), "--epochs", "10"]
    first, second, *_ = runs_in(shown("table7", *words))
    leave(
        first,
        Path(first.folder),
        '{"epoch": 8, "test_acc1": 80.0}',
        '{"epoch": 9, "test_acc1": 80.5}',
    )
    leave(second, Path(second.folder), '{"epoch": 8, "test_acc1": 80.0}')
    path = f"{fake_python(tmp_path / 'bin', tmp_path / 'compared')}:{PATH}"
    printed = shown("table7", *words, PATH=path)
    runs = runs_in(printed)
    assert first.name not in names(runs)
    assert names(runs)[0] == second.name
    assert runs[0].args.auto_resume
    assert f"finished, epoch 9 is in {first.folder}/log.txt; skipped" in printed
    assert f"resuming in {second.folder}" in printed


def test_a_finished_row_of_another_recipe_stops_the_table_before_it_begins(tmp_path: Path) -> None:
    words = ["--output", str(tmp_path)]
    *_, last = runs_in(shown("table7", *words))
    leave(last, Path(last.folder), '{"epoch": 299, "test_acc1": 80.5}')
    message = refusal(
        "table7",
        "--data-path",
        "/imagenet",
        "--nproc",
        "8",
        *words,
        "--lr",
        "9",
        "--accum-steps",
        "2",
    )
    differs = "--lr 0.0005 (this command has 9.0)"
    where = (
        f"table7, row 6, all on deit_small: {last.folder} holds a finished run with another recipe"
    )
    assert message == f"error: {where}: {differs}; choose another --output\n"


@pytest.mark.parametrize(
    ("changed", "processes", "expected"),
    [
        (
            {
                "num_workers": 31,
                "data_path": "x",
                "output_dir": "x",
                "device": "cpu",
                "seed": 3,
                "compile": True,
            },
            4,
            "",
        ),
        ({"batch_size": 128, "accum_steps": 2}, 4, ""),
        ({}, 2, "total batch 1024 (this command has 512)"),
        ({"epochs": 301}, 4, "--epochs 301 (this command has 300)"),
        ({"variant": "released"}, 4, "--variant released (this command has paper)"),
        ({"max_steps": 5}, 4, "--max-steps 5 (this command has none)"),
        (
            {"cool": 1, "mixup": 0.1},
            4,
            "--cool 1 (this command has no such flag), --mixup 0.1 (this command has 0.8)",
        ),
    ],
)
def test_what_differs_from_now_is_named(
    changed: dict[str, Any], processes: int, expected: str, tmp_path: Path
) -> None:
    run = all_runs("table7")["deit_small_all"]
    leave(run, tmp_path / "run", '{"epoch": 299, "test_acc1": 80.0}', **changed)
    launch = ["torchrun", f"--nproc_per_node={processes}", "a place/main.py"]
    (line,) = (line for line in whole_table("table7").splitlines() if "/deit_small_all " in line)
    words = shlex.split(line)
    command = [*launch, *words[words.index(str(ROOT / "main.py")) + 1 :]]
    (found,) = _finished.read_words(["row", str(tmp_path / "run"), str(len(command)), *command])
    assert _finished.what_differs(found) == expected


def test_other_weights_are_another_recipe(tmp_path: Path) -> None:
    own, other = (
        runs_in(shown("table9", "--row", "1", "--motivator-tiny", f"{name}.pth"))[0]
        for name in "ab"
    )
    leave(own, tmp_path / "run", '{"epoch": 299}')
    words = ["--motivator", other.args.motivator]
    (line,) = (
        line for line in whole_table("table9").splitlines() if "/deit_tiny_deit_tiny " in line
    )
    command = [*shlex.split(line), *words]
    told = _finished.what_differs(_finished.Finished("row", tmp_path / "run", command))
    weights = "deit_tiny_patch16_224"
    assert told == f"--motivator {weights}=a.pth (this command has {weights}=b.pth)"
    command[-1] = f"{weights}=elsewhere/a.pth"
    assert _finished.what_differs(_finished.Finished("row", tmp_path / "run", command)) == ""


def test_a_finished_folder_that_tells_no_recipe_is_not_skipped(tmp_path: Path) -> None:
    found = _finished.Finished("row", tmp_path, ["main.py"])
    (tmp_path / "log.txt").write_text('{"epoch": 9}')
    assert _finished.what_differs(found).startswith(
        "its recipe cannot be read: has log.txt but no args.json"
    )


@pytest.mark.parametrize(
    ("lines", "finished"),
    [
        ([], False),
        (['{"epoch": 9}'], True),
        (['{"epoch":9,"test_acc1":80.0}'], True),
        (['{"train_loss": 1.0, "epoch": 9}'], True),
        (['{"epoch": 9, "test_acc1": 80.0}', '{"epoch": 10}'], True),
        (['{"epoch": 9, "test_acc1": 80.'], False),  # cut short by a kill
        (['{"epoch": 8}'], False),
        (['{"epoch": 90}', '{"epoch": 19}'], False),
        (['{"epoch": 3, "best_epoch": 9}'], False),
        (['{"epoch": 299}'], False),
    ],
)
def test_a_run_has_its_last_epoch_or_not(lines: list[str], finished: bool, tmp_path: Path) -> None:
    assert ask('is_finished "$1" 10', tmp_path).returncode == 1
    (tmp_path / "log.txt").write_text("".join(f"{line}\n" for line in lines))
    assert ask('is_finished "$1" 10', tmp_path).returncode == (0 if finished else 1)
    for done in (9, 10):  # an epoch cut short has a line, too
        (tmp_path / "status.json").write_text(
            json.dumps({"state": "done", "epoch": done, "step": 40})
        )
        assert ask('is_finished "$1" 10', tmp_path).returncode == (
            0 if finished and done == 10 else 1
        )


@pytest.mark.parametrize(
    "words",
    [["--epochs", "10"], ["--epochs=10"], ["--epochs", "300", "--x", "a b", "--epochs", "10"]],
)
def test_the_last_epoch_follows_the_commands_epochs(words: list[str]) -> None:
    assert ask('read_epochs "$@"; echo "$epochs"', "main.py", *words, "--lr", "1").stdout == "10\n"


def fake_torchrun(folder: Path, body: str) -> dict[str, str]:
    """An environment whose torchrun notes its last run's folder in `out` and then does what `body`
    says."""
    program = folder / "bin/torchrun"
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        '#!/usr/bin/env bash\nfor word in "$@"; do\n  [[ ${before-} != --output-dir ]] || '
        "out=$word\n"
        f'  before=$word\ndone\necho "${{out##*/}}" >>"{folder}/calls"\n{body}\n'
    )
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{PATH}", "DRY_RUN": "0"}


@pytest.mark.parametrize("table", DIFFERENT)
def test_rows_run_one_after_the_other_and_once(table: str, tmp_path: Path) -> None:
    for name, run in all_runs(table).items():
        leave(run, tmp_path / "made" / name, f'{{"epoch": {run.args.epochs - 1}}}')
    environment = fake_torchrun(
        tmp_path, f'mkdir -p "$out"\ncp "{tmp_path}/made/${{out##*/}}"/* "$out"'
    )
    fake_python(tmp_path / "bin", tmp_path / "compared")
    words = ["--data-path", "/image net", "--nproc", "4", "--output", str(tmp_path / "my runs")]
    assert start(table, *words, **environment).returncode == 0
    assert (tmp_path / "calls").read_text().split() == list(all_runs(table))
    assert not (tmp_path / "compared").exists()
    again = start(table, *words, **environment)
    assert again.returncode == 0
    assert again.stdout.count("; skipped") == len(all_runs(table))
    assert (tmp_path / "calls").read_text().split() == list(all_runs(table))
    script, *told = (tmp_path / "compared").read_text().split("\0")[:-1]
    compared = list(_finished.read_words(told))  # all of them by one start
    assert script == str(FOLDER / "_finished.py")
    assert [run.folder.name for run in compared] == list(all_runs(table))
    assert {_finished.what_differs(run) for run in compared} == {""}


@pytest.mark.parametrize("table", DIFFERENT)
def test_a_run_that_fails_stops_the_table_with_its_exit_code(table: str, tmp_path: Path) -> None:
    environment = fake_torchrun(tmp_path, "exit 3")
    done = start(
        table,
        "--data-path",
        "/imagenet",
        "--nproc",
        "4",
        "--output",
        str(tmp_path / "runs"),
        **environment,
    )
    assert done.returncode == 3
    assert (tmp_path / "calls").read_text().split() == list(all_runs(table))[:1]
    assert "stopped with exit code 3, see above; the same command resumes from here" in done.stderr


def test_a_run_that_is_stopped_politely_stops_the_table_too(tmp_path: Path) -> None:
    environment = fake_torchrun(
        tmp_path, 'mkdir -p "$out"\necho \'{"state": "preempted"}\' >"$out/status.json"'
    )
    done = start(
        "table7",
        "--data-path",
        "/imagenet",
        "--nproc",
        "4",
        "--output",
        str(tmp_path / "runs"),
        **environment,
    )
    assert done.returncode == 1
    assert (tmp_path / "calls").read_text().split() == list(all_runs("table7"))[:1]
    assert "stopped by a signal before its end; the same command resumes from here" in done.stderr
    assert names(runs_in(shown("table7", "--output", str(tmp_path / "runs")))) == list(
        all_runs("table7")
    )


# ---------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("script", [*SCRIPTS, *SHARED], ids=lambda path: path.stem)
def test_scripts_are_bash_without_mistakes_and_explain_themselves(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    for new in (
        ";;&",
        "declare -A",
        "local -A",
        "mapfile",
        "readarray",
        ",,}",
        "^^}",
    ):  # bash 3.2 of macOS
        assert new not in text
    assert max(map(len, text.splitlines())) <= 120
    assert len(text.splitlines()) <= 350
    if script in SCRIPTS:
        asked = start(script.stem, "--help", DRY_RUN="0")
        assert asked.returncode == 0
        assert f"bash scripts/tables/{script.name} --list" in asked.stdout
        assert "set -euo" not in asked.stdout
