"""The page of few photographs: each whole with all its contours, and closer where they differ the most."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape

import cv2
import numpy as np

from pipeline import storage
from pipeline.metrics.overlap import Box, mask_within
from pipeline.records import InputError, Instance
from pipeline.report.contours import CASING_RGB, COARSE_RGB, REFINED_RGB, choose_windows, contour_lines, relative_path
from pipeline.report.shell import CLOSING, opening
from pipeline.report.style import FRAMES_STYLE

CROP_PX = 80
"""Side of a close-up: a little more than a 64 px patch, so that a patch and what surrounds it are seen."""
CROPS_PER_FRAME = 4
LISTED_INSTANCES = 8
"""How many instances of a frame the table names, those that changed most first."""

PICTURE_WIDTH_PX = 1600
PICTURE_SCALE = 4
"""How many pixels of the picture one pixel of the photograph becomes."""


@dataclass(frozen=True, slots=True)
class ReportInstance:
    """One instance before and after."""

    label: str
    coarse: Instance
    refined: Instance


@dataclass(frozen=True, slots=True)
class ReportFrame:
    """One photograph with its instances, as the report shows it."""

    name: str
    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    instances: list[ReportInstance]
    caption: str = ""
    """A line below the name: where the photograph is from, what happened to the frame."""


def change_of(instance: ReportInstance, size: tuple[int, int]) -> np.ndarray:
    """Where the refined mask differs from the coarse one, as (H, W) bool for `size` = (height, width)."""
    whole = Box(0, 0, size[1], size[0])
    return mask_within(instance.coarse, whole) != mask_within(instance.refined, whole)


def _any(changes: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    total = np.zeros(size, bool)
    for change in changes:
        total |= change
    return total


def write_report(url: str, frames: Iterable[ReportFrame], title: str, facts: Mapping[str, str]) -> None:
    """Write one self-contained HTML page to `url`: it loads nothing and needs no script. Frames pass one by one.

    `facts` are the figures in the page's head, such as {"frames": "5"}; they are written as they are given.
    """
    with storage.open_write(url) as file:
        for part in _page(frames, title, facts):
            file.write(part.encode())


def _page(frames: Iterable[ReportFrame], title: str, facts: Mapping[str, str]) -> Iterator[str]:
    yield opening(title, facts, FRAMES_STYLE)
    for number, frame in enumerate(frames):
        yield _section(frame, f"f{number}")
    yield CLOSING


def _section(frame: ReportFrame, key: str) -> str:
    height, width = size = frame.image.shape[:2]
    name = escape(frame.name)
    changes = [change_of(instance, size) for instance in frame.instances]
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
        f'<section class="panel" aria-labelledby="{key}-name"><h2 id="{key}-name">{name}</h2>'
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
    sides: list[Instance] = [getattr(one, side) for one in frame.instances]
    lines = [relative_path(line) for one in sides for line in contour_lines(one, frame.image.shape[:2])]
    return (
        f'<path id="{key}-{side}-path" d="{"".join(lines)}"/><g id="{key}-{side}">'
        f'<use class="casing" href="#{key}-{side}-path"/><use class="line {side}" href="#{key}-{side}-path"/></g>'
    )


def _toggle(key: str) -> str:
    radios = "".join(
        f'<label><input type="radio" name="{key}-show" value="{choice}"{" checked" if choice == "both" else ""}>'
        f"{choice.capitalize()}</label>"
        for choice in ("both", "coarse", "refined", "none")
    )
    return f'<fieldset class="shown"><legend>Contours shown</legend>{radios}</fieldset>'


def _table(instances: list[ReportInstance], changed: list[int]) -> str:
    order = np.argsort(changed, kind="stable")[::-1].tolist()
    rows = "".join(
        f"<tr><td>{escape(one.label)}</td>"
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

    Each is shown twice, with the coarse and with the refined contour; InputError where no mask has changed.
    """
    gap = 16
    tile = (PICTURE_WIDTH_PX - (2 * pairs + 1) * gap) // (2 * pairs)
    best: list[tuple[int, list[np.ndarray]]] = []
    for frame in frames:
        size = frame.image.shape[:2]
        change = _any((change_of(one, size) for one in frame.instances), size)
        for x1, y1, x2, y2 in choose_windows(change, tile // PICTURE_SCALE, 1):
            close_ups = [_close_up(frame, side, (x1, y1, x2, y2)) for side in ("coarse", "refined")]
            best.append((np.count_nonzero(change[y1:y2, x1:x2]), close_ups))
    if not best:
        raise InputError(f"{url}: no mask has changed, expected one to picture")
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
    part = np.ascontiguousarray(frame.image[y1:y2, x1:x2])
    large = np.repeat(np.repeat(part, PICTURE_SCALE, axis=0), PICTURE_SCALE, axis=1)
    sides: list[Instance] = [getattr(one, side) for one in frame.instances]
    lines = [line for one in sides for line in contour_lines(one, frame.image.shape[:2])]
    lines = [((line - (x1, y1)) * PICTURE_SCALE).astype(np.int32) for line in lines]
    cv2.polylines(large, lines, False, CASING_RGB, 4, cv2.LINE_AA)
    cv2.polylines(large, lines, False, COARSE_RGB if side == "coarse" else REFINED_RGB, 2, cv2.LINE_AA)
    return large
