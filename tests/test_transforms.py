"""Images to tensors: DeiT's recipe, the small-image recipe, posterize with 0 bits, and what unknown
names say."""

from __future__ import annotations

import json
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from timm.data.auto_augment import posterize as timm_posterize
from torchvision import transforms as tv

from errors import InputError
from pipeline import transforms
from pipeline.spec import RESIZERS, Augment, ImageSpec
from pipeline.transforms import (
    CropAndResize,
    build_eval_transform,
    build_train_transform,
    denormalise,
    normalise,
)
from tests.image_folders import picture
from utils import keyed_globals

DEIT = "rand-m9-mstd0.5-inc1"
PLAIN = Augment(aa=None, color_jitter=0.0, reprob=0.0, hflip=0.0)


def tensor_of(image: Image.Image, spec: ImageSpec) -> torch.Tensor:
    return tv.Compose([tv.ToTensor(), tv.Normalize(spec.mean, spec.std)])(image)


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (48, 96)])
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_large_images_follow_timms_recipe_draw_by_draw(
    size: tuple[int, int], interpolation: str
) -> None:
    """As pixels, and bit for bit as ToTensor and Normalize make floats of them."""
    spec = ImageSpec(size)
    ours = build_train_transform(spec, Augment(interpolation=interpolation))
    timms = create_transform(
        size,
        is_training=True,
        color_jitter=0.3,
        auto_augment=DEIT,
        interpolation=interpolation,
        re_prob=0,
    )
    images: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    for number in range(12):
        image = picture(number, (120, 90))
        for transform, pixels, results in (
            (ours, image, images),
            (ours, np.array(image), images),
            (timms, image, expected),
        ):
            with keyed_globals("test", number):
                results.append(transform(pixels))
        assert (images[-1].shape, images[-1].dtype) == ((3, *size), torch.uint8)
    assert torch.equal(normalise(torch.stack(images[::2]), spec), torch.stack(expected))
    assert torch.equal(torch.stack(images[::2]), torch.stack(images[1::2]))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_torch_resizes_nearly_as_pillow_does(interpolation: str) -> None:
    spec = ImageSpec((96, 64))
    transforms_of = [
        build_train_transform(spec, replace(PLAIN, interpolation=interpolation, resize=name))
        for name in RESIZERS
    ]
    differences = []
    for number in range(40):
        image = picture(number, (150, 120))
        results = []
        for transform, pixels in zip(
            [*transforms_of, transforms_of[1]], (image, image, np.array(image)), strict=True
        ):
            with keyed_globals("test", number):
                results.append(transform(pixels).float())
        assert torch.equal(results[1], results[2])
        differences.append(float((results[0] - results[1]).abs().mean()))
    assert 0 < sum(differences) / len(differences) < 0.1


def test_what_torch_resizes_lies_row_by_row() -> None:
    """Else every later step would have to sort the colours of each pixel together."""
    crop = CropAndResize("torch", size=(96, 64), interpolation="bicubic")
    for pixels in (picture(1, (150, 120)), np.array(picture(1, (150, 120)))):
        resized = crop.resized(pixels)
        assert isinstance(resized, np.ndarray)
        assert (resized.shape, resized.flags.c_contiguous) == ((96, 64, 3), True)


def test_torch_refuses_interpolations_that_it_lacks() -> None:
    with pytest.raises(
        InputError, match=r"--resize torch: has no --train-interpolation lanczos.*pillow.*bicubic"
    ):
        Augment(interpolation="lanczos", resize="torch")
    with pytest.raises(InputError, match=r"--resize opencv: use pillow or torch"):
        Augment(resize="opencv")


@pytest.mark.parametrize(("side", "padding"), [(28, 4), (32, 4), (16, 2), (8, 1)])
def test_small_images_are_padded_and_cropped_not_zoomed(side: int, padding: int) -> None:
    spec = ImageSpec((side, side))
    image = picture(3, (side, side))
    whole = np.asarray(ImageOps.expand(image, padding))
    windows = {
        whole[top : top + side, left : left + side].tobytes()
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }
    transform = build_train_transform(spec, PLAIN)
    seen = set()
    for number in range(40):
        with keyed_globals("test", number):
            pixels = transform(image).permute(1, 2, 0).numpy()
        seen.add(pixels.tobytes())
    assert seen <= windows
    assert len(seen) > 4


SIZES = ((90, 60), (60, 90), (70, 70), (5, 3), (400, 30))  # width, height


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [28, 32, 64, 224])
def test_the_simple_crop_is_torchvisions_draw_by_draw(side: int, interpolation: str) -> None:
    """DeiT III's, from either kind of decoded image."""
    plain = replace(PLAIN, interpolation=interpolation, src=True, hflip=0.5)
    ours = build_train_transform(ImageSpec((side, side)), plain)
    published = tv.Compose(
        [
            tv.Resize(side, tv.InterpolationMode(interpolation)),
            tv.RandomCrop(side, padding=4, padding_mode="reflect"),
            tv.RandomHorizontalFlip(0.5),
            tv.PILToTensor(),
        ]
    )
    for number, size in enumerate(SIZES):
        image = picture(number, size)
        results = []
        for transform, pixels in ((published, image), (ours, image), (ours, np.array(image))):
            with keyed_globals("test", side, number):
                results.append(transform(pixels))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("size", "padding"), [((48, 96), 4), ((96, 48), 4), ((33, 200), 4), ((8, 8), 1), ((1, 2), 1)]
)
def test_the_simple_crop_covers_any_input_size(size: tuple[int, int], padding: int) -> None:
    """Compared with every window of the padded image; torch's resize is nearly Pillow's."""
    spec, augment = ImageSpec(size), replace(PLAIN, src=True)
    transform = build_train_transform(spec, augment)
    by_torch = build_train_transform(spec, replace(augment, resize="torch"))
    for number, (width, height) in enumerate(SIZES):
        image = picture(number, (width, height))
        scale = max(size[0] / height, size[1] / width)
        resized = int(width * scale + 1e-6), int(height * scale + 1e-6)
        assert resized[0] == size[1] or resized[1] == size[0]
        pixels = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
        whole = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(whole, (*size, 3))[:, :, 0]
        with keyed_globals("test", number):
            made = transform(image)
        with keyed_globals("test", number):
            difference = (by_torch(image).float() - made.float()).abs().mean()
        assert (windows == made.permute(1, 2, 0).numpy()).all(axis=(2, 3, 4)).any()
        assert difference < 0.2


def test_small_images_of_another_size_are_resized_first() -> None:
    spec = ImageSpec((32, 32))
    with keyed_globals("test"):
        assert build_train_transform(spec, Augment())(picture(0, (8, 8))).shape == (3, 32, 32)
    eval_transform = build_eval_transform(spec)
    same = picture(0, (32, 32))
    assert torch.equal(eval_transform(same), tensor_of(same, spec))
    bigger = picture(0, (50, 40))
    assert torch.equal(
        eval_transform(bigger), tensor_of(bigger.resize((32, 32), Image.Resampling.BICUBIC), spec)
    )


@pytest.mark.parametrize("side", [32, 64])
def test_the_flip_probability_is_kept(side: int) -> None:
    for hflip in (0.0, 0.5, 1.0):
        transform = build_train_transform(ImageSpec((side, side)), Augment(hflip=hflip))
        flips = [
            step.p for step in transform.transforms if isinstance(step, tv.RandomHorizontalFlip)
        ]
        assert sum(flips) == hflip


def test_jitter_and_none_reach_the_pixels() -> None:
    spec = ImageSpec((32, 32))
    image = Image.new("RGB", (32, 32), (90, 120, 200))

    def changed(augment: Augment) -> float:
        transform, count = build_train_transform(spec, augment), 0
        for number in range(20):
            with keyed_globals("test", number):
                inner = transform(image)[:, 4:-4, 4:-4]
            count += not torch.equal(inner, tv.functional.pil_to_tensor(image)[:, 4:-4, 4:-4])
        return count / 20

    for none in (None, "", "none"):
        assert changed(Augment(aa=none, color_jitter=0.0)) == 0
    assert changed(Augment(aa=None, color_jitter=0.4)) > 0.8
    assert changed(Augment(aa=DEIT, color_jitter=0.4)) > 0.3


@pytest.mark.parametrize(
    "aa", [DEIT, "rand-m5-n3-p0.3-tweights", "augmix-m3-w2", "original-mstd0.5", "v0", "v0r", "3a"]
)
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_every_kind_of_automatic_augmentation_runs_and_travels(aa: str, interpolation: str) -> None:
    for side in (32, 40):
        transform = build_train_transform(
            ImageSpec((side, side)), Augment(aa=aa, interpolation=interpolation)
        )
        travelled = pickle.loads(pickle.dumps(transform))  # as into a spawned worker
        results = []
        for one in (transform, travelled):
            with keyed_globals("test", 5):
                results.append(one(picture(5)))
        assert torch.equal(*results)


# ---------------------------------------------------------------------------- posterize with 0 bits


def pillow_refuses_0_bits() -> bool:
    try:
        ImageOps.posterize(picture(0), 0)
    except ValueError:
        return True
    return False


def posterize_only(transform: tv.Compose) -> tv.Compose:
    """The transform's RandAugment with nothing but posterize in it, so that few draws meet every
    level often."""
    for step in transform.transforms:
        if hasattr(step, "ops"):
            step.ops = [op for op in step.ops if "Posterize" in op.name]
            assert step.ops
    return transform


def draw_many(transform, count: int, image: Image.Image) -> None:
    for number in range(count):
        random.seed(number)
        np.random.seed(number)
        transform(image)


def test_p15_the_default_recipe_survives_its_own_augmentation() -> None:
    image = picture(0, (8, 8))
    spec = ImageSpec((8, 8))
    draw_many(build_train_transform(spec, Augment()), 2_000, image)
    draw_many(
        posterize_only(build_train_transform(spec, Augment())), 4_000, image
    )  # worth 60,000 of the above


@pytest.mark.skipif(
    not pillow_refuses_0_bits(), reason="this Pillow returns a black image for 0 bits"
)
def test_unguarded_the_same_draws_raise() -> None:
    unguarded = tv.Compose([rand_augment_transform(DEIT, {"img_mean": (124, 116, 104)})])
    with pytest.raises(ValueError, match="bits"):
        draw_many(posterize_only(unguarded), 4_000, picture(0, (8, 8)))


@pytest.mark.parametrize(
    "aa", [DEIT, "rand-m9-mstd0.5", "augmix-m3-w2", "original", "originalr", "v0", "v0r"]
)
def test_every_posterize_is_guarded_and_timms_own_is_left_alone(aa: str) -> None:
    for side in (32, 64):
        steps = build_train_transform(ImageSpec((side, side)), Augment(aa=aa)).transforms
        operations = [op for step in steps for op in transforms._operations(step)]
        functions = {op.aug_fn for op in operations if "Posterize" in op.name}
        assert functions == {transforms.posterize}
    assert AugmentOp("Posterize").aug_fn is timm_posterize


def test_guarded_posterize_equals_timms_wherever_bits_are_left() -> None:
    image = picture(2)
    for bits in range(1, 9):
        assert transforms.posterize(image, bits) == timm_posterize(image, bits)
    for bits in (0, -1):
        assert transforms.posterize(image, bits) == Image.new("RGB", image.size)


def test_other_errors_of_an_operation_surface() -> None:
    transform = posterize_only(build_train_transform(ImageSpec((32, 32)), Augment()))
    with pytest.raises(ValueError, match="not an operation's business"):
        draw_many(transform, 10, Refuses("RGB", (32, 32)))


class Refuses(Image.Image):
    """An image that no operation can read."""

    def __init__(self, mode: str, size: tuple[int, int]) -> None:
        super().__init__()
        self._mode, self._size = mode, size

    def load(self):
        raise ValueError("not an operation's business")


# --------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    ("side", "ratio", "resized"),
    [(224, 0.875, 256), (224, 1.0, 224), (384, 0.875, 438), (64, 0.9, 71)],
)
def test_evaluation_resizes_and_crops_as_deit_does(side: int, ratio: float, resized: int) -> None:
    spec = ImageSpec((side, side), crop_ratio=ratio)
    for number, size in enumerate([(500, 375), (300, 400), (90, 60)]):
        image = picture(number, size)
        resize = tv.Resize(resized, interpolation=tv.InterpolationMode.BICUBIC)
        expected = tensor_of(tv.CenterCrop(side)(resize(image)), spec)
        assert torch.equal(build_eval_transform(spec)(image), expected)


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (33, 200)])
@pytest.mark.parametrize("ratio", [0.875, 1.0])
def test_non_square_inputs_are_filled_without_padding_or_stretching(
    size: tuple[int, int], ratio: float
) -> None:
    spec = ImageSpec(size, crop_ratio=ratio)
    white = Image.new("RGB", (130, 110), (255, 255, 255))
    pixels = denormalise(build_eval_transform(spec)(white)[None], spec)
    assert pixels.shape == (1, 3, *size)
    assert bool((pixels == 255).all())  # a padded crop would have black borders


def test_evaluation_interpolation_is_used() -> None:
    image = picture(0, (100, 80))
    results = [
        build_eval_transform(ImageSpec((64, 64), interpolation=name))(image)
        for name in ("bicubic", "nearest")
    ]
    assert not torch.equal(*results)


def test_denormalise_gives_the_pixels_back() -> None:
    spec = ImageSpec((32, 32))
    image = picture(4, (32, 32))
    batch = torch.stack([tensor_of(image, spec), torch.full((3, 32, 32), 99.0)])
    pixels = denormalise(batch, spec)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), np.asarray(image))
    assert bool((pixels[1] == 255).all())


# ---------------------------------------------------------------------------------- specs, messages


def test_the_spec_survives_json_and_a_weights_only_load(tmp_path) -> None:
    spec = ImageSpec((96, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9)
    plain = spec.to_plain()
    assert ImageSpec.from_plain(json.loads(json.dumps(plain))) == spec
    torch.save(plain, tmp_path / "spec.pth")
    assert ImageSpec.from_plain(torch.load(tmp_path / "spec.pth", weights_only=True)) == spec


@pytest.mark.parametrize(
    "aa", ["rand-m9-foo1", "rand-x", "autoaugment", "rand9", "v1", "rand-m9-", "augmix-q1"]
)
def test_unknown_augmentations_name_the_flag(aa: str) -> None:
    with pytest.raises(InputError, match=r"--aa .*rand-m9-mstd0\.5-inc1"):
        Augment(aa=aa)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"interpolation": "cubic"}, "--train-interpolation cubic.*bicubic"),
        ({"remode": "pixels"}, "--remode pixels.*pixel"),
        ({"recount": 0}, "--recount 0.*--reprob 0"),
        ({"reprob": 1.5}, "--reprob 1.5"),
    ],
)
def test_bad_settings_name_the_flag(setting: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Augment(**setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"input_size": (0, 32)}, "--input-size"),
        ({"input_size": (32, 32), "crop_ratio": 1.2}, "--eval-crop-ratio 1.2"),
        ({"input_size": (32, 32), "crop_ratio": 0.0}, "--eval-crop-ratio 0.0"),
        ({"input_size": (32, 32), "interpolation": "random"}, "random.*bicubic"),
    ],
)
def test_bad_specs_name_the_flag(setting: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImageSpec(**setting)
