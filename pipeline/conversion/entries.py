"""One instance on its way into a COCO results json, and where it comes from in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline import rle
from pipeline.formats import json_list
from pipeline.records import InputError

Entry = dict[str, Any]
"""Keys as in COCO's results."""


def results(url: str) -> Iterator[tuple[str, Entry]]:
    """The entries of a file that is a COCO results json already, each with its place; one at a time."""
    for number, (_, _, entry) in enumerate(json_list.scan(url)):
        yield f"{url}: entry {number}", entry


def of_mask(mask: np.ndarray, origin: tuple[int, int], width: int, height: int) -> Entry:
    """The `segmentation` of a mask (h, w) bool at `origin` (x, y) in its frame."""
    return {"segmentation": {"size": [height, width], "counts": rle.encode(mask, origin, width, height)}}


def is_empty(entry: Entry) -> bool:
    """Whether a checked entry has a mask without pixels."""
    segmentation = entry["segmentation"]
    return rle.is_empty(segmentation["counts"]) if isinstance(segmentation, dict) else not segmentation


def check_entry(place: str, entry: Entry) -> None:
    """Raise InputError where an entry is not one that `refine` could find, or has no mask.

    Whether run lengths fit the image is seen when they are refined.
    """
    image_id, category, score = entry.get("image_id"), entry.get("category_id"), entry.get("score", 1.0)
    if type(image_id) not in (int, str):
        raise InputError(f"{place}: expected a whole number or text as image_id, found {image_id!r:.40}")
    if type(category) is not int:
        raise InputError(f"{place}: expected a whole number as category_id, found {category!r:.40}")
    if type(score) not in (int, float) or not math.isfinite(score):
        raise InputError(f"{place}: expected a finite number as score, found {score!r:.40}")
    segmentation = entry.get("segmentation")
    if segmentation is None:
        raise InputError(f"{place}: expected a segmentation; boxes alone cannot be refined")
    if isinstance(segmentation, dict) and "size" in segmentation and isinstance(segmentation.get("counts"), str | list):
        return
    if not isinstance(segmentation, list):
        expected = "run lengths {size, counts} or polygons"
        raise InputError(f"{place}: expected {expected} as segmentation, found {segmentation!r:.40}")
