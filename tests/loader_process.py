"""A process with loader workers of every kind, for tests that send it signals.

    python -m tests.loader_process FOLDER HOW

It notes every signal and goes on, and leaves on SIGUSR2: `closing` its loaders, or not (`failing`,
by an exception).
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

import torch
from PIL import Image

from datasets import open_images
from pipeline.loaders import build_eval_loader, build_train_loader, closing, set_epoch
from pipeline.samples import eval_samples, train_samples
from pipeline.spec import ImageSpec
from pipeline.transforms import build_eval_transform
from pipeline.workers import Loader
from tests.image_folders import make_image_folder, make_webdataset

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
noted: set[str] = set()


def slow(image: Image.Image) -> torch.Tensor:
    """So slow that a worker is always in the middle of something."""
    time.sleep(0.1)
    return build_eval_transform(ImageSpec((16, 16)))(image)


def make_loaders(folder: Path) -> list[Loader]:
    make_webdataset(folder / "shards")
    make_image_folder(folder / "images", per_class=6)
    stream = open_images(
        "timm/wds/shards", str(folder / "shards"), True, num_classes=3, batch_size=3
    )
    train, val = (open_images("IMNET", str(folder / "images"), half) for half in (True, False))
    made = [
        build_train_loader(train_samples(train, slow, 0), batch_size=3, num_workers=2, timeout=60),
        build_eval_loader(eval_samples(val, slow), batch_size=3, num_workers=2, timeout=60),
        build_train_loader(train_samples(stream, slow, 0), batch_size=3, num_workers=2, timeout=60),
    ]
    return made


def note(number: int, frame: FrameType | None) -> None:
    noted.add(signal.Signals(number).name)


def main(folder: str, how: str) -> None:
    torch.set_num_threads(1)
    loaders = make_loaders(Path(folder))
    for name in NAMES:
        signal.signal(getattr(signal, name), note)
    epoch = batches = 0
    with closing(*loaders) if how == "closing" else nullcontext():
        while True:
            for loader in loaders:
                set_epoch(loader, epoch)
                for _ in loader:
                    batches += 1
                    if "SIGUSR2" in noted:
                        print(
                            f"leaving after {batches} batches, {' '.join(sorted(noted))}",
                            flush=True,
                        )
                        if how == "closing":
                            return
                        raise ArithmeticError("a bug")
            print(
                f"epoch {epoch}", flush=True
            )  # in the second, the workers of two loaders are still the first ones
            epoch += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
