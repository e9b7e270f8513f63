"""Small data sets on disk, in every layout that `datasets.open_images` reads. Nothing random, a few
kB each."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tools.bench.image_folder import jpeg_bytes as jpeg_bytes
from tools.bench.image_folder import make_image_folder as make_image_folder
from tools.bench.image_folder import picture as picture


def message_of(error: type[Exception], call, *arguments, **more) -> str:
    """The message of the error that `call` ends with."""
    with pytest.raises(error) as caught:
        call(*arguments, **more)
    return caught.value.text  # type: ignore[attr-defined]


def bomb(content: bytes = b"") -> bytes:
    """A PNG of a hundred bytes whose header claims 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


# A JPEG's content -> what became of it, and what the message says of it.
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in half": (lambda content: content[: len(content) // 2], "truncated"),
    "cut by 2 bytes": (lambda content: content[:-2], "truncated"),
    "cut by 100 bytes": (lambda content: content[:-100], "truncated"),
    "zero tail": (
        lambda content: content[: len(content) // 2] + bytes(len(content) // 2),
        "truncated",
    ),
    "bit rot": (
        lambda content: bytes(
            b ^ 255 * (2 * n > len(content) and n % 3 == 0) for n, b in enumerate(content)
        ),
        "broken data stream",
    ),
    "header only": (lambda content: content[:20], "cannot identify"),
    "empty": (lambda content: b"", "cannot identify"),
    "a web page": (
        lambda content: b"<!DOCTYPE html><html><body>404</body></html>",
        "cannot identify",
    ),
    "a bomb": (bomb, "decompression bomb"),
}


def damage(path: Path, how: str = "cut in half") -> Path:
    """Damages a JPEG in its place, in one of the ways of `DAMAGE`. Returns its path."""
    path.write_bytes(DAMAGE[how][0](path.read_bytes()))
    return path


def make_tar_pair(root: Path, classes: Sequence[str] = ("ant", "bee"), per_class: int = 2) -> Path:
    """`timm/` on tar files: root/train.tar and root/val.tar with <class>/<number>.jpg inside.
    Returns root."""
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for label, name in enumerate(classes):
                for place in range(per_class):
                    _add(tar, f"{name}/{place}.jpg", jpeg_bytes(label * per_class + place))
    return root


def make_cifar(root: Path, kind: str, monkeypatch: pytest.MonkeyPatch, per_batch: int = 20) -> Path:
    """CIFAR ('CIFAR10' or 'CIFAR100') in its own files; torchvision's checksum test is told to
    pass. Returns root."""
    names, key, count = (
        ["data_batch_" + str(n) for n in range(1, 6)] + ["test_batch"],
        "labels",
        10,
    )
    folder, meta, meta_key = root / "cifar-10-batches-py", "batches.meta", "label_names"
    if kind == "CIFAR100":
        names, key, count = (["train", "test"], "fine_labels", 100)
        folder, meta, meta_key = root / "cifar-100-python", "meta", "fine_label_names"
    folder.mkdir(parents=True)
    for place, name in enumerate(names):
        pixels = np.stack(
            [
                np.asarray(picture(place * per_batch + n, (32, 32))).transpose(2, 0, 1)
                for n in range(per_batch)
            ]
        )  # (N, 3, 32, 32)
        batch = {"data": pixels.reshape(per_batch, -1), key: [n % count for n in range(per_batch)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / meta).write_bytes(pickle.dumps({meta_key: [f"class {n}" for n in range(count)]}))
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file()
    )
    return root


INAT_RECORDS = [  # place in the list = category id
    {"id": 0, "kingdom": "Plantae", "supercategory": "Plants", "name": "fern"},
    {"id": 1, "kingdom": "Animalia", "supercategory": "Birds", "name": "wren"},
    {"id": 2, "kingdom": "Animalia", "supercategory": "Birds", "name": "kite"},
]
INAT_ORDER = (2, 0, 1)  # categories as they first appear among the training annotations


def make_inat(root: Path, year: int = 2018, per_class: int = 2, flat: bool = False) -> Path:
    """iNaturalist: the three JSON files and the images, in their own folders or in DeiT's flat
    ones. Returns root."""
    others = dict.fromkeys(("phylum", "class", "order", "family", "genus"), "-")
    root.mkdir(parents=True, exist_ok=True)
    (root / "categories.json").write_text(
        json.dumps([{**record, **others} for record in INAT_RECORDS])
    )
    number = 0
    for split in ("train", "val"):
        images, annotations = [], []
        for category in INAT_ORDER if split == "train" else sorted(INAT_ORDER):
            above = INAT_RECORDS[category]["supercategory"]
            for _ in range(per_class):
                name = f"train_val{year}/{above}/{category}/{number}.jpg"
                file = root / (name.replace(f"{above}/", "") if flat else name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(jpeg_bytes(number))
                images.append({"id": number, "file_name": name})
                annotations.append({"id": number, "image_id": number, "category_id": category})
                number += 1
        (root / f"{split}{year}.json").write_text(
            json.dumps({"images": images, "annotations": annotations})
        )
    return root


def make_webdataset(
    root: Path,
    shards: int = 2,
    per_shard: int = 6,
    num_classes: int = 3,
    ending: str = "jpg",
    encode: Callable[[int], bytes] = jpeg_bytes,
) -> Path:
    """`timm/wds/...`: tar shards of <key>.<ending> and <key>.cls for both halves, and `_info.json`.
    Returns root."""
    root.mkdir(parents=True, exist_ok=True)
    splits, number = {}, 0
    for split in ("train", "validation"):
        names = [f"{split}-{shard}.tar" for shard in range(shards)]
        for name in names:
            with tarfile.open(root / name, "w") as tar:
                for _ in range(per_shard):
                    _add(tar, f"{number:05d}.{ending}", encode(number))
                    _add(tar, f"{number:05d}.cls", str(number % num_classes).encode())
                    number += 1
        lengths = [per_shard] * shards
        splits[split] = {
            "name": split,
            "num_samples": sum(lengths),
            "filenames": names,
            "shard_lengths": lengths,
        }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def make_parquet(
    root: Path, shards: int = 2, per_shard: int = 6, classes: Sequence[str] = ("ant", "bee")
) -> Path:
    """`timm/hfds/` and `timm/hfids/`: a Hugging Face set of parquet shards and the card that
    describes them."""
    import pyarrow
    from pyarrow import parquet

    root.mkdir(parents=True, exist_ok=True)
    names = "".join(f"\n          '{label}': {name}" for label, name in enumerate(classes))
    card = f"""---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:{names}
  splits:"""
    number = 0
    for split in ("train", "validation"):
        for shard in range(shards):
            numbers = range(number, number := number + per_shard)
            rows = {
                "image": [{"bytes": jpeg_bytes(n), "path": f"{n}.jpg"} for n in numbers],
                "label": [n % len(classes) for n in numbers],
            }
            parquet.write_table(
                pyarrow.table(rows), root / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            )
        card += f"\n  - name: {split}\n    num_examples: {shards * per_shard}\n    num_bytes: 0"
    (root / "README.md").write_text(card + "\n---\n")
    return root


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
