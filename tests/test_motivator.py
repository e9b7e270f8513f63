"""Another network in the place of the model for the motivating pass (Table 9): what it may be, and what it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import assembly
import utils
from checkpoints import save_checkpoint
from models import frozen
from models.build import build_model, plain_weights
from models.frozen import build_motivator
from models.interface import ImageModel, resample_score
from options import check_args, get_args_parser
from tests.conftest import randomise
from tests.image_folders import make_image_folder
from tests.runs import run_small, watching_steps, weights_of
from tests.test_families import CPU
from utils import InputError

NANO = {"name": "vit_nano_patch4_32", "num_classes": 3, "input_size": (32, 32)}
PLAIN = "--amp none --device cpu --model vit_nano_patch4_32"


def network(**settings: Any) -> ImageModel:
    """In evaluation mode, far from its initial weights."""
    utils.seed_globals("init", 1)
    model = build_model(**{**NANO, **settings})
    randomise(model)
    return model.eval()


def saved(model: ImageModel, path: Path, **config: Any) -> Path:
    """Its weights in a file; with keywords of `build_model` as in a checkpoint of ours, as far as that is read."""
    more = {"model_config": {**NANO, **config, "input_size": list(model.input_size)}} if config else {}
    save_checkpoint(path, {"model": plain_weights(model), **more})
    return path


def images_of(size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(2))


def guide_of(student: ImageModel, motivator: str, *words: str) -> Any:
    args = get_args_parser().parse_args([*PLAIN.split(), "--motivator", motivator, *words])
    check_args(args)
    return assembly.make_guide(args, student, CPU.device)


# ----------------------------------------------------------------------------------------------- what it looks through


@pytest.mark.parametrize("how", ["a checkpoint of ours", "a name and a file"])
@pytest.mark.parametrize(
    ("settings", "grid"),
    [
        ({}, (8, 8)),  # the student's own grid
        ({"patch_size": 2}, (16, 16)),
        ({"name": "vit_mini_patch4_32", "patch_size": 8}, (4, 4)),
        ({"name": "test_resnet"}, (1, 1)),
    ],
)
def test_its_score_comes_on_the_students_grid(
    settings: dict[str, Any], grid: tuple[int, int], how: str, tmp_path: Path
) -> None:
    if how == "a name and a file" and "patch_size" in settings:
        pytest.skip("a name says its own patch")
    motivator, student, images = network(**settings), network(), images_of()
    config = {"drop": 0.0, **settings} if how == "a checkpoint of ours" else {}
    path = str(saved(motivator, tmp_path / "weights.pth", **config))
    guide = guide_of(student, path if config else f"{settings.get('name', NANO['name'])}={path}")
    seen = guide(images)
    with torch.no_grad():
        expected = motivator.look(images)
    assert motivator.grid_size == grid
    torch.testing.assert_close(seen.logits, expected.logits)
    torch.testing.assert_close(
        seen.image_attention, resample_score(expected.image_attention, grid, student.grid_size), rtol=1e-5, atol=1e-7
    )
    assert seen.image_attention.shape == (4, 64)


def test_its_blocks_are_its_own(tmp_path: Path) -> None:
    motivator, images = network(name="vit_mini_patch4_32"), images_of()  # 6 blocks, the student has 4
    choice = f"vit_mini_patch4_32={saved(motivator, tmp_path / 'weights.pth')}"
    with torch.no_grad():
        deep, mean = motivator.look(images, block=5), motivator.look(images, block="rollout")
    seen = guide_of(network(), choice, "--score-block", "5")(images)
    torch.testing.assert_close(seen.image_attention, deep.image_attention)
    torch.testing.assert_close(seen.logits, deep.logits)
    rolled = guide_of(network(), choice, "--score", "rollout")(images)
    torch.testing.assert_close(rolled.image_attention, mean.image_attention)
    with pytest.raises(InputError, match=r"--score-block 7: vit_mini_patch4_32=.* has the blocks 1 to 6"):
        guide_of(network(), choice, "--score-block", "7")


def test_one_trained_at_another_size_is_fitted_to_the_students_images(tmp_path: Path) -> None:
    path = saved(network(input_size=(24, 16)), tmp_path / "weights.pth", drop=0.0)
    motivator = build_motivator(str(path), 3, (32, 32))
    assert (motivator.input_size, motivator.grid_size) == ((32, 32), (8, 8))
    assert guide_of(network(), str(path))(images_of()).logits.shape == (4, 3)


def test_it_never_learns_and_one_of_the_hub_is_taken_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = timm.create_model("vit_nano_patch4_32", num_classes=3)
    monkeypatch.setattr(frozen, "_download", lambda name, flag: theirs)
    motivator = build_motivator("vit_nano_patch4_32", 3, (32, 32))
    assert not any(parameter.requires_grad for parameter in motivator.parameters())
    for name, value in theirs.state_dict().items():
        assert torch.equal(dict(motivator.network.state_dict())[name], value)
    with pytest.raises(InputError, match="predicts 3 classes, the data has 5"):
        build_motivator("vit_nano_patch4_32", 5, (32, 32))


# ------------------------------------------------------------------------------------------------------------ refusals


def test_one_that_cannot_guide_is_refused(tmp_path: Path) -> None:
    ours = saved(network(), tmp_path / "ours.pth", drop=0.0)
    plain = saved(network(), tmp_path / "plain.pth")

    def refusal(choice: str, classes: int = 3, size: tuple[int, int] = (32, 32)) -> str:
        with pytest.raises(InputError) as caught:
            build_motivator(choice, classes, size)
        return caught.value.text

    assert "--motivator nosuch: neither self nor ema, nor a file, nor a model's name" in refusal("nosuch")
    assert "nor a file" in refusal(str(tmp_path / "missing.pth"))
    assert "there is no file" in refusal(f"vit_nano_patch4_32={tmp_path / 'missing.pth'}")
    assert "predicts 3 classes, the data has 10: it must be trained for these" in refusal(str(ours), classes=10)
    assert "head.weight" in refusal(f"vit_nano_patch4_32={plain}", classes=10)
    assert "say whose weights these are: NAME=" in refusal(str(plain))
    assert "the file holds a vit_nano_patch4_32; give the file alone" in refusal(f"vit_mini_patch4_32={ours}")
    assert "cannot guide a student on 18 x 18 pixels" in refusal(str(ours), size=(18, 18))
    assert "cannot guide a student" in refusal(f"vit_mini_patch4_32={plain}")


def test_what_it_cannot_show_is_refused(tmp_path: Path) -> None:
    path = saved(network(name="test_resnet"), tmp_path / "resnet.pth")
    with pytest.raises(InputError, match=r"--score rollout: test_resnet=.*, a ResNet, is read in its last block only"):
        guide_of(network(), f"test_resnet={path}", "--score", "rollout")


# ----------------------------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    return make_image_folder(root / "photos", ("ant", "bee", "cat"), per_class=8, size=(20, 20))


@pytest.mark.slow
def test_the_average_guides_as_it_is_on_each_step(photos: Path) -> None:
    seen: list[bool] = []

    def see(training: Any, step: int) -> None:
        images = images_of((16, 16))
        shown = training.guide(images)
        of_average, own = training.ema.module.eval().look(images), training.module.eval().look(images)
        training.module.train()
        seen.append(torch.equal(shown.logits, of_average.logits) and not torch.equal(shown.logits, own.logits))

    with watching_steps(see):
        run = run_small("--motivator ema --model-ema-decay 0.9 --mix-protocol single", "--data-path", photos)
    assert run.code == 0, run.err
    assert seen == [True] * 3


@pytest.mark.slow
def test_a_run_is_guided_by_a_file_and_goes_on_where_the_file_has_moved(photos: Path, tmp_path: Path) -> None:
    path, moved = saved(network(patch_size=2), tmp_path / "one.pth", patch_size=2), tmp_path / "two.pth"
    words = ("--mix-protocol single --data-path", photos, "--output-dir", tmp_path / "run")
    first = run_small("--motivator", path, *words)
    before = {name: value.clone() for name, value in weights_of(first.training).items()}
    path.rename(moved)
    more = run_small("--epochs 2 --accept-changes epochs --auto-resume --motivator", moved, *words)
    assert more.code == 0, more.err
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(more.training).items())
    self_again = run_small("--epochs 3 --accept-changes epochs --auto-resume", *words)
    assert self_again.code == 2
    assert "-> self" in self_again.err
    assert "--accept-changes motivator" in self_again.err
