"""Writes `docs/models.md`: sizes, costs, grids and the paper's accuracies of Table 1's backbones.

    python -m tools.model_table --output docs/models.md

Sizes and costs are counted on the models; names and accuracies come from `recipes/tables.yaml`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from config.parser import Parser
from errors import run_command
from models.build import build_model, describe_families
from storage.files import write_atomically
from tools.runs.matching import flags_of
from tools.runs.rows import read_tables

HEAD = """# Models

Written by `python -m tools.model_table --output docs/models.md`; a test compares it with the code.

## Table 1 of the paper

Parameters and multiply-adds (of products and convolutions, one image of 224 x 224 pixels) are counted on the models as
built here with 1000 classes. Accuracies are the paper's; none of these runs has been made here.

| model | name for `--model` | parameters | multiply-adds | grid | CutMix (paper) | SMMix (paper) | script |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

FAMILIES_HEAD = """
## Families

Any model of these timm classes trains with SMMix; `python main.py --list-models` lists their names.

| class | what its score means |
| --- | --- |
"""


class Backbone(NamedTuple):
    """One column of Table 1."""

    title: str
    model: str
    cutmix: float | None
    smmix: float | None
    script: str


def table_1() -> list[Backbone]:
    """The columns of Table 1, in the paper's order."""
    tables = read_tables()
    table, backbones = tables.tables["table1"], []
    for column in table.columns:
        cutmix, smmix = (table.find(name, column) for name in ("cutmix", "smmix"))
        model = flags_of(smmix.arguments, "cpu")["model"]
        title, script = tables.labels[column], f"{column}.sh"
        backbones.append(Backbone(title, model, cutmix.figure, smmix.figure, script))
    return backbones


def count_multiply_adds(network: nn.Module, input_size: tuple[int, int]) -> int:
    """Multiply-adds of products and convolutions for one image of `input_size` (height, width)."""
    network.eval().requires_grad_(False)
    device = next(network.parameters()).device
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *input_size, device=device))
    return counter.get_total_flops() // 2


def render() -> str:
    """The whole page."""
    lines = []
    for row in table_1():
        with torch.device("meta"):  # shapes only
            model = build_model(row.model, 1000, input_size=(224, 224))
        size = sum(parameter.numel() for parameter in model.network.parameters())
        cost = count_multiply_adds(model.network, model.input_size) / 1e9
        grid = " x ".join(map(str, model.grid_size))
        link = f"[{row.script}](../scripts/{row.script})"
        lines.append(
            f"| {row.title} | `{row.model}` | {size:,} | {cost:.2f} G | {grid} "
            f"| {row.cutmix} | {row.smmix} | {link} |\n"
        )
    families = [f"| `{name}` | {meaning} |\n" for name, meaning in describe_families()]
    return HEAD + "".join(lines) + FAMILIES_HEAD + "".join(families)


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m tools.model_table", description="Writes the table of models.")
    parser.add_argument("--output", default="docs/models.md", help="Markdown file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_args(argv)
    page = render()
    write_atomically(Path(args.output), lambda stream: stream.write(page.encode()))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
