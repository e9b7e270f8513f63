"""The flags: DeiT's published recipe by default, and what was written apart from what was not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config.checks import check_args
from config.flags import get_args_parser
from config.parser import GONE, explicit_flags

ROOT = Path(__file__).resolve().parent.parent
# Touvron et al., arXiv 2012.12877, Table 9, and the defaults of the code published with it.
DEIT = {
    "batch_size": 64,
    "epochs": 300,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "opt_betas": None,
    "momentum": 0.9,
    "lr": 5e-4,
    "sched": "cosine",
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "weight_decay": 0.05,
    "clip_grad": None,
    "decay_epochs": 30,
    "decay_rate": 0.1,
    "drop": 0.0,
    "drop_path": 0.1,
    "model_ema": True,
    "model_ema_decay": 0.99996,
    "model_ema_force_cpu": False,
    "color_jitter": 0.3,
    "aa": "rand-m9-mstd0.5-inc1",
    "train_interpolation": "bicubic",
    "repeated_aug": True,
    "repeats": 3,
    "smoothing": 0.1,
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "cutmix_minmax": None,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_mode": "batch",
    "bce_loss": False,
    "unscale_lr": False,
    "distillation_type": "none",
    "distillation_alpha": 0.5,
    "distillation_tau": 1.0,
    "teacher_model": "regnety_160",
    "teacher_path": "",
    "model": "deit_base_patch16_224",
    "finetune": "",
    "resume": "",
    "eval": False,
    "start_epoch": 0,
    "seed": 0,
    "output_dir": "",
    "pin_mem": True,
    "train_mode": True,
    "inat_category": "name",
}
SMMIX: dict[str, Any] = {
    "config": [],
    "mixer": "smmix",
    "mix_protocol": "switch",
    "mix_alpha": None,
    "mix_off_epoch": None,
    "resize_scope": (0.1, 0.8),
    "resize_placement": "inside",
    "fmix_decay": 3.0,
    "attentive_teacher": None,
    "attentive_cells": None,
    "relabel": "none",
    "relabel_ratio": 0.5,
    "variant": "paper",
    "side_ratio": (0.25, 0.75),
    "region_head": None,
    "consistency": None,
    "region_size": None,
    "accum_steps": 1,
    "total_batch": None,
    "compile": False,
    "auto_resume": False,
    "save_steps": 0,
    "save_minutes": 0,
    "keep_checkpoints": 2,
    "accept_changes": None,
    "max_bad_steps": 20,
    "sched_on_updates": False,
    "scale_schedule": False,
    "decay_milestones": (30, 60),
    "grad_checkpointing": False,
    "guide_size": None,
    "guide_amp": None,
    "score_block": None,
    "fine_weight": 1.0,
    "con_weight": None,
    "fine_temperature": 1.0,
    "con_temperature": 1.0,
    "con_warmup_epochs": 0,
    "layer_decay": None,
    "src": False,
    "score": "attention",
    "source_region": "max",
    "target_region": "min",
    "motivator": "self",
    "subset": None,
    "val_subset": None,
    "max_steps": None,
    "resize": "pillow",
    "randaugment": "cpu",
    "repeat_layout": "blocks",
    "skip_corrupt": False,
    "data_timeout": 600,
    "channels_last": False,
    "attn_fp32": False,
    "list_models": False,
    "eval_every": 1,
}
# Decided by the machine, the data or the model, see `config.resolve.resolve`.
OPEN = {
    "decoder",
    "device",
    "amp",
    "num_workers",
    "data_set",
    "data_path",
    "nb_classes",
    "input_size",
    "eval_crop_ratio",
    "patch_size",
    "log_every",
    "lr_noise",
    "lr_noise_pct",
    "lr_noise_std",
}


def test_defaults_are_the_published_recipe() -> None:
    args = vars(get_args_parser().parse_args([]))
    known = {**DEIT, **SMMIX}
    assert {name: args[name] for name in known} == known
    assert args.keys() == known.keys() | OPEN  # a new flag belongs in one of the three lists


def test_defaults_are_accepted() -> None:
    check_args(get_args_parser().parse_args([]))


@pytest.mark.parametrize(
    "line",
    [
        "--batch-size 7 --no-repeated-aug --output-dir a_b",
        "--batch_size 7 --no_repeated_aug --output_dir a_b",
        "--batch_size=7 --no-repeated_aug --output_dir=a_b",
    ],
)
def test_hyphens_and_underscores_are_alike(line: str) -> None:
    args = get_args_parser().parse_args(line.split())
    assert (args.batch_size, args.repeated_aug, args.output_dir) == (7, False, "a_b")


@pytest.mark.parametrize("flag", ["--batch", "--distillation", "--mix", "--no-repeated", "--out"])
def test_abbreviations_are_not_guessed(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        get_args_parser().parse_args([flag, "1"])
    assert leaving.value.code == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize("flag", GONE)
def test_flags_that_are_gone_say_what_to_do(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([flag], [f"{flag.replace('-', '_').replace('__', '--', 1)}=3"]):
        with pytest.raises(SystemExit) as leaving:
            get_args_parser().parse_args(words)
        assert leaving.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {flag}: {GONE[flag]}")
        assert "Traceback" not in said


def test_a_wrong_flag_is_said_by_one_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--nope"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("", {}),
        ("--lr 5e-4", {"lr": 5e-4}),  # also when it is the default
        ("--no_model_ema --model-ema", {"model_ema": True}),
        ("--no-model-ema", {"model_ema": False}),
        ("--compile --input_size 16 24", {"compile": True, "input_size": [16, 24]}),
        ("--side-ratio 0.1 0.5 --dr 0.5", {"side_ratio": [0.1, 0.5], "decay_rate": 0.5}),
    ],
)
def test_explicit_flags_are_those_that_were_written(line: str, written: dict[str, Any]) -> None:
    assert explicit_flags(get_args_parser(), line.split()) == written


WITHOUT_TORCH = """
import sys
from config.checks import check_args
from config.flags import get_args_parser
from config.resolve import resolve
from errors import run_command
import tools.report.__main__, tools.tables.__main__

def main():
    args = get_args_parser().parse_args(["--config", sys.argv[1], "--input-size", "224"])
    check_args(args)
    resolve(args, 8, "cuda")

assert run_command(main) == 0
print(*sorted({"torch", "timm", "numpy"} & set(sys.modules)))
"""


def test_a_command_parses_checks_and_resolves_flags_without_torch(tmp_path: Path) -> None:
    (file := tmp_path / "flags.yaml").write_text("mixer: fmix\ntotal-batch: 1024\n")
    command = [sys.executable, "-c", WITHOUT_TORCH, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, [""]), done.stderr


def test_every_flag_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        get_args_parser().parse_args(["--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in [*DEIT, *SMMIX, *OPEN])
