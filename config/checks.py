"""Refuses flags of `main.py` whose values are out of range or that contradict each other."""

from __future__ import annotations

import argparse
import itertools

from config.mixing_checks import check_mixing_values, mixing_conflicts
from config.value_checks import check_values, require
from errors import InputError
from mixers.options import Rule

POSITIVE = (
    "max_bad_steps",
    "batch_size",
    "accum_steps",
    "total_batch",
    "epochs",
    "repeats",
    "recount",
    "log_every",
    "eval_every",
    "subset",
    "val_subset",
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
    "reprob",
    "drop",
    "drop_path",
    "model_ema_decay",
    "distillation_alpha",
    "eval_crop_ratio",
    "layer_decay",
)


def check_args(args: argparse.Namespace) -> None:
    """Refuses wrong values and contradicting flags, before any work begins.

    Raises:
        InputError: names the flag and the fix.
    """
    check_values(vars(args), POSITIVE, NOT_NEGATIVE, SHARES)
    check_mixing_values(vars(args))
    for name in ("eval_crop_ratio", "layer_decay"):
        require(getattr(args, name) != 0, name, getattr(args, name), "must be above 0")
    keep, clip, betas = args.keep_checkpoints, args.clip_grad, args.opt_betas
    rule = "must be at least 2, so that another one remains if the newest is damaged"
    require(keep >= 2, "keep_checkpoints", keep, rule)
    if clip is not None:
        require(clip > 0, "clip_grad", clip, "must be above 0; leave it out for no clipping")
    for name in ("input_size", "guide_size"):
        if (sides := getattr(args, name)) is not None:
            holds = len(sides) <= 2 and min(sides) > 0
            require(holds, name, sides, "takes one side, or height and width, in pixels")
    milestones = args.decay_milestones
    holds = milestones[0] > 0 and all(a < b for a, b in itertools.pairwise(milestones))
    require(holds, "decay_milestones", milestones, "takes epochs above 0 in ascending order")
    if betas is not None:
        holds = len(betas) >= 2 and all(0 <= beta < 1 for beta in betas)
        require(holds, "opt_betas", betas, "takes two numbers from 0 to below 1")
    _check_conflicts(args)


def _check_conflicts(args: argparse.Namespace) -> None:
    rules: list[Rule] = []
    if not args.eval:  # an evaluation mixes nothing
        rules += mixing_conflicts(args)
    averages_on_device = args.model_ema and not args.model_ema_force_cpu
    saves = args.save_steps > 0 or args.save_minutes > 0
    is_timm_set = (args.data_set or "").startswith("timm/")
    rules += [
        (args.eval and not args.resume, "--eval needs --resume CHECKPOINT, the model to evaluate"),
        (
            args.motivator == "ema" and not averages_on_device,
            "--motivator ema runs the average on the device in each step: add --model-ema, and "
            "leave out --model-ema-force-cpu",
        ),
        (
            bool(args.resume) and bool(args.finetune),
            "--resume continues a run and --finetune starts a new one: give one of them",
        ),
        (
            saves and not args.output_dir and not args.eval,
            "--save-steps and --save-minutes need --output-dir, where checkpoints go",
        ),
        (
            args.auto_resume and not args.output_dir,
            "--auto-resume needs --output-dir, where it searches for a checkpoint",
        ),
        (
            args.distillation_type != "none" and not args.teacher_path and not args.eval,
            f"--distillation-type {args.distillation_type} needs --teacher-path, the teacher's "
            "weights",
        ),
        (
            args.distillation_type != "none" and not args.train_mode,
            f"--distillation-type {args.distillation_type} with --no-train-mode: the logits of the "
            "distillation token exist in training mode only; leave out one of them",
        ),
        (
            bool(args.teacher_path) and args.distillation_type == "none",
            "--teacher-path would be ignored: add --distillation-type soft or hard",
        ),
        (
            args.start_epoch >= args.epochs and not args.eval,
            f"--start-epoch {args.start_epoch}: must be below --epochs {args.epochs}",
        ),
        (
            args.con_warmup_epochs > args.epochs and not args.eval,
            f"--con-warmup-epochs {args.con_warmup_epochs}: must be at most --epochs {args.epochs}",
        ),
        (
            args.nb_classes is not None and not is_timm_set,
            "--nb-classes is for timm/<name> data sets only: the others know their classes",
        ),
    ]
    for is_broken, message in rules:
        if is_broken:
            raise InputError(message)
