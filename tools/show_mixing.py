"""Draws a few mixed validation images: source, score, regions, mixed image and label share.

    python -m tools.show_mixing --model deit_tiny_patch16_224 --data-set DIGITS --output mixed.png
    python -m tools.show_mixing --resume output/checkpoint.pth --output mixed.png
    python -m tools.show_mixing --mixer all --attentive-teacher resnet50=resnet50.pth \\
        --output all.png

With `--mixer all`, every method mixes the same pairs, side by side. Mixing and draws are those of
training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

import datasets
import engine
import utils
from config.build_mixer import build_mixer
from config.mixing_checks import check_mixing_values, mixing_conflicts
from config.mixing_flags import add_method_flags
from config.parser import Parser
from config.second_networks import build_feature_map
from config.value_checks import check_values
from errors import InputError, as_pair, run_command
from mixers import registry
from mixers.interface import MixedBatch, Mixer, MixerContext, StepRandom
from models.build import build_model
from models.interface import ImageModel
from models.weights import load_foreign, restore_model
from pipeline.samples import eval_samples
from pipeline.spec import ImageSpec
from pipeline.transforms import build_eval_transform, denormalise
from run.pictures import (
    Pair,
    describe_pairs,
    mixing_picture,
    save_png,
    side_by_side,
    spread_samples,
)
from storage.checkpoints import CheckpointReader, ReadCheckpoint, load_checkpoint
from training import precision

DATA_FLAGS = ("data_set", "data_path", "inat_category", "nb_classes")
METHODS = tuple(name for name in registry.METHODS if name != "none")
# Values of the flags that this command does not have: every image is mixed, by the method alone.
FIXED_FLAGS = {
    "mix_protocol": "single",
    "mixup_prob": 1.0,
    "mixup_switch_prob": 1.0,
    "mix_off_epoch": None,
    "bce_loss": False,
}


def get_args_parser() -> Parser:
    parser = Parser(
        "python -m tools.show_mixing", description="Draws a few mixed validation images."
    )
    parser.add_argument("--model", help="timm's name; default: deit_tiny_patch16_224")
    parser.add_argument(
        "--resume", default="", help="checkpoint of main.py: its model, weights and image size"
    )
    parser.add_argument("--ema", action="store_true", help="use the averaged weights of --resume")
    parser.add_argument(
        "--weights", default="", help="weights for --model, this project's or others'"
    )
    parser.add_argument(
        "--data-set",
        help="as for main.py; default: that of --resume, or IMNET where --data-path is given, else "
        "DIGITS",
    )
    parser.add_argument(
        "--data-path", default="", help="folder of the data set; default: that of --resume"
    )
    parser.add_argument(
        "--inat-category", choices=datasets.INAT_CATEGORIES, help="as for main.py and --data-set"
    )
    parser.add_argument("--nb-classes", type=int, help="as for main.py and --data-set")
    parser.add_argument(
        "--input-size", type=int, nargs="+", metavar="SIDE", help="one side, or height and width"
    )
    parser.add_argument(
        "--patch-size", type=int, help="side of a patch in pixels; default: the model's own"
    )
    add_method_flags(parser.add_argument_group("mixing, as in main.py"), methods=(*METHODS, "all"))
    parser.add_argument(
        "--count", default=4, type=int, help="rows of the picture, one pair of images each"
    )
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--output", default="mixed.png", help="PNG file to write")
    return parser


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked and with its defaults filled in, but for the data of `--resume`.

    Raises:
        InputError: a value is invalid, or flags contradict each other.
    """
    args = get_args_parser().parse_args(argv)
    check_mixing_values(vars(args))
    check_values(vars(args), positive=("nb_classes",))
    check_flags(args)
    args.model = args.model or "deit_tiny_patch16_224"
    if not args.resume:
        fill_in_data(args, {})
    return args


def fill_in_data(args: argparse.Namespace, checkpoint: dict[str, Any]) -> None:
    """Sets the data flags that are not given to those of the checkpoint, as `--eval` does.

    Raises:
        InputError: a flag in the checkpoint has a value that it cannot have.
    """
    saved = checkpoint.get("args")
    if isinstance(saved, dict):
        for name in DATA_FLAGS:
            setattr(args, name, getattr(args, name) or saved.get(name) or getattr(args, name))
    get_args_parser().check_kinds(args)
    args.data_set = args.data_set or ("IMNET" if args.data_path else "DIGITS")
    args.inat_category = args.inat_category or "name"


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError if flags of the command line contradict each other."""
    given = [
        name for name in ("model", "weights", "input_size", "patch_size") if getattr(args, name)
    ]
    model_flags = ", ".join("--" + name.replace("_", "-") for name in given)
    sides = args.input_size or [1]
    rules: list[tuple[bool, str]] = [
        *(
            rule
            for one in flags_by_method(args).values()
            for rule in mixing_conflicts(argparse.Namespace(**one))
        ),
        (args.count < 1, f"--count {args.count}: must be above 0"),
        (
            args.patch_size is not None and args.patch_size < 1,
            f"--patch-size {args.patch_size}: must be above 0",
        ),
        (
            len(sides) > 2 or min(sides) < 1,
            f"--input-size {args.input_size}: takes one side, or height and width, in pixels",
        ),
        (
            bool(args.resume and given),
            f"--resume also loads the model of the checkpoint: leave out {model_flags}",
        ),
        (args.ema and not args.resume, "--ema is for --resume CHECKPOINT"),
        (
            not args.output.lower().endswith(".png"),
            f"--output {args.output}: pictures are PNG; give a name that ends in .png",
        ),
    ]
    for broken, message in rules:
        if broken:
            raise InputError(message)


def restore(
    path: str, ema: bool, read: ReadCheckpoint = load_checkpoint
) -> tuple[ImageModel, ImageSpec]:
    """The model of one of main.py's checkpoints, and its size, crop and normalisation of images."""
    checkpoint = read(path)
    model = restore_model(checkpoint, ema)
    try:
        return model, ImageSpec.from_plain(checkpoint["data"]["image_spec"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: holds no image_spec under data: this project's main.py did not write it"
        ) from error


def build(args: argparse.Namespace, num_classes: int) -> tuple[ImageModel, ImageSpec]:
    """The model that the flags name, and its size, crop and normalisation of images."""
    input_size = as_pair(args.input_size) if args.input_size else None
    utils.seed_globals("init", args.seed)
    model = build_model(args.model, num_classes, input_size=input_size, patch_size=args.patch_size)
    if args.weights:
        for note in load_foreign(model, load_checkpoint(args.weights), args.weights):
            print(f"{args.weights}: {note}")
    elif args.mixer in ("smmix", "transmix", "all"):
        print(f"{args.model} is untrained: its score means nothing yet; give --resume or --weights")
    return model, datasets.image_spec_for(args.data_set, model.input_size)


def flags_by_method(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The mixing flags of each method to draw.

    With `--mixer all`, each method gets only the flags that it takes, and AttentiveMix is left out
    without its classifier.
    """
    flags = {**vars(args), **FIXED_FLAGS}
    if args.mixer != "all":
        return {args.mixer: flags}
    names = [name for name in METHODS if name != "attentivemix" or args.attentive_teacher]
    return {name: registry.flags_of_method(flags, name) for name in names}


def make_mixers(
    args: argparse.Namespace,
    model: ImageModel,
    spec: ImageSpec,
    num_classes: int,
    device: torch.device,
) -> dict[str, Mixer]:
    """The mixers of the methods, which mix every image."""
    teacher = None
    if args.attentive_teacher:
        network = build_feature_map(args.attentive_teacher, model.input_size).to(device)
        teacher = engine.make_teacher(network, precision.make_autocast(device, "none"))
    context = MixerContext(num_classes, model.grid_size, partial(denormalise, spec=spec), teacher)
    return {
        name: build_mixer(argparse.Namespace(**flags), context).first
        for name, flags in flags_by_method(args).items()
    }


def format_pairs(pairs: Sequence[Pair]) -> str:
    """A table of pairs: source, target, share and region."""
    rows = [("source", "target", "share", "region")]
    rows += [(pair.source, pair.target, pair.share, pair.region or "") for pair in pairs]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    read = CheckpointReader()
    args = read_args(argv)
    if args.resume:
        fill_in_data(args, read(args.resume))
    device = torch.device(utils.pick_device(args.device))
    images = datasets.open_images(
        args.data_set,
        args.data_path,
        train=False,
        inat_category=args.inat_category,
        num_classes=args.nb_classes,
    )
    names = images.class_names
    model, spec = restore(args.resume, args.ema, read) if args.resume else build(args, len(names))
    read.forget()
    mixers = make_mixers(args, model, spec, len(names), device)

    samples = eval_samples(images, build_eval_transform(spec))
    pixels, labels = engine.to_device(device, *spread_samples(samples, 2 * args.count))
    autocast = precision.make_autocast(device, "none")
    guide = engine.make_guide(model.to(device), autocast)

    def mix(mixer: Mixer) -> MixedBatch:
        random = utils.keyed_generator("picture", args.seed, 0)  # the same draws for each
        batch = mixer(pixels, labels, guide, StepRandom(random, random))
        return engine.settle_labels(model, batch, autocast)

    batches = {name: mix(mixer) for name, mixer in mixers.items()}
    if args.mixer == "all":
        if "attentivemix" not in batches:
            print("attentivemix is left out: it needs --attentive-teacher")
        picture = side_by_side(pixels, batches, labels, spec=spec, class_names=names)
    else:
        batch = batches[args.mixer]
        picture = mixing_picture(
            pixels, batch, labels, spec=spec, class_names=names, grid_size=model.grid_size
        )
    save_png(picture, args.output)
    for name, batch in batches.items():
        if len(batches) > 1:
            print(f"\n{name}")
        print(format_pairs(describe_pairs(batch, labels, names, model.grid_size)))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
