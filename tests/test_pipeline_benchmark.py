"""The benchmark of the input pipeline: its cases give what they say they give. No figure is looked
at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets.folder import pil_loader

from errors import InputError
from pipeline import images
from pipeline.samples import Batch
from pipeline.spec import ImageSpec
from pipeline.transforms import normalise
from tests.image_folders import make_image_folder, message_of
from tools.bench import pipeline, run, stages


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "BATCH", 6)


def test_every_case_gives_a_batch_and_all_draw_alike(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, per_class=4, splits=("train",))
    made = {case.name: case.run() for case in pipeline.cases(str(root), 64)}
    floats = [made.pop(name) for name in list(made) if name.startswith(("DeiT", "the device"))]
    assert all(batch.shape == (6, 3, 64, 64) and batch.dtype == torch.float32 for batch in floats)
    assert len(floats) == 4
    assert len(made) == (9 if images.simplejpeg else 3)
    exact = [batch for name, batch in made.items() if "torch" not in name and "views" not in name]
    for batch in made.values():
        assert isinstance(batch, Batch)
        assert batch.images.dtype == torch.uint8
    assert all(torch.equal(batch.images, exact[0].images) for batch in exact)
    # what DeiT's erases lies in our boxes, and everything else is the same to the bit
    pixels = normalise(exact[0].images, ImageSpec((64, 64)))
    for image, plain, boxes in zip(pixels, floats[0], exact[0].boxes, strict=True):
        outside = torch.ones(64, 64, dtype=torch.bool)
        for top, bottom, left, right in boxes.tolist():
            outside[top:bottom, left:right] = False
        assert torch.equal(image[:, outside], plain[:, outside])


def test_three_views_share_an_image(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path, per_class=4, splits=("train",))
    made = {case.name: case.run() for case in pipeline.cases(str(root), 32)}
    views = made["pixels, pillow, 3 views"]
    assert views.indices.tolist() == [0, 0, 0, 1, 1, 1]
    assert len({image.numpy().tobytes() for image in views.images}) == 6


def test_both_ways_to_finish_a_batch_give_the_same_but_for_the_noise() -> None:
    exact, undone = (case.run() for case in pipeline.finish_cases("", 32, 24, torch.device("cpu")))
    assert exact.shape == undone.shape == (24, 3, 32, 32)
    assert torch.equal(exact.isclose(undone), exact == undone)
    assert 0.7 < float((exact == undone).float().mean()) < 1


def test_an_empty_folder_is_said(tmp_path: Path) -> None:
    assert "holds no image" in message_of(InputError, pipeline.find_files, str(tmp_path))
    assert len(pipeline.find_files("")) == 24


@pytest.mark.parametrize("size", [32, 64])  # padded and cropped, and zoomed
def test_stages_are_written_and_shown(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.main(["--parts", "stages", "--quick", "--input-size", str(size), "--output", str(tmp_path)])
    rows = [
        line.strip("| ").split(" | ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    ]
    shown = {row[0]: row[1:] for row in rows}
    assert set(stages.ORDER) <= shown.keys()
    found = json.loads((tmp_path / "bench.json").read_text())["stages"]
    assert len(found) == (4 if images.simplejpeg else 2)
    assert shown["stage"] == [f"{name}, ms" for name in found]
    for stage in ("decode", "crop and resize", "RandAugment", stages.ALL):
        assert shown[stage] == [f"{1000 * each[stage]:.2f}" for each in found.values()]
        assert all(each[stage] > 0 for each in found.values())
    assert [name for name, each in found.items() if "erase" in each] == ["DeiT's"]


def test_stages_add_up() -> None:
    for each in stages.measure("", 32, rounds=1).values():
        assert sum(each.values()) == pytest.approx(2 * each[stages.ALL])


def test_stages_are_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a second each, by a clock that decoding alone moves on."""
    now = [0.0]

    def decode(path: str) -> Any:
        now[0] += 1
        return pil_loader(path)

    monkeypatch.setattr(stages.time, "process_time", lambda: now[0])
    monkeypatch.setattr(stages, "pil_loader", decode)
    assert {"decode": 1.0, "crop and resize": 0.0, stages.ALL: 1.0}.items() <= stages.measure(
        "", 32, 2
    )["DeiT's"].items()


def test_the_command_prints_its_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.main(["--parts", "pipeline", "--quick", "--input-size", "32"])
    shown = capsys.readouterr().out
    assert "## pipeline" in shown
    assert "| pixels, --decoder pillow | " in shown
