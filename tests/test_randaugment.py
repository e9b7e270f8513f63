"""RandAugment on the device: timm's draws one by one, Pillow's pixels bit by bit, and the runs that
use it."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling
from timm.data import auto_augment as timms
from timm.data import create_transform
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from config import build
from config.flags import get_args_parser
from datasets import open_images
from errors import InputError
from pipeline import randaugment, randaugment_pixels
from pipeline.erasing import Erasing
from pipeline.images import StreamedImages
from pipeline.loaders import build_train_loader
from pipeline.randaugment import (
    COLUMNS,
    NOTHING,
    Encoder,
    Kind,
    Recorder,
    Row,
    as_tensor,
    count_kinds,
)
from pipeline.samples import Batch, TrainSamples, train_samples
from pipeline.spec import Augment, ImageSpec
from pipeline.transforms import PendingAugment, build_train_transform, fill_color, posterize
from tests.image_folders import make_image_folder, make_webdataset, message_of, picture
from tests.runs import Killed, differences, killed_after, run_small, split, state_of
from utils import Processes, keyed_globals

FILL = (124, 116, 104)
NAMES = sorted(
    {*timms._RAND_TRANSFORMS, *timms._RAND_INCREASING_TRANSFORMS, *timms._RAND_WEIGHTED_0}
)
RECIPE = "rand-m9-mstd0.5-inc1"
POLICIES = (
    RECIPE,
    "rand-m9-n3",
    "rand-m7-p0.8-mstd1-inc1-tweights",
    "rand-mstd200-mmax20-p1-inc1-n1",
    "rand-m10-n0",
)


def pictures(look: str, count: int, size: tuple[int, int]) -> np.ndarray:
    """(count, H, W, 3) uint8: noise, soft shapes with grain, flat colors, or flat but for one
    pixel."""
    rng = np.random.default_rng(count + sum(size))
    if look == "noise":
        return rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    if look == "soft":
        coarse = [
            Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)) for _ in range(count)
        ]
        soft = np.stack(
            [np.asarray(image.resize(size[::-1], Resampling.BICUBIC)) for image in coarse]
        ).astype(float)
        soft = soft * rng.uniform(0.3, 1, (count, 1, 1, 3)) + rng.uniform(0, 80, (count, 1, 1, 3))
        return np.clip(soft + rng.normal(0, 2, soft.shape), 0, 255).astype(np.uint8)
    flat = np.broadcast_to(
        rng.integers(0, 256, (count, 1, 1, 3), dtype=np.uint8), (count, *size, 3)
    ).copy()
    if look == "all but one":
        flat[:, size[0] // 2, 1] = rng.integers(0, 256, (count, 3))
    return flat


def as_batch(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def timms_function(name: str) -> Any:
    """What timm does under this name, guarded where Pillow raises."""
    return posterize if name.startswith("Posterize") else timms.NAME_TO_OP[name]


def by_pillow(
    name: str, image: np.ndarray, levels: tuple[float, ...], resample: Resampling
) -> np.ndarray:
    """The slow reference: timm's function, which is Pillow's."""
    return np.array(
        timms_function(name)(Image.fromarray(image), *levels, resample=resample, fillcolor=FILL)
    )


def levels_of(name: str, magnitude: float) -> tuple[float, ...]:
    level = timms.LEVEL_TO_ARG[name]
    return level(magnitude, {}) if level else ()


def largest_difference(
    name: str,
    images: np.ndarray,
    levels: Sequence[tuple[float, ...]],
    resample: Resampling = Resampling.BICUBIC,
) -> int:
    size = images.shape[1:3]
    rows = [
        Encoder(name)(Recorder(size), *own, resample=resample, fillcolor=FILL).rows
        for own in levels
    ]
    ours = (
        randaugment_pixels.apply(as_batch(images), as_tensor(rows), FILL)
        .permute(0, 2, 3, 1)
        .numpy()
    )
    theirs = [
        by_pillow(name, image, own, resample) for image, own in zip(images, levels, strict=True)
    ]
    return int(np.abs(ours.astype(int) - np.stack(theirs)).max())


# -------------------------------------------------------------------------- one operation at a time


@pytest.mark.parametrize("name", NAMES)
def test_each_operation_gives_pillows_levels(name: str) -> None:
    """Over all magnitudes, both signs, two shapes, four kinds of images, both interpolations: no
    level differs."""
    random.seed(name)
    magnitudes = [*np.linspace(0, 10, 12).tolist(), 9.0, 9.4]
    for resample in (Resampling.BICUBIC, Resampling.BILINEAR)[
        : 2 if name in randaugment.WARPS else 1
    ]:
        for size in ((48, 48), (17, 40)):
            for look in ("noise", "soft", "flat", "all but one"):
                images = pictures(look, len(magnitudes), size)
                assert (
                    largest_difference(
                        name, images, [levels_of(name, m) for m in magnitudes], resample
                    )
                    == 0
                )


@pytest.mark.parametrize("name", NAMES)
def test_magnitudes_beyond_ten_too(name: str) -> None:
    """-mmax asks for them: quarter turns, shifts out of the image, fewer bits than none."""
    levels = [
        levels_of(name, magnitude)
        for magnitude in (10.5, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0)
    ]
    for size in ((40, 40), (24, 36)):
        assert largest_difference(name, pictures("soft", len(levels), size), levels) == 0


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_tables_of_unusual_histograms(name: str) -> None:
    rng = np.random.default_rng(0)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    edges = np.where(rng.random((16, 16, 3)) < 0.02, 255, 0).astype(np.uint8)
    close = rng.integers(100, 102, (16, 16, 3), dtype=np.uint8)
    last = np.where(rng.random((16, 16, 3)) < 0.9, 255, rng.integers(0, 256, (16, 16, 3))).astype(
        np.uint8
    )
    mixed = np.stack([ramp[:, :, 0], close[:, :, 0], np.full((16, 16), 7, np.uint8)], axis=2)
    few = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) // 64 * 64
    images = np.stack(
        [ramp, 255 - ramp, ramp // 2, ramp // 2 + 100, edges, close, last, mixed, few, 255 - edges]
    )
    assert largest_difference(name, images, [()] * len(images)) == 0


def test_no_bit_is_black_and_eight_bits_are_all() -> None:
    images = pictures("noise", 3, (8, 8))
    rows = [Encoder("Posterize")(Recorder((8, 8)), bits, resample=None).rows for bits in (0, -3, 8)]
    done = randaugment_pixels.apply(as_batch(images), as_tensor(rows), FILL)
    assert not done[:2].any()
    assert torch.equal(done[2], as_batch(images)[2])


def test_images_too_small_to_smooth_stay() -> None:
    for size in ((2, 9), (1, 1), (3, 3)):
        assert (
            largest_difference("Sharpness", pictures("noise", 3, size), [(0.1,), (1.5,), (1.9,)])
            == 0
        )


def test_the_comparison_finds_a_fault() -> None:
    images, levels = pictures("soft", 4, (32, 32)), [(7.0,)] * 4
    with patch.object(randaugment_pixels, "GRAY", (19595, 38469, 7472)):
        assert largest_difference("Color", pictures("noise", 4, (90, 90)), [(0.1,)] * 4) == 1
    with patch.object(randaugment_pixels, "_cubic", lambda a, b, c, d, share: b + (c - b) * share):
        assert largest_difference("Rotate", images, levels) > 1
    with patch.object(
        randaugment, "_rotation", lambda degrees, x, y: (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    ):
        assert largest_difference("Rotate", images, levels) > 1


# ---------------------------------------------------------------------------------------- the draws


def states() -> tuple[Any, ...]:
    """Where the three generators stand."""
    name, keys, *rest = np.random.get_state()
    return (
        random.getstate(),
        (name, bytes(np.asarray(keys)), *rest),
        torch.get_rng_state().numpy().tobytes(),
    )


def timms_calls(step: timms.RandAugment, image: Image.Image) -> list[tuple[Any, ...]]:
    """(name, arguments) of what timm's object does to an image, in order."""
    called: list[tuple[Any, ...]] = []

    def noting(operation: timms.AugmentOp) -> Callable[..., Any]:
        def note(given: Any, *levels: float, **more: Any) -> Any:
            called.append((operation.name, *levels))
            return timms_function(operation.name)(given, *levels, **more)

        return note

    for operation in step.ops:
        operation.aug_fn = noting(operation)
    step(image)
    return called


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_drawn_is_what_timm_draws(policy: str, interpolation: str) -> None:
    """Operation by operation with its arguments, and every generator stands where timm leaves
    it."""
    settings: dict[str, Any] = {
        "is_training": True,
        "auto_augment": policy,
        "interpolation": interpolation,
    }
    _, flip, theirs, *_ = create_transform(48, **settings).transforms
    _, *steps, _, _ = create_transform(48, **settings).transforms
    draw, image = (
        randaugment.DrawOnly(steps, (48, 48)),
        Image.fromarray(pictures("soft", 1, (48, 48))[0]),
    )
    called: list[tuple[Any, ...]] = []
    real = Encoder.__call__

    def note(encoder: Encoder, drawing: Recorder, *levels: float, **more: Any) -> Recorder:
        called.append((encoder.name, *levels))
        return real(encoder, drawing, *levels, **more)

    with patch.object(Encoder, "__call__", note):
        for number in range(120):
            called.clear()
            with keyed_globals("sample", number):
                rows, after = draw(), states()
            with keyed_globals("sample", number):
                flipped = flip(image) is not image
                expected = timms_calls(theirs, image)
                assert after == states()
            assert called == [
                (name.removesuffix("Increasing"), *levels) for name, *levels in expected
            ]
            assert len(rows) == draw.layers == 1 + theirs.num_layers
            assert (rows[0].kind == Kind.FLIP) == flipped
            assert sum(row.kind != Kind.NOTHING for row in rows[1:]) == len(expected)


def test_each_operation_and_each_layer_is_drawn_as_often_as_it_should() -> None:
    transform = build_train_transform(ImageSpec((40, 40)), Augment(randaugment="device"))
    draw, called = transform.transforms[-1].draw, Counter[str]()
    real = Encoder.__call__

    def note(encoder: Encoder, *given: Any, **more: Any) -> Recorder:
        called[encoder.name] += 1
        return real(encoder, *given, **more)

    with patch.object(Encoder, "__call__", note):
        rows = [draw() for _ in range(4000)]
    kinds = Counter(tuple(row.kind != Kind.NOTHING for row in own) for own in rows)
    shares = [sum(count for key, count in kinds.items() if key[layer]) / 4000 for layer in range(3)]
    assert shares == pytest.approx(
        [0.5, 0.75, 0.25], abs=0.03
    )  # what is left out of two comes last
    assert len(called) == 15
    assert all(
        count == pytest.approx(4000 / 15, abs=70) for count in called.values()
    )  # 4.4 standard deviations
    warped = [row.numbers for own in rows for row in own if row.kind == Kind.BICUBIC]
    turned = sum(numbers[2] > 0 for numbers in warped) / len(
        warped
    )  # to the right or by a turn: two of five, one sign
    assert turned == pytest.approx(0.2, abs=0.04)


def test_the_color_outside_is_timms() -> None:
    for spec in (ImageSpec((48, 48)), ImageSpec((48, 48), mean=(0.5, 1.0, 0.001))):
        steps = create_transform(
            48, is_training=True, auto_augment=RECIPE, mean=spec.mean
        ).transforms
        assert steps[2].ops[3].kwargs["fillcolor"] == fill_color(spec)
    assert fill_color(ImageSpec((48, 48))) == FILL


# ------------------------------------------------------------------------------------- in the batch


def some_rows(count: int, layers: int = 2, seed: int = 0) -> list[list[Row]]:
    """Every kind in every layer, as far as they go."""
    chance = random.Random(seed)
    numbers = {Kind.RULE: (100.0, 40.0, 1.0, 224.0), Kind.BICUBIC: (0.9, 0.2, 3.0, -0.2, 0.9, 5.5)}
    numbers[Kind.BILINEAR] = numbers[Kind.BICUBIC]
    made = []
    for layer in range(layers):
        kinds = [Kind((image + layer) % len(Kind)) for image in range(count)]
        chance.shuffle(kinds)
        filled = [(*numbers.get(kind, (0.4,)), *(0.0,) * 6)[:6] for kind in kinds]
        made.append([Row(kind, own) for kind, own in zip(kinds, filled, strict=True)])
    return [list(rows) for rows in zip(*made, strict=True)]


def test_rows_of_a_layer_are_sorted_by_kind_and_none_is_lost() -> None:
    drawn = some_rows(30, layers=3)
    table = as_tensor(drawn)
    assert (table.shape, table.dtype, table.is_contiguous()) == (
        (30, 3, COLUMNS),
        torch.float64,
        True,
    )
    for layer, counts in enumerate(count_kinds(table)):
        own = table[:, layer].tolist()
        assert [row[0] for row in own] == sorted(row[0] for row in own)
        assert counts == [sum(row[0] == kind for row in own) for kind in Kind]
        assert {int(image): (int(kind), *rest) for kind, image, *rest in own} == {
            image: (int(rows[layer].kind), *rows[layer].numbers) for image, rows in enumerate(drawn)
        }
    assert as_tensor([[], [], []]).shape == (3, 0, COLUMNS)
    assert as_tensor([[NOTHING]]).tolist() == [[[0.0] * COLUMNS]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_batch_is_its_images_one_by_one(layout: torch.memory_format) -> None:
    images = as_batch(pictures("soft", 33, (20, 24))).contiguous(memory_format=layout)
    drawn, before = some_rows(33), images.clone()
    done = randaugment_pixels.apply(images, as_tensor(drawn), FILL)
    alone = [
        randaugment_pixels.apply(image[None], as_tensor([own]), FILL)
        for image, own in zip(images, drawn, strict=True)
    ]
    assert torch.equal(done, torch.cat(alone))
    assert torch.equal(images, before)  # the loader's own pixels stay
    assert done.is_contiguous(memory_format=layout)
    assert sum(not torch.equal(new, old) for new, old in zip(done, images, strict=True)) > 25


class Counting(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_the_number_of_tensor_operations_does_not_depend_on_the_batch() -> None:
    counted = []
    for count in (11, 44, 110):
        images, drawn = (
            torch.zeros(count, 3, 8, 8, dtype=torch.uint8),
            as_tensor(some_rows(count, seed=count)),
        )
        with Counting() as counting:
            randaugment_pixels.apply(images, drawn, FILL)
        counted.append(counting.names)
    assert counted[0] == counted[1] == counted[2]
    assert (
        counted[0]["aten.index_copy_.default"] == 2 * 5
    )  # per layer: flips, tables, two kinds of warp, blends
    assert counted[0]["aten.scatter_add_.default"] == 2


def test_no_value_is_asked_of_the_device() -> None:
    """Tensors of `meta` have none: reading one would raise."""
    images = torch.empty(33, 3, 16, 16, dtype=torch.uint8, device="meta")
    with pytest.raises(RuntimeError):
        images.nonzero()
    done = randaugment_pixels.apply(images, as_tensor(some_rows(33)), FILL)
    assert (done.shape, done.dtype, done.device.type) == (images.shape, torch.uint8, "meta")
    with pytest.raises(AssertionError, match="wait for the device"):
        randaugment_pixels.apply(images, as_tensor(some_rows(33)).to("meta"), FILL)


# --------------------------------------------------------------------------------- whole transforms


@pytest.mark.parametrize(
    ("side", "settings", "count"),
    [
        (224, {"resize": "torch"}, 20),
        (64, {}, 200),
        (32, {}, 200),  # padded and cropped
        (40, {"src": True}, 60),
        (48, {"interpolation": "random", "aa": "rand-m9-n3-p0.9-mstd1", "resize": "torch"}, 120),
        (
            40,
            {"interpolation": "bilinear", "aa": "rand-m9-mstd0.5-inc1-tweights", "hflip": 0.0},
            80,
        ),
    ],
)
def test_the_device_gives_the_same_pixels(side: int, settings: dict[str, Any], count: int) -> None:
    """From arrays and from Pillow's images, under the same keys; and the generators are left
    alike."""
    spec = ImageSpec((side, side))
    cpu, device = (
        build_train_transform(spec, Augment(randaugment=name, **settings))
        for name in ("cpu", "device")
    )
    expected, pixels, rows = [], [], []
    for number in range(count):
        image: Any = picture(number % 7, (side + 13, side + 40))
        image = np.array(image) if number % 2 else image
        with keyed_globals("sample", number):
            expected.append(cpu(image))
            after = states()
        with keyed_globals("sample", number):
            made = device(image)
            assert states() == after
        assert isinstance(made, PendingAugment)
        assert (made.pixels.shape, made.pixels.dtype) == ((3, side, side), torch.uint8)
        pixels.append(made.pixels)
        rows.append(made.operations)
    done = randaugment_pixels.apply(torch.stack(pixels), as_tensor(rows), fill_color(spec))
    assert torch.equal(done, torch.stack(expected))
    assert not torch.equal(torch.stack(pixels), done)


def samples_of(root: Path, where: str, erase: Erasing | None = None) -> TrainSamples:
    transform = build_train_transform(ImageSpec((32, 32)), Augment(randaugment=where))
    made = train_samples(open_images("IMNET", str(root), True), transform, seed=3, erase=erase)
    assert isinstance(made, TrainSamples)
    return made


def done_like(exact: Batch, undone: Batch) -> bool:
    same = all(
        torch.equal(getattr(exact, name), getattr(undone, name))
        for name in ("labels", "indices", "replaced", "boxes")
    )
    assert undone.operations is not None
    done = randaugment_pixels.apply(undone.images, undone.operations, FILL)
    return same and torch.equal(done, exact.images)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_hand_over_what_is_left_to_do(tmp_path: Path, workers: int) -> None:
    root = make_image_folder(tmp_path, ("ant", "bee"), per_class=5)
    settings: dict[str, Any] = {"batch_size": 6, "repeats": 3, "num_workers": workers}
    exact, undone = (
        list(build_train_loader(samples_of(root, where, Erasing(0.5)), **settings))
        for where in ("cpu", "device")
    )
    assert [batch.operations.shape for batch in exact] == [(6, 0, COLUMNS)] * len(exact)
    assert [batch.operations.shape for batch in undone] == [(6, 3, COLUMNS)] * len(exact)
    assert all(done_like(one, other) for one, other in zip(exact, undone, strict=True))


def test_streams_leave_it_undone_too(tmp_path: Path) -> None:
    make_webdataset(tmp_path)

    def batches(where: str) -> list[Batch]:
        images = open_images(
            "timm/wds/shards", str(tmp_path), True, num_classes=3, batch_size=3, seed=0
        )
        assert isinstance(images, StreamedImages)
        transform = build_train_transform(ImageSpec((32, 32)), Augment(randaugment=where))
        return list(build_train_loader(train_samples(images, transform, seed=0), batch_size=3))

    exact, undone = batches("cpu"), batches("device")
    assert len(exact) == 4
    assert all(done_like(one, other) for one, other in zip(exact, undone, strict=True))


def test_the_transform_travels_into_spawned_workers() -> None:
    for side in (32, 48):
        transform = build_train_transform(ImageSpec((side, side)), Augment(randaugment="device"))
        copy = pickle.loads(pickle.dumps(transform))
        for number in range(10):
            with keyed_globals("sample", number):
                made = transform(picture(0))
            with keyed_globals("sample", number):
                assert copy(picture(0)).operations == made.operations


# --------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "policy", ["none", "augmix-m3-w3", "original", "v0-mstd0.5", "3a", "rand-m9-t3a", "rand-t3aw"]
)
def test_other_policies_are_refused(policy: str) -> None:
    said = message_of(InputError, Augment, aa=policy, randaugment="device")
    assert "--randaugment device" in said
    assert f"not --aa {policy}" in said
    assert "use --randaugment cpu" in said
    assert Augment(aa=policy).randaugment == "cpu"


def test_a_device_without_float64_is_refused() -> None:
    args = get_args_parser().parse_args(["--randaugment", "device"])
    processes = Processes(0, 1, torch.device("mps"))
    said = message_of(
        InputError, build.make_train_loader, args, None, ImageSpec((48, 48)), processes
    )
    assert "mps has no float64" in said


def test_other_interpolations_and_places_are_refused() -> None:
    said = message_of(InputError, Augment, interpolation="lanczos", randaugment="device")
    assert "--train-interpolation lanczos" in said
    assert "bicubic" in said
    assert "cpu or device" in message_of(InputError, Augment, randaugment="gpu")
    for name in ("GaussianBlur", "Desaturate", "TranslateX"):
        with pytest.raises(KeyError, match=name):
            Encoder(name)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(
        tmp_path_factory.mktemp("photos"), ("ant", "bee"), per_class=8, size=(40, 40)
    )


# three steps
WORDS = f"--aa {RECIPE} --batch-size 5 --epochs 1 --warmup-epochs 0 --lr 0.1 --no-model-ema"


def test_a_run_is_refused_in_words(photos: Path) -> None:
    run = run_small("--randaugment device --data-path", photos)  # with --aa none
    assert run.code == 2
    assert "--randaugment device: supports timm's rand-... policies" in run.err


@pytest.mark.parametrize(
    "more", ["--input-size 16", "--input-size 48 --channels-last --num-workers 1"]
)
def test_a_run_learns_the_same_to_the_bit(photos: Path, more: str) -> None:
    words = split(WORDS, more, "--data-path", photos)
    exact, run = (run_small(*words, "--randaugment", where).training for where in ("cpu", "device"))
    assert differences(state_of(run), state_of(exact)) == []


def test_a_run_goes_on_with_it_and_without_it(photos: Path, tmp_path: Path) -> None:
    words = split(WORDS, "--save-steps 1 --data-path", photos)
    whole = run_small(*words, "--output-dir", tmp_path / "whole", "--randaugment device").training
    for before, after in (("device", "device"), ("cpu", "device")):
        folder = tmp_path / f"{before} {after}"
        with killed_after(1), pytest.raises(Killed):
            run_small(*words, "--output-dir", folder, f"--randaugment {before}")
        run = run_small(*words, "--output-dir", folder, f"--auto-resume --randaugment {after}")
        assert differences(state_of(run.training), state_of(whole)) == []
