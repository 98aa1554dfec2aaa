"""Small generated images with truths and predictions, and the files from which the official tools read the same."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from pipeline.ground_truth import CITYSCAPES_VOID, TrueFrame, TrueInstance
from pipeline.metrics.overlap import Box, mask_within
from pipeline.records import Frame, Instance, cut_to_box

CATEGORIES = (1, 2, 3, 7)


def true_instance(mask: np.ndarray, category: int = 1, crowd: bool = False, name: str = "1") -> TrueInstance:
    held, origin = cut_to_box(mask)
    return TrueInstance(name, category, held, origin, crowd, int(mask.sum()))


def instance(mask: np.ndarray, category: int = 1, score: float = 0.5, name: str = "0") -> Instance:
    held, origin = cut_to_box(mask)
    return Instance(name, category, score, held, origin)


def frame_of(*instances: Instance, size: tuple[int, int]) -> Frame:
    """A frame of `size` (height, width)."""
    return Frame("frame", "frame.png", size[1], size[0], list(instances))


def whole(region: Any, height: int, width: int) -> np.ndarray:
    """The mask (height, width) uint8 0/1 of an instance in its frame."""
    return mask_within(region, Box(0, 0, width, height)).astype(np.uint8)


def square(left: int, side: int = 30, top: int = 10, size: tuple[int, int] = (60, 100)) -> np.ndarray:
    """A mask of `size` (height, width), bool."""
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


@dataclass
class Scene:
    """A generated data set; predictions of equal score and odd cases are frequent on purpose."""

    truths: list[TrueFrame]
    frames: list[Frame]
    categories: tuple[int, ...] = CATEGORIES
    frequencies: dict[int, str] | None = None

    def annotations(self) -> dict[str, Any]:
        """The ground truth as COCO (or LVIS) json."""
        images, entries = [], []
        for i, truth in enumerate(self.truths):
            image: dict[str, Any] = {"id": i + 1, "file_name": f"{i}.png", "width": truth.width, "height": truth.height}
            if truth.negative_categories is not None:
                image["neg_category_ids"] = sorted(truth.negative_categories)
                image["not_exhaustive_category_ids"] = sorted(truth.not_exhaustive_categories)
            images.append(image)
            for one in truth.instances:
                x, y, (height, width) = *one.origin, one.mask.shape
                entry = {
                    "id": len(entries) + 1,
                    "image_id": i + 1,
                    "category_id": one.category_id,
                    "segmentation": _rle(whole(one, truth.height, truth.width)),
                    "area": one.area,
                    "bbox": [x, y, width, height],
                    "iscrowd": int(one.crowd),
                }
                entries.append(entry)
        categories = [{"id": category, "name": str(category)} for category in self.categories]
        for category in categories:
            if self.frequencies is not None:
                category["frequency"] = self.frequencies[category["id"]]
        return {"images": images, "annotations": entries, "categories": categories, "info": {}}

    def results(self) -> list[dict[str, Any]]:
        """The predictions as COCO results."""
        entries = []
        for i, frame in enumerate(self.frames):
            for one in frame.instances:
                segmentation = _rle(whole(one, frame.height, frame.width))
                entry = {"image_id": i + 1, "category_id": one.category_id, "score": one.score}
                entries.append(entry | {"segmentation": segmentation})
        return entries


def random_scene(seed: int, images: int = 4, lvis: bool = False, blank: bool = True) -> Scene:
    """Truths, crowds among them, and predictions that are near them, doubled, of another class, or nowhere."""
    rng = np.random.default_rng(seed)
    truths, frames = [], []
    for i in range(images):
        height, width = int(rng.integers(90, 150)), int(rng.integers(90, 150))
        objects = [_object(height, width, rng) for _ in range(rng.integers(int(lvis), 7))]
        truth = TrueFrame(width, height, [])
        for mask in objects:
            one = true_instance(mask, int(rng.choice(CATEGORIES[:3])), not lvis and rng.random() < 0.15)
            if rng.random() < 0.3:
                one.area = float(one.area * rng.uniform(0.5, 1.5))
            truth.instances.append(one)
        if lvis:
            truth.negative_categories = frozenset(rng.choice(CATEGORIES, 2).tolist())
            truth.not_exhaustive_categories = frozenset(rng.choice(CATEGORIES[:3], rng.integers(0, 2)).tolist())
        instances = []
        for one, mask in zip(truth.instances * 2, objects * 2):
            if rng.random() < 0.7:
                category = one.category_id if rng.random() < 0.9 else int(rng.choice(CATEGORIES))
                instances.append(instance(_disturbed(mask, rng), category, round(rng.random(), 1)))
        for _ in range(rng.integers(0, 3)):
            instances.append(instance(_object(height, width, rng), int(rng.choice(CATEGORIES)), round(rng.random(), 1)))
        if blank and rng.random() < 0.3:
            instances.append(instance(np.zeros((height, width), bool), 1, 0.7))
        truths.append(truth)
        frames.append(Frame(str(i), f"{i}.png", width, height, [instances[j] for j in rng.permutation(len(instances))]))
    frequencies = dict(zip(CATEGORIES, rng.permutation(["r", "c", "f", "c"]).tolist())) if lvis else None
    return Scene(truths, frames, frequencies=frequencies)


VOID_AND_OTHERS = (0, 4, 7, 7, 23, 29)


def random_street(seed: int, labels: tuple[int, ...] = (24, 26, 33, 29)) -> tuple[np.ndarray, TrueFrame, Frame]:
    """Cityscapes instance ids (H, W) uint16 with objects, groups, small regions and void; and predictions."""
    rng = np.random.default_rng(seed)
    height, width = 90, 140
    ids = np.full((height, width), 7, np.uint16)
    for _ in range(rng.integers(0, 4)):
        ids[_object(height, width, rng)] = rng.choice(VOID_AND_OTHERS)
    for number in range(rng.integers(0, 9)):
        label = int(rng.choice(labels))
        ids[_object(height, width, rng)] = label if rng.random() < 0.25 else label * 1000 + number
    void = np.isin(ids, CITYSCAPES_VOID)
    truth = TrueFrame(width, height, [], void=void)
    instances = []
    for number in np.unique(ids).tolist():
        label = number // 1000 if number >= 1000 else number
        mask = ids == number
        if label >= 24:
            truth.instances.append(true_instance(mask, label, number < 1000, str(number)))
        for _ in range(rng.integers(0, 3)):
            if label >= 24 or rng.random() < 0.3:
                chosen = label if label >= 24 and rng.random() < 0.9 else int(rng.choice(labels))
                instances.append(instance(_disturbed(mask, rng), chosen, round(rng.random(), 1)))
    return ids, truth, Frame(str(seed), f"{seed}.png", width, height, instances)


def write_street(root: Path, name: str, ids: np.ndarray, frame: Frame) -> tuple[str, str]:
    """The files of a frame as the official evaluation wants them: paths of the prediction list and of the id image."""
    truth = root / f"{name}_gtFine_instanceIds.png"
    cv2.imwrite(str(truth), ids)
    lines = []
    for k, one in enumerate(frame.instances):
        cv2.imwrite(str(root / f"{name}_{k}.png"), whole(one, frame.height, frame.width) * 255)
        lines.append(f"{name}_{k}.png {one.category_id} {one.score}\n")
    listing = root / f"{name}_pred.txt"
    listing.write_text("".join(lines))
    return str(listing), str(truth)


def quietly(function: Any, *arguments: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def _rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}


def _object(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """An ellipse or box of any size, perhaps cut by the frame's edge: (height, width) bool, not empty."""
    y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
    tall, wide = (int(np.exp(rng.uniform(np.log(3), np.log(70)))) for _ in range(2))
    mask = np.zeros((height, width), np.uint8)
    if rng.random() < 0.5:
        mask[max(y - tall // 2, 0) : y + tall // 2 + 1, max(x - wide // 2, 0) : x + wide // 2 + 1] = 1
    else:
        cv2.ellipse(mask, (x, y), (wide // 2, tall // 2), float(rng.uniform(0, 180)), 0, 360, 1, -1)
    return mask != 0


def _disturbed(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mask moved by some pixels, grown or shrunk, or with noise along its boundary."""
    out = np.roll(mask, tuple(int(step) for step in rng.integers(-2, 3, 2)), axis=(0, 1)).astype(np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    way = rng.random()
    if way < 0.3:
        out = cv2.dilate(out, kernel)
    elif way < 0.6:
        out = cv2.erode(out, kernel)
    elif way < 0.8:
        out ^= ((rng.random(out.shape) < 0.2) & (cv2.dilate(out, kernel) != cv2.erode(out, kernel))).astype(np.uint8)
    return out != 0
