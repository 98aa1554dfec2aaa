"""Coarse against refined over whole dumps: every measure of the field, from partial results of blocks that merge.

ground truth + coarse + refined --list--> frames
frames -> read masks, match, count (CPU tasks) -> tallies -> driver -> numbers
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from pipeline import dump, storage
from pipeline.bounds import check_bounds
from pipeline.config import Format, with_absolute
from pipeline.flow import map_blocks
from pipeline.formats import Reader
from pipeline.formats.coco import read_images
from pipeline.ground_truth import GroundTruth, Listing, TrueFrame, TruthRef, open_ground_truth, paired
from pipeline.guard import REASONS
from pipeline.images import decode_image
from pipeline.metrics import cityscapes_ap, matching
from pipeline.metrics.boundary import CITYSCAPES_RATIO, COCO_RATIO, WORSE_BY
from pipeline.metrics.boundary_f import boundary_f_frame
from pipeline.metrics.changes import changed_pixels, changes
from pipeline.metrics.matching import COCO, LVIS, RANKS_PER_FRAME, Rules
from pipeline.metrics.oracle import DISTANCES_PX, oracle
from pipeline.metrics.overlap import best_truths, iou_matrix
from pipeline.outputs import check_kept
from pipeline.progress import Progress
from pipeline.records import Frame, FrameRef, InputError, Instance, fault
from pipeline.stores import AwayError

COARSE, REFINED = "coarse", "refined"

SHIFT_EDGES = (-1.0, -0.1, -0.05, -0.02, -WORSE_BY, WORSE_BY, 0.02, 0.05, 0.1, 1.0)
"""Bins of the change in IoU of single instances."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare coarse and refined masks: with ground truth in the field's measures, without it by what changed.

    Settings may also come from a YAML file, named first: `jobs/evaluate.py val.yaml --limit 100`.
    """

    images: str
    """The folder the images lie in; any fsspec URL."""
    coarse: str | None = None
    """Predictions before refinement: a Cityscapes folder, a COCO results json, or Parquet."""
    refined: str | None = None
    """Predictions after refinement, in any of these forms; instances in the order of the coarse ones."""
    ground_truth: str | None = None
    """COCO or LVIS json, or a Cityscapes gtFine folder."""
    output: str | None = None
    """A folder for report.html, evaluation.json and evaluation.txt."""
    format: Format | Literal["auto"] = "auto"
    """Form of the coarse predictions; `auto` tells it by what is there. That of the refined ones is always told so."""
    image_list: str | None = None
    """COCO predictions: a json whose `images` give each image_id its file_name; default the COCO ground truth."""
    image_pattern: str | None = None
    """COCO predictions: the file name as a pattern, instead of a list."""
    tolerance_px: float | None = None
    """Tolerance of the boundary F-score; default 3 px at 2048x1024, and the same share of other images' diagonal."""
    max_detections: int | None = None
    """Predictions of a frame that count, the best first; default 100 of a class as in COCO, 300 of all as in LVIS."""
    oracle: bool = False
    """Also tell the AP of the coarse dump if all pixels within 1, 2, 3 or any px of its boundaries were right."""
    gallery: int = 24
    """Instances in each gallery of the report; 0 for none."""
    frames_per_block: int = 32
    """Frames that are measured together."""
    local: bool = False
    """Run in this one process, without Ray."""
    limit: int | None = None
    """Only the first so many images."""

    def __post_init__(self) -> None:
        if self.coarse is None and self.refined is None:
            raise InputError("coarse and refined are both missing: expected at least one dump of predictions")
        if self.ground_truth is None and None in (self.coarse, self.refined):
            raise InputError("ground_truth is missing: expected it, or both a coarse and a refined dump")
        if self.oracle and None in (self.ground_truth, self.coarse):
            raise InputError("oracle needs a ground truth and the coarse predictions")
        for name, least in (("frames_per_block", 1), ("gallery", 0), ("limit", 1)):
            check_bounds(self, name, least)
        check_bounds(self, "max_detections", 1, RANKS_PER_FRAME)
        if self.tolerance_px is not None and not 0 < self.tolerance_px < math.inf:
            raise InputError(f"tolerance_px is {self.tolerance_px}: expected a number above 0")


@dataclass(frozen=True, slots=True)
class Item:
    """One image to measure."""

    key: str
    file_name: str
    truth: TruthRef | None
    predicted: dict[str, FrameRef]
    """By dump; a dump without this image is not in it."""


@dataclass(frozen=True, slots=True)
class Notable:
    """An instance that a person may want to see."""

    item: Item
    index: int
    """Its place in the frame."""
    value: float
    """By which it is ranked, the highest first."""
    note: str


@dataclass
class Tally:
    """What some frames come to. The sum of two is both together, in any order."""

    records: dict[tuple[str, str], Any] = field(default_factory=dict)
    """Mergeable partial results by (measure, dump)."""
    shifts: np.ndarray = field(default_factory=lambda: np.zeros(len(SHIFT_EDGES) - 1, np.int64))
    """Instances by the change of their IoU (SHIFT_EDGES)."""
    notable: dict[str, list[Notable]] = field(default_factory=dict)
    """By gallery, the highest first."""
    aside: dict[str, str] = field(default_factory=dict)
    """Key -> why an image could not be measured; it counts in neither dump."""
    compared: int = 0
    """Instances of the two dumps that were compared."""
    judged: int = 0
    """Those among them whose refined form carries the guard's verdict, which some forms have no room for."""
    uncounted: Counter[str] = field(default_factory=Counter)
    """By dump, the predictions beyond those that the rules count in a frame."""
    frames: int = 0

    @classmethod
    def merge(cls, tallies: Iterable[Tally], gallery: int) -> Tally:
        """The sum of many, with at most `gallery` instances in each gallery."""
        parts = list(tallies)
        keys = dict.fromkeys(key for part in parts for key in part.records)
        galleries = dict.fromkeys(name for part in parts for name in part.notable)
        total = cls(
            frames=sum(part.frames for part in parts),
            compared=sum(part.compared for part in parts),
            judged=sum(part.judged for part in parts),
        )
        for key in keys:
            found = [part.records[key] for part in parts if key in part.records]
            total.records[key] = type(found[0]).merge(found)
        for part in parts:
            total.uncounted.update(part.uncounted)
            total.shifts = total.shifts + part.shifts
            total.aside |= part.aside
        for name in galleries:
            ranked = sorted(
                (one for part in parts for one in part.notable.get(name, ())),
                key=lambda one: (-one.value, one.item.key, one.index),
            )
            total.notable[name] = ranked[:gallery]
        return total


@dataclass(frozen=True)
class Meter:
    """Everything a worker needs to know; small and picklable."""

    images: str
    truth: GroundTruth | None
    readers: dict[str, Reader]
    rules: Rules | None
    """COCO's or LVIS's; None for Cityscapes."""
    af_rules: Rules
    tolerance_px: float | None
    with_oracle: bool
    gallery: int


@dataclass(frozen=True)
class Outcome:
    """All that an evaluation has found, before it is put into numbers."""

    tally: Tally
    listing: Listing | None
    kind: Literal["coco", "lvis", "cityscapes"] | None
    """Of the ground truth; None without any."""
    names: Mapping[int, str]
    """Of the categories by id, as far as the ground truth or the image list tells."""
    dumps: tuple[str, ...]
    unpaired: dict[str, str]
    """By dump, a line on images that it lacks, or that the others lack."""
    readers: dict[str, Reader]
    wall_s: float


def evaluate(config: EvaluateConfig, log: Callable[[str], None] = print) -> Outcome:
    """Measure one or two dumps; raises InputError where nothing can be measured at all."""
    started = time.monotonic()
    if config.output:
        check_kept(config.output)
    config = with_absolute(config, "images", "coarse", "refined", "ground_truth", "image_list", "output")
    storage.check_folder(config.images)
    if config.output and storage.exists(config.output) and not storage.is_dir(config.output):
        raise InputError(f"{config.output}: expected a folder to write to, found a file")
    truth = open_ground_truth(config.ground_truth, config.images) if config.ground_truth else None
    listing = truth.list_frames() if truth else None
    kind = _kind(config, listing)
    dumps = {name: url for name, url in ((COARSE, config.coarse), (REFINED, config.refined)) if url}
    forms = {name: dump.input_format(url, config.format if name == COARSE else "auto") for name, url in dumps.items()}
    readers = {name: _reader(config, dumps[name], form, kind) for name, form in forms.items()}
    items, unpaired = _items({name: reader.list_frames() for name, reader in readers.items()}, listing)
    items = items[: config.limit]
    rules, af_rules = _rules(config, kind)
    meter = Meter(config.images, truth, readers, rules, af_rules, config.tolerance_px, config.oracle, config.gallery)
    size = config.frames_per_block
    progress = Progress(total=len(items), done_before=0, log=log, verb="measure")
    total = Tally()
    blocks = [items[i : i + size] for i in range(0, len(items), size)]
    for tally in map_blocks(blocks, partial(_measure_block, meter=meter), local=config.local):
        total = Tally.merge([total, tally], config.gallery)
        progress.count(tally.frames, len(tally.aside))
    if listing is None and config.image_list and "coco" in forms.values():
        names = {category: name for category, name in read_images(config.image_list)[1].items() if name}
    else:
        names = listing.categories if listing else {}
    return Outcome(total, listing, kind, names, tuple(dumps), unpaired, readers, time.monotonic() - started)


def _kind(config: EvaluateConfig, listing: Listing | None) -> Literal["coco", "lvis", "cityscapes"] | None:
    if listing is None or config.ground_truth is None:
        return None
    if storage.is_dir(config.ground_truth):
        return "cityscapes"
    return "lvis" if listing.frequencies else "coco"


def _rules(config: EvaluateConfig, kind: str | None) -> tuple[Rules | None, Rules]:
    """Those of AP, None where it is Cityscapes', and those by which AF pairs predictions and truths."""
    count = config.max_detections
    if count is None:
        return {"coco": COCO, "lvis": LVIS}.get(kind or ""), COCO
    if kind not in ("coco", "lvis"):
        raise InputError("max_detections is for ground truth in COCO's or LVIS's json; Cityscapes counts them all")
    every_class = replace(COCO, per_category=count)
    return every_class if kind == "coco" else replace(LVIS, per_frame=count), every_class


def _reader(config: EvaluateConfig, url: str, form: Format, kind: str | None) -> Reader:
    if form != "coco":
        return dump.reader(url, config.images, form)
    image_list, beside = config.image_list, f"{url.rsplit('/', 1)[0]}/images.json"
    if image_list is None and config.image_pattern is None:
        # The refined json of a dump that came from elsewhere has its own image numbers, and the list beside it.
        image_list = beside if storage.exists(beside) else config.ground_truth if kind in ("coco", "lvis") else None
    # A prediction of a category that the ground truth lacks is left out and counted; its image is measured.
    return dump.reader(url, config.images, form, image_list, config.image_pattern, any_category=True)


def _items(listed: Mapping[str, Sequence[FrameRef]], listing: Listing | None) -> tuple[list[Item], dict[str, str]]:
    """The images to measure, and what the dumps lack or have beyond them."""
    annotated, by_key = paired(listing.refs if listing else (), listed)
    if listing is not None:
        keys = {ref.key: ref for ref in annotated}
        files = {ref.key: ref.file_name for ref in annotated}
    else:
        keys = dict.fromkeys(key for refs in by_key.values() for key in refs)
        files = {key: ref.file_name for refs in by_key.values() for key, ref in refs.items()}
    if not any(key in refs for refs in by_key.values() for key in keys):
        raise InputError("no image is both in the ground truth and in the predictions; are they of one data set?")
    unpaired = {}
    for name, refs in by_key.items():
        beyond = sum(key not in keys for key in refs)
        missing = sum(key not in refs for key in keys if any(key in others for others in by_key.values()))
        parts = [f"{beyond} images that the ground truth lacks"] if beyond else []
        parts += [f"{missing} images of the other dump are missing"] if missing else []
        if parts:
            unpaired[name] = ", ".join(parts)
    items = [
        Item(key, files[key], ref, {name: refs[key] for name, refs in by_key.items() if key in refs})
        for key, ref in keys.items()
    ]
    return items, unpaired


def _measure_block(items: Sequence[Item], meter: Meter) -> Tally:
    tallies = []
    for item in items:
        try:
            tallies.append(_measure(item, meter))
        except AwayError:
            raise
        except Exception as error:  # one frame must never stop the others
            tallies.append(Tally(aside={item.key: fault(item.file_name, error)}))
    return Tally.merge(tallies, meter.gallery)


def read_frames(
    item: Item, readers: Mapping[str, Reader], truth: TrueFrame | None, image: np.ndarray | None
) -> dict[str, Frame]:
    """The frame of each dump, an empty one where a dump lacks the image."""
    width, height = (truth.width, truth.height) if truth else image.shape[1::-1]
    frames = {}
    for name, reader in readers.items():
        ref = item.predicted.get(name)
        if ref is not None and ref.error:
            raise InputError(ref.error)
        instances = list(reader.read(ref, width, height)) if ref is not None else []
        frames[name] = Frame(item.key, item.file_name, width, height, instances)
    return frames


def _measure(item: Item, meter: Meter) -> Tally:
    truth = meter.truth.read(item.truth) if meter.truth and item.truth else None
    both = len(item.predicted) == 2
    if truth is None and not both:
        (lacking,) = {COARSE, REFINED} - item.predicted.keys()
        raise InputError(f"{item.file_name or item.key}: the {lacking} dump lacks it, and there is no ground truth")
    image = decode_image(storage.join(meter.images, item.file_name)) if both else None
    frames = read_frames(item, meter.readers, truth, image)
    tally = Tally(frames=1)
    if truth is not None and item.truth is not None:
        for name, frame in frames.items():
            for measure, record in _records(item.truth, truth, frame, meter.rules):
                tally.records[measure, name] = record
            tally.records["AF", name] = boundary_f_frame(truth, frame, meter.tolerance_px, meter.af_rules)
            if meter.rules is not None:
                tally.uncounted[name] = meter.rules.uncounted(frame)
        if meter.with_oracle:
            for distance, frame in zip(DISTANCES_PX, oracle(truth, frames[COARSE])):
                for measure, record in _records(item.truth, truth, frame, meter.rules):
                    tally.records[measure, oracle_name(distance)] = record
    if both and image is not None:
        tally.records["changes", REFINED] = changes(frames[COARSE], frames[REFINED], image)
        _compare(tally, item, truth, frames[COARSE].instances, frames[REFINED].instances)
    return tally


def oracle_name(distance: float) -> str:
    """What the dump is called whose pixels up to a distance from the boundary were made right."""
    return "all right" if math.isinf(distance) else f"right within {distance:g} px"


def _records(ref: TruthRef, truth: TrueFrame, frame: Frame, rules: Rules | None) -> Iterator[tuple[str, Any]]:
    if rules is None:
        yield "AP", cityscapes_ap.match_frame(truth, frame)
        yield "boundary AP", cityscapes_ap.match_frame(truth, frame, CITYSCAPES_RATIO)
        return
    yield "AP", matching.match_frame(ref.order, truth, frame, rules)
    yield "boundary AP", matching.match_frame(ref.order, truth, frame, replace(rules, boundary_ratio=COCO_RATIO))


def _compare(
    tally: Tally, item: Item, truth: TrueFrame | None, coarse: Sequence[Instance], refined: Sequence[Instance]
) -> None:
    """Note how each instance fared; `changes` has made sure that the two lists belong together."""
    shifts = _ious_before_and_after(truth, coarse, refined) if truth else {}
    tally.shifts = np.histogram([after - before for before, after in shifts.values()], SHIFT_EDGES)[0]
    tally.compared = len(refined)
    for index, (before, after) in enumerate(zip(coarse, refined)):
        pixels = changed_pixels(before, after)
        changed = f"{pixels:,} px changed"
        # What no network has looked at, or comes in a form without a verdict, has no confidence to speak of.
        judged = after.status != "kept"
        tally.judged += judged or bool(after.reason)
        if judged:
            changed += f", confidence along the boundary {after.confidence:.2f}"
        if index in shifts:
            old, new = shifts[index]
            gallery = "largest gains" if new > old else "largest losses"
            if new != old:
                note = f"IoU {old:.3f} to {new:.3f}, {changed}"
                tally.notable.setdefault(gallery, []).append(Notable(item, index, abs(new - old), note))
        elif truth is None and pixels:
            share = pixels / max(before.area, 1)
            note = f"{share:.1%} of the area changed, {changed}"
            tally.notable.setdefault("largest changes", []).append(Notable(item, index, share, note))
        if after.status == "refined":
            tally.notable.setdefault("least certain", []).append(Notable(item, index, -after.confidence, changed))
        if after.status == "rejected":
            why = REASONS["rejected"].get(after.reason, after.reason) or "no reason given"
            why += f"; confidence along the boundary {after.confidence:.2f}"
            tally.notable.setdefault("rejected", []).append(Notable(item, index, -after.confidence, why))


def _ious_before_and_after(
    truth: TrueFrame, coarse: Sequence[Instance], refined: Sequence[Instance]
) -> dict[int, tuple[float, float]]:
    """IoU of each instance with the truth that its coarse mask found (the best of its class, at least one half)."""
    return {
        i: (iou, float(iou_matrix([after], [target])[0, 0]))
        for i, (after, (target, iou)) in enumerate(zip(refined, best_truths(coarse, truth.objects)))
        if target is not None and iou >= 0.5
    }
