"""The trials of `pipeline.pareto` summed up: means, intervals, the Pareto front; as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from pipeline.grading import MEASURES
from pipeline.pareto import BOUNDS, Trial
from pipeline.records import InputError

RESAMPLES = 2000
"""Samples of the bootstrap."""

FRONT_MEASURE = MEASURES.index("boundary IoU")
"""What the front and the plot are about; the least noisy measure of boundaries."""


@dataclass(frozen=True)
class Point:
    """The means of one setting over all masks; gains are refined minus coarse scores, in the order of MEASURES."""

    setting: str
    patches: float
    cost: float
    """Per mask, as in `Trial.cost`."""
    uncovered: float
    """Share of the coarse boundary that lies in no patch."""
    gain: tuple[float, ...]
    low: tuple[float, ...]
    """Lower end of the 95 % interval of the gain less the baseline's."""
    high: tuple[float, ...]
    worse: float
    """Share of masks whose IoU fell by more than `boundary.WORSE_BY`."""
    front: bool = False
    """Whether no cheaper setting has as high a gain in Boundary IoU, bounds (`pareto.BOUNDS`) aside."""


def points(trials: Sequence[Trial], weights: Mapping[str, float], baseline: str, seed: int = 0) -> list[Point]:
    """One point for each setting, in the order of the trials, which must have the same masks for every setting.

    `weights` by kind of failure are 1 unless given. Intervals come from a bootstrap over images: all masks of an image
    are drawn together, and a setting is compared with the baseline on the same draw.
    """
    by_setting: dict[str, list[Trial]] = {}
    for trial in trials:
        by_setting.setdefault(trial.setting, []).append(trial)
    first = by_setting[baseline]
    keys = [trial.key for trial in first]
    images = np.unique(keys, return_inverse=True)[1]
    weight = np.array([weights.get(trial.kind, 1.0) for trial in first])
    one_hot = (images == np.arange(images.max() + 1)[:, None]) * weight
    draws = np.random.default_rng(seed).multinomial(len(one_hot), [1 / len(one_hot)] * len(one_hot), RESAMPLES)
    drawn = draws @ one_hot
    drawn = drawn / drawn.sum(axis=1, keepdims=True)
    share = weight / weight.sum()
    gains = {name: np.array([np.subtract(t.refined, t.coarse) for t in some]) for name, some in by_setting.items()}
    found = []
    for name, some in by_setting.items():
        low, high = np.percentile(drawn @ (gains[name] - gains[baseline]), (2.5, 97.5), axis=0)
        found.append(
            Point(
                name,
                float(share @ [trial.patches for trial in some]),
                float(share @ [trial.cost for trial in some]),
                sum(trial.uncovered_px for trial in some) / max(1, sum(trial.boundary_px for trial in some)),
                tuple((share @ gains[name]).tolist()),
                tuple(low.tolist()),
                tuple(high.tolist()),
                float(share @ [trial.worse for trial in some]),
            )
        )
    real = [point for point in found if point.setting not in BOUNDS]
    return [replace(one, front=one in real and not any(_beats(other, one) for other in real)) for one in found]


def _beats(one: Point, other: Point) -> bool:
    ours, theirs = (one.gain[FRONT_MEASURE], -one.cost), (other.gain[FRONT_MEASURE], -other.cost)
    return ours != theirs and all(a >= b for a, b in zip(ours, theirs))


def table(found: Sequence[Point]) -> str:
    """One line for each point; `*` marks the front, the interval is that of the gain in Boundary IoU."""
    interval = f"{MEASURES[FRONT_MEASURE]} less baseline's"
    head = f"  {'setting':<18}{'patches':>8}{'cost':>7}{'uncovered':>11}"
    lines = [head + "".join(f"{name:>14}" for name in MEASURES) + f"{'worse':>8}{interval:>34}"]
    for point in found:
        cells = "".join(f"{gain:>+14.4f}" for gain in point.gain)
        between = f"{point.low[FRONT_MEASURE]:+.4f} to {point.high[FRONT_MEASURE]:+.4f}"
        lines.append(
            f"{'*' if point.front else ' '} {point.setting:<18}{point.patches:>8.1f}{point.cost:>7.1f}"
            f"{point.uncovered:>11.2%}{cells}{point.worse:>8.1%}{between:>34}"
        )
    return "\n".join(lines)


WIDTH, HEIGHT = 720, 420
LEFT, TOP, RIGHT, BOTTOM = 84, 16, WIDTH - 24, 370
"""The plot's frame in the picture, in pixels."""

SHOWN = 0.5
"""Settings that gain less than this share of the baseline's gain are left out of the plot, as bounds are: they would
flatten it."""

STYLE = (
    "text{font:12px sans-serif;fill:#555}.label{stroke:#fff;stroke-width:3px;paint-order:stroke}"
    ".grid{stroke:#8884;fill:none}.bar{stroke:#8888;fill:none}"
    ".front{stroke:#2a78d6;fill:none;stroke-width:1.5}circle{fill:#999}circle.on{fill:#2a78d6}.on{font-weight:bold}"
)


def plot(found: Sequence[Point], baseline: str) -> str:
    """An SVG of the gain in Boundary IoU, as a share of the baseline's, over the cost; bars are the 95 % intervals.

    InputError where the baseline gains nothing.
    """
    base = next(point.gain[FRONT_MEASURE] for point in found if point.setting == baseline)
    if base <= 0:
        raise InputError(f"no plot: {baseline} gains nothing in {MEASURES[FRONT_MEASURE]} on these masks")
    shown = [point for point in found if point.gain[FRONT_MEASURE] >= SHOWN * base and point.setting not in BOUNDS]
    bars = [[1 + end[FRONT_MEASURE] / base for end in (point.low, point.high)] for point in shown]
    most = 1.1 * max(point.cost for point in shown)
    low, high = min(bar[0] for bar in bars) - 0.02, max(bar[1] for bar in bars) + 0.02

    def x(cost: float) -> float:
        return round(LEFT + cost / most * (RIGHT - LEFT), 1)

    def y(share: float) -> float:
        return round(BOTTOM - (share - low) / (high - low) * (BOTTOM - TOP), 1)

    parts = []
    for cost in range(0, int(most) + 1, max(1, round(most / 8 / 5) * 5)):
        parts.append(f'<path class="grid" d="M{x(cost)} {TOP}V{BOTTOM}"/>')
        parts.append(_text(x(cost), BOTTOM + 18, str(cost), "middle"))
    for percent in range(-(int(-100 * low) // 10) * 10, int(100 * high) + 1, 10):
        parts.append(f'<path class="grid" d="M{LEFT} {y(percent / 100)}H{RIGHT}"/>')
        parts.append(_text(LEFT - 6, y(percent / 100) + 4, f"{percent} %", "end"))
    parts.append(
        _text((LEFT + RIGHT) / 2, HEIGHT - 8, "cost: full passes of a patch through the network, per mask", "middle")
    )
    middle = (TOP + BOTTOM) / 2
    name = f"gain in {MEASURES[FRONT_MEASURE]}, as a share of that of {baseline}"
    parts.append(_text(18, middle, name, "middle", f' transform="rotate(-90 18 {middle:g})"'))
    front = sorted((point.cost, point.gain[FRONT_MEASURE] / base) for point in shown if point.front)
    parts.append(f'<polyline class="front" points="{" ".join(f"{x(cost)},{y(share)}" for cost, share in front)}"/>')
    places = [(x(point.cost), y(point.gain[FRONT_MEASURE] / base)) for point in shown]
    taken = [(at[0] - 5, at[1] - 5, at[0] + 5, at[1] + 5) for at in places]
    lines = [(at[0] - 1, y(bar[1]), at[0] + 1, y(bar[0])) for bar, at in zip(bars, places)]
    parts += [f'<path class="bar" d="M{at[0]} {y(bar[0])}V{y(bar[1])}"/>' for bar, at in zip(bars, places)]
    for point, at in zip(shown, places):
        on = ' class="on"' * point.front
        parts.append(f'<circle cx="{at[0]}" cy="{at[1]}" r="4"{on}/>')
        kind = ' class="label on"' if point.front else ' class="label"'
        left, base, anchor = _place(at, 7.2 * len(point.setting), taken, lines)
        if abs(base - 4 - at[1]) > 10:
            # Too far off to be told whose it is.
            parts.append(f'<path class="bar" d="M{at[0]} {at[1]}L{left} {base - 4}"/>')
        parts.append(_text(left, base, point.setting, anchor, kind))
    title = f"Gain in Boundary IoU over cost; 100 % is that of {baseline}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f'<title>{escape(title)}</title><style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
        + "\n".join(parts)
        + "</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str, attributes: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{attributes}>{escape(text)}</text>'


Rectangle = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the picture."""


def _place(
    point: tuple[float, float], width: float, taken: list[Rectangle], lines: Sequence[Rectangle]
) -> tuple[float, float, str]:
    """Where a label near a point is anchored, and by which end; it notes the place as taken.

    It is clear of points and earlier labels where that can be, close to its point, and then crossed by few lines.
    """
    x, y = point
    sides = [(left, 13 * step) for step in (0, 1, -1, 2, -2) for left in (False, True)]
    starts = [(x - 8 - width if left else x + 8, y + down) for left, down in sides]
    boxes = [(start, base - 6, start + width, base + 7) for start, base in starts]
    inside = [i for i, box in enumerate(boxes) if box[0] >= LEFT and box[2] <= RIGHT and box[1] >= TOP]
    free = [i for i in inside if not _hits(boxes[i], taken)] or inside or [0]
    chosen = min(free, key=lambda i: 2 * _hits(boxes[i], lines) + abs(sides[i][1]) / 13)
    taken.append(boxes[chosen])
    left, down = sides[chosen]
    return x - 8 if left else x + 8, y + down + 4, "end" if left else "start"


def _hits(box: Rectangle, others: Sequence[Rectangle]) -> int:
    return sum(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in others)
