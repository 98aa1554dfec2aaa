"""Made dumps that cost what real ones cost: noise like photographs, objects of real sizes with a mask head's edges."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from model.coarsen import mask_head
from pipeline import rle
from pipeline.config import Format, RefineConfig
from pipeline.records import cut_to_box

DISTINCT = 8
"""Frames drawn; a larger dump repeats them under other names."""


@dataclass(frozen=True)
class Scenery:
    """What the frames of a made dump are like."""

    name: str
    width: int
    height: int
    instances: int
    """Of each frame."""
    extent_px: tuple[float, float, float]
    """Median, least and largest extent of an object; log-normal in between."""
    form: Format
    image_suffix: str
    patches: int
    """About how many a frame has."""
    nms_threshold: float = 0.25
    """The reference's on COCO. It reports about 140 patches for a frame of Cityscapes at it; these frames come near."""


CITYSCAPES = Scenery("cityscapes", 2048, 1024, 20, (90, 20, 600), "cityscapes", ".png", 118)
COCO = Scenery("coco", 640, 480, 7, (70, 20, 400), "coco", ".jpg", 30)


def decoded(scenery: Scenery) -> Scenery:
    """The same frames with next to nothing to decode: images as plain pixels, masks as run lengths."""
    return replace(scenery, name=f"{scenery.name}, decoded", form="coco", image_suffix=".ppm")


@dataclass(frozen=True)
class MadeDump:
    """A dump on disk, and how a job is told of it."""

    root: Path
    scenery: Scenery
    frames: int

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def predictions(self) -> Path:
        return self.root / ("segm.json" if self.scenery.form == "coco" else "coarse")

    def config(self, output: str) -> RefineConfig:
        """The settings of a run on it, with its output in the folder `output` beside it."""
        return RefineConfig(
            predictions=str(self.predictions),
            images=str(self.images),
            output=str(self.root / output),
            image_pattern="made_{image_id:06d}" + self.scenery.image_suffix if self.scenery.form == "coco" else None,
            nms_threshold=self.scenery.nms_threshold,
        )


def make_dump(root: Path, scenery: Scenery, frames: int) -> MadeDump:
    """Draw a dump below `root`, the same each time, replacing what an earlier call has made there."""
    rng = np.random.default_rng(0)
    dump = MadeDump(root, scenery, frames)
    for folder in (dump.images, root / "coarse"):
        shutil.rmtree(folder, ignore_errors=True)
    dump.images.mkdir(parents=True)
    entries: list[dict] = []
    for i in range(min(frames, DISTINCT)):
        image = _encoded(_photograph(scenery, rng), scenery.image_suffix)
        masks = [_object(scenery, rng) for _ in range(scenery.instances)]
        numbers = range(i, frames, DISTINCT)
        _write_same(image, [dump.images / f"made_{number:06d}{scenery.image_suffix}" for number in numbers])
        if scenery.form == "coco":
            entries += _entries(masks, numbers)
        else:
            _write_folder(dump.predictions, masks, numbers)
    if scenery.form == "coco":
        # A detector writes image by image.
        entries.sort(key=lambda entry: entry["image_id"])
        dump.predictions.write_text(json.dumps(entries))
    return dump


def _write_folder(folder: Path, masks: list[np.ndarray], numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for k, mask in enumerate(masks):
        _write_same(_encoded(mask * 255, ".png"), [folder / f"made_{number:06d}_{k}.png" for number in numbers])
    for number in numbers:
        lines = [f"made_{number:06d}_{k}.png {24 + k % 10} {0.99 - 0.01 * k}\n" for k in range(len(masks))]
        (folder / f"made_{number:06d}_pred.txt").write_text("".join(lines))


def _write_same(data: bytes, paths: list[Path]) -> None:
    """Write one file under several names; thousands of frames need the room of a few."""
    paths[0].write_bytes(data)
    for path in paths[1:]:
        os.link(paths[0], path)


def _entries(masks: list[np.ndarray], numbers: range) -> list[dict]:
    height, width = masks[0].shape
    segmentations = [
        {"size": [height, width], "counts": rle.encode(*cut_to_box(mask), width, height)} for mask in masks
    ]
    return [
        {"image_id": number, "category_id": 1 + k, "segmentation": segmentation, "score": 0.99 - 0.01 * k}
        for number in numbers
        for k, segmentation in enumerate(segmentations)
    ]


def _encoded(pixels: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, pixels)[1].tobytes()


def _photograph(scenery: Scenery, rng: np.random.Generator) -> np.ndarray:
    """Noise with the falling spectrum of photographs, so that decoding costs what it costs on them."""
    image = np.full((scenery.height, scenery.width, 3), 110, np.float32)
    for octave in range(9):
        side = 2 ** (10 - octave)
        rows, columns = max(1, scenery.height // side), max(1, scenery.width // side)
        noise = rng.standard_normal((rows, columns, 3)).astype(np.float32)
        grown = cv2.resize(noise, (scenery.width, scenery.height), interpolation=cv2.INTER_CUBIC)
        image += grown * 30 * 0.75**octave
    return image.clip(0, 255).astype(np.uint8)


def _object(scenery: Scenery, rng: np.random.Generator) -> np.ndarray:
    """One smooth object (H, W) uint8 0/1 as a 28x28 mask head would see it."""
    median, least, largest = scenery.extent_px
    extent = float(np.clip(rng.lognormal(np.log(median), 0.8), least, largest))
    margin = scenery.height // 5
    centre = rng.uniform((0, margin), (scenery.width, scenery.height - margin))
    angle = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    waves = sum(rng.uniform(0, 0.25 / k) * np.sin(k * angle + rng.uniform(0, 7)) for k in (2, 3, 5))
    radius = extent / 2 * (1 + waves)
    points = np.stack([np.cos(angle) * radius * rng.uniform(0.5, 1), np.sin(angle) * radius], axis=1) + centre
    mask = np.zeros((scenery.height, scenery.width), np.uint8)
    cv2.fillPoly(mask, [np.rint(points).astype(np.int32)], 1)
    # A mask head sees the object and a little around it, and the window is far less work than the frame.
    x, y, width, height = cv2.boundingRect(mask)
    around = max(width, height) // 3
    window = slice(max(0, y - around), y + height + around), slice(max(0, x - around), x + width + around)
    mask[window] = mask_head(np.ascontiguousarray(mask[window]), rng)
    return mask
