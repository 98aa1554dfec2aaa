"""The page a person looks at: coarse and refined contours over the photographs, and closer where they differ most."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape

import cv2
import numpy as np

from pipeline import storage
from pipeline.records import Instance

CROP_PX = 80
"""Side of a close-up: a little more than a 64 px patch, so that a patch and what surrounds it are seen."""
CROPS_PER_FRAME = 4
LISTED_INSTANCES = 8
"""How many instances of a frame the table names, those that changed most first."""

# Yellow and blue stay apart under every common colour blindness; the dark casing holds both on any photograph.
COARSE_RGB, REFINED_RGB, CASING_RGB = (255, 216, 61), (77, 184, 255), (10, 14, 24)

PICTURE_WIDTH_PX = 1600
PICTURE_SCALE = 4
"""How many pixels of the picture one pixel of the photograph becomes."""


@dataclass(frozen=True, slots=True)
class ReportInstance:
    """One instance before and after."""

    label: str
    coarse: Instance
    refined: Instance
    note: str = ""
    """Anything else worth a table cell, such as `IoU 0.81 to 0.93`."""


@dataclass(frozen=True, slots=True)
class ReportFrame:
    """One photograph with its instances, as the report shows it."""

    name: str
    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    instances: list[ReportInstance]
    caption: str = ""
    """A line below the name: where the photograph is from, what happened to the frame."""


def trace(mask: np.ndarray, origin: tuple[int, int] = (0, 0)) -> list[np.ndarray]:
    """The closed outlines of a mask (h, w) bool, along the edges of its pixels.

    Returns one (N, 2) int array of corners x, y per outline, holes included, shifted by `origin` = (x, y). Corner 0, 0
    is the top left of pixel 0, 0; the first step from every corner 2k is horizontal, the next one vertical.
    """
    padded = np.pad(mask != 0, 1)
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    # Where two pixels touch by their corners only, two outlines (or one twice) pass through the same point.
    passes = (a ^ b ^ c ^ d).astype(np.int8) + 2 * ((a == d) & (b == c) & (a != b))
    corners = np.repeat(np.argwhere(passes), passes[passes > 0], axis=0)[:, ::-1]
    # Along a row of corners, edges and gaps alternate: 1st to 2nd, 3rd to 4th. The same holds down a column.
    across = np.arange(len(corners)) ^ 1
    order = np.lexsort((corners[:, 1], corners[:, 0]))
    down = np.empty_like(across)
    down[order] = order[across]
    across, down = across.tolist(), down.tolist()
    outlines, seen = [], np.zeros(len(corners), bool)
    for start in range(len(corners)):
        if seen[start]:
            continue
        loop, at = [], start
        while not seen[at]:
            loop += [at, across[at]]
            seen[loop[-2:]] = True
            at = down[across[at]]
        outlines.append(corners[loop] + np.array(origin))
    return outlines


def contour_lines(instance: Instance, size: tuple[int, int]) -> list[np.ndarray]:
    """The contour of one mask as open (N, 2) int lines of corners x, y, without what only follows the frame's border.

    `size` is the frame's (height, width). A mask that ends at the border has no boundary there, the photograph has.
    """
    lines = []
    far = np.array(size[::-1])
    for outline in trace(instance.mask, instance.origin):
        after = np.roll(outline, -1, axis=0)
        inside = ~((outline == after) & ((outline == 0) | (outline == far))).any(axis=1)
        # Begin behind a part that is left out, so that no line is torn where the outline happened to begin.
        begin = (int(np.argmin(inside)) + 1) % len(outline)
        closed = np.roll(outline, -begin, axis=0)
        closed = np.concatenate([closed, closed[:1]])
        turns = np.flatnonzero(np.diff(np.pad(np.roll(inside, -begin).astype(np.int8), 1)))
        lines += [closed[start : stop + 1] for start, stop in zip(turns[::2], turns[1::2])]
    return lines


def changed_pixels(instance: ReportInstance, size: tuple[int, int]) -> np.ndarray:
    """Where the refined mask differs from the coarse one, as (H, W) bool for `size` = (height, width)."""
    changed = np.zeros(size, bool)
    for side in (instance.coarse, instance.refined):
        (x, y), (height, width) = side.origin, side.mask.shape
        changed[y : y + height, x : x + width] ^= side.mask
    return changed


def _any(changes: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    total = np.zeros(size, bool)
    for change in changes:
        total |= change
    return total


def choose_windows(change: np.ndarray, side_px: int, limit: int) -> list[tuple[int, int, int, int]]:
    """The windows worth a close-up: where masks differ the most, most first, none overlapping another.

    `change` (H, W) bool says where any instance has changed. Returns at most `limit` boxes x1, y1, x2, y2 of `side_px`
    (or the frame's side where that is shorter), centred on the difference as far as the frame allows.
    """
    frame_height, frame_width = change.shape
    height, width = min(side_px, frame_height), min(side_px, frame_width)
    # Two box filters make a tent: a difference counts the more the closer it is to the middle.
    half = (width // 2 | 1, height // 2 | 1)
    score = change.astype(np.float32)
    for _ in range(2):
        score = cv2.blur(score, half, borderType=cv2.BORDER_CONSTANT)
    top, left = height // 2, width // 2
    score = score[top : frame_height - height + top + 1, left : frame_width - width + left + 1].copy()
    windows = []
    while len(windows) < limit:
        y, x = (int(v) for v in np.unravel_index(np.argmax(score), score.shape))
        if score[y, x] <= 0 or not change[y : y + height, x : x + width].any():
            break
        windows.append((x, y, x + width, y + height))
        score[max(y - height + 1, 0) : y + height, max(x - width + 1, 0) : x + width] = 0
    return windows


def write_report(url: str, frames: Iterable[ReportFrame], title: str, facts: Mapping[str, str]) -> None:
    """Write one self-contained HTML page to `url`: it loads nothing and needs no script. Frames pass one by one.

    `facts` are the figures in the page's head, such as {"frames": "5"}; they are written as they are given.
    """
    with storage.open_write(url) as file:
        for part in _page(frames, title, facts):
            file.write(part.encode())


def _page(frames: Iterable[ReportFrame], title: str, facts: Mapping[str, str]) -> Iterator[str]:
    figures = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    yield (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f'<header><h1>{escape(title)}</h1><dl class="facts">{figures}</dl><p class="legend">'
        '<span><i class="coarse"></i>coarse mask, as it came in</span>'
        '<span><i class="refined"></i>refined mask, as it goes out</span></p></header><main>'
    )
    for number, frame in enumerate(frames):
        yield _section(frame, f"f{number}")
    yield "</main></body></html>\n"


def _section(frame: ReportFrame, key: str) -> str:
    height, width = size = frame.image.shape[:2]
    name = escape(frame.name)
    changes = [changed_pixels(instance, size) for instance in frame.instances]
    total = _any(changes, size)
    counts = [int(np.count_nonzero(change)) for change in changes]
    caption = f"{escape(frame.caption)} · " if frame.caption else ""
    crops = []
    for x1, y1, x2, y2 in choose_windows(total, CROP_PX, CROPS_PER_FRAME):
        inside = [int(np.count_nonzero(change[y1:y2, x1:x2])) for change in changes]
        shown = [escape(frame.instances[i].label) for i in np.argsort(inside, kind="stable")[::-1] if inside[i]]
        labels = ", ".join(dict.fromkeys(shown))
        sides = "".join(
            f'<div><svg viewBox="{x1} {y1} {x2 - x1} {y2 - y1}" role="img" aria-label="Close-up of {labels} in {name} '
            f'with the {side} contour"><use href="#{key}-photo"/><use href="#{key}-{side}"/></svg>'
            f'<span><i class="{side}"></i>{side}</span></div>'
            for side in ("coarse", "refined")
        )
        crops.append(
            f'<figure><div class="pair">{sides}</div><figcaption><b>{labels}</b> at x {x1}, y {y1} · '
            f"{_count(np.count_nonzero(total[y1:y2, x1:x2]), 'pixel')} changed</figcaption></figure>"
        )
    return (
        f'<section aria-labelledby="{key}-name"><h2 id="{key}-name">{name}</h2>'
        f'<p class="caption">{caption}{width} by {height} pixels · '
        f"{_count(len(counts), 'instance')} · {_count(sum(counts), 'pixel')} changed</p>"
        f'<div class="frame"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{name} with the coarse and the '
        f'refined contour of {_count(len(counts), "instance")}" style="max-width:{1.25 * width / height:.3f}em"><defs>'
        f'<image id="{key}-photo" width="{width}" height="{height}" href="{_jpeg_uri(frame.image)}"/>'
        f"{_contours(frame, key, 'coarse')}{_contours(frame, key, 'refined')}</defs>"
        f'<use href="#{key}-photo"/><use class="coarse" href="#{key}-coarse"/>'
        f'<use class="refined" href="#{key}-refined"/></svg>'
        f"<aside>{_toggle(key)}{_table(frame.instances, counts)}</aside></div>"
        f'<div class="crops">{"".join(crops) or "<p>No pixel changed in this frame.</p>"}</div></section>'
    )


def _contours(frame: ReportFrame, key: str, side: str) -> str:
    """All contours of one side as a group to be used by reference: a path, drawn as casing and as line."""
    path = []
    for instance in frame.instances:
        one: Instance = getattr(instance, side)
        for line in contour_lines(one, frame.image.shape[:2]):
            path.append(f"M{line[0, 0]} {line[0, 1]}")
            path += [f"h{dx}" if dx else f"v{dy}" for dx, dy in np.diff(line, axis=0).tolist()]
    return (
        f'<path id="{key}-{side}-path" d="{"".join(path)}"/><g id="{key}-{side}">'
        f'<use class="casing" href="#{key}-{side}-path"/><use class="line {side}" href="#{key}-{side}-path"/></g>'
    )


def _toggle(key: str) -> str:
    radios = "".join(
        f'<label><input type="radio" name="{key}-show" value="{choice}"{" checked" if choice == "both" else ""}>'
        f"{choice.capitalize()}</label>"
        for choice in ("both", "coarse", "refined", "none")
    )
    return f"<fieldset><legend>Contours shown</legend>{radios}</fieldset>"


def _table(instances: list[ReportInstance], changed: list[int]) -> str:
    order = np.argsort(changed, kind="stable")[::-1].tolist()
    rows = "".join(
        f"<tr><td>{escape(one.label)}{f'<small>{escape(one.note)}</small>' if one.note else ''}</td>"
        f"<td>{one.coarse.area:,}</td><td>{one.refined.area:,}</td><td>{changed[i]:,}</td></tr>"
        for i in order[:LISTED_INSTANCES]
        for one in [instances[i]]
    )
    left = order[LISTED_INSTANCES:]
    if left:
        rows += f"<tr><td>and {len(left)} more</td><td></td><td></td><td>{sum(changed[i] for i in left):,}</td></tr>"
    return (
        '<table><caption>Pixels per instance</caption><thead><tr><th scope="col">Instance</th>'
        '<th scope="col">Coarse</th><th scope="col">Refined</th><th scope="col">Changed</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _jpeg_uri(image: np.ndarray) -> str:
    # Full colour resolution: the close-ups would show halved chroma as a seam beside the contour.
    flags = [cv2.IMWRITE_JPEG_QUALITY, 92, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), flags)[1]
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def write_picture(url: str, frames: Iterable[ReportFrame], pairs: int = 2) -> None:
    """Write one 1600 px wide PNG: the most telling close-up of each of the `pairs` frames that have the largest.

    Each is shown twice, with the coarse and with the refined contour; raises ValueError where no mask has changed.
    """
    gap = 16
    tile = (PICTURE_WIDTH_PX - (2 * pairs + 1) * gap) // (2 * pairs)
    best: list[tuple[int, list[np.ndarray]]] = []
    for frame in frames:
        size = frame.image.shape[:2]
        change = _any((changed_pixels(one, size) for one in frame.instances), size)
        for x1, y1, x2, y2 in choose_windows(change, tile // PICTURE_SCALE, 1):
            close_ups = [_close_up(frame, side, (x1, y1, x2, y2)) for side in ("coarse", "refined")]
            best.append((np.count_nonzero(change[y1:y2, x1:x2]), close_ups))
    if not best:
        raise ValueError("no mask has changed: there is nothing to picture")
    best.sort(key=lambda item: -item[0])
    canvas = np.full((tile + 2 * gap + 44, PICTURE_WIDTH_PX, 3), 255, np.uint8)
    for number, close_up in enumerate(close_up for _, close_ups in best[:pairs] for close_up in close_ups):
        name, colour = ("refined", REFINED_RGB) if number % 2 else ("coarse", COARSE_RGB)
        x, y = gap + number * (tile + gap), tile + gap + 36
        canvas[gap : gap + close_up.shape[0], x : x + close_up.shape[1]] = close_up
        cv2.line(canvas, (x + 4, y - 7), (x + 40, y - 7), CASING_RGB, 7, cv2.LINE_AA)
        cv2.line(canvas, (x + 4, y - 7), (x + 40, y - 7), colour, 4, cv2.LINE_AA)
        cv2.putText(canvas, f"{name} mask", (x + 54, y), cv2.FONT_HERSHEY_SIMPLEX, 0.7, CASING_RGB, 1, cv2.LINE_AA)
    storage.put(url, cv2.imencode(".png", canvas[..., ::-1])[1].tobytes())


def _close_up(frame: ReportFrame, side: str, window: tuple[int, int, int, int]) -> np.ndarray:
    """The window x1, y1, x2, y2 of a frame with the contours of one side, PICTURE_SCALE times as large, uint8 RGB."""
    x1, y1, x2, y2 = window
    cut = np.ascontiguousarray(frame.image[y1:y2, x1:x2])
    large = np.repeat(np.repeat(cut, PICTURE_SCALE, axis=0), PICTURE_SCALE, axis=1)
    sides: list[Instance] = [getattr(one, side) for one in frame.instances]
    lines = [line for one in sides for line in contour_lines(one, frame.image.shape[:2])]
    lines = [((line - (x1, y1)) * PICTURE_SCALE).astype(np.int32) for line in lines]
    cv2.polylines(large, lines, False, CASING_RGB, 4, cv2.LINE_AA)
    cv2.polylines(large, lines, False, COARSE_RGB if side == "coarse" else REFINED_RGB, 2, cv2.LINE_AA)
    return large


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


_STYLE = (
    f""":root{{--coarse:{_css(COARSE_RGB)};--refined:{_css(REFINED_RGB)};--casing:{_css(CASING_RGB)};
--paper:#f6f7f9;--card:#fff;--ink:#141a26;--soft:#5a6478;--edge:#d9dee7}}"""
    + """
@media(prefers-color-scheme:dark){:root{--paper:#0e1219;--card:#171d28;--ink:#e8ecf3;--soft:#9aa6ba;--edge:#2a3343}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main{max-width:80rem;margin:auto;padding:0 1.5rem}
h1{margin:2.5rem 0 1rem;font-size:2rem;line-height:1.2;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{margin:0;font-size:1.35rem;overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:.75rem 2.5rem;margin:0 0 1.25rem}
.facts dt,.caption,figcaption,caption,legend,small{color:var(--soft);font-size:.875rem}
.facts dd{margin:0;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;gap:.5rem 2rem;margin:0 0 1.5rem}
i{display:inline-block;width:1.75rem;height:.4rem;margin-right:.6rem;vertical-align:middle;border-radius:.2rem;
box-shadow:0 0 0 1.5px var(--casing)}
i.coarse{background:var(--coarse)}i.refined{background:var(--refined)}
section{margin:0 0 2rem;padding:1.5rem;background:var(--card);border:1px solid var(--edge);border-radius:.75rem}
.caption{margin:.15rem 0 1rem}
.frame{display:flex;gap:2rem;align-items:flex-start}aside{flex:1 0 20rem}
svg{display:block;width:100%;height:auto;border-radius:.35rem;overflow:hidden;fill:none;stroke-linejoin:round}
.frame>svg{--line:1.4px;--cased:2.6px;flex:100 1 0;font-size:32rem}
.casing{stroke:var(--casing);stroke-width:var(--cased);stroke-opacity:.75}
.line{stroke-width:var(--line)}.line.coarse{stroke:var(--coarse)}.line.refined{stroke:var(--refined)}
path{vector-effect:non-scaling-stroke}
section:has([value=coarse]:checked) .frame use.refined:not(.line),
section:has([value=refined]:checked) .frame use.coarse:not(.line),
section:has([value=none]:checked) .frame :is(use.coarse,use.refined):not(.line){display:none}
fieldset{display:flex;flex-wrap:wrap;gap:.25rem .9rem;margin:0 0 1rem;padding:0;border:0;font-size:.9rem}
label{display:inline-flex;gap:.2rem;align-items:center;cursor:pointer}
input{accent-color:var(--refined)}
table{width:100%;border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{padding-bottom:.35rem;text-align:left}
th,td{padding:.3rem 0 .3rem 1rem;border-top:1px solid var(--edge);text-align:right;font-weight:400;vertical-align:top}
th{color:var(--soft)}th:first-child,td:first-child{padding-left:0;text-align:left;overflow-wrap:anywhere}
small{display:block}
.crops{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr));gap:1.5rem;margin-top:1.5rem}
figure{margin:0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.5rem}
.pair div{position:relative}
.pair svg{--line:2px;--cased:4px;image-rendering:pixelated}
.pair span{position:absolute;left:.5rem;bottom:.5rem;padding:.1rem .6rem;border-radius:1rem;color:#fff;font-size:.8rem;
background:rgba(10,14,24,.78)}
.pair i{width:1.1rem;height:.25rem;margin-right:.45rem}
figcaption{margin-top:.4rem}figcaption b{color:var(--ink)}
@media(max-width:56rem){.frame{flex-direction:column}.frame>svg,aside{flex:none;width:100%}section{padding:1rem}
header,main{padding:0 .75rem}}
@media print{section{break-inside:avoid}aside fieldset{display:none}}
"""
)
