"""The saliency map against OpenCV's detector, against the formula in plain loops, and its contract
as a function."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mixers.saliency import SCALES, fine_grained_saliency

GIVEN_SIZES = [(33, 50), (224, 224), (100, 260), (8, 8), (24, 24), (1, 40), (40, 1), (2, 3)]


def noise(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (*size, 3))


def faint_noise(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    return rng.integers(100, 104, (*size, 3))


def gradient(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.linspace(0, 1, size[0])[:, None, None], np.linspace(0, 1, size[1])[:, None]
    return 20 + 110 * (rows * rng.random(3) + columns * rng.random(3))


def blobs(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = np.full((*size, 3), 80.0)
    for _ in range(4):
        distance = (rows - rng.uniform(0, size[0])) ** 2 + (columns - rng.uniform(0, size[1])) ** 2
        image += (
            rng.uniform(-60, 40, 3) * np.exp(-distance / (2 * rng.uniform(2, 30) ** 2))[..., None]
        )
    return image


def rectangles(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    image = np.full((*size, 3), 90)
    for _ in range(5):
        top, left, height, width = (
            rng.integers(0, size[0]),
            rng.integers(0, size[1]),
            *rng.integers(1, 40, 2),
        )
        image[top : top + height, left : left + width] = rng.integers(0, 256, 3)
    return image


KINDS = [noise, faint_noise, gradient, blobs, rectangles]


def make(kind: Callable[..., np.ndarray], size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return kind(size, np.random.default_rng(seed)).clip(0, 255).astype(np.uint8)  # (H, W, 3), RGB


def tensor(*images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(
        0, 3, 1, 2
    )  # (B, 3, H, W): a view that is not contiguous


def ours(image: np.ndarray) -> np.ndarray:
    return fine_grained_saliency(tensor(image))[0].numpy()


def opencv(image: np.ndarray) -> np.ndarray:
    """The detector as it is meant: uint8 and, as it assumes, BGR."""
    cv2 = pytest.importorskip("cv2")
    found, saliency = cv2.saliency.StaticSaliencyFineGrained_create().computeSaliency(
        image[..., ::-1].copy()
    )
    assert found
    assert saliency.dtype == np.float32
    return saliency


def plain(image: np.ndarray, as_opencv: bool = False) -> np.ndarray:
    """The map in numpy, windows by clipped indices; `as_opencv`: with its sums in float32 and its
    wrap."""
    cv2 = pytest.importorskip("cv2")
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    gray = cv2.GaussianBlur(cv2.GaussianBlur(gray, (3, 3), 0), (3, 3), 0).astype(np.int64)
    integral = (
        np.pad(gray, ((1, 0), (1, 0)))
        .cumsum(0)
        .cumsum(1)
        .astype(np.float32 if as_opencv else np.float64)
    )
    on, off = np.zeros_like(gray), np.zeros_like(gray)
    for scale in SCALES:
        (top, bottom), (left, right) = (
            (
                np.clip(np.arange(size) - scale + 1, 0, size),
                np.clip(np.arange(size) + scale + 1, 0, size),
            )
            for size in gray.shape
        )
        sums = (
            integral[bottom][:, right]
            + integral[top][:, left]
            - integral[bottom][:, left]
            - integral[top][:, right]
        )
        areas = (bottom - top)[:, None] * (right - left)
        difference = gray - (sums - gray) / np.maximum(areas - 1, 1)
        on += np.maximum(difference, 0).astype(np.int64)
        off += np.maximum(-difference, 0).astype(np.int64)
    parts = [np.float32(part) / np.float32(max(part.max(), 1)) for part in (on, off)]
    total = np.sum([(255.0 * part.astype(np.float64)).astype(np.int64) for part in parts], axis=0)
    total = total % 256 if as_opencv else np.minimum(total, 255)
    return total.astype(np.float32) * np.float32(1 / 255)


def loops(image: np.ndarray) -> np.ndarray:
    """The whole algorithm, a pixel at a time, in integers; the last floor by the float32 quotient,
    as OpenCV has it."""
    height, width, _ = image.shape

    def mirror(place: int, size: int) -> int:
        return 0 if size == 1 else size - 1 - abs(size - 1 - abs(place))

    pixels = [(y, x) for y in range(height) for x in range(width)]
    gray = {at: (image[at].astype(int) @ [9798, 19235, 3735] + 2**14) // 2**15 for at in pixels}
    for _ in range(2):
        smooth = {}
        for y, x in pixels:
            near = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            total = sum(
                (2 - abs(i)) * (2 - abs(j)) * gray[mirror(y + i, height), mirror(x + j, width)]
                for i, j in near
            )
            smooth[y, x] = (total + 8) // 16
        gray = smooth
    on, off = dict.fromkeys(pixels, 0), dict.fromkeys(pixels, 0)
    for n in (12, 24, 48, 28, 56, 112):
        for y, x in pixels:
            window = [(i, j) for i, j in pixels if y - n < i <= y + n and x - n < j <= x + n]
            others, count = sum(gray[at] for at in window) - gray[y, x], max(len(window) - 1, 1)
            on[y, x] += max(gray[y, x] * (len(window) - 1) - others, 0) // count
            off[y, x] += max(others - gray[y, x] * (len(window) - 1), 0) // count
    saliency = np.zeros((height, width))
    for part in (on, off):
        highest = max(part.values())
        for at in pixels:
            saliency[at] += math.floor(255 * float(np.float32(part[at]) / np.float32(highest or 1)))
    return np.minimum(saliency, 255) / 255


@pytest.mark.parametrize("size", GIVEN_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_opencvs(kind: Callable[..., np.ndarray], size: tuple[int, int]) -> None:
    """Bit for bit: none of these images meets OpenCV's wrap or the end of its float32."""
    image = make(kind, size)
    theirs = opencv(image)
    np.testing.assert_array_equal(ours(image), theirs)
    assert (
        fine_grained_saliency(tensor(image)).flatten(1).argmax(1).item() == theirs.argmax()
    )  # the first, both


def test_many_sizes_are_opencvs() -> None:
    rng = np.random.default_rng(1)
    for seed in range(60):
        height, width = rng.integers(1, 140, 2)
        image = make(KINDS[seed % len(KINDS)], (height, width), seed)
        np.testing.assert_array_equal(ours(image), opencv(image), err_msg=f"seed {seed}")


def rings(period: float) -> np.ndarray:
    """Bright against the next ring, dark against the whole: pixels that both of OpenCV's maps
    hold."""
    rows, columns = np.mgrid[:224, :224]
    return np.repeat(
        (np.cos(np.hypot(rows - 90, columns - 130) / period) * 127 + 127)[..., None], 3, 2
    ).astype(np.uint8)


def bright(seed: int) -> np.ndarray:
    """The integral image reaches 11 million at its end, and two of its corners together pass
    2**24."""
    return np.random.default_rng(seed).integers(200, 256, (224, 224, 3)).astype(np.uint8)


def photographs() -> list[np.ndarray]:
    """From the two photographs that scikit-learn holds; the first two show the bright sky."""
    china, flower = pytest.importorskip("sklearn.datasets").load_sample_images().images
    return [
        china[100:324, 300:524],
        china[::2, ::2],
        china[200:424, 100:324],
        flower[100:324, 200:424],
        flower[:224, :224],
        flower[::3, ::3],
    ]


EXAMPLES: dict[str, Callable[[], list[np.ndarray]]] = {
    "rings": lambda: [rings(10 + step) for step in range(0, 40, 2)],
    "bright": lambda: [bright(seed) for seed in range(6)],
    "photographs": photographs,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_all_that_differs_from_opencv_is_its_wrap_and_its_float32(name: str) -> None:
    """With both put into the plain reading it is OpenCV's bit for bit; without them, ours."""
    apart = 0
    for image in EXAMPLES[name]():
        theirs, mine = opencv(image), ours(image)
        np.testing.assert_array_equal(theirs, plain(image, as_opencv=True))
        np.testing.assert_array_equal(mine, plain(image))
        differ = mine != theirs
        assert differ.mean() < 1e-3
        apart += differ.any()
        if name == "rings":
            assert (mine[differ] == 1).all()  # where theirs wraps, ours stays at the maximum
        else:
            assert mine.argmax() == theirs.argmax()
    assert 0 < apart < len(EXAMPLES[name]()), (
        "some of these images were to show a difference, and some none"
    )


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (2, 1), (1, 7), (2, 2), (3, 5), (9, 14), (15, 4), (26, 3)]
)
def test_it_is_the_formula(size: tuple[int, int]) -> None:
    for kind in KINDS:
        image = make(kind, size, seed=3)
        np.testing.assert_allclose(ours(image), loops(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 1), (24, 30), (224, 224)])
@pytest.mark.parametrize("level", [0, 7, 255])
def test_a_constant_image_has_no_saliency(size: tuple[int, int], level: int) -> None:
    saliency = fine_grained_saliency(torch.full((2, 3, *size), level, dtype=torch.uint8))
    assert saliency.shape == (2, *size)
    assert (saliency == 0).all()
    assert saliency.flatten(1).argmax(1).tolist() == [0, 0]


def test_images_do_not_touch_each_other() -> None:
    images = tensor(*(make(kind, (40, 61), seed) for seed, kind in enumerate(KINDS)))
    singles = torch.cat([fine_grained_saliency(image[None]) for image in images])
    assert torch.equal(fine_grained_saliency(images), singles)
    assert fine_grained_saliency(images[:0]).shape == (0, 40, 61)


def test_layout_does_not_matter_and_the_input_stays() -> None:
    wide = torch.randint(
        0, 256, (2, 3, 30, 88), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = wide[:, :, :, ::2].transpose(2, 3)
    before = images.clone()
    saliency = fine_grained_saliency(images)
    assert torch.equal(saliency, fine_grained_saliency(images.contiguous()))
    assert torch.equal(images, before)
    assert saliency.dtype == torch.float32
    assert saliency.amin() >= 0
    assert saliency.amax() == 1


def test_channels_are_rgb() -> None:
    """A blue square on red: green weighs most, so that the reversed order sees another contrast."""
    image = np.full((40, 40, 3), (200, 40, 0), dtype=np.uint8)
    image[10:20, 10:20] = (0, 90, 255)
    image[25:30, 25:30] = (255, 90, 0)
    assert not np.array_equal(ours(image), ours(image[..., ::-1].copy()))


def test_no_global_random_state() -> None:
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    fine_grained_saliency(tensor(make(noise, (20, 20))))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(
        np.array_equal(now, then)
        for now, then in zip(np.random.get_state(), before[1], strict=True)
    )
    assert random.getstate() == before[2]


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8).byte(), torch.zeros(3, 8, 8).byte()]
)
def test_other_images_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="uint8 images"):
        fine_grained_saliency(images)


def test_nothing_reads_the_device() -> None:
    """A tensor without values goes through: no step waits for one, and none depends on one."""
    with torch.device("meta"):
        images = torch.empty(4, 3, 50, 70, dtype=torch.uint8)
    assert fine_grained_saliency(images).shape == (4, 50, 70)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same() -> None:
    images = tensor(*(make(kind, (224, 224)) for kind in KINDS))
    assert torch.equal(fine_grained_saliency(images.cuda()).cpu(), fine_grained_saliency(images))
