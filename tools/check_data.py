"""Decodes every image of a data set, in full, and names those that cannot be read.

    python -m tools.check_data --data-path /imagenet
    python -m tools.check_data --data-set INAT --data-path /inat --num-workers 16 --output bad.txt

It opens the training and the validation images as `main.py` does and refuses the same data sets. It
exits with code 1 if any image is bad, and changes no file. A JPEG has no checksum: damage after
which it still decodes, to other pixels, is not found.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

import datasets
from config.parser import Parser
from config.value_checks import check_values
from errors import InputError, StopRun, cores_per_process, run_command
from pipeline import loaders
from pipeline.bad_images import max_bad_images
from pipeline.images import Images, StreamedImages, UnreadableSampleError
from pipeline.workers import Loader
from storage.files import write_atomically

BATCH_SIZE = 32
SECONDS_BETWEEN_LINES = 10.0  # of progress


class Checked(NamedTuple):
    """The result for one image: its size in pixels, or the reason why it cannot be read."""

    number: int
    width: int = 0
    height: int = 0
    reason: str = ""


class Checks(Dataset[Checked]):
    """index -> `Checked`."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Checked:
        try:
            image, _ = self.images[index]
        except UnreadableSampleError as error:
            return Checked(index, reason=str(error.__cause__))
        return Checked(index, *image.size)


def get_args_parser() -> Parser:
    parser = Parser(
        "python -m tools.check_data", description="Decodes every image and names the bad ones."
    )
    parser.add_argument(
        "--data-set", help="as for main.py; default: IMNET where --data-path is given, else DIGITS"
    )
    parser.add_argument("--data-path", default="", help="folder of the data set")
    parser.add_argument(
        "--inat-category", default="name", choices=datasets.INAT_CATEGORIES, help="as for main.py"
    )
    parser.add_argument("--nb-classes", type=int, help="as for main.py")
    parser.add_argument(
        "--num-workers", type=int, help="processes that decode; default: one per core"
    )
    parser.add_argument(
        "--data-timeout", default=600.0, type=float, help="seconds to wait for one; 0: no limit"
    )
    parser.add_argument(
        "--output", default="", help="text file for the names of the bad images, one a line"
    )
    return parser


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked and with its defaults filled in.

    Raises:
        InputError: a value is invalid.
    """
    args = get_args_parser().parse_args(argv)
    check_values(vars(args), positive=("nb_classes",), not_negative=("num_workers", "data_timeout"))
    if args.output and not os.path.isdir(Path(args.output).parent):
        raise InputError(f"--output {args.output}: there is no folder {Path(args.output).parent}")
    args.data_set = args.data_set or ("IMNET" if args.data_path else "DIGITS")
    args.num_workers = cores_per_process() if args.num_workers is None else args.num_workers
    return args


def open_halves(args: argparse.Namespace) -> dict[str, Images]:
    """The training and the validation images.

    Raises:
        InputError: `main.py` would refuse the data set, or it is a stream, whose images have no
            index.
    """
    halves = {}
    for half in ("training", "validation"):
        images = datasets.open_images(
            args.data_set,
            args.data_path,
            half == "training",
            inat_category=args.inat_category,
            num_classes=args.nb_classes,
        )
        if isinstance(images, StreamedImages):
            raise InputError(
                f"--data-set {args.data_set}: streams cannot be checked; their reader reports what "
                "it skips"
            )
        halves[half] = images
        if images.note:
            print(f"{half} images: {images.note}")
    datasets.check_same_classes(halves["training"].class_names, halves["validation"].class_names)
    return halves


def check_half(half: str, images: Images, num_workers: int, timeout: float) -> list[int]:
    """Decodes all images of one half and prints the results.

    Returns:
        The indices of the bad images.

    Raises:
        InputError: a label has no class.
    """
    settings = {"num_workers": num_workers, "timeout": timeout} if num_workers else {}
    loader = Loader(
        Checks(images), name_of=images.name_of, batch_size=BATCH_SIZE, collate_fn=list, **settings
    )
    bad, sides, done, printed = list[int](), set[int](), 0, time.monotonic()
    with loaders.closing(loader):
        for batch in loader:
            for checked in batch:
                if checked.reason:
                    bad.append(checked.number)
                    print(f"bad: {images.name_of(checked.number)}: {checked.reason}", flush=True)
                else:
                    sides.update((checked.width, checked.height))
            done += len(batch)
            if time.monotonic() - printed > SECONDS_BETWEEN_LINES:
                printed = time.monotonic()
                print(f"{half}: {done:,} of {len(images):,} images, {len(bad)} bad", flush=True)
    size = f"sides from {min(sides)} to {max(sides)} pixels, " if sides else ""
    count = f"{len(images):,} images of {len(images.class_names):,} classes"
    print(f"{half}: {count}, {size}{len(bad)} bad", flush=True)
    return bad


def main(argv: Sequence[str] | None = None) -> None:
    args = read_args(argv)
    halves = open_halves(args)
    bad = {
        half: check_half(half, images, args.num_workers, args.data_timeout)
        for half, images in halves.items()
    }
    names = [halves[half].name_of(index) for half, indices in bad.items() for index in indices]
    if args.output:
        text = "".join(f"{name}\n" for name in names)
        write_atomically(Path(args.output), lambda stream: stream.write(text.encode()))
        print(f"wrote {args.output}")
    if not names:
        print("all images can be read")
        return
    tolerated = max_bad_images(len(halves["training"]))
    raise StopRun(
        f"{len(names)} images cannot be read; repair or remove them. With --skip-corrupt training "
        f"tolerates up to {tolerated} of them, evaluation none"
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
