"""`timm/hfds/` and `timm/hfids/` on sets made here: Hugging Face's package of the same name as our
`datasets.py`.

The package takes the place of our file in `sys.modules`, so all of it happens in processes of its
own: this file is also the script that they run.
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
from errors import InputError
from pipeline import images, loaders
from pipeline.samples import eval_samples, train_samples
from pipeline.spec import Augment, ImageSpec
from pipeline.transforms import build_eval_transform, build_train_transform
from tests.image_folders import make_image_folder, make_parquet

SPEC = ImageSpec((32, 32))
CLASSES = ["wasp", "ant"]  # as the card orders them; a folder's are in the order of names


# ------------------------------------------------------------------------------------ in the script


def batches(name: str, path: str = "", train: bool = True, workers: int = 0) -> list[list[Any]]:
    """[labels, digest of the pixels] of each batch of one epoch, as training and evaluation load
    them."""
    opened = datasets.open_images(name, path, train, batch_size=3)
    assert isinstance(opened, images.StreamedImages if "/hfids/" in name else images.Images)
    loader: Any
    if train:
        samples = train_samples(opened, build_train_transform(SPEC, Augment()), seed=0)
        loader = loaders.build_train_loader(samples, batch_size=3, num_workers=workers)
        loaders.set_epoch(loader, 1)
    else:
        shown = eval_samples(opened, build_eval_transform(SPEC))
        loader = loaders.build_eval_loader(shown, batch_size=3, num_workers=workers)
    return [[batch[1].tolist(), sha256(batch[0].numpy().tobytes()).hexdigest()] for batch in loader]


def message(name: str, workers: int = 0) -> str:
    try:
        batches(name, workers=workers)
    except InputError as error:
        return error.text
    return ""


def forked(folder: str, shards: str) -> dict[str, Any]:
    """What the tests below compare, with workers that are forked."""
    found: dict[str, Any] = {}
    for half, train in (("train", True), ("val", False)):
        found[f"files {half}"] = batches("IMNET", folder, train)
        found[f"folder {half}"] = batches(f"timm/hfds/{folder}", "", train)
        for kind in ("hfds", "hfids"):
            name = f"timm/{kind}/{shards}"
            found[f"{kind} {half} classes"] = datasets.open_images(name, "", train).class_names
            for workers in (0, 2):
                found[f"{kind} {half} {workers}"] = batches(name, "", train, workers)
    package = sys.modules["datasets"]
    found["bound"] = [
        hasattr(package, "load_dataset"),
        package is not datasets,
        datasets.DATA_SETS[0],
    ]
    found["three workers"] = message(f"timm/hfids/{shards}", workers=3)
    found["no count"] = message(f"timm/hfids/{folder}/train")
    other = os.path.join(os.path.dirname(shards), "other")
    os.mkdir(other)
    package.load_dataset(shards, split="train").rename_column("image", "img").to_parquet(
        f"{other}/train.parquet"
    )
    found["columns"] = message(f"timm/hfds/{other}")
    return found


def spawned(shards: str) -> dict[str, Any]:
    """Batches of no worker and of one that gets everything pickled, as a spawned one does: it
    imports this file, and so our `datasets.py`, first."""
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["torch", "timm"])
    cases = {
        "hfds": (f"timm/hfds/{shards}", "", True),
        "hfids": (f"timm/hfids/{shards}", "", False),
    }
    return {
        kind: [batches(*case, workers=workers) for workers in (0, 1)]
        for kind, case in cases.items()
    }


# ------------------------------------------------------------------------------------- in the tests


def has_package() -> bool:
    """By its metadata: what `import datasets` finds here is our file."""
    try:
        return bool(metadata.version("datasets"))
    except metadata.PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_package(), reason="the Hugging Face package is not installed"),
]


def run(part: str, *folders: Path) -> dict[str, Any]:
    """What function `part` of this file gives in a process of its own that reaches no hub."""
    home = str(folders[0].parent / "home")
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_hugging_face", part, *map(str, folders)],
        cwd=Path(datasets.__file__).parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": home, "HF_DATASETS_CACHE": home},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("hub")
    return run(
        "forked", make_image_folder(root / "folder"), make_parquet(root / "shards", classes=CLASSES)
    )


def test_a_set_read_by_index_gives_what_its_files_give(found: dict[str, Any]) -> None:
    assert found["folder train"] == found["files train"]
    assert found["folder val"] == found["files val"]


def test_both_halves_and_their_classes_come_from_the_set(found: dict[str, Any]) -> None:
    for kind in ("hfds", "hfids"):
        for half in ("train", "val"):
            assert found[f"{kind} {half} classes"] == CLASSES
            for workers in (0, 2):
                labels = [
                    label for batch, _ in found[f"{kind} {half} {workers}"] for label in batch
                ]
                assert sorted(labels) == [0] * 6 + [1] * 6
        assert [labels for labels, _ in found[f"{kind} val 0"]] == [[0, 1, 0], [1, 0, 1]] * 2
    assert found["hfds val 0"] == found["hfds val 2"] == found["hfids val 0"]
    assert found["hfds train 0"] == found["hfds train 2"]


def test_the_package_stays_bound_and_our_file_in_use(found: dict[str, Any]) -> None:
    assert found["bound"] == [True, True, "DIGITS"]


def test_what_cannot_be_read_says_why(found: dict[str, Any]) -> None:
    assert "Reduce the number of loader workers" in found["three workers"]
    assert "timm/hfds/ reads the same data" in found["no count"]
    assert found["columns"].endswith(
        "timm reads the columns image and label, this data set has img, label"
    )


def test_spawned_workers_import_the_package_before_what_needs_it(tmp_path: Path) -> None:
    found = run("spawned", make_parquet(tmp_path / "shards", classes=CLASSES))
    for alone, with_worker in found.values():
        assert with_worker == alone
        assert len(alone) == 4


if __name__ == "__main__":
    _, part, *folders = sys.argv
    print(json.dumps(forked(*folders) if part == "forked" else spawned(*folders)))
