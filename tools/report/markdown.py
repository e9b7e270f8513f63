"""Writes the report as Markdown: the same tables and runs, without charts and pictures.

Every text goes through `escape`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tools.report.page import Cell, Report, RunPage, Section, Table


def escape(text: str) -> str:
    """Escapes a text for a line or a table cell: no markup, no HTML, no line breaks."""
    printable = "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )
    escaped = re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", printable)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def write_text(report: Report) -> str:
    """The whole text."""
    parts = [
        f"# {escape(report.title)}",
        *map(escape, report.lead),
        "`report.html` in the same folder has the charts and pictures.",
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
    rule = ["---:" if column in table.numeric else "---" for column in range(len(table.header))]
    rows = [
        [escape(name) for name in table.header],
        rule,
        *([_cell(cell) for cell in row] for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(cell: Cell) -> str:
    links = ", ".join(f"[{escape(link)}](#run-{number})" for number, link in cell.runs)
    return " ".join(part for part in (escape(cell.text), links) if part)


def _run(run: RunPage) -> Iterable[str]:
    yield f"### Run {run.number}"
    facts = [("folder", run.name), ("progress", run.state), *run.facts]
    facts += [("setting", "; ".join(f"{name} {value}" for name, value in run.setting))]
    facts += [("warning", line) for line in run.warnings]
    yield "\n".join(f"- {escape(name)}: {escape(value)}" for name, value in facts)
    if run.flags:
        flags = ", ".join(f"{escape(name)} {escape(value)}" for name, value, _ in run.flags)
        yield f"Flags of the recipe that differ from the defaults: {flags}"
