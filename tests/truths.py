"""Small generated photographs with ground truth, and predictions for them."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as rle

from tests.conftest import blob


def make_truth(root: Path, frames: int = 4, size: tuple[int, int] = (160, 200), seed: int = 0) -> Path:
    """A COCO ground truth `truth.json` below `root` with bright blobs on dark noise in `images/`; returns the json.

    Every image has one object of category 1 and a crowd.
    """
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(frames):
        mask = blob(*size, rng)
        image = rng.integers(0, 80, (*size, 3), dtype=np.uint8)
        image[mask != 0] += 140
        cv2.imwrite(str(root / "images" / f"frame{i}.png"), image)
        images.append({"id": i + 1, "file_name": f"frame{i}.png", "height": size[0], "width": size[1]})
        crowd = np.zeros(size, np.uint8)
        crowd[:8, :8] = 1
        for number, (part, iscrowd) in enumerate(((mask, 0), (crowd, 1))):
            annotations.append(
                {
                    "id": 10 * i + number + 1,
                    "image_id": i + 1,
                    "category_id": 1,
                    "iscrowd": iscrowd,
                    "segmentation": encode(part),
                    "area": int(part.sum()),
                    "bbox": [0, 0, 1, 1],
                }
            )
    path = root / "truth.json"
    categories = [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def encode(mask: np.ndarray) -> dict[str, object]:
    """Compressed COCO run lengths of a mask (H, W) uint8."""
    encoded = rle.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def true_mask(truth: Path, image_id: int) -> np.ndarray:
    """The mask (H, W) uint8 of the object in an image that `make_truth` made."""
    content = json.loads(truth.read_text())
    found = [a for a in content["annotations"] if a["image_id"] == image_id and not a["iscrowd"]]
    return rle.decode(found[0]["segmentation"])


def predict(truth: Path, shift: int = 3, category: int = 1) -> Path:
    """COCO results beside the ground truth: each object moved to the right by `shift` pixels, and a stray one."""
    content = json.loads(truth.read_text())
    entries = []
    for image in content["images"]:
        mask = np.roll(true_mask(truth, image["id"]), shift, axis=1)
        stray = np.zeros_like(mask)
        stray[-12:, -12:] = 1
        for part, score in ((mask, 0.9), (stray, 0.3)):
            segmentation = encode(part)
            entries.append(
                {"image_id": image["id"], "category_id": category, "segmentation": segmentation, "score": score}
            )
    path = truth.with_name("predicted.json")
    path.write_text(json.dumps(entries))
    return path
