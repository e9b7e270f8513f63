"""`--finetune`: weights of another run, of timm and of DeiT, made to fit, with every change
said."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import timm
import torch

from config.second_networks import describe_files
from storage.checkpoints import load_checkpoint
from tests.image_folders import make_image_folder
from tests.runs import run_main, run_small, split, weights_of

FROZEN = "--lr 1e-30 --unscale-lr --weight-decay 0"  # the weights stay what they were loaded as


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(
        tmp_path_factory.mktemp("photos"), ("ant", "bee", "cat"), per_class=3, size=(20, 20)
    )


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes."""
    return make_image_folder(
        tmp_path_factory.mktemp("others"), ("a", "b", "c", "d"), per_class=3, size=(20, 20)
    )


@pytest.fixture(scope="module")
def pretrained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    assert (
        run_small("--lr 0.1 --variant released --data-path", photos, "--output-dir", folder).code
        == 0
    )
    return folder / "checkpoint.pth"


def saved_weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def test_the_same_model_takes_all_weights(photos: Path, pretrained: Path) -> None:
    run = run_small(FROZEN, "--variant released --data-path", photos, "--finetune", pretrained)
    said = (
        f"weights from {pretrained}\n  the file has several sets of weights: model is used, not ema"
    )
    assert said in run.out
    weights = weights_of(run.training)
    for name, value in saved_weights(pretrained).items():
        name = name if name.startswith("token_head") else f"network.{name}"
        assert torch.allclose(weights[f"/{name}"], value, atol=1e-7), name
    assert all(
        state["step"] == 1 for state in run.training.optimizer.state_dict()["state"].values()
    )  # anew


def test_the_average_starts_from_the_loaded_weights(photos: Path, pretrained: Path) -> None:
    training = run_small(FROZEN, "--data-path", photos, "--finetune", pretrained).training
    average = training.ema.module.network.head.weight
    assert torch.allclose(average, saved_weights(pretrained)["head.weight"], atol=1e-6)


def test_another_input_size_resizes_the_positions(
    photos: Path, pretrained: Path, tmp_path: Path
) -> None:
    """Square to not square, and from there, whose grid no longer shows in the number of tokens, on
    to another shape."""
    first = run_small(
        FROZEN,
        "--variant released --input-size 16 24 --data-path",
        photos,
        "--finetune",
        pretrained,
        "--output-dir",
        tmp_path,
    )
    assert first.code == 0, first.err
    assert "pos_embed resized from (1, 17, 64) to (1, 25, 64)" in first.out
    second = run_small(
        FROZEN, "--input-size 24 16 --data-path", photos, "--finetune", tmp_path / "checkpoint.pth"
    )
    assert second.code == 0, second.err
    assert "pos_embed resized from (1, 25, 64) to (1, 25, 64)" in second.out
    assert "token_head.weight dropped" in second.out
    grids = [
        run.training.module.network.get_parameter("pos_embed")[:, 1:] for run in (first, second)
    ]
    assert not torch.equal(grids[0], grids[1])
    upright = grids[0].reshape(4, 6, 64).mean(dim=(0, 1))
    assert torch.allclose(upright, grids[1].mean(dim=(0, 1)), atol=0.05)


def test_another_number_of_classes_starts_the_head_anew(others: Path, pretrained: Path) -> None:
    run = run_small(FROZEN, "--variant released --data-path", others, "--finetune", pretrained)
    assert run.code == 0, run.err
    for head in ("head", "token_head"):
        assert (
            f"{head}.weight has shape (3, 64) in the file: starts anew with shape (4, 64)"
            in run.out
        )
        assert f"{head}.bias has shape (3,) in the file" in run.out
    kept = weights_of(run.training)["/network.blocks.0.mlp.fc1.weight"]
    assert torch.allclose(kept, saved_weights(pretrained)["blocks.0.mlp.fc1.weight"], atol=1e-7)


@pytest.mark.parametrize("kind", ["plain", "deit", "ddp"])
def test_foreign_files_load(photos: Path, tmp_path: Path, kind: str) -> None:
    """timm's bare state dict, DeiT's file with the parsed flags in it, and one saved from
    DistributedDataParallel."""
    torch.manual_seed(11)
    weights = timm.create_model("vit_nano_patch4_32", num_classes=3, img_size=16).state_dict()
    file = {
        "plain": weights,
        "deit": {
            "model": weights,
            "epoch": 3,
            "args": argparse.Namespace(model="deit", lr=1e-3),
            "max_accuracy": 81.8,
        },
        "ddp": {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
    }[kind]
    torch.save(file, tmp_path / "weights.pth")
    run = run_small(FROZEN, "--data-path", photos, "--finetune", tmp_path / "weights.pth")
    assert run.code == 0, run.err
    for name, value in weights.items():
        assert torch.allclose(weights_of(run.training)[f"/network.{name}"], value, atol=1e-7), name
    assert "starts anew" not in run.out


def test_a_missing_second_head_starts_anew(photos: Path, tmp_path: Path) -> None:
    torch.save(
        timm.create_model("vit_nano_patch4_32", num_classes=3, img_size=16).state_dict(),
        tmp_path / "plain.pth",
    )
    run = run_small("--variant released --data-path", photos, "--finetune", tmp_path / "plain.pth")
    assert run.code == 0, run.err
    assert "token_head.weight is missing in the file: starts anew" in run.out


@pytest.mark.parametrize("model", ["vit_mini_patch4_32", "deit_runs_distilled_patch4_16"])
def test_another_architecture_is_refused(photos: Path, pretrained: Path, model: str) -> None:
    run = run_small(f"--model {model} --data-path", photos, "--finetune", pretrained)
    assert run.code == 2
    assert str(pretrained) in run.err
    assert "does not fit the model" in run.err
    assert "blocks." in run.err


def test_going_on_with_a_fine_tune_leaves_its_start_alone(
    photos: Path, pretrained: Path, tmp_path: Path
) -> None:
    """--auto-resume --finetune, as a job script repeats it: the weights are taken the first time
    only."""
    words = split(
        "--auto-resume --data-path", photos, "--finetune", pretrained, "--output-dir", tmp_path
    )
    assert "weights from" in run_small(*words).out
    second = run_small(*words, "--epochs 2 --accept-changes epochs")
    assert second.code == 0, second.err
    assert "resumed from" in second.out
    assert "weights from" not in second.out


def test_a_fine_tune_is_evaluated_without_its_start(
    photos: Path, pretrained: Path, tmp_path: Path
) -> None:
    words = split("--data-path", photos, "--finetune", pretrained, "--output-dir", tmp_path)
    assert run_small(*words).code == 0
    evaluated = run_main("--eval --resume", tmp_path / "checkpoint.pth")
    assert evaluated.code == 0, evaluated.err


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ("model model_ema", "model is used, not model_ema"),  # DeiT's
        ("state_dict_ema state_dict", "state_dict is used, not state_dict_ema"),  # timm's
        ("state_dict", ""),
        ("", ""),  # a plain state dict
    ],
)
def test_the_choice_among_several_sets_is_said(
    keys: str, note: str, photos: Path, tmp_path: Path
) -> None:
    """By --eval, and for the files of second networks."""
    weights = timm.create_model("vit_nano_patch4_32", num_classes=3, img_size=16).state_dict()
    torch.save(dict.fromkeys(keys.split(), weights) or weights, file := tmp_path / "two.pth")
    evaluated = run_small("--eval --data-path", photos, "--resume", file)
    assert evaluated.code == 0, evaluated.err
    flags = {
        "motivator": f"vit_nano_patch4_32={file}",
        "attentive_teacher": None,
        "teacher_path": str(file),
    }
    said = [*evaluated.out.splitlines(), *describe_files(flags, load_checkpoint)]
    found = [line for line in said if line.endswith(f"several sets of weights: {note}")]
    assert len(found) == (3 if note else 0)
    assert ("several sets" in "".join(said)) == bool(note)


def test_a_run_says_which_weights_guide_it(photos: Path, pretrained: Path) -> None:
    run = run_small("--max-steps 1 --data-path", photos, "--motivator", pretrained)
    assert f"weights from --motivator {pretrained}: the file has several" in run.out, run.err
