"""Exports of a checkpoint, read by those they are for: timm, onnxruntime and torch.hub; and what is
refused."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import hubconf
from errors import run_command
from models.build import build_model
from models.weights import plain_weights, restore_model
from pipeline.spec import ImageSpec
from storage.checkpoints import load_checkpoint, save_checkpoint
from tests.conftest import randomise
from tools import export

ROOT = Path(__file__).resolve().parent.parent
SIZE = (24, 40)
NAMES = ["ant", "bee", "wasp, or häst\udcff"]  # the last is not UTF-8


def write_checkpoint(path: Path, name: str = "vit_nano_patch4_32", **changes: Any) -> Path:
    """A checkpoint as main.py writes it, as far as this tool reads it: 24 x 40 pixels, 3
    classes."""
    config: dict[str, Any] = {
        "name": name,
        "num_classes": 3,
        "input_size": list(SIZE),
        "patch_size": 8,
        "separate_region_head": True,
    }
    config = {"drop": 0.1, "drop_path": 0.0, "depth": 2, "embed_dim": 24, "num_heads": 3, **config}
    settings = {**config, "input_size": SIZE}
    model, average = build_model(**settings), build_model(**settings)
    randomise(model)
    randomise(average)
    state = {
        "model_config": config,
        "model": plain_weights(model),
        "ema": plain_weights(average),
        "data": {"class_names": NAMES, "image_spec": ImageSpec(SIZE, crop_ratio=1.0).to_plain()},
        "versions": {"commit": "0123abcd"},
    }
    save_checkpoint(path, {**state, **changes})
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint.pth")


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE)


def logits_of(path: Path, shown: Tensor, ema: bool = False) -> Tensor:
    with torch.no_grad():
        return restore_model(load_checkpoint(path), ema).eval()(shown).logits


def run(*words: str | Path) -> int:
    return run_command(lambda: export.main([str(word) for word in words]))


# -------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("ema", [False, True])
def test_timm_reads_the_safetensors_file_and_gives_the_same_logits(
    checkpoint: Path, ema: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    output = checkpoint.with_name("model.safetensors")
    assert run("--resume", checkpoint, "--output", output, *(["--ema"] if ema else [])) == 0
    told = capsys.readouterr().out
    assert "left out: token_head.bias, token_head.weight\n" in told
    assert f"{'averaged' if ema else 'trained'} weights" in told
    call = re.search(r"read it with (timm\.create_model\(.*)checkpoint_path=\.\.\.\)", told)
    assert call is not None
    network = eval(
        f"{call[1]}checkpoint_path={str(output)!r})", {"timm": timm}
    ).eval()  # as one would type it
    shown = images()
    with torch.no_grad():
        assert torch.equal(network(shown), logits_of(checkpoint, shown, ema))
    assert not torch.equal(logits_of(checkpoint, shown), logits_of(checkpoint, shown, ema=True))


def test_safetensors_hold_timms_keys_and_say_where_they_are_from(checkpoint: Path) -> None:
    from safetensors import safe_open

    output = checkpoint.with_name("model.safetensors")
    assert run("--resume", checkpoint, "--output", output) == 0
    with safe_open(output, framework="pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    assert keys == set(restore_model(load_checkpoint(checkpoint)).network.state_dict())
    assert json.loads(metadata.pop("class_names")) == NAMES
    assert ImageSpec.from_plain(json.loads(metadata.pop("image_spec"))) == ImageSpec(
        SIZE, crop_ratio=1.0
    )
    assert metadata == {
        "format": "pt",
        "model": "vit_nano_patch4_32",
        "num_classes": "3",
        "weights": "trained",
        "commit": "0123abcd",
    }


def test_the_released_codes_name_becomes_timms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_checkpoint(tmp_path / "checkpoint.pth", "vit_deit_tiny_patch16_224", versions=None)
    assert run("--resume", path, "--output", tmp_path / "MODEL.SAFETENSORS") == 0
    assert "timm.create_model('deit_tiny_patch16_224'" in capsys.readouterr().out
    assert export.read_plain(str(path), ema=False).metadata["commit"] == "unknown"


def test_a_failed_write_leaves_what_was_there(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = checkpoint.with_name("model.safetensors")
    output.write_bytes(b"before")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    assert run("--resume", checkpoint, "--output", output) == 2
    assert output.read_bytes() == b"before"
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == [
        "checkpoint.pth",
        "model.safetensors",
    ]


# --------------------------------------------------------------------------------------------- ONNX


def test_onnx_takes_any_number_of_images_and_agrees(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnx
    import onnxruntime

    output = checkpoint.with_name("model.onnx")
    assert run("--resume", checkpoint, "--output", output, "--ema") == 0
    told = capsys.readouterr().out
    assert "onnxruntime agrees" in told
    assert "left out: token_head.bias, token_head.weight\n" in told
    assert [path.name for path in checkpoint.parent.glob("model*")] == [
        "model.onnx"
    ]  # weights are inside

    onnx.checker.check_model(str(output), full_check=True)
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    assert [(item.name, item.shape[1:]) for item in session.get_inputs()] == [
        ("images", [3, *SIZE])
    ]
    assert [(item.name, item.shape[1:]) for item in session.get_outputs()] == [("logits", [3])]
    for count in (1, 4):
        shown = images(count)
        (logits,) = session.run(None, {"images": shown.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(logits), logits_of(checkpoint, shown, ema=True), atol=1e-4, rtol=0
        )
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == NAMES
    assert metadata["commit"] == "0123abcd"

    plain = export.read_plain(
        str(checkpoint), ema=False
    )  # the file holds the averaged weights: that is noticed
    with pytest.raises(RuntimeError, match="differ"):
        export.check_onnx(plain, output.read_bytes())


@pytest.mark.parametrize(
    ("output", "missing"),
    [
        ("model.onnx", ["onnx", "onnxscript"]),
        ("model.onnx", ["onnxscript"]),
        ("model.safetensors", ["safetensors"]),
    ],
)
def test_missing_packages_are_named_with_the_command(
    checkpoint: Path,
    output: str,
    missing: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "is_installed", lambda name: name not in missing)
    assert run("--resume", checkpoint, "--output", checkpoint.with_name(output)) == 2
    assert f"pip install {' '.join(missing)}\n" in capsys.readouterr().err


def test_a_package_that_is_not_there_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert export.is_installed("json")
    monkeypatch.setitem(sys.modules, "json", None)
    assert not export.is_installed("json")


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "output", "message"),
    [
        ({}, "model.pt", "name a .safetensors or .onnx file"),
        ({}, "model", "name a .safetensors or .onnx file"),
        ({}, "missing/model.safetensors", "does not exist"),
        ({"ema": None}, "model.safetensors", "checkpoint.pth: the checkpoint holds no ema"),
        ({"data": {}}, "model.safetensors", "holds no image_spec and class_names"),
        ({"data": None}, "model.safetensors", "holds no image_spec and class_names"),
        (
            {"data": {"class_names": NAMES, "image_spec": {"size": 3}}},
            "model.safetensors",
            "damaged",
        ),
        (
            {"model_config": {"name": "vit_nano_patch4_32"}},
            "model.safetensors",
            "model_config is damaged",
        ),
    ],
)
def test_wrong_input_gives_a_message_and_code_2(
    tmp_path: Path,
    changes: dict[str, Any],
    output: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_checkpoint(tmp_path / "checkpoint.pth", **changes)
    assert run("--resume", path, "--output", tmp_path / output, "--ema") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_missing_and_foreign_checkpoints_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model.safetensors"
    assert run("--resume", tmp_path / "missing.pth", "--output", output) == 2
    assert "there is no file" in capsys.readouterr().err
    torch.save({"model": {"head.weight": torch.zeros(1)}}, tmp_path / "foreign.pth")
    assert run("--resume", tmp_path / "foreign.pth", "--output", output) == 2
    assert "foreign.pth: the checkpoint holds no model_config" in capsys.readouterr().err
    (tmp_path / "text.pth").write_text("no checkpoint")
    assert run("--resume", tmp_path / "text.pth", "--output", output) == 2
    assert not output.exists()


def test_both_files_have_to_be_named() -> None:
    for words in (["--output", "model.onnx"], ["--resume", "checkpoint.pth"]):
        with pytest.raises(SystemExit) as stop:
            export.main(words)
        assert stop.value.code == 2


# ---------------------------------------------------------------------------------------- torch.hub


def load(name: str, *words: Any, **settings: Any) -> Any:
    return torch.hub.load(str(ROOT), name, *words, source="local", **settings)


def test_the_hub_offers_what_the_scripts_train() -> None:
    trained = set()
    for script in (ROOT / "scripts").glob("*.sh"):
        trained |= set(re.findall(r"--model ([\w.]+)", script.read_text(encoding="utf-8")))
    assert trained <= set(hubconf.MODELS)
    assert {
        name for name in dir(hubconf) if callable(getattr(hubconf, name)) and name[0] != "_"
    } == set(hubconf.MODELS)
    for name in hubconf.MODELS:
        assert getattr(hubconf, name).__doc__.startswith(f"{name}. The plain network in eval mode.")


def test_every_entry_builds_its_network() -> None:
    for name in hubconf.MODELS:
        with torch.device("meta"):
            network = load(name, num_classes=5)
        assert network.num_classes == 5
        assert not network.training


@pytest.mark.parametrize("ema", [False, True])
def test_the_hub_reads_a_checkpoint(checkpoint: Path, ema: bool) -> None:
    network = load("vit_nano_patch4_32", checkpoint=str(checkpoint), ema=ema)
    assert not any(module.training for module in network.modules())
    shown = images()
    with torch.no_grad():
        assert torch.equal(network(shown), logits_of(checkpoint, shown, ema))
    assert set(network.state_dict()) == set(
        restore_model(load_checkpoint(checkpoint)).network.state_dict()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained": True}, "no trained weights are published"),
        ({"ema": True}, "ema is for checkpoint="),
        ({"checkpoint": "missing.pth"}, "there is no file missing.pth"),
        ({"checkpoint": "HERE", "num_classes": 5}, "the checkpoint sets num_classes"),
        ({"checkpoint": "HERE"}, "holds a vit_nano_patch4_32, not a deit_tiny_patch16_224"),
    ],
)
def test_the_hub_refuses_with_the_reason(
    checkpoint: Path, settings: dict[str, Any], message: str
) -> None:
    if settings.get("checkpoint") == "HERE":
        settings = {**settings, "checkpoint": str(checkpoint)}
    with pytest.raises(Exception, match=message) as stop:
        load("deit_tiny_patch16_224", **settings)
    assert type(stop.value).__name__ == "InputError"


@pytest.mark.parametrize(
    "place", [Path("/elsewhere"), ROOT / ".venv" / "lib"], ids=["elsewhere", "environment"]
)
def test_the_hub_takes_our_modules_whatever_the_caller_has_by_their_names(
    checkpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """`utils`, `models` and `datasets` are everybody's names: theirs stay theirs, and ours are used
    meanwhile."""
    from timm.models import (
        _registry,
    )  # our models are registered a second time inside: not for the tests that follow

    monkeypatch.setattr(_registry, "_model_entrypoints", dict(_registry._model_entrypoints))
    theirs: dict[str, ModuleType] = {}
    for name in ("utils", "models", "models.build", "datasets", "checkpoints"):
        theirs[name] = ModuleType(name)
        theirs[name].__file__ = str(place / f"{name.replace('.', '/')}.py")
        monkeypatch.setitem(sys.modules, name, theirs[name])
    before = {key for key in sys.modules if key.partition(".")[0] in theirs}
    for _ in range(2):
        network = load("vit_nano_patch4_32", checkpoint=str(checkpoint))
        assert not [warning for warning in recwarn if "Overwriting" in str(warning.message)]
    assert network(images()).shape == (2, 3)
    # timm's classes can be pickled. PVT's cannot here, as hubconf.py says, but its weights can.
    torch.save(network, io.BytesIO())
    pvt, file = load("pvt_tiny", num_classes=2), io.BytesIO()
    with pytest.raises(pickle.PicklingError, match=r"models\.pvt"):
        torch.save(pvt, io.BytesIO())
    torch.save(pvt.state_dict(), file)
    file.seek(0)
    load("pvt_tiny", num_classes=2).load_state_dict(torch.load(file, weights_only=True))
    assert {key for key in sys.modules if key.partition(".")[0] in theirs} == before
    assert all(sys.modules[name] is module for name, module in theirs.items())
