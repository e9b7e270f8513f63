"""The ten backbones of Table 1: sizes, costs, grids, and the page that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.build import FAMILIES
from tools.model_table import count_multiply_adds, render, table_1

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")

# Parameters and G multiply-adds at 224 pixels, counted on each family's original code; side of the
# final grid.
ORIGINAL = {
    "deit_tiny_patch16_224": (5_717_416, 1.25, 14),
    "deit_small_patch16_224": (22_050_664, 4.60, 14),
    "deit_base_patch16_224": (86_567_656, 17.56, 14),
    "cait_xxs24_224": (11_956_264, 2.52, 14),
    "cait_xxs36_224": (17_299_720, 3.76, 14),
    "pvt_tiny": (13_229_288, 1.93, 7),
    "pvt_small": (24_485_864, 3.82, 7),
    "pvt_medium": (44_208_104, 6.66, 7),
    "pvt_large": (61_369_320, 9.81, 7),
    "swin_tiny_patch4_window7_224": (28_288_354, 4.49, 7),
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_sizes_and_costs_are_the_originals(name: str) -> None:
    """As the page says them, which is what the code gives."""
    parameters, giga, side = ORIGINAL[name]
    (line,) = (line for line in PAGE.splitlines() if f"| `{name}` |" in line and " G |" in line)
    size, cost, grid = line.split(" | ")[2:5]
    assert size == f"{parameters:,}"
    assert float(cost.removesuffix(" G")) == pytest.approx(giga, rel=0.01)
    assert grid == f"{side} x {side}"


def test_a_count_by_hand() -> None:
    layer = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Flatten(), torch.nn.Linear(8 * 4 * 6, 5)
    )
    assert count_multiply_adds(layer, (16, 24)) == 3 * 4 * 4 * 8 * 4 * 6 + 8 * 4 * 6 * 5


def test_the_page_is_what_the_code_gives() -> None:
    assert [row.model for row in table_1()] == list(ORIGINAL)
    assert render() == PAGE, "python -m tools.model_table"


def test_every_family_says_what_its_score_means() -> None:
    assert all(family.score for family in FAMILIES)
    assert len({family.network_class for family in FAMILIES}) == len(FAMILIES)
