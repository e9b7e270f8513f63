"""`python -m tools.show_mixing` from flags to a picture, and its messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import datasets
from errors import run_command
from mixers.registry import options_of
from mixers.smmix_options import VARIANTS
from models.build import build_model
from models.weights import plain_weights
from pipeline import transforms
from pipeline.spec import ImageSpec
from storage.checkpoints import save_checkpoint
from tests.image_folders import make_image_folder
from tools import show_mixing

NANO = ["--model", "vit_nano_patch4_32", "--device", "cpu"]


def run(tmp_path: Path, *flags: str) -> int:
    return run_command(lambda: show_mixing.main([*flags, "--output", str(tmp_path / "mixed.png")]))


def read_picture(tmp_path: Path) -> Image.Image:
    with Image.open(tmp_path / "mixed.png") as image:
        image.load()
        return image


def write_checkpoint(path: Path, **changes: Any) -> Path:
    """A checkpoint as main.py writes it, as far as this tool reads it: 24 x 40 pixels, 2
    classes."""
    config = {"name": "vit_nano_patch4_32", "num_classes": 2, "input_size": [24, 40]}
    model = build_model("vit_nano_patch4_32", 2, input_size=(24, 40))
    spec = ImageSpec((24, 40), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_ratio=1.0)
    weights = plain_weights(model)
    ema = {name: value * 2 for name, value in weights.items()}
    data = {"class_names": ["ant", "bee"], "image_spec": spec.to_plain()}
    save_checkpoint(
        path, {"model_config": config, "model": weights, "ema": ema, "data": data, **changes}
    )
    return path


def test_digits_give_a_picture_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *NANO, "--data-set", "DIGITS") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("vit_nano_patch4_32 is untrained: its score means nothing yet")
    assert told[1].split() == ["source", "target", "share", "region"]
    assert told[-1] == f"wrote {tmp_path / 'mixed.png'}"
    rows = [line.split(maxsplit=2) for line in told[2:-1]]
    assert len(rows) == 4
    assert len({name for row in rows for name in row[:2]}) == 8  # as many classes as images
    assert all("x" in row[2] and "of 8 x 8 tokens" in row[2] for row in rows)
    assert read_picture(tmp_path).format == "PNG"


def test_the_picture_repeats_and_depends_on_the_seed(tmp_path: Path) -> None:
    contents = []
    for seed in ("3", "3", "4"):
        assert run(tmp_path, *NANO, "--seed", seed, "--count", "1") == 0
        contents.append((tmp_path / "mixed.png").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_the_seed_also_draws_the_region(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth")  # its weights come from no seed
    told = set()
    for seed in ("0", "1", "2", "3"):
        assert (
            run(
                tmp_path,
                "--resume",
                str(checkpoint),
                "--seed",
                seed,
                "--count",
                "1",
                "--device",
                "cpu",
            )
            == 0
        )
        told.add(capsys.readouterr().out)
    assert len(told) > 1


@pytest.mark.parametrize("mixer", ["cutmix", "mixup"])
def test_other_mixers_need_no_trained_model(
    tmp_path: Path, mixer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *NANO, "--mixer", mixer, "--count", "2") == 0
    told = capsys.readouterr().out
    assert "untrained" not in told
    assert told.count("lam = ") == 2


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_side_ratio_and_variant_reach_the_mixer(
    tmp_path: Path, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--variant",
        variant,
        "--side-ratio",
        "0.5",
        "0.5",
        "--input-size",
        "32",
        "48",
        "--count",
        "1",
    ]
    assert run(tmp_path, *NANO, *flags) == 0
    assert "lam = 0.25 (source share)  4 x 6 of 8 x 12 tokens" in capsys.readouterr().out


def test_flags_of_mixing_are_those_of_training() -> None:
    args = show_mixing.read_args(
        ["--variant", "released", "--mixup-mode", "elem", "--relabel", "transmix"]
    )
    (flags,) = show_mixing.flags_by_method(args).values()
    options: Any = options_of(flags)
    assert options.arithmetic == VARIANTS["released"]
    assert (options.mixup_mode, options.relabel) == ("elem", "transmix")
    assert flags["mix_protocol"] == "single"


def test_all_methods_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(
        timm.create_model("test_resnet", num_classes=4).state_dict(), tmp_path / "weights.pth"
    )
    flags = [
        "--mixer",
        "all",
        "--count",
        "2",
        "--input-size",
        "32",
        "--resize-placement",
        "clipped",
    ]
    assert run(tmp_path, *NANO, *flags) == 0
    told = capsys.readouterr().out
    assert "attentivemix is left out: it needs --attentive-teacher" in told
    narrow = read_picture(tmp_path).width
    assert (
        run(
            tmp_path,
            *NANO,
            *flags,
            "--attentive-teacher",
            f"test_resnet={tmp_path / 'weights.pth'}",
        )
        == 0
    )
    told = capsys.readouterr().out
    titles = [line for line in told.splitlines() if line in show_mixing.METHODS]
    assert titles == list(show_mixing.METHODS)
    rows = [line.split()[:2] for line in told.splitlines() if "source share" in line]
    assert len(rows) == 2 * len(titles)
    assert {tuple(row) for row in rows[::2]} == {tuple(rows[0])}  # the same pair everywhere
    panels = len(titles) + 2
    assert read_picture(tmp_path).width == pytest.approx(narrow * panels / (panels - 1), abs=8)


def test_flags_of_one_method_reach_it_alone_among_all() -> None:
    args = show_mixing.read_args(
        ["--mixer", "all", "--resize-placement", "clipped", "--mix-alpha", "0.2"]
    )
    flags = show_mixing.flags_by_method(args)
    assert flags["resizemix"]["resize_placement"] == "clipped"
    assert flags["cutmix"]["resize_placement"] == "inside"
    assert (flags["fmix"]["mix_alpha"], flags["smmix"]["mix_alpha"]) == ([0.2], None)


def test_patch_size_sets_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, *NANO, "--patch-size", "8", "--count", "1") == 0
    assert "of 4 x 4 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_brings_model_and_image_size(
    tmp_path: Path, ema: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    specs: list[ImageSpec] = []

    def build(spec: ImageSpec) -> transforms.Transform:
        specs.append(spec)
        return transforms.build_eval_transform(spec)

    monkeypatch.setattr(show_mixing, "build_eval_transform", build)
    folder = make_image_folder(tmp_path / "data", per_class=2)
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth")
    flags = [
        "--resume",
        str(checkpoint),
        "--data-path",
        str(folder),
        "--count",
        "1",
        "--device",
        "cpu",
    ]
    assert run(tmp_path, *flags, *(["--ema"] if ema else [])) == 0
    told = capsys.readouterr().out
    assert "untrained" not in told
    assert "of 6 x 10 tokens" in told
    assert told.splitlines()[1].split()[:2] == ["bee", "ant"]
    assert specs[0].mean == (0.5, 0.5, 0.5)
    assert specs[0].crop_ratio == 1.0


def test_ema_takes_the_averaged_weights(tmp_path: Path) -> None:
    path = str(write_checkpoint(tmp_path / "checkpoint.pth"))
    model, _ = show_mixing.restore(path, ema=False)
    average, _ = show_mixing.restore(path, ema=True)
    weights, averages = plain_weights(model), plain_weights(average)
    assert all(torch.equal(averages[name], 2 * weights[name]) for name in weights)


def test_foreign_weights_are_made_to_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build_model("vit_nano_patch4_32", 1000)
    torch.save({"model": plain_weights(other)}, tmp_path / "weights.pth")
    args = show_mixing.read_args(
        [*NANO, "--weights", str(tmp_path / "weights.pth"), "--input-size", "48"]
    )
    model, spec = show_mixing.build(args, num_classes=10)
    told = capsys.readouterr().out
    assert "untrained" not in told
    assert "pos_embed resized" in told
    assert "head.weight has shape" in told
    assert spec.input_size == (48, 48)
    own, foreign = plain_weights(model), plain_weights(other)
    assert torch.equal(own["blocks.0.attn.qkv.weight"], foreign["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "deit_tny_patch16_224"], "did you mean deit_tiny_patch16_224"),
        (["--resume", "missing.pth"], "there is no file missing.pth"),
        ([*NANO, "--weights", "missing.pth"], "there is no file missing.pth"),
        ([*NANO, "--data-set", "DIGIT"], "--data-set DIGIT: unknown"),
        ([*NANO, "--data-path", "missing"], "--data-path missing: no such folder"),
        (
            [*NANO, "--resume", "checkpoint.pth"],
            "--resume also loads the model of the checkpoint: leave out --model",
        ),
        ([*NANO, "--ema"], "--ema is for --resume"),
        ([*NANO, "--count", "0"], "--count 0: must be above 0"),
        ([*NANO, "--side-ratio", "0.7", "0.2"], "--side-ratio 0.7 0.2"),
        ([*NANO, "--input-size", "1", "2", "3"], "takes one side"),
        ([*NANO, "--patch-size", "0"], "--patch-size 0: must be above 0"),
        (
            [*NANO, "--mixer", "mixup", "--variant", "released"],
            "--variant released (for smmix): --mixer mixup",
        ),
        (
            [*NANO, "--mixer", "attentivemix"],
            "--mixer attentivemix needs --attentive-teacher NAME=CHECKPOINT",
        ),
        (
            [*NANO, "--mixer", "all", "--resize-scope", "0.8", "0.1"],
            "must be two shares, the lower first",
        ),
        ([*NANO, "--patch-size", "32"], "no room for two regions"),
    ],
)
def test_wrong_input_gives_a_message_and_code_2(
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "mixed.png").exists()


def test_only_png_files_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: show_mixing.main([*NANO, "--output", "mixed.jpg"])) == 2
    assert "--output mixed.jpg: pictures are PNG" in capsys.readouterr().err


def test_a_checkpoint_without_its_image_spec_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_checkpoint(tmp_path / "checkpoint.pth", data={})
    assert run(tmp_path, "--resume", str(path)) == 2
    assert "no image_spec under data" in capsys.readouterr().err


def test_unknown_flags_end_with_code_2() -> None:
    with pytest.raises(SystemExit) as stop:
        show_mixing.main(["--epochs", "3"])
    assert stop.value.code == 2


def test_names_are_those_of_the_images_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model may be shown images of classes that it was not trained on; labels are never taken for
    its own."""
    folder = make_image_folder(tmp_path / "data", classes=("wasp", "yak", "zebra"), per_class=1)
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth")
    flags = [
        "--resume",
        str(checkpoint),
        "--data-path",
        str(folder),
        "--count",
        "2",
        "--device",
        "cpu",
    ]
    assert run(tmp_path, *flags) == 0
    told = capsys.readouterr().out
    assert all(
        name in told for name in datasets.open_images("IMNET", str(folder), train=False).class_names
    )


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("", "trained"),
        ("--data-path other", "other"),
        ("--data-set DIGITS", None),
    ],
)
def test_the_images_are_those_of_the_checkpoint_unless_others_are_named(
    words: str, shown: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("trained", "other"):
        make_image_folder(tmp_path / name, per_class=1)
    saved = {"data_set": None, "data_path": "trained", "inat_category": "name", "nb_classes": None}
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pth", args=saved)
    paths = list[str | None]()
    open_images = datasets.open_images

    def spy(name: str, path: str, **more: Any) -> Any:
        paths.append(path if name == "IMNET" else None)
        return open_images(name, path, **more)

    monkeypatch.setattr(datasets, "open_images", spy)
    words = f"--resume {checkpoint} --count 1 --device cpu {words}"
    assert run(tmp_path, *words.split()) == 0
    assert paths == [shown]


def test_a_saved_data_set_of_another_kind_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("data_path", 3), ("nb_classes", "x"), ("inat_category", "colour")):
        checkpoint = write_checkpoint(tmp_path / "checkpoint.pth", args={name: value})
        assert run(tmp_path, "--resume", str(checkpoint)) == 2
        assert f"--{name.replace('_', '-')} {value!r}: no value" in capsys.readouterr().err
