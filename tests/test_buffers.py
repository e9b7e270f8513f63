"""Running statistics of batch norm: one update for each pass of a step, none for a skipped step,
and the same on all ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import engine
import utils
from run.folder import candidates
from tests.image_folders import make_image_folder
from tests.launches import run_ranks
from tests.runs import (
    differences,
    digest,
    observing_steps,
    read_log,
    run_main,
    run_small,
    split,
    spoil_loss,
    state_of,
    tensors_in,
)
from tests.test_engine import CountReads
from training.buffers import Buffers

CPU = utils.Processes(0, 1, torch.device("cpu"))
# Its motivating pass reads the running statistics.
RESNET = (
    "--model test_resnet --input-size 64 --batch-size 4 --lr 0.1 --model-ema-decay 0.5 --data-path"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(
        tmp_path_factory.mktemp("photos"), ("ant", "bee", "cat"), per_class=8, size=(20, 20)
    )


def statistics_of(module: nn.Module) -> dict[str, Tensor]:
    return tensors_in(dict(module.named_buffers()))


def test_values_return_to_the_bit() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).train()
    model.register_buffer("constant", torch.ones(2), persistent=False)
    model.register_buffer("table", torch.randn(2, 3, dtype=torch.float64))
    buffers, before = Buffers(model, CPU), statistics_of(model)
    assert [sum(one.numel() for one in group) for group in buffers.groups] == [10, 6, 2]
    values = buffers.read()
    model(torch.randn(4, 3, 5, 5))
    assert len(differences(statistics_of(model), before)) == 6
    with CountReads() as counter:
        buffers.write(values)
        buffers.begin_step()
        buffers.end_step(torch.ones(()))
    assert not counter.reads
    assert differences(statistics_of(model), before) == []


def test_a_model_without_buffers_costs_nothing() -> None:
    buffers = Buffers(nn.Linear(2, 3), CPU)
    with patch.object(utils.Processes, "broadcast", side_effect=AssertionError("a message")):
        buffers.begin_step()
        buffers.end_step(torch.ones(()))
    assert buffers.read() == []


@pytest.mark.parametrize("accum", [1, 2])
def test_a_pass_counts_once_if_activations_are_computed_again(accum: int, photos: Path) -> None:
    words = split(f"--max-steps 2 --accum-steps {accum}", RESNET, photos)
    plain = run_small(*words).training
    saving = run_small(*words, "--grad-checkpointing").training
    counts = {int(value) for name, value in saving.module.named_buffers() if "num_batches" in name}
    assert counts == {2 * accum}
    assert differences(state_of(plain), state_of(saving)) == []
    with patch.object(Buffers, "write"):  # the control: the backward pass leaves its traces
        traced = run_small(*words, "--grad-checkpointing").training
    assert any("num_batches" in name for name in differences(state_of(plain), state_of(traced)))


def test_a_skipped_step_changes_no_running_statistics(photos: Path) -> None:
    noted: list[dict[str, Tensor]] = []

    def see(training: engine.Training, step: int) -> None:
        noted.append(
            tensors_in([statistics_of(training.module), statistics_of(training.ema.module)])
        )
        if step == 0:
            spoil_loss(training)

    with observing_steps(see):
        assert run_small(RESNET, photos, "--max-steps 3").code == 0
    assert differences(noted[0], noted[1]) == []
    assert differences(noted[1], noted[2]) == []


# ----------------------------------------------------------------------------------- several ranks


@contextmanager
def noting(folder: Path, is_shared: bool, rank: int) -> Iterator[None]:
    """Every rank writes down its running statistics, and those of its average, after each step.

    Args:
        is_shared: false omits the message of rank 0, as a control.
    """
    noted: list[Any] = []

    def see(training: engine.Training, step: int) -> None:
        models = training.module, training.ema.module
        noted.append([digest(statistics_of(model)) for model in models])
        (folder / f"statistics{rank}").write_text(json.dumps(noted))

    keeps = patch.object(utils.Processes, "broadcast", lambda processes, values: values)
    with observing_steps(see):
        if is_shared:
            yield
            return
        with keeps:
            yield


@pytest.mark.slow
@pytest.mark.parametrize("is_shared", [True, False])
def test_p1_ranks_share_running_statistics(is_shared: bool, photos: Path, tmp_path: Path) -> None:
    """The figures in the log are those of the checkpoint, and resuming from the middle changes
    nothing."""
    words = split("--mix-protocol single --epochs 2", RESNET, photos, "--output-dir")
    meddle = partial(noting, tmp_path, is_shared)
    run_ranks(2, tmp_path, *words, tmp_path / "whole", meddle=meddle)
    noted = [json.loads((tmp_path / f"statistics{rank}").read_text()) for rank in range(2)]
    assert (noted[0] == noted[1]) == is_shared
    assert len({statistics for statistics, _ in noted[0]}) == 6
    middle = candidates(tmp_path / "whole")[1]  # after step 3
    run_ranks(2, tmp_path, *words, tmp_path / "rest", "--resume", middle, meddle=meddle)
    states = [
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        for name in ("whole", "rest")
    ]
    parts = [
        tensors_in([state[name] for name in ("model", "ema", "optimizer")]) for state in states
    ]
    assert (differences(*parts) == []) == is_shared
    if is_shared:
        logged = read_log(tmp_path / "whole")[-1]
        again = run_main(
            "--eval --device cpu --num-workers 0 --resume", tmp_path / "whole" / "checkpoint.pth"
        )
        for name in ("test", "test_ema"):
            assert f"loss {logged[f'{name}_loss']:.4f}" in again.out
