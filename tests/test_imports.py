"""Imports point one way, as the list of places in `docs/architecture.md` says. And sizes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOT_FILES = {
    "main.py",
    "engine.py",
    "smmix.py",
    "losses.py",
    "datasets.py",
    "samplers.py",
    "errors.py",
    "utils.py",
    "hubconf.py",
    "run_with_submitit.py",
}
MOST_PLACES, MOST_LEVELS = 21, 8
FILE_LINES, FUNCTION_LINES = 450, 70
GROUND = ("pipeline", "storage", "training", "models")
BASE = ("errors.py", "utils.py", "samplers.py")  # what they may import
FREE = ("scripts", "tests")  # may import anything; nothing imports them

# Methods, families and commands do not import each other; these files of their packages are shared.
SHARED = {
    "mixers": {"interface", "options", "boxes", "masks", "saliency"},
    "models": {
        "interface",
        "blocks",
        "prefix_tokens",
        "float32_attention",
        "windows",
        "build",
        "weights",
    },
    "tools": {"runs"},
}
Files = Mapping[str, str]  # path -> source


def project() -> dict[str, str]:
    """Every Python file of the project outside `FREE` and hidden folders."""
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    ours = (p for p in paths if p.parts[0] not in FREE and not any(q[0] == "." for q in p.parts))
    return {path.as_posix(): (ROOT / path).read_text(encoding="utf-8") for path in sorted(ours)}


FILES = project()


def places() -> dict[str, int]:
    """The list in the documentation: file or folder -> level."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| `([^`]+)` \|", text, flags=re.M)
    return {place: int(level) for level, place in rows}


PLACES = places()


def place_of(path: str) -> str:
    return path if "/" not in path else path.split("/")[0] + "/"


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all imports, also inside functions; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imported_files(files: Files, path: str) -> set[tuple[int, str]]:
    """(line, file) of what a file imports from the project."""
    found = set()
    for line, name in imported_names(files[path]):
        parts = name.split(".")
        candidates = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
        named = (f"{stem}{end}" for stem in candidates for end in (".py", "/__init__.py"))
        target = next((file for file in named if file in files), None)
        if target is not None and not target.endswith("__init__.py"):
            found.add((line, target))
    return found


# --------------------------------------------------------------------------------------- the rules


def misplaced(files: Files) -> Iterator[str]:
    for path in files:
        if "/" not in path and path not in ROOT_FILES:
            yield f"{path}: the root holds DeiT's own names only"
        elif place_of(path) not in PLACES:
            yield f"{path}: docs/architecture.md has no place for it"


def wrong_way(files: Files) -> Iterator[str]:
    for path in files:
        own = place_of(path)
        for line, other in sorted(imported_files(files, path)):
            theirs = place_of(other)
            if own == theirs or own not in PLACES or theirs not in PLACES:
                continue
            if PLACES[theirs] >= PLACES[own]:
                levels = f"level {PLACES[own]} imports level {PLACES[theirs]}"
                yield f"{path}:{line} imports {other}: {levels}"
            elif own.rstrip("/") in GROUND and theirs not in BASE:
                yield f"{path}:{line} imports {other}: {own} may import only {BASE}"


def circles(files: Files) -> Iterator[str]:
    edges = {path: {other for _, other in imported_files(files, path)} for path in files}
    done: set[str] = set()

    def visit(path: str, trail: list[str]) -> Iterator[str]:
        if path in trail:
            yield "circle: " + " -> ".join([*trail[trail.index(path) :], path])
        elif path not in done:
            for other in sorted(edges[path]):
                yield from visit(other, [*trail, path])
            done.add(path)

    for path in files:
        yield from visit(path, [])


def siblings(files: Files) -> Iterator[str]:
    def unit(path: str) -> str:
        """A file, a method with the file of its options, or the sub-package of a command."""
        return path.split("/")[1].removesuffix(".py").removesuffix("_options")

    for path in files:
        package = path.split("/")[0]
        if package not in SHARED or "/" not in path:
            continue
        if unit(path) in SHARED[package] | {
            "__init__",
            "switch",
            "split",
            "consistent",
            "transmix",
            "registry",
        }:
            continue
        for line, other in sorted(imported_files(files, path)):
            same = other.startswith(f"{package}/") and unit(other) != unit(path)
            if same and unit(other) not in SHARED[package]:
                yield f"{path}:{line} imports its sibling {other}"


def importers_of_smmix(files: Files) -> Iterator[str]:
    for path in files:
        users = {other for _, other in imported_files(files, path)}
        if "smmix.py" in users and not path.startswith(("config/", "tools/")):
            yield f"{path}: knows which method it runs"


def outsiders(files: Files) -> Iterator[str]:
    for path, source in files.items():
        for line, name in imported_names(source):
            if name.split(".")[0] in FREE:
                yield f"{path}:{line} imports {name}"
            if name.startswith("."):
                yield f"{path}:{line}: relative import"


def shapes(files: Files) -> Iterator[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for path, source in files.items():
        tree = ast.parse(source)
        if ast.get_docstring(tree) is None:
            yield f"{path}: no docstring says what it is for"
        if path.endswith("__init__.py") and len(tree.body) > 1:
            yield f"{path}: holds more than a docstring"
        if (lines := len(source.splitlines())) > FILE_LINES:
            yield f"{path}: {lines} lines; split it"
        for node in ast.walk(tree):
            if isinstance(node, functions):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    yield f"{path}:{node.lineno} {node.name}: {length} lines; split it"


RULES = (
    misplaced,
    wrong_way,
    circles,
    siblings,
    importers_of_smmix,
    outsiders,
    shapes,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule) -> None:
    assert list(rule(FILES)) == []


DOC = '"""Planted."""\n'
PLANTED = {
    "a new file in the root": (misplaced, "helpers.py", DOC),
    "a package without a place": (misplaced, "helpers/tools.py", DOC),
    "an import upwards": (wrong_way, "pipeline/planted.py", DOC + "from mixers import boxes\n"),
    "an import sideways": (wrong_way, "config/planted.py", DOC + "import run.loop\n"),
    "an import inside a function": (
        wrong_way,
        "models/planted.py",
        DOC + "def read():\n    from storage.checkpoints import load_checkpoint\n",
    ),
    "a level of its own skipped": (
        wrong_way,
        "storage/planted.py",
        DOC + "from training.meters import Meters\n",
    ),
    "a circle": (circles, "models/interface.py", DOC + "from models import build\n"),
    "a method that imports another": (
        siblings,
        "mixers/planted.py",
        DOC + "from mixers.cutmix import CutMix\n",
    ),
    "a method with another's flags": (
        siblings,
        "mixers/planted_options.py",
        DOC + "from mixers.fmix_options import FMixOptions\n",
    ),
    "a family that imports another": (
        siblings,
        "models/planted.py",
        DOC + "from models import cait\n",
    ),
    "a command that imports another": (
        siblings,
        "tools/planted.py",
        DOC + "from tools.report import html\n",
    ),
    "a step that knows its method": (importers_of_smmix, "run/loop.py", DOC + "import smmix\n"),
    "code that needs the tests": (outsiders, "main.py", DOC + "from tests import runs\n"),
    "a relative import": (outsiders, "run/state.py", DOC + "from . import loop\n"),
    "a package that re-exports": (shapes, "run/__init__.py", DOC + "from run import loop\n"),
    "a file without a docstring": (shapes, "run/planted.py", "import os\n"),
    "a long file": (shapes, "run/planted.py", DOC + "x = 1\n" * FILE_LINES),
    "a long function": (
        shapes,
        "run/planted.py",
        DOC + "def f():\n" + "    x = 1\n" * FUNCTION_LINES,
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(name: str) -> None:
    rule, path, source = PLANTED[name]
    found = list(rule({**FILES, path: source}))
    assert found
    assert any(path in line for line in found)


def test_the_list_is_short_and_names_what_is_there() -> None:
    assert [place for place in PLACES if not (ROOT / place).exists()] == []
    assert len(PLACES) + len(FREE) <= MOST_PLACES
    assert max(PLACES.values()) <= MOST_LEVELS
    assert {place for place in PLACES if place.endswith(".py")} == ROOT_FILES


ALONE = """
import importlib, os, pkgutil, sys
packages, absent = sys.argv[1:], []
ours = {entry.removesuffix(".py") for entry in os.listdir()}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ImportError(f"{name} is made unimportable")

sys.meta_path.insert(0, Absent())
for package in packages:
    absent[:] = [other for other in packages if other != package]
    home = importlib.import_module(package)
    for module in pkgutil.iter_modules(home.__path__, f"{package}."):
        importlib.import_module(module.name)
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
"""


def test_a_ground_package_is_imported_without_the_others() -> None:
    command = [sys.executable, "-c", ALONE, *GROUND]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
