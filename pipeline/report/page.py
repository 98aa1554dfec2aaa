"""The report's page: headline, bars, histograms, galleries and tables, in one file that loads nothing."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline import storage
from pipeline.report import figures
from pipeline.report.content import Report
from pipeline.report.gallery import gallery
from pipeline.report.script import PAGE_SCRIPT
from pipeline.report.shell import CLOSING, SIDES, opening
from pipeline.report.style import PAGE_STYLE


def write_page(url: str, report: Report) -> None:
    """Write one self-contained HTML page to `url`, an fsspec URL. Numbers, tables and cards need no script.

    Raises ValueError where a histogram's edges do not fit its counts; nothing is left behind then.
    """
    with storage.open_write(url) as file:
        for part in _page(report):
            file.write(part.encode())


def _page(report: Report) -> Iterator[str]:
    links = {}
    if report.bars or report.histograms:
        links["numbers"] = "Numbers"
    links |= {f"gallery-{i}": one.title for i, one in enumerate(report.galleries, 1)}
    links |= {f"table-{i}": one.title for i, one in enumerate(report.tables, 1)}
    lead, facts = report.lead, report.facts
    yield opening(report.title, facts, PAGE_STYLE, script=PAGE_SCRIPT, lead=lead, links=links, sides=_sides(report))
    if report.headline:
        yield figures.headline(list(report.headline))
    if report.bars or report.histograms:
        yield '<div class="columns" id="numbers">'
        yield from (figures.bar_group(one, f"bars-{i}") for i, one in enumerate(report.bars, 1))
        yield from (figures.histogram(one, f"histogram-{i}") for i, one in enumerate(report.histograms, 1))
        yield "</div>"
    yield from (gallery(one, f"gallery-{i}") for i, one in enumerate(report.galleries, 1))
    yield from (figures.table(one, f"table-{i}") for i, one in enumerate(report.tables, 1))
    yield CLOSING


def _sides(report: Report) -> list[str]:
    """What the page shows in contours or bars, in the legend's order."""
    shown = {side for group in report.bars for side in figures.sides_of(group)}
    if report.galleries:
        shown |= {"coarse", "refined"}
    if any(card.overview.truth is not None for one in report.galleries for card in one.cards):
        shown.add("truth")
    return [side for side in SIDES if side in shown]
