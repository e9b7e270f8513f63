"""Every command we show is one that its program takes, and every flag a program takes is one that
it reads.

Commands come from the fenced bash blocks of the documents, from docstrings, from the headers of
scripts, and from what the scripts print with --dry-run. What is not understood here fails, so that
nothing is passed over.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm.optim
import timm.scheduler.scheduler_factory
from torch.distributed.run import parse_args as parse_torchrun

from config.checks import check_args
from config.flags import get_args_parser
from config.parser import GONE, Parser, explicit_flags
from errors import InputError
from run.loop import Rules
from scripts import launch
from tools import show_mixing
from tools.runs.rows import read_tables
from tools.tables import __main__ as tables_command
from tools.tables.plan import Planner

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPTS = sorted(path for path in ROOT.glob("scripts/*.sh") if not path.name.startswith("_"))
MODULES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py")])
OTHER_PROGRAMS = {"source", "pip", "ruff", "mypy", "pre-commit", "tensorboard"}  # no parser of ours


class Row(NamedTuple):
    """A row of Table 1 of the paper, and where its recipe departs from DeiT's (None: the flag is
    left out)."""

    name: str
    model: str
    cutmix: float
    smmix: float
    largest: int  # images per process and micro-batch
    differs: dict[str, Any]


CAIT = {"eval_crop_ratio": 1.0}
PVT: dict[str, Any] = {"model_ema": False, "model_ema_decay": None}
PVT_LARGE = {**PVT, "drop_path": 0.3, "clip_grad": 1.0}
SWIN = {
    **PVT,
    "drop_path": 0.2,
    "clip_grad": 5.0,
    "warmup_epochs": 20,
    "warmup_lr": 5e-7,
    "min_lr": 5e-6,
    "repeated_aug": False,
    "repeats": None,
    "sched_on_updates": True,
    "scale_schedule": True,
}
TABLE_1 = {
    "deit_tiny": Row("DeiT-T", "deit_tiny_patch16_224", 72.2, 73.6, 256, {}),
    "deit_small": Row("DeiT-S", "deit_small_patch16_224", 79.8, 81.1, 256, {}),
    "deit_base": Row("DeiT-B", "deit_base_patch16_224", 81.8, 82.9, 64, {}),
    "cait_xxs24": Row(
        "CaiT-XXS-24", "cait_xxs24_224", 77.6, 78.9, 256, {**CAIT, "drop_path": 0.05}
    ),
    "cait_xxs36": Row("CaiT-XXS-36", "cait_xxs36_224", 79.1, 80.2, 256, CAIT),
    "pvt_tiny": Row("PVT-T", "pvt_tiny", 75.1, 76.4, 128, PVT),
    "pvt_small": Row("PVT-S", "pvt_small", 79.8, 81.0, 128, PVT),
    "pvt_medium": Row("PVT-M", "pvt_medium", 81.2, 82.2, 128, PVT_LARGE),
    "pvt_large": Row("PVT-L", "pvt_large", 81.7, 82.7, 128, PVT_LARGE),
    "swin_tiny": Row("Swin-T", "swin_tiny_patch4_window7_224", 81.2, 81.8, 128, SWIN),
}
# DeiT's recipe (arXiv 2012.12877, Table 9, and its code) as every script of Table 1 must spell it
# out.
RECIPE: dict[str, Any] = {
    "data_set": "IMNET",
    "input_size": [224],
    "eval_crop_ratio": 0.875,
    "epochs": 300,
    "total_batch": 1024,
    "amp": "fp16",
    "opt": "adamw",
    "opt_eps": 1e-8,
    "weight_decay": 0.05,
    "lr": 5e-4,
    "sched": "cosine",
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "drop": 0.0,
    "drop_path": 0.1,
    "model_ema": True,
    "model_ema_decay": 0.99996,
    "aa": "rand-m9-mstd0.5-inc1",
    "train_interpolation": "bicubic",
    "repeated_aug": True,
    "repeats": 3,
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_mode": "batch",
    "auto_resume": True,
}


# --------------------------------------------------------------------------------- finding commands


def joined(lines: list[str]) -> Iterator[str]:
    """Lines with their continuations, comments and empty lines left out."""
    text = "\n".join(lines).replace("\\\n", " ")
    yield from (
        line.strip()
        for line in text.splitlines()
        if line.strip() and not line.strip().startswith("#")
    )


def commands_of_document(text: str) -> list[str]:
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, flags=re.M | re.S)
    return [command for block in blocks for command in joined(block.splitlines())]


def commands_of_docstring(text: str) -> list[str]:
    """Indented lines that start like a command; a usage line with [] is none."""
    starts = ("python ", "torchrun ", "bash ")
    return [
        line
        for line in joined(text.splitlines())
        if f"    {line.split('  ')[0]}" in text and line.startswith(starts) and "[" not in line
    ]


def commands_of_header(text: str) -> list[str]:
    """Indented lines of a script's comment; a gap ends the command, and a usage line with [] is
    none."""
    lines = re.findall(r"^#   (bash .*)$", text, flags=re.M)
    return [re.split(r" {3,}", line)[0] for line in lines if "[" not in line]


def all_commands() -> list[tuple[str, str]]:
    found = [(path, commands_of_document(path.read_text())) for path in DOCUMENTS]
    for path in MODULES:
        found.append(
            (
                path,
                commands_of_docstring(
                    ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
                ),
            )
        )
    found += [(path, commands_of_header(path.read_text())) for path in SCRIPTS]
    return [
        (path.relative_to(ROOT).as_posix(), command)
        for path, commands in found
        for command in commands
    ]


# --------------------------------------------------------------------------------- parsing commands


def dry_run(words: list[str], **environment: str) -> str:
    """What a script prints with --dry-run; its messages of refusal as an AssertionError."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NNODES", "NODE_", "MASTER_"))
    }
    done = subprocess.run(
        ["bash", words[0], "--dry-run", *words[1:]],
        cwd=ROOT,
        env={**clean, "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_command(command: str) -> list[argparse.Namespace]:
    """Parses one command line as its program would, and what a script of ours would run in turn.

    Returns:
        The parsed flags of each call of main.py in it.
    """
    words = shlex.split(command, comments=True)
    environment = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    program, rest = words[0], words[1:]
    if program == "bash":
        assert (ROOT / rest[0]).is_file(), f"no script {rest[0]}"
        printed = dry_run(rest, **environment).splitlines()
        shown = [line for line in printed if not line.startswith("== ")]
        assert shown, f"{rest[0]} shows no command with --dry-run"
        return [args for line in shown for args in check_command(line)]
    if program == "torchrun":
        started = parse_torchrun(rest)
        return check_python([started.training_script, *started.training_script_args])
    if Path(program).name in ("python", "python3"):
        return check_python(rest)
    assert program in OTHER_PROGRAMS, f"no rule for {program}"
    return []


def without_files(words: list[str]) -> list[str]:
    """Without `--config FILE` of files that are not there, such as those that a page shows."""
    pairs = zip(["", *words], [*words, ""], strict=True)
    return [
        word
        for before, word in pairs
        if word
        and not (before == "--config" and not (ROOT / word).is_file())
        and not (word == "--config" and not (ROOT / words[words.index(word) + 1]).is_file())
    ]


def check_python(words: list[str]) -> list[argparse.Namespace]:
    """`main.py ...` or `-m module ...`."""
    if words[0] == "-m":
        if words[1] in ("venv", "pytest", "ruff", "mypy"):
            return []
        if words[1] == "tools.tables":
            return check_table(words[2:])
        name = "tools.report.__main__" if words[1] == "tools.report" else words[1]
        module = importlib.import_module(name)
        module.read_args(words[2:])
        return []
    if Path(words[0]).name == "launch.py":
        args, given = launch.get_args_parser().parse_known_args(words[1:])
        words = ["main.py", *launch.main_arguments(args, given)]
    assert Path(words[0]).name == "main.py", f"no rule for python {words[0]}"
    args = get_args_parser().parse_args(without_files(words[1:]))
    check_args(args)
    return [args]


def check_table(words: list[str]) -> list[argparse.Namespace]:
    """The runs that a command of tools.tables plans."""
    args, given = tables_command.get_args_parser().parse_known_args(words)
    tables = read_tables()
    if args.command == "list":
        return []
    args.weights = []  # no such files here
    runs = Planner(tables, tables.tables[args.table], args, given).runs()
    return [namespace for run in runs for namespace in check_python(run.command[1:])]


@pytest.mark.parametrize(("where", "command"), all_commands())
def test_every_command_shown_is_accepted(where: str, command: str) -> None:
    check_command(command)


def test_commands_are_found_in_all_the_places_that_have_them() -> None:
    places = {where for where, _ in all_commands()}
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "main.py",
        "tools/show_mixing.py",
        "scripts/deit_tiny.sh",
    } <= places
    assert any(
        "--finetune" in command and "--input-size 384" in command for _, command in all_commands()
    )


@pytest.mark.parametrize(
    "planted",
    [
        "python main.py --batchsize 64",
        "python main.py --batch 64",
        "torchrun --nproc_per_node=2 main.py --local-rank 0",
        "torchrun --nproc=2x --nosuch main.py",
        "python -m tools.show_mixing --nosuch",
        "bash scripts/deit_tiny.sh --data-path /imagenet --nproc 4 --nosuch",
        "python main.py --eval",
        "python other.py",
        "conda install torch",
    ],
)
def test_a_planted_wrong_command_is_found(planted: str) -> None:
    continued = planted.replace(" --", " \\\n    --", 1)
    document = f"Text.\n\n```bash\n# a comment\n{continued}\n```\n"
    (command,) = commands_of_document(document)
    assert shlex.split(command) == shlex.split(planted)
    with pytest.raises((SystemExit, AssertionError, InputError)):
        check_command(command)


def test_a_script_that_is_not_there_is_found() -> None:
    with pytest.raises(AssertionError, match="no script"):
        check_command("bash scripts/deit_huge.sh --data-path /imagenet")


# ------------------------------------------------------------------------------------- no dead flag


def names_read(source: str, variable: str) -> set[str]:
    """Attributes of `variable` that the source reads, also through getattr with a written-out
    name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and isinstance(node.ctx, ast.Load)
        ):
            found |= {node.attr} if node.value.id == variable else set()
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Attribute)
            and node.value.attr == variable
        ):
            found.add(node.attr)  # self.args.name
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "getattr"
        ):
            owner, name = node.args[:2]
            if (
                isinstance(owner, ast.Name)
                and owner.id == variable
                and isinstance(name, ast.Constant)
            ):
                found.add(str(name.value))
    return found


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions} - {"help"}


def read_by_methods() -> set[str]:
    """The flags that the mixers take from their options, and that the options read themselves."""
    files = [ROOT / "smmix.py", ROOT / "config/build_mixer.py", *(ROOT / "mixers").glob("*.py")]
    return {
        name
        for file in files
        for variable in ("options", "self")
        if variable == "options" or file.name.endswith("options.py")
        for name in names_read(file.read_text(), variable)
    }


def unread(parser: argparse.ArgumentParser) -> set[str]:
    """Flags of main.py that nothing reads: neither the files that see them, nor what these call."""
    names = ("resolve", "build", "build_guide", "build_mixer")
    files = ["main.py", *(f"config/{name}.py" for name in names)]
    texts = [(ROOT / file).read_text() for file in files]
    read = read_by_methods() | {*Rules._fields}
    for text, variable in itertools.product(texts, ("args", "flags")):
        read |= names_read(text, variable)
    helpers = {
        "optimizer_kwargs": timm.optim.optimizer_kwargs,
        "scheduler_kwargs": timm.scheduler.scheduler_factory.scheduler_kwargs,
    }
    for name, helper in helpers.items():
        assert any(f"{name}(flags)" in text for text in texts)
        read |= names_read(inspect.getsource(helper), "cfg")
    return flags_of(parser) - read


def test_every_flag_is_read() -> None:
    assert not unread(get_args_parser())
    module = Path(inspect.getfile(show_mixing)).read_text()
    read = names_read(module, "args") | read_by_methods()
    assert flags_of(show_mixing.get_args_parser()) <= read


def test_a_planted_dead_flag_is_found() -> None:
    parser = get_args_parser()
    parser.add_argument("--multi-reso", action="store_true")
    assert unread(parser) == {"multi_reso"}


# ----------------------------------------------------------------------------------------- spelling


def example(action: argparse.Action) -> list[str]:
    """Words that the flag takes."""
    if action.nargs == 0:
        return []
    word = str(next(iter(action.choices))) if action.choices else "1"
    return [word] * (action.nargs if isinstance(action.nargs, int) else 1)


LONG_FLAGS = [
    (option, action)
    for action in get_args_parser()._actions
    for option in action.option_strings
    if "-" in option.removeprefix("--") and action.dest != "help"
]


@pytest.mark.parametrize(("option", "action"), LONG_FLAGS, ids=[option for option, _ in LONG_FLAGS])
def test_hyphens_and_underscores_are_alike(option: str, action: argparse.Action) -> None:
    parser, words = get_args_parser(), example(action)
    other = "--" + option.removeprefix("--").replace("-", "_")
    expected = explicit_flags(parser, [option, *words])
    assert list(expected) == [action.dest]
    assert explicit_flags(parser, [other, *words]) == expected
    if len(words) == 1:
        assert explicit_flags(parser, [f"{other}={words[0]}"]) == expected


def test_underscores_in_values_stay() -> None:
    args = get_args_parser().parse_args(["--data_path=a_b/c_d", "--model", "deit_tiny_patch16_224"])
    assert (args.data_path, args.model) == ("a_b/c_d", "deit_tiny_patch16_224")


@pytest.mark.parametrize("spelling", ["{}", "{} 1", "{}=1", "underscores"])
@pytest.mark.parametrize("flag", GONE)
def test_flags_that_are_gone_say_what_to_use(
    flag: str, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "--" + flag[2:].replace("-", "_") if spelling == "underscores" else spelling.format(flag)
    with pytest.raises(SystemExit) as stopped:
        get_args_parser().parse_args(text.split())
    assert stopped.value.code == 2
    assert GONE[flag] in capsys.readouterr().err


@pytest.mark.parametrize("flag", GONE)
def test_what_a_gone_flag_advises_exists(flag: str) -> None:
    options = {option for action in get_args_parser()._actions for option in action.option_strings}
    advised = set(re.findall(r"--[a-z][a-z-]*(?![a-z_-])", GONE[flag])) - {
        flag
    }  # torchrun's have underscores
    assert advised <= options
    assert flag not in options


def test_deits_own_spelling_of_three_augment_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--ThreeAugment"])
    assert "--aa 3a" in capsys.readouterr().err


# ------------------------------------------------------------------------------- scripts of Table 1


def refusal(words: list[str], **environment: str) -> str:
    with pytest.raises(AssertionError) as refused:
        dry_run(words, **environment)
    return str(refused.value)


@pytest.mark.parametrize("size", TABLE_1)
def test_a_recipe_is_that_of_its_family(size: str) -> None:
    printed = dry_run([f"scripts/{size}.sh", "--data-path", "/imagenet", "--nproc", "4"])
    words = parse_torchrun(shlex.split(printed)[1:]).training_script_args
    written = explicit_flags(get_args_parser(), words)
    row = TABLE_1[size]
    wanted = {**RECIPE, **row.differs, "model": row.model, "batch_size": row.largest}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    place = {"config", "data_path", "output_dir"}
    assert {name: value for name, value in written.items() if name not in place} == wanted
    assert written["output_dir"] == str(ROOT / f"output/{size}_smmix")


@pytest.mark.parametrize("size", TABLE_1)
def test_headers_and_readme_quote_the_papers_table(size: str) -> None:
    row = TABLE_1[size]
    header = (ROOT / f"scripts/{size}.sh").read_text()
    assert f"CutMix {row.cutmix}, SMMix {row.smmix}" in header
    assert "Not run by us" in header
    processes, images = re.findall(r"(\d+) x (\d+) images per step", header)[0]
    assert (int(processes) * int(images), int(images)) == (1024, row.largest)
    assert f"| {row.name} | {row.cutmix} | {row.smmix} | " in (ROOT / "README.md").read_text()
    assert f"# {row.name} on ImageNet-1k" in header


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_without_mistakes_and_explain_themselves(script: Path) -> None:
    for path in (
        script,
        ROOT / "scripts/_common.sh",
        ROOT / ".ci/run",
    ):
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert ";;&" not in path.read_text()  # bash 3.2 of macOS
    assert f"bash scripts/{script.name}" in script.read_text()


# --------------------------------------------------------------------- quickstart, test.sh, .ci/run


def test_quickstart_trains_on_two_processes_and_evaluates_what_it_trained() -> None:
    printed = dry_run(["scripts/quickstart.sh", "--epochs", "1"])
    trained, evaluated = (
        args for line in printed.splitlines() if ".py" in line for args in check_command(line)
    )
    assert "scripts/launch.py --nproc 2 " in printed
    assert (trained.data_set, trained.mixer, trained.epochs, trained.device) == (
        "DIGITS",
        "smmix",
        1,
        "cpu",
    )
    assert evaluated.eval
    assert evaluated.resume == f"{trained.output_dir}/checkpoint.pth"


@pytest.mark.parametrize("words", [["--output-dir", "x"], ["--output_dir=x"]])
def test_quickstart_has_one_place_to_write_to(words: list[str]) -> None:
    assert "this script writes to output/quickstart" in refusal(["scripts/quickstart.sh", *words])


@pytest.fixture
def bare_project(tmp_path: Path) -> Path:
    """A folder with our shell files and an environment whose python only notes what it was asked
    for."""
    project = tmp_path / "a project"
    shutil.copytree(ROOT / "scripts", project / "scripts")
    shutil.copytree(ROOT / ".ci", project / ".ci")
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >>"{project}/calls"\n')
    python.chmod(0o755)
    for name in ("requirements.txt", "requirements-dev.txt"):
        (project / name).write_text("torch\n")
    return project


def test_a_mistyped_flag_does_not_cost_the_last_quickstart(bare_project: Path) -> None:
    (bare_project / ".venv/bin/python").write_text('#!/bin/sh\n[ "$1" != -c ]\n')
    kept = bare_project / "output/quickstart/log.txt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    command = ["bash", str(bare_project / "scripts/quickstart.sh"), "--nosuch"]
    assert subprocess.run(command, env=dict(os.environ), capture_output=True).returncode != 0
    assert kept.exists()


def use_environment(
    project: Path, *files: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    common = f'source "{project}/scripts/_common.sh"'
    script = f"set -euo pipefail; {common}; use_environment {' '.join(files)}"
    return subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_requirements_are_installed_once_and_again_when_they_change(bare_project: Path) -> None:
    def calls() -> int:
        return len((bare_project / "calls").read_text().splitlines())

    assert "installing requirements.txt" in use_environment(bare_project, "requirements.txt").stdout
    assert "reusing .venv" in use_environment(bare_project, "requirements.txt").stdout
    assert calls() == 1
    use_environment(bare_project, "requirements.txt", "requirements-dev.txt")
    assert calls() == 2
    (bare_project / "requirements.txt").write_text("torch>=3\n")
    use_environment(bare_project, "requirements.txt", "requirements-dev.txt")
    assert calls() == 3


def test_an_installation_that_fails_is_not_taken_for_done(bare_project: Path) -> None:
    (bare_project / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    for _ in range(2):
        failed = use_environment(bare_project, "requirements.txt")
        assert failed.returncode == 2
        assert "pip could not install requirements.txt" in failed.stderr


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            '[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1',
            "is Python 3.9.1; Python 3.10 or later",
        ),
        (None, "not found; install Python 3.10"),
        ('[ "$1" != -m ] || exit 1\necho Python 3.12.0', "cannot make an environment"),
    ],
)
def test_an_interpreter_that_will_not_do_is_refused(
    bare_project: Path, body: str | None, message: str
) -> None:
    shutil.rmtree(bare_project / ".venv")
    python = bare_project / "python"
    if body is not None:
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
    refused = use_environment(bare_project, "requirements.txt", PYTHON=str(python))
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not (bare_project / ".venv").exists()


def test_the_test_script_checks_before_it_tests_and_passes_arguments_on() -> None:
    printed = dry_run(["scripts/test.sh", "tests/test_smmix.py", "-k", "lam"]).splitlines()
    assert [line.strip() for line in printed] == [
        "python -m ruff check",
        "python -m ruff format --check",
        "python -m mypy .",
        "python -m pytest tests/test_smmix.py -k lam",
    ]


@pytest.mark.parametrize(
    ("printed", "status", "last", "wanted"),
    [
        ("3 passed in 0.10s", 0, "3 passed in 0.10s", 0),
        (
            "====== 3 passed, 1 warning in 61.20s (0:01:01) ======\nlate words",
            0,
            "3 passed, 1 warning in 61.20s",
            0,
        ),
        ("1 failed, 2 passed in 0.10s", 1, "1 failed, 2 passed in 0.10s", 1),
        ("no tests ran in 0.01s", 5, "0 tests ran", 5),
        ("2 skipped in 0.01s", 0, "2 skipped in 0.01s", 1),
        ("Found 1 error.", 1, "0 tests ran", 1),
        ("", 0, "0 tests ran", 1),
    ],
)
def test_ci_ends_with_the_count_of_tests_and_with_their_status(
    bare_project: Path, printed: str, status: int, last: str, wanted: int
) -> None:
    (bare_project / "scripts/test.sh").write_text(f"echo '{printed}'\nexit {status}\n")
    environment = {**os.environ, "CI_BROWSER": "0"}  # nothing is installed for this test
    done = subprocess.run(
        [str(bare_project / ".ci/run")], capture_output=True, text=True, env=environment
    )
    assert last in done.stdout.splitlines()[-1]
    assert done.returncode == wanted


def test_ci_runs_the_readmes_test_command() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "bash scripts/test.sh" in commands_of_document((ROOT / "README.md").read_text())
    assert "bash scripts/test.sh" in (ROOT / ".ci/run").read_text()


def test_the_parser_never_abbreviates() -> None:
    assert isinstance(get_args_parser(), Parser)
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--epoch", "3"])
