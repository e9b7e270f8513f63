"""Repeated augmentation with every mixer: each view of an image meets a draw of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from config import build
from config.checks import check_args
from config.flags import get_args_parser
from config.resolve import Flags, resolve
from mixers.interface import MixedBatch, StepRandom
from pipeline.samples import Batch
from pipeline.spec import ImageSpec
from run.state import DRAWS
from smmix import Drawn, SMMix
from storage.checkpoints import load_checkpoint
from tests.conftest import FakeGuide
from tests.image_folders import make_image_folder
from tests.runs import run_main, run_small, split
from utils import Processes, keyed_generator

GRID, K = (4, 4), 10
COMMAND = (
    "--model vit_nano_patch4_32 --input-size 16 --batch-size 64 --aa none --reprob 0 "
    "--repeated-aug --num-workers 0 --mix-protocol single"
)


class FakeModel:
    """What a mixer is built from."""

    num_classes, grid_size, input_size = K, GRID, (16, 16)


def mixed_step(flags: str) -> tuple[Batch, MixedBatch]:
    """The first batch of an epoch of digits, on one rank, before and after mixing."""
    args = get_args_parser().parse_args([*COMMAND.split(), *flags.split()])
    check_args(args)
    resolved: Flags = resolve(args, 1, "cpu")
    processes, spec = Processes(0, 1, torch.device("cpu")), ImageSpec((16, 16))
    images = build.open_images(resolved, True, load_checkpoint)
    batch: Batch = next(iter(build.make_train_loader(resolved, images, spec, processes)))
    model: Any = FakeModel()
    mixer = build.make_mixer(resolved, model, spec, processes, load_checkpoint)
    random = StepRandom(keyed_generator("shared"), keyed_generator("own"))
    mixed = mixer(batch.images.float(), batch.labels, FakeGuide(GRID, K), random)
    return batch, mixed


def lams_per_image(batch: Batch, mixed: MixedBatch) -> float:
    """The mean number of different shares that an image of the batch gets."""
    assert mixed.lam is not None
    met: dict[int, set[float]] = {}
    for image, lam in zip(batch.indices.tolist(), mixed.lam.tolist(), strict=True):
        met.setdefault(image, set()).add(lam)
    return sum(map(len, met.values())) / len(met)


@pytest.mark.parametrize("mixer", ["mixup", "cutmix", "fmix", "resizemix"])
def test_an_image_meets_almost_as_many_draws_as_it_has_views(mixer: str) -> None:
    batch, mixed = mixed_step(f"--mixer {mixer}")
    assert 2.8 < len(batch.images) / len(set(batch.indices.tolist())) <= 3
    assert lams_per_image(batch, mixed) > 2.8
    assert mixed.lam is not None
    assert len(set(mixed.lam.tolist())) == 3


@pytest.mark.parametrize("mixer", ["mixup", "cutmix", "smmix"])
def test_on_one_rank_the_strided_layout_shares_one_draw(mixer: str) -> None:
    """As in DeiT's code, whose views lie on different ranks only if there are any."""
    batch, mixed = mixed_step(f"--mixer {mixer} --repeat-layout strided")
    assert lams_per_image(batch, mixed) == 1


@pytest.mark.parametrize("count", [7, 12, 13])
@pytest.mark.parametrize("source", ["max", "random"])
def test_smmix_of_groups_is_smmix_of_each_group(count: int, source: str) -> None:
    """The guide sees the whole batch once. Sizes, regions and labels are those of a loop."""
    flags = f"--mixer smmix --source-region {source} --side-ratio 0.2 0.9"
    args = get_args_parser().parse_args([*COMMAND.split(), *flags.split()])
    resolved, model = resolve(args, 1, "cpu"), FakeModel()
    processes, spec = Processes(0, 1, torch.device("cpu")), ImageSpec((16, 16))
    mixer: Any = build.make_mixer(resolved, model, spec, processes, load_checkpoint).first  # type: ignore[arg-type]
    assert isinstance(mixer, SMMix)
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
    labels, guide = torch.arange(count) % K, FakeGuide(GRID, K)
    drawn = next(
        found
        for found in (mixer.draw(count, (16, 16), keyed_generator(key)) for key in range(99))
        if len(set(found.sizes)) == 3
    )
    whole = mixer.apply(images, labels, drawn, guide)
    assert len(guide.calls) == 1
    for size in set(drawn.sizes):
        rows = torch.tensor([row for row, other in enumerate(drawn.sizes) if other == size])
        corners = None if drawn.source_corners is None else drawn.source_corners[rows]
        alone = Drawn([size] * len(rows), corners)
        part = mixer.apply(images[rows], labels[rows], alone, FakeGuide(GRID, K))
        for name in ("images", "labels", "lam", "source_labels", "source_mask", "reference_probs"):
            got: Tensor = getattr(whole, name)[rows]
            torch.testing.assert_close(got, getattr(part, name), msg=name)


# ------------------------------------------------------------------------- the number of the draws


def test_a_run_of_the_older_draws_is_not_resumed_but_its_weights_are_used(tmp_path: Path) -> None:
    """Its checkpoint has no number of draws. Runs whose draws have not changed are resumed."""
    photos = make_image_folder(tmp_path / "photos", ("ant", "bee"), per_class=8, size=(16, 16))
    words = split("--repeated-aug --epochs 2 --max-steps 1 --data-path", photos)
    folder = tmp_path / "run"
    assert run_small(*words, "--output-dir", folder).code == 0
    environment = json.loads((folder / "environment.json").read_text())
    checkpoint = load_checkpoint(folder / "checkpoint.pth")
    assert environment["draws"] == checkpoint.pop("draws") == DRAWS == 2
    older, newer = tmp_path / "older.pth", tmp_path / "newer.pth"
    torch.save(checkpoint, older)
    torch.save({**checkpoint, "draws": 3}, newer)

    for path, number in ((older, 1), (newer, 3)):
        refused = run_small(*words, "--max-steps 2 --resume", path)
        assert refused.code == 2
        for part in (f"draws: {number}", "start a new run", checkpoint["versions"]["commit"]):
            assert part in refused.err
    changes = "--accept-changes repeat-layout repeated-aug"
    dropping = run_small(*words, "--no-repeated-aug --drop 0.1", changes, "drop --resume", older)
    assert "draws: 1" in dropping.err
    for layout in ("--repeat-layout strided", "--no-repeated-aug"):
        resumed = run_small(*words, "--max-steps 2", layout, changes, "--resume", older)
        assert resumed.code == 0, resumed.err
    assert run_small(*words, "--finetune", older).code == 0
    assert run_main("--data-path", photos, "--eval --resume", older).code == 0
