"""The stages every frame passes: extract, refine, assemble, commit. Plain functions; where they run is flow.py's."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline import storage
from pipeline.formats import Reader, Writer
from pipeline.guard import GuardConfig, judge, passed_over
from pipeline.patches import crop, paste
from pipeline.proposals import PATCH_PX, boundary_strength, propose
from pipeline.records import Frame, FrameRef, InputError, Instance, cut_to_box

if TYPE_CHECKING:  # torch stays out of the processes that only cut and paste
    from model import Refiner


@dataclass(frozen=True)
class Cutting:
    """How patches are cut, for every instance alike."""

    nms_threshold: float
    patch_px: int = PATCH_PX
    padding: int = 0
    parity: bool = False

    @property
    def frame_bytes(self) -> int:
        """Bytes of the patches of a frame with many of them, by which memory is planned."""
        return 400 * 4 * (self.patch_px + 2 * self.padding) ** 2


@dataclass(slots=True)
class Work:
    """One frame on its way through the stages, without its image."""

    frame_id: str
    frame: Frame | None = None
    boxes: list[np.ndarray] = field(default_factory=list)
    """Per instance the (n, 4) int32 boxes of its patches; the patches themselves travel beside, in this order."""
    error: str = ""
    """Why the frame is set aside; empty while all is well."""
    seconds: dict[str, float] = field(default_factory=dict)
    refined_at: float = 0.0
    """Unix time at which its patches left the network."""
    file_name: str = ""
    identity: str = ""
    """What its inputs were when it was read."""

    @property
    def patches(self) -> int:
        return sum(map(len, self.boxes))


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the driver is told about a frame that is finished or set aside."""

    frame_id: str
    error: str
    part: str
    instances: int
    refined: int
    patches: int
    seconds: dict[str, float]
    refined_at: float
    reasons: dict[str, int] = field(default_factory=dict)
    """Number of instances that have a reason (`guard.REASONS`), by reason."""
    file_name: str = ""
    identity: str = ""
    """What the frame's inputs were (`pipeline.identity`); empty where it was set aside."""


@contextmanager
def _timed(work: Work, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        work.seconds[stage] = work.seconds.get(stage, 0.0) + time.perf_counter() - started


def decode_image(url: str) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB; InputError names a file that is missing or cannot be decoded."""
    try:
        image = cv2.imdecode(np.frombuffer(storage.read(url), np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # an empty file
        image = None
    if image is None:
        raise InputError(f"{url}: expected an image that OpenCV can decode")
    return image


def cut(
    image: np.ndarray, instances: Sequence[Instance], cutting: Cutting, guard: GuardConfig
) -> tuple[list[np.ndarray], np.ndarray]:
    """The boxes (n, 4) of each instance and all their patches (N, P, P, 4) uint8, in the order of the instances.

    Instances that the guard passes over have none.
    """
    size = image.shape[1], image.shape[0]
    side = cutting.patch_px + 2 * cutting.padding
    boxes, patches = [], [np.zeros((0, side, side, 4), np.uint8)]
    for instance in instances:
        if passed_over(instance.mask, guard):
            boxes.append(np.zeros((0, 4), np.int32))
            continue
        found = propose(
            instance.mask,
            instance.origin,
            size,
            cutting.nms_threshold,
            patch_px=cutting.patch_px,
            parity=cutting.parity,
        )
        boxes.append(found)
        patches.append(crop(image, instance.mask, instance.origin, found, cutting.padding))
    return boxes, np.concatenate(patches)


def extract(
    ref: FrameRef, reader: Reader, images: str, cutting: Cutting, guard: GuardConfig
) -> tuple[Work, np.ndarray]:
    """Read one frame and cut its patches (N, P, P, 4) uint8. Whatever is wrong with it becomes `Work.error`."""
    work = Work(ref.frame_id, file_name=ref.file_name)
    patches = np.zeros((0, *(cutting.patch_px + 2 * cutting.padding,) * 2, 4), np.uint8)
    with _timed(work, "extract"):
        try:
            image = decode_image(storage.join(images, ref.file_name))
            height, width = image.shape[:2]
            instances = reader.read(ref, width, height)
            boxes, patches = cut(image, instances, cutting, guard)
            work.identity = reader.identity(ref, instances)
            work.frame, work.boxes = Frame(ref.frame_id, ref.file_name, width, height, instances), boxes
        except InputError as error:
            work.error = str(error)
        except Exception as error:  # one frame must never stop the others
            work.error = f"{ref.file_name}: {type(error).__name__}: {' '.join(str(error).split())}"
    return work, patches


def refine(works: Sequence[Work], patches: Sequence[np.ndarray], refiner: Refiner, padding: int) -> list[np.ndarray]:
    """Foreground probabilities (n, P, P) uint16 of each frame's patches; all frames share the network's batches."""
    started = time.perf_counter()
    counts = [len(part) for part in patches]
    probabilities = refiner.probabilities(np.concatenate(patches))
    if padding:
        probabilities = np.ascontiguousarray(probabilities[:, padding:-padding, padding:-padding])
    each = (time.perf_counter() - started) / max(1, sum(counts))
    for work, count in zip(works, counts):
        work.seconds["refine"], work.refined_at = each * count, time.time()
    ends = np.cumsum(counts)
    return [probabilities[end - count : end] for end, count in zip(ends, counts)]


def assemble(work: Work, probabilities: np.ndarray, guard: GuardConfig) -> None:
    """Replace a frame's coarse masks by refined ones, given the probabilities (N, P, P) uint16 of all its patches.

    Masks that the guard rejects stay as they were.
    """
    if work.frame is None:
        return
    with _timed(work, "assemble"):
        start = 0
        for instance, boxes in zip(work.frame.instances, work.boxes):
            part = probabilities[start : start + len(boxes)]
            start += len(boxes)
            # A dump that was refined before brings the old verdicts along.
            instance.status, instance.reason = "kept", passed_over(instance.mask, guard)
            instance.changed_pixels, instance.confidence = 0, 1.0
            if len(boxes):
                _replace(instance, (work.frame.width, work.frame.height), boxes, part, guard)


def _replace(
    instance: Instance, size: tuple[int, int], boxes: np.ndarray, probabilities: np.ndarray, guard: GuardConfig
) -> None:
    (x0, y0), (height, width) = instance.origin, instance.mask.shape
    refined, (left, top), mean = paste(instance.mask, (x0, y0), size, boxes, probabilities)
    coarse = np.zeros_like(refined)
    coarse[y0 - top : y0 - top + height, x0 - left : x0 - left + width] = instance.mask
    band = (boundary_strength(refined) > 0) & ~np.isnan(mean)
    instance.confidence = float(np.abs(2 * mean[band] - 1).mean()) if band.any() else 1.0
    mask, instance.status, instance.reason = judge(coarse, refined, mean, guard)
    if instance.status == "refined":
        instance.changed_pixels = int(np.count_nonzero(mask != coarse))
        instance.mask, (x, y) = cut_to_box(mask)
        instance.origin = (left + x, top + y) if instance.mask.size else (0, 0)


def commit(works: Sequence[Work], writer: Writer) -> list[Receipt]:
    """Write the finished frames of one block and say what became of each; frames set aside write nothing."""
    started = time.perf_counter()
    good = [work for work in works if work.frame is not None]
    part = writer.commit([work.frame for work in good if work.frame is not None]) if good else ""
    for work in good:
        work.seconds["commit"] = (time.perf_counter() - started) / len(good)
    return [
        Receipt(
            work.frame_id,
            work.error,
            part if work.frame is not None else "",
            len(work.frame.instances) if work.frame else 0,
            sum(instance.status == "refined" for instance in work.frame.instances) if work.frame else 0,
            work.patches,
            work.seconds,
            work.refined_at,
            dict(Counter(i.reason for i in work.frame.instances if i.reason)) if work.frame else {},
            work.file_name,
            work.identity if work.frame else "",
        )
        for work in works
    ]


def refine_image(
    refiner: Refiner, image: np.ndarray, masks: np.ndarray, nms_threshold: float, guard: GuardConfig | None = None
) -> np.ndarray:
    """Refine the masks (N, H, W) or (H, W) of one image (H, W, 3) uint8 RGB; returns their shape and dtype, 0 or 1.

    The guard is `GuardConfig()` unless given.
    """
    guard = guard or GuardConfig()
    image, masks = np.asarray(image), np.asarray(masks)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if masks.ndim not in (2, 3) or masks.shape[-2:] != image.shape[:2]:
        raise ValueError(f"masks: expected (N, {image.shape[0]}, {image.shape[1]}) as the image, got {masks.shape}")
    stack = masks if masks.ndim == 3 else masks[None]
    instances = [Instance(str(i), 0, 1.0, *cut_to_box(mask)) for i, mask in enumerate(stack)]
    height, width = image.shape[:2]
    boxes, patches = cut(image, instances, Cutting(nms_threshold), guard)
    work = Work("image", Frame("image", "", width, height, instances), boxes)
    assemble(work, refiner.probabilities(patches), guard)
    out = np.zeros(stack.shape, masks.dtype)
    for mask, instance in zip(out, instances):
        (x, y), (h, w) = instance.origin, instance.mask.shape
        mask[y : y + h, x : x + w] = instance.mask
    return out if masks.ndim == 3 else out[0]
