"""Several ranks: another number of them, one that fails or dies, values that are not finite, DDP's
first step."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import engine
import utils
from errors import InputError
from run import log
from run import state as run_state
from run.folder import candidates
from storage import checkpoints, files
from tests.image_folders import damage, make_image_folder
from tests.launches import Launch, Meddle, Ranks, read_status, run_ranks
from tests.runs import (
    SMALL,
    changed,
    digest,
    fingerprint,
    observing_steps,
    run_small,
    split,
    spoil_loss,
    state_of,
)

# seconds until a rank whose peer is gone has ended; on one machine its connection tells it at once
ENDS_WITHIN = 30.0


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(
        tmp_path_factory.mktemp("photos"), ("ant", "bee", "cat"), per_class=8, size=(20, 20)
    )


# -------------------------------------------------------------------------- another number of ranks

# Three steps of eight images per epoch. Nothing is drawn per rank: no mixing, no drop path, no
# noise where images are erased.
PLAIN = (
    "--mixer none --drop-path 0 --remode const --aa rand-m9-mstd0.5-inc1 --repeated-aug "
    "--batch-size 4 --epochs 2 "
    "--warmup-epochs 0 --lr 0.1 --sched-on-updates --model-ema-decay 0.9 --save-steps 1 "
    "--auto-resume"
)


@contextmanager
def noting(folder: Path, last_step: int | None, rank: int) -> Iterator[None]:
    """Each rank writes down the images it sees, as they are, and the rate; all are asked to stop in
    `last_step`."""
    real = engine.train_step

    def note(training: engine.Training, micro_batches: Any, step: int, meters: Any) -> None:
        seen = [
            [
                int(batch[2][row]),
                digest([part[row] for part in batch]),
            ]  # the index, and all that the loader gives
            for batch in micro_batches
            for row in range(len(batch[2]))
        ]
        rate = float(training.optimizer.param_groups[0]["lr"]).hex()
        with open(folder / f"noted{rank}", "a", encoding="utf-8") as file:
            file.write(json.dumps([step, rate, seen]) + "\n")
        if step == last_step:
            os.kill(os.getpid(), signal.SIGTERM)
        real(training, micro_batches, step, meters)

    with patch.object(engine, "train_step", note):
        yield


def noted_in(folder: Path) -> tuple[dict[int, list[Any]], dict[int, set[str]]]:
    """By step: the images of all ranks, and the rates."""
    images: dict[int, list[Any]] = {}
    rates: dict[int, set[str]] = {}
    for path in folder.glob("noted*"):
        for step, rate, seen in map(json.loads, path.read_text().splitlines()):
            images[step] = sorted([*images.get(step, []), *seen])
            rates.setdefault(step, set()).add(rate)
    return images, rates


def weights_in(folder: Path) -> dict[str, Tensor]:
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    return {
        f"{part} {name}": value
        for part in ("model", "ema")
        for name, value in checkpoint[part].items()
    }


@pytest.mark.slow
def test_p10_another_number_of_ranks_takes_the_same_steps(photos: Path, tmp_path: Path) -> None:
    """Two ranks, then from within the first epoch one, from within the second four."""
    words = split(PLAIN, "--data-path", photos, "--output-dir")
    run_ranks(2, tmp_path, *words, tmp_path / "whole", meddle=partial(noting, tmp_path, None))
    wanted_images, wanted_rates = noted_in(tmp_path)
    assert sorted(wanted_images) == list(range(6))
    folder = tmp_path / "parts"
    folder.mkdir()
    for size, last in ((2, 0), (1, 3), (4, None)):  # with several ranks one step more is done
        run_ranks(size, folder, *words, folder, meddle=partial(noting, folder, last))
    assert read_status(folder)["state"] == "done"
    images, rates = noted_in(folder)
    assert images == wanted_images
    assert rates == wanted_rates
    assert all(len(values) == 1 for values in rates.values())
    left, right = weights_in(tmp_path / "whole"), weights_in(folder)
    for part in (
        "model",
        "ema",
    ):  # all together: Adam makes much of a gradient that is 0 but for rounding
        one, other = (
            torch.cat([value.flatten() for name, value in weights.items() if name.startswith(part)])
            for weights in (left, right)
        )
        assert (one - other).norm() / one.norm() < 1e-5


@pytest.mark.slow
def test_p10_the_total_batch_stays(photos: Path, tmp_path: Path) -> None:
    words = split(PLAIN, "--data-path", photos, "--output-dir", tmp_path)
    run_ranks(2, tmp_path, *words, meddle=partial(noting, tmp_path, 0))
    assert read_status(tmp_path)["step"] == 2
    refused = run_small(*words, "--batch-size 5")
    assert refused.code == 2
    assert "the run was started with a total batch of 8" in refused.err
    ranks = Ranks(3, tmp_path, SMALL, *words)
    assert ranks.wait() == [2, 2, 2]
    assert "3 processes cannot share" in ranks.said(0)
    for _ in range(2):  # and again with the same command, which still says --batch-size 4
        with noting(tmp_path, 3, 0):
            stopped = run_small(*words)
        assert stopped.code == 0, stopped.err
        assert (
            "1 processes instead of 2: --accum_steps is now 2" in stopped.out
            or "resumed" in stopped.out
        )
    whole = run_small(*words, "--batch-size 8")
    assert whole.code == 0, whole.err
    assert "8 per process x 1 processes x 1 accumulated = 8" in whole.out
    other = run_small(*words, "--total-batch 16")
    assert other.code == 2
    assert "--total-batch 16: the run was started with a total batch of 8" in other.err
    same = run_small(*words, "--total-batch 8 --batch-size 3")
    assert same.code == 0, same.err
    assert "2 per process x 1 processes x 4 accumulated = 8" in same.out
    more = run_small(*words, "--total-batch 12 --batch-size 6 --accept-changes total-batch")
    assert more.code == 0, more.err
    assert "6 per process x 1 processes x 2 accumulated = 12" in more.out


# ------------------------------------------------------------------------------ the control for DDP


@contextmanager
def cold(rank: int) -> Iterator[None]:
    """Without the pass that lets DDP order its buckets before the first step."""
    with patch.object(engine, "warm_up", lambda *args: None):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("meddle", [None, cold])
def test_p1_three_ranks_go_on_exactly_if_ddp_is_warmed_up(
    meddle: Meddle | None, photos: Path, tmp_path: Path
) -> None:
    words = split(
        "--batch-size 2 --epochs 2 --lr 0.1 --save-steps 2 --auto-resume --data-path",
        photos,
        "--output-dir",
    )
    first = "--epochs 1 --accept-changes epochs"
    run_ranks(3, tmp_path, *words, tmp_path / "whole", meddle=meddle)
    run_ranks(3, tmp_path, *words, tmp_path / "parts", first, meddle=meddle)
    run_ranks(3, tmp_path, *words, tmp_path / "parts", "--accept-changes epochs", meddle=meddle)
    found = changed(fingerprint(tmp_path / "whole"), fingerprint(tmp_path / "parts"))
    assert ("checkpoint.pth model" in found) == (meddle is cold)


# -------------------------------------------------------------------------------- not finite values


@contextmanager
def spoiled_on_one_rank(folder: Path, first: int, last: int, rank: int) -> Iterator[None]:
    """Rank 1's loss is not a number in these steps. Every rank writes down its state after each
    step."""
    good: list[Any] = []
    noted: list[str] = []

    def see(training: engine.Training, step: int) -> None:
        parts = ("/model", "/ema", "/optimizer/state")
        state = {
            name: value for name, value in state_of(training).items() if name.startswith(parts)
        }
        noted.append(digest(state))
        (folder / f"states{rank}").write_text(json.dumps(noted))
        if rank == 1 and step + 1 == first:
            good.append(training.criterion)
            spoil_loss(training)
        if rank == 1 and step == last:
            training.criterion = good.pop()

    with observing_steps(see):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_p12_a_loss_on_one_rank_changes_nothing_on_any(
    amp: str, photos: Path, tmp_path: Path
) -> None:
    words = split(
        f"--amp {amp} --batch-size 2 --lr 0.1 --model-ema-decay 0.5 --log-every 1 --data-path",
        photos,
    )
    meddle = partial(spoiled_on_one_rank, tmp_path, 3, 3)
    run_ranks(2, tmp_path, *words, "--output-dir", tmp_path / "run", meddle=meddle)
    states = [json.loads((tmp_path / f"states{rank}").read_text()) for rank in range(2)]
    assert states[0] == states[1]
    same = [step for step in range(1, 6) if states[0][step] == states[0][step - 1]]
    assert same == [3]
    said = (tmp_path / "run" / "train.log").read_text()
    assert "rank 1: step 3, total nan" in said
    assert candidates(tmp_path / "run")


@pytest.mark.slow
def test_p12_twenty_in_a_row_stop_all_ranks(photos: Path, tmp_path: Path) -> None:
    words = split(
        "--batch-size 1 --epochs 3 --lr 0.1 --log-every 1 --save-minutes 1e-9 --data-path", photos
    )
    meddle = partial(spoiled_on_one_rank, tmp_path, 6, 99)
    ranks = Ranks(2, tmp_path, SMALL, *words, "--output-dir", tmp_path / "run", meddle=meddle)
    assert ranks.wait() == [3, 3]
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert "20 steps in a row were not finite" in status["error"]
    assert "rank 1: step 6, total nan" in ranks.said(0)
    assert "Try, in this order" in ranks.said(0)
    assert not (tmp_path / "run" / "not_finite_rank0.pth").exists()
    evidence = torch.load(tmp_path / "run" / "not_finite_rank1.pth", weights_only=True)
    assert "step 25" in evidence["report"]
    states = json.loads((tmp_path / "states0").read_text())
    assert len(states) == 26
    assert len(set(states[5:])) == 1
    newest = candidates(tmp_path / "run")[0]  # written while it lasted, and good all the same
    assert (int(newest.stem), run_state.find(str(tmp_path / "run"), "", True)) == (
        25,
        (str(newest), []),
    )


# --------------------------------------------------------------------------------- one that is gone


@contextmanager
def lost(how: str, rank: int) -> Iterator[None]:
    def see(training: engine.Training, step: int) -> None:
        if rank == 1 and step == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("a bug")

    with observing_steps(see):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("killed", -signal.SIGKILL), ("failing", 1)])
def test_p13_a_rank_without_its_peer_ends_soon(
    how: str, code: int, photos: Path, tmp_path: Path
) -> None:
    words = split(
        "--batch-size 2 --num-workers 1 --save-steps 1 --data-path",
        photos,
        "--output-dir",
        tmp_path / "run",
    )
    ranks = Ranks(2, tmp_path, SMALL, *words, meddle=partial(lost, how))
    ranks.processes[1].join(60)
    begun = time.monotonic()
    assert ranks.wait(ENDS_WITHIN) == [1, code]
    assert time.monotonic() - begun < ENDS_WITHIN
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert (status["error"] == "rank 1: a bug") == (how == "failing")  # not what rank 0 saw of it
    assert status["step"] == 2
    assert ("ArithmeticError: a bug" in ranks.said(1)) == (how == "failing")
    assert "gloo" in ranks.said(0).lower()
    assert int(candidates(tmp_path / "run")[0].stem) == 2


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="processes are looked up in /proc"
)
def test_p13_p14_two_runs_at_once_and_the_first_cause_is_last_on_the_screen(
    photos: Path, tmp_path: Path
) -> None:
    """One meets an image that cannot be read, on one rank; the other neither collides with it nor
    hears of it."""
    bad = make_image_folder(tmp_path / "bad", ("ant", "bee", "cat"), per_class=8, size=(20, 20))
    broken = damage(bad / "train" / "cat" / "5.jpg")
    words = split(SMALL, "--batch-size 2 --num-workers 1 --data-path")
    with (
        Launch(
            [*words, str(bad), "--output-dir", str(tmp_path / "b")],
            2,
            tmp_path / "b.log",
            forked=False,  # forked, a launch whose one rank fails hung once in five
        ) as failing,
        Launch(
            [*words, str(photos), "--output-dir", str(tmp_path / "g")], 2, tmp_path / "g.log"
        ) as good,
    ):
        assert good.wait(90) == 0, (tmp_path / "g.log").read_text()[-2000:]
        assert failing.wait(90) == 1
        assert good.wait_until_gone(5)
        assert failing.wait_until_gone(5)
    assert read_status(tmp_path / "g")["state"] == "done"
    status = read_status(tmp_path / "b")
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert str(broken) in status["error"]
    last = (tmp_path / "b.log").read_text().split("Root Cause")[-1]
    assert str(broken) in last, (tmp_path / "b.log").read_text()[-3000:]


# --------------------------------------------------------------------------------------- bad images


@contextmanager
def noting_bad(folder: Path, rank: int) -> Iterator[None]:
    real = engine.train_step

    def note(training: engine.Training, micro_batches: Any, step: int, meters: Any) -> None:
        bad = [index for batch in micro_batches for index in batch.indices[batch.replaced].tolist()]
        with open(folder / f"noted{rank}", "a", encoding="utf-8") as file:
            file.write(json.dumps([step, "", bad]) + "\n")
        real(training, micro_batches, step, meters)

    with patch.object(engine, "train_step", note):
        yield


@pytest.mark.slow
def test_p11_a_checkpoint_knows_every_bad_image_up_to_its_step(tmp_path: Path) -> None:
    """Of any rank. Ranks tell each other one step late, and a kill may come in between."""
    photos = make_image_folder(
        tmp_path / "photos", ("ant", "bee", "cat"), per_class=8, size=(20, 20)
    )
    for number in range(8):
        damage(photos / "train" / "cat" / f"{number}.jpg")
    words = split(
        "--skip-corrupt --batch-size 1 --save-steps 1 --keep-checkpoints 99 --data-path", photos
    )
    run_ranks(
        2, tmp_path, *words, "--output-dir", tmp_path / "run", meddle=partial(noting_bad, tmp_path)
    )
    bad, _ = noted_in(tmp_path)
    assert sum(map(len, bad.values())) == 8
    for path in candidates(tmp_path / "run"):
        checkpoint = torch.load(path, weights_only=True)
        known = sorted(
            index for step, met in bad.items() for index in met if step < checkpoint["step"]
        )
        assert checkpoint["bad_images"] == known


# ------------------------------------------------------------------------- one that goes no further


@contextmanager
def stuck(rank: int) -> Iterator[None]:
    """Rank 1 does not come out of its evaluation, where nothing but the watch waits for it."""
    real = engine.evaluate

    def evaluate(*args: Any) -> Any:
        time.sleep(60 * rank)
        return real(*args)

    with (
        patch.object(utils, "PEER_TIMEOUT", timedelta(seconds=4)),
        patch.object(engine, "evaluate", evaluate),
    ):
        yield


@pytest.mark.slow
def test_p13_a_rank_whose_peer_is_stuck_ends_within_the_timeout(
    photos: Path, tmp_path: Path
) -> None:
    words = split(
        "--batch-size 2 --data-timeout 1 --data-path", photos, "--output-dir", tmp_path / "run"
    )
    ranks = Ranks(2, tmp_path, SMALL, *words, meddle=stuck)
    begun = time.monotonic()
    ranks.processes[0].join(60)
    assert time.monotonic() - begun < 4 + ENDS_WITHIN
    assert ranks.processes[0].exitcode == 1
    ranks.kill(1)
    assert "Timed out" in ranks.said(0)


@contextmanager
def full_disk(rank: int) -> Iterator[None]:
    """Rank 0 finds the disk full from its second checkpoint on."""
    real, calls = files.write_atomically, []

    def write(path: Path, *rest: Any) -> None:
        calls.append(path)
        if sum(path.suffix == ".pth" for path in calls) > 1:
            raise InputError(f"cannot write {path}: disk full (or over quota)")
        real(path, *rest)

    with (
        patch.object(checkpoints, "write_atomically", write),
        patch.object(log, "write_atomically", write),
    ):
        yield


@pytest.mark.slow
def test_p4_p13_a_full_disk_ends_all_ranks_and_costs_nothing(photos: Path, tmp_path: Path) -> None:
    words = split(
        "--batch-size 2 --save-steps 2 --data-path", photos, "--output-dir", tmp_path / "run"
    )
    ranks = Ranks(2, tmp_path, SMALL, *words, meddle=full_disk)
    assert ranks.wait(60) == [2, 1]
    assert "error: cannot write" in ranks.said(0)
    assert "0000000004.pth: disk full" in ranks.said(0)
    assert run_state.find(str(tmp_path / "run"), "", True) == (
        str(candidates(tmp_path / "run")[0]),
        [],
    )
    assert int(candidates(tmp_path / "run")[0].stem) == 2
