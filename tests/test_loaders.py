"""Samples that depend on their place alone, whatever loads them, and streams dealt evenly."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import open_images
from errors import InputError
from pipeline.erasing import Box, Erasing
from pipeline.images import Images, StreamedImages
from pipeline.loaders import (
    build_eval_loader,
    build_train_loader,
    closing,
    set_epoch,
    steps_per_epoch,
)
from pipeline.samples import EvalSamples, TrainSamples, eval_samples, train_samples
from pipeline.spec import Augment, ImageSpec
from pipeline.transforms import build_eval_transform, build_train_transform
from samplers import EpochBatches
from tests.image_folders import (
    make_cifar,
    make_image_folder,
    make_inat,
    make_tar_pair,
    make_webdataset,
    message_of,
)

SPEC = ImageSpec((32, 32))

# ------------------------------------------------------------------------------------ keyed samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "images", ("ant", "bee"), per_class=5)


@pytest.fixture
def spawn() -> Iterator[None]:
    """Workers start as on Windows and macOS: everything they need is pickled. Where it can, a
    server has imported torch for them."""
    before, methods = multiprocessing.get_start_method(), multiprocessing.get_all_start_methods()
    fast = "forkserver" in methods
    multiprocessing.set_forkserver_preload(["pipeline.loaders"])
    multiprocessing.set_start_method("forkserver" if fast else "spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def folder_samples(
    root: Path, augment: Augment | None = None, seed: int = 0, erase: Erasing | None = None
) -> TrainSamples:
    transform = build_train_transform(SPEC, augment or Augment())
    samples = train_samples(
        open_images("IMNET", str(root), True), transform, seed=seed, erase=erase
    )
    assert isinstance(samples, TrainSamples)
    return samples


def epochs_of(loader, epochs=(0, 1)) -> list[tuple[torch.Tensor, ...]]:
    batches = []
    for epoch in epochs:
        set_epoch(loader, epoch)
        batches += [tuple(batch) for batch in loader]
    return batches


def same(one: list[tuple[torch.Tensor, ...]], other: list[tuple[torch.Tensor, ...]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for batches in pairs for a, b in zip(*batches, strict=True))


def test_samples_depend_on_their_place_alone(folder: Path) -> None:
    samples = folder_samples(folder)
    image, label, index, _, boxes, operations = samples[2, 7, 4]
    assert (image.shape, image.dtype, label, index) == ((3, 32, 32), torch.uint8, 1, 7)
    assert boxes == operations == []
    torch.manual_seed(9)
    assert torch.equal(samples[2, 7, 4][0], image)
    for other in ((3, 7, 4), (2, 7, 5), (2, 6, 4)):
        assert not torch.equal(samples[other][0], image)
    assert not torch.equal(folder_samples(folder, seed=1)[2, 7, 4][0], image)


def test_loading_leaves_the_global_generators_alone(folder: Path) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    state = torch.get_rng_state()
    for workers in (0, 1):
        epochs_of(build_train_loader(folder_samples(folder), batch_size=5, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.rand() == np.random.RandomState(0).rand()


def test_worker_counts_give_equal_batches(folder: Path) -> None:
    alone = epochs_of(build_train_loader(folder_samples(folder), batch_size=3, repeats=3))
    loader = build_train_loader(folder_samples(folder), batch_size=3, repeats=3, num_workers=2)
    assert loader.persistent_workers
    assert len(alone) == 6
    assert alone[0][0].shape == (3, 3, 32, 32)
    assert same(epochs_of(loader), alone)
    assert same(epochs_of(loader, (1,)), alone[3:])  # as a resumed run would ask
    assert not same(alone[:3], alone[3:])


@pytest.mark.slow
def test_spawned_workers_give_equal_batches(folder: Path, spawn: None) -> None:
    alone = epochs_of(build_train_loader(folder_samples(folder), batch_size=3))
    loader = build_train_loader(folder_samples(folder), batch_size=3, num_workers=1)
    assert same(epochs_of(loader), alone)


@pytest.mark.slow
def test_a_stream_travels_into_spawned_workers(tmp_path: Path, spawn: None) -> None:
    make_webdataset(tmp_path, shards=1)
    images = open_images("timm/wds/shards", str(tmp_path), False, num_classes=3)
    loader = build_eval_loader(
        eval_samples(images, build_eval_transform(SPEC)), batch_size=64, num_workers=1
    )
    assert sum(len(labels) for _, labels in loader) == 6


@pytest.mark.parametrize(
    "name", ["DIGITS", "CIFAR10", "IMNET", "INAT", "timm/", "tar", "timm/torch/cifar10"]
)
def test_every_data_set_can_be_pickled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cifar(tmp_path, "CIFAR10", monkeypatch)
    make_inat(tmp_path)
    (make_tar_pair if name == "tar" else make_image_folder)(tmp_path, per_class=2)
    images = open_images("timm/" if name == "tar" else name, str(tmp_path), True)
    assert isinstance(images, Images)
    _ = images[0], images[len(images) - 1]  # nothing may stay open
    samples = TrainSamples(images, build_train_transform(SPEC, Augment()), seed=0)
    travelled = pickle.loads(pickle.dumps(samples))
    assert torch.equal(travelled[0, 3, 0][0], samples[0, 3, 0][0])


def test_a_batch_is_its_samples_each_in_its_row(folder: Path) -> None:
    samples = folder_samples(folder, erase=Erasing(0.5, 2))
    places = [(1, 4, 12), (1, 5, 16), (1, 4, 13), (1, 0, 3), (1, 4, 14)]
    batch = samples.__getitems__(places)
    assert (batch.images.shape, batch.images.dtype) == ((5, 3, 32, 32), torch.uint8)
    assert batch.images.permute(0, 2, 3, 1).is_contiguous()
    for row, place in enumerate(places):
        image, label, index, _, boxes, _ = samples[place]
        assert batch.boxes is not None
        assert torch.equal(batch.images[row], image)
        assert (batch.labels[row], batch.indices[row], batch.boxes[row].tolist()) == (
            label,
            index,
            [*map(list, boxes)],
        )
    assert batch.boxes is not None
    assert batch.labels.dtype == batch.indices.dtype == batch.boxes.dtype == torch.int64


def test_views_of_one_image_are_decoded_once_per_batch(folder: Path) -> None:
    samples, read = folder_samples(folder), []
    really = samples.images.read
    samples.images.read = lambda index: (read.append(index), really(index))[1]  # type: ignore[func-returns-value]
    samples.__getitems__([(0, 4, 12), (0, 5, 17), (0, 5, 15), (0, 4, 14), (0, 5, 16), (0, 4, 13)])
    assert read == [4, 5]


def test_boxes_to_erase_are_the_last_of_a_samples_draws(folder: Path) -> None:
    """So images are the same with erasing and without it."""
    plain, erased = (
        folder_samples(folder, erase=erase).__getitems__([(0, n, n) for n in range(10)])
        for erase in (None, Erasing(0.5, 2))
    )
    assert torch.equal(plain.images, erased.images)
    assert plain.boxes is not None
    assert erased.boxes is not None
    assert (plain.boxes.shape, erased.boxes.shape) == ((10, 0, 4), (10, 2, 4))
    filled = torch.ne(erased.boxes, torch.tensor(Box(0, 0, 0, 0))).any(dim=2).any(dim=1)
    assert 1 < filled.sum() < 9


def test_world_sizes_and_layouts_see_equal_samples(folder: Path) -> None:
    def shown(world_size: int, layout: str = "blocks") -> dict[int, list[bytes]]:
        found: dict[int, list[bytes]] = {}
        for rank in range(world_size):
            loader = build_train_loader(
                folder_samples(folder, erase=Erasing(0.5, 2)),
                batch_size=6 // world_size,
                rank=rank,
                world_size=world_size,
                repeats=3,
                layout=layout,
            )
            for images, _, indices, _, boxes, _ in loader:
                for image, index, erased in zip(images, indices.tolist(), boxes, strict=True):
                    found.setdefault(index, []).append(
                        image.numpy().tobytes() + erased.numpy().tobytes()
                    )
        return {index: sorted(views) for index, views in found.items()}

    assert shown(1) == shown(2) == shown(3) == shown(2, "strided") == shown(3, "strided")
    assert all(
        len(set(views)) == len(views) for views in shown(1).values()
    )  # views of one image differ


def test_steps_and_seeds(folder: Path) -> None:
    loader = build_train_loader(folder_samples(folder), batch_size=2, accum_steps=2, seed=3)
    assert (steps_per_epoch(loader), len(loader)) == (2, 4)
    other = build_train_loader(folder_samples(folder), batch_size=2, accum_steps=2, seed=4)
    assert isinstance(loader.batch_sampler, EpochBatches)
    assert isinstance(other.batch_sampler, EpochBatches)
    assert list(loader.batch_sampler) != list(other.batch_sampler)


def test_too_large_a_batch_names_the_largest_that_fits(folder: Path) -> None:
    samples = folder_samples(folder)
    message = message_of(InputError, build_train_loader, samples, batch_size=6, world_size=2)
    assert "--batch-size 6" in message
    assert "10 training images" in message
    assert "at most 5" in message
    build_train_loader(samples, batch_size=5, world_size=2)
    assert "fewer processes" in message_of(
        InputError, build_train_loader, samples, batch_size=1, world_size=11
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_sees_every_image_once(folder: Path, workers: int) -> None:
    samples = eval_samples(open_images("IMNET", str(folder), False), build_eval_transform(SPEC))
    parts = [
        list(build_eval_loader(samples, batch_size=3, rank=rank, world_size=3, num_workers=workers))
        for rank in range(3)
    ]
    assert [[len(labels) for _, labels in part] for part in parts] == [[3, 1], [3], [3]]
    seen = sorted(
        image.numpy().tobytes() for part in parts for images, _ in part for image in images
    )
    assert seen == sorted(samples[index][0].numpy().tobytes() for index in range(10))


def fail(image: Image.Image) -> torch.Tensor:
    raise ValueError("a bug in a transform")


def test_errors_of_a_transform_surface_as_they_are() -> None:
    images = open_images("DIGITS", "", True)
    assert isinstance(images, Images)
    with pytest.raises(ValueError, match=r"^a bug in a transform$"):
        TrainSamples(images, fail, 0)[0, 0, 0]
    with pytest.raises(ValueError, match=r"^a bug in a transform$"):
        EvalSamples(images, fail)[0]


# ------------------------------------------------------------------------------------------ streams


def streamed(root: Path, batch_size: int = 3, workers: int = 0, seed: int = 0, **more):
    images = open_images(
        "timm/wds/shards", str(root), True, num_classes=3, batch_size=batch_size, seed=seed
    )
    assert isinstance(images, StreamedImages)
    samples = train_samples(images, build_train_transform(SPEC, Augment()), seed=seed)
    return build_train_loader(
        samples, batch_size=batch_size, num_workers=workers, seed=seed, **more
    )


def test_a_stream_repeats_exactly_and_resumes_at_an_epoch(tmp_path: Path) -> None:
    make_webdataset(tmp_path)
    loader = streamed(tmp_path)
    torch.manual_seed(1)
    first = epochs_of(loader)
    assert (len(loader), steps_per_epoch(loader), len(first)) == (4, 4, 8)
    images, labels, numbers, _, boxes, _ = first[0]
    assert (images.shape, images.dtype, labels.dtype) == ((3, 3, 32, 32), torch.uint8, torch.int64)
    assert (numbers.tolist(), boxes.shape) == ([0, 1, 2], (3, 0, 4))
    torch.manual_seed(2)
    assert same(epochs_of(streamed(tmp_path)), first)
    assert same(epochs_of(streamed(tmp_path), (1,)), first[4:])
    assert not same(first[:4], first[4:])


def test_a_streams_workers_share_the_epoch(tmp_path: Path) -> None:
    make_webdataset(tmp_path, shards=2, per_shard=7)
    loader = streamed(
        tmp_path, batch_size=4, workers=2
    )  # 14 images: 3 batches, 2 and 1 by the workers
    batches = epochs_of(loader, (0,))
    assert [len(batch[1]) for batch in batches] == [4, 4, 4]
    assert len({number for batch in batches for number in batch[2].tolist()}) == 12
    assert steps_per_epoch(streamed(tmp_path, batch_size=2, accum_steps=3)) == 2
    assert len(streamed(tmp_path, batch_size=2, accum_steps=3)) == 6


def test_a_worker_without_a_shard_says_what_to_lower(tmp_path: Path) -> None:
    make_webdataset(tmp_path, shards=1)
    loader = streamed(tmp_path, workers=2)
    with closing(loader):
        assert "--num-workers" in message_of(InputError, list, loader)


@pytest.mark.parametrize("ending", ["jpeg", "JPEG", "PNG", "webp", "avif"])
def test_a_stream_finds_images_by_any_ending(ending: str, tmp_path: Path) -> None:
    make_webdataset(tmp_path, ending=ending)
    batches = epochs_of(streamed(tmp_path), (0,))
    assert sum(len(batch[1]) for batch in batches) == 12


def test_a_stream_without_images_says_that_it_has_none(tmp_path: Path) -> None:
    make_webdataset(tmp_path, ending="heic")
    message = message_of(InputError, list, streamed(tmp_path))
    assert "worker 0 of rank 0 found no image in its shards" in message
    assert "--num-workers" not in message


def test_streams_refuse_repeats_and_too_few_images(tmp_path: Path) -> None:
    make_webdataset(tmp_path)
    assert "--no-repeated-aug" in message_of(InputError, streamed, tmp_path, repeats=3)
    assert "at most 12" in message_of(InputError, streamed, tmp_path, batch_size=13)


def test_a_stream_is_evaluated_once_and_in_order(tmp_path: Path) -> None:
    make_webdataset(tmp_path)
    images = open_images("timm/wds/shards", str(tmp_path), False, num_classes=3)
    loader = build_eval_loader(eval_samples(images, build_eval_transform(SPEC)), batch_size=5)
    for _ in range(2):
        assert torch.cat([labels for _, labels in loader]).tolist() == [
            n % 3 for n in range(12, 24)
        ]
