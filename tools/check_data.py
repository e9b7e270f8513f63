"""Decodes every image of a data set, in full, and names those that cannot be read.

    python -m tools.check_data --data-path /imagenet
    python -m tools.check_data --data-set INAT --data-path /inat --num-workers 16 --output bad.txt

Both halves, as `main.py` would open them, and what it would refuse is refused. Leaves with code 1
if any image is bad. Nothing is changed or moved. A JPEG has no checksum: damage that leaves it
decodable, as other pixels, is not seen.
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
from pipeline import loaders
from pipeline.bad_images import max_bad_images
from pipeline.images import Images, StreamedImages, UnreadableSampleError
from pipeline.workers import Loader
from storage.files import write_atomically
from utils import InputError, StopRun, cores_per_process, run_command

BATCH = 32
SECONDS_BETWEEN_LINES = 10.0


class Checked(NamedTuple):
    """One image: what is wrong with it, or its size in pixels."""

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
        "--data-timeout", default=600.0, type=float, help="seconds to wait for one; 0: for ever"
    )
    parser.add_argument(
        "--output", default="", help="text file for the names of the bad images, one a line"
    )
    return parser


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked and with its defaults filled in.

    Raises:
        InputError: a value makes no sense.
    """
    args = get_args_parser().parse_args(argv)
    check_values(vars(args), positive=("nb_classes",), not_negative=("num_workers", "data_timeout"))
    if args.output and not os.path.isdir(Path(args.output).parent):
        raise InputError(f"--output {args.output}: there is no folder {Path(args.output).parent}")
    args.data_set = args.data_set or ("IMNET" if args.data_path else "DIGITS")
    args.num_workers = cores_per_process() if args.num_workers is None else args.num_workers
    return args


def open_halves(args: argparse.Namespace) -> dict[str, Images]:
    """Training and validation images.

    Raises:
        InputError: what `main.py` would refuse, or a stream, whose images have no numbers.
    """
    halves = {}
    for where in ("training", "validation"):
        images = datasets.open_images(
            args.data_set,
            args.data_path,
            where == "training",
            inat_category=args.inat_category,
            num_classes=args.nb_classes,
        )
        if isinstance(images, StreamedImages):
            raise InputError(
                f"--data-set {args.data_set}: a stream is not checked; its own reader says what it "
                "skips"
            )
        halves[where] = images
    datasets.check_same_classes(halves["training"].class_names, halves["validation"].class_names)
    return halves


def check_half(where: str, images: Images, num_workers: int, timeout: float) -> list[int]:
    """Decodes all images of one half and prints what it finds. Returns the bad ones.

    Raises:
        InputError: a label names no class.
    """
    settings = {"num_workers": num_workers, "timeout": timeout} if num_workers else {}
    loader = Loader(
        Checks(images), name_of=images.name_of, batch_size=BATCH, collate_fn=list, **settings
    )
    bad, sides, done, said = list[int](), set[int](), 0, time.monotonic()
    with loaders.closing(loader):
        for batch in loader:
            for checked in batch:
                if checked.reason:
                    bad.append(checked.number)
                    print(f"bad: {images.name_of(checked.number)}: {checked.reason}", flush=True)
                else:
                    sides.update((checked.width, checked.height))
            done += len(batch)
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"{where}: {done:,} of {len(images):,} images, {len(bad)} bad", flush=True)
    size = f"sides from {min(sides)} to {max(sides)} pixels, " if sides else ""
    print(
        f"{where}: {len(images):,} images of {len(images.class_names):,} classes, {size}{len(bad)} "
        "bad",
        flush=True,
    )
    return bad


def main(argv: Sequence[str] | None = None) -> None:
    args = read_args(argv)
    halves = open_halves(args)
    bad = {
        where: check_half(where, images, args.num_workers, args.data_timeout)
        for where, images in halves.items()
    }
    names = [halves[where].name_of(index) for where, indices in bad.items() for index in indices]
    if args.output:
        text = "".join(f"{name}\n" for name in names)
        write_atomically(Path(args.output), lambda stream: stream.write(text.encode()))
        print(f"wrote {args.output}")
    if not names:
        print("all images can be read")
        return
    raise StopRun(
        f"{len(names)} images cannot be read; mend or remove them. --skip-corrupt trains without "
        "up to "
        f"{max_bad_images(len(halves['training']))} of them, evaluation needs all"
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
