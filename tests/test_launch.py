"""`scripts/launch.py` and the scripts over it: the command they start, and how they end."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, ProcessFailure

from scripts import launch
from tests.runs import ROOT

MODELS = sorted(path.stem for path in ROOT.glob("scripts/*_*.sh") if path.stem[0] != "_")
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
MACHINES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
TINY = "--data-set DIGITS --model vit_nano_patch4_32 --input-size 24 --device cpu --num-workers 0"


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    with patch.dict(os.environ):
        for name in (*INTERFACES, *MACHINES):
            os.environ.pop(name, None)
        yield


def started(*words: str, **environment: str) -> list[str]:
    """The command that is run: plain python, or torchrun's arguments behind its name."""
    os.environ.update(environment)
    several = patch.object(launch, "run_several")
    with several as torchrun, patch.object(os, "execv", side_effect=SystemExit) as python:
        with suppress(SystemExit):
            launch.main(words)
        (call,) = [*torchrun.mock_calls, *python.mock_calls]
    return ["torchrun", *call.args[0]] if torchrun.called else list(call.args[1])


def refusal(capsys: pytest.CaptureFixture[str], *words: str, **environment: str) -> str:
    os.environ.update(environment)
    with pytest.raises(SystemExit) as refused:
        launch.main(words)
    assert refused.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# -------------------------------------------------------------------------------------- the command


def test_one_process_is_plain_python_with_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    command = started("--recipe", "deit_small", "--nproc", "1", "--data-path", "/imagenet")
    assert command == [
        sys.executable,
        str(ROOT / "main.py"),
        "--config",
        str(ROOT / "recipes/deit_small.yaml"),
        "--data-path",
        "/imagenet",
        "--output-dir",
        str(ROOT / "output/deit_small_smmix"),
    ]
    assert capsys.readouterr().out == shlex.join(command) + "\n"


def test_several_processes_are_torchruns(capsys: pytest.CaptureFixture[str]) -> None:
    command = started("--nproc=4", "--epochs", "3", "--min-lr", "-1")
    local = ["torchrun", "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=4"]
    assert command == [*local, str(ROOT / "main.py"), "--epochs", "3", "--min-lr", "-1"]
    assert capsys.readouterr().out == shlex.join(command) + "\n"


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("", "output/deit_tiny_smmix"),
        ("--mixer cutmix", "output/deit_tiny_cutmix"),
        ("--mixer cutmix --mixer=none", "output/deit_tiny_none"),
        ("--output_dir a_b", "a_b"),
        ("--output=a_b", "a_b"),
    ],
)
def test_the_output_folder_is_named_after_recipe_and_mixer(words: str, folder: str) -> None:
    command = started("--recipe", "deit_tiny", "--device", "cpu", *words.split())
    assert command[-2:] == ["--output-dir", str(ROOT / folder) if "/" in folder else folder]
    assert not {"--output", "--output=a_b"} & set(command)


def test_underscores_in_names_are_hyphens_and_stay_in_values() -> None:
    command = started("--data_set", "A_B", "--data_path=a_b/c_d", "--nproc", "1")
    assert command[2:] == ["--data-set", "A_B", "--data-path=a_b/c_d"]


@pytest.mark.parametrize(
    ("gpus", "words", "processes"),
    [(4, "", 4), (0, "", 1), (4, "--device cpu", 1), (4, "--device=cpu", 1), (4, "--nproc 2", 2)],
)
def test_each_gpu_gets_a_process(
    gpus: int, words: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os.path, "exists", lambda path: True)  # the driver of a GPU
    command = started(*words.split())
    assert (command[0] == sys.executable) == (processes == 1)
    assert processes == 1 or f"--nproc_per_node={processes}" in command


def test_a_dry_run_shows_the_command_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    fail = patch.object(os, "execv", side_effect=AssertionError)
    with fail, patch.object(launch, "run_several", side_effect=AssertionError):
        for count, program in (("1", sys.executable), ("2", "torchrun")):
            assert launch.main(["--nproc", count, "--dry-run", "--epochs", "3"]) == 0
            shown = shlex.split(capsys.readouterr().out)
            assert (shown[0], shown[-2:]) == (program, ["--epochs", "3"])


@pytest.mark.parametrize("model", MODELS)
def test_a_script_works_from_any_folder(model: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / f"scripts/{model}.sh"), "--nproc", "2", "--dry-run", "--epochs", "3"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    config, output = ROOT / f"recipes/{model}.yaml", ROOT / f"output/{model}_smmix"
    assert words[words.index(str(ROOT / "main.py")) + 1 :] == [
        *("--config", str(config), "--epochs", "3", "--output-dir", str(output))
    ]


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5", "", "²"])
def test_a_wrong_number_of_processes_is_refused(
    count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, f"--nproc={count}").endswith(": must be a whole number above 0")
    assert "NNODES" in refusal(capsys, "--nproc=2", NNODES=count)


def test_an_unknown_recipe_is_named_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = refusal(capsys, "--recipe", "deit_huge")
    assert "--recipe deit_huge: no such recipe" in told
    assert all(f"{model}" in told for model in MODELS)
    assert "--recipe: expected one argument" in refusal(capsys, "--recipe")


# --------------------------------------------------------------------------- one and more machines


@pytest.mark.parametrize("given", [LOOPBACK, "eth7"])
def test_one_machines_processes_keep_to_the_loopback_or_a_named_interface(given: str) -> None:
    if given != LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = given
    launch.torchrun_words(2, 1)
    assert [os.environ[name] for name in INTERFACES] == [given, LOOPBACK]


def test_several_machines_are_named_and_choose_their_interface() -> None:
    machines = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    for more, port in (({}, 29500), ({"MASTER_PORT": "1234"}, 1234)):
        assert started("--nproc", "1", **machines, **more) == [
            *("torchrun", "--nnodes=2", "--node_rank=1", "--master_addr=node0"),
            *(f"--master_port={port}", "--nproc_per_node=1", str(ROOT / "main.py")),
        ]
    assert not set(INTERFACES) & os.environ.keys()


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, "NNODES=2 needs MASTER_ADDR"),
        ({"MASTER_ADDR": "node0"}, "and NODE_RANK"),
        ({"MASTER_ADDR": "node0", "NODE_RANK": "2"}, "NODE_RANK 2: must be one of 0 to 1"),
        ({"MASTER_ADDR": "node0", "NODE_RANK": "x"}, "NODE_RANK x: must be one of 0 to 1"),
        ({"MASTER_ADDR": "node0", "NODE_RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT x: must be"),
    ],
)
def test_what_several_machines_lack_is_named(
    environment: dict[str, str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wanted in refusal(capsys, "--nproc", "1", NNODES="2", **environment)


# -------------------------------------------------------------------------------------- how it ends


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/launch.py"), *TINY.split(), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.mark.slow
def test_one_process_ends_with_its_own_error() -> None:
    done = run("--epochs", "0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --epochs 0")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_several_processes_end_with_the_first_cause(tmp_path: Path) -> None:
    done = run("--nproc", "2", "--data-set", "IMNET", "--data-path", str(tmp_path / "nosuch"))
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "nosuch" in last
    assert "Root Cause" not in done.stderr
    assert "Traceback" not in done.stderr


def test_torchrun_handles_no_signal_that_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with patch("torch.distributed.run.run") as run:
            assert launch.run_several(["--nproc_per_node=2", "main.py"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.call_args.args[0].signals_to_handle == "SIGTERM,SIGINT,SIGQUIT"


def failed(exit_code: int, file: Path = Path("nosuch")) -> ProcessFailure:
    return ProcessFailure(local_rank=1, pid=123, exitcode=exit_code, error_file=str(file))


def test_the_cause_is_one_line_for_every_kind_of_failure(tmp_path: Path) -> None:
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(tmp_path / "error.json")
    try:
        raise RuntimeError("first line\nsecond line")
    except RuntimeError as error:
        ErrorHandler().record_exception(error)
    unexpected = failed(1, tmp_path / "error.json")
    assert launch.first_cause(5, unexpected) == "error: process 5: RuntimeError: first line"
    killed = launch.first_cause(5, failed(-9))
    assert killed == "error: process 5: Signal 9 (SIGKILL) received by PID 123"
    assert launch.first_cause(5, failed(7)) == "error: process 5: ended with exit code 7"
