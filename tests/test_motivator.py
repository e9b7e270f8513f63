"""Another network in the place of the model for the motivating pass (Table 9): what it may be, and
what it changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import utils
from config import build_guide, second_networks
from config.checks import check_args
from config.flags import get_args_parser
from config.second_networks import build_motivator, check_motivator_classes
from errors import InputError
from models.build import build_model
from models.interface import ImageModel, resample_score
from models.weights import plain_weights
from pipeline.spec import ImageSpec
from storage.checkpoints import save_checkpoint
from tests.conftest import randomise
from tests.image_folders import make_image_folder
from tests.runs import observing_steps, run_small, weights_of
from tests.test_families import CPU

NANO = {"name": "vit_nano_patch4_32", "num_classes": 3, "input_size": (32, 32)}
PLAIN = "--amp none --device cpu --model vit_nano_patch4_32"
OF_STUDENT = ImageSpec((32, 32))
OF_TEST_RESNET = ImageSpec((32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # says timm
OTHER = ImageSpec((24, 16), mean=(0.2, 0.4, 0.1), std=(0.3, 0.2, 0.5))


def network(**settings: Any) -> ImageModel:
    """In evaluation mode, far from its initial weights."""
    utils.seed_globals("init", 1)
    model = build_model(**{**NANO, **settings})
    randomise(model)
    return model.eval()


def saved(
    model: ImageModel,
    path: Path,
    names: Sequence[str] = (),
    spec: ImageSpec = OF_STUDENT,
    **config: Any,
) -> Path:
    """Its weights in a file; with keywords of `build_model` as in a checkpoint of ours, as far as
    that is read.

    Args:
        names: of its classes; with them the checkpoint also says what it was trained on.
        spec: of its images.
    """
    more: dict[str, Any] = {}
    if config:
        more["model_config"] = {**NANO, **config, "input_size": list(model.input_size)}
    if names:
        more["data"] = {"class_names": list(names), "image_spec": spec.to_plain()}
    save_checkpoint(path, {"model": plain_weights(model), **more})
    return path


def images_of(size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(2))


def normalised(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """Pixels (B, 3, height, width) in 0..1 as `spec` has them, channel by channel."""
    images = torch.empty_like(pixels)
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        images[:, channel] = (pixels[:, channel] - mean) / std
    return images


def guide_of(
    student: ImageModel, motivator: str, *words: str, spec: ImageSpec | None = None
) -> Any:
    args = get_args_parser().parse_args([*PLAIN.split(), "--motivator", motivator, *words])
    check_args(args)
    return build_guide.make_guide(args, student, CPU.device, spec=spec)


# ---------------------------------------------------------------------------- what it looks through


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
    choice = path if config else f"{settings.get('name', NANO['name'])}={path}"
    seen = guide_of(
        student, choice, spec=OF_TEST_RESNET if choice.startswith("test_resnet=") else None
    )(images)
    with torch.no_grad():
        expected = motivator.motivating_pass(images)
    assert motivator.grid_size == grid
    torch.testing.assert_close(seen.logits, expected.logits)
    torch.testing.assert_close(
        seen.image_attention,
        resample_score(expected.image_attention, grid, student.grid_size),
        rtol=1e-5,
        atol=1e-7,
    )
    assert seen.image_attention.shape == (4, 64)


def test_its_blocks_are_its_own(tmp_path: Path) -> None:
    motivator, images = (
        network(name="vit_mini_patch4_32"),
        images_of(),
    )  # 6 blocks, the student has 4
    choice = f"vit_mini_patch4_32={saved(motivator, tmp_path / 'weights.pth')}"
    with torch.no_grad():
        deep, mean = (
            motivator.motivating_pass(images, block=5),
            motivator.motivating_pass(images, block="rollout"),
        )
    seen = guide_of(network(), choice, "--score-block", "5")(images)
    torch.testing.assert_close(seen.image_attention, deep.image_attention)
    torch.testing.assert_close(seen.logits, deep.logits)
    rolled = guide_of(network(), choice, "--score", "rollout")(images)
    torch.testing.assert_close(rolled.image_attention, mean.image_attention)
    with pytest.raises(
        InputError, match=r"--score-block 7: vit_mini_patch4_32=.* has the blocks 1 to 6"
    ):
        guide_of(network(), choice, "--score-block", "7")


def test_one_trained_at_another_size_is_fitted_to_the_students_images(tmp_path: Path) -> None:
    path = saved(network(input_size=(24, 16)), tmp_path / "weights.pth", drop=0.0)
    motivator, _ = build_motivator(str(path), 3, OF_STUDENT)
    assert (motivator.input_size, motivator.grid_size) == ((32, 32), (8, 8))
    assert guide_of(network(), str(path))(images_of()).logits.shape == (4, 3)


def test_it_never_learns_and_one_of_the_hub_is_taken_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = timm.create_model("vit_nano_patch4_32", num_classes=3)
    monkeypatch.setattr(second_networks, "download", lambda name, flag: theirs)
    motivator, _ = build_motivator("vit_nano_patch4_32", 3, OF_STUDENT)
    assert not any(parameter.requires_grad for parameter in motivator.parameters())
    for name, value in theirs.state_dict().items():
        assert torch.equal(dict(motivator.network.state_dict())[name], value)
    with pytest.raises(InputError, match="predicts 3 classes, the data has 5"):
        build_motivator("vit_nano_patch4_32", 5, OF_STUDENT)


# ------------------------------------------------------------------- images as it knows them itself


@pytest.mark.parametrize("how", ["a checkpoint of ours", "a name and a file", "a name"])
@pytest.mark.parametrize(
    "student", [OF_STUDENT, ImageSpec((32, 32), mean=(0.6, 0.3, 0.4), std=(0.2, 0.5, 0.3))]
)
def test_it_sees_the_images_as_it_knows_them(
    how: str, student: ImageSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    motivator = network(name="test_resnet")
    choice, own, path = "test_resnet", OF_TEST_RESNET, tmp_path / "weights.pth"
    if how == "a checkpoint of ours":
        choice, own = str(saved(motivator, path, "abc", OTHER, name="test_resnet")), OTHER
    elif how == "a name and a file":
        choice = f"test_resnet={saved(motivator, path)}"
    monkeypatch.setattr(second_networks, "download", lambda name, flag: motivator.network)
    pixels = images_of().sigmoid()
    shown = normalised(pixels, student)
    seen = guide_of(network(), choice, spec=student)(shown)
    with torch.no_grad():
        expected, unchanged = (
            motivator.motivating_pass(normalised(pixels, own)),
            motivator.motivating_pass(shown),
        )
    torch.testing.assert_close(seen.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert unchanged.logits is not None
    assert not torch.allclose(seen.logits, unchanged.logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("words", "how"),
    [("--guide-size 16", {"size": (16, 16)}), ("--score-block 2 --con-weight 0", {"block": 2})],
)
def test_its_score_is_that_of_its_own_images(
    words: str, how: dict[str, Any], tmp_path: Path
) -> None:
    motivator, pixels = network(), images_of().sigmoid()
    path = str(saved(motivator, tmp_path / "weights.pth", "abc", OTHER, drop=0.0))
    shown = normalised(
        pixels, OF_STUDENT
    )  # ImageNet's, which is taken for granted where no `spec` is given
    seen = guide_of(network(), path, *words.split())(shown)
    with torch.no_grad():
        expected, unchanged = (
            motivator.motivating_pass(normalised(pixels, OTHER), **how),
            motivator.motivating_pass(shown, **how),
        )
    torch.testing.assert_close(seen.image_attention, expected.image_attention, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(seen.image_attention, unchanged.image_attention, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("names", ["", "abc"])
def test_nothing_is_done_to_images_as_it_knows_them(names: str, tmp_path: Path) -> None:
    path = saved(network(), tmp_path / "weights.pth", names, drop=0.0)
    motivator, look = build_motivator(str(path), 3, OF_STUDENT)
    assert look == motivator.motivating_pass


# ------------------------------------------------------------------------------- classes of its own


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("abd", "1 only in the motivator: d; 1 only in the data: c."),
        ("bac", "their order differs."),
        ("abcdefghi", "6 only in the motivator: d, e, f, g, h, .... L_con"),
        ("ab", "1 only in the data: c."),
    ],
)
def test_other_classes_are_refused(names: str, said: str, tmp_path: Path) -> None:
    path = saved(
        network(num_classes=len(names)), tmp_path / "weights.pth", names, num_classes=len(names)
    )
    for choice in (str(path), f"vit_nano_patch4_32={path}"):
        with pytest.raises(InputError) as caught:
            check_motivator_classes(choice, ["a", "b", "c"])
        assert (
            f"--motivator {choice}: predicts other classes than the data has; " in caught.value.text
        )
        assert said in caught.value.text
        assert "give one that was trained for these classes in this order" in caught.value.text
        assert "--con-weight 0" in caught.value.text


def test_the_same_classes_and_those_without_names_pass(tmp_path: Path) -> None:
    ours = saved(network(), tmp_path / "ours.pth", "abc", drop=0.0)
    nameless = saved(network(), tmp_path / "nameless.pth", drop=0.0)
    plain = saved(network(), tmp_path / "plain.pth")
    for choice in (str(ours), str(nameless), f"vit_nano_patch4_32={plain}", "vit_nano_patch4_32"):
        check_motivator_classes(choice, ["a", "b", "c"])


@pytest.mark.parametrize("how", ["a checkpoint of ours", "a name and a file", "a name"])
def test_where_its_score_alone_is_used_it_may_have_any_classes(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    motivator, images, path = network(num_classes=5), images_of(), tmp_path / "weights.pth"
    config: dict[str, Any] = {"num_classes": 5} if how == "a checkpoint of ours" else {}
    saved(motivator, path, "abcde" if config else "", **config)
    choice = (
        str(path) if config else "vit_nano_patch4_32" + f"={path}" * (how == "a name and a file")
    )
    monkeypatch.setattr(second_networks, "download", lambda name, flag: motivator.network)
    seen = guide_of(network(), choice, "--con-weight", "0")(images)
    with torch.no_grad():
        torch.testing.assert_close(
            seen.image_attention, motivator.motivating_pass(images).image_attention
        )
    assert seen.logits is None
    with pytest.raises(InputError, match=r"--motivator .*5"):
        guide_of(network(), choice)


# ----------------------------------------------------------------------------------------- refusals


def test_one_that_cannot_guide_is_refused(tmp_path: Path) -> None:
    ours = saved(network(), tmp_path / "ours.pth", drop=0.0)
    plain = saved(network(), tmp_path / "plain.pth")

    def refusal(choice: str, classes: int = 3, size: tuple[int, int] = (32, 32)) -> str:
        with pytest.raises(InputError) as caught:
            build_motivator(choice, classes, ImageSpec(size))
        return caught.value.text

    assert "--motivator nosuch: neither self nor ema, nor a file, nor a model's name" in refusal(
        "nosuch"
    )
    assert "nor a file" in refusal(str(tmp_path / "missing.pth"))
    assert "there is no file" in refusal(f"vit_nano_patch4_32={tmp_path / 'missing.pth'}")
    assert "names no file after the =" in refusal("vit_nano_patch4_32=")
    assert "Invalid pretrained tag (nosuch) for vit_base_patch16_224" in refusal(
        "vit_base_patch16_224.nosuch"
    )
    assert "predicts 3 classes, the data has 10. L_con uses its predictions: give" in refusal(
        str(ours), classes=10
    )
    assert "head.weight" in refusal(f"vit_nano_patch4_32={plain}", classes=10)
    assert "add the name of the model: NAME=" in refusal(str(plain))
    assert "the file holds a vit_nano_patch4_32; give the file alone" in refusal(
        f"vit_mini_patch4_32={ours}"
    )
    assert "cannot serve a student on 18 x 18 pixels" in refusal(str(ours), size=(18, 18))
    assert "cannot serve a student" in refusal(f"vit_mini_patch4_32={plain}")


def test_what_it_cannot_show_is_refused(tmp_path: Path) -> None:
    path = saved(network(name="test_resnet"), tmp_path / "resnet.pth")
    with pytest.raises(
        InputError,
        match=r"--score rollout: test_resnet=.*, a ResNet, has a score in its last block only",
    ):
        guide_of(network(), f"test_resnet={path}", "--score", "rollout")


# ----------------------------------------------------------------------------------------- in a run


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
        of_average, own = (
            training.ema.module.eval().motivating_pass(images),
            training.module.eval().motivating_pass(images),
        )
        training.module.train()
        seen.append(
            torch.equal(shown.logits, of_average.logits)
            and not torch.equal(shown.logits, own.logits)
        )

    with observing_steps(see):
        run = run_small(
            "--motivator ema --model-ema-decay 0.9 --mix-protocol single", "--data-path", photos
        )
    assert run.code == 0, run.err
    assert seen == [True] * 3


@pytest.mark.slow
def test_a_run_is_guided_by_a_file_and_goes_on_where_the_file_has_moved(
    photos: Path, tmp_path: Path
) -> None:
    path, moved = (
        saved(network(patch_size=2), tmp_path / "one.pth", patch_size=2),
        tmp_path / "two.pth",
    )
    words = ("--mix-protocol single --data-path", photos, "--output-dir", tmp_path / "run")
    first = run_small("--motivator", path, *words)
    before = {name: value.clone() for name, value in weights_of(first.training).items()}
    path.rename(moved)
    more = run_small("--epochs 2 --accept-changes epochs --auto-resume --motivator", moved, *words)
    assert more.code == 0, more.err
    assert any(
        not torch.equal(value, before[name]) for name, value in weights_of(more.training).items()
    )
    self_again = run_small("--epochs 3 --accept-changes epochs --auto-resume", *words)
    assert self_again.code == 2
    assert "-> self" in self_again.err
    assert "--accept-changes motivator" in self_again.err


def test_a_run_refuses_predictions_of_other_classes_but_not_their_score(
    photos: Path, tmp_path: Path
) -> None:
    spec = ImageSpec((16, 16))
    path = saved(
        network(input_size=(16, 16)),
        tmp_path / "weights.pth",
        ("ant", "bee", "dog"),
        spec,
        drop=0.0,
    )
    words = ("--mix-protocol single --max-steps 1 --data-path", photos, "--motivator", path)
    for method in ("--mixer smmix", "--mixer cutmix --con-weight 1"):
        refused = run_small(method, *words)
        assert refused.code == 2
        assert f"--motivator {path}: predicts other classes than the data has; " in refused.err
        assert "1 only in the motivator: dog; 1 only in the data: cat." in refused.err
    score_alone = run_small("--con-weight 0", *words)
    assert score_alone.code == 0, score_alone.err
