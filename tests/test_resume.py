"""A run that was killed and gone on with is the run that was not, and nothing else is ever taken
for it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

import engine
import utils
from errors import InputError
from run import state as run_state
from storage import checkpoints
from tests.image_folders import make_image_folder
from tests.runs import (
    Killed,
    differences,
    killed_after,
    observing_steps,
    read_log,
    run_main,
    run_small,
    split,
    state_of,
    tensors_in,
    without_clocks,
)

# Everything that draws: augmentation, repeats, drop path, both mixers. An epoch has three steps.
WORDS = (
    "--aa rand-m9-mstd0.5-inc1 --repeated-aug --drop-path 0.2 --epochs 3 --warmup-epochs 1 --lr 0.1"
)
# goes on with a run of one epoch; names of more flags may follow
MORE = "--epochs 2 --accept-changes epochs"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(
        tmp_path_factory.mktemp("photos"), ("ant", "bee", "cat"), per_class=8, size=(20, 20)
    )


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch. Copy it before anything writes there."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_small("--data-path", photos, "--output-dir", folder).code == 0
    return folder


# ------------------------------------------------------------------------------ going on with a run


def test_resumed_is_uninterrupted(photos: Path, tmp_path: Path) -> None:
    """Bit for bit: weights, average, optimizer, log and checkpoint; from what an epoch leaves, and
    whoever loads. Other recipes, and saves within an epoch, are in `test_promises.py`."""
    words = split(WORDS, "--data-path", photos)
    loading = "--num-workers 2"
    whole = run_small(*words, loading, "--output-dir", tmp_path / "whole").training
    with pytest.raises(Killed), killed_after(4):  # in the middle of epoch 1
        run_small(*words, loading, "--output-dir", tmp_path / "parts")
    resumed = run_small(*words, "--output-dir", tmp_path / "parts", "--auto-resume")
    assert "next is epoch 1" in resumed.out
    assert differences(state_of(whole), state_of(resumed.training)) == []
    assert without_clocks(tmp_path / "whole") == without_clocks(tmp_path / "parts")
    assert [line["epoch"] for line in read_log(tmp_path / "parts")] == [0, 1, 2]
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        left, right = (
            torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "parts")
        )
        parts = ("model", "ema", "optimizer", "scaler", "epoch", "step", "best_acc1")
        assert (
            differences(
                *(tensors_in({part: file[part] for part in parts}) for file in (left, right))
            )
            == []
        )


def test_the_warm_up_of_consistency_is_resumed(photos: Path, tmp_path: Path) -> None:
    """Three steps per epoch. That the resumed run has the same bits is in `test_promises.py`."""
    words = split("--epochs 3 --con-weight 0.5 --con-warmup-epochs 2 --save-steps 1 --data-path")
    words += [str(photos), "--output-dir", str(tmp_path), "--auto-resume"]
    weights: list[tuple[int, float]] = []

    def note(training: engine.Training, step: int) -> None:
        weights.append((step, training.criterion.weights["con"]))  # type: ignore[attr-defined]
        if weights[-1][0] == 4 and len(weights) == 5:
            raise Killed

    with observing_steps(note):
        with pytest.raises(Killed):
            run_small(*words)
        run = run_small(*words)
        assert "L_con rising over 2 epochs" in run.out
    assert weights == [(s, 0.5 * min(1, s / 6)) for s in [*range(5), *range(4, 9)]]
    refused = run_small(*words, "--con-warmup-epochs 1")
    assert refused.code == 2
    assert "--accept-changes con-warmup-epochs" in refused.err


def test_a_kill_between_epochs_loses_nothing(photos: Path, tmp_path: Path) -> None:
    """Killed with the epoch's line written and its checkpoint not, or twice in a row: each epoch
    stands there once."""
    words = split(WORDS, "--data-path", photos, "--output-dir", tmp_path)
    with pytest.raises(Killed), killed_after(3):
        run_small(*words)
    with open(tmp_path / "log.txt", "a", encoding="utf-8") as log:
        log.write('{"epoch": 1, "lr": 5}\n{"epoch": 2, "l')
    with pytest.raises(Killed), killed_after(6):
        run_small(*words, "--auto-resume")
    run = run_small(*words, "--auto-resume")
    assert "next is epoch 2" in run.out
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1, 2]
    assert read_log(tmp_path)[1]["lr"] != 5
    assert (tmp_path / "train.log").read_text(encoding="utf-8").count("resumed from") == 2


def test_an_evaluation_after_every_second_epoch_and_the_last(photos: Path, tmp_path: Path) -> None:
    """Also where the run is gone on with in between; what is learned is the same."""
    words = split(WORDS, "--epochs 5 --data-path", photos, "--output-dir")
    whole = run_small(*words, tmp_path / "whole").training
    with pytest.raises(Killed), killed_after(7):
        run_small(*words, tmp_path / "parts", "--eval-every 2")
    run = run_small(*words, tmp_path / "parts", "--eval-every 2 --auto-resume")
    lines, every = read_log(tmp_path / "parts"), read_log(tmp_path / "whole")
    assert ["test_acc1" in line for line in lines] == [False, True, False, True, True]
    assert lines[4]["test_acc1"] == every[4]["test_acc1"]
    assert "epoch 2: not evaluated" in run.out
    assert differences(state_of(whole), state_of(run.training)) == []
    best = torch.load(tmp_path / "parts/checkpoint.pth", weights_only=True)["best_acc1"]
    assert best == max(line.get("test_acc1", 0) for line in lines)


def test_leftovers_of_a_kill_are_cleared(photos: Path, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    leftover = folder / "checkpoint.pth.123.unfinished.tmp"
    leftover.write_bytes(b"half a checkpoint")
    assert run_small(MORE, "--auto-resume --data-path", photos, "--output-dir", folder).code == 0
    assert not leftover.exists()


def test_a_given_checkpoint_goes_on_in_another_folder(
    photos: Path, finished: Path, tmp_path: Path
) -> None:
    before = (finished / "checkpoint.pth").read_bytes()
    words = split(MORE, "--data-path", photos, "--resume", finished / "checkpoint.pth")
    run = run_small(*words, "--output-dir", tmp_path)
    assert f"resumed from {finished / 'checkpoint.pth'}" in run.out
    assert [line["epoch"] for line in read_log(tmp_path)] == [1]
    assert (finished / "checkpoint.pth").read_bytes() == before
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 1


def test_a_command_with_a_given_checkpoint_can_be_repeated(
    photos: Path, finished: Path, tmp_path: Path
) -> None:
    """As a job that comes back does: the checkpoint begins the run, the folder's own goes on with
    it."""
    words = split(
        WORDS,
        "--accept-changes all --auto-resume --data-path",
        photos,
        "--output-dir",
        tmp_path / "run",
    )
    words += split("--resume", finished / "checkpoint.pth")
    with pytest.raises(Killed), killed_after(7):
        run_small(*words)
    again = run_small(*words)
    assert again.code == 0, again.err
    assert f"--resume {finished / 'checkpoint.pth'} is used only if" in again.out
    assert "next is epoch 2" in again.out
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [1, 2]
    (tmp_path / "run/checkpoint.pth").rename(own := tmp_path / "run/kept.pth")
    done = run_small(*words[:-1], own)  # one within the folder is no way back either
    assert "nothing left to do" in done.out


@pytest.mark.parametrize("part", ["optimizer", "model_config", "ema"])
def test_auto_resume_passes_over_a_newest_checkpoint_that_lacks_a_part(
    part: str, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))  # the names are files of their own
    newest = run_state.candidates(folder)[0]
    checkpoint = torch.load(newest, weights_only=True)
    del checkpoint[part]
    torch.save(checkpoint, newest)
    path, (warning,) = run_state.find(str(folder), "", True)
    assert path == str(folder / "checkpoint.pth")
    assert warning.startswith("skipped: ")
    assert str(newest) in warning


def test_weights_that_are_not_finite_are_refused_wherever_they_are_named(
    photos: Path, finished: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(finished / "checkpoint.pth", weights_only=True)
    next(iter(checkpoint["model"].values())).flatten()[0] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pth")
    for flag in ("--resume", "--finetune"):
        run = run_small(
            MORE,
            "--data-path",
            photos,
            flag,
            tmp_path / "nan.pth",
            "--output-dir",
            tmp_path / "run",
        )
        assert run.code == 2
        assert "nan.pth" in run.err
        assert "not finite" in run.err


def test_other_images_of_the_same_number_are_refused(
    photos: Path, finished: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(photos, tmp_path / "moved"))
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    words = split(MORE, "--auto-resume --output-dir", folder, "--data-path", moved)
    first = sorted((moved / "train" / "ant").iterdir())[0]
    first.rename(first.with_name("another" + first.suffix))
    refused = run_small(*words)
    assert refused.code == 2
    assert "its data has fingerprint" in refused.err
    (first.with_name("another" + first.suffix)).rename(first)
    assert run_small(*words).code == 0  # the same images elsewhere


def test_more_epochs_go_on_with_the_optimizer(photos: Path, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    old = torch.load(folder / "checkpoint.pth", weights_only=True)
    run = run_small(
        MORE, "drop-path --drop-path 0.3 --auto-resume --data-path", photos, "--output-dir", folder
    )
    steps = {int(state["step"]) for state in run.training.optimizer.state_dict()["state"].values()}
    assert steps == {6}
    assert old["step"] == 3


def test_auto_resume_starts_where_there_is_nothing_yet(photos: Path, tmp_path: Path) -> None:
    run = run_small("--auto-resume --data-path", photos, "--output-dir", tmp_path / "a" / "b")
    assert run.code == 0, run.err
    assert "resumed" not in run.out
    assert (tmp_path / "a" / "b" / "checkpoint.pth").is_file()


def test_a_finished_run_says_so_and_stays_as_it_is(
    photos: Path, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    kept = {
        name: (folder / name).read_bytes()
        for name in ("checkpoint.pth", "best_checkpoint.pth", "log.txt")
    }
    run = run_small("--auto-resume --data-path", photos, "--output-dir", folder)
    assert run.code == 0, run.err
    assert "nothing left to do: all 1 epochs are done" in run.out
    assert {name: (folder / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize(
    ("flag", "field"), [("--lr 0.25 --unscale-lr", "lr"), ("--weight-decay 0.25", "weight_decay")]
)
def test_a_changed_setting_is_taken_or_refused(
    photos: Path, finished: Path, flag: str, field: str
) -> None:
    """A lower --lr is what a failed run is told to try: the checkpoint's old one must not win in
    silence."""
    words = split(
        "--sched step", MORE, "sched --data-path", photos, "--resume", finished / "checkpoint.pth"
    )
    name = flag.split()[0]
    refused = run_small(*words, flag)
    assert refused.code == 2
    assert "the run was started with other settings" in refused.err
    assert name in refused.err
    assert f"add --accept-changes {name.strip('-')}" in refused.err
    run = run_small(*words, flag, "--accept-changes all")
    assert run.training.optimizer.param_groups[-1][field] == pytest.approx(0.25)


def test_layer_decay_is_logged_by_its_largest_rate_and_never_switched(
    photos: Path, finished: Path, tmp_path: Path
) -> None:
    words = split("--data-path", photos, "--auto-resume --accept-changes all --output-dir")
    assert run_small(*words, tmp_path / "decayed", "--layer-decay 0.5").code == 0
    assert read_log(tmp_path / "decayed")[0]["lr"] == read_log(finished)[0]["lr"]
    plain = Path(shutil.copytree(finished, tmp_path / "plain"))
    for folder, flag, change in (
        ("decayed", "", "--layer-decay 0.5 -> None"),
        (plain, "--layer-decay 0.5", "--layer-decay None -> 0.5"),
    ):
        refused = run_small(*words, tmp_path / folder, "--epochs 2", flag)
        assert refused.code == 2
        assert f"{change}: the state of the optimizer is sorted by layer" in refused.err


@pytest.mark.parametrize(("before", "after"), [("fp16", "bf16"), ("none", "fp16")])
def test_another_precision_has_its_own_loss_scale(
    photos: Path, tmp_path: Path, before: str, after: str
) -> None:
    """fp16 needs a scale, which adapts; elsewhere it is one and stays, or it grows until gradients
    overflow."""
    assert run_small(f"--amp {before} --data-path", photos, "--output-dir", tmp_path).code == 0
    words = split(f"--amp {after}", MORE, "amp --data-path", photos)
    resumed, fresh = run_small(*words, "--auto-resume --output-dir", tmp_path), run_small(*words)
    left, right = (run.training.scaler for run in (resumed, fresh))
    assert (left.get_scale() > 1) == (right.get_scale() > 1) == (after == "fp16")
    assert left.get_growth_interval() == right.get_growth_interval()


# ----------------------------------------------------------------------------------------- refusals


def test_a_folder_with_a_run_is_not_written_over(
    photos: Path, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    run = run_small("--data-path", photos, "--output-dir", folder)
    assert run.code == 2
    assert "already holds a run" in run.err
    assert "--auto-resume" in run.err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == kept


def test_a_folder_with_a_run_is_not_written_over_by_another_one(
    photos: Path, finished: Path, tmp_path: Path
) -> None:
    """--resume names one run, --output-dir holds another."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    kept = (folder / "checkpoint.pth").read_bytes()
    words = split(MORE, "--data-path", photos, "--resume", finished / "checkpoint.pth")
    run = run_small(*words, "--output-dir", folder)
    assert run.code == 2, run.out
    assert "already holds a run" in run.err
    assert (folder / "checkpoint.pth").read_bytes() == kept


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ("--model vit_mini_patch4_32", ["model", "vit_nano_patch4_32", "vit_mini_patch4_32"]),
        ("--input-size 24", ["input_size", "16", "24"]),
        ("--patch-size 8", ["patch_size", "8"]),
        ("--variant released", ["separate_region_head"]),
        ("--eval-crop-ratio 0.5", ["crop_ratio", "0.5"]),
        ("--opt lion", ["--opt adamw -> lion"]),
    ],
)
def test_another_run_is_refused(
    photos: Path, finished: Path, flags: str, fragments: list[str]
) -> None:
    path = finished / "checkpoint.pth"
    run = run_small(MORE, flags, "--data-path", photos, "--resume", path)
    assert run.code == 2, run.out
    for fragment in [f"--resume {path}", *fragments]:
        assert fragment in run.err
    assert "Traceback" not in run.err


@pytest.fixture(scope="module")
def older(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `finished` from before some flags existed."""
    checkpoint = torch.load(finished / "checkpoint.pth", weights_only=True)
    for name in ("score", "fine_weight", "con_weight", "src", "decay_milestones", "log_every"):
        del checkpoint["args"][name]
    torch.save(checkpoint, path := tmp_path_factory.mktemp("older") / "older.pth")
    return path


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("", ""),
        ("--score attention --con-weight 1 --log-every 3", ""),  # the defaults, and a free one
        ("--score random", "--score attention -> random"),
        ("--con-weight 0.5", "--con-weight 1.0 -> 0.5"),  # its default depends on the mixer
        ("--src", "--src False -> True"),
        ("--decay-milestones 7", "--decay-milestones 30 60 -> 7"),
    ],
)
def test_a_flag_that_is_younger_than_the_run_counts_as_its_default(
    flag: str, change: str, photos: Path, older: Path
) -> None:
    run = run_small(MORE, flag, "--max-steps 3 --data-path", photos, "--resume", older)
    assert run.code == (2 if change else 0), run.err
    assert change in run.err


def test_an_evaluation_may_name_the_default_of_a_younger_flag(photos: Path, older: Path) -> None:
    words = ("--eval --device cpu --num-workers 0 --data-path", photos, "--resume", older)
    assert run_main("--score attention", *words).code == 0
    other = run_main("--score random", *words)
    assert other.code == 2
    assert "takes this from the checkpoint, which has attention" in other.err


@pytest.mark.parametrize("classes", [("ant", "bee"), ("ant", "bee", "dog")])
def test_other_classes_are_refused(
    finished: Path, tmp_path: Path, classes: tuple[str, ...]
) -> None:
    others = make_image_folder(tmp_path / "others", classes, per_class=8, size=(20, 20))
    run = run_small(MORE, "--data-path", others, "--resume", finished / "checkpoint.pth")
    assert run.code == 2
    assert f"--resume {finished / 'checkpoint.pth'}" in run.err
    assert "cat" in run.err or "num_classes 3" in run.err
    evaluated = run_main(
        "--eval --resume", finished / "checkpoint.pth", "--data-path", others, "--device cpu"
    )
    assert evaluated.code == 2, evaluated.out
    assert "classes" in evaluated.err


@pytest.mark.parametrize("part", ["optimizer", "ema", "model", "data", "model_config"])
def test_an_incomplete_checkpoint_is_refused(
    photos: Path, finished: Path, tmp_path: Path, part: str
) -> None:
    state = torch.load(finished / "checkpoint.pth", weights_only=True)
    del state[part]
    torch.save(state, tmp_path / "part.pth")
    run = run_small(MORE, "--data-path", photos, "--resume", tmp_path / "part.pth")
    assert run.code == 2
    assert f"holds no {part}" in run.err
    assert "--finetune" in run.err


def test_a_run_without_an_average_can_be_gone_on_with_without_one(
    photos: Path, finished: Path
) -> None:
    run = run_small(
        "--no-model-ema",
        MORE,
        "model-ema --data-path",
        photos,
        "--resume",
        finished / "checkpoint.pth",
    )
    assert run.code == 0, run.err
    assert run.training.ema is None


def test_weights_of_other_shapes_are_refused(photos: Path, finished: Path, tmp_path: Path) -> None:
    state = torch.load(finished / "checkpoint.pth", weights_only=True)
    state["model"]["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "shapes.pth")
    run = run_small(MORE, "--data-path", photos, "--resume", tmp_path / "shapes.pth")
    assert run.code == 2
    assert "blocks.0.mlp.fc1.weight" in run.err
    assert "(3, 3)" in run.err


def test_ranks_that_see_different_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"
    path.touch()
    processes = utils.Processes(0, 1, torch.device("cpu"))
    run_state.check_visible_to_all(str(path), processes)
    run_state.check_visible_to_all("", processes)
    monkeypatch.setattr(
        utils.Processes, "gather", lambda self, value: [value, not value, value, not value]
    )
    with pytest.raises(
        InputError, match=r"a\.pth: ranks \[1, 3\] do not see this checkpoint; .* share"
    ):
        run_state.check_visible_to_all(str(path), processes)


# ------------------------------------------------------------------------------ of earlier versions


def test_a_checkpoint_of_each_format_is_evaluated_and_gone_on_from(tmp_path: Path) -> None:
    """Kept since it was written, see tests/data/README.md: what is changed must still read it."""
    kept = Path(__file__).parent / "data" / f"own_format_{checkpoints.FORMAT}.pth"
    evaluated = run_main("--eval --device cpu --num-workers 0 --resume", kept)
    assert evaluated.code == 0, evaluated.err
    (top1,) = re.findall(r"\(model\): top-1 ([\d.]+) %", evaluated.out)
    assert float(top1) == pytest.approx(
        10, abs=1
    )  # of 360 digits; a processor's rounding may move one or two
    words = (
        "--model deit_runs_distilled_patch4_16 --data-set DIGITS --subset 200 --batch-size 50 "
        "--lr 2e-3"
    )
    more = "--unscale-lr --model-ema-decay 0.5 --epochs 2"
    run = run_small(words, more, "--resume", kept, "--output-dir", tmp_path)
    assert run.code == 0, run.err
    assert "next is epoch 1 after 100 images" in run.out
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 8
