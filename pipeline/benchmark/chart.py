"""Bars beside their floors, as an SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_ROW_PX, _LEFT_PX, _BAR_PX, _RIGHT_PX = 44, 190, 460, 190


@dataclass(frozen=True)
class Bar:
    """What was measured, and what it is held against, in one unit."""

    label: str
    value: float
    floor: float
    note: str


@dataclass(frozen=True)
class Chart:
    """Bars of one unit, which share a scale."""

    title: str
    bars: Sequence[Bar]


def svg(charts: Sequence[Chart]) -> str:
    """The charts below each other; in each, a bar is the measured figure and the thin one below it the floor."""
    width, y, parts = _LEFT_PX + _BAR_PX + _RIGHT_PX, 0, []
    for chart in charts:
        y += 40
        parts.append(f'<text x="12" y="{y}" font-weight="600">{escape(chart.title)}</text>')
        longest = max(max(bar.value, bar.floor) for bar in chart.bars) or 1
        for bar in chart.bars:
            y += _ROW_PX if bar is not chart.bars[0] else 20
            value, floor = (max(1, _BAR_PX * figure / longest) for figure in (bar.value, bar.floor))
            beside = _LEFT_PX + max(value, floor) + 8
            parts += [
                f'<text x="{_LEFT_PX - 10}" y="{y + 15}" text-anchor="end">{escape(bar.label)}</text>',
                f'<rect x="{_LEFT_PX}" y="{y}" width="{value:.1f}" height="16" fill="#1681cf"/>',
                f'<rect x="{_LEFT_PX}" y="{y + 18}" width="{floor:.1f}" height="8" fill="#c99a00"/>',
                f'<text x="{beside:.1f}" y="{y + 15}" fill="#566074">{escape(bar.note)}</text>',
            ]
        y += _ROW_PX
    height = y + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' font-family="system-ui, sans-serif" font-size="13" fill="#141a26">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
