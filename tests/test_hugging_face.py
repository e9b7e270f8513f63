"""`timm/hfds/` and `timm/hfids/` on sets made here: Hugging Face's package of the same name as our `datasets.py`.

The package takes the place of our file in `sys.modules`, so all of it happens in processes of its own: this file is
also the script that they run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import datasets
import images
import loaders
import utils
from tests.image_folders import make_image_folder, make_parquet
from transforms import Augment, ImageSpec, build_eval_transform, build_train_transform

SPEC = ImageSpec((32, 32))
CLASSES = ["wasp", "ant"]  # as the card orders them; a folder's are in the order of names


# ------------------------------------------------------------------------------------------------- in the script


def batches(name: str, path: str = "", train: bool = True, workers: int = 0) -> list[list[Any]]:
    """[labels, digest of the pixels] of each batch of one epoch, as training and evaluation load them."""
    opened = datasets.open_images(name, path, train, batch_size=3)
    assert isinstance(opened, images.StreamedImages if "/hfids/" in name else images.Images)
    loader: Any
    if train:
        samples = loaders.train_samples(opened, build_train_transform(SPEC, Augment()), seed=0)
        loader = loaders.build_train_loader(samples, batch_size=3, num_workers=workers)
        loaders.set_epoch(loader, 1)
    else:
        shown = loaders.eval_samples(opened, build_eval_transform(SPEC))
        loader = loaders.build_eval_loader(shown, batch_size=3, num_workers=workers)
    return [[batch[1].tolist(), sha256(batch[0].numpy().tobytes()).hexdigest()] for batch in loader]


def message(name: str, workers: int = 0) -> str:
    try:
        batches(name, workers=workers)
    except utils.InputError as error:
        return error.text
    return ""


def script(folder: str, shards: str, start: str) -> dict[str, Any]:
    """All that the tests below compare, as plain data."""
    multiprocessing.set_start_method(start)
    found: dict[str, Any] = {}
    for half, train in (("train", True), ("val", False)):
        found[f"folder {half}"] = batches("IMNET", folder, train)
        for workers in (0, 2):
            found[f"hfids {half} {workers}"] = batches(f"timm/hfids/{shards}", "", train, workers)
            found[f"hfds {half} {workers}"] = batches(f"timm/hfds/{shards}", "", train, workers)
            found[f"hfds folder {half} {workers}"] = batches(f"timm/hfds/{folder}", "", train, workers)
        for kind in ("hfds", "hfids"):
            found[f"{kind} {half} classes"] = datasets.open_images(f"timm/{kind}/{shards}", "", train).class_names
    package = sys.modules["datasets"]
    found["bound"] = [hasattr(package, "load_dataset"), package is not datasets, datasets.DATA_SETS[0]]
    found["three workers"] = message(f"timm/hfids/{shards}", workers=3)
    found["no count"] = message(f"timm/hfids/{folder}/train")
    other = os.path.join(os.path.dirname(shards), "other")
    package.load_dataset(shards, split="train").rename_columns({"image": "img"}).to_parquet(f"{other}/train.parquet")
    found["columns"] = message(f"timm/hfds/{other}")
    return found


# --------------------------------------------------------------------------------------------------- in the tests


def has_package() -> bool:
    """By its metadata: what `import datasets` finds here is our file."""
    try:
        return bool(metadata.version("datasets"))
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module", params=["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not has_package():
        pytest.skip("the Hugging Face package is not installed")
    root = tmp_path_factory.mktemp("hub")
    folder = make_image_folder(root / "folder")
    shards = make_parquet(root / "shards", classes=CLASSES)
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_hugging_face", str(folder), str(shards), request.param],
        cwd=Path(datasets.__file__).parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"), "HF_DATASETS_CACHE": str(root / "c")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_set_read_by_index_gives_what_its_files_give(found: dict[str, Any]) -> None:
    for half in ("train", "val"):
        for workers in (0, 2):
            assert found[f"hfds folder {half} {workers}"] == found[f"folder {half}"]


def test_both_halves_and_their_classes_come_from_the_set(found: dict[str, Any]) -> None:
    for kind in ("hfds", "hfids"):
        for half in ("train", "val"):
            assert found[f"{kind} {half} classes"] == CLASSES
            for workers in (0, 2):
                assert sum((labels for labels, _ in found[f"{kind} {half} {workers}"]), []).count(0) == 6
        assert [labels for labels, _ in found[f"{kind} val 0"]] == [[0, 1, 0], [1, 0, 1]] * 2
    assert found["hfds val 0"] == found["hfds val 2"] == found["hfids val 0"]
    assert found["hfds train 0"] == found["hfds train 2"]


def test_the_package_stays_bound_and_our_file_in_use(found: dict[str, Any]) -> None:
    assert found["bound"] == [True, True, "DIGITS"]


def test_what_cannot_be_read_says_why(found: dict[str, Any]) -> None:
    assert "Reduce the number of loader workers" in found["three workers"]
    assert "timm/hfds/ reads the same data" in found["no count"]
    assert found["columns"].endswith("timm reads the columns image and label, this set has img, label")


if __name__ == "__main__":
    print(json.dumps(script(*sys.argv[1:])))
