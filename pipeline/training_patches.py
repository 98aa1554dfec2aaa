"""One photograph with ground truth in, its training patches out: matched or generated coarse masks, and their boxes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import cv2
import numpy as np

from model.coarsen import KINDS, coarsen
from model.compose import lay_over
from pipeline import storage
from pipeline.bounds import check_bounds, check_nms_threshold
from pipeline.config import MAX_BLOCK_FRAMES, Format, check_patch_size
from pipeline.formats import Reader
from pipeline.ground_truth import GroundTruth, TrueFrame, TrueInstance, TruthRef
from pipeline.images import decode_image
from pipeline.metrics.overlap import Box, Located, Region, best_truths, intersection, mask_within
from pipeline.patches import crop
from pipeline.proposals import PATCH_PX, propose
from pipeline.records import FrameRef, InputError, Instance, cut_to_box

MIN_IOU = 0.5
"""A coarse mask that overlaps its target less teaches nothing (the reference's rule)."""

MAX_SCALE = 16
"""Most that a photograph is magnified; a larger one would not fit the memory."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Cut a patch data set from photographs with ground truth, with predicted or generated coarse masks.

    Settings may also come from a YAML file, named first: `jobs/prepare.py people.yaml --limit 100`.
    """

    ground_truth: str
    """COCO json, or a Cityscapes gtFine folder; any fsspec URL."""
    images: str
    """The folder the images lie in; any fsspec URL."""
    output: str
    """The folder for the data set; running again with the same output does only what is missing or has changed."""
    predictions: str | None = None
    """Coarse masks of a model: a Cityscapes folder, a COCO results json, or Parquet. Without, they are generated."""
    format: Format | Literal["auto"] = "auto"
    """Form of the predictions; `auto` tells it by what is there."""
    image_list: str | None = None
    """COCO predictions: a json whose `images` give each image_id its file_name; default the COCO ground truth."""
    image_pattern: str | None = None
    """COCO predictions: the file name as a pattern, instead of a list."""
    coarsened: float = 0.0
    """Share of the matched predictions whose mask is replaced by one generated from the ground truth."""
    failure: str = "mixed"
    """How generated masks fail: `mixed`, or one kind of model/coarsen.py."""
    visits: int = 1
    """How often an object is cut under a newly generated coarse mask."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Each visit with generated masks sees the image at a random scale in this range."""
    composite: float = 0.0
    """Share of these visits in which an object of another image is laid over the image."""
    nms_threshold: float = 0.25
    """Patches that overlap more than this IoU are thinned out."""
    patch_size: int = PATCH_PX
    """Side of a patch in pixels, without the padding."""
    padding: int = 0
    """Context around each patch on every side, for networks that see more or training that rotates."""
    patches_per_object: int | None = None
    """At most so many patches of an object and visit, drawn at random."""
    max_instances: int | None = None
    """At most so many objects of the whole data set, drawn at random without replacement."""
    val_share: float = 0.1
    """Share of the images whose patches go into the validation split."""
    seed: int = 0
    """Of everything random: splits, generated masks, scales, what is drawn."""
    frames_per_block: int = 16
    """Frames that are cut, and whose patches are written, together: the patches of a shard."""
    local: bool = False
    """Run in this one process, without Ray."""
    limit: int | None = None
    """Only the first so many images."""
    strict: bool = False
    """Exit with an error if any frame was set aside, not only if all were."""

    def __post_init__(self) -> None:
        for name in ("coarsened", "composite", "val_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}: expected a share between 0 and 1")
        check_patch_size(self.patch_size, self.padding)
        check_bounds(self, "frames_per_block", 1, MAX_BLOCK_FRAMES)
        for name in ("visits", "patches_per_object", "max_instances", "limit"):
            check_bounds(self, name, 1)
        check_nms_threshold(self.nms_threshold)
        if not 0 < self.scale[0] <= self.scale[1] <= MAX_SCALE:
            expected = f"the smallest and the largest factor, above 0 and at most {MAX_SCALE}"
            raise InputError(f"scale is {self.scale}: expected {expected}")
        if self.failure not in ("mixed", *KINDS):
            raise InputError(f"failure is {self.failure!r}: expected mixed, {', '.join(KINDS)}")
        if self.predictions is None and (self.coarsened or self.image_list or self.image_pattern):
            raise InputError(
                "coarsened, image_list and image_pattern go with predictions; expected predictions as well"
            )
        if self.predictions is not None and not self.coarsened:
            for name in ("failure", "visits", "scale", "composite"):
                if getattr(self, name) != getattr(PrepareConfig, name):
                    expected = "no predictions, or a coarsened above 0"
                    raise InputError(f"{name} is {getattr(self, name)}, of generated masks: expected {expected}")


@dataclass(frozen=True, slots=True)
class Item:
    """One frame to cut."""

    truth: TruthRef
    predicted: FrameRef | None
    donors: tuple[TruthRef | None, ...]
    """For each visit the image whose object is laid over this one; None where the visit shows the image as it is."""
    chosen: frozenset[str] | None = None
    """The instances to cut; None for all."""
    identity: str = ""
    """What its patches are cut from, in characters that change with it; `+<others>` as in `pipeline.identity`."""


@dataclass(frozen=True)
class Cutter:
    """Everything a worker needs to know; small and picklable."""

    config: PrepareConfig
    truth: GroundTruth
    reader: Reader | None
    """Of the predictions; None where coarse masks are generated."""


def generator(seed: int, *names: object) -> np.random.Generator:
    """A generator that depends on what it is for, not on who asks first."""
    digest = hashlib.sha256("\n".join(map(str, (seed, *names))).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def read_predictions(item: Item, cutter: Cutter, frame: TrueFrame) -> list[Instance] | None:
    """The predicted instances of a frame; None where coarse masks are generated. InputError as the reader raises it."""
    if cutter.reader is None or item.predicted is None:
        return None
    if item.predicted.error:
        raise InputError(item.predicted.error)
    return list(cutter.reader.read(item.predicted, frame.width, frame.height))


def matched(
    predictions: Sequence[Instance] | None, frame: TrueFrame
) -> list[tuple[str, Instance | None, TrueInstance]]:
    """Every object that can be cut: its name, its predicted mask (None where it is generated), and its target."""
    if predictions is None:
        return [(true.instance_id, None, true) for true in frame.objects]
    found = zip(predictions, best_truths(predictions, frame.objects))
    return [(one.instance_id, one, true) for one, (true, iou) in found if true is not None and iou > MIN_IOU]


def _iou(first: Located, second: Located) -> float:
    common = intersection(first, second)
    return common / max(1, np.count_nonzero(first.mask) + np.count_nonzero(second.mask) - common)


@dataclass
class Cut:
    """What has been cut of one frame."""

    patches: list[np.ndarray] = field(default_factory=list)
    keys: list[dict[str, Any]] = field(default_factory=list)
    instances: set[str] = field(default_factory=set)
    identity: str = ""
    """That of the frame, without what reading has shown not to matter to it."""
    predictions: int = 0
    unmatched: int = 0
    """Predictions without an object of their class that they overlap enough (MIN_IOU)."""


def cut_frame(item: Item, cutter: Cutter) -> Cut:
    config, key = cutter.config, item.truth.key
    image = decode_image(storage.join(config.images, item.truth.file_name))
    frame = cutter.truth.read(item.truth)
    check_size(item.truth.file_name, image, frame)
    predictions = read_predictions(item, cutter, frame)
    cut = Cut(identity=item.identity)
    if cutter.reader is not None and item.predicted is not None and predictions is not None:
        cut.identity = cutter.reader.identity(replace(item.predicted, identity=item.identity), predictions)
    split = "val" if generator(config.seed, key, "split").random() < config.val_share else "train"
    about = {"frame_id": key, "split": split}
    pairs = matched(predictions, frame)
    if predictions is not None:
        cut.predictions, cut.unmatched = len(predictions), len(predictions) - len(pairs)
    if item.chosen is not None:
        pairs = [pair for pair in pairs if pair[0] in item.chosen]
    generated = []
    for name, instance, true in pairs:
        if instance is None or generator(config.seed, key, name, "coarsen").random() < config.coarsened:
            generated.append((name, true))
            continue
        iou = _iou(instance, true)
        known = about | {"instance_id": name, "category_id": true.category_id, "iou": iou, "origin": "prediction"}
        _cut_object(cut, config, image, instance, true, known | {"visit": 0})
    for visit in range(config.visits if generated else 0):
        _visit(cut, item, cutter, image, generated, about | {"visit": visit, "origin": config.failure})
    return cut


def _visit(
    cut: Cut,
    item: Item,
    cutter: Cutter,
    image: np.ndarray,
    objects: Sequence[tuple[str, TrueInstance]],
    about: dict[str, Any],
) -> None:
    """Cut some objects under newly generated coarse masks, at a scale of this visit, perhaps behind another object."""
    config, donor = cutter.config, item.donors[about["visit"]]
    rng = generator(config.seed, item.truth.key, "visit", about["visit"])
    scale = float(rng.uniform(*config.scale))
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    targets = [cv2.resize(whole_mask(true, image.shape), size, interpolation=cv2.INTER_AREA) for _, true in objects]
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    named = [(name, true.category_id) for name, true in objects]
    if donor is not None and (laid := cutter.truth.read(donor).objects):
        chosen = laid[int(rng.integers(len(laid)))]
        above = decode_image(storage.join(config.images, donor.file_name))
        image, mask = lay_over(image, targets, above, whole_mask(chosen, above.shape), rng)
        if mask is not None:
            targets.append(mask)
            named.append((f"{donor.key}/{chosen.instance_id}", chosen.category_id))
    for (name, category), target in zip(named, targets):
        if not target.any():
            continue
        target_region = Region(*cut_to_box(target))
        coarse_region = _coarsened(target, target_region, rng, config.failure)
        iou = _iou(coarse_region, target_region)
        if iou > MIN_IOU:
            known = about | {"instance_id": name, "category_id": category, "iou": iou}
            _cut_object(cut, config, image, coarse_region, target_region, known)


def _coarsened(target: np.ndarray, region: Region, rng: np.random.Generator, failure: str) -> Region:
    """`coarsen` of a mask in a frame, worked out around the object alone: in a large frame most is far from it."""
    (x, y), (height, width) = region.origin, region.mask.shape
    margin = 16 + max(height, width) // 4
    left, top = max(x - margin, 0), max(y - margin, 0)
    around = np.ascontiguousarray(target[top : y + height + margin, left : x + width + margin])
    mask, (dx, dy) = cut_to_box(coarsen(around, rng, failure))
    return Region(mask, (left + dx, top + dy))


def check_size(file_name: str, image: np.ndarray, frame: TrueFrame) -> None:
    """Raise InputError where an image (H, W, 3) has not the size that the ground truth says."""
    if image.shape[:2] != (frame.height, frame.width):
        found = f"{image.shape[1]} x {image.shape[0]} px"
        raise InputError(f"{file_name}: {found}, expected {frame.width} x {frame.height} as the ground truth")


def whole_mask(true: TrueInstance, shape: tuple[int, ...]) -> np.ndarray:
    """The mask (H, W) uint8 0/1 of an object in an image of this shape."""
    return mask_within(true, Box(0, 0, shape[1], shape[0])).view(np.uint8)


def _cut_object(
    cut: Cut,
    config: PrepareConfig,
    image: np.ndarray,
    coarse: Located,
    target: Located,
    known: dict[str, Any],
) -> None:
    size = image.shape[1], image.shape[0]
    boxes = propose(coarse.mask, coarse.origin, size, config.nms_threshold, patch_px=config.patch_size)
    if config.patches_per_object is not None and len(boxes) > config.patches_per_object:
        rng = generator(config.seed, known["frame_id"], known["instance_id"], known["visit"], "patches")
        boxes = boxes[np.sort(rng.permutation(len(boxes))[: config.patches_per_object])]
    if not len(boxes):
        return
    patches = crop(image, coarse.mask, coarse.origin, boxes, config.padding)
    targets = crop(image, target.mask, target.origin, boxes, config.padding)[..., 3:]
    cut.patches.append(np.concatenate([patches, targets], axis=-1))
    cut.keys += [known | {"box": box} for box in boxes.tolist()]
    cut.instances.add(known["instance_id"])
