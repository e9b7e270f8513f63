"""Means against plain python, one transfer per reading, one line per epoch, TensorBoard as it is
read back."""

from __future__ import annotations

import builtins
import errno
import json
import math
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from errors import InputError
from run.log import RunLog
from storage.plain_data import to_json, write_json
from training import meters as meters_module
from training.meters import Meters
from utils import Processes

CPU = torch.device("cpu")
MAIN = Processes(rank=0, world_size=1, device=CPU)
OTHER = Processes(rank=1, world_size=2, device=CPU)


class Counting(Tensor):
    """Stands for a tensor on a device: counts what would make the host wait for it."""

    transfers = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in (
            "item",
            "tolist",
            "numpy",
            "cpu",
            "__float__",
            "__int__",
            "__bool__",
            "is_nonzero",
            "__format__",
        ):
            Counting.transfers += 1
        return super().__torch_function__(func, types, args, kwargs or {})


# ------------------------------------------------------------------------------------------- meters


def test_means_equal_plain_python_also_for_absent_names() -> None:
    rng, meters = random.Random(0), Meters()
    seen: dict[str, list[tuple[float, float]]] = {"loss": [], "loss_fine": [], "lr": []}
    for step in range(50):
        weight = rng.randint(1, 9)
        values = {"loss": rng.gauss(3, 1), "lr": rng.random()}
        if step % 3 == 0:
            values["loss_fine"] = rng.gauss(1, 1)
        for name, value in values.items():
            seen[name].append((value, weight))
        meters.update(
            weight,
            **{
                n: v if n == "lr" else torch.tensor(v, dtype=torch.float64)
                for n, v in values.items()
            },
        )
    for name, mean in meters.read().items():
        expected = sum(value * weight for value, weight in seen[name]) / sum(
            weight for _, weight in seen[name]
        )
        assert mean == pytest.approx(expected, rel=1e-12)
    assert set(meters.read()) == set(seen)


def test_known_values_and_tensor_weights() -> None:
    meters = Meters()
    meters.update(loss=torch.tensor([2.0]), weight=torch.tensor(3))
    meters.update(loss=4, weight=1, other=torch.tensor(7, dtype=torch.float16))
    assert meters.read() == {"loss": 2.5, "other": 7.0}
    meters.update(never=torch.tensor(1.0), weight=torch.tensor(0))
    assert math.isnan(meters.read()["never"])
    assert Meters().read() == {}


def test_sums_are_wider_than_their_values() -> None:
    meters = Meters()
    for _ in range(3000):
        meters.update(
            acc=torch.tensor(1.0, dtype=torch.bfloat16)
        )  # a bfloat16 sum would stop at 256
    meters.update(big=torch.tensor(2.0**24), weight=1)
    meters.update(big=torch.tensor(1.0), weight=1)  # lost in a float32 sum
    assert meters.read() == {"acc": 1.0, "big": (2**24 + 1) / 2}


def test_recent_covers_only_what_came_since() -> None:
    meters = Meters()
    meters.update(a=torch.tensor(1.0), b=2.0)
    assert meters.recent() == {"a": 1.0, "b": 2.0}
    meters.update(a=torch.tensor(5.0), weight=3)
    assert meters.recent() == {"a": 5.0}
    assert meters.recent() == {}
    meters.update(a=torch.tensor(4.0))
    assert meters.read() == {"a": 4.0, "b": 2.0}  # (1 + 15 + 4) / 5


def test_updating_transfers_nothing_and_reading_once() -> None:
    meters, Counting.transfers = Meters(), 0
    for value in range(4):
        scalars = {
            name: torch.tensor(float(value)).as_subclass(Counting) for name in ("a", "b", "c")
        }
        meters.update(torch.tensor(2.0).as_subclass(Counting), lr=0.1, **scalars)
    assert Counting.transfers == 0
    assert meters.read() == pytest.approx({"lr": 0.1, "a": 1.5, "b": 1.5, "c": 1.5})
    assert Counting.transfers == 1
    meters.recent()
    assert Counting.transfers == 2


def test_meters_keep_no_graph_and_refuse_vectors() -> None:
    meters = Meters()
    meters.update(loss=torch.ones((), requires_grad=True) * 2)
    assert all(
        not part.requires_grad for part in meters._sums["loss"].both() if isinstance(part, Tensor)
    )
    with pytest.raises(ValueError, match=r"meter loss: .*\(3,\)"):
        meters.update(loss=torch.zeros(3))


def reduce_on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    meters = Meters()
    if rank == 0:
        meters.update(loss=torch.tensor(1.0), only_zero=torch.tensor(8.0), weight=1)
        meters.recent()
    else:
        meters.update(only_one=2.0, loss=torch.tensor(5.0), weight=3)
    meters.reduce(Processes(rank, 2, CPU))
    write_json(Path(folder) / f"{rank}.json", meters.read())
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_reduce_over_two_ranks(tmp_path: Path) -> None:
    mp.start_processes(reduce_on_a_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "loss": 4.0,
            "only_one": 2.0,
            "only_zero": 8.0,
        }


def test_reduce_with_one_process_changes_nothing() -> None:
    meters = Meters()
    meters.update(loss=torch.tensor(3.0))
    assert meters.reduce(MAIN).read() == {"loss": 3.0}


# -------------------------------------------------------------------------------------------- files


def test_json_is_valid_and_written_whole(tmp_path: Path) -> None:
    data = {"nan": math.nan, "inf": [-math.inf, 1.5], "path": tmp_path, 3: None}
    write_json(tmp_path / "data.json", data)
    text = (tmp_path / "data.json").read_text()
    assert json.loads(text) == {"nan": None, "inf": [None, 1.5], "path": str(tmp_path), "3": None}
    assert [file.name for file in tmp_path.iterdir()] == ["data.json"]
    with pytest.raises(TypeError):
        to_json({"f": len})


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_log_txt_has_each_epoch_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, MAIN, tensorboard=False) as log:
        for epoch in range(4):
            log.epoch({"epoch": epoch, "train_loss": math.nan if epoch == 1 else 1.0})
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"epoch": 4, "train_lo')  # a kill in mid-line
    with RunLog(tmp_path, MAIN, tensorboard=False) as log:
        log.drop_epochs_from(2)
        for epoch in range(2, 6):
            log.epoch({"epoch": epoch, "train_loss": 2.0})
    assert [(line["epoch"], line["train_loss"]) for line in read_lines(tmp_path)] == [
        (0, 1.0),
        (1, None),
        (2, 2.0),
        (3, 2.0),
        (4, 2.0),
        (5, 2.0),
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.txt", "train.log"]


UNREADABLE = {
    "random bytes": b"\xff\xfe\x00\x9c{",
    "cut short": b'{"epoch": 1, "train_lo',
    "no object": b"[1]",
    "no epoch": b'{"train_loss": 1.0}',
    "a text for an epoch": b'{"epoch": "1"}',
    "a switch for an epoch": b'{"epoch": true}',
    "an epoch below 0": b'{"epoch": -1}',
    "no whole epoch": b'{"epoch": 1.0}',
    "a huge number": b'{"epoch": ' + b"9" * 9000 + b"}",
    "deep nesting": b'{"epoch": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "two in one line": b'{"epoch": 1} {"epoch": 2}',
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_damaged_line_of_the_log_costs_no_other(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [to_json({"epoch": epoch, "train_loss": 1 / 3}).encode() for epoch in range(6)]
    lines[0] = (
        # readable, though not as we write it
        b'{"epoch":0,  "train_loss": NaN, "note": "\xc3\xbc"}'
    )
    path = tmp_path / "log.txt"
    path.write_bytes(b"\n".join([lines[0], UNREADABLE[name], *lines[2:], b""]))
    with RunLog(tmp_path, MAIN, tensorboard=False) as log:
        log.drop_epochs_from(5)
    assert path.read_bytes().splitlines() == [lines[0], *lines[2:5]]
    (said,) = capsys.readouterr().out.splitlines()
    assert (
        said
        == f"warning: {path}: removed lines that cannot be read: line 2 ({UNREADABLE[name][:40]!r})"
    )
    assert said in (tmp_path / "train.log").read_text()


def test_a_sound_log_is_cut_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").write_bytes(b'{"epoch": 0}\r\n\n{"epoch": 1}\n{"epoch": 2}')
    RunLog(tmp_path, MAIN, tensorboard=False).drop_epochs_from(2)
    assert (tmp_path / "log.txt").read_bytes() == b'{"epoch": 0}\n{"epoch": 1}\n'
    assert capsys.readouterr().out == ""


def test_a_log_of_nothing_but_damage_is_told_of_shortly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").write_bytes(b"\xff\n" * 1000)
    RunLog(tmp_path, MAIN, tensorboard=False).drop_epochs_from(2)
    assert (tmp_path / "log.txt").read_bytes() == b""
    said = capsys.readouterr().out
    assert said.endswith(r"line 4 (b'\xff'), line 5 (b'\xff') and 995 more" + "\n")


def test_what_stands_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    for name in ("log.txt", "train.log"):
        (tmp_path / name).mkdir()
    with pytest.raises(
        InputError, match=r"^cannot write \S*train\.log: Is a directory; move it away, or choose"
    ):
        RunLog(tmp_path, MAIN)
    (tmp_path / "train.log").rmdir()
    log = RunLog(tmp_path, MAIN, tensorboard=False)
    with pytest.raises(
        InputError, match=r"^cannot read \S*log\.txt: Is a directory; move it away, or choose"
    ):
        log.drop_epochs_from(0)
    with pytest.raises(
        InputError, match=r"^cannot write \S*log\.txt: Is a directory; move it away, or choose"
    ):
        log.epoch({"epoch": 0})
    with pytest.raises(InputError, match=r"^cannot write .*: File name too long; choose"):
        RunLog(tmp_path / ("x" * 300), MAIN)


def test_drop_epochs_without_a_log(tmp_path: Path) -> None:
    RunLog(tmp_path, MAIN, tensorboard=False).drop_epochs_from(0)
    assert not (tmp_path / "log.txt").exists()


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*file"):
        RunLog(tmp_path / "file" / "run", MAIN)


# -------------------------------------------------------------------------------------- TensorBoard


def read_events(folder: Path) -> Any:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_has_the_same_scalars_and_the_picture(tmp_path: Path) -> None:
    with RunLog(tmp_path, MAIN) as log:
        for epoch in range(2):
            log.epoch({"epoch": epoch, "train_loss": 0.5 + epoch, "test_acc1": 80, "note": "text"})
        log.scalars(300, {"lr": 1e-3})
        log.picture("mixed", torch.full((3, 8, 12), 200, dtype=torch.uint8), 1)
    events = read_events(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(0, 0.5), (1, 1.5)]
    assert set(events.Tags()["scalars"]) == set(read_lines(tmp_path)[0]) - {"epoch", "note"}
    (image,) = events.Images("mixed")
    assert (image.step, image.height, image.width) == (1, 8, 12)
    assert [(e.step, round(e.value, 6)) for e in read_events(tmp_path / "steps").Scalars("lr")] == [
        (300, 0.001)
    ]


def test_resumed_run_hides_what_is_run_again(tmp_path: Path) -> None:
    with RunLog(tmp_path, MAIN) as log:
        for epoch in range(4):
            log.epoch({"epoch": epoch, "a": 1.0})
            log.scalars(10 * epoch, {"lr": 1.0})
    with RunLog(tmp_path, MAIN) as log:
        log.drop_epochs_from(2, step=20)
        log.epoch({"epoch": 2, "a": 3.0})
        log.scalars(20, {"lr": 3.0})
    assert [(e.step, e.value) for e in read_events(tmp_path).Scalars("a")] == [
        (0, 1),
        (1, 1),
        (2, 3),
    ]
    assert [(e.step, e.value) for e in read_events(tmp_path / "steps").Scalars("lr")] == [
        (0, 1),
        (10, 1),
        (20, 3),
    ]


def test_a_failure_of_tensorboard_is_told_once_and_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "steps").touch()
    with RunLog(tmp_path, MAIN) as log:
        for epoch in range(2):
            log.scalars(epoch, {"lr": 1.0})
            log.epoch({"epoch": epoch, "a": 1.0})
    said = capsys.readouterr().out
    assert said.count("warning: TensorBoard gets no more values: [Errno 17] File exists") == 1
    assert len(said.splitlines()) == 1
    assert len(read_lines(tmp_path)) == 2


def test_a_disk_that_is_full_for_tensorboard_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunLog(tmp_path, MAIN) as log:
        log.epoch({"epoch": 0, "a": 1.0})
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        monkeypatch.setattr(writer, "write", fail)  # in TensorBoard's thread
        monkeypatch.setattr(writer, "flush", fail)
        for epoch in range(1, 4):
            log.epoch({"epoch": epoch, "a": 1.0})
    said = capsys.readouterr().out
    assert said.count("TensorBoard gets no more values: [Errno 28] No space left") == 1
    assert len(read_lines(tmp_path)) == 4


def test_a_folder_that_is_renamed_during_the_run_is_named_and_not_made_again(
    tmp_path: Path,
) -> None:
    log = RunLog(tmp_path / "run", MAIN, tensorboard=False)
    (tmp_path / "run").rename(tmp_path / "other")
    with pytest.raises(
        InputError, match=r"no folder \S*run; move it back if it was renamed .*, or choose another"
    ):
        log.say("x")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named_by_its_cause_and_fix(tmp_path: Path) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"log\.txt: disk full .*; free some space; choose"):
        RunLog(tmp_path, MAIN, tensorboard=False).epoch({"epoch": 0})


def hide_package(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if (
            name.split(".")[0] == package
            or name == "torch.utils.tensorboard" == f"torch.utils.{package}"
        ):
            raise ImportError(f"No module named '{package}'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


def test_without_tensorboard_there_is_one_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide_package(monkeypatch, "tensorboard")
    with RunLog(tmp_path, MAIN) as log:
        log.epoch({"epoch": 0, "a": 1.0})
        log.scalars(1, {"lr": 1.0})
        log.picture("p", torch.zeros(3, 2, 2, dtype=torch.uint8), 0)
    assert capsys.readouterr().out.count("pip install tensorboard") == 1
    assert read_lines(tmp_path) == [{"epoch": 0, "a": 1.0}]


# ------------------------------------------------------------------------------------------ console


def test_plain_lines_and_their_copy_in_train_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, MAIN, tensorboard=False) as log:
        log.say("first\nsecond")
        log.table([("model", "deit_tiny"), ("lr", "0.001")])
        for item in log.progress("abc", 3, "epoch 0"):
            if item == "b":
                log.note({"loss": 1.23456789, "n": 7})
        log.note({"acc1": 80.0})
    expected = [
        "first",
        "second",
        "model  deit_tiny",
        "lr     0.001",
        "epoch 0 [2/3] loss 1.235  n 7",
        "acc1 80",
    ]
    assert capsys.readouterr().out.splitlines() == expected
    kept = (tmp_path / "train.log").read_text().splitlines()
    assert [line[20:] for line in kept] == expected
    assert all(line[:4].isdigit() and line[13] == ":" for line in kept)


class Bar:
    """What RunLog uses of tqdm, recording."""

    made: list[Bar] = []  # noqa: RUF012

    def __init__(self, total: int | None, desc: str, dynamic_ncols: bool) -> None:
        self.total, self.desc, self.count, self.closed = total, desc, 0, False
        self.shown: dict[str, str] = {}
        self.lines: list[str] = []
        Bar.made.append(self)

    def update(self) -> None:
        self.count += 1

    def set_postfix(self, shown: dict[str, str], refresh: bool) -> None:
        self.shown = shown

    def write(self, text: str, file: Any) -> None:
        assert file is sys.stdout
        self.lines.append(text)

    def close(self) -> None:
        self.closed = True


def test_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("tqdm.tqdm", Bar)
    log = RunLog(tmp_path, MAIN, tensorboard=False)
    for _ in log.progress(range(3), 3, "epoch 0"):
        log.note({"loss": 0.5})
        log.say("a line")
    (bar,) = Bar.made
    assert (bar.total, bar.desc, bar.count, bar.shown, bar.closed) == (
        3,
        "epoch 0",
        3,
        {"loss": "0.5"},
        True,
    )
    assert bar.lines == ["a line"] * 3
    assert "epoch 0 [3/3] loss 0.5" in (tmp_path / "train.log").read_text()


def test_without_tqdm_a_terminal_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    hide_package(monkeypatch, "tqdm")
    log = RunLog(None, MAIN)
    for _ in log.progress([0], None, "loop"):
        log.note({"a": 1})
    assert capsys.readouterr().out == "loop [1] a 1\n"


def test_real_bar_closes_when_the_loop_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with RunLog(None, MAIN) as log:
        for _ in log.progress(range(5), 5, "loop"):
            log.note({"a": 1})
            log.say("above the bar")
            break
        assert log._bar is None


def test_other_ranks_say_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path / "run", OTHER) as log:
        log.say("x")
        log.table([("a", "b")])
        log.note({"a": 1})
        log.epoch({"epoch": 0})
        log.scalars(0, {"lr": 1.0})
        log.picture("p", torch.zeros(3, 2, 2, dtype=torch.uint8), 0)
        log.drop_epochs_from(0)
        assert list(log.progress(range(3), 3, "d")) == [0, 1, 2]
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_without_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with RunLog(None, MAIN) as log:
        log.say("x")
        log.epoch({"epoch": 0, "a": 1.0})
        log.scalars(0, {"lr": 1.0})
        log.drop_epochs_from(0)
    assert capsys.readouterr().out == "x\n"
    assert list(tmp_path.iterdir()) == []


def test_meters_agree_with_their_dtype_rule() -> None:
    assert meters_module._dtype_on(torch.device("mps")) is torch.float32
    assert (
        meters_module._dtype_on(torch.device("cuda"))
        is meters_module._dtype_on(CPU)
        is torch.float64
    )
