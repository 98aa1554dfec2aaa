"""What Ultralytics YOLO writes: `predictions.json` of `val save_json=True`, and `labels/*.txt` of `save_txt=True`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import cv2
import numpy as np

from pipeline import storage
from pipeline.confine import inside
from pipeline.conversion.entries import Entry, of_mask, results
from pipeline.conversion.image_list import ImageList, one_each, stem
from pipeline.images import decode_image
from pipeline.records import InputError, cut_to_box

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

SLACK = 0.01
"""How far outside the image, as a share of its side, a point may lie: older versions do not clip them."""


def entries(url: str, listed: ImageList, images: str | None) -> Iterator[tuple[str, Entry]]:
    """The instances of the json, or of a folder of label files, whose images lie below the folder `images`.

    The json calls an image by its file's name, as a number where it is one; its categories are passed on. Label files
    have labels from 0; a line without a polygon of three points is an instance with an empty mask.
    """
    if storage.is_dir(url):
        yield from _of_labels(url, listed, images)
        return
    if images is not None:
        raise InputError(f"images is for a folder of label files; {url} is a file")
    for place, entry in results(url):
        name = entry.get("file_name")
        key = stem(name) if listed.url and isinstance(name, str) else entry.get("image_id")
        yield place, entry | {"image_id": listed.image_id(place, key) if type(key) in (int, str) else key}


def _of_labels(url: str, listed: ImageList, images: str | None) -> Iterator[tuple[str, Entry]]:
    if images is None:
        raise InputError(f"{url}: label files do not tell the size of their images: expected --images, their folder")
    files = storage.find(url, (".txt",))
    if not files:
        raise InputError(f"{url}: expected .txt files, as save_txt=True writes below labels/")
    found: dict[str, list[str]] = {}
    for path in storage.find(images, IMAGES):
        found.setdefault(stem(path), []).append(path)
    for name, file in one_each(url, files):
        if len(found.get(name, ())) != 1:
            known = " and ".join(found.get(name, ())) or "none"
            raise InputError(f"{file}: expected one image named {name} below {images}, found {known}")
        height, width = decode_image(inside(images, found[name][0])).shape[:2]
        image_id = listed.image_id(file, name)
        try:
            lines = storage.read(file).decode().splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{file}: expected text in UTF-8") from None
        for number, line in enumerate(lines, 1):
            if fields := line.split():
                place = f"{file}:{number}"
                label, points, score = _parsed(place, fields)
                mask, origin = _filled(points, width, height)
                entry = {"image_id": image_id, "category_id": listed.category(place, label)}
                yield place, entry | of_mask(mask, origin, width, height) | ({} if score is None else {"score": score})


def _parsed(place: str, fields: list[str]) -> tuple[int, np.ndarray, float | None]:
    """Label, points (n, 2) as shares of the image's sides, and the score where the line has one."""
    try:
        label, values = int(fields[0]), [float(field) for field in fields[1:]]
    except ValueError:
        raise InputError(f"{place}: expected 'class x1 y1 x2 y2 ... [confidence]' in numbers") from None
    score = values.pop() if len(values) % 2 else None
    if score is not None and not 0 <= score <= 1:
        raise InputError(f"{place}: expected a confidence from 0 to 1, found {score:g}; track ids are not read")
    if not all(math.isfinite(value) and -SLACK <= value <= 1 + SLACK for value in values):
        raise InputError(f"{place}: expected coordinates from 0 to 1; track ids are not read")
    return label, np.array(values, float).reshape(-1, 2), score


def _filled(points: np.ndarray, width: int, height: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The mask (h, w) bool within an outline, and its (x, y): points are the outermost pixels, as OpenCV finds them."""
    if len(points) < 3:
        return np.zeros((0, 0), bool), (0, 0)
    pixels = np.rint(points * (width, height)).astype(np.int32).clip(0, (width - 1, height - 1))
    corner = pixels.min(axis=0)
    box = np.zeros(pixels.max(axis=0)[::-1] - corner[::-1] + 1, np.uint8)
    cv2.fillPoly(box, [pixels - corner], 1)
    mask, (x, y) = cut_to_box(box)
    return mask, (x + int(corner[0]), y + int(corner[1]))
