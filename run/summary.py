"""The text that a run prints before it starts: a table of its settings, and warnings.

The warnings are about settings that are allowed but unusual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine import Training
from mixers.registry import all_flags, con_weight_of
from mixers.switch import Switch
from run.state import Identity, Progress
from training import optim

# A run is warned whose learning rate stays below this share of the peak that the flags announce.
NEAR_PEAK = 0.9


def describe_run(
    identity: Identity,
    training: Training,
    steps: int,
    num_images: tuple[int, int],
    highest_rate: float,
) -> list[tuple[str, str]]:
    """The table of settings, as rows of (name, value).

    Args:
        identity: its flags and versions are described.
        training: its model, mixer and optimizer are described.
        steps: optimizer steps per epoch.
        num_images: number of training images and of validation images.
        highest_rate: the highest learning rate that the run will have.
    """
    flags, processes, model = identity.args, training.processes, training.module
    total = flags["total_batch"]
    batch = (
        f"{flags['batch_size']} per process x {processes.world_size} processes x "
        f"{training.accum_steps} accumulated"
    )
    parameters = sum(p.numel() for p in model.network.parameters())
    peak = optim.largest_rate(training.optimizer)
    scaling = "" if flags["unscale_lr"] else f" = {flags['lr']:g} x {total} / 512"
    amp = flags["amp"]
    return [
        ("data", f"{flags['data_set']} {flags['data_path']}".strip()),
        ("images", f"{num_images[0]} to train on, {num_images[1]} to evaluate on"),
        ("classes", str(model.num_classes)),
        ("model", f"{flags['model']}, {parameters:,} parameters"),
        ("input", "{} x {} pixels, {} x {} tokens".format(*model.input_size, *model.grid_size)),
        ("mixing", _describe_mixing(flags, training.mixer)),
        ("total batch", f"{batch} = {total}"),
        ("steps", f"{steps} per epoch, {steps * flags['epochs']} in {flags['epochs']} epochs"),
        ("peak learning rate", f"{peak:g}{scaling}"),
        ("highest rate", f"{highest_rate:g} in this run, --sched {flags['sched']}"),
        ("precision", "float32" if amp == "none" else f"{amp} autocast"),
        ("device", f"{processes.device.type}, {flags['num_workers']} loader processes per rank"),
        ("versions", ", ".join(f"{name} {version}" for name, version in identity.versions.items())),
    ]


def describe_resuming(
    path: str, checkpoint: Mapping[str, Any], progress: Progress, identity: Identity
) -> Iterator[str]:
    """Lines that say where the run is resumed, and which versions have changed since."""
    within = f" after {progress.samples} images" if progress.samples else ""
    yield (
        f"resumed from {path}; next is epoch {progress.epoch}{within}, best top-1 "
        f"{progress.best_acc1:.2f}"
    )
    saved = checkpoint["versions"]
    changed = [f"{name} {now}" for name, now in identity.versions.items() if saved.get(name) != now]
    if changed:
        yield f"warning: the run was started with other versions than {', '.join(changed)}"


def _describe_mixing(flags: dict[str, Any], mixer: Any) -> str:
    text = flags["mixer"]
    if flags["mixer"] == "smmix":
        text += f" ({flags['variant']})"
    text += _describe_changes(flags)
    if flags["relabel"] == "transmix":
        text += " with TransMix's labels"
    if isinstance(mixer, Switch) and mixer.second is not None:
        text += f" at {mixer.first_prob:g}, else Mixup"
    if flags["mixer"] != "none" and flags["mixup_prob"] < 1:
        text += f"; {flags['mixup_prob']:g} of all batches"
    if flags["mix_off_epoch"] is not None:
        text += f"; nothing from epoch {flags['mix_off_epoch']} on"
    return text


def _describe_changes(flags: dict[str, Any]) -> str:
    """The flags of the method that differ from their usual values (those of an ablation)."""
    parts = {
        "regions {0} -> {1}": ("source_region", "target_region"),
        "score {0}": ("score",),
        "block {0}": ("score_block",),
        "L_fine x {0:g}": ("fine_weight",),
        "L_con x {0:g}": ("con_weight",),
        "L_con rising over {0} epochs": ("con_warmup_epochs",),
        "guided by {0}": ("motivator",),
    }
    usual = {name: flag.default for name, flag in all_flags().items()}
    usual["con_weight"] = con_weight_of(flags["mixer"], None)
    changes = [
        text.format(*(flags[name] for name in names))
        for text, names in parts.items()
        if any(flags[name] != usual[name] for name in names)
    ]
    return f", {', '.join(changes)}" if changes else ""


def warnings(
    flags: dict[str, Any], steps: int, training: Training, highest_rate: float
) -> Iterator[str]:
    """Warnings about unusual settings, each with the flag to change.

    Args:
        steps: optimizer steps per epoch.
        highest_rate: the highest learning rate that the run will have.
    """
    on_cuda = training.processes.device.type == "cuda"
    if on_cuda and not training.optimizer.defaults.get("fused"):
        yield (
            f"--opt {flags['opt']} has no fused form: each step waits for the GPU once, to find "
            "out whether it must be skipped"
        )
    memory, all_steps = 1 / max(1 - flags["model_ema_decay"], 1e-12), steps * flags["epochs"]
    if flags["model_ema"] and memory > all_steps / 4:
        yield (
            f"--model-ema-decay {flags['model_ema_decay']} averages over {memory:.0f} steps, but "
            f"this run has {all_steps}: the average will lag far behind the weights; lower it, or "
            "add --no-model-ema"
        )
    peak = optim.largest_rate(training.optimizer)
    if highest_rate < NEAR_PEAK * peak:
        length = f"--epochs {flags['epochs']}"
        if flags["max_steps"] is not None:
            length += f" --max-steps {flags['max_steps']}"
        yield (
            f"the learning rate reaches {highest_rate:g}, not its peak {peak:g}: --sched "
            f"{flags['sched']} --warmup-epochs {flags['warmup_epochs']} with {length}; shorten the "
            "warm-up or train longer"
        )
    mix_off_epoch, epochs = flags["mix_off_epoch"], flags["epochs"]
    if mix_off_epoch is not None and mix_off_epoch >= epochs:
        yield f"--mix-off-epoch {mix_off_epoch} has no effect: the run has --epochs {epochs}"
    if flags["batch_size"] == 1 and flags["mixer"] != "none":
        yield "--batch-size 1: an image has no other image to be mixed with, so nothing is mixed"
