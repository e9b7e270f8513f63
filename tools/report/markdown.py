"""The report as Markdown: the same tables and runs, without curves and pictures.

Level 2: from `Report` to text. Everything that is shown goes through `escape`. It must not know
runs, rows or files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tools.report.records import Cell, Report, RunPage, Section, Table


def escape(text: str) -> str:
    """Safe in a line of Markdown and in a cell of a table: no markup, no HTML, no line breaks."""
    shown = "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )
    shown = re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", shown)
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def write_text(report: Report) -> str:
    """The whole file."""
    parts = [
        f"# {escape(report.title)}",
        *map(escape, report.lead),
        "`report.html` beside it has the curves and pictures.",
    ]
    for section in report.sections:
        parts += _section(section)
    if report.runs:
        parts.append("## Runs")
    for run in report.runs:
        parts += _run(run)
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> Iterable[str]:
    yield f"## {escape(section.title)}"
    yield from map(escape, section.lead)
    for table in section.tables:
        yield f"### {escape(table.title)}"
        yield _table(table)
        yield from map(escape, table.notes)


def _table(table: Table) -> str:
    rule = ["---:" if place in table.numeric else "---" for place in range(len(table.header))]
    rows = [
        [escape(name) for name in table.header],
        rule,
        *([_cell(cell) for cell in row] for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(cell: Cell) -> str:
    links = ", ".join(f"[{escape(words)}](#run-{number})" for number, words in cell.runs)
    return " ".join(part for part in (escape(cell.text), links) if part)


def _run(run: RunPage) -> Iterable[str]:
    yield f"### Run {run.number}"
    facts = [("folder", run.name), ("how far", run.state), *run.facts]
    facts += [("setting", "; ".join(f"{name} {value}" for name, value in run.setting))]
    facts += [("warning", line) for line in run.warnings]
    yield "\n".join(f"- {escape(name)}: {escape(value)}" for name, value in facts)
    if run.flags:
        flags = ", ".join(f"{escape(name)} {escape(value)}" for name, value, _ in run.flags)
        yield f"Flags of the recipe that differ from the defaults: {flags}"
