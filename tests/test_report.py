"""The report of runs: figures as worked out by hand, nothing mixed up, nothing trusted."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from errors import InputError, run_command
from tests import recorded_runs
from tests.recorded_runs import (
    CIFAR10,
    IMAGENET,
    curve,
    example,
    log_line,
    row,
    rows,
    write_run,
)
from tests.runs import ROOT, run_small
from tools.report import __main__ as report_command
from tools.report import charts, details
from tools.report.page import Chart, Series
from tools.report.results import format_difference, format_spread
from tools.runs import folders, matching
from tools.runs.records import Row, Run, SortedRuns, spread_of


class Reader(HTMLParser):
    """A page's elements, attributes, and the cells of its tables by their caption."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set[str](), list[tuple[str, str, str | None]](), ""
        self.tables: dict[str, list[list[str]]] = {}
        self.caption, self.inside = "", list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.inside.append(tag)
        if tag == "caption":
            self.caption = ""
        if tag == "tr":
            self.tables.setdefault(self.caption, []).append([])
        if tag in ("td", "th"):
            self.tables[self.caption][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data
        if "caption" in self.inside:
            self.caption += data
        elif {"td", "th"} & set(self.inside):
            self.tables[self.caption][-1][-1] += data

    def rows(self, caption: str) -> dict[str, dict[str, str]]:
        """Rows by their first cell, cells by their heading."""
        header, *body = self.tables[caption]
        return {line[0]: dict(zip(header, line, strict=True)) for line in body}


FULL_TABLE, SMALL_TABLE = (
    "Table 7, the components of SMMix",
    "Table 7, the components of SMMix: rehearsal on CIFAR-10",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def html(root: Path) -> str:
    return report_command.make_report(str(root), rows())[0]


def sorted_runs(root: Path) -> SortedRuns:
    return matching.sort_runs(folders.find_runs(root)[0], rows())


def one_run(folder: Path, wanted: Row, *lines: str, **keywords: Any) -> Run:
    """A finished run of a row but for what the keywords say."""
    accuracies = keywords.pop(
        "accuracies", curve(80, matching.flags_of(wanted.arguments, "cpu")["epochs"])
    )
    return folders.read_run(
        write_run(folder, wanted, accuracies, told=lines, **keywords), folder.name
    )


def what_differs(run: Run, wanted: Row) -> list[str]:
    return [one.name for one in matching.differences(run, wanted)]


# ------------------------------------------------------------------------------------------ figures


def test_means_spreads_and_differences_are_those_worked_out_by_hand(html: str) -> None:
    found = Reader(html).rows(FULL_TABLE)
    # 80.9, 81.0, 81.3: mean 81.0667, squared distances 0.02778 + 0.00444 + 0.05444 over 2, its root
    # 0.2082
    seen = {
        name: found["all (SMMix)"][name]
        for name in ("model", "paper", "ours", "difference", "seeds", "EMA")
    }
    assert list(seen.values()) == [
        "deit_tiny",
        "81.1",
        "81.07 ± 0.21",
        "−0.03",
        "3",
        "81.27 ± 0.21",
    ]
    assert found["all (SMMix)"]["runs"] == "seed 0, seed 1, seed 2"
    assert found["all (SMMix)"]["recipe"] == "deit_tiny_all"
    assert [found["none (CutMix)"][name] for name in ("paper", "ours", "difference")] == [
        "79.8",
        "not run",
        "–",
    ]
    assert [found["mixing"][name] for name in ("ours", "runs")] == [
        "not finished",
        "seed 0, unfinished: epoch 3 of 4",
    ]
    assert [found["to come"][name] for name in ("paper", "ours")] == ["80.5", "not available yet"]
    assert [found["ours"][name] for name in ("paper", "ours")] == ["–", "not run"]


def test_the_markdown_has_the_same_tables(root: Path, html: str) -> None:
    markdown = report_command.make_report(str(root), rows())[1].replace("\\", "")
    for caption, lines in Reader(html).tables.items():
        if "Flags" in caption:
            continue
        assert f"### {caption}" in markdown
        for line in lines:
            plain = re.sub(r"\[([^\]]*)\]\(#run-\d+\)", r"\1", markdown)
            assert f"| {' | '.join(line)} |" in plain


def test_a_spread_is_over_seeds_and_one_seed_has_none() -> None:
    assert spread_of([]) is None
    assert format_spread(spread_of([(3, 80.0)])) == "80.00"
    assert format_spread(spread_of([(0, 80.0), (1, 82.0)])) == "81.00 ± 1.41"
    assert spread_of([(0, 79.0), (0, 81.0), (1, 82.0)]) == spread_of([(0, 80.0), (1, 82.0)])
    assert [format_difference(value) for value in (0.3, -0.26, 0.004, -0.004)] == [
        "+0.30",
        "−0.26",
        "0.00",
        "0.00",
    ]


def test_a_seed_run_twice_counts_once(tmp_path: Path) -> None:
    for name, seed, last in (("a", 0, 79.0), ("b", 0, 81.0), ("c", 1, 82.0)):
        write_run(tmp_path / name, row("all"), curve(last, 4), seed=seed)
    page = report_command.make_report(str(tmp_path), rows())[0]
    found = Reader(page).rows(FULL_TABLE)["all (SMMix)"]
    assert (found["ours"], found["seeds"]) == ("81.00 ± 1.41", "2")
    assert "deit_tiny_all: seed 0 was run 2 times; their mean counts as one seed." in page


def test_the_last_epoch_counts_and_not_the_best(tmp_path: Path) -> None:
    write_run(tmp_path / "run", row("all"), [50.0, 90.0, 85.0, 80.0])
    page = report_command.make_report(str(tmp_path), rows())[0]
    assert Reader(page).rows(FULL_TABLE)["all (SMMix)"]["ours"] == "80.00"
    assert "90.00 % in epoch 2; in no table, because it is chosen on the validation set" in page


# --------------------------------------------------------------------------------- nothing mixed up

PLANTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "variant": ({"variant": "released"}, ["variant"]),
    "a part of the variant": ({"region_head": "separate"}, ["region_head"]),
    "mixer": ({"mixer": "cutmix"}, ["mixer"]),
    "weight": ({"con_weight": 0.5}, ["con_weight"]),
    "model": ({"model": "deit_small_patch16_224"}, ["model"]),
    "input": ({"input_size": [192, 192]}, ["input_size"]),
    "precision": ({"amp": "bf16"}, ["amp"]),
    "epochs": ({"epochs": 3, "accuracies": curve(80, 3)}, ["epochs"]),
    "steps": ({"max_steps": 2}, ["max_steps"]),
    "rate": ({"lr": 1e-3}, ["lr"]),
    "weights": ({"finetune": "deit.pth"}, ["finetune"]),
    "a part of the data": ({"subset": 2000}, ["subset"]),
    "another data set": ({"data": ("IMNET", 100, 126_689, 5_000)}, ["data"]),
    "fewer images": ({"data": ("IMNET", 1000, 1_000_000, 50_000)}, ["data"]),
    "another kind of data set": ({"data": ("INAT", *IMAGENET[1:])}, ["data"]),
    "more processes": ({"processes": 2}, ["total batch"]),
    "a smaller batch": ({"batch_size": 128}, ["total batch"]),
    "a flag of another version": ({"cool_flag": 3}, ["cool_flag"]),
    "two at once": ({"mixup": 0.5, "smoothing": 0.0}, ["mixup", "smoothing"]),
    "changed on the way": ({"accept_changes": ["lr"]}, ["accept_changes"]),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_run_of_anything_else_is_no_run_of_the_row(name: str, tmp_path: Path) -> None:
    changes, expected = PLANTED[name]
    assert what_differs(one_run(tmp_path / "run", row("all"), **changes), row("all")) == expected
    found = sorted_runs(tmp_path)
    assert not [
        result for result in found.full + found.small if result.finished or result.unfinished
    ]
    assert not found.cut
    (other,) = found.others
    assert other.nearest is not None
    assert (other.nearest.name, other.nearest.small) == ("all", False)
    assert len(other.differences) == len(expected)
    page = Reader(report_command.make_report(str(tmp_path), rows())[0])
    assert (
        page.rows(f"{FULL_TABLE}: none of its 5 rows was run")["all (SMMix)"]["ours"] == "not run"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 7},
        {"batch_size": 128, "processes": 2},
        {"batch_size": 64, "accum_steps": 16},
        {
            "num_workers": 31,
            "data_path": "elsewhere",
            "device": "cuda",
            "compile": True,
            "log_every": 3,
        },
        {"data": ("timm/imagenet", *IMAGENET[1:])},
        {"auto_resume": False, "save_minutes": 5.0, "keep_checkpoints": 9, "decoder": "pillow"},
    ],
)
def test_what_does_not_make_the_recipe_is_free(changes: dict[str, Any], tmp_path: Path) -> None:
    assert what_differs(one_run(tmp_path / "run", row("all"), **changes), row("all")) == []


def test_what_only_the_log_tells_counts_too(tmp_path: Path) -> None:
    begun = one_run(tmp_path / "begun", row("all"), "weights from deit.pth")
    assert what_differs(begun, row("all")) == ["finetune"]
    other = ["data  IMNET elsewhere", "total batch  8 per process x 1 = 64"]
    again = ["epoch 0 [10/100] loss 2.7", *other, "resumed from checkpoint.pth; next is epoch 1"]
    changed = one_run(tmp_path / "changed", row("all"), *again)
    assert {"total batch", "images"} <= set(what_differs(changed, row("all")))
    anew = one_run(tmp_path / "anew", row("all"), *again[:-1])
    assert {"total batch", "data"} == set(
        what_differs(anew, row("all"))
    )  # of the start that counts
    refused = one_run(tmp_path / "refused", row("all"))
    with (refused.picture.parent / "train.log").open("a") as log:  # type: ignore[union-attr]
        log.writelines(
            f"2026-01-02 10:00:00 {line}\n" for line in (*other, "error: other settings")
        )
    told = folders.read_run(tmp_path / "refused", "refused")
    assert what_differs(told, row("all")) == []
    assert "error: other settings" in told.warnings
    (tmp_path / "refused/train.log").unlink()
    silent = folders.read_run(tmp_path / "refused", "refused")
    assert what_differs(silent, row("all")) == ["data", "total batch"]


@pytest.mark.parametrize(
    ("accuracies", "state"),
    [
        (curve(80, 4)[:3], "preempted"),
        ([70.0, 71.0, 72.0, None], "done"),
        (curve(80, 4)[:1], "running"),
    ],
)
def test_what_is_not_finished_is_in_no_mean(
    accuracies: list[float | None], state: str, tmp_path: Path
) -> None:
    write_run(tmp_path / "good", row("all"), curve(81, 4))
    write_run(tmp_path / "open", row("all"), accuracies, state=state, seed=1)
    found = Reader(report_command.make_report(str(tmp_path), rows())[0]).rows(FULL_TABLE)[
        "all (SMMix)"
    ]
    assert (found["ours"], found["seeds"]) == ("81.00", "1")
    assert re.fullmatch(
        r"seed 0, seed 1, (unfinished: epoch \d of 4|finished, but .* missing)", found["runs"]
    )


def test_a_log_without_its_beginning_is_no_whole_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run", row("all"), curve(81, 4))
    (tmp_path / "run/log.txt").write_text(
        "".join(json.dumps(log_line(epoch, 80.0)) + "\n" for epoch in (2, 3))
    )
    run = folders.read_run(tmp_path / "run", "run")
    assert not run.is_finished
    assert what_differs(run, row("all")) == ["log"]


def test_a_rehearsal_is_never_shown_as_a_reproduction(html: str) -> None:
    page = Reader(html)
    found = page.rows(SMALL_TABLE)
    assert list(found["all (SMMix)"]) == [
        "row",
        "ours, CIFAR-10",
        "seeds",
        "paper, ImageNet-1k (reference only)",
        "runs",
        "recipe",
    ]
    head, _, rest = html.partition('<section id="rehearsals"')
    assert SMALL_TABLE not in head
    assert "vit_mini" not in head
    whole, _, short = rest.partition('<section id="cut-1"')
    assert '<h2 id="rehearsals-h">Rehearsals on CIFAR-10, not a reproduction</h2>' in whole
    assert "with little data: all images, 6 epochs, vit_mini_patch4_32" in whole
    assert "another data set, ImageNet-1k, and with another model" in whole
    # 51, 53, 52: mean 52, deviation 1; 52.5, 54.5, 53: mean 53.3333, squares 0.694 + 1.361 + 0.111
    # over 2, root 1.041
    assert "52.00 ± 1.00" in whole
    assert "53.33 ± 1.04" in whole
    assert "79.8 (deit_tiny)" in whole
    # 30, 31: mean 30.5, deviation 0.707
    short = short.partition("</section>")[0]
    assert "30.50 ± 0.71" not in whole
    assert "30.50 ± 0.71" in short
    assert "Rehearsals cut short: 2 of 6 epochs" in short
    assert "a network this small gained from mixing only with little data" in whole
    assert "gained from mixing" not in short  # that was seen at the full length alone
    assert (
        "with little data: all images, vit_mini_patch4_32. These rehearsals are shorter than their "
        "rows require" in short
    )
    assert "SMMix starts slower than other mixing" in short
    assert "a ranking at this length tells nothing about the full length" in short
    assert "another data set, ImageNet-1k, and with another model" in short


def test_rehearsals_of_each_length_stand_apart(tmp_path: Path) -> None:
    wanted = row("all", small=True)
    for name, epochs in (("whole", 6), ("two", 2), ("three", 3)):
        write_run(tmp_path / name, wanted, curve(50 + epochs, epochs), epochs=epochs)
    write_run(tmp_path / "steps", wanted, [12.0], max_steps=2)
    status = {"state": "done", "epoch": 0, "step": 2}
    (tmp_path / "steps/status.json").write_text(json.dumps(status))
    write_run(tmp_path / "open", wanted, curve(50, 3)[:2], epochs=3, seed=1, state="running")
    found = sorted_runs(tmp_path)
    assert list(found.cut) == ["at most 2 steps", "2 of 6 epochs", "3 of 6 epochs"]
    assert not found.others
    assert [[run.name for run in result.finished] for result in found.small] == [[], ["whole"]]
    names = {cut: [run.name for run in results[1].finished] for cut, results in found.cut.items()}
    assert names == {
        "2 of 6 epochs": ["two"],
        "at most 2 steps": ["steps"],
        "3 of 6 epochs": ["three"],
    }
    assert [run.name for run in found.cut["3 of 6 epochs"][1].unfinished] == ["open"]


def test_a_shorter_warm_up_goes_with_a_shorter_rehearsal_only(tmp_path: Path) -> None:
    wanted = row("all", small=True)
    write_run(tmp_path / "two", wanted, curve(52, 2), epochs=2)
    write_run(tmp_path / "cold", wanted, curve(53, 2), epochs=2, warmup_epochs=0)
    write_run(tmp_path / "long", wanted, curve(56, 6), warmup_epochs=0)
    found = sorted_runs(tmp_path)
    names = {cut: [run.name for run in results[1].finished] for cut, results in found.cut.items()}
    assert names == {"2 of 6 epochs": ["two"], "2 of 6 epochs, 0 of them to warm up": ["cold"]}
    assert [other.run.name for other in found.others] == ["long"]


def test_a_network_that_rows_look_through_is_no_run_of_a_row(tmp_path: Path) -> None:
    write_run(tmp_path / "small/table7/none", row("none", small=True), curve(50, 6))
    write_run(tmp_path / "small/pretrained/cutmix_vit_mini", row("none", small=True), curve(60, 6))
    write_run(tmp_path / "pretrained", row("all", small=True), curve(70, 6))  # only what lies below
    found = sorted_runs(tmp_path)
    assert [[run.name for run in result.finished] for result in found.small] == [
        ["small/table7/none"],
        ["pretrained"],
    ]
    page = Reader(report_command.make_report(str(tmp_path), rows())[0])
    assert page.rows(SMALL_TABLE)["none (CutMix)"]["ours, CIFAR-10"] == "50.00"
    assert "was run 2 times" not in page.text
    other = page.rows("Runs that fit no row")["small/pretrained/cutmix_vit_mini"]
    assert other["nearest row"] == "–"
    assert (
        other["what differs from it"]
        == "no row: a frozen network of other rows, in a folder named pretrained"
    )


def test_our_study_has_a_section_of_its_own_if_it_was_run(tmp_path: Path) -> None:
    ours = replace(
        row("all", small=True), table="study", small=False, is_study=True, title="Our rows"
    )
    write_run(tmp_path / "one", row("all"), curve(81, 4))
    without = report_command.make_report(str(tmp_path), [*rows(), ours])[0]
    assert "Our study" not in without
    write_run(tmp_path / "two", ours, curve(52, 6), data=CIFAR10)
    html = report_command.make_report(str(tmp_path), [row("all"), ours])[0]
    assert '<h2 id="study-h">Our study</h2>' in html
    found = Reader(html).rows("Our rows")["all (SMMix)"]
    assert found["ours"] == "52.00"
    assert "paper" not in found
    assert Reader(html).rows(FULL_TABLE)["all (SMMix)"]["seeds"] == "1"


@pytest.mark.parametrize("data", [("IMNET", *CIFAR10[1:]), CIFAR10])
def test_a_rehearsal_takes_cifar_10_from_either_place(
    data: tuple[str, int, int, int], tmp_path: Path
) -> None:
    assert (
        what_differs(one_run(tmp_path / "run", row("all", True), data=data), row("all", True)) == []
    )


@pytest.mark.parametrize(
    "data", [("DIGITS", 10, 1437, 360), ("CIFAR", 100, 50_000, 10_000), ("DIGITS", *CIFAR10[1:])]
)
def test_a_rehearsal_on_other_data_is_none(data: tuple[str, int, int, int], tmp_path: Path) -> None:
    assert what_differs(
        one_run(tmp_path / "run", row("all", True), data=data), row("all", True)
    ) == ["data"]


def test_one_recipe_may_be_that_of_several_rows(tmp_path: Path) -> None:
    same = replace(row("all"), table="table8", name="default", label="U", title="Table 8")
    write_run(tmp_path / "run", row("all"), curve(80, 4))
    page = report_command.make_report(str(tmp_path), [*rows(), same])[0]
    assert "Table 7 deit_tiny_all, Table 8 deit_tiny_default" in page
    assert (
        Reader(page).rows("Table 8")["U"]["ours"]
        == Reader(page).rows(FULL_TABLE)["all (SMMix)"]["ours"]
        == "80.00"
    )


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("resnet50.tv_in1k", "resnet50=weights.pth", True),
        ("resnet50.tv_in1k", "resnet18.tv_in1k", False),
        ("a/pretrained/cutmix/checkpoint.pth", "b/pretrained/cutmix/checkpoint.pth", True),
        ("a/pretrained/cutmix/checkpoint.pth", "a/pretrained/other/checkpoint.pth", False),
        ("self", "ema", False),
        (None, "self", False),
    ],
)
def test_a_network_is_the_same_wherever_its_weights_lie(
    one: str | None, other: str, same: bool
) -> None:
    assert (matching.network_of(one) == matching.network_of(other)) == same


def test_only_recipe_flags_that_differ_from_the_defaults_are_listed(tmp_path: Path) -> None:
    run = one_run(tmp_path / "run", row("none"), clip_grad=1.0, num_workers=3, data_path="secret")
    assert matching.changed_flags(run) == [
        ("--clip-grad", "1.0", "none"),
        ("--epochs", "4", "300"),
        ("--mixer", "cutmix", "smmix"),
        ("--model", "deit_tiny_patch16_224", "deit_base_patch16_224"),
    ]


# ---------------------------------------------------------------------------------- nothing trusted

TAGS = {
    "a",
    "article",
    "body",
    "caption",
    "circle",
    "dd",
    "desc",
    "details",
    "div",
    "dl",
    "dt",
    "figcaption",
    "figure",
    "h1",
    "h2",
    "h3",
    "h4",
    "head",
    "header",
    "html",
    "img",
    "li",
    "line",
    "link",
    "main",
    "meta",
    "nav",
    "p",
    "polyline",
    "section",
    "span",
    "style",
    "summary",
    "svg",
    "table",
    "tbody",
    "td",
    "text",
    "th",
    "thead",
    "title",
    "tr",
    "ul",
}
NASTY = "<script>alert(1)</script>&\"'<img src=x onerror=alert(2)>|[a](b)\u202e"


def test_whatever_folders_say_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    name = "<script>alert(1)<" + "|`[a](b)\u202e&\"'"
    folder = write_run(
        tmp_path / name,
        row("all"),
        curve(80, 4),
        mixup_mode=NASTY,
        model=NASTY,
        state=NASTY,
        told=[f"warning: {NASTY}"],
    )
    (folder / "environment.json").write_text(
        json.dumps({"torch": NASTY, NASTY: "1", "commit": NASTY})
    )
    write_run(tmp_path / "failed", row("all"), curve(80, 4)[:1], state="failed")
    (tmp_path / "failed/status.json").write_text(
        json.dumps({"state": "failed", "exit_code": NASTY, "error": NASTY})
    )
    (tmp_path / "<table>").mkdir()
    (tmp_path / "<table>/log.txt").touch()
    nasty = Row(NASTY, NASTY, NASTY, NASTY, 1.0, (), (), (), False, NASTY)
    html, markdown = report_command.make_report(str(tmp_path), [*rows(), nasty])
    page = Reader(html)
    assert page.tags <= TAGS
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    shown = NASTY.replace("\u202e", "\\u202e")
    assert page.text.count(shown) > 8
    assert name.replace("\u202e", "\\u202e") in page.text
    assert not re.search(r"<(?!!)", markdown)
    assert "\u202e" not in html + markdown
    assert not re.search(r"(?<!\\)`(?!report.html`|\s)", markdown.replace("`report.html`", ""))


def test_nothing_is_asked_of_a_network(html: str) -> None:
    page = Reader(html)
    places = [
        value or ""
        for _, name, value in page.attributes
        if name in ("src", "href", "srcset", "action", "data")
    ]
    assert places
    assert all(place.startswith(("#", "data:image/", "data:,")) for place in places)
    assert not re.findall(r"url\(|@import|https?:", html)
    assert "script" not in page.tags


def break_file(name: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )


def edit_args(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        args = {**json.loads((folder / "args.json").read_text()), **changes}
        (folder / "args.json").write_text(
            json.dumps({name: value for name, value in args.items() if value != "gone"})
        )

    return edit


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no args": (lambda folder: (folder / "args.json").unlink(), "no args.json"),
    "no log": (
        lambda folder: (folder / "log.txt").unlink(),
        "no epoch is finished; its status is done",
    ),
    "args cut short": (break_file("args.json", '{"model": '), "args.json holds no JSON object"),
    "args of another project": (
        break_file("args.json", '{"arch": "resnet50"}'),
        "args.json has no epochs, seed",
    ),
    "args too deep": (break_file("args.json", "[" * 100_000), "args.json holds no JSON object"),
    "args no bytes of text": (
        break_file("args.json", b"\xff\xfe\x00"),
        "args.json holds no JSON object",
    ),
    "epochs a text": (edit_args(epochs="300"), "epochs is '300'"),
    "epochs none": (edit_args(epochs=0), "epochs is 0"),
    "seed a list": (edit_args(seed=[1]), "seed is [1]"),
    "model missing": (edit_args(model="gone"), "args.json has no model"),
    "log of something else": (break_file("log.txt", "hello\nworld\n"), "line 1 of log.txt"),
    "log with epochs twice": (
        break_file("log.txt", '{"epoch": 1}\n{"epoch": 1}\n'),
        "epoch 1 after epoch 1",
    ),
    "log with an epoch beyond all": (
        break_file("log.txt", '{"epoch": 99999999}\n{"epoch": 1}\n'),
        "line 1 of log.txt",
    ),
    "log with odd epochs": (
        break_file("log.txt", '{"epoch": -1}\n{"epoch": "x"}\n'),
        "line 1 of log.txt",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_named_and_the_rest_stands(name: str, tmp_path: Path) -> None:
    write_run(tmp_path / "good", row("all"), curve(81, 4))
    spoil, reason = DAMAGED[name]
    spoil(write_run(tmp_path / "bad", row("all"), curve(20, 4), seed=1))
    page = Reader(report_command.make_report(str(tmp_path), rows())[0])
    assert reason in page.rows("Folders that could not be read")["bad"]["reason"]
    assert page.rows(FULL_TABLE)["all (SMMix)"]["ours"] == "81.00"


def lines_of(rate: str, loss: str) -> str:
    """A log whose accuracies are fine and nothing else is."""
    line = f'"lr": {rate}, "train_loss": {loss}, "test_ema_acc1": {loss}, "test_acc1": 81'
    return "".join(f'{{"epoch": {epoch}, {line}}}\n' for epoch in range(4))


TOLERATED: dict[str, tuple[Callable[[Path], object], str]] = {
    "status": (break_file("status.json", "["), "not recorded"),
    "versions": (break_file("environment.json", b"\xff"), "not recorded"),
    "picture": (
        break_file("mixing.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 99),
        "mixing.png cannot be read",
    ),
    "picture of another kind": (
        break_file("mixing.png", "<svg onload='alert(1)'/>"),
        "mixing.png cannot be read",
    ),
    "last line": (
        lambda folder: (folder / "log.txt").open("a").write('{"epoch": 4, "tes'),
        "the last line of log.txt is incomplete",
    ),
    "numbers": (break_file("log.txt", lines_of('"x"', "[1]")), "nothing recorded"),
    "infinite numbers": (break_file("log.txt", lines_of("NaN", "1e999")), "nothing recorded"),
    "numbers too large to draw": (
        break_file("log.txt", lines_of("1.7e308", "-1.7e308")),
        "nothing recorded",
    ),
    "huge numbers": (break_file("log.txt", lines_of("1" * 400, "true")), "nothing recorded"),
}


@pytest.mark.parametrize("name", TOLERATED)
def test_what_a_report_can_do_without_is_done_without(name: str, tmp_path: Path) -> None:
    spoil, told = TOLERATED[name]
    spoil(write_run(tmp_path / "run", row("all"), curve(81, 4)))
    page = Reader(report_command.make_report(str(tmp_path), rows())[0])
    assert told in page.text
    assert page.rows(FULL_TABLE)["all (SMMix)"]["ours"] == "81.00"


def test_an_unlikely_sign_in_a_text_ends_no_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", row("all"), curve(81, 4))
    log = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(log.replace('"lr":', '"note": "\u2028\u0085", "lr":', 1))
    (run,), skipped = folders.find_runs(tmp_path)
    assert (len(run.epochs), run.top1, skipped) == (4, pytest.approx(81), [])


def test_a_folder_that_cannot_be_looked_into_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "good", row("all"), curve(81, 4))
    write_run(tmp_path / "shut", row("all"), curve(81, 4))
    look = Path.is_file

    def is_file(path: Path) -> bool:
        if path.parent.name == "shut":
            raise PermissionError(13, "Permission denied")
        return look(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    runs, skipped = folders.find_runs(tmp_path)
    assert [run.name for run in runs] == ["good"]
    assert skipped == [("shut", "cannot be read: Permission denied")]


def test_a_name_that_no_folder_can_have_is_refused() -> None:
    with pytest.raises(InputError, match="no such folder"):
        folders.find_runs(Path("x" * 300) / "y")


def test_a_large_picture_is_made_smaller(tmp_path: Path) -> None:
    path = tmp_path / "mixing.png"
    Image.effect_noise((700, 700), 90).convert("RGB").save(path)
    picture, trouble = details.read_picture(path)
    assert picture is not None
    assert (picture.kind, picture.width, trouble) == ("jpeg", 700, "")
    assert len(picture.data) < path.stat().st_size / 2
    for side, reason in (
        (7_000, "has 7000 x 7000 pixels, too many for the report"),
        (10_000, "cannot be read: Decompr"),
    ):
        Image.new("1", (side, side)).save(path)
        picture, trouble = details.read_picture(path)
        assert picture is None
        assert reason in trouble


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    write_run(tmp_path / "a/run", row("all"), curve(81, 4))
    (tmp_path / "a/run/again").symlink_to(tmp_path)
    assert [run.name for run in folders.find_runs(tmp_path)[0]] == ["a/run"]


# -------------------------------------------------------------------------------------- the command


def test_without_runs_it_says_what_it_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"no run found .* holds log.txt and args.json"):
        folders.find_runs(tmp_path)
    assert run_command(lambda: report_command.main([str(tmp_path / "nosuch")])) == 2
    assert "nosuch: no such folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("report*"))


def test_the_same_runs_give_the_same_bytes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another place, at another time, found in another order."""
    monkeypatch.setattr(report_command, "read_tables", lambda: recorded_runs)  # for its `rows`
    shutil.copytree(root, tmp_path / "one/runs")
    written = []
    for folder, copy in (("one", False), ("two", True)):
        if copy:
            for path in sorted((tmp_path / "one/runs").rglob("*"), reverse=True):
                target = tmp_path / "two" / path.relative_to(tmp_path / "one")
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.is_file():
                    shutil.copyfile(path, target)
        monkeypatch.chdir(tmp_path / folder)
        report_command.main(["runs", "--output", "somewhere/new"])
        written.append(
            [
                (tmp_path / folder / "somewhere/new" / name).read_bytes()
                for name in ("report.html", "report.md")
            ]
        )
    assert written[0] == written[1]
    report_command.main(["runs", "--output", "somewhere/new"])
    assert (tmp_path / "two/somewhere/new/report.html").read_bytes() == written[0][0]


def test_a_row_that_is_not_for_this_main_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", row("all"), curve(80, 4))
    wrong = replace(row("all"), flags=("--nosuch", "3"))
    with pytest.raises(InputError, match=r"main\.py does not accept --nosuch 3"):
        report_command.make_report(str(tmp_path), [wrong])


def test_a_real_run_is_read_as_it_was(tmp_path: Path) -> None:
    """What `main.py` writes today, and not only what the recorded folders hold."""
    recipe = (
        "--model vit_nano_patch4_32 --input-size 16 --batch-size 240 --no-repeated-aug --aa none "
        "--epochs 1 "
    )
    recipe += "--warmup-epochs 0 --log-every 1"
    done = run_small(recipe, "--seed 3 --output-dir", tmp_path / "<b>runs" / "one")
    assert done.code == 0, done.err
    (run,), skipped = folders.find_runs(tmp_path)
    assert not skipped
    same = replace(row("all"), flags=tuple(recipe.split()))
    assert what_differs(run, same) == ["data"]
    assert (run.is_finished, matching.total_batch(run), len(run.starts)) == (True, 240, 1)
    assert set(run.start.head) == set(
        folders.HEAD_ROW.pattern.split("(", 1)[1].split(")")[0].split("|")
    )
    assert run.start.trained
    assert any("--model-ema-decay" in line for line in run.warnings)
    page = Reader(report_command.make_report(str(tmp_path), [same])[0])
    logged = json.loads((tmp_path / "<b>runs/one/log.txt").read_text().splitlines()[-1])
    other = page.rows("Runs that fit no row")["<b>runs/one"]
    assert other["top-1"] == f"{logged['test_acc1']:.2f}"
    assert other["EMA"] == f"{logged['test_ema_acc1']:.2f}"
    assert (
        other["what differs from it"]
        == "data DIGITS, 10 classes, 1,437 and 360 images (the row has ImageNet-1k)"
    )
    assert all(
        name in page.text
        for name in ("classification", "fine-grained", "consistency", "learning rate")
    )
    assert "img" in page.tags
    assert str(tmp_path) not in page.text.replace(f"Run folders in {tmp_path}", "")


# ------------------------------------------------------------------------------------------- charts


def test_ticks_are_round() -> None:
    assert charts.nice_ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert charts.nice_ticks(51.2, 54.9) == [52, 53, 54]
    assert [charts.tick_text(tick) for tick in charts.nice_ticks(0.0, 1e-3)] == [
        "0",
        "0.0002",
        "0.0004",
        "0.0006",
        "0.0008",
        "0.001",
    ]
    assert charts.nice_ticks(3, 3) == [3]
    assert charts.log_ticks(0.002, 2.5) == pytest.approx([0.01, 0.1, 1])
    assert charts.log_ticks(1, 40) == pytest.approx([1, 2, 5, 10, 20])


def test_a_line_breaks_where_a_value_is_missing() -> None:
    points: list[tuple[float, float | None]] = [
        (1, 1.0),
        (2, 2.0),
        (3, None),
        (4, 4.0),
        (5, None),
        (6, 3.0),
        (7, 2.0),
    ]
    drawn = charts.draw(Chart("a", "%", [Series("one", points)]), "c")
    assert drawn.count("<polyline") == 2
    assert drawn.count("<circle") == 1
    assert "nothing recorded" in charts.draw(Chart("a", "%", [Series("one", [(1, None)])]), "c")


def test_a_line_is_where_its_values_are() -> None:
    drawn = charts.draw(Chart("a", "%", [Series("one", [(1, 10.0), (2, 20.0), (3, 40.0)])]), "c")
    places = [
        tuple(map(float, pair.split(",")))
        for pair in re.findall(r'points="([^"]*)"', drawn)[0].split()
    ]
    assert [x for x, _ in places] == [
        charts.LEFT,
        pytest.approx((charts.LEFT + charts.WIDTH - charts.RIGHT) / 2),
        406,
    ]
    falls = [before[1] - after[1] for before, after in pairwise(places)]
    assert falls[1] == pytest.approx(2 * falls[0], abs=0.2)
    assert 'stroke-dasharray="' not in drawn


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    points: list[tuple[float, float | None]] = [(epoch, float(epoch)) for epoch in range(5000)]
    thinned = charts.thin(points)
    assert len(thinned) == charts.MAX_POINTS
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])


# --------------------------------------------------------------------------- the browser of .ci/run


@pytest.mark.parametrize("works", [True, False])
def test_ci_installs_the_browser_or_says_that_it_could_not(works: bool, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "cat", "dirname", "env", "grep", "mktemp", "rm", "tail", "tee"):
        (programs / name).symlink_to(shutil.which(name) or "")
    fakes = {
        "id": "echo 0",
        "apt-get": f'echo "$*" >>"{tmp_path}/asked"; echo reason; exit {0 if works else 7}',
    }
    for name, body in fakes.items():
        (programs / name).write_text(f"#!{programs}/bash\n{body}\n")
        (programs / name).chmod(0o755)
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    shutil.copytree(ROOT / ".ci", project / ".ci")
    (project / "scripts/test.sh").write_text(
        'echo "browser $CI_BROWSER"; echo "3 passed in 0.10s"\n'
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI_BROWSER"} | {
        "PATH": str(programs)
    }
    done = subprocess.run(
        [str(programs / "bash"), str(project / ".ci/run")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert "chromium chromium-driver" in (tmp_path / "asked").read_text() or not works
    if works:
        assert done.stdout.splitlines() == ["browser 1", "3 passed in 0.10s", "3 passed in 0.10s"]
    else:
        assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "0 tests ran: no browser")
        assert "reason" in done.stdout
