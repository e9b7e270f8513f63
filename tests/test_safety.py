"""No file that is read runs code, nothing unverified is downloaded, and one machine's processes
keep to themselves.

Longer than the working limit: the promises are about all places at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.utils import EntryNotFoundError
from safetensors.torch import save_file
from torch import nn

import hubconf
from config import second_networks
from errors import InputError, run_command
from models.build import build_model
from models.weights import load_strictly, pick_weights, plain_weights, restore_model
from storage import checkpoint_schema, downloads
from storage.checkpoints import load_checkpoint, save_checkpoint
from tests import malicious
from tests.image_folders import make_image_folder
from tests.runs import SMALL, run_small, split

ROOT = Path(__file__).resolve().parent.parent

# --------------------------------------------------------------------- every flag that takes a file


def programs() -> list[str]:
    """Modules with a command line."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py")]
    found = [path for path in files if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found)


class Asked(Exception):
    """Stands for the parsing of a command line."""


def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser that a program's `main` asks first."""
    asked: list[argparse.ArgumentParser] = []

    def parse_known_args(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        asked.append(parser)
        raise Asked

    with (
        patch.object(argparse.ArgumentParser, "parse_known_args", parse_known_args),
        pytest.raises(Asked),
    ):
        importlib.import_module(program).main([])
    return asked[0]


def text_flags(program: str) -> set[str]:
    """Flags whose value is free text: names, folders, and files."""
    return {
        f"{program} {max(action.option_strings, key=len, default=action.dest)}"
        for action in parser_of(program)._actions
        if action.nargs != 0 and action.type in (None, str, Path) and action.choices is None
    }


MIX = "--mixer attentivemix --data-path {photos}"
TRAIN = f"{SMALL} --data-path {{photos}}"
DISTIL = (
    "--model deit_runs_distilled_patch4_16 --distillation-type soft --teacher-model test_resnet"
)
SHOW = "--model vit_nano_patch4_32 --data-set DIGITS --device cpu --output {folder}/mixed.png"

# Each place that takes a file, with a command line that gives it one. {file} is the file, {folder}
# one that holds it as checkpoint.pth.
PLACES = {
    "main --resume": f"{TRAIN} --resume {{file}}",
    "main --resume with --eval": "--eval --device cpu --data-path {photos} --resume {file}",
    "main --auto-resume": f"{TRAIN} --output-dir {{folder}} --auto-resume",
    "main --finetune": f"{TRAIN} --finetune {{file}}",
    "main --teacher-path": f"{TRAIN} {DISTIL} --teacher-path {{file}}",
    "main --attentive-teacher": f"{TRAIN} {MIX} --attentive-teacher {{file}}",
    "main --attentive-teacher NAME=": f"{TRAIN} {MIX} --attentive-teacher test_resnet={{file}}",
    "main --motivator": f"{TRAIN} --motivator {{file}}",
    "main --motivator NAME=": f"{TRAIN} --motivator vit_nano_patch4_32={{file}}",
    "tools.export --resume": "--resume {file} --output {folder}/model.safetensors",
    "tools.export --resume with --ema": "--resume {file} --output {folder}/model.onnx --ema",
    "tools.show_mixing --resume": (
        "--data-set DIGITS --device cpu --output {folder}/mixed.png --resume {file}"
    ),
    "tools.show_mixing --weights": f"{SHOW} --weights {{file}}",
    "tools.show_mixing --attentive-teacher": (
        f"{SHOW} --mixer attentivemix --attentive-teacher {{file}}"
    ),
    "tools.show_mixing --attentive-teacher NAME=": (
        f"{SHOW} --mixer all --attentive-teacher test_resnet={{file}}"
    ),
}

# Flags of free text from which no program reads a file of weights.
NAMES = {
    "--model",
    "--teacher-model",
    "--opt",
    "--sched",
    "--data-set",
    "--aa",
    "--train-interpolation",
    "--remode",
    "--accept-changes",
}
IMAGES = {"--data-path"}  # a folder of images
FLAGS = {"--config"}  # YAML, of which only the words are used: tests/test_config_files.py
RUNS = {"root"}  # a folder of runs, of which the report reads text and pictures
WRITTEN = {"--output", "--output-dir", "--job-dir"}
SLURM = {
    "--partition",
    "--comment",
    "--constraint",
    "--account",
    "--qos",
    "--sbatch",
    "--exclude",
    "--name",
}


def test_every_flag_that_takes_a_file_is_given_malicious_ones() -> None:
    tried = {" ".join(place.split()[:2]) for place in PLACES}
    harmless = NAMES | IMAGES | FLAGS | RUNS | WRITTEN
    found = set()
    for program in programs():
        here = harmless | SLURM if program == "run_with_submitit" else harmless
        found |= {flag for flag in text_flags(program) if flag.split()[1] not in here}
    assert found == tried - {"main --auto-resume"}  # a switch: its file is in --output-dir


def test_a_new_flag_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import export

    parser = export.get_args_parser()
    parser.add_argument("--statistics", type=Path)
    monkeypatch.setattr(export, "get_args_parser", lambda: parser)
    assert text_flags("tools.export") - set(PLACES) == {
        "tools.export --output",
        "tools.export --statistics",
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(
        tmp_path_factory.mktemp("photos"), ("ant", "bee", "cat"), per_class=4, size=(20, 20)
    )


def outcome(program: str, words: list[str]) -> int:
    try:
        return run_command(lambda: importlib.import_module(program).main(words))
    except SystemExit as leaving:  # the parser's way out
        return int(leaving.code or 0)


@pytest.mark.parametrize("kind", malicious.KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_p6_a_malicious_file_runs_nothing(
    place: str, kind: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, marker = tmp_path / "checkpoint.pth", tmp_path / "executed"
    named = malicious.write(kind, file, marker)
    line = PLACES[place].format(file=file, folder=tmp_path, photos=photos)
    assert outcome(place.split()[0], split(line)) == 2
    told = capsys.readouterr().err
    assert told.count("error: ") == 1
    assert str(file) in told
    assert named in told
    assert "nothing was executed" in told
    assert "Traceback" not in told
    assert not marker.exists()


@pytest.mark.parametrize("kind", malicious.KINDS)
def test_a_malicious_file_runs_nothing_in_torch_hubs_entries(kind: str, tmp_path: Path) -> None:
    file, marker = tmp_path / "checkpoint.pth", tmp_path / "executed"
    named = malicious.write(kind, file, marker)
    for name in hubconf.MODELS:
        with pytest.raises(
            InputError, match=f"{re.escape(str(file))}.*{re.escape(named)}.*nothing was executed"
        ):
            getattr(hubconf, name)(checkpoint=str(file))
    assert not marker.exists()


@pytest.mark.parametrize(
    "kind", [kind for kind in malicious.KINDS if "pickle" not in kind]
)  # torch.load's own formats
def test_each_of_these_files_is_a_threat(kind: str, tmp_path: Path) -> None:
    malicious.write(kind, tmp_path / "evil.pth", tmp_path / "executed")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_is_no_file_of_torch_save_is_refused(tmp_path: Path) -> None:
    """TorchScript carries code of its own; the oldest format is a tar file that is unpacked; numpy
    pickles objects."""
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pth"))
    (tmp_path / "a").write_bytes(b"\x80\x02}.")
    for name in ("storages", "tensors", "pickle"):
        shutil.copy(tmp_path / "a", tmp_path / name)
    subprocess.run(
        ["tar", "cf", "old.pth", "storages", "tensors", "pickle"], cwd=tmp_path, check=True
    )
    (tmp_path / "array.pth").write_bytes(
        b"\x93NUMPY\x01\x00" + b"\x76\x00{'descr': '|O'" + b" " * 103 + b"\n\x80\x02."
    )
    for name in ("script.pth", "old.pth", "array.pth"):
        with pytest.raises(
            InputError, match=f"{name} (is truncated or corrupt, or no checkpoint|contains pickled)"
        ):
            load_checkpoint(tmp_path / name)


def test_cifars_pickles_are_those_that_were_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchvision unpickles them, once their checksums are right."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        malicious.write("pickle", folder / name, tmp_path / "executed")
    assert outcome("main", split(SMALL, "--data-set CIFAR10 --data-path", tmp_path)) == 2
    assert f"--data-path {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------ what a checkpoint may ask to be built


@pytest.mark.parametrize(
    "planted",
    [
        {"pretrained": True},
        {"pretrained": True, "pretrained_cfg": {"file": "{evil}"}},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": "{evil}"}},
        {"pretrained": True, "pretrained_cfg": {"url": "https://host/weights.pth"}},
        {"pruned": True},
        {"features_only": True},
    ],
    ids=str,
)
def test_a_checkpoint_has_no_say_in_where_weights_come_from(
    planted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: Any, **__: Any) -> Any:
        pytest.fail("it was going to be read or fetched")

    for name in (
        "load_state_dict",
        "load_state_dict_from_hf",
        "load_state_dict_from_url",
        "download_cached_file",
    ):
        monkeypatch.setattr(f"timm.models._builder.{name}", fetch)
    model = build_model("vit_nano_patch4_32", 2, input_size=(16, 16))
    config = {"name": "vit_nano_patch4_32", "num_classes": 2, "input_size": [16, 16], **planted}
    save_checkpoint(tmp_path / "run.pth", {"model_config": config, "model": plain_weights(model)})
    with pytest.raises(InputError, match="model_config"):
        restore_model(load_checkpoint(tmp_path / "run.pth"))


@pytest.fixture(scope="module")
def checkpoint(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    run = run_small("--model-ema --data-path", photos, "--output-dir", folder)
    assert run.code == 0, run.err
    return load_checkpoint(folder / "checkpoint.pth")


def test_every_part_of_a_checkpoint_has_a_layout(checkpoint: dict[str, Any]) -> None:
    assert checkpoint.keys() == checkpoint_schema.PARTS.keys()
    assert checkpoint_schema.wrong_parts(checkpoint) == []


@pytest.mark.parametrize(
    "wrong", ["x", {"x": "y"}, [["x"]], torch.zeros(2, 2)], ids=["text", "dict", "list", "tensor"]
)
@pytest.mark.parametrize("part", checkpoint_schema.PARTS)
def test_an_altered_part_is_named(
    part: str, wrong: Any, checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    if (part, type(wrong)) in [("args", dict), ("versions", dict)]:  # that might be one
        wrong = {"x": torch.zeros(2)}
    torch.save({**checkpoint, part: wrong}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=rf"x\.pth: damaged or altered in {part}; use another"):
        load_checkpoint(tmp_path / "x.pth")


def test_a_checkpoint_names_no_other_file_of_its_folder(
    checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    """A run that goes on lets its checkpoint stand for these names: they must not lead
    elsewhere."""
    torch.save({**checkpoint, "names": ["../log.txt"]}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x\.pth: damaged or altered in names; use another"):
        load_checkpoint(tmp_path / "x.pth")


# ------------------------------------------------------------------------- files that hold too much


def ring() -> list[Any]:
    held: list[Any] = []
    held.append(held)
    return held


def many_times() -> list[Any]:
    """2 ** 40 zeros in a file of 1 kB."""
    held: list[Any] = [0]
    for _ in range(40):
        held = [held, held]
    return held


def deep() -> list[Any]:
    held: list[Any] = []
    for _ in range(400):
        held = [held]
    return held


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ring(), "nested more than 50 deep"),
        (deep(), "nested more than 50 deep"),
        (many_times(), "more than 1,000,000 parts"),
        (
            torch.zeros(1).expand(1 << 40),
            r"a tensor of shape \(1099511627776,\) is larger than its file",
        ),
        (torch.empty(1 << 40, device="meta"), "is larger than its file"),
    ],
    ids=["ring", "deep", "many times", "expanded", "meta"],
)
def test_a_file_cannot_keep_its_reader_busy(content: Any, message: str, tmp_path: Path) -> None:
    torch.save({"model": content}, tmp_path / "large.pth")
    with pytest.raises(InputError, match=rf"large\.pth is truncated or corrupt.*{message}"):
        load_checkpoint(tmp_path / "large.pth")


def test_a_packed_file_is_not_unpacked(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "plain.pth", {"w": torch.zeros(1_000_000)})
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, zipfile\n"
            "with zipfile.ZipFile('plain.pth') as a, zipfile.ZipFile('packed.pth', 'w', "
            "zipfile.ZIP_DEFLATED) as b:\n"
            "    [b.writestr(n.replace('plain/', 'packed/'), a.read(n)) for n in a.namelist()]",
        ],
        cwd=tmp_path,
        check=True,
    )
    with pytest.raises(InputError, match=r"packed\.pth .* would unpack to more than its size"):
        load_checkpoint(tmp_path / "packed.pth")


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.zeros(2, 3).to_sparse(),
        torch.empty(2, 3, device="meta"),
        None,
        3,
    ],
    ids=["complex", "sparse", "meta", "nothing", "number"],
)
def test_only_ordinary_tensors_are_weights(weight: Any) -> None:
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(InputError, match="weight: no ordinary tensor of numbers"):
        load_strictly(model, {"weight": weight, "bias": torch.ones(2)}, source="x")
    assert torch.equal(model.weight, before)
    with pytest.raises(
        InputError, match=r"no ordinary tensors of numbers: weight|no weights in this checkpoint"
    ):
        pick_weights({"model": {"weight": weight, "bias": torch.ones(2)}})


def test_names_of_weights_are_text() -> None:
    with pytest.raises(InputError, match="no weights in this checkpoint"):
        pick_weights({"model": {0: torch.ones(1)}})


# ------------------------------------------------------------------------------------ what we write


def pickles_in(folder: Path) -> list[Path]:
    starts = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if path.read_bytes()[:4].startswith(starts)]


def test_p6_every_file_of_a_run_is_plain_data(photos: Path, tmp_path: Path) -> None:
    run = run_small("--model-ema --epochs 2 --data-path", photos, "--output-dir", tmp_path / "run")
    assert run.code == 0, run.err
    names = {path.name for path in pickles_in(tmp_path)}
    assert {"checkpoint.pth", "best_checkpoint.pth"} <= names
    words = split(
        "--resume", tmp_path / "run" / "checkpoint.pth", "--output", tmp_path / "model.safetensors"
    )
    assert outcome("tools.export", words) == 0
    assert (tmp_path / "model.safetensors").is_file()
    assert {path.name for path in pickles_in(tmp_path)} == names
    for path in pickles_in(tmp_path):
        assert list(torch.serialization.get_unsafe_globals_in_checkpoint(path)) == []
        torch.load(path, weights_only=True)


# --------------------------------------------------------------------- calls that would run content

# Calls that nothing here needs. A name that ends in * stands for all that begin like it.
FORBIDDEN = (
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "dill.*",
    "cloudpickle.*",
    "joblib.load",
    "marshal.*",
    "shelve.*",
    "pandas.read_pickle",
    "torch.jit.load",
    "torch.package.*",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.utils.model_zoo.*",
    "timm.*load*",
    "torch.utils.cpp_extension.*",
    "urllib.request.*",
    "requests.*",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
)


def full_names(tree: ast.AST) -> dict[str, str]:
    """Names that imports bind, and what they stand for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                names[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom):
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    return names


def unsafe_calls(source: str) -> list[str]:
    """What in a python file could run code that comes with data, load unverified data, or run a
    shell."""
    tree = ast.parse(source)
    names, found = full_names(tree), []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, dot, rest = ast.unparse(call.func).partition(".")
        name = names.get(first, first) + dot + rest
        given = {word.arg: getattr(word.value, "value", ...) for word in call.keywords}
        fetches = (
            given.get("pretrained", False) is not False and "pretrained_cfg_overlay" not in given
        )
        wrong = [
            any(
                re.fullmatch(pattern.replace(".", r"\.").replace("*", ".*"), name)
                for pattern in FORBIDDEN
            ),
            name == "torch.load" and given.get("weights_only") is not True,
            name == "numpy.load" and given.get("allow_pickle", False) is not False,
            name.startswith("subprocess.") and given.get("shell", False) is not False,
            name.startswith("timm.") and (fetches or "checkpoint_path" in given),
        ]
        if any(wrong):
            found.append(f"{call.lineno}: {ast.unparse(call)}")
    return found


def sources() -> Iterator[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    yield from (
        ROOT / name for name in listed if not name.startswith("tests/") and (ROOT / name).exists()
    )


def test_no_source_file_runs_what_it_reads() -> None:
    files = list(sources())
    assert {"main.py", "safe_load.py", "hubconf.py"} <= {path.name for path in files}
    assert {str(path): unsafe_calls(path.read_text(encoding="utf-8")) for path in files} == {
        str(path): [] for path in files
    }


@pytest.mark.parametrize(
    "planted",
    [
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=safe)",
        "import torch as _t\n_t.load(f)",
        "from torch import load\nload(f)",
        "import torch\ntorch.jit.load(f)",
        "import pickle\npickle.load(f)",
        "from pickle import loads as read\nread(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f)",
        "eval(text)",
        "exec(text)",
        "import subprocess\nsubprocess.run(line, shell=True)",
        "import os\nos.system(line)",
        "import timm\ntimm.create_model(name, pretrained=True)",
        "import timm\ntimm.create_model(name, checkpoint_path=f)",
        "import torch\ntorch.hub.load_state_dict_from_url(url)",
        "from urllib import request\nrequest.urlopen(url)",
    ],
)
def test_a_planted_unsafe_call_is_found(planted: str) -> None:
    assert unsafe_calls(planted)


def test_what_is_safe_is_passed_over() -> None:
    assert not unsafe_calls(
        "import torch\ntorch.load(f, weights_only=True)\nmodel.eval()\ntorch.compile(model)"
    )
    assert not unsafe_calls(
        "import json, re\njson.load(f)\nre.compile(text)\nimport numpy as np\nnp.load(f)"
    )


def test_shell_scripts_fetch_and_evaluate_nothing() -> None:
    for path in [*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci/run"]:
        code = re.sub(r"^\s*#.*", "", path.read_text(encoding="utf-8"), flags=re.M)
        assert not re.findall(r"(?<![-\w])(curl|wget|eval|nc)\s", code), path


def test_no_document_shows_an_unsafe_call() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for line in re.findall(r".*torch\.load\(.*", path.read_text(encoding="utf-8")):
            assert "weights_only=True" in line, path


# ---------------------------------------------------------------------------------------- downloads


@pytest.mark.parametrize(
    "url",
    [
        "https://[bad/name-0123abcd.pth",
        "https://host/na me-0123abcd.pth",
        "https://host/name-0123abcd.pth\r\nHeader: x",
        "ftp://host/name-0123abcd.pth",
        "https://host/name-0123abc.pth",
        "https://host/name-0123ABCD.pth",
        "https://host/name-0123abcd.pth/",
    ],
)
def test_what_cannot_be_verified_is_not_asked_for(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("asked for it")
    )
    with pytest.raises(InputError, match="cannot download"):
        load_checkpoint(url)


def hub_file(
    folder: Path, content: bytes, blob: str | None = None, name: str = "model.safetensors"
) -> Path:
    """A file as the hub's cache holds it: a link to a file named by its hash."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0123"
    blobs.mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True, exist_ok=True)
    place = blobs / (blob or hashlib.sha256(content).hexdigest())
    place.write_bytes(content)
    (snapshot / name).symlink_to(Path("..", "..", "blobs", place.name))
    return snapshot / name


def give(monkeypatch: pytest.MonkeyPatch, *files: Path) -> list[tuple[Any, ...]]:
    """Lets the hub have these files; returns what it was asked for."""
    asked: list[tuple[Any, ...]] = []

    def download(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        found = [file for file in files if file.name == name]
        if not found:
            raise EntryNotFoundError(f"no {name}")
        return str(found[0])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_a_file_of_the_hub_is_what_the_hub_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = hub_file(tmp_path, b"weights")
    asked = give(monkeypatch, file)
    assert downloads.from_hub("timm/x@v2") == file
    assert asked == [("timm/x", "model.safetensors", "v2")]
    file.resolve().write_bytes(b"Weights")
    with pytest.raises(
        ValueError, match=r"is damaged: its SHA-256 is [0-9a-f]{64}, the hub's is [0-9a-f]{64}"
    ):
        downloads.from_hub("timm/x")


def test_a_store_behind_the_hubs_cache_is_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = hub_file(tmp_path, b"weights")
    file.resolve().rename(tmp_path / "another hash")
    (tmp_path / "blobs" / hashlib.sha256(b"weights").hexdigest()).symlink_to(
        tmp_path / "another hash"
    )
    give(monkeypatch, file)
    assert downloads.from_hub("timm/x") == file


@pytest.mark.parametrize(
    "blob", [hashlib.sha1(b"weights").hexdigest(), "latest", "../../x" + "0" * 57]
)
def test_a_file_of_the_hub_without_a_hash_is_refused(
    blob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, hub_file(tmp_path, b"weights", blob.replace("/", "_")))
    with pytest.raises(ValueError, match=r"has no SHA-256 of .*cannot be verified"):
        downloads.from_hub("timm/x")
    (tmp_path / "model.safetensors").write_bytes(b"weights")  # a file system without links
    give(monkeypatch, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be verified"):
        downloads.from_hub("timm/x")


@pytest.mark.parametrize(
    ("pickled", "safe"),
    [
        (None, "model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("x.pth", "x.pth"),
    ],
)
def test_pickles_of_the_hub_come_second(
    pickled: str | None, safe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = pickled or "pytorch_model.bin"
    asked = give(monkeypatch, hub_file(tmp_path, b"weights", name=name))
    assert downloads.from_hub("timm/x", pickled).name == name
    assert [word[1] for word in asked] == ([safe, name] if safe != name else [name])


def show_by_name(tmp_path: Path) -> int:
    words = (
        "--model vit_nano_patch4_32 --data-set DIGITS --device cpu --mixer attentivemix --output "
        f"{tmp_path}/m.png"
    )
    return outcome("tools.show_mixing", split(words, "--attentive-teacher test_resnet"))


@pytest.mark.parametrize("kind", malicious.KINDS)
def test_a_malicious_file_of_the_hub_runs_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = malicious.write(kind, tmp_path / "evil", tmp_path / "executed")
    give(
        monkeypatch, hub_file(tmp_path, (tmp_path / "evil").read_bytes(), name="pytorch_model.bin")
    )
    assert show_by_name(tmp_path) == 2
    told = capsys.readouterr().err
    assert "pytorch_model.bin contains pickled objects" in told
    assert named in told
    assert not (tmp_path / "executed").exists()


def test_weights_come_from_the_hub_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = timm.create_model("test_resnet")
    save_file(network.state_dict(), tmp_path / "plain")
    file = hub_file(tmp_path, (tmp_path / "plain").read_bytes())
    asked = give(monkeypatch, file)
    features = second_networks.build_feature_map("test_resnet", (32, 32))
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors", None)]
    torch.testing.assert_close(
        dict(features.network.state_dict()), dict(network.state_dict()), rtol=0, atol=0
    )
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.resolve().write_bytes(content)
    assert show_by_name(tmp_path) == 2
    assert re.search(r"is damaged.*give a file: test_resnet=CHECKPOINT", capsys.readouterr().err)


@pytest.mark.parametrize("hashed", [True, False])
def test_weights_that_have_a_url_alone_need_its_hash(
    hashed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = timm.create_model("test_resnet")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    name = f"resnet-{hashlib.sha256(content).hexdigest()[:8]}.pth" if hashed else "resnet.pth"
    known = timm.get_pretrained_cfg("test_resnet")
    assert known is not None
    source = dataclasses.replace(known, hf_hub_id=None, url=f"https://host/{name}")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: source)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, dst, **_: Path(dst).write_bytes(content)
    )
    if hashed:
        built: Any = second_networks.build_feature_map("test_resnet", (32, 32)).network
        torch.testing.assert_close(
            dict(built.state_dict()), dict(network.state_dict()), rtol=0, atol=0
        )
    else:
        with pytest.raises(
            InputError, match=r"name ends in their hash.*give a file: test_resnet=CHECKPOINT"
        ):
            second_networks.build_feature_map("test_resnet", (32, 32))


# -------------------------------------------------------------------------- one machine's processes

PROBE = """
import os
import torch, torch.distributed as dist

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
own = {os.path.basename(file) for file in files}
found = []
for table in ("tcp", "tcp6"):
    for line in open(f"/proc/self/net/{table}").readlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in own:
            found.append(words[1].split(":")[0])
line = f"rank on {os.environ['MASTER_ADDR']} listens on {' '.join(found)}\\n"
os.write(1, line.encode())  # at once, not in pieces
dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/net/tcp"), reason="needs Linux's table of sockets"
)
def test_the_ranks_of_one_machine_listen_on_the_loopback_interface_alone(tmp_path: Path) -> None:
    """The launcher's own key store does listen on every interface, see `torchrun_words`."""
    (tmp_path / "probe.py").write_text(PROBE)
    code = (
        "import sys; from scripts.launch import run_several, torchrun_words; "
        "raise SystemExit(run_several([*torchrun_words(2, 1), sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "probe.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines() == ["rank on 127.0.0.1 listens on 0100007F"] * 2
    )  # that is 127.0.0.1 too


def test_every_place_is_a_program() -> None:
    check: Callable[[str], bool] = set(programs()).__contains__
    assert all(check(place.split()[0]) for place in PLACES)
