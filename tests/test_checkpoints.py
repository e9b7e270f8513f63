"""Files survive kills, damage is found before anything is loaded, and no file runs code.

Longer than the working limit: the promises of one module are proved in one place.
"""

from __future__ import annotations

import argparse
import copy
import errno
import functools
import hashlib
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from errors import InputError
from models.weights import load_strictly, pick_weights
from storage import checkpoints, files
from storage.checkpoints import load_checkpoint, save_checkpoint
from storage.files import remove_stale
from storage.plain_data import to_plain
from tests.malicious import Malicious
from training import optim
from training.optim import load_optimizer


class Color(Enum):
    RED = "red"


def unsafe_globals(path: Path) -> list[str]:
    return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(body=nn.Linear(4, 3), norm=nn.BatchNorm1d(3), head=nn.Linear(3, 2))
    )


# ----------------------------------------------------------------------------------------- to_plain


def test_to_plain_known_values() -> None:
    value = {
        "path": Path("a") / "b",
        "best": np.float64(81.5),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "color": Color.RED,
        "shape": torch.Size([2, 3]),
        "many": [1, (2.5, None)],
        7: OrderedDict(x="y"),
    }
    plain = to_plain(value)
    assert plain == {
        "path": str(Path("a/b")),
        "best": 81.5,
        "count": 3,
        "flag": True,
        "dtype": "torch.float16",
        "device": "cpu",
        "color": "red",
        "shape": (2, 3),
        "many": [1, (2.5, None)],
        7: {"x": "y"},
    }
    assert [type(plain[key]) for key in ("best", "count", "flag", "shape", 7)] == [
        float,
        int,
        bool,
        tuple,
        dict,
    ]


def test_to_plain_detaches_and_shares_memory() -> None:
    weight = nn.Parameter(torch.ones(2))
    plain = to_plain({"w": weight})["w"]
    assert type(plain) is torch.Tensor
    assert not plain.requires_grad
    assert plain.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [0, {"b": object()}]}, r"^a\[1\]\.b: builtins\.object"),
        ({"a": {1: {2, 3}}}, r"^a\[1\]: builtins\.set"),
        ({"rng": np.zeros(3)}, r"^rng: numpy\.ndarray"),
        ({"f": len}, r"^f: builtins\.builtin_function"),
        ({"a": {(1, 2): 3}}, r"^a\[\(1, 2\)\]: a key"),
        (argparse.Namespace(a=1), r"^value: argparse\.Namespace"),
    ],
)
def test_to_plain_names_the_place(value: Any, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        to_plain(value)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.tuples(inner, inner)
    ),
)


@settings(max_examples=50, deadline=None)
@given(nested)
def test_to_plain_keeps_plain_data(value: Any) -> None:
    assert to_plain(value) == value


# ------------------------------------------------------------------------------------------ writing


def test_round_trip_of_a_training_state(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    path = tmp_path / "checkpoint.pth"
    state = {
        "format": checkpoints.FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    save_checkpoint(
        path, {**state, "best": np.float64(1), "config": {"out": tmp_path}, "nan": float("nan")}
    )
    loaded = load_checkpoint(path)
    assert unsafe_globals(path) == []
    assert loaded["best"] == 1.0
    assert loaded["config"] == {"out": str(tmp_path)}
    torch.testing.assert_close(
        loaded["optimizer"], to_plain(optimizer.state_dict()), rtol=0, atol=0
    )
    torch.testing.assert_close(pick_weights(loaded), dict(model.state_dict()), rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]


def fail_with(code: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def fail_like_torch(*_: Any, **__: Any) -> None:
    try:
        fail_with(errno.ENOSPC)()
    except OSError as error:
        raise RuntimeError("unexpected pos 704 vs 598") from error


@pytest.mark.parametrize(
    ("target", "replacement", "message"),
    [
        ("os.fsync", fail_with(errno.ENOSPC), "disk full"),
        ("torch.save", fail_with(errno.ENOSPC), "disk full"),
        ("torch.save", fail_like_torch, "disk full"),
        ("os.replace", fail_with(errno.EACCES), "folder .* is not writable"),
    ],
)
def test_failed_write_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, replacement: Any, message: str
) -> None:
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"epoch": 1})
    monkeypatch.setattr(target, replacement)
    with pytest.raises(InputError, match=message) as caught:
        save_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert str(path) in str(caught.value)
    assert load_checkpoint(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs Linux's device that is always full"
)
def test_real_full_device_is_recognised() -> None:
    with pytest.raises((OSError, RuntimeError)) as caught, open("/dev/full", "wb") as stream:
        torch.save({"w": torch.zeros(300_000)}, stream)
    assert "disk full" in str(files._system_reason(caught.value, Path("folder/file")))


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        save_checkpoint(tmp_path / "nowhere" / "checkpoint.pth", {})


def test_what_is_not_plain_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^model\.f"):
        save_checkpoint(tmp_path / "checkpoint.pth", {"model": {"f": len}})
    assert os.listdir(tmp_path) == []


def test_remove_stale_takes_only_our_temporary_files(tmp_path: Path) -> None:
    for name in ("checkpoint.pth", "notes.tmp", f"checkpoint.pth.17{files.TEMPORARY_SUFFIX}"):
        (tmp_path / name).touch()
    assert len(remove_stale(tmp_path)) == 1
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pth", "notes.tmp"]


def save_for_ever(path: Path, megabytes: int) -> None:
    torch.set_num_threads(1)
    step = 0
    while True:
        save_checkpoint(path, {"step": step, "w": torch.full((megabytes * 250_000,), float(step))})
        step += 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_p4_sigkill_never_costs_the_last_file(tmp_path: Path) -> None:
    kills, megabytes = 25, 5
    path, rng, unfinished = tmp_path / "checkpoint.pth", random.Random(0), 0
    save_checkpoint(path, {"step": -1, "w": torch.full((megabytes * 250_000,), -1.0)})
    for _ in range(kills):
        process = multiprocessing.get_context("fork").Process(
            target=save_for_ever, args=(path, megabytes), daemon=True
        )
        with warnings.catch_warnings():  # the child touches no lock that a thread of ours may hold
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        started = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == started:  # until its first save is through
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01 * megabytes))
        process.kill()
        process.join()
        loaded = load_checkpoint(path)
        assert bool((loaded["w"] == loaded["step"]).all())
        unfinished += len(remove_stale(tmp_path))
    assert unfinished > kills / 4  # many of them in the middle of a save
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_p4_a_full_disk_leaves_the_previous_file(small_disk: Path) -> None:
    path = small_disk / "checkpoint.pth"
    save_checkpoint(path, {"step": 1, "w": torch.ones(1_000_000)})  # 4 MB
    for _ in range(3):
        with pytest.raises(InputError, match=r"checkpoint\.pth: disk full .* unchanged"):
            save_checkpoint(path, {"step": 2, "w": torch.full((1_500_000,), 2.0)})
        assert os.listdir(small_disk) == ["checkpoint.pth"]
    loaded = load_checkpoint(path)
    assert loaded["step"] == 1
    assert bool((loaded["w"] == 1).all())
    save_checkpoint(
        small_disk / "other.pth", {"w": torch.ones(500_000)}
    )  # what fits is still written


# ------------------------------------------------------------------------------------------ reading


def content_of(path: Path) -> list[int]:
    """The places in a zip file that are somebody's content, and not headers, padding or the
    directory."""
    places: list[int] = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as stream:
        for entry in archive.infolist():
            stream.seek(entry.header_offset + 26)
            names = sum(int.from_bytes(stream.read(2), "little") for _ in range(2))
            places += range(
                entry.header_offset + 30 + names, entry.header_offset + 30 + names + entry.file_size
            )
    return places


def training_state() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(80, 80), nn.BatchNorm1d(80), nn.Linear(80, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 80)).sum().backward()
    optimizer.step()
    return {
        "format": checkpoints.FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 1,
    }


def test_p5_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """200 of 200 in what was saved; elsewhere it is found, or does no harm."""
    path, rng = tmp_path / "checkpoint.pth", random.Random(0)
    save_checkpoint(path, training_state())
    good, whole = path.read_bytes(), load_checkpoint(path)
    inside = content_of(path)
    outside = sorted(set(range(len(good))) - set(inside))

    def flip(place: int) -> None:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)

    for place in rng.sample(inside, 200):
        flip(place)
        with pytest.raises(InputError, match=r"checkpoint\.pth is truncated or corrupt.*earlier"):
            load_checkpoint(path)
    harmless = 0
    for place in rng.sample(outside, 200):
        flip(place)
        try:
            torch.testing.assert_close(load_checkpoint(path), whole, rtol=0, atol=0)
            harmless += 1
        except InputError:
            pass
    assert 0 < harmless < 200


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncation_is_found(tmp_path: Path, share: float, zipped: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"w": torch.randn(5_000)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match="truncated or corrupt"):
        load_checkpoint(path)


def test_text_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a checkpoint\n" * 9)
    with pytest.raises(InputError, match="no checkpoint at all"):
        load_checkpoint(tmp_path / "notes.txt")


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_file_with_namespace_and_numpy_scalars(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "deit.pth"
    foreign = {
        "model": network().state_dict(),
        "args": argparse.Namespace(lr=5e-4, names=["a"]),
        "best": np.float64(79.9),
        "f": np.float32(0.5),
        "epoch": np.int64(3),
        "done": np.bool_(True),
    }
    torch.save(foreign, path, _use_new_zipfile_serialization=zipped)
    loaded = load_checkpoint(path)
    assert (
        argparse.Namespace not in torch.serialization.get_safe_globals()
    )  # the allowance ended with the call
    assert type(loaded["args"]) is dict
    assert loaded["args"] == {"lr": 5e-4, "names": ["a"]}
    assert [loaded[key] for key in ("best", "f", "epoch", "done")] == [79.9, 0.5, 3, True]
    assert [type(loaded[key]) for key in ("best", "f", "epoch", "done")] == [
        float,
        float,
        int,
        bool,
    ]
    save_checkpoint(tmp_path / "own.pth", loaded)
    assert unsafe_globals(tmp_path / "own.pth") == []


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside", ["nothing", "namespace"])
def test_malicious_pickle_runs_nothing(tmp_path: Path, zipped: bool, beside: str) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "created"
    state = {
        "model": Malicious(target),
        "args": argparse.Namespace(a=1) if beside == "namespace" else None,
    }
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"mkdir.*nothing was executed"):
        load_checkpoint(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # the file was a real threat


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bare_pickle_and_whole_module_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "created"
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"model": Malicious(target)}))
    with pytest.raises(InputError):
        load_checkpoint(tmp_path / "bare.pth")
    assert not target.exists()
    torch.save(network(), tmp_path / "module.pth")
    with pytest.raises(InputError, match=r"torch\.nn\.modules\.\w+\.\w+.*nothing was executed"):
        load_checkpoint(tmp_path / "module.pth")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*gone\.pth"):
        load_checkpoint(tmp_path / "gone.pth")
    with pytest.raises(InputError, match="is a folder; name a file inside it"):
        load_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pth")


@pytest.mark.parametrize(
    "url", ["https://host/name.pth", "http://host/name-0123abcd.pth", "ftp://host/n-0123abcd.pth"]
)
def test_url_without_hash_or_https_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="only https URLs of files whose name ends in their hash"):
        load_checkpoint(url)


def test_url_with_hash_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "source.pth", {"epoch": 5})
    content = (tmp_path / "source.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    calls = []

    def download(url: str, dst: str, hash_prefix: str, progress: bool) -> None:
        calls.append((url, hash_prefix))
        Path(dst).write_bytes(content)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    url = f"https://host/folder/name-{digest}.pth"
    assert load_checkpoint(url) == load_checkpoint(url) == {"epoch": 5}
    assert calls == [(url, digest)]
    (tmp_path / "hub" / "checkpoints" / f"name-{digest}.pth").write_bytes(b"cut short")
    assert load_checkpoint(url) == {"epoch": 5}  # a damaged copy is fetched again
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail_with(errno.ENETUNREACH))
    with pytest.raises(InputError, match="cannot download"):
        load_checkpoint(f"https://host/other-{digest}.pth")


# ------------------------------------------------------------------------------------------ weights

W = {"a": torch.zeros(1), "b.c": torch.ones(2)}


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"model": W, "epoch": 3},
        {"state_dict": W, "args": {}},
        {"model_state": W},
        W,
        {"model": {f"module.{name}": weight for name, weight in W.items()}},
        {"state_dict": {f"_orig_mod.module.{name}": weight for name, weight in W.items()}},
        {f"module._orig_mod.{name}": weight for name, weight in W.items()},
    ],
)
def test_pick_weights_finds_and_strips(checkpoint: dict[str, Any]) -> None:
    picked = pick_weights(checkpoint)
    assert list(picked) == ["a", "b.c"]
    assert all(picked[name] is weight for name, weight in W.items())


def test_pick_weights_keeps_a_prefix_that_is_not_uniform() -> None:
    assert list(pick_weights({"module.a": W["a"], "b": W["b.c"]})) == ["module.a", "b"]


@pytest.mark.parametrize(
    "checkpoint", [{"epoch": 1, "net": W}, {}, {"epoch": 1, "net": 2, "model": {"a": 1}}]
)
def test_pick_weights_lists_what_it_found(checkpoint: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="found the keys " + ("epoch, net" if checkpoint else "")):
        pick_weights(checkpoint)


def changed_weights() -> dict[str, torch.Tensor]:
    weights = {name: weight + 1 for name, weight in network().state_dict().items()}
    del weights["norm.bias"]
    weights["head.weight"] = torch.zeros(7, 3)
    weights["extra"] = torch.zeros(1)
    return weights


def test_load_strictly_checks_before_it_copies() -> None:
    model = network()
    with pytest.raises(InputError) as caught:
        load_strictly(model, changed_weights(), tolerate_missing=["norm.bias"], source="file.pth")
    assert "file.pth does not fit the model in 2 names" in str(caught.value)
    assert "head.weight: shape (7, 3) instead of the model's (2, 3)" in str(caught.value)
    assert "extra: unknown" in str(caught.value)
    assert "norm.bias" not in str(caught.value)
    torch.testing.assert_close(model.state_dict(), network().state_dict(), rtol=0, atol=0)


def test_load_strictly_notes_what_is_tolerated() -> None:
    model, before = network(), network().state_dict()
    load = functools.partial(load_strictly, model, changed_weights(), source="file.pth")
    notes = load(
        tolerate_missing={"norm.bias", "head.weight"}, tolerate_unexpected={"extra", "head.weight"}
    )
    assert [note.split(":")[0] for note in notes] == ["extra", "head.weight", "norm.bias"]
    kept = {"norm.bias", "head.weight"}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name] + (0 if name in kept else 1), rtol=0, atol=0)


def test_load_strictly_lists_eight_at_most() -> None:
    with pytest.raises(InputError, match=r"in 109 names.*; and 101 more$") as caught:
        load_strictly(network(), {f"n{i:03}": torch.zeros(1) for i in range(100)}, source="x")
    assert str(caught.value).count(": missing") == 4  # sorted: 4 of ours, n000 to n003
    assert "n003" in str(caught.value)
    assert "n004" not in str(caught.value)


def test_load_strictly_accepts_an_exact_fit() -> None:
    source, target = network(), network()
    nn.init.ones_(source.get_parameter("head.weight"))
    assert load_strictly(target, source.state_dict(), source="x") == []
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------------------- state of an optimizer


def trainer(opt: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(
        OrderedDict(body=nn.Linear(4, 3), norm=nn.LayerNorm(3), head=nn.Linear(3, 2))
    )
    return model, optim.make_optimizer(model, {"opt": opt, "lr": 1e-2, "weight_decay": 0.05})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(
            torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        ).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("opt", ["adamw", "sgd", "adan"])  # tests/test_optim.py has all
def test_an_optimizer_goes_on_exactly_with_its_own_settings(opt: str, tmp_path: Path) -> None:
    model, optimizer = trainer(opt)
    train(model, optimizer, range(3))
    save_checkpoint(
        tmp_path / "x.pth", {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    )
    saved = load_checkpoint(tmp_path / "x.pth")
    again, other = trainer(opt)
    other.param_groups[0]["lr"] = 0.5
    load_optimizer(other, saved["optimizer"], "x.pth")
    load_strictly(again, saved["model"], source="x.pth")
    assert other.param_groups[0]["lr"] == 0.5
    for group in (*other.param_groups, *optimizer.param_groups):
        group["lr"] = 1e-2
    train(model, optimizer, range(3, 6))
    train(again, other, range(3, 6))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    ours, theirs = (to_plain(one.state_dict()["state"]) for one in (other, optimizer))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def first(saved: dict[str, Any]) -> dict[str, Any]:
    """The state of the first matrix."""
    return next(one for one in saved["state"].values() if one["exp_avg"].ndim == 2)


WRONG_STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "smaller": lambda saved: first(saved).update(exp_avg=torch.zeros(1)),
    "flat": lambda saved: first(saved).update(exp_avg_sq=first(saved)["exp_avg_sq"].flatten()),
    "sparse": lambda saved: first(saved).update(exp_avg=torch.zeros(3, 4).to_sparse()),
    "whole numbers": lambda saved: first(saved).update(exp_avg=torch.zeros(3, 4, dtype=torch.long)),
    "nothing": lambda saved: first(saved).update(exp_avg=None),
    "a number": lambda saved: first(saved).update(exp_avg=0.5),
    "a vector of steps": lambda saved: first(saved).update(step=torch.zeros(3)),
    "a part too many": lambda saved: first(saved).update(momentum_buffer=torch.zeros(3, 4)),
    "a part too few": lambda saved: first(saved).pop("exp_avg"),
    "a parameter too many": lambda saved: saved["state"].update({77: first(saved)}),
    "a list": lambda saved: saved["state"].update({0: [1, 2]}),
    "no state": lambda saved: saved.pop("state"),
    "no groups": lambda saved: saved.pop("param_groups"),
    "other groups": lambda saved: saved["param_groups"].pop(),
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_state_that_does_not_fit_is_refused(wrong: str) -> None:
    """torch takes the first of them, and then its fused step reads and writes beyond the tensor's
    end."""
    model, optimizer = trainer("adamw")
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    WRONG_STATES[wrong](saved)
    _, other = trainer("adamw")
    with pytest.raises(
        InputError, match=r"^x\.pth: its optimizer state (does not fit|is of another)"
    ):
        load_optimizer(other, saved, "x.pth")


def test_a_count_that_is_kept_beside_the_settings_goes_on() -> None:
    model, optimizer = trainer("lamb")
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    _, other = trainer("lamb")
    load_optimizer(other, saved, "x.pth")
    assert [group["step"] for group in other.param_groups] == [3, 3]
    saved["param_groups"][0]["step"] = "3"
    with pytest.raises(InputError, match="does not fit in step"):
        load_optimizer(trainer("lamb")[1], saved, "x.pth")
