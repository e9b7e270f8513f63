"""The output folder of a run: one writer, what its status says, and which checkpoints are kept."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import engine
from errors import InputError
from pipeline.samples import Batch
from run import folder as run_folder
from run.folder import RunFolder
from tests.image_folders import make_image_folder, message_of
from tests.launches import read_status, start, wait_until
from tests.runs import (
    changed,
    fingerprint,
    observing_steps,
    read_log,
    run_small,
    split,
    spoil_loss,
)

linux = pytest.mark.skipif(run_folder.fcntl is None, reason="locks are of Unix")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of eight per epoch."""
    return make_image_folder(
        tmp_path_factory.mktemp("photos"), ("ant", "bee", "cat"), per_class=8, size=(20, 20)
    )


# --------------------------------------------------------------------------------------- one writer


@linux
def test_p14_a_second_run_is_refused_and_the_first_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "WAIT_FOR_LOCK", 0.3)
    words = split("--data-path", photos, "--auto-resume --save-steps 1 --output-dir")
    assert run_small(*words, str(tmp_path / "alone")).code == 0
    folder, refused = tmp_path / "run", []

    def begin_another(training: engine.Training, step: int) -> None:
        if step == 1:
            before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            with observing_steps(lambda training, step: pytest.fail("it trains")):
                refused.append(run_small(*words, folder))
            assert {
                path: path.read_bytes() for path in folder.rglob("*") if path.is_file()
            } == before

    with observing_steps(begin_another):
        assert run_small(*words, folder).code == 0
    (second,) = refused
    assert second.code == 2
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert (
        f"--output-dir {folder}: {owner} is writing to it; stop it, or choose another folder"
        in second.err
    )
    assert changed(fingerprint(tmp_path / "alone"), fingerprint(folder)) == []


@linux
def test_p14_a_run_waits_for_one_that_is_about_to_leave(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.open()
    leaving = threading.Timer(0.5, first.close)
    leaving.start()
    begun = time.monotonic()
    second.open()
    assert time.monotonic() - begun >= 0.3
    leaving.join()
    second.close()


def hold(path: Path) -> None:
    folder = RunFolder(path)
    folder.open()
    (path / "held").touch()
    time.sleep(99)


@linux
def test_p14_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    owner = start(hold, tmp_path)
    assert wait_until(lambda: (tmp_path / "held").exists(), 60)
    try:
        with patch.object(run_folder, "WAIT_FOR_LOCK", 0.1):
            assert f"process {owner.pid} on" in message_of(InputError, RunFolder(tmp_path).open)
    finally:
        os.kill(owner.pid, signal.SIGKILL)
    owner.wait(10)
    folder = RunFolder(tmp_path)
    folder.open()
    folder.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output-dir .*/file: cannot be written: "):
        RunFolder(tmp_path / "file").open()


@linux
def test_what_stands_in_the_place_of_the_lock_is_named(tmp_path: Path) -> None:
    said = (
        rf"^cannot write {tmp_path}/\.lock: %s; (move it away, or )?choose another output folder$"
    )
    (tmp_path / ".lock").mkdir()
    with pytest.raises(InputError, match=said % "Is a directory"):
        RunFolder(tmp_path).open()
    (tmp_path / ".lock").rmdir()
    (tmp_path / ".lock").symlink_to(".lock")
    with pytest.raises(InputError, match=said % "Too many levels of symbolic links"):
        RunFolder(tmp_path).open()


@linux
def test_a_lock_holds_whatever_is_written_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "WAIT_FOR_LOCK", 0.0)
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.open()
    (tmp_path / ".lock").write_bytes(b"\xff\x00")
    with pytest.raises(InputError, match="is writing to it"):
        second.open()
    first.close()
    second.open()
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    second.close()


@linux
@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="this system has no disk that is always full"
)
def test_a_full_disk_does_not_keep_a_folder_from_being_locked(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to("/dev/full")
    folder = RunFolder(tmp_path)
    folder.open()
    folder.close()


# ------------------------------------------------------------------------------------------- status


@linux
def test_a_folder_that_is_renamed_during_a_run_ends_it_with_cause_and_status(
    photos: Path, tmp_path: Path
) -> None:
    def rename(training: engine.Training, step: int) -> None:
        if step == 1:
            (tmp_path / "run").rename(tmp_path / "other")

    with observing_steps(rename):
        ended = run_small("--data-path", photos, "--output-dir", tmp_path / "run")
    assert ended.code == 2
    assert f"there is no folder {tmp_path}/run; move it back if it was renamed" in ended.err
    assert not (tmp_path / "run").exists()
    status = read_status(tmp_path / "other")
    assert (status["state"], status["exit_code"]) == ("failed", 2)


def test_ctrl_c_before_training_ends_with_one_line_and_a_status(
    photos: Path, tmp_path: Path
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with patch("config.build.make_model", interrupt):
        ended = run_small("--data-path", photos, "--output-dir", tmp_path)
    assert (ended.code, ended.err) == (130, "error: stopped by SIGINT\n")
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"]) == ("failed", 130)
    assert status["error"] == "KeyboardInterrupt"


@contextmanager
def meeting(trouble: str) -> Iterator[None]:
    def meet(training: engine.Training, step: int) -> None:
        if trouble == "a signal":
            signal.raise_signal(signal.SIGTERM)
        if trouble == "a bug":
            raise ArithmeticError("a bug\nof two lines")
        if step == 0:
            spoil_loss(training)

    with observing_steps(meet):
        yield


@pytest.mark.parametrize(
    ("trouble", "flags", "state", "code", "error"),
    [
        ("", "", "done", 0, None),
        ("a signal", "", "preempted", 0, None),
        (
            "",
            "--model vit_mini_patch4_32 --input-size 10 --patch-size 16",
            "failed",
            2,
            "--input-size",
        ),
        ("nan", "--max-bad-steps 2 --log-every 1", "failed", 3, "2 steps in a row were not finite"),
        ("a bug", "", "failed", 1, "a bug"),
    ],
)
def test_the_status_says_how_a_run_ended(
    trouble: str, flags: str, state: str, code: int, error: str | None, photos: Path, tmp_path: Path
) -> None:
    meets: AbstractContextManager[Any] = meeting(trouble) if trouble else nullcontext()
    bug = pytest.raises(ArithmeticError) if trouble == "a bug" else nullcontext()
    with meets, bug:
        outcome = run_small("--data-path", photos, "--output-dir", tmp_path, flags)
        assert outcome.code == code, outcome.err
    status = read_status(tmp_path)
    assert status["state"] == state
    assert status["pid"] == os.getpid()
    if error is None:
        assert (status["epoch"], status["step"]) == ((1, 3) if state == "done" else (0, 1))
        assert "exit_code" not in status
    else:
        assert status["exit_code"] == code
        assert status["error"].splitlines() == [status["error"]]
        assert error in status["error"]
    assert (tmp_path / "not_finite_rank0.pth").exists() == (code == 3)


NESTED = "[" * 450 + "]" * 450
BEFORE = {
    "random bytes": b"\xff\xfe\x00",
    "too deep": b"[" * 100_000,
    "no object": b"[1]",
    "nests for numbers": f'{{"state": "running", "epoch": {NESTED}, "step": {NESTED}}}'.encode(),
    "other things for numbers": b'{"state": [], "epoch": 1e999, "step": "7"}',
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_failure_is_written_over_a_damaged_status(name: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_bytes(BEFORE[name])
    cause = {"exit_code": 2, "error": "refused"}
    RunFolder(tmp_path).fail(cause, has_begun=False, is_consequence=False)
    status = read_status(tmp_path)
    assert {name: status[name] for name in status if name not in ("time", "pid")} == {
        "state": "failed",
        **cause,
    }


@pytest.mark.parametrize(
    "word", ['{"exit_code": 3, "error": [1]}', '{"error": "x", "state": 1}', "[" * 100_000, None]
)
def test_what_another_rank_left_is_taken_only_if_it_can_be_read(
    word: str | None, tmp_path: Path
) -> None:
    if word is None:
        (tmp_path / "failed_rank1.json").mkdir()
        RunFolder(tmp_path).open()
    else:
        (tmp_path / "failed_rank1.json").write_text(word)
    cause = {"exit_code": 1, "error": "a peer is gone"}
    RunFolder(tmp_path).fail(cause, has_begun=True, is_consequence=True)
    assert cause.items() <= read_status(tmp_path).items()
    (tmp_path / "failed_rank0.json").write_text(
        '{"exit_code": 3, "error": "rank 0: x", "epoch": 5, "state": "done"}'
    )
    RunFolder(tmp_path).fail(cause, has_begun=True, is_consequence=True)
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"], status["error"]) == ("failed", 3, "rank 0: x")
    assert "epoch" not in status


def test_the_status_tells_how_far_a_run_is(photos: Path, tmp_path: Path) -> None:
    seen = []
    with observing_steps(lambda training, step: seen.append(read_status(tmp_path))):
        run_small("--save-steps 2 --data-path", photos, "--output-dir", tmp_path)
    assert [(status["state"], status["step"]) for status in seen] == [
        ("running", 0),
        ("running", 0),
        ("running", 2),
    ]


def test_the_evidence_of_values_that_are_not_finite_can_be_read(
    photos: Path, tmp_path: Path
) -> None:
    words = "--max-bad-steps 2 --log-every 1 --num-workers 1 --data-path"
    with meeting("nan"):
        outcome = run_small(words, photos, "--output-dir", tmp_path)
    assert outcome.code == 3
    evidence = torch.load(tmp_path / "not_finite_rank0.pth", weights_only=True)
    assert set(evidence) == {*Batch._fields, "mixed_images", "mixed_labels", "report"}
    assert evidence["images"].shape == evidence["mixed_images"].shape == (8, 3, 16, 16)
    assert evidence["images"].dtype == torch.uint8  # as the loader gave them
    assert "step 2" in evidence["report"]


# ------------------------------------------------------------------------------------- what is kept


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in (folder / "checkpoints").glob("*.pth"))


def test_the_newest_checkpoints_are_kept(photos: Path, tmp_path: Path) -> None:
    seen = []
    with observing_steps(lambda training, step: seen.append(steps_in(tmp_path))):
        run_small(
            "--epochs 2 --save-steps 2 --keep-checkpoints 3 --data-path",
            photos,
            "--output-dir",
            tmp_path,
        )
    assert seen == [[], [], [2], [2, 3], [2, 3, 4], [2, 3, 4]]
    assert steps_in(tmp_path) == [3, 4, 6]
    assert (tmp_path / "checkpoint.pth").samefile(tmp_path / "checkpoints" / "0000000006.pth")


def test_time_saves_too(photos: Path, tmp_path: Path) -> None:
    words = "--epochs 1 --save-minutes 1e-9 --keep-checkpoints 9 --data-path"
    assert run_small(words, photos, "--output-dir", tmp_path).code == 0
    assert steps_in(tmp_path) == [1, 2, 3]


def test_leftovers_are_cleared_in_both_folders(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open()
    folder.close()
    leftovers = [
        tmp_path / "a.1.unfinished.tmp",
        tmp_path / "checkpoints" / "0000000003.pth.1.unfinished.tmp",
    ]
    for path in leftovers:
        path.touch()
    folder.open()
    folder.close()
    assert not any(path.exists() for path in leftovers)


def test_folders_that_are_called_like_leftovers_stay(tmp_path: Path) -> None:
    kept = [tmp_path / "x.unfinished.tmp", tmp_path / "checkpoints" / "x.unfinished.tmp"]
    for path in kept:
        path.mkdir(parents=True)
        (path / "file").touch()
        path.with_name(f"y{path.name}").touch()
    folder = RunFolder(tmp_path)
    folder.open()
    folder.close()
    assert all((path / "file").exists() for path in kept)
    assert [path for path in tmp_path.rglob("*.unfinished.tmp") if path.is_file()] == []


def test_folders_that_are_called_like_checkpoints_count_for_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, keep=2)
    folder.open()
    for step in (2, 7):
        run_folder.step_file(tmp_path, step).mkdir()
    for step in (1, 3, 4, 5):
        folder.save({"x": step}, step)
    folder.close()
    assert steps_in(tmp_path) == [2, 4, 5, 7]


@pytest.mark.parametrize("name", ["best_checkpoint.pth", "checkpoints/0000000009.pth.aside"])
def test_a_folder_in_the_place_of_a_checkpoints_name_is_named(name: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open()
    for step in (1, 9):
        folder.save({"x": step}, step)
    (tmp_path / name).mkdir()
    said = rf"^cannot write {tmp_path / name}: .*; move it away, or choose another output folder$"
    with pytest.raises(InputError, match=said):
        folder.rewind_to(run_folder.step_file(tmp_path, 1), 1, ("best_checkpoint.pth",))
    if name == "best_checkpoint.pth":
        with pytest.raises(InputError, match=said):
            folder.save({"x": 10}, 10, ("best_checkpoint.pth",))
    folder.close()
    assert list(tmp_path.rglob("*.tmp")) == []
    assert {1, 9} <= {int(path.stem) for path in run_folder.candidates(tmp_path)}


def test_a_run_goes_on_in_a_damaged_folder(photos: Path, tmp_path: Path) -> None:
    """Whatever is in its files of text, and whatever else lies there."""
    words = split("--epochs 3 --data-path", photos, "--output-dir", tmp_path)
    assert run_small(*words, "--max-steps 6").code == 0
    first, second = (tmp_path / "log.txt").read_bytes().splitlines()
    damaged = bytes(range(128, 256)) + second[9:]
    (tmp_path / "log.txt").write_bytes(b"\n".join([first, damaged, b"\xff" * 20]))
    for name in ("args.json", "status.json", "environment.json", "train.log"):
        (tmp_path / name).write_bytes(random.Random(name).randbytes(300))
    (tmp_path / "x.unfinished.tmp").mkdir()
    run = run_small(*words, "--auto-resume")
    assert run.code == 0, run.err
    assert (
        f"warning: {tmp_path / 'log.txt'}: removed lines that cannot be read: line 2 (b'\\x80"
        in run.out
    )
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 2]
    assert (tmp_path / "log.txt").read_bytes().splitlines()[0] == first
    assert read_status(tmp_path)["state"] == "done"


def test_names_are_given_where_files_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    folder = RunFolder(tmp_path)
    folder.open()
    folder.save({"x": 1}, 7, ("checkpoint.pth",))
    folder.close()
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True) == {"x": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "checkpoint.pth",
        "checkpoints",
    ]


def test_going_back_gives_up_what_came_later(photos: Path, tmp_path: Path) -> None:
    """Gone on with from an older checkpoint, a run is never taken up again from one of the course
    it left."""
    words = split(
        "--epochs 2 --save-steps 1 --keep-checkpoints 9 --lr 0.1 --data-path",
        photos,
        "--output-dir",
        tmp_path,
    )
    assert run_small(*words).code == 0
    content = (tmp_path / "checkpoints" / "0000000005.pth").read_bytes()
    back = split("--lr 0.2 --accept-changes lr")

    def stop(training: engine.Training, step: int) -> None:
        signal.raise_signal(signal.SIGTERM)

    with observing_steps(stop):
        run = run_small(*words, *back, "--resume", tmp_path / "checkpoints" / "0000000002.pth")
    assert "a later checkpoint was renamed to" in run.out
    assert (read_status(tmp_path)["state"], steps_in(tmp_path)) == ("preempted", [1, 2, 3])
    assert (tmp_path / "checkpoints" / "0000000005.pth.aside").read_bytes() == content
    again = run_small(*words, *back, "--auto-resume")
    assert f"resumed from {tmp_path / 'checkpoints' / '0000000003.pth'}" in again.out
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]
