"""The stages every frame passes: extract, refine, assemble, commit. Where they run, `pipeline/flow/` says."""

from __future__ import annotations

import errno
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline import storage
from pipeline.bounds import check_nms_threshold
from pipeline.formats import Reader, Writer
from pipeline.guard import GuardConfig, judge, passed_over
from pipeline.images import decode_image
from pipeline.limits import LimitsConfig
from pipeline.patches import crop, paste
from pipeline.proposals import PATCH_PX, boundary_strength, propose
from pipeline.records import Frame, FrameRef, InputError, Instance, cut_to_box
from pipeline.stores import AwayError, NotGivenError
from pipeline.work import Receipt, Work

if TYPE_CHECKING:  # torch stays out of the processes that only cut and paste
    from model import Refiner


IN_PIECES = 2048
"""Patches of a frame above which they do not travel: the network's process cuts, refines and pastes them, so many at a
time. A block of such frames would not fit where a few blocks of others wait.
"""


PASTE_BYTES = 16
"""Memory per pixel of its box while an instance is pasted together."""


@dataclass(frozen=True)
class Cutting:
    """How patches are cut, for every instance alike."""

    nms_threshold: float
    patch_px: int = PATCH_PX
    padding: int = 0
    parity: bool = False

    @property
    def side_px(self) -> int:
        """Side of a patch as the network takes it, with the padding."""
        return self.patch_px + 2 * self.padding

    @property
    def no_patches(self) -> np.ndarray:
        """(0, P, P, 4) uint8."""
        return np.zeros((0, self.side_px, self.side_px, 4), np.uint8)

    @property
    def patch_bytes(self) -> int:
        """Bytes of a patch on its way to the network."""
        return 4 * self.side_px**2


def cut(
    image: np.ndarray, instances: Sequence[Instance], cutting: Cutting, guard: GuardConfig
) -> tuple[list[np.ndarray], np.ndarray]:
    """The boxes (n, 4) of each instance and all their patches (N, P, P, 4) uint8, in the order of the instances.

    Instances that the guard passes over have none.
    """
    boxes = place(instances, (image.shape[1], image.shape[0]), cutting, guard)
    return boxes, crop_all(image, instances, boxes, cutting)


def place(
    instances: Sequence[Instance], size: tuple[int, int], cutting: Cutting, guard: GuardConfig
) -> list[np.ndarray]:
    """The boxes (n, 4) int32 of each instance's patches in a frame of `size` = (width, height)."""
    return [
        np.zeros((0, 4), np.int32)
        if passed_over(instance.mask, guard)
        else propose(
            instance.mask,
            instance.origin,
            size,
            cutting.nms_threshold,
            patch_px=cutting.patch_px,
            parity=cutting.parity,
        )
        for instance in instances
    ]


def crop_all(
    image: np.ndarray, instances: Sequence[Instance], boxes: Sequence[np.ndarray], cutting: Cutting
) -> np.ndarray:
    """The patches (N, P, P, 4) uint8 of all instances, P with the padding."""
    patches = [cutting.no_patches]
    for instance, placed in zip(instances, boxes):
        if len(placed):
            patches.append(crop(image, instance.mask, instance.origin, placed, cutting.padding))
    return np.concatenate(patches)


def extract(
    ref: FrameRef,
    reader: Reader,
    images: str,
    cutting: Cutting,
    guard: GuardConfig,
    limits: LimitsConfig = LimitsConfig(),  # noqa: B008, frozen
) -> tuple[Work, np.ndarray]:
    """Read one frame and cut its patches (N, P, P, 4) uint8. Whatever is wrong with it becomes `Work.error`.

    Raises AwayError where its store is what fails. A frame with more than IN_PIECES patches has none here.
    """
    work = Work(ref.frame_id, file_name=ref.file_name)
    patches = cutting.no_patches
    with work.timed("extract"):
        try:
            image = decode_image(storage.join(images, ref.file_name), limits.memory_bytes)
            height, width = image.shape[:2]
            instances = within_memory(reader.read(ref, width, height), ref, image.nbytes, limits)
            work.boxes = place(instances, (width, height), cutting, guard)
            work.in_pieces = work.patches > IN_PIECES
            if not work.in_pieces:
                patches = crop_all(image, instances, work.boxes, cutting)
            work.identity = reader.identity(ref, instances)
            work.frame = Frame(ref.frame_id, ref.file_name, width, height, instances)
        except AwayError:
            raise
        except Exception as error:  # one frame must never stop the others
            work.set_aside(error)
    return work, patches


def within_memory(found: Iterator[Instance], ref: FrameRef, held: int, limits: LimitsConfig) -> list[Instance]:
    """A frame's instances, as they are read; InputError where they and `held` bytes of its image go over a limit."""
    instances, largest = [], 0
    for instance in found:
        instances.append(instance)
        held += instance.mask.nbytes
        largest = max(largest, instance.mask.nbytes)
        if (needed := held + largest * PASTE_BYTES) > limits.memory_bytes:
            raise InputError(
                f"{ref.file_name}: image and the first {len(instances)} masks need {needed / (1 << 30):.3g} GB,"
                f" expected a frame to fit limits.memory_gb = {limits.memory_gb:g}"
            )
    return instances


Block = tuple[Sequence[Work], Sequence[np.ndarray]]
"""Frames, and of each what belongs to it: its patches (n, P, P, 4) uint8, or their probabilities (n, P, P) uint16."""


def refine(blocks: Iterable[Block], refiner: Refiner, padding: int) -> Iterator[Block]:
    """Of blocks of frames and their patches, the frames and their foreground probabilities.

    All frames share the network's batches, also across blocks; a block may come out after the next was asked for.
    """
    under_way: deque[Block] = deque()
    waited = 0.0

    def patches() -> Iterator[Sequence[np.ndarray]]:
        nonlocal waited
        asked = time.perf_counter()
        for block in blocks:
            waited += time.perf_counter() - asked
            under_way.append(block)
            yield block[1]
            asked = time.perf_counter()
        waited += time.perf_counter() - asked

    started, places = time.perf_counter(), refiner.places
    for found in refiner.each(patches()):
        works, parts = under_way.popleft()
        counts = [len(part) for part in parts]
        each = (time.perf_counter() - started - waited) / max(1, sum(counts))
        for work, count, together in zip(works, counts, [refiner.places - places, *[0] * len(counts)]):
            work.seconds["refine"] = work.seconds.get("refine", 0.0) + each * count
            _refined_by(work, refiner, together)
        yield works, np.split(_unpadded(found, padding), np.cumsum(counts)[:-1])
        started, waited, places = time.perf_counter(), 0.0, refiner.places


def _refined_by(work: Work, refiner: Refiner, places: int) -> None:
    work.refined_at, work.arithmetic = time.time(), refiner.arithmetic
    work.count("batch_places", places)


def refine_in_pieces(
    work: Work, refiner: Refiner, images: str, cutting: Cutting, guard: GuardConfig, limits: LimitsConfig
) -> None:
    """Refine and reassemble a frame whose patches did not travel, about IN_PIECES of them at a time.

    Raises AwayError where its store is what fails.
    """
    work.open()
    frame = work.frame
    if frame is None:
        return
    before = refiner.places
    try:
        image = decode_image(storage.join(images, frame.file_name), limits.memory_bytes)
        if image.shape[:2] != (frame.height, frame.width):
            raise InputError(f"{frame.file_name}: the image has changed since its masks were read")
        for some in _pieces([len(boxes) for boxes in work.boxes]):
            instances, boxes = frame.instances[some], work.boxes[some]
            with work.timed("refine"):
                probabilities = _probabilities(image, instances, boxes, refiner, cutting)
            with work.timed("assemble"):
                _settle(frame, instances, boxes, probabilities, guard)
    except AwayError:
        raise
    except Exception as error:  # one frame must never stop the others
        work.set_aside(error)
    _refined_by(work, refiner, refiner.places - before)


def _pieces(counts: Sequence[int]) -> Iterator[slice]:
    """Neighbouring instances that have at most IN_PIECES patches together, or one that has more."""
    start = total = 0
    for stop, count in enumerate(counts):
        if total + count > IN_PIECES and stop > start:
            yield slice(start, stop)
            start, total = stop, 0
        total += count
    yield slice(start, len(counts))


def _probabilities(
    image: np.ndarray, instances: Sequence[Instance], boxes: Sequence[np.ndarray], refiner: Refiner, cutting: Cutting
) -> np.ndarray:
    if len(instances) != 1:
        return _unpadded(refiner.probabilities(crop_all(image, instances, boxes, cutting)), cutting.padding)
    parts = [boxes[0][i : i + IN_PIECES] for i in range(0, len(boxes[0]), IN_PIECES)] or [boxes[0]]
    patches = (crop_all(image, instances, [part], cutting) for part in parts)
    return np.concatenate([_unpadded(refiner.probabilities(part), cutting.padding) for part in patches])


def _unpadded(probabilities: np.ndarray, padding: int) -> np.ndarray:
    return np.ascontiguousarray(probabilities[:, padding:-padding, padding:-padding]) if padding else probabilities


def assemble(work: Work, probabilities: np.ndarray, guard: GuardConfig) -> None:
    """Replace a frame's coarse masks by refined ones, given the probabilities (N, P, P) uint16 of all its patches.

    Masks that the guard rejects stay as they were. Whatever goes wrong becomes `Work.error`.
    """
    work.open()
    if work.frame is None or work.in_pieces:
        return
    with work.timed("assemble"):
        try:
            _settle(work.frame, work.frame.instances, work.boxes, probabilities, guard)
        except Exception as error:  # one frame must never stop the others
            work.set_aside(error)


def _settle(
    frame: Frame,
    instances: Sequence[Instance],
    boxes: Sequence[np.ndarray],
    probabilities: np.ndarray,
    guard: GuardConfig,
) -> None:
    start = 0
    for instance, placed in zip(instances, boxes):
        part = probabilities[start : start + len(placed)]
        start += len(placed)
        # A dump that was refined before brings the old verdicts along.
        instance.status, instance.reason = "kept", passed_over(instance.mask, guard)
        instance.changed_pixels, instance.confidence = 0, 1.0
        if len(placed):
            _replace(instance, (frame.width, frame.height), placed, part, guard)


def _replace(
    instance: Instance, size: tuple[int, int], boxes: np.ndarray, probabilities: np.ndarray, guard: GuardConfig
) -> None:
    (x0, y0), (height, width) = instance.origin, instance.mask.shape
    refined, (left, top), mean = paste(instance.mask, (x0, y0), size, boxes, probabilities)
    coarse = np.zeros_like(refined)
    coarse[y0 - top : y0 - top + height, x0 - left : x0 - left + width] = instance.mask
    # Faster than indexing by a mask, where few pixels are in it.
    band = mean.ravel()[np.flatnonzero(boundary_strength(refined) > 0)]
    band = band[~np.isnan(band)]
    instance.confidence = float(np.abs(2 * band - 1).mean()) if len(band) else 1.0
    mask, instance.status, instance.reason = judge(coarse, refined, mean, guard)
    if instance.status == "refined":
        instance.changed_pixels = int(np.count_nonzero(mask != coarse))
        instance.mask, (x, y) = cut_to_box(mask)
        instance.origin = (left + x, top + y) if instance.mask.size else (0, 0)


def commit(works: Sequence[Work], writer: Writer) -> list[Receipt]:
    """Write the finished frames of one block and say what became of each; frames set aside write nothing.

    An OSError, AwayError or NotGivenError is the store's and ends the run, unless it is about the length of a frame's
    own name; whatever else goes wrong sets aside the frame that it goes wrong with.
    """
    started, written = time.perf_counter(), storage.traffic["written"]
    good = [work for work in works if work.frame is not None]
    part = ""
    try:
        part = writer.commit([work.frame for work in good if work.frame is not None]) if good else ""
    except Exception as error:
        too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
        if isinstance(error, OSError | AwayError | NotGivenError) and not too_long:
            raise
        if len(works) > 1:
            return [receipt for work in works for receipt in commit([work], writer)]
        works[0].set_aside(error)
    for work in good:
        work.seconds["commit"] = (time.perf_counter() - started) / len(good)
    works[0].count("bytes_written", storage.traffic["written"] - written)
    return [_receipt(work, part) for work in works]


def _receipt(work: Work, part: str) -> Receipt:
    instances = work.frame.instances if work.frame else []
    return Receipt(
        work.frame_id,
        work.error,
        part if work.frame else "",
        len(instances),
        sum(instance.status == "refined" for instance in instances),
        work.patches,
        work.seconds,
        work.refined_at,
        dict(Counter(instance.reason for instance in instances if instance.reason)),
        work.file_name,
        work.identity if work.frame else "",
        work.counts,
        work.arithmetic,
    )


def refine_image(
    refiner: Refiner, image: np.ndarray, masks: np.ndarray, nms_threshold: float, guard: GuardConfig | None = None
) -> np.ndarray:
    """Refine the masks (N, H, W) or (H, W) of one image (H, W, 3) uint8 RGB; returns their shape and dtype, 0 or 1.

    The guard is `GuardConfig()` unless given.
    """
    guard = guard or GuardConfig()
    check_nms_threshold(nms_threshold)
    image, masks = np.asarray(image), np.asarray(masks)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if masks.ndim not in (2, 3) or masks.shape[-2:] != image.shape[:2]:
        raise ValueError(f"masks: expected (N, {image.shape[0]}, {image.shape[1]}) as the image, got {masks.shape}")
    if masks.size and masks.dtype.kind not in "biu":
        raise ValueError(f"masks: expected bool or whole numbers, got {masks.dtype}; of probabilities give masks > 0.5")
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
