"""Numbers as HTML: headline, bars, histograms, tables. All of it can be read without a script."""

from __future__ import annotations

import math
from html import escape

from pipeline.report.content import Bar, BarGroup, Delta, Histogram, Table

DASH, MINUS, NBSP = "\u2013", "\u2212", "\u00a0"
SCROLLS_FROM = 16
"""A table of more rows than this scrolls inside its panel."""
MOST_TICKS = 10
SCORE_DIGITS = 1
"""Decimals of a score in percent; a change that rounds to zero is called none."""


def present(value: float | None) -> float | None:
    """The value, or None where it is None or NaN."""
    return None if value is None or math.isnan(value) else value


def shown(value: float | None, digits: int = SCORE_DIGITS) -> str:
    """A number as text: thousands separated, a dash where there is none."""
    value = present(value)
    return DASH if value is None else f"{value:,.{digits}f}"


def change(before: float | None, after: float | None) -> tuple[str, str]:
    """What the change of a score is called (`gain`, `loss`, `same` or nothing), and it as text with arrow and sign."""
    before, after = present(before), present(after)
    if before is None or after is None:
        return "", ""
    text = shown(abs(after - before))
    if round(abs(after - before), SCORE_DIGITS) == 0:
        return "same", f"±{text}"
    return ("gain", f"▲{NBSP}+{text}") if after > before else ("loss", f"▼{NBSP}{MINUS}{text}")


def headline(deltas: list[Delta]) -> str:
    """The numbers that answer the first question, as cards."""
    items = []
    for one in deltas:
        kind, text = change(one.before, one.after)
        spoken = {"gain": "better", "loss": "worse"}.get(kind, "")
        was = f"from {shown(one.before)} " if present(one.before) is not None else ""
        delta = f'<span class="{kind}">{text}</span><span class="unseen"> {spoken}</span>' if text else ""
        items.append(f"<li><small>{escape(one.name)}</small><b>{shown(one.after)}</b><p>{was}{delta}</p></li>")
    return f'<ul class="headline">{"".join(items)}</ul>'


def sides_of(group: BarGroup) -> list[str]:
    """Which bars a row of the group has: `coarse`, and `refined` or `bound`, as far as any row has a value."""
    before, after = (
        any(present(value) is not None for value in side)
        for side in ([row.before for row in group.rows], [row.after for row in group.rows])
    )
    return (["coarse"] if before else []) + (["bound" if group.bound else "refined"] if after or not before else [])


def bar_group(group: BarGroup, key: str) -> str:
    """Bars before and after in a table with their numbers; one bar and number where all rows have but one of them."""
    sides = sides_of(group)
    names = [*(side.capitalize() for side in sides), "Change"] if len(sides) > 1 else ["Value"]
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    table = (
        f'<table class="sortable"><thead><tr><th scope="col">Name</th><td class="plot"></td>{heads}</tr></thead>'
        f"<tbody>{''.join(_bar(row, sides) for row in group.rows)}</tbody></table>"
    )
    return _panel(key, group.title, group.note, _scrolling(table, len(group.rows), group.title), "bars")


def _bar(row: Bar, sides: list[str]) -> str:
    before, after = present(row.before), present(row.after)
    compared = len(sides) > 1
    values = [before if side == "coarse" else after for side in sides]
    rects = "".join(
        f'<rect class="{side}" y="{2 + 8 * number}" width="{max(value, 0.3):.2f}" height="{7 if compared else 11}"/>'
        for number, (side, value) in enumerate(zip(sides, values))
        if value is not None and value >= 0
    )
    cells = "".join(_number(value, SCORE_DIGITS) for value in values)
    if compared:
        kind, text = change(before, after)
        difference = "" if before is None or after is None else after - before
        cells += f'<td data-value="{difference}"><span class="{kind}">{text or DASH}</span></td>'
    return (
        f'<tr><th scope="row">{escape(row.label)}</th><td class="plot"><svg aria-hidden="true" viewBox="0 0 100 18" '
        f'preserveAspectRatio="none">{rects}</svg></td>{cells}</tr>'
    )


def histogram(one: Histogram, key: str) -> str:
    """Counts per bin as bars and as a table that opens. Raises ValueError where the edges do not fit the counts."""
    edges, counts = list(one.edges), list(one.counts)
    if len(edges) != len(counts) + 1:
        raise ValueError(f"histogram {one.title!r}: {len(edges)} edges for {len(counts)} counts")
    most, total, width = max(counts, default=0), sum(counts), 100 / len(counts)
    rects, rows = [], []
    for number, (count, start, stop) in enumerate(zip(counts, edges, edges[1:])):
        name = f"{_edge(start)} to {_edge(stop)}"
        share = f"{count / total:.1%}" if total else DASH
        kind = "gain" if start >= 0 else "loss" if stop <= 0 else ""
        if count:
            height = max(100 * count / most, 0.7)
            rects.append(
                f'<rect class="{kind}" x="{number * width + 0.04 * width:.3f}" y="{100 - height:.2f}" '
                f'width="{0.92 * width:.3f}" height="{height:.2f}"/>'
            )
        rects.append(
            f'<rect class="hit" x="{number * width:.3f}" width="{width:.3f}" height="100">'
            f"<title>{name}: {count:,} ({share})</title></rect>"
        )
        rows.append(f"<tr><td>{name}</td><td>{count:,}</td><td>{share}</td></tr>")
    ticks = "".join(
        f'<span style="left:{number * width:.3f}%"'
        + (' class="first"' if number == 0 else ' class="last"' if number == len(counts) else "")
        + f">{_edge(edges[number])}</span>"
        for number in _ticks(edges)
    )
    title = escape(one.title)
    body = (
        f'<div class="chart"><svg role="img" aria-label="{title}" viewBox="0 0 100 100" preserveAspectRatio="none">'
        f'{"".join(rects)}</svg><span>{most:,}</span></div><div class="axis" aria-hidden="true">{ticks}</div>'
        f"<details><summary>{total:,} in {len(counts)} bins, as numbers</summary><table><thead><tr>"
        '<th scope="col">Bin</th><th scope="col">Count</th><th scope="col">Share</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></details>"
    )
    return _panel(key, one.title, one.note, body)


def table(one: Table, key: str) -> str:
    """A table that a person can sort."""
    digits = [one.digits] * len(one.columns) if isinstance(one.digits, int) else one.digits
    numeric = [not any(isinstance(row[k], str) for row in one.rows) for k in range(len(one.columns))]
    heads = "".join(
        f'<th scope="col"{"" if is_number else " class=text"}>{escape(name)}</th>'
        for name, is_number in zip(one.columns, numeric)
    )
    rows = []
    for row in one.rows:
        cells = []
        for cell, decimals in zip(row, digits):
            if isinstance(cell, str):
                cells.append(f'<td class="text">{escape(cell)}</td>')
            else:
                cells.append(_number(cell, 0 if isinstance(cell, int) else decimals))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    if not rows:
        body = '<p class="none">None.</p>'
    return _panel(key, one.title, one.note, _scrolling(body, len(rows), one.title))


def _panel(key: str, title: str, note: str, body: str, kind: str = "") -> str:
    return (
        f'<section class="panel {kind}" id="{key}" aria-labelledby="{key}-title">'
        f'<h2 id="{key}-title">{escape(title)}</h2>'
        f'<p class="caption">{escape(note)}</p>{body}</section>'
    )


def _scrolling(table: str, rows: int, title: str) -> str:
    # What scrolls must be reachable by keyboard.
    if rows <= SCROLLS_FROM:
        return f'<div class="scroll">{table}</div>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{table}</div>'


def _number(value: float | None, digits: int) -> str:
    value = present(value)
    return f'<td data-value="{"" if value is None else value}">{shown(value, digits)}</td>'


def _edge(value: float) -> str:
    return f"{value:,.4g}".replace("-", MINUS)


def _ticks(edges: list[float]) -> list[int]:
    """Which edges are named: all where they are few, else evenly taken ones, zero among them if it is an edge."""
    step = max(1, -(-len(edges) // MOST_TICKS))
    start = edges.index(0) % step if 0 in edges else 0
    return list(range(start, len(edges), step))
