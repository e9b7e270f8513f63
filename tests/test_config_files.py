"""`--config`: flags in YAML files, and the record of a run as such a file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import run_with_submitit
from config.checks import check_args
from config.config_file import OF_ONE_CALL
from config.flags import get_args_parser
from config.parser import GONE, explicit_flags
from config.resolve import resolve
from errors import InputError
from tests.image_folders import make_image_folder
from tests.runs import ROOT, run_main, run_small, split
from utils import Processes

CPU = Processes(0, 1, torch.device("cpu"))


def written(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def parsed(*words: str | Path) -> dict[str, Any]:
    return dict(vars(get_args_parser().parse_args(split(*words))))


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 5e-4", "--lr 5e-4"),
        ("lr: 1", "--lr 1"),
        ("epochs: '7'", "--epochs 7"),
        ("batch_size: 16\nwarmup-lr: 1e-5", "--batch-size 16 --warmup-lr 1e-5"),
        ("lr-noise-pct: -0.5", "--lr-noise-pct=-0.5"),
        ("dr: 0.5", "--dr 0.5"),
        ("amp: off", "--amp none"),
        ("amp: none", "--amp none"),
        ("amp: null", ""),
        ("guide-amp: no", "--guide-amp none"),
        ("mixer: none", "--mixer none"),
        ("mixer: off", "--mixer none"),
        ("mixer: ~", "--mixer none"),
        ("aa: null", "--aa none"),
        ("aa:", "--aa none"),
        ("aa: off", "--aa none"),
        ("clip-grad: null\nfinetune: null", ""),
        ("data-path: no", "--data-path no"),
        ("data-path: 0123", "--data-path 0123"),
        ("side-ratio: [0.2, 0.5]", "--side-ratio 0.2 0.5"),
        ("side-ratio:\n  - 0.2\n  - 0.5", "--side-ratio 0.2 0.5"),
        ("lr-noise: [-0.5, 0.2]", "--lr-noise -0.5 0.2"),
        ("input-size: 32", "--input-size 32"),
        ("input-size: [32]", "--input-size 32"),
        ("accept-changes: [epochs, lr]", "--accept-changes epochs lr"),
        ("repeated-aug: false", "--no-repeated-aug"),
        ("model_ema: on", "--model-ema"),
        ("compile: true", "--compile"),
        ("compile: off", ""),
        ('{"model": "a b", "bce_loss": true}', "--bce-loss --model=a\\ b"),
    ],
)
def test_a_value_means_what_it_means_on_the_command_line(
    text: str, words: str, tmp_path: Path
) -> None:
    typed = [word.replace("\\", " ") for word in words.replace("\\ ", "\\").split()]
    wanted = {**parsed(), **vars(get_args_parser().parse_args(typed))}
    file = written(tmp_path, text)
    assert parsed("--config", file) == {**wanted, "config": [str(file)]}


def test_later_files_win_and_the_command_line_wins_over_all(tmp_path: Path) -> None:
    one = written(tmp_path, "lr: 1\nepochs: 1\ncompile: true\nmodel-ema: false\nclip-grad: 3")
    two = written(tmp_path, "epochs: 2\ncompile: false\nclip-grad: null\nseed: 2", "two.yaml")
    found = parsed("--seed 3 --config", one, "--model-ema --config", two)
    wanted = {"lr": 1.0, "epochs": 2, "compile": False, "clip_grad": None, "seed": 3}
    assert {name: found[name] for name in wanted} == wanted
    assert found["model_ema"] is True
    assert found["config"] == [str(one), str(two)]
    assert parsed("--compile --config", two)["compile"] is True


def test_explicit_flags_are_those_of_the_files_too(tmp_path: Path) -> None:
    file = written(tmp_path, "lr: 1\ncompile: false\nclip-grad: null\nmodel-ema: false")
    found = explicit_flags(get_args_parser(), split("--seed 3 --config", file))
    assert found == {
        "lr": 1.0,
        "compile": False,
        "model_ema": False,
        "seed": 3,
        "config": [str(file)],
    }


def test_a_word_after_a_list_stays_a_stray_word(tmp_path: Path) -> None:
    file = written(tmp_path, "accept-changes: [epochs, lr]")
    with pytest.raises(SystemExit):
        parsed("stray --config", file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nlearning-rate: 1", "line 2: learning-rate: no such flag"),
        ("epoch: 1", "line 1: epoch: no such flag; did you mean epochs?"),
        ("mixup_of_epoch: 1", "did you mean mixup-off-epoch?|did you mean mix-off-epoch?"),
        ("--lr: 1", "write the key without hyphens in front: lr"),
        ("no-model-ema: true", "write model-ema: false"),
        ("lr: fast", "line 1: lr: invalid float value: 'fast'"),
        ("epochs: 1.5", "epochs: invalid int value: '1.5'"),
        ("lr: off", "lr: invalid float value: 'off'"),
        ("mixer: smix", "mixer: invalid choice: 'smix'"),
        ("compile: maybe", "compile: 'maybe': takes true or false"),
        ("compile: null", "compile: 'null': takes true or false"),
        ("lr: null", "lr: null: this flag has no such value"),
        ("lr: [1, 2]", "lr: takes one value, not a list"),
        ("compile: [true]", "compile: takes one value, not a list"),
        ("side-ratio: 0.2", r"side-ratio: expected 2 arguments; write a list of 2: [..., ...]"),
        ("side-ratio: [0.1, 0.2, 0.3]", "side-ratio: unrecognized arguments: 0.3"),
        ("input-size: []", "input-size: expected at least one argument"),
        ("accept-changes: [lr, --seed=3]", "accept-changes: unrecognized arguments: --seed=3"),
        ("lr: 1\nseed: 1\nlr: 2", "line 3: lr: is in the file twice"),
        ("batch_size: 1\nbatch-size: 1", "line 2: batch-size: is in the file twice"),
        ("optimizer:\n  lr: 1", "line 1: optimizer: no such flag"),
        ("lr:\n  value: 1", "line 1: lr: takes single values"),
        ("input-size: [[1]]", "input-size: takes single values"),
        ("config: b.yaml", "line 1: config: a file cannot name another one"),
        ("dist-eval: true", f"line 1: dist-eval: {GONE['--dist-eval']}"),
        ("ThreeAugment: true", GONE["--threeaugment"]),
        ("? [a]\n: 1", "no such flag"),
        ("<<: {lr: 1}", "<<: no such flag"),
        ("", "holds no flags"),
        ("- lr", "holds no flags"),
        ("lr 1", "holds no flags"),
        ("lr: 1\n---\nlr: 2", "is not YAML"),
        ("lr: [1", "is not YAML"),
        ("lr: &a [*a]", "takes"),
        ("lr: !!python/object/apply:os.abort []", "lr: takes one value, not a list"),
        ("input-size: !!python/object/apply:os.abort []", "expected at least one argument"),
    ],
)
def test_what_is_wrong_in_a_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    with pytest.raises(InputError) as refused:
        parsed("--config", file)
    assert f"--config {file}" in refused.value.text
    assert any(part in refused.value.text for part in message.split("|"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "nosuch.yaml", "cannot be read"), (tmp_path, "cannot be")):
        with pytest.raises(InputError, match=f"--config {path}: {message}"):
            parsed("--config", path)
    (tmp_path / "bytes.yaml").write_bytes(b"lr: \xff")
    with pytest.raises(InputError, match="is not YAML"):
        parsed("--config", tmp_path / "bytes.yaml")
    deep = written(tmp_path, "[" * 9999)
    with pytest.raises(InputError, match="is not YAML"):
        parsed("--config", deep)


def test_without_pyyaml_the_fix_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(InputError, match="pip install pyyaml"):
        parsed("--config", written(tmp_path, "lr: 1"))
    assert parsed("--lr 1")["lr"] == 1


def test_the_example_of_the_page_is_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "using.md").read_text(), re.S)
    args = parsed("--config", written(tmp_path, text))
    assert (args["lr"], args["side_ratio"], args["aa"]) == (5e-4, [0.2, 0.5], "none")


def test_a_submission_reads_the_files(tmp_path: Path) -> None:
    file = written(tmp_path, "device: cpu\nnum-workers: 3")
    launch, arguments = run_with_submitit.read_args(split("--job-dir x --lr 1 --config", file))
    assert (launch.gpus, arguments) == (False, split("--lr 1 --config", file))
    folder = written(tmp_path, "output-dir: y", "b.yaml")
    with pytest.raises(InputError, match="--output-dir: the job's folder"):
        run_with_submitit.read_args(split("--job-dir x --config", folder))
    recorded = record(tmp_path, "--mixer cutmix")
    assert run_with_submitit.read_args(split("--job-dir x --config", recorded))[0].gpus


# ------------------------------------------------------------------------------------------- record

TINY = "--model vit_nano_patch4_32 --input-size 16 --output-dir x"


def record(folder: Path, words: str, **changes: Any) -> Path:
    """The args.json of a run with these words."""
    flags = resolve(get_args_parser().parse_args(split(TINY, words)), 1, "cpu")
    return written(folder, json.dumps({**vars(flags), **changes}, indent=2), "args.json")


RECIPES = [
    "",
    "--mixer none --no-repeated-aug --aa none --compile",
    "--mixer mixup",
    "--mixer cutmix --cutmix-minmax 0.2 0.8 --mixup 0",
    "--mixer cutmix --con-weight 0.5 --consistency logits",
    "--mixer transmix --relabel-ratio 0.2",
    "--mixer fmix --mix-alpha 0.5 --mix-protocol single",
    "--mixer attentivemix --attentive-teacher resnet18=x.pth --mix-alpha 2 8",
    "--mixer resizemix --resize-scope 0.2 0.4",
    "--variant released --con-weight 0",
    "--variant released --region-head shared --score rollout --bce-loss --smoothing 0",
    "--batch-size 16 --accum-steps 3 --opt-betas 0.9 0.95 --clip-grad 1 --data-path é/😀",
    "--finetune weights.pth --max-steps 3 --subset 20 --num-workers 2 --start-epoch 2",
]


@pytest.mark.parametrize("words", RECIPES)
def test_a_record_gives_the_same_run_again(words: str, tmp_path: Path) -> None:
    file = record(tmp_path, words, config=["old.yaml"], accept_changes=["lr"])
    args = get_args_parser().parse_args(split("--config", file, "--output-dir y --num-workers 1"))
    check_args(args)
    wanted, found = (
        json.loads(file.read_text()),
        json.loads(json.dumps(vars(resolve(args, 1, "cpu")))),
    )
    differing = {name for name in wanted if wanted[name] != found[name]}
    assert differing <= set(OF_ONE_CALL)
    assert (found["output_dir"], found["start_epoch"], found["accept_changes"]) == ("y", 0, None)


def test_a_record_keeps_the_total_batch(tmp_path: Path) -> None:
    file = record(tmp_path, "--batch-size 16 --accum-steps 3")
    line = split("--output-dir y --config", file)
    for words, processes, shares in (
        ("", 1, (16, 3, 48)),
        ("", 2, (12, 2, 48)),
        ("--batch-size 8", 1, (8, 6, 48)),
        ("--total-batch 32", 1, (16, 2, 32)),
    ):
        args = get_args_parser().parse_args([*line, *words.split()])
        flags = resolve(args, processes, "cpu")
        assert (flags.batch_size, flags.accum_steps, flags.total_batch) == shares
    with pytest.raises(InputError, match="--accum-steps 3: contradicts --total-batch 48"):
        parsed(*map(str, line), "--accum-steps 3")
    older = {name: value for name, value in json.loads(file.read_text()).items() if value != 48}
    args = parsed("--output-dir y --config", written(tmp_path, json.dumps(older), "old.json"))
    assert (args["batch_size"], args["accum_steps"], args["total_batch"]) == (16, 3, None)
    args = parsed("--total-batch 32 --output-dir y --config", tmp_path / "old.json")
    assert args["total_batch"] == 32


@pytest.mark.parametrize(
    ("words", "more", "wanted"),
    [
        ("", "--mixer cutmix", {"con_weight": 0.0, "region_head": None}),
        ("--mixer cutmix", "--mixer smmix", {"con_weight": 1.0, "consistency": "probs"}),
        ("", "--variant released", {"consistency": "logits", "region_head": "separate"}),
        ("--variant released", "--variant paper", {"consistency": "probs"}),
        ("--con-weight 0.5", "--seed 1", {"con_weight": 0.5, "seed": 1}),
        ("--score rollout", "--mixer none", {"score": "attention"}),
        ("--amp none", "--lr 1", {"lr": 1.0, "amp": "none"}),
    ],
)
def test_flags_that_follow_from_others_follow_them_again(
    words: str, more: str, wanted: dict[str, Any], tmp_path: Path
) -> None:
    line = split("--config", record(tmp_path, words), more, "--output-dir y")
    args = get_args_parser().parse_args(line)
    check_args(args)
    flags = vars(resolve(args, 1, "cpu"))
    assert {name: flags[name] for name in wanted} == wanted


def test_what_is_not_taken_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = record(tmp_path, "--score rollout")
    parsed("--config", file, "--output-dir y")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"--config {file}: the record of a run; not taken from it:")
    assert {f"--{name.replace('_', '-')}" for name in OF_ONE_CALL} == set(
        re.findall(r"--\S+?(?=,|$)", line.split("it:")[1])
    )
    parsed("--config", file, "--output-dir y --mixer cutmix")
    assert "--score" in capsys.readouterr().out


def test_a_record_needs_an_output_folder_of_its_own(tmp_path: Path) -> None:
    file = record(tmp_path, "")
    other = written(tmp_path, "output-dir: y")
    for words in (split("--config", file), split("--config", file, "--config", other)):
        with pytest.raises(InputError, match="add --output-dir to the command line"):
            parsed(*map(str, words))
    parsed("--list-models --config", file)


def test_a_run_is_repeated_and_evaluated_by_its_record(tmp_path: Path) -> None:
    photos = make_image_folder(tmp_path / "photos", per_class=8)
    recipe = written(tmp_path, "mixer: cutmix\nlr: 1e-3")
    first = run_small("--config", recipe, "--data-path", photos, "--output-dir", tmp_path / "one")
    assert first.code == 0, first.err
    assert f"flags from {recipe}, then the command line" in first.out
    file = tmp_path / "one" / "args.json"
    assert json.loads(file.read_text())["config"] == [str(recipe)]
    words = split("--num-workers 0 --device cpu --config", file)
    again = run_main(*words, "--seed 1 --output-dir", tmp_path / "two")
    assert again.code == 0, again.err
    repeated = json.loads((tmp_path / "two" / "args.json").read_text())
    assert (repeated["lr"], repeated["mixer"], repeated["seed"]) == (1e-3, "cutmix", 1)
    resume = split("--eval --resume", tmp_path / "one" / "checkpoint.pth")
    evaluated = run_main(*words, *resume)
    assert evaluated.code == 0, evaluated.err
    assert "top-1" in evaluated.out
