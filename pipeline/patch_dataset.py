"""Training patches cut from photographs with precise masks, coarse masks being made on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from pycocotools import mask as rle

from model.augment import augment
from model.coarsen import coarsen
from pipeline import storage
from pipeline.patches import crop
from pipeline.proposals import PATCH_PX, propose
from pipeline.records import InputError
from pipeline.stages import decode_image

MIN_IOU = 0.5
"""A coarse mask that overlaps its target less teaches nothing (the reference's rule)."""


@dataclass(frozen=True)
class Annotation:
    """One object of a ground truth: its precise mask, and where its image lies."""

    image_path: str
    segmentation: dict
    """COCO run-length encoding."""
    category: str


def load_annotations(annotations_path: str, image_root: str) -> list[Annotation]:
    """Every non-crowd RLE annotation of a COCO ground-truth json, in the file's order.

    Raises InputError where the file is missing, is not such a json, or holds no annotation.
    """
    try:
        content = json.loads(storage.read(annotations_path))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        categories = {category["id"]: category["name"] for category in content["categories"]}
        annotations = [entry for entry in content["annotations"] if isinstance(entry["segmentation"], dict)]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{annotations_path}: expected a COCO ground-truth json ({reason})") from None
    found = [
        Annotation(
            storage.join(image_root, names[entry["image_id"]]), entry["segmentation"], categories[entry["category_id"]]
        )
        for entry in annotations
        if not entry.get("iscrowd", 0)
    ]
    if not found:
        raise InputError(f"{annotations_path}: no RLE annotation")
    return found


def training_patches(
    image: np.ndarray, coarse: np.ndarray, target: np.ndarray, nms_threshold: float, padding: int = 0
) -> np.ndarray:
    """Cut the boundary patches of one instance with their targets: (N, P, P, 5) uint8, RGB, coarse 0/1, target 0/1.

    `image` is (H, W, 3) uint8, `coarse` and `target` (H, W) uint8 0/1 on the same frame.
    """
    x, y, w, h = cv2.boundingRect(coarse)
    inside = coarse[y : y + h, x : x + w]
    boxes = propose(inside, (x, y), coarse.shape[::-1], nms_threshold)
    patches = crop(image, inside, (x, y), boxes, padding)
    targets = crop(image, target, (0, 0), boxes, padding)[..., 3:]
    return np.concatenate([patches, targets], axis=-1)


def _visit(annotation: Annotation, rng: np.random.Generator, per_visit: int) -> np.ndarray:
    """Patches of one mask at a random scale under a fresh coarse mask; none where the coarse mask is too far off."""
    image = decode_image(annotation.image_path)
    scale = rng.uniform(0.5, 1.2)
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    target = cv2.resize(rle.decode(annotation.segmentation), image.shape[1::-1], interpolation=cv2.INTER_AREA)
    if not target.any():
        return np.zeros((0, PATCH_PX, PATCH_PX, 5), np.uint8)
    coarse = coarsen(target, rng)
    if (coarse & target).sum() <= MIN_IOU * (coarse | target).sum():
        return np.zeros((0, PATCH_PX, PATCH_PX, 5), np.uint8)
    patches = training_patches(image, coarse, target, nms_threshold=0.25)
    return patches[rng.permutation(len(patches))[:per_visit]]


def stream(
    sources: list[Annotation],
    batch_size: int,
    seed: int,
    *,
    side_px: int = PATCH_PX,
    per_visit: int = 24,
    buffer: int = 2048,
) -> Iterator[np.ndarray]:
    """Endless shuffled, augmented batches (batch_size, side_px, side_px, 5) uint8 over all annotations.

    Every pass visits the objects in a new order, at a new scale and under new coarse masks. `side_px` below 64 px
    cuts the middle out of each patch: cheaper steps at the same magnification.
    """
    rng = np.random.default_rng(seed)
    pool = np.zeros((0, side_px, side_px, 5), np.uint8)
    margin = (PATCH_PX - side_px) // 2
    while True:
        for i in rng.permutation(len(sources)):
            fresh = _visit(sources[i], rng, per_visit)
            pool = np.concatenate([pool, fresh[:, margin : PATCH_PX - margin, margin : PATCH_PX - margin]])
            while len(pool) >= buffer:
                chosen = rng.permutation(len(pool))
                batch, pool = pool[chosen[:batch_size]], pool[chosen[batch_size:]]
                yield augment(batch, rng)
