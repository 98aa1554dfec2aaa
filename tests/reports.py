"""A report with one of everything, from generated photographs."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from pipeline.records import Instance, cut_to_box
from pipeline.report import Bar, BarGroup, Card, Delta, Gallery, Histogram, Report, Table, make_card

EVIL = "</script><script>alert(1)</script>\"'<img src=x onerror=alert(2)>&amp;{{}}${1}"
"""A file may be called that."""


def photograph(seed: int = 0, size: tuple[int, int] = (240, 320)) -> np.ndarray:
    """A red disc on a blue-green ground, (H, W, 3) uint8 RGB."""
    rng = np.random.default_rng(seed)
    image = np.empty((*size, 3), np.uint8)
    image[:] = (40, 120 + 10 * (seed % 8), 150)
    cv2.circle(image, (size[1] // 2, size[0] // 2), size[0] // 4, (200, 40, 40), -1)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def disc(size: tuple[int, int], shift: int, radius: int) -> Instance:
    """A disc near the middle of the frame."""
    mask = np.zeros(size, np.uint8)
    cv2.circle(mask, (size[1] // 2 + shift, size[0] // 2), radius, 1, -1)
    return Instance("0", 24, 0.9, *cut_to_box(mask))


def a_card(image: np.ndarray, label: str = "car, street", note: str = "IoU 0.81 to 0.93", truth: bool = True) -> Card:
    """The card of a disc that was shifted and is no more."""
    size = image.shape[:2]
    radius = size[0] // 4
    right = disc(size, 0, radius)
    return make_card(label, note, image, disc(size, 8, radius), right, right if truth else None)


def a_report(text: str = "", truth: bool = True, cards: Sequence[Card] | None = None) -> Report:
    """One of everything, `text` in every text. Three galleries of three cards and an empty one, or four of `cards`."""
    last = cards or []
    if cards is None:
        cards = [a_card(photograph(i), f"car {i} {text}", f"IoU 0.81 {text}", truth) for i in range(3)]
    titles = ("Largest gains", "Largest losses", "Least confident")
    galleries = [Gallery(f"{title} {text}", f"Why these. {text}", cards) for title in titles]
    return Report(
        f"Report {text}",
        {f"frames {text}": f"500 {text}"},
        f"It helped. {text}",
        [Delta(f"AP {text}", 36.4, 37.9), Delta("Boundary AP", 21.3, 27.9)],
        [BarGroup(f"AP by class {text}", [Bar(f"car {text}", 1, 2), Bar("bus", 5, 4)], note=f"n {text}")],
        [Histogram(f"Change in IoU {text}", [-0.1, 0, 0.1], [3, 7], f"70 % rose {text}")],
        [*galleries, Gallery("Rejected", "None of them.", last)],
        [
            Table(
                f"Set aside {text}", [f"Frame {text}", "Line"], [[f"a {text}", 3], ["b", 1], ["c", 2]], note=f"3 {text}"
            )
        ],
    )
