"""`tools.check_data` finds every damaged file of both halves, and refuses what `main.py` would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from errors import InputError, run_command
from tests.image_folders import (
    DAMAGE,
    damage,
    make_cifar,
    make_image_folder,
    make_inat,
    make_tar_pair,
    make_webdataset,
    message_of,
)
from tests.runs import split
from tests.test_commands import flags_of, names_read
from tools import check_data


def check(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = run_command(lambda: check_data.main(split("--num-workers 0", *words)))
    return code, *capsys.readouterr()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_damaged_file_is_named_with_its_reason(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_image_folder(tmp_path / "images", ("ant", "bee"), per_class=5, size=(120, 90))
    ways = list(DAMAGE)
    names = [f"train/{name}/{number}.jpg" for name in ("ant", "bee") for number in range(5)][
        : len(ways) - 1
    ]
    bad = [
        damage(root / name, how) for name, how in zip([*names, "val/bee/4.jpg"], ways, strict=True)
    ]
    listed = tmp_path / "bad.txt"
    code, out, err = check(capsys, f"--num-workers {workers} --data-path", root, "--output", listed)
    assert code == 1
    for path, how in zip(bad, ways, strict=True):
        (line,) = [line for line in out.splitlines() if line.startswith(f"bad: {path}: ")]
        assert DAMAGE[how][1] in line
    assert out.count("bad: ") == len(bad)
    assert (
        f"training: 10 images of 2 classes, sides from 90 to 120 pixels, {len(bad) - 1} bad\n"
        in out
    )
    assert "validation: 10 images of 2 classes, sides from 90 to 120 pixels, 1 bad\n" in out
    assert listed.read_text().splitlines() == [str(path) for path in bad]
    assert err.startswith(f"error: {len(bad)} images cannot be read")
    assert "With --skip-corrupt training tolerates up to 10 of them" in err
    assert "Traceback" not in err


def test_a_whole_set_passes_and_empties_an_old_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, listed = make_image_folder(tmp_path / "images"), tmp_path / "bad.txt"
    listed.write_text("of yesterday\n")
    code, out, err = check(capsys, "--data-path", root, "--output", listed)
    assert (code, err, listed.read_text()) == (0, "", "")
    assert out.splitlines()[-1] == "all images can be read"
    assert "bad:" not in out


def test_every_kind_of_numbered_set_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cifar(tmp_path, "CIFAR10", monkeypatch)
    make_inat(tmp_path)
    make_tar_pair(tmp_path / "tars")
    damage(next((tmp_path / "train_val2018").rglob("*.jpg")))
    for words, wanted, classes in (
        ("--data-set DIGITS", 0, 10),
        ("--data-set CIFAR10", 0, 10),
        ("--data-set INAT", 1, 3),
    ):
        code, out, _ = check(capsys, words, "--data-path", tmp_path)
        assert code == wanted
        assert f" of {classes} classes" in out
    assert check(capsys, "--data-set timm/ --data-path", tmp_path / "tars")[0] == 0


def test_what_main_refuses_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_image_folder(tmp_path / "images")
    (root / "val" / "bee").rename(root / "val" / "cow")
    for words, said in (
        (["--data-path", root], "only in training: bee"),
        (["--data-path", tmp_path / "nowhere"], "no such folder"),
        (["--data-set IMNET"], "--data-path FOLDER"),
    ):
        code, out, err = check(capsys, *words)
        assert (code, out) == (2, "")
        assert said in err


def test_a_label_outside_the_classes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cifar(tmp_path, "CIFAR10", monkeypatch)

    def wrong(dataset: Any, index: int) -> tuple[Any, int]:
        return dataset[index][0], 10

    monkeypatch.setattr("datasets.read_dataset", wrong)
    code, _, err = check(capsys, "--data-set CIFAR10 --data-path", tmp_path)
    assert code == 2
    assert "image 0 of CIFAR10 has label 10, outside the 10 classes" in err


def test_streams_and_wrong_values_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_webdataset(tmp_path)
    code, _, err = check(capsys, "--data-set timm/wds/shards --nb-classes 3 --data-path", tmp_path)
    assert code == 2
    assert "streams cannot be checked" in err
    for words, said in (
        ("--num-workers -1", "--num-workers -1"),
        ("--data-timeout -1", "--data-timeout -1"),
        ("--nb-classes 0", "--nb-classes 0"),
        ("--output nowhere/bad.txt", "no folder nowhere"),
    ):
        assert said in message_of(InputError, check_data.read_args, words.split())


def test_defaults_are_those_of_main() -> None:
    args = check_data.read_args([])
    assert (args.data_set, args.data_timeout, args.num_workers >= 1) == ("DIGITS", 600, True)
    assert check_data.read_args(["--data-path", "x"]).data_set == "IMNET"


def test_every_flag_is_read() -> None:
    assert flags_of(check_data.get_args_parser()) == names_read(
        Path(check_data.__file__).read_text(), "args"
    )


def test_progress_is_told_of_a_long_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_data, "SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.setattr(check_data, "BATCH_SIZE", 4)
    _, out, _ = check(capsys, "--data-path", make_image_folder(tmp_path / "images"))
    assert "training: 8 of 10 images, 0 bad\n" in out
