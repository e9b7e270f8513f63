"""Flags two by two: a pair is trained, with a gradient for every parameter in each step, or refused
before the first step with a message that names both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
from torch import Tensor

import engine
from tests.image_folders import make_image_folder
from tests.runs import run_small, weights_of

# Those that change which parts of the model, of the batch or of the loss a step uses.
FLAGS = (
    "--variant released",
    "--fine-weight 0",
    "--relabel transmix",
    "--con-weight 0",
    "--mix-protocol split",
    "--mixup-prob 0",
    "--target-region corr",
    "--bce-loss --smoothing 0",
    "--distillation-type soft --teacher-model test_resnet --teacher-path TEACHER",
    "--no-train-mode",
    "--batch-size 1",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(3)
    teacher = timm.create_model("test_resnet", num_classes=2)
    torch.save({"model": teacher.state_dict()}, folder / "teacher.pth")
    photos = make_image_folder(folder / "photos", ("ant", "bee"), per_class=4, size=(20, 20))
    return {"PHOTOS": photos, "TEACHER": folder / "teacher.pth"}


@contextmanager
def noting_idle_parameters() -> Iterator[list[list[str]]]:
    """For each step, the parameters that got no gradient."""
    steps: list[list[str]] = []
    real = engine.update_weights

    def look(training: engine.Training) -> Tensor:
        named = training.module.named_parameters()
        steps.append([name for name, parameter in named if parameter.grad is None])
        return real(training)

    with patch.object(engine, "update_weights", look):
        yield steps


@pytest.mark.parametrize("first", FLAGS[:-1])
def test_a_pair_is_trained_or_refused(first: str, files: dict[str, Path]) -> None:
    for second in FLAGS[FLAGS.index(first) + 1 :]:
        words = [files.get(word, word) for word in f"{first} {second}".split()]
        base = "--model deit_runs_distilled_patch4_16 --batch-size 4 --max-steps 2 --data-path"
        with noting_idle_parameters() as steps:
            run = run_small(base, files["PHOTOS"], *words)
        if run.code == 2:
            names = [flags.split()[0] for flags in (first, second)]
            missing = [name for name in names if name not in run.err]
            assert (steps, missing) == ([], []), run.err
            continue
        assert steps == [[], []], (first, second)  # with a gradient missing, DDP would end the run
        assert float(run.training.nonfinite.skipped) == 0
        assert all(bool(value.isfinite().all()) for value in weights_of(run.training).values())
