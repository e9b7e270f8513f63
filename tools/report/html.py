"""Writes the report as one HTML file, without scripts or files from elsewhere.

It has a light and a dark form and fits screens, phones and paper. Every text goes through `escape`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape as escape_html

from tools.report import charts
from tools.report.page import Cell, Report, RunPage, Section, Table
from tools.report.style import STYLE

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action "
    "'none'"
)

# Cells with more letters get a minimum width, or a larger one.
MEDIUM_CELL, LONG_CELL = 20, 60


def escape(text: str) -> str:
    """Escapes a text for HTML; characters that cannot be printed become escape sequences."""
    printable = "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )
    return escape_html(printable, quote=True)


def write_page(report: Report) -> str:
    """The whole page."""
    anchors = [(section.anchor, section.title) for section in report.sections]
    anchors += [("runs", "Runs")] if report.runs else []
    links = "".join(
        f'<li><a href="#{anchor}">{escape(title)}</a></li>' for anchor, title in anchors
    )
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        '<a class="skip" href="#main">Skip to the tables</a>',
        f"<header><h1>{escape(report.title)}</h1>{_paragraphs(report.lead)}",
        f'<nav aria-label="Parts of this page"><ul>{links}</ul></nav></header>\n<main id="main">',
        *(_section(section) for section in report.sections),
        *_runs(report.runs),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _section(section: Section) -> str:
    tables = "\n".join(
        _table(table, f"{section.anchor}-{number}")
        for number, table in enumerate(section.tables, start=1)
    )
    head = f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-h">'
    title = f'<h2 id="{section.anchor}-h">{escape(section.title)}</h2>'
    return f"{head}{title}{_paragraphs(section.lead)}{tables}</section>"


def _table(table: Table, anchor: str) -> str:
    head = "".join(
        f'<th scope="col"{_class_of(name, column in table.numeric)}>{escape(name)}</th>'
        for column, name in enumerate(table.header)
    )
    rows = "\n".join(
        f"<tr>{''.join(_body_cell(cell, column, table) for column, cell in enumerate(row))}</tr>"
        for row in table.rows
    )
    title = escape(table.title)
    grid = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{title}"><table id="{anchor}">'
        f"<caption><span>{title}</span></caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    drawn = "".join(
        charts.draw(chart, f"{anchor}-c{index}") for index, chart in enumerate(table.charts)
    )
    body = grid + notes + (f'<div class="charts wide">{drawn}</div>' if drawn else "")
    if table.folded:
        return f"<details><summary>{title}</summary>{body}</details>"
    return f'<div class="table">{body}</div>'


def _body_cell(cell: Cell, column: int, table: Table) -> str:
    links = ", ".join(f'<a href="#run-{number}">{escape(link)}</a>' for number, link in cell.runs)
    content = " ".join(part for part in (escape(cell.text), links) if part)
    if column == 0:
        return f'<th scope="row">{content}</th>'
    text = ", ".join([cell.text, *(link for _, link in cell.runs)])
    return f"<td{_class_of(text, column in table.numeric)}>{content}</td>"


def _class_of(text: str, is_number: bool) -> str:
    """The class attribute of a cell, which sets its width and alignment."""
    if is_number:
        return ' class="number"'
    if len(text) > LONG_CELL:
        return ' class="text"'
    return ' class="words"' if len(text) > MEDIUM_CELL else ""


def _runs(runs: list[RunPage]) -> Iterable[str]:
    if runs:
        yield '<section id="runs" aria-labelledby="runs-h"><h2 id="runs-h">Runs</h2>'
        yield from (_run(run) for run in runs)
        yield "</section>"


def _run(run: RunPage) -> str:
    name = f"run-{run.number}"
    facts = "".join(
        f"<dt>{escape(fact)}</dt><dd>{escape(value)}</dd>"
        for fact, value in [*run.facts, *run.setting]
    )
    drawn = "".join(
        charts.draw(chart, f"{name}-c{index}") for index, chart in enumerate(run.charts)
    )
    parts = [
        f'<article id="{name}" aria-labelledby="{name}-h"><h3 id="{name}-h">{escape(run.name)} ',
        f'<span class="state{"" if run.is_finished else " open"}">{escape(run.state)}</span></h3>',
        f'<dl>{facts}</dl><div class="charts">{drawn}</div>',
    ]
    if run.warnings:
        lines = "".join(f"<li>{escape(line)}</li>" for line in run.warnings)
        parts.append(f'<div class="warnings"><h4>Warnings</h4><ul>{lines}</ul></div>')
    if run.picture is not None:
        data = base64.b64encode(run.picture.data).decode("ascii")
        size = f'width="{run.picture.width}" height="{run.picture.height}"'
        parts.append(
            "<details open><summary>Mixed images after the last epoch</summary>"
            f'<img alt="Pairs of images and their mixed images, drawn by the run" {size} '
            f'src="data:image/{run.picture.kind};base64,{data}"></details>'
        )
    if run.flags:
        rows = [[Cell(text) for text in flag] for flag in run.flags]
        title = f"Flags of the recipe that differ from the defaults: {len(rows)}"
        table = Table(title, ["flag", "value", "default"], rows, [], folded=True)
        parts.append(_table(table, f"{name}-f"))
    return "".join([*parts, "</article>"])
