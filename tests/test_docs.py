"""What the documents say of the code is so: links, functions, flags, equations, the ten lines of
the README."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser as get_torchrun_parser

from config.flags import get_args_parser
from config.parser import GONE
from errors import flag_name
from mixers.options import PastingOptions
from mixers.registry import METHODS, all_flags, users
from models.interface import ImageModel
from scripts import launch
from tests import chaos, fuzz
from tools import check_data, export, show_mixing
from tools.bench import profile_step, run
from tools.tables import __main__ as tables
from utils import keyed_generator

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TEXTS = sorted(
    path
    for pattern in ("*.*", "NOTICE", ".ci/*", "scripts/**/*", "*/*.md", "*/**/*.py")
    for path in ROOT.glob(pattern)
    if path.is_file()
    and path.name != ".git"
    and path.suffix not in (".pth", ".pyc")
    and ".venv" not in path.parts
)
FLAGS_PAGE = ROOT / "docs/flags.md"
OTHER_FLAGS = {
    "--force-exclude",
    "--hook-type",
    "--check",
    "--logdir",
    "--help",
}
NOT_OFFERED = {"--cosub", "--attn-only", "--multi-reso", "--wandb-project", "--wandb-name"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


document = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)


# -------------------------------------------------------------------------------------------- links


def slugs(text: str) -> set[str]:
    """The anchors that headings get."""
    headings = re.findall(r"^#+ +(.*)$", prose(text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and anchor not in slugs(there.read_text())):
            broken.append(target)
    return broken


@document
def test_relative_links_lead_somewhere(path: Path) -> None:
    assert not broken_links(path, path.read_text())


def test_a_planted_broken_link_is_found() -> None:
    text = (
        "[a](docs/flags.md) [b](docs/nosuch.md) ![c](nosuch.png) [d](docs/flags.md#gone) "
        "[e](docs/flags.md#nosuch)"
    )
    assert broken_links(ROOT / "README.md", text) == [
        "docs/nosuch.md",
        "nosuch.png",
        "docs/flags.md#nosuch",
    ]


# ------------------------------------------------------------------------ files and their functions


NOT_OURS = {"log.txt", "__init__.py"}  # of a run; of any package


def definitions(path: Path) -> set[str]:
    """Functions, classes and assigned names of a file, and a class's own as `Class.name`."""
    found = set()

    def collect(body: list[Any], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            targets = (
                node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            )
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(path.read_text()).body, "")
    return found


def wrong_references(text: str) -> list[str]:
    """Code spans that look like `file.py`, `file.py:name` or `folder/file` and name nothing."""
    wrong = []
    for span in code_spans(text):
        match = re.fullmatch(
            r"((?:[\w.-]+/)*[\w-]+\.(?:py|sh|md|txt|toml)|\.ci/run)(?::([\w.]+))?", span
        )
        if match is None or match[1].startswith("output/") or match[1] in NOT_OURS:
            continue
        path = ROOT / match[1]
        if not path.is_file() or (match[2] and match[2] not in definitions(path)):
            wrong.append(span)
    return wrong


@document
def test_files_and_functions_that_are_named_exist(path: Path) -> None:
    assert not wrong_references(path.read_text())


def test_a_planted_wrong_reference_is_found() -> None:
    right = "`smmix.py:pick_regions` `smmix.py:SMMix.choose` `utils.py` `output/log.txt`"
    text = f"{right} `smmix.py:SMMix.nosuch` `smmix.py:nosuch` `nosuch.py`"
    assert wrong_references(text) == ["smmix.py:SMMix.nosuch", "smmix.py:nosuch", "nosuch.py"]


def test_every_equation_has_its_function() -> None:
    text = (ROOT / "docs/paper_to_code.md").read_text()
    rows = [
        line for line in text.partition("## Tables")[0].splitlines() if line.startswith("| Eq.")
    ]
    equations = {
        int(number) for row in rows for number in re.findall(r"Eq\. (\d+)", row.split("|")[1])
    }
    assert equations == set(range(1, 16))
    assert all(re.search(r"`[\w/]+\.py:\w+", row.split("|")[3]) for row in rows)


def test_a_function_that_names_its_equation_agrees_with_the_page() -> None:
    """Docstrings that begin with "Eq. 7: ..." belong to functions that the page lists under that
    equation."""
    page = (ROOT / "docs/paper_to_code.md").read_text().partition("## Tables")[0]
    named = 0
    for path in (
        ROOT / name
        for name in ("smmix.py", "losses.py", "models/interface.py", "mixers/interface.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text is None or not re.match(r"Eq\. \d+", text):
                continue
            assert isinstance(node, ast.FunctionDef)
            (row,) = [
                line
                for line in page.splitlines()
                if line.startswith("| Eq.") and f".{node.name}`" in line.replace(":", ".")
            ]
            numbers = set(re.findall(r"\d+", text.partition(":")[0]))
            assert numbers <= set(re.findall(r"\d+", row.split("|")[1])), f"{node.name}: {row}"
            named += 1
    assert named >= 6


# -------------------------------------------------------------------------------------------- flags


def known_flags() -> set[str]:
    tools = (show_mixing, check_data, export, run, profile_step, chaos, fuzz, launch, tables)
    parsers = [
        get_args_parser(),
        get_torchrun_parser(),
        *(tool.get_args_parser() for tool in tools),
    ]
    for action in tables.get_args_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    return {
        option
        for parser in parsers
        for action in parser._actions
        for option in action.option_strings
    }


def unknown_flags(text: str) -> set[str]:
    """Flags in code spans that nothing here takes."""
    spelled = {
        flag
        for span in code_spans(text)
        for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", span)
    }
    known = known_flags() | set(GONE) | OTHER_FLAGS | NOT_OFFERED
    return {flag for flag in spelled if not {flag, flag.replace("_", "-"), flag.lower()} & known}


@document
def test_flags_in_prose_exist(path: Path) -> None:
    assert not unknown_flags(path.read_text())


def test_a_planted_unknown_flag_is_found() -> None:
    assert unknown_flags(
        "`--batch_size 3`, `--nosuch`, `--no-repeated-aug`, `--nproc_per_node`"
    ) == {"--nosuch"}


def sections(text: str) -> dict[str, list[list[str]]]:
    """Heading -> the cells of the rows below it."""
    parts = re.split(r"^## +(.*)$", text, flags=re.M)[1:]
    tables = {}
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        rows = [
            line
            for line in body.splitlines()
            if line.startswith("| ") and not line.startswith(("| ---", "| flag"))
        ]
        tables[heading] = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return tables


def shown(default: Any) -> str:
    """A default as the page writes it."""
    if default in (None, "", []):
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    return (
        " ".join(str(item) for item in default)
        if isinstance(default, (tuple, list))
        else str(default)
    )


def same_default(written: str, default: Any) -> bool:
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        return float(written) == float(default)
    return written == shown(default)


def test_the_page_of_flags_has_every_flag_once_with_its_default() -> None:
    tables = sections(FLAGS_PAGE.read_text())
    rows = [
        row
        for title in ("Same as in DeiT", "Another default or meaning", "New here")
        for row in tables[title]
    ]
    written = [row[0].strip("`") for row in rows]
    actions = {
        action.option_strings[0]: action
        for action in get_args_parser()._actions
        if action.dest != "help"
    }
    assert len(written) == len(set(written))
    assert set(written) == set(actions)
    wrong = [
        row[:2] for row in rows if not same_default(row[1], actions[row[0].strip("`")].default)
    ]
    assert not wrong


RANGES = {
    None: "",
    "positive": "above 0",
    "not_negative": "0 or more",
    "shares": "0 to 1",
    "ranges": "two shares, the lower first",
}


def flags_by_mixer() -> list[list[str]]:
    """The rows of the flags that not every method has."""
    pasting = [name for name, one in METHODS.items() if issubclass(one.options, PastingOptions)]
    rows = []
    for name, flag in all_flags().items():
        whose = "all that paste" if users(name) == pasting else ", ".join(users(name))
        if flag.with_con:
            whose = "smmix; with `--con-weight` above 0 all that paste"
        if users(name) != list(METHODS):
            rows.append([f"`{flag_name(name)}`", RANGES[flag.limit], whose])
    return rows


def test_the_page_of_flags_says_which_mixer_has_which() -> None:
    rows = flags_by_mixer()
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("|  |", "| |")
    assert sections(FLAGS_PAGE.read_text())["Flags of single mixers"] == rows, table


def test_the_page_of_flags_has_every_gone_flag() -> None:
    rows = sections(FLAGS_PAGE.read_text())["Gone"]
    written = {
        flag.replace("_", "-").lower()
        for row in rows
        for flag in re.findall(r"`(--\w[\w-]*)`", row[0])
    }
    assert written == set(GONE)


@pytest.mark.parametrize("flag", sorted(NOT_OFFERED))
def test_what_is_said_to_be_refused_is(flag: str) -> None:
    with pytest.raises(SystemExit):
        get_args_parser().parse_args([flag])


# ----------------------------------------------------------------------------------- README's lines


def readme_block() -> str:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S
    )
    (block,) = [block for block in blocks if "SMMixLoss" in block]
    return block


def test_smmix_in_ones_own_loop_is_ten_lines_that_train() -> None:
    block = readme_block()
    lines = [
        line for line in block.splitlines() if line and not line.startswith(("import ", "from "))
    ]
    assert len(lines) <= 11
    images = torch.randn(3, 5, 3, 32, 32, generator=keyed_generator("readme"))  # three odd batches
    loader = [(batch, torch.arange(5)) for batch in images]
    names: dict[str, Any] = {"loader": loader}
    before, _, loop = block.partition("for step")
    exec(compile(before, "README.md", "exec"), names)
    model = names["model"]
    assert isinstance(model, ImageModel)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    exec(compile("for step" + loop, "README.md", "exec"), names)
    assert names["step"] == 2
    still = [name for name, value in model.state_dict().items() if torch.equal(value, start[name])]
    assert not still
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert names["batch"].regions is not None
    assert model.training


# -------------------------------------------------------------------------------------------- words

# Absolute folders of one machine, and where packages come from: neither belongs into a project.
FOLDERS = ("work", "root", "home", "tmp", "mnt", "opt", "Users")
SOURCES = (
    "-".join(("index", "url")),
    "-".join(("find", "links")),
    "file:" + "///",
    ".".join(("pypi", "org")),
)
PRIVATE = re.compile(
    rf"(?<![\w.}}])/(?:{'|'.join(FOLDERS)})/\w|" + "|".join(map(re.escape, SOURCES))
)


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_nothing_names_somebodys_machine(path: Path) -> None:
    assert not [line for line in path.read_text().splitlines() if PRIVATE.search(line)]


def test_a_planted_machine_is_found() -> None:
    planted = [f"see /{folder}/me/data" for folder in FOLDERS] + [
        f"--extra-{SOURCES[0]} x",
        SOURCES[-1],
    ]
    assert all(PRIVATE.search(line) for line in planted)
    fine = (
        "/imagenet",
        "output/tmp/x",
        "https://github.com/facebookresearch/deit",
        "/path/to/python3",
    )
    assert not any(PRIVATE.search(line) for line in fine)


def test_what_was_not_run_says_so() -> None:
    text = (ROOT / "README.md").read_text()
    results = text.split("## Results")[1].split("\n## ")[0]
    rows = [line for line in results.splitlines() if line.startswith("|") and "%" in line]
    assert rows
    assert all(re.match(r"\| `(bash|python|torchrun) ", row) for row in rows), (
        "a figure names the command that gave it"
    )
    table = [line for line in text.splitlines() if line.startswith("| DeiT-")]
    assert len(table) == 3
    assert all("[deit_" in line for line in table)
    assert "| model | CutMix (paper) | SMMix (paper) | SMMix (ours) | script |" in text


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
