"""Run folders with known numbers, as `main.py` leaves them, without training; and rows of tables to
go with them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from errors import as_pair
from tools.runs.matching import flags_of
from tools.runs.records import Row

FULL = (
    "--model deit_tiny_patch16_224 --input-size 224 --epochs 4 --amp fp16 --batch-size 256 "
    "--accum-steps 4 --seed 0"
)
SMALL = (
    "--model vit_mini_patch4_32 --epochs 6 --batch-size 128 --lr 1e-3 --unscale-lr "
    "--no-repeated-aug --seed 0"
)
IMAGENET = ("IMNET", 1000, 1_281_167, 50_000)
CIFAR10 = ("CIFAR10", 10, 50_000, 10_000)


def rows() -> list[Row]:
    """A table: one row cannot be run yet, one has no figure of the paper, two have rehearsals."""
    made = [
        ("none", "none (CutMix)", 79.8, "--mixer cutmix"),
        ("mixing", "mixing", 80.4, "--mixer smmix --fine-weight 0 --con-weight 0"),
        ("all", "all (SMMix)", 81.1, "--mixer smmix"),
        ("later", "to come", 80.5, None),
        ("own", "ours", None, "--mixer smmix --variant released"),
    ]
    title = "Table 7, the components of SMMix"

    def make(name: str, label: str, figure: float | None, text: str | None, small: bool) -> Row:
        recipe, model = (SMALL, "study") if small else (FULL, "deit_tiny")
        flags = None if text is None else tuple(f"{recipe} {text}".split())
        figure = None if small else figure
        return Row("table7", name, label, model, figure, (), flags, (), small, title)

    full = [make(*one, small=False) for one in made]
    return [*full, *(make(*one, small=True) for one in made if one[0] in ("none", "all"))]


def row(name: str, small: bool = False) -> Row:
    (found,) = [one for one in rows() if (one.name, one.small) == (name, small)]
    return found


def curve(last: float, epochs: int) -> list[float]:
    """Accuracies that end at `last`."""
    return [
        last * (1 - math.exp(-3 * (epoch + 1) / epochs)) / (1 - math.exp(-3))
        for epoch in range(epochs)
    ]


def log_line(epoch: int, accuracy: float | None, average: float | None = None) -> dict[str, Any]:
    """A line of log.txt with SMMix's terms."""
    line = {
        "epoch": epoch,
        "lr": 1e-3 * (1 + math.cos(epoch / 2)) / 2 + 1e-5,
        "train_loss": 3.5 - 0.1 * epoch,
        "train_loss_cls": 2.3 - 0.05 * epoch,
        "train_loss_fine": 2.2 - 0.04 * epoch,
        "train_loss_con": 0.002 + 1e-4 * epoch,
        "test_acc1": accuracy,
        "test_acc5": None if accuracy is None else min(100.0, accuracy + 15),
        "skipped_steps": 0,
    }
    return line if average is None else {**line, "test_ema_acc1": average}


def head(args: dict[str, Any], data: tuple[str, int, int, int], processes: int) -> list[str]:
    """The table at the head of a run, as train.log has it."""
    _, classes, train, val = data
    total = args["batch_size"] * args["accum_steps"] * processes
    shares = (
        f"{args['batch_size']} per process x {processes} processes x {args['accum_steps']} "
        "accumulated"
    )
    table = {
        "data": f"{args['data_set']} {args['data_path']}",
        "images": f"{train} to train on, {val} to evaluate on",
        "classes": str(classes),
        "model": f"{args['model']}, 5,717,416 parameters",
        "input": "{} x {} pixels, 14 x 14 tokens".format(*args["input_size"]),
        "mixing": f"{args['mixer']} at 0.5, else Mixup",
        "total batch": f"{shares} = {total}",
        "steps": f"100 per epoch, {100 * args['epochs']} in {args['epochs']} epochs",
        "peak learning rate": f"{args['lr']:g}",
        "highest rate": f"{args['lr']:g} in this run, --sched cosine",
        "precision": "float32",
        "device": f"{'cuda' if args['amp'] == 'fp16' else 'cpu'}, 4 loader processes per rank",
        "versions": "torch 2.14.1, commit abcdef123456",
    }
    return [f"{name:<18}  {value}".rstrip() for name, value in table.items()]


def write_run(
    folder: Path,
    wanted: Row,
    accuracies: Sequence[float | None],
    *,
    data: tuple[str, int, int, int] | None = None,
    averages: Sequence[float] = (),
    state: str = "done",
    processes: int = 1,
    told: Sequence[str] = (),
    **changed: Any,
) -> Path:
    """A run of a row, an accuracy for each epoch that is done.

    Args:
        data: name, classes, images to train and to evaluate on; default: the row's.
        averages: accuracies of the averaged weights.
        state: of status.json.
        told: lines of train.log behind the head.
        changed: flags that differ from the row's.
    """
    folder.mkdir(parents=True)
    data = data or (CIFAR10 if wanted.small else IMAGENET)
    device = "cpu" if wanted.small else "cuda"
    args = {
        **flags_of(wanted.arguments, device),
        "data_set": data[0],
        "data_path": "data",
        "output_dir": str(folder),
    }
    args.update({"input_size": list(as_pair(args["input_size"])), **changed})
    lines = [
        log_line(epoch, accuracy, averages[epoch] if averages else None)
        for epoch, accuracy in enumerate(accuracies)
    ]
    (folder / "args.json").write_text(json.dumps(args, indent=2))
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text(
        json.dumps({"state": state, "epoch": len(lines), "step": 100 * len(lines)})
    )
    (folder / "environment.json").write_text(
        json.dumps({"torch": "2.14.1", "commit": "abcdef123456"})
    )
    said = [*head(args, data, processes), *told, "epoch 0 [10/100] loss 2.777"]
    stamps = [f"2026-01-01 10:00:00 {line}" for line in said] + [
        "2026-01-01 11:05:30 epoch 3: top-1 1.00 %, best 1.00 %"
    ]
    (folder / "train.log").write_text("\n".join(stamps) + "\n")
    picture = Image.new("RGB", (680, 400), (240, 240, 240))
    ImageDraw.Draw(picture).rectangle((40, 40, 300, 300), fill=(20, 90, 160))
    picture.save(folder / "mixing.png")
    return folder


def example(root: Path) -> Path:
    """Runs of every kind: three seeds, unfinished, of no row, rehearsals whole and cut short, and
    what is no run."""
    for seed, last in enumerate((80.9, 81.0, 81.3)):
        write_run(
            root / f"table7/all_seed{seed}",
            row("all"),
            curve(last, 4),
            averages=curve(last + 0.2, 4),
            seed=seed,
        )
    write_run(root / "table7/mixing", row("mixing"), curve(60, 4)[:3], state="preempted")
    write_run(root / "table7/other_variant", row("all"), curve(75, 4), mixup=0.5, smoothing=0.0)
    for seed, (plain, mixed) in enumerate(((51.0, 52.5), (53.0, 54.5), (52.0, 53.0))):
        write_run(root / f"small/none_seed{seed}", row("none", True), curve(plain, 6), seed=seed)
        write_run(root / f"small/all_seed{seed}", row("all", True), curve(mixed, 6), seed=seed)
    for seed in (0, 1):
        write_run(
            root / f"short/all_seed{seed}",
            row("all", True),
            curve(30 + seed, 2),
            epochs=2,
            seed=seed,
        )
    (root / "foreign").mkdir()
    (root / "foreign/log.txt").write_text("{}\n")
    return root
