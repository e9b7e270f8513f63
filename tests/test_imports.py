"""Imports point one way: the levels of the table in `docs/architecture.md`, read from the table
itself. And sizes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES, FUNCTION_LINES = 350, 60
TOP = (
    "scripts/",
    "tests/",
    "benchmarks/",
)  # anything may be imported there, and nothing imports them
ROOMS = ("models", "mixers", "evaluation", "reporting")

# What the last column says in words and a parser can see: a file (or folder) and what it must not
# import.
FORBIDDEN = {
    "utils.py": {"timm", "models", "mixers", "transforms", "datasets", "PIL"},
    "models/interface.py": {"timm", "mixers"},
    "models/build.py": {"engine", "mixers", "losses"},
    "mixers/boxes.py": {"mixers", "models"},
    "mixers/": {"models.build", "models.deit", "models.blocks", "random"},
    "models/": {"mixers", "losses", "smmix", "engine"},
    "samplers.py": {"torchvision", "PIL", "transforms"},
    "config/flags.py": {"torch", "timm", "models", "mixers.build", "mixers.interface", "smmix"},
    "config/mixing_flags.py": {"torch", "timm", "models", "mixers", "smmix"},
    "mixers/masks.py": {"mixers", "models"},
    "mixers/saliency.py": {"mixers", "models"},
    "storage/checkpoints.py": {"timm", "models", "engine"},
    "pipeline/images.py": {"transforms", "datasets", "mixers", "models"},
    "training/optim.py": {"argparse", "engine", "options"},
    "run/log.py": {"losses", "models", "mixers"},
    "datasets.py": {"loaders", "mixers", "models", "torch.distributed"},
    "pipeline/loaders.py": {"datasets", "mixers", "models", "torch.distributed"},
    "run/state.py": {"argparse", "options"},
    "report.py": {"main", "running", "engine", "torch"},
    "reporting/": {"main", "running", "engine", "checkpoints", "losses", "smmix"},
    "pipeline/randaugment.py": {"transforms", "numpy", "torch.nn"},
    "pipeline/randaugment_pixels.py": {"transforms", "random", "numpy", "PIL", "timm"},
    "smmix.py": {"losses", "models", "engine", "random", "numpy"},
    "losses.py": {"smmix", "random", "numpy"},
    "engine.py": {"smmix", "argparse", "pathlib", "timm", "models.build", "models.deit"},
    "main.py": {"torch.nn.functional"},
    "config/build.py": {"torch.nn.functional", "smmix"},
}


def source_files() -> list[str]:
    """Every python file of the project outside `TOP`, as written in the table; hidden folders are
    not ours."""
    paths = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
    return sorted(
        path
        for path in paths
        if not path.startswith(TOP) and not path.startswith(".") and "/." not in path
    )


FILES = source_files()
files = pytest.mark.parametrize("path", FILES)


def parse(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path)


def table() -> dict[str, int]:
    """The first two columns of the table: file or pattern -> level."""
    found: dict[str, int] = {}
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\|\s*(\d)\s*\|([^|]+)\|", line):
            found.update(dict.fromkeys(re.findall(r"`([^`]+)`", match[2]), int(match[1])))
    return found


def level(path: str) -> int | None:
    """The level of a file: its own row, else its folder's pattern; None if the table forgot it."""
    levels = table()
    if path in levels:
        return levels[path]
    folder = path.split("/")[0] + "/"
    patterns = [
        value
        for key, value in levels.items()
        if key.startswith(folder) and ("<" in key or "*" in key)
    ]
    return patterns[0] if patterns and "/" in path else None


def imports(path: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, also inside functions; `from a import b`
    gives a and a.b."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported_files(path: str) -> set[tuple[int, str]]:
    """(line, file) of what a file imports from the project."""
    found = set()
    for line, name in imports(path):
        candidates = (name.replace(".", "/") + ".py", name.replace(".", "/") + "/__init__.py")
        found |= {(line, candidate) for candidate in candidates if (ROOT / candidate).is_file()}
    return found


def test_the_reader_understands_the_table() -> None:
    levels = table()
    assert levels["utils.py"] == level("models/interface.py") == 0
    assert levels["smmix.py"] == level("models/deit.py") == level("mixers/cutmix.py") == 2
    assert level("tools/show_mixing.py") == levels["main.py"] > levels["engine.py"] > 2
    assert level("no_such_room.py") is None
    assert {"smmix.py", "engine.py", "main.py", "models/deit.py"} <= set(FILES)
    assert "mixers/interface.py" in {name for _, name in imported_files("smmix.py")}


def test_every_row_of_the_table_exists() -> None:
    rows = [row for row in table() if "<" not in row and "*" not in row and not row.startswith(TOP)]
    assert [row for row in rows if not (ROOT / row).exists()] == []


@files
def test_every_file_has_a_room(path: str) -> None:
    assert path.endswith("__init__.py") or level(path) is not None, (
        f"docs/architecture.md has no row for {path}"
    )


@files
def test_imports_point_to_lower_levels(path: str) -> None:
    own = level(path)
    if path.endswith("__init__.py") or own is None:
        return
    wrong = []
    for line, other in sorted(imported_files(path)):
        theirs = level(other)
        if not other.endswith("__init__.py") and theirs is not None and theirs >= own:
            wrong.append(f"{path}:{line} (level {own}) imports {other} (level {theirs})")
    assert wrong == []


@files
def test_nothing_imports_tests_or_scripts(path: str) -> None:
    tops = {top.rstrip("/") for top in TOP}
    assert [name for _, name in imports(path) if name.split(".")[0] in tops] == []


@files
def test_what_the_last_column_forbids(path: str) -> None:
    rows = [
        where
        for where in FORBIDDEN
        if path == where or (where.endswith("/") and path.startswith(where))
    ]
    rules = set().union(*(FORBIDDEN[where] for where in rows))
    bad = [
        f"{path}:{line} imports {name}"
        for line, name in imports(path)
        if any(name == rule or name.startswith(f"{rule}.") for rule in rules)
    ]
    assert bad == []


def test_the_rules_are_about_files_that_exist() -> None:
    assert [where for where in FORBIDDEN if not (ROOT / where).exists()] == []


def test_only_the_builder_and_the_commands_import_smmix() -> None:
    """The step and the mixers do not know which method they run."""
    users = {path for path in FILES if "smmix.py" in {name for _, name in imported_files(path)}}
    assert {path for path in users if not path.startswith("evaluation/")} == {
        "config/build_mixer.py"
    }


@files
def test_commands_and_methods_do_not_import_each_other(path: str) -> None:
    folder = path.split("/")[0]
    if "/" not in path or path.endswith(("/build.py", "/interface.py", "/frozen.py")):
        return
    shared = {
        "interface.py",
        "boxes.py",
        "masks.py",
        "saliency.py",
        "blocks.py",
        "partial.py",
        "precision.py",
        "charts.py",
        "style.py",
        "__init__.py",
    }
    siblings = {name for _, name in imported_files(path) if name.startswith(f"{folder}/")}
    assert {name for name in siblings if name.rsplit("/", 1)[1] not in shared} == set()


@pytest.mark.parametrize("path", [path for path in FILES if path.endswith("__init__.py")])
def test_init_files_hold_a_docstring_and_no_code(path: str) -> None:
    body = parse(path).body
    assert len(body) == 1
    assert ast.get_docstring(parse(path))


def test_the_rooms_are_packages() -> None:
    assert {path.split("/")[0] for path in FILES if path.endswith("__init__.py")} >= set(ROOMS)


@files
def test_files_and_functions_stay_readable(path: str) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= LINES, f"{path} has {lines} lines; split it"
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [
        f"{path}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(parse(path))
        if isinstance(node, functions)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]
    assert long == []


@files
def test_every_file_says_what_it_is_for(path: str) -> None:
    assert ast.get_docstring(parse(path)), f"{path} has no module docstring"
