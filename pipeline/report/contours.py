"""Where the contours of masks run, and where two masks differ the most."""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.records import Instance

# Yellow, blue and pink stay apart under every common colour blindness; the dark casing holds all on any photograph.
COARSE_RGB, REFINED_RGB, TRUTH_RGB, CASING_RGB = (255, 216, 61), (77, 184, 255), (255, 110, 180), (10, 14, 24)


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


def relative_path(line: np.ndarray) -> str:
    """The SVG path data of a line (N, 2) int of corners x, y whose steps are horizontal or vertical."""
    steps = [f"h{dx}" if dx else f"v{dy}" for dx, dy in np.diff(line, axis=0).tolist()]
    return f"M{line[0, 0]} {line[0, 1]}" + "".join(steps)
