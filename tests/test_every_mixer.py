"""Every mixer through `main.py`: on two processes; where mixing ends; and what the log says."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import main
from mixers.registry import METHODS
from tests.image_folders import make_image_folder
from tests.launches import run_ranks
from tests.runs import observing_steps, read_log, run_small, split


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(
        tmp_path_factory.mktemp("photos"), ("ant", "bee", "cat"), per_class=8, size=(40, 40)
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("teacher") / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), path)
    return f"test_resnet={path}"


def train_with_all(words: list[str]) -> None:
    """One run after the other in the same processes: output folder, teacher, flags for all."""
    output, teacher, *flags = words[words.index("--") + 1 :]
    flags = [*words[: words.index("--")], *flags]
    for mixer in METHODS:
        own = ["--attentive-teacher", teacher] if mixer == "attentivemix" else []
        main.main([*flags, "--mixer", mixer, *own, "--output-dir", f"{output}/{mixer}"])
    main.main([*flags, "--relabel", "transmix", "--output-dir", f"{output}/smmix_transmix"])


@pytest.mark.slow
def test_every_mixer_trains_on_two_processes(tmp_path: Path, photos: Path, teacher: str) -> None:
    """The same run but for the mixer: each must leave its mark."""
    flags = "--batch-size 4 --input-size 32 --patch-size 8 --mixup-switch-prob 0.5 --log-every 1"
    words = [*split(flags), "--data-path", str(photos)]
    run_ranks(2, tmp_path, "--", tmp_path, teacher, *words, command=train_with_all)
    losses = []
    for name in (*METHODS, "smmix_transmix"):
        (line,) = read_log(tmp_path / name)
        assert torch.isfinite(torch.tensor([line["train_loss"], line["test_loss"]])).all(), name
        assert (tmp_path / name / "mixing.png").exists() == (name != "none")
        losses.append(line["test_loss"])
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("mixer", [name for name in METHODS if name not in ("none", "mixup")])
def test_a_mixer_gets_the_steps_that_the_protocol_gives_it(
    photos: Path, teacher: str, mixer: str
) -> None:
    own = ["--attentive-teacher", teacher] if mixer == "attentivemix" else []
    for protocol, expected in (("single", 1), ("switch", 2)):
        words = ["--data-path", str(photos), "--mixer", mixer, "--mix-protocol", protocol, *own]
        outcome = run_small(*words, "--input-size 32 --no-model-ema --mixup-prob 0.8")
        switch = outcome.training.mixer
        named = f"{mixer} (paper)" if mixer == "smmix" else mixer
        text = named + (" at 0.5, else Mixup" if expected == 2 else "") + "; 0.8 of all batches"
        assert f"mixing              {text}" in outcome.out
        assert switch.prob == 0.8


def test_mixing_ends_at_its_epoch_and_not_before(photos: Path) -> None:
    mixed: list[tuple[int, bool]] = []

    def see(training: object, step: int) -> None:
        mixed.append((step, not training.mixer.is_off))  # type: ignore[attr-defined]

    with observing_steps(see):
        outcome = run_small(
            "--data-path", photos, "--mixer cutmix --mix-off-epoch 2 --epochs 4 --no-model-ema"
        )
    assert outcome.code == 0, outcome.err
    assert mixed == [(step, step < 6) for step in range(12)]  # 3 steps per epoch
    assert "cutmix at 0.5, else Mixup; nothing from epoch 2 on" in outcome.out
    late = run_small("--data-path", photos, "--mix-off-epoch 9 --epochs 1 --no-model-ema")
    assert "warning: --mix-off-epoch 9 has no effect: the run has --epochs 1" in late.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--mixer fmix --resize-scope 0.2 0.3",
            "--resize-scope 0.2 0.3 (for resizemix): --mixer fmix has no",
        ),
        (
            "--mixer cutmix --mix-alpha 0.2",
            "--mix-alpha 0.2 (for fmix or attentivemix or saliencymix): --mixer cutmix",
        ),
        ("--mixer fmix --mix-alpha 1 2", "--mix-alpha 1.0 2.0: takes one number above 0"),
        ("--mixer fmix --mix-alpha 0", "--mix-alpha 0.0: takes one number above 0"),
        ("--mixer attentivemix", "--mixer attentivemix needs --attentive-teacher NAME=CHECKPOINT"),
        (
            "--mixer attentivemix --attentive-teacher x --attentive-cells 0",
            "--attentive-cells 0: must be above 0",
        ),
        (
            "--mixer attentivemix --attentive-teacher x --attentive-cells 6 --mix-alpha 2",
            "give one of them",
        ),
        (
            "--attentive-teacher resnet50",
            "--attentive-teacher resnet50 (for attentivemix): --mixer smmix",
        ),
        ("--mixer mixup --relabel transmix", "--relabel transmix (for smmix or cutmix or"),
        (
            "--relabel-ratio 0.2",
            "--relabel-ratio 0.2 is for --relabel transmix or --mixer transmix only",
        ),
        ("--mixer transmix --relabel-ratio 1.2", "--relabel-ratio 1.2: must lie between 0 and 1"),
        ("--mixer transmix --cutmix 0", "--cutmix 0.0: --mixer transmix needs an alpha above 0"),
        (
            "--mixer transmix --bce-loss --smoothing 0",
            "the shares of --mixer transmix change nothing",
        ),
        (
            "--mixer resizemix --resize-scope 0.5 0.2",
            "--resize-scope 0.5 0.2: must be two shares, the lower first",
        ),
        ("--mixer fmix --fmix-decay -1", "--fmix-decay -1.0: must not be negative"),
        ("--mix-off-epoch -1", "--mix-off-epoch -1: must not be negative"),
        ("--mixer puzzlemix", "invalid choice: 'puzzlemix'"),
        (
            "--mixer cutmix --variant released",
            "--variant released (for smmix): --mixer cutmix has no use for it",
        ),
    ],
)
def test_flags_of_other_methods_are_refused(flags: str, message: str) -> None:
    outcome = run_small(flags)
    assert outcome.code == 2
    assert message in outcome.err


def test_the_classifier_of_attentivemix_is_checked_before_training(photos: Path) -> None:
    outcome = run_small(
        "--data-path", photos, "--mixer attentivemix --attentive-teacher resnet5O=x.pth"
    )
    assert outcome.code == 2
    assert "--attentive-teacher resnet5O: no such model; did you mean" in outcome.err
