"""Training and evaluation: flags -> objects -> epochs.

    torchrun --nproc_per_node=4 main.py --model deit_small_patch16_224 --batch-size 256 --data-path /imagenet \\
        --output_dir output/deit_small

The only place where flags become objects; the parsed namespace never leaves this file. No tensor arithmetic here.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import checkpoints
import datasets
import engine
import transforms
import utils
from logs import RunLog, write_json
from losses import Criterion, DistillationLoss, SMMixLoss
from mixers.build import build_mixer
from mixers.interface import StepRandom
from models.build import adapt_weights, build_model, own_keys, plain_weights, use_distillation
from models.interface import ImageModel
from options import VARIANT_FLAGS, check_args, explicit_flags, get_args_parser
from pictures import mixing_picture
from smmix import VARIANTS, Variant
from utils import InputError, Processes


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. With `--eval` everything it leaves out comes from the checkpoint."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.eval and args.resume:
        saved = checkpoints.load_checkpoint(args.resume).get("args", {})
        known = {action.dest for action in parser._actions}
        run_only = {"eval", "resume", "output_dir", "device", "start_epoch", "auto_resume", "finetune"}
        given = explicit_flags(parser, argv)
        kept = {name: value for name, value in saved.items() if name in known - run_only}
        args = argparse.Namespace(**{**vars(args), **kept, **given})
    check_args(args)
    return args


def resolve_defaults(args: argparse.Namespace, processes: Processes) -> None:
    """Fills in the defaults that depend on the machine or on other flags; what is saved and shown is the result."""
    args.data_set = args.data_set or ("IMNET" if args.data_path else "DIGITS")
    args.amp = args.amp or ("fp16" if processes.device.type == "cuda" else "none")
    if args.num_workers is None:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.num_workers = (
            min(10, len(os.sched_getaffinity(0)) // local_size) if hasattr(os, "sched_getaffinity") else 2
        )
    variant = VARIANTS[args.variant]
    for name in VARIANT_FLAGS:
        setattr(args, name, getattr(args, name) or getattr(variant, name))


# ------------------------------------------------------------------------------------------ flags -> objects


def open_images(args: argparse.Namespace, train: bool) -> Any:
    return datasets.open_images(
        args.data_set, args.data_path, train, inat_category=args.inat_category, num_classes=args.nb_classes,
        batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip


def make_model(args: argparse.Namespace, num_classes: int, processes: Processes) -> ImageModel:
    """The model, freshly initialised alike on all ranks."""
    utils.seed_globals("init", args.seed)
    model = build_model(
        args.model, num_classes,
        input_size=None if args.input_size is None else utils.as_pair(args.input_size),
        patch_size=args.patch_size, drop=args.drop, drop_path=args.drop_path,
        separate_region_head=args.mixer == "smmix" and args.region_head == "separate",
    )  # fmt: skip
    if args.distillation_type != "none":
        use_distillation(model, args.model)
    return model.to(processes.device)


def make_loaders(
    args: argparse.Namespace, train: Any, val: Any, spec: transforms.ImageSpec, processes: Processes
) -> Any:
    """The training loader (`None` for evaluation) and the validation loader."""
    shared = {
        "rank": processes.rank, "world_size": processes.world_size, "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and processes.device.type == "cuda",
    }  # fmt: skip
    eval_samples = datasets.eval_samples(val, transforms.build_eval_transform(spec))
    val_loader = datasets.build_eval_loader(eval_samples, batch_size=int(1.5 * args.batch_size), **shared)
    if train is None:
        return None, val_loader
    augment = transforms.Augment(
        aa=args.aa, color_jitter=args.color_jitter, reprob=args.reprob, remode=args.remode, recount=args.recount,
        interpolation=args.train_interpolation,
    )  # fmt: skip
    transform = transforms.build_train_transform(spec, datasets.augment_for(args.data_set, augment))
    train_loader = datasets.build_train_loader(
        datasets.train_samples(train, transform, args.seed), batch_size=args.batch_size, seed=args.seed,
        repeats=args.repeats if args.repeated_aug else 1, accum_steps=args.accum_steps, **shared,
    )  # fmt: skip
    return train_loader, val_loader


def make_criterion(
    args: argparse.Namespace, num_classes: int, autocast: engine.Autocast, device: torch.device
) -> Criterion:
    """The sum of Eq. 15, inside DeiT's distillation if that is asked for."""
    base = SMMixLoss(bce=args.bce_loss)
    if args.distillation_type == "none":
        return base
    if not timm.is_model(args.teacher_model):
        raise InputError(f"--teacher-model {args.teacher_model}: timm has no model of that name")
    teacher = timm.create_model(args.teacher_model, num_classes=num_classes).to(device)
    weights = checkpoints.pick_weights(checkpoints.load_checkpoint(args.teacher_path))
    checkpoints.load_strictly(teacher, weights, source=f"--teacher-path {args.teacher_path}")
    return DistillationLoss(
        base, engine.make_teacher(teacher, autocast), args.distillation_type, args.distillation_alpha,
        args.distillation_tau,
    )  # fmt: skip


def make_optimizer(
    args: argparse.Namespace, model: ImageModel, total_batch: int
) -> tuple[torch.optim.Optimizer, Scheduler]:
    """timm's factories, fused where the optimizer has such a form. The peak rate grows with the total batch."""
    args.lr = args.lr if args.unscale_lr else args.lr * total_batch / 512
    settings = optimizer_kwargs(args)
    try:
        try:
            optimizer = create_optimizer_v2(model.network, **settings, fused=True)
        except (TypeError, RuntimeError):  # no fused form
            optimizer = create_optimizer_v2(model.network, **settings)
    except (ValueError, AssertionError, TypeError) as error:
        raise InputError(f"--opt {args.opt}: {error}") from error
    return optimizer, scheduler


# ---------------------------------------------------------------------------------------------------- run
