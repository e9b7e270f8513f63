"""The flags of `main.py`: DeiT's with DeiT's names and meanings, and this project's beside them.

The flags of mixing are in `config/mixing_flags.py`. `config/checks.py` refuses values that are out
of range and flags that contradict each other. Flags may be written with hyphens or underscores.
"""

from __future__ import annotations

from config import mixing_flags
from config.config_file import MainParser
from config.parser import Parser, add_switch


def get_args_parser() -> Parser:
    """All flags of `main.py`, in groups."""
    parser = MainParser("SMMix training and evaluation", allow_abbrev=False)
    for add_group in (
        _add_run,
        _add_step,
        _add_saving,
        _add_data,
        _add_model,
        _add_optimizer,
        _add_schedule,
        _add_augmentation,
        _add_mixing,
        _add_distillation,
    ):
        add_group(parser)
    return parser


def _add_run(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--config",
        default=[],
        action="append",
        metavar="FILE",
        help="YAML file with flags as keys, or the args.json of a run; may be given several times: "
        "later files win, the command line wins over all",
    )
    group.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    group.add_argument("--seed", default=0, type=int)
    group.add_argument("--epochs", default=300, type=int)
    group.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="end the run after N optimizer steps, for trials: the last epoch is cut short and "
        "evaluated; --resume with a larger N continues it",
    )
    group.add_argument(
        "--start-epoch", default=0, type=int, help="number of the first epoch; --resume sets it"
    )
    group.add_argument(
        "--max-bad-steps",
        default=20,
        type=int,
        help="stop after this many skipped steps (gradient NaN or inf) in a row",
    )
    group.add_argument(
        "--eval",
        action="store_true",
        help="evaluate the checkpoint of --resume and stop; the checkpoint gives all other flags",
    )
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
        "train in training mode; off: fine-tune without dropout and drop path",
    )


def _add_step(parser: Parser) -> None:
    group = parser.add_argument_group("batch and precision")
    group.add_argument(
        "--batch-size",
        default=64,
        type=int,
        help="images per process and micro-batch; with --total-batch: the most there may be",
    )
    group.add_argument(
        "--accum-steps", default=1, type=int, help="micro-batches per optimizer step"
    )
    group.add_argument(
        "--total-batch",
        type=int,
        metavar="N",
        help="images per optimizer step, over all processes and micro-batches; the micro-batches "
        "are as few as --batch-size allows; default: batch size x processes x micro-batches",
    )
    group.add_argument(
        "--amp", choices=["fp16", "bf16", "none"], help="default: fp16 on CUDA, none elsewhere"
    )
    add_switch(
        group,
        "attn-fp32",
        False,
        "compute attention in float32 under --amp, for models whose attention overflows fp16",
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the step and the motivating pass"
    )


def _add_saving(parser: Parser) -> None:
    group = parser.add_argument_group("checkpoints and log")
    group.add_argument(
        "--output-dir",
        default="",
        help="folder for logs, checkpoints and pictures; empty: nothing is written",
    )
    group.add_argument(
        "--resume", default="", help="checkpoint from which to resume, or to evaluate with --eval"
    )
    group.add_argument(
        "--auto-resume",
        action="store_true",
        help="resume from the newest intact checkpoint in OUTPUT_DIR; if it has none, start as the "
        "other flags say",
    )
    group.add_argument(
        "--finetune",
        default="",
        help="weights with which a new run starts; heads of other sizes are initialised anew",
    )
    group.add_argument(
        "--save-steps", default=0, type=int, help="also save every N steps; 0: only after epochs"
    )
    group.add_argument(
        "--save-minutes",
        default=0,
        type=float,
        help="also save M minutes after the last checkpoint; 0: never",
    )
    group.add_argument(
        "--keep-checkpoints", default=2, type=int, help="number of checkpoints by step to keep"
    )
    group.add_argument(
        "--accept-changes",
        nargs="+",
        metavar="FLAG",
        help="resume although these flags differ from those with which the run started; or all",
    )
    group.add_argument("--log-every", default=10, type=int, help="steps between lines of the log")


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-set",
        help="DIGITS, CIFAR, CIFAR10, IMNET, INAT, INAT19 or timm/<name>; default: IMNET if "
        "--data-path is given, else DIGITS",
    )
    group.add_argument(
        "--data-path", default="", help="folder of the data set; for IMNET it holds train/ and val/"
    )
    ranks = ["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"]
    group.add_argument(
        "--inat-category", default="name", choices=ranks, help="what INAT and INAT19 call a class"
    )
    group.add_argument(
        "--nb-classes",
        type=int,
        help="number of classes, for timm/<name> data sets that do not give it",
    )
    group.add_argument(
        "--subset",
        type=int,
        metavar="N",
        help="train on N images, the same number of each class; the choice does not depend on the "
        "seed; evaluation uses all images",
    )
    group.add_argument(
        "--val-subset",
        type=int,
        metavar="N",
        help="evaluate on N images, chosen in the same way, for trials; default: all",
    )
    group.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="SIDE",
        help="one side, or height and width, in pixels; default: that of the model",
    )
    group.add_argument(
        "--eval-crop-ratio",
        type=float,
        help="crop side / resized side in evaluation; default: that of the data set, 0.875 for "
        "photographs",
    )
    group.add_argument(
        "--num-workers",
        type=int,
        help="loader processes per rank; default: the cores of this rank, at most 10",
    )
    group.add_argument(
        "--data-timeout",
        default=600,
        type=float,
        help="seconds without data from a loader process after which the run stops with an error; "
        "0: wait without limit",
    )
    group.add_argument(
        "--decoder",
        default="auto",
        choices=["auto", "pillow", "simplejpeg"],
        help="decoder of training images; auto: simplejpeg if installed, with the same pixels",
    )
    add_switch(
        group,
        "skip-corrupt",
        False,
        "replace the few training images that cannot be decoded by other ones",
    )
    add_switch(group, "pin-mem", True, "pin host memory for faster transfers to CUDA")


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="deit_base_patch16_224", help="name of a timm model")
    group.add_argument(
        "--list-models",
        action="store_true",
        help="print every model that can be trained; builds each, which takes a minute or two",
    )
    group.add_argument(
        "--patch-size", type=int, help="side of a patch in pixels; default: that of the model"
    )
    group.add_argument(
        "--drop",
        default=0.0,
        type=float,
        help="dropout rate, in the blocks as in DeiT; before the classifier in networks without "
        "such dropout",
    )
    group.add_argument("--drop-path", default=0.1, type=float, help="stochastic depth rate")
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
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="adamw", help="name of a timm optimizer")
    group.add_argument("--opt-eps", default=1e-8, type=float)
    group.add_argument("--opt-betas", default=None, type=float, nargs="+")
    group.add_argument("--momentum", default=0.9, type=float)
    group.add_argument("--weight-decay", default=0.05, type=float)
    group.add_argument("--clip-grad", default=None, type=float, help="largest norm of the gradient")
    group.add_argument(
        "--lr", default=5e-4, type=float, help="peak learning rate for a total batch of 512"
    )
    group.add_argument(
        "--layer-decay",
        type=float,
        metavar="F",
        help="layer-wise learning rate decay: each layer has F times the rate of the next one, the "
        "head has the whole rate; default: all layers have the same rate",
    )
    group.add_argument(
        "--unscale-lr", action="store_true", help="do not scale --lr with the total batch"
    )


def _add_schedule(parser: Parser) -> None:
    group = parser.add_argument_group("learning rate schedule")
    group.add_argument("--sched", default="cosine", help="cosine, tanh, step, multistep or poly")
    group.add_argument("--warmup-lr", default=1e-6, type=float)
    group.add_argument("--min-lr", default=1e-5, type=float)
    group.add_argument("--warmup-epochs", default=5, type=int)
    add_switch(
        group,
        "sched-on-updates",
        False,
        "change the learning rate after every step instead of every epoch, as Swin does",
    )
    add_switch(
        group,
        "scale-schedule",
        False,
        "also scale --warmup-lr and --min-lr with the total batch, as Swin does",
    )
    group.add_argument("--lr-noise", default=None, type=float, nargs="+")
    group.add_argument("--lr-noise-pct", default=0.67, type=float)
    group.add_argument("--lr-noise-std", default=1.0, type=float)
    group.add_argument("--decay-epochs", default=30, type=float, help="for --sched step")
    group.add_argument(
        "--decay-milestones",
        default=(30, 60),
        type=int,
        nargs="+",
        metavar="EPOCH",
        help="for --sched multistep: the epochs from which the rate is multiplied by --decay-rate",
    )
    group.add_argument(
        "--decay-rate",
        "--dr",
        default=0.1,
        type=float,
        help="for --sched step and multistep: the factor; for --sched poly: the power, "
        "rate = peak x (1 - epoch / epochs) ** power, so that 0.1 hardly falls until the end and 1 "
        "is a line",
    )


def _add_augmentation(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation of single images")
    group.add_argument(
        "--color-jitter", default=0.3, type=float, help="has no effect while --aa is on"
    )
    group.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy as timm writes it, or none"
    )
    group.add_argument(
        "--train-interpolation", default="bicubic", help="random, bilinear or bicubic"
    )
    group.add_argument(
        "--resize",
        default="pillow",
        choices=["pillow", "torch"],
        help="library that resizes the random crop; torch is faster, and some pixels differ by one "
        "grey level",
    )
    group.add_argument(
        "--randaugment",
        default="cpu",
        choices=["cpu", "device"],
        help="where flip and --aa rand-... are applied: per image in the loader (cpu), or to the "
        "batch on the device; the pixels are the same",
    )
    add_switch(
        group,
        "src",
        False,
        "DeiT III's simple random crop instead of the random resized crop: resize the smaller side "
        "to the input size, pad by 4 pixels with the reflection, crop at random",
    )
    add_switch(
        group,
        "repeated-aug",
        True,
        "put each image into the batch several times, each time with another augmentation",
    )
    group.add_argument("--repeats", default=3, type=int, help="how many times, with --repeated-aug")
    group.add_argument(
        "--repeat-layout",
        default="blocks",
        choices=["blocks", "strided"],
        help="blocks: one process has all views of an image, decodes it once and mixes each with "
        "another draw; strided: neighbouring processes have one view each, as in DeiT",
    )
    group.add_argument("--reprob", default=0.25, type=float, help="probability of random erasing")
    group.add_argument("--remode", default="pixel", help="const, rand or pixel")
    group.add_argument("--recount", default=1, type=int, help="boxes per erased image")


def _add_mixing(parser: Parser) -> None:
    group = parser.add_argument_group("mixing and its loss")
    mixing_flags.add_method_flags(group)
    mixing_flags.add_training_flags(group)


def _add_distillation(parser: Parser) -> None:
    group = parser.add_argument_group("distillation")
    group.add_argument("--distillation-type", default="none", choices=["none", "soft", "hard"])
    group.add_argument("--teacher-model", default="regnety_160", help="name of a timm model")
    group.add_argument("--teacher-path", default="", help="file with the weights of the teacher")
    group.add_argument("--distillation-alpha", default=0.5, type=float)
    group.add_argument("--distillation-tau", default=1.0, type=float)
