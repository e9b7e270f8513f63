"""Shows what a mixer makes of a few validation images: source, attention, chosen regions, mixed image, label share.

    python -m evaluation.show_mixing --model deit_tiny_patch16_224 --data-set DIGITS --output mixed.png
    python -m evaluation.show_mixing --resume output/checkpoint.pth --data-path /imagenet --output mixed.png

Mixes and draws as training does; neither trains nor evaluates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import datasets
import engine
import loaders
import utils
from checkpoints import load_checkpoint
from mixers.build import build_mixer
from mixers.interface import Mixer, StepRandom
from models.build import build_model, load_foreign, restore_model
from models.interface import ImageModel
from options import Parser
from pictures import Pair, describe_pairs, mixing_picture, save_png, spread_samples
from smmix import VARIANTS
from transforms import ImageSpec, build_eval_transform
from utils import InputError, run_command


def get_args_parser() -> Parser:
    parser = Parser("python -m evaluation.show_mixing", description="Draws a few mixed validation images.")
    parser.add_argument("--model", help="timm's name; default: deit_tiny_patch16_224")
    parser.add_argument("--resume", default="", help="checkpoint of main.py: its model, weights and image size")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of --resume")
    parser.add_argument("--weights", default="", help="weights for --model, this project's or others'")
    parser.add_argument("--data-set", help="as for main.py; default: IMNET where --data-path is given, else DIGITS")
    parser.add_argument("--data-path", default="", help="folder of the data set")
    parser.add_argument("--input-size", type=int, nargs="+", metavar="SIDE", help="one side, or height and width")
    parser.add_argument("--patch-size", type=int, help="side of a patch in pixels; default: the model's own")
    parser.add_argument("--mixer", default="smmix", choices=["smmix", "cutmix", "mixup"])
    parser.add_argument("--variant", default="paper", choices=sorted(VARIANTS), help="SMMix's arithmetic")
    parser.add_argument("--side-ratio", default=(0.25, 0.75), type=float, nargs=2, metavar=("LOW", "HIGH"))
    parser.add_argument("--count", default=4, type=int, help="rows of the picture, one pair of images each")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--output", default="mixed.png", help="PNG file to write")
    return parser


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked and with its defaults filled in.

    Raises:
        InputError: a value makes no sense, or flags contradict each other.
    """
    args = get_args_parser().parse_args(argv)
    args.data_set = args.data_set or ("IMNET" if args.data_path else "DIGITS")
    given = [name for name in ("model", "weights", "input_size", "patch_size") if getattr(args, name)]
    own = ", ".join("--" + name.replace("_", "-") for name in given)
    low, high = args.side_ratio
    sides = args.input_size or [1]
    rules: list[tuple[bool, str]] = [
        (args.count < 1, f"--count {args.count}: must be above 0"),
        (args.patch_size is not None and args.patch_size < 1, f"--patch-size {args.patch_size}: must be above 0"),
        (
            len(sides) > 2 or min(sides) < 1,
            f"--input-size {args.input_size}: takes one side, or height and width, in pixels",
        ),
        (not 0 <= low <= high <= 1, f"--side-ratio {low} {high}: must be two shares, the lower first"),
        (
            args.mixer != "smmix" and args.variant != "paper",
            f"--variant {args.variant}: --mixer {args.mixer} has no variants, only smmix does",
        ),
        (bool(args.resume) and bool(own), f"--resume brings its own model: leave out {own}"),
        (args.ema and not args.resume, "--ema is for --resume CHECKPOINT"),
        (not args.output.lower().endswith(".png"), f"--output {args.output}: pictures are PNG; name a .png file"),
    ]
    for broken, message in rules:
        if broken:
            raise InputError(message)
    args.model = args.model or "deit_tiny_patch16_224"
    return args


def restore(path: str, ema: bool) -> tuple[ImageModel, ImageSpec]:
    """The model of one of main.py's checkpoints, and how images are shown to it."""
    checkpoint = load_checkpoint(path)
    model = restore_model(checkpoint, ema)
    try:
        return model, ImageSpec.from_plain(checkpoint["data"]["image_spec"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: no image_spec under data: it was not written by this project's main.py") from error


def build(args: argparse.Namespace, num_classes: int) -> tuple[ImageModel, ImageSpec]:
    """The model that the flags name, with `--weights` if there are any, and how its data set is shown to it."""
    input_size = utils.as_pair(args.input_size) if args.input_size else None
    utils.seed_globals("init", args.seed)
    model = build_model(args.model, num_classes, input_size=input_size, patch_size=args.patch_size)
    if args.weights:
        for note in load_foreign(model, args.weights):
            print(f"{args.weights}: {note}")
    elif args.mixer == "smmix":
        print(f"{args.model} is untrained: its attention carries no meaning yet; give --resume or --weights")
    return model, datasets.image_spec_for(args.data_set, model.input_size)


def make_mixer(args: argparse.Namespace, num_classes: int, grid_size: tuple[int, int]) -> Mixer:
    """The named method alone, with main.py's defaults and without its coin."""
    switch = build_mixer(
        args.mixer, num_classes, grid_size, smoothing=0.1, variant=VARIANTS[args.variant],
        side_ratio=tuple(args.side_ratio), mixup_alpha=0.8, cutmix_alpha=1.0, cutmix_minmax=None, mixup_prob=1.0,
        switch_prob=1.0, mode="batch",
    )  # fmt: skip
    return switch.first


def format_pairs(pairs: Sequence[Pair]) -> str:
    """A table of pairs: source, target, share and region."""
    rows = [("source", "target", "share", "region")]
    rows += [(pair.source, pair.target, pair.share, pair.region or "") for pair in pairs]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = read_args(argv)
    device = torch.device(utils.pick_device(args.device))
    images = datasets.open_images(args.data_set, args.data_path, train=False)
    names = images.class_names
    model, spec = restore(args.resume, args.ema) if args.resume else build(args, len(names))
    mixer = make_mixer(args, len(names), model.grid_size)

    samples = loaders.eval_samples(images, build_eval_transform(spec))
    pixels, labels = engine.to_device(device, *spread_samples(samples, 2 * args.count))
    guide = engine.make_guide(model.to(device), engine.make_autocast(device, "none"))
    random = utils.keyed_generator("picture", args.seed, 0)
    batch = mixer(pixels, labels, guide, StepRandom(random, random))

    save_png(
        mixing_picture(pixels, batch, labels, spec=spec, class_names=names, grid_size=model.grid_size), args.output
    )
    print(format_pairs(describe_pairs(batch, labels, names, model.grid_size)))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
