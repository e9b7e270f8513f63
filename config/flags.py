"""The command line: DeiT's flags with DeiT's names and meanings, ours beside them, and which of
them contradict.

Builds nothing. Every flag may be written with hyphens or underscores.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from config import mixing_flags as mixing
from utils import InputError

# Flags that DeiT or the released SMMix code has and this project does not, with what to do instead.
GONE = {
    "--dist-eval": (
        "evaluation is always distributed and counts each image once; leave the flag out"
    ),
    "--local-rank": (
        "rank and world size come from the environment: torchrun --nproc_per_node=N main.py ..."
    ),
    "--world-size": (
        "rank and world size come from the environment: torchrun --nproc_per_node=N main.py ..."
    ),
    "--dist-url": (
        "rank and world size come from the environment: torchrun --nproc_per_node=N main.py ..."
    ),
    "--distributed": (
        "rank and world size come from the environment: torchrun --nproc_per_node=N main.py ..."
    ),
    "--side": "the token grid comes from the model; leave the flag out",
    "--min-side-ratio": "use --side-ratio LOW HIGH",
    "--max-side-ratio": "use --side-ratio LOW HIGH",
    "--autoresume": "use --auto-resume",
    "--mixup-off-epoch": "use --mix-off-epoch",
    "--resplit": (
        "random erasing always applies to the whole batch, as DeiT's default does; leave the flag "
        "out"
    ),
    "--cooldown-epochs": "it has no effect in DeiT either; leave the flag out",
    "--patience-epochs": "--sched plateau is not offered; leave the flag out",
    "--threeaugment": "use --aa 3a, timm's name for it",
}


class Parser(argparse.ArgumentParser):
    """Takes hyphens and underscores alike, never abbreviations, and knows flags that are gone."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = [_hyphenated(word) for word in (sys.argv[1:] if args is None else args)]
        for word in given:
            if (flag := word.split("=")[0].lower()) in GONE:
                self.error(f"{flag}: {GONE[flag]}")
        parsed = super().parse_args(given, namespace)
        if namespace is None:
            self.check_kinds(parsed)
        return parsed

    def check_kinds(self, args: argparse.Namespace) -> None:
        """Holds values that did not come from a command line to what one could have given.

        Raises:
            InputError: one is of another kind; it is named.
        """
        for action in self._actions:
            value = getattr(args, action.dest, action.default)
            if action.dest != "help" and not _suits(action, value):
                raise InputError(
                    f"{max(action.option_strings, key=len)} {value!r}: no value that this flag can "
                    "have"
                )

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {message} (--help lists all flags)", file=sys.stderr)
        raise SystemExit(2)


def _suits(action: argparse.Action, value: Any) -> bool:
    kind = action.type or str

    def fits(one: Any) -> bool:
        alike = type(one) is kind or (kind is float and type(one) is int)
        return alike and (action.choices is None or one in action.choices)

    if value is None:
        return action.default is None
    if action.nargs == 0:
        return type(value) is bool
    if action.nargs is None and isinstance(
        action.default, list
    ):  # of a flag that may be given several times
        return isinstance(value, list) and all(map(fits, value))
    if action.nargs is None:
        return fits(value) or (type(value) is type(action.default) and value == action.default)
    several = isinstance(value, (list, tuple)) and all(map(fits, value))
    return several and (
        len(value) == action.nargs if isinstance(action.nargs, int) else len(value) > 0
    )


def _hyphenated(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def add_switch(group: Any, name: str, default: bool, text: str) -> None:
    """A pair of flags, `--name` and `--no-name`."""
    group.add_argument(
        f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=text
    )


def get_args_parser() -> Parser:
    """All flags of `main.py`, in groups."""
    parser = Parser("SMMix training and evaluation", allow_abbrev=False)
    for add in (
        _add_run,
        _add_data,
        _add_model,
        _add_optimizer,
        _add_augmentation,
        _add_mixing,
        _add_distillation,
    ):
        add(parser)
    return parser


def _add_run(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output-dir", default="", help="where logs, checkpoints and pictures go; empty for none"
    )
    group.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    group.add_argument("--seed", default=0, type=int)
    group.add_argument("--epochs", default=300, type=int)
    group.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="end the run after N optimizer steps, its epoch cut "
        "short and evaluated: for trials; more steps go on with it",
    )
    group.add_argument(
        "--start-epoch", default=0, type=int, help="number of the first epoch; --resume sets it"
    )
    group.add_argument(
        "--batch-size", default=64, type=int, help="images per process and micro-batch"
    )
    group.add_argument(
        "--accum-steps", default=1, type=int, help="micro-batches per optimizer step"
    )
    group.add_argument(
        "--amp", choices=["fp16", "bf16", "none"], help="default: fp16 on CUDA, none elsewhere"
    )
    add_switch(
        group,
        "attn-fp32",
        False,
        "compute attention in float32 under --amp: where its logits overflow fp16",
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the step and the motivating pass"
    )
    group.add_argument(
        "--eval", action="store_true", help="evaluate --resume and stop; needs no other flag"
    )
    group.add_argument("--resume", default="", help="checkpoint to go on from (or to evaluate)")
    group.add_argument(
        "--auto-resume",
        action="store_true",
        help="go on from OUTPUT_DIR's newest sound checkpoint if "
        "there is one; without, begin as the other flags say",
    )
    group.add_argument(
        "--finetune", default="", help="weights to start from; heads of other sizes start anew"
    )
    group.add_argument(
        "--save-steps", default=0, type=int, help="also save every N steps; 0: only after epochs"
    )
    group.add_argument(
        "--save-minutes",
        default=0,
        type=float,
        help="also save when M minutes have passed; 0: never",
    )
    group.add_argument(
        "--keep-checkpoints", default=2, type=int, help="how many checkpoints by step are kept"
    )
    group.add_argument(
        "--accept-changes",
        nargs="+",
        metavar="FLAG",
        help="go on although these flags differ from those the run was begun with; or all",
    )
    group.add_argument(
        "--max-bad-steps",
        default=20,
        type=int,
        help="steps in a row that may be left out because they were not finite",
    )
    group.add_argument("--log-every", default=10, type=int, help="steps between lines of the log")
    group.add_argument(
        "--eval-every",
        default=1,
        type=int,
        help="evaluate after every N epochs, and after the last",
    )
    add_switch(
        group,
        "channels-last",
        False,
        "keep images and convolutions channels-last: faster for ConvNets on CUDA",
    )
    add_switch(
        group,
        "train-mode",
        True,
        "train in training mode; off fine-tunes without dropout and drop path",
    )


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-set",
        help="DIGITS, CIFAR, CIFAR10, IMNET, INAT, INAT19 or timm/<name>; default: IMNET "
        "where --data-path is given, else DIGITS",
    )
    group.add_argument(
        "--data-path",
        default="",
        help="folder of the data set (IMNET: with train/ and val/ inside)",
    )
    ranks = ["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"]
    group.add_argument(
        "--inat-category", default="name", choices=ranks, help="what INAT and INAT19 call a class"
    )
    group.add_argument(
        "--nb-classes", type=int, help="number of classes, for timm/<name> sets that do not know it"
    )
    group.add_argument(
        "--subset",
        type=int,
        metavar="N",
        help="train on N images, as many of each class as of any "
        "other, the same ones whatever the seed; evaluation takes all",
    )
    group.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="SIDE",
        help="one side, or height and width, in pixels; default: the model's own",
    )
    group.add_argument(
        "--eval-crop-ratio",
        type=float,
        help="crop side / resized side in evaluation; default: the "
        "data set's own, 0.875 for photographs",
    )
    group.add_argument(
        "--num-workers",
        type=int,
        help="loader processes per rank; default: 10, or this rank's cores",
    )
    group.add_argument(
        "--data-timeout",
        default=600,
        type=float,
        help="seconds to wait for a loader process before the run ends and names it; 0: for ever",
    )
    group.add_argument(
        "--decoder",
        default="auto",
        choices=["auto", "pillow", "simplejpeg"],
        help="of training "
        "images; auto: simplejpeg where it is installed, which gives the same pixels",
    )
    add_switch(
        group,
        "skip-corrupt",
        False,
        "train on other images in the place of a few that cannot be decoded",
    )
    add_switch(group, "pin-mem", True, "pin host memory for faster transfers to CUDA")


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="deit_base_patch16_224", help="timm's name")
    group.add_argument(
        "--list-models",
        action="store_true",
        help="print every model that trains (builds each: a minute or two)",
    )
    group.add_argument(
        "--patch-size", type=int, help="side of a patch in pixels; default: the model's own"
    )
    group.add_argument("--drop", default=0.0, type=float, help="dropout")
    group.add_argument("--drop-path", default=0.1, type=float, help="stochastic depth")
    add_switch(
        group,
        "grad-checkpointing",
        False,
        "recompute activations in the backward pass: less memory, more time",
    )
    add_switch(
        group, "model-ema", True, "average the weights over steps, and evaluate the average too"
    )
    group.add_argument("--model-ema-decay", default=0.99996, type=float)
    group.add_argument(
        "--model-ema-force-cpu", action="store_true", help="keep the average in host memory"
    )


def _add_optimizer(parser: Parser) -> None:
    group = parser.add_argument_group("optimizer and schedule")
    group.add_argument("--opt", default="adamw", help="timm's name")
    group.add_argument("--opt-eps", default=1e-8, type=float)
    group.add_argument("--opt-betas", default=None, type=float, nargs="+")
    group.add_argument("--momentum", default=0.9, type=float)
    group.add_argument("--weight-decay", default=0.05, type=float)
    group.add_argument("--clip-grad", default=None, type=float, help="largest norm of the gradient")
    group.add_argument("--lr", default=5e-4, type=float, help="peak rate for a total batch of 512")
    group.add_argument(
        "--unscale-lr", action="store_true", help="take --lr as it is, whatever the total batch"
    )
    group.add_argument("--sched", default="cosine", help="timm's name")
    group.add_argument("--warmup-lr", default=1e-6, type=float)
    group.add_argument("--min-lr", default=1e-5, type=float)
    group.add_argument("--warmup-epochs", default=5, type=int)
    add_switch(
        group,
        "sched-on-updates",
        False,
        "step the schedule after every update instead of every epoch, as Swin",
    )
    add_switch(
        group,
        "scale-schedule",
        False,
        "scale --warmup-lr and --min-lr with the total batch too, as Swin",
    )
    group.add_argument("--lr-noise", default=None, type=float, nargs="+")
    group.add_argument("--lr-noise-pct", default=0.67, type=float)
    group.add_argument("--lr-noise-std", default=1.0, type=float)
    group.add_argument("--decay-epochs", default=30, type=float, help="for --sched step")
    group.add_argument("--decay-rate", "--dr", default=0.1, type=float, help="for --sched step")


def _add_augmentation(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation of single images")
    group.add_argument(
        "--color-jitter", default=0.3, type=float, help="has no effect while --aa is on"
    )
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm's policy string, or none")
    group.add_argument(
        "--train-interpolation", default="bicubic", help="random, bilinear or bicubic"
    )
    group.add_argument(
        "--resize",
        default="pillow",
        choices=["pillow", "torch"],
        help="what resizes the random crop: "
        "torch is faster and differs by a grey level here and there",
    )
    group.add_argument(
        "--randaugment",
        default="cpu",
        choices=["cpu", "device"],
        help="where flip and --aa rand-... "
        "are done: per image by the loader, or in the batch, with the same pixels",
    )
    add_switch(
        group,
        "repeated-aug",
        True,
        "show each image several times in a batch, each time augmented anew",
    )
    group.add_argument("--repeats", default=3, type=int, help="how many times, with --repeated-aug")
    group.add_argument(
        "--repeat-layout",
        default="blocks",
        choices=["blocks", "strided"],
        help="views of one image on one process, decoded once, or on neighbouring ones as in DeiT",
    )
    group.add_argument("--reprob", default=0.25, type=float, help="probability of random erasing")
    group.add_argument("--remode", default="pixel", help="const, rand or pixel")
    group.add_argument("--recount", default=1, type=int, help="boxes per erased image")


def _add_mixing(parser: Parser) -> None:
    group = parser.add_argument_group("mixing and its loss")
    mixing.add_method_flags(group)
    mixing.add_training_flags(group)


def _add_distillation(parser: Parser) -> None:
    group = parser.add_argument_group("distillation")
    group.add_argument("--distillation-type", default="none", choices=["none", "soft", "hard"])
    group.add_argument("--teacher-model", default="regnety_160", help="timm's name")
    group.add_argument("--teacher-path", default="", help="the teacher's weights")
    group.add_argument("--distillation-alpha", default=0.5, type=float)
    group.add_argument("--distillation-tau", default=1.0, type=float)


POSITIVE = (
    *mixing.POSITIVE,
    "max_bad_steps",
    "batch_size",
    "accum_steps",
    "epochs",
    "repeats",
    "recount",
    "log_every",
    "eval_every",
    "subset",
    "max_steps",
    "lr",
    "opt_eps",
    "distillation_tau",
    "patch_size",
    "nb_classes",
    "decay_epochs",
    "decay_rate",
)
NOT_NEGATIVE = (
    *mixing.NOT_NEGATIVE,
    "save_steps",
    "save_minutes",
    "weight_decay",
    "momentum",
    "warmup_lr",
    "min_lr",
    "warmup_epochs",
    "start_epoch",
    "num_workers",
    "data_timeout",
    "color_jitter",
    "lr_noise_pct",
    "lr_noise_std",
)
SHARES = (
    *mixing.SHARES,
    "reprob",
    "drop",
    "drop_path",
    "model_ema_decay",
    "distillation_alpha",
    "eval_crop_ratio",
)


def check_args(args: argparse.Namespace) -> None:
    """Refuses values that make no sense and flags that contradict each other, before any work is
    done.

    Raises:
        InputError: names the flag and the fix.
    """
    mixing.check_values(vars(args), POSITIVE, NOT_NEGATIVE, SHARES)
    mixing.require(
        args.eval_crop_ratio != 0, "eval_crop_ratio", args.eval_crop_ratio, "must be above 0"
    )
    keep = args.keep_checkpoints
    mixing.require(
        keep >= 2,
        "keep_checkpoints",
        keep,
        "must be at least 2, so that a damaged one can be done without",
    )
    if args.clip_grad is not None:
        mixing.require(
            args.clip_grad > 0,
            "clip_grad",
            args.clip_grad,
            "must be above 0; leave it out for no clipping",
        )
    for name in ("input_size", "guide_size"):
        if (sides := getattr(args, name)) is not None:
            fine = len(sides) <= 2 and min(sides) > 0
            mixing.require(fine, name, sides, "takes one side, or height and width, in pixels")
    if args.opt_betas is not None:
        fine = len(args.opt_betas) >= 2 and all(0 <= beta < 1 for beta in args.opt_betas)
        mixing.require(fine, "opt_betas", args.opt_betas, "takes two numbers from 0 to below 1")
    _check_together(args)


def _check_together(args: argparse.Namespace) -> None:
    rules: list[tuple[bool, str]] = [
        *([] if args.eval else mixing.conflicts(args)),  # an evaluation mixes nothing
        (args.eval and not args.resume, "--eval needs --resume CHECKPOINT, the model to evaluate"),
        (
            args.motivator == "ema" and not (args.model_ema and not args.model_ema_force_cpu),
            "--motivator ema looks through the averaged weights on each step: add --model-ema, and "
            "leave out "
            "--model-ema-force-cpu",
        ),
        (
            bool(args.resume) and bool(args.finetune),
            "--resume goes on with a run and --finetune starts one from weights: give one of them",
        ),
        (
            (args.save_steps > 0 or args.save_minutes > 0)
            and not args.output_dir
            and not args.eval,
            "--save-steps and --save-minutes need --output-dir, where checkpoints go",
        ),
        (
            args.auto_resume and not args.output_dir,
            "--auto-resume needs --output-dir, where it looks for a checkpoint",
        ),
        (
            args.distillation_type != "none" and not args.teacher_path and not args.eval,
            f"--distillation-type {args.distillation_type} needs --teacher-path, the teacher's "
            "weights",
        ),
        (
            bool(args.teacher_path) and args.distillation_type == "none",
            "--teacher-path would be ignored: add --distillation-type soft or hard",
        ),
        (
            args.start_epoch >= args.epochs and not args.eval,
            f"--start-epoch {args.start_epoch}: nothing is left to do before --epochs "
            f"{args.epochs}",
        ),
        (
            args.nb_classes is not None and not (args.data_set or "").startswith("timm/"),
            "--nb-classes is for timm/<name> data sets only: the others know their classes",
        ),
    ]
    for broken, message in rules:
        if broken:
            raise InputError(message)


def explicit_flags(parser: Parser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags that were really written on a command line, with their values; defaults are left
    out."""
    silent = argparse.Namespace(**{action.dest: _ABSENT for action in parser._actions})
    return {
        name: value
        for name, value in vars(parser.parse_args(argv, silent)).items()
        if value is not _ABSENT
    }


_ABSENT = object()
