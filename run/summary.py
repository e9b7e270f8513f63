"""What a run says of itself before it starts: the table at its head, and what is allowed but seldom
meant.

Only turns values into text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine import Training
from mixers.switch import Switch
from run.state import Identity, Progress


def describe_run(
    identity: Identity, training: Training, steps: int, num_images: tuple[int, int]
) -> list[tuple[str, str]]:
    """Rows of (name, value).

    Args:
        steps: optimizer steps per epoch.
        num_images: to train and to evaluate on.
    """
    flags, processes, model = identity.args, training.processes, training.module
    total = flags["batch_size"] * processes.world_size * training.accum_steps
    batch = (
        f"{flags['batch_size']} per process x {processes.world_size} processes x "
        f"{training.accum_steps} accumulated"
    )
    peak = max(group["lr"] for group in training.optimizer.param_groups)
    scaling = "" if flags["unscale_lr"] else f" = {flags['lr']:g} x {total} / 512"
    amp = flags["amp"]
    return [
        ("data", f"{flags['data_set']} {flags['data_path']}".strip()),
        ("images", f"{num_images[0]} to train on, {num_images[1]} to evaluate on"),
        ("classes", str(model.num_classes)),
        (
            "model",
            f"{flags['model']}, {sum(p.numel() for p in model.network.parameters()):,} parameters",
        ),
        ("input", "{} x {} pixels, {} x {} tokens".format(*model.input_size, *model.grid_size)),
        ("mixing", _describe_mixing(flags, training.mixer)),
        ("total batch", f"{batch} = {total}"),
        ("steps", f"{steps} per epoch, {steps * flags['epochs']} in {flags['epochs']} epochs"),
        ("peak learning rate", f"{peak:g}{scaling}"),
        ("precision", "float32" if amp == "none" else f"{amp} autocast"),
        ("device", f"{processes.device.type}, {flags['num_workers']} loader processes per rank"),
        ("versions", ", ".join(f"{name} {version}" for name, version in identity.versions.items())),
    ]


def describe_resuming(
    path: str, checkpoint: Mapping[str, Any], progress: Progress, identity: Identity
) -> Iterator[str]:
    """Where a run goes on from, and whether with other libraries than before."""
    within = f" after {progress.samples} images" if progress.samples else ""
    yield (
        f"resumed from {path}; next is epoch {progress.epoch}{within}, best top-1 "
        f"{progress.best_acc1:.2f}"
    )
    changed = [
        f"{name} {now}"
        for name, now in identity.versions.items()
        if checkpoint["versions"].get(name) != now
    ]
    if changed:
        yield f"warning: the run was begun with other versions than {', '.join(changed)}"


def _describe_mixing(flags: dict[str, Any], mixer: Any) -> str:
    text = (
        flags["mixer"]
        + (f" ({flags['variant']})" if flags["mixer"] == "smmix" else "")
        + _describe_study(flags)
    )
    text += " with TransMix's labels" if flags["relabel"] == "transmix" else ""
    if isinstance(mixer, Switch) and mixer.second is not None:
        text += f" at {mixer.first_prob:g}, else Mixup"
    if flags["mixer"] != "none" and flags["mixup_prob"] < 1:
        text += f"; {flags['mixup_prob']:g} of all batches"
    return (
        text
        if flags["mix_off_epoch"] is None
        else f"{text}; nothing from epoch {flags['mix_off_epoch']} on"
    )


def _describe_study(flags: dict[str, Any]) -> str:
    """What departs from the method's own terms, scheme, score and motivator."""
    own = float(flags["mixer"] == "smmix")
    parts = {
        "regions {0} -> {1}": ("source_region", "target_region"),
        "score {0}": ("score",),
        "block {0}": ("score_block",),
        "L_fine x {0:g}": ("fine_weight",),
        "L_con x {0:g}": ("con_weight",),
        "guided by {0}": ("motivator",),
    }
    usual = ("max", "min", "attention", None, 1.0, own, "self")
    known = dict(zip((name for names in parts.values() for name in names), usual, strict=True))
    told = [
        text.format(*(flags[name] for name in names))
        for text, names in parts.items()
        if any(flags[name] != known[name] for name in names)
    ]
    return f", {', '.join(told)}" if told else ""


def warnings(flags: dict[str, Any], steps: int, training: Training) -> Iterator[str]:
    """What is allowed but seldom meant, with the flag to change."""
    on_cuda, is_fused = (
        training.processes.device.type == "cuda",
        training.optimizer.defaults.get("fused"),
    )
    if on_cuda and not is_fused:
        yield (
            f"--opt {flags['opt']} has no fused form: each step waits for the GPU once, to see "
            "whether it is left out"
        )
    memory, all_steps = 1 / max(1 - flags["model_ema_decay"], 1e-12), steps * flags["epochs"]
    if flags["model_ema"] and memory > all_steps / 4:
        yield (
            f"--model-ema-decay {flags['model_ema_decay']} averages over {memory:.0f} steps, this "
            f"run has {all_steps}: "
            "the average will lag far behind; lower it, or add --no-model-ema"
        )
    if flags["mix_off_epoch"] is not None and flags["mix_off_epoch"] >= flags["epochs"]:
        yield (
            f"--mix-off-epoch {flags['mix_off_epoch']}: never comes, the run has --epochs "
            f"{flags['epochs']}"
        )
    if flags["batch_size"] == 1 and flags["mixer"] != "none":
        yield "--batch-size 1 leaves every image without a partner: nothing is mixed"
