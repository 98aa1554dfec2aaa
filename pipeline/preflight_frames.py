"""The frames of a dump before a run: the listing, and a sample of them read as the run will read them."""

from __future__ import annotations

import hashlib
import heapq
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from pipeline import rle, storage
from pipeline.config import RefineConfig
from pipeline.formats import Reader
from pipeline.formats.mask_png import encode_png
from pipeline.guard import passed_over
from pipeline.images import decode_image
from pipeline.preflight_report import SHOWN, Check, Estimate
from pipeline.records import FrameRef, InputError, Instance, fault
from pipeline.stages import Cutting, cut, within_memory

DARK = 32
"""A photograph has pixels that are brighter; one of 12 bits stored in 16 does not, once the upper 8 bits are taken."""

MEASURED = 200
"""Frames that are also cut into patches, by which the run is estimated; the others are only read."""

_KINDS = {
    "categories": re.compile(r"unknown category"),
    "sizes": re.compile(r"pixels, expected \d+ x \d+ as the image|height and width \(|mask size "),
    "frame ids": re.compile(r"expected every frame_id once|_pred\.txt, found |expected one frame per image"),
}
"""Faults of frames by what their messages say, in this order; the others are told by where they were found."""

_SOUND = {
    "images": "every frame names one that is there",
    "image files": "all can be decoded",
    "masks": "all can be read",
    "sizes": "masks are as large as their images",
    "categories": "all are known",
    "frame ids": "each occurs once",
}


class Seen(NamedTuple):
    """What reading one frame has shown."""

    kind: str
    error: str
    instances: int
    patches: int | None
    """None where the frame was not measured."""
    output_bytes: int
    too_small: int = 0
    """Instances that the guard passes over for their size, where it was measured."""
    dark: str = ""
    """The image, where it is nearly black."""


def _look(
    ref: FrameRef, measure: bool, *, reader: Reader, config: RefineConfig, cutting: Cutting, output_form: str
) -> Seen:
    """Read one frame as `stages.extract` does, keeping apart what is wrong with it."""
    kind, url = "image files", ""
    try:
        url = storage.join(config.images, ref.file_name)
        image = decode_image(url, config.limits.memory_bytes)
        kind = "masks"
        height, width = image.shape[:2]
        instances = within_memory(reader.read(ref, width, height), ref, image.nbytes, config.limits)
        dark = url if image.max() < DARK else ""
        if not measure:
            return Seen("", "", len(instances), None, 0, dark=dark)
        boxes, _ = cut(image, instances, cutting, config.guard)
        size = sum(_output_bytes(instance, width, height, output_form) for instance in instances)
        small = sum(passed_over(instance.mask, config.guard) == "too_small" for instance in instances)
        return Seen("", "", len(instances), sum(map(len, boxes)), size, small, dark)
    except InputError as error:
        message = str(error)
        if kind == "image files" and message == str(InputError(f"{url}: no such file")):
            kind = "images"
    except Exception as error:
        message = fault(ref.file_name, error)
    return Seen(_kind(message, kind), message, 0, None, 0)


def _output_bytes(instance: Instance, width: int, height: int, output_form: str) -> int:
    """Bytes that an instance takes in the output, its mask being as it is now."""
    if output_form == "cityscapes":
        return len(encode_png(instance.mask, instance.origin, width, height))
    # Once in a part and once in the final file, each time with some 200 bytes of other values.
    return 2 * (200 + len(rle.encode(instance.mask, instance.origin, width, height)))


def _kind(message: str, otherwise: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(message)), otherwise)


def check_frames(
    config: RefineConfig,
    sample: int,
    reader: Reader,
    cutting: Cutting,
    form: str,
    output_form: str,
    refs: list[FrameRef],
) -> tuple[list[Check], list[Seen]]:
    """The checks of `_SOUND` over the listing and the sampled frames, and what the measured frames have shown.

    After these come warnings of what a run would take without a word, and do little good on.
    """
    faults: defaultdict[str, _Faults] = defaultdict(_Faults)
    for ref in refs:
        if ref.error:
            faults[_kind(ref.error, "images")].add(ref.error, listed=True)
    sound = [ref for ref in refs if not ref.error]
    everything = sample == 0 or len(sound) <= sample
    # A Cityscapes listing has looked at the images itself, and frames that are read need no listing.
    missing = set() if everything or form == "cityscapes" else _missing(config.images, sound)
    for ref in sound:
        if ref.frame_id in missing:
            faults["images"].add(f"{storage.join(config.images, ref.file_name)}: no such file", listed=True)
    chosen = _sample([ref for ref in sound if ref.frame_id not in missing], sample)
    step = max(1, len(chosen) // MEASURED)
    look = partial(_look, reader=reader, config=config, cutting=cutting, output_form=output_form)
    measured, dark = [], []
    for seen in _in_threads(look, chosen, step):
        if seen.error:
            faults[seen.kind].add(seen.error, listed=False)
            continue
        if seen.dark:
            dark.append(seen.dark)
        if seen.patches is not None:
            measured.append(seen)
    looked = "all" if everything else f"a sample of {len(chosen)}"
    sayings = dict(_SOUND)
    if len(chosen) == faults["images"].in_sample:
        sayings |= dict.fromkeys(("image files", "masks", "sizes"), "nothing could be looked at")
    if form == "parquet" or (form == "coco" and config.image_list is None):
        sayings["categories"] = "nothing says which are known"
    checks = [faults[name].check(name, text, len(refs), len(chosen), looked) for name, text in sayings.items()]
    return [*checks, *_warnings(config, dark, len(chosen), measured)], measured


def _warnings(config: RefineConfig, dark: list[str], sampled: int, measured: list[Seen]) -> Iterator[Check]:
    if dark:
        message = (
            f"{len(dark)} of {sampled} frames read have no pixel above {DARK - 1} of 255, too dark for the network"
            " (of 16 bits the upper 8 are taken)"
        )
        yield Check("brightness", "warning", message, dark[:SHOWN], len(dark))
    small, instances = sum(seen.too_small for seen in measured), sum(seen.instances for seen in measured)
    if 2 * small > instances:
        message = f"{small} of {instances} instances have fewer pixels than guard.min_area ({config.guard.min_area})"
        yield Check("guard", "warning", f"{message} and will stay as they are")


def _in_threads(look: Callable[[FrameRef, bool], Seen], refs: list[FrameRef], step: int) -> Iterator[Seen]:
    """What every frame shows, in order, every `step`th one being measured."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with ThreadPoolExecutor() as threads:
            for start in range(0, len(refs), 1024):
                part = refs[start : start + 1024]
                yield from threads.map(look, part, [(start + i) % step == 0 for i in range(len(part))])
    finally:
        cv2.setNumThreads(before)


@dataclass
class _Faults:
    """The faults of one kind."""

    in_listing: int = 0
    in_sample: int = 0
    findings: list[str] = field(default_factory=list)

    def add(self, finding: str, *, listed: bool) -> None:
        self.in_listing += listed
        self.in_sample += not listed
        if len(self.findings) < SHOWN:
            self.findings.append(finding)

    def check(self, name: str, sound: str, frames: int, sampled: int, looked: str) -> Check:
        count = self.in_listing + self.in_sample
        if not count:
            return Check(name, "ok", f"{sound} ({looked})")
        told = [f"{self.in_listing} of {frames} frames as listed"] if self.in_listing else []
        told += [f"{self.in_sample} of {sampled} frames read"] if self.in_sample else []
        return Check(name, "error", " and ".join(told), self.findings, count)


def _sample(refs: list[FrameRef], count: int) -> list[FrameRef]:
    """The same `count` frames of a dump in every check, in the dump's order; all for 0."""
    if not count or count >= len(refs):
        return refs

    def draw(number: int) -> bytes:
        return hashlib.sha1(refs[number].frame_id.encode(errors="surrogatepass")).digest()

    return [refs[number] for number in sorted(heapq.nsmallest(count, range(len(refs)), key=draw))]


def _missing(images: str, refs: Iterable[FrameRef]) -> set[str]:
    """Frame ids whose image is not in a listing of the images; none where the store's listing cannot be relied on."""
    try:
        there = {posixpath.normpath(path) for path in storage.find(images, ("",))}
    except (InputError, NotImplementedError, OSError):
        return set()
    missing = [ref for ref in refs if posixpath.normpath(ref.file_name) not in there]
    if any(storage.exists(storage.join(images, ref.file_name)) for ref in missing[:SHOWN]):
        return set()
    return {ref.frame_id for ref in missing}


def estimate(measured: list[Seen], frames: int) -> Estimate | None:
    """What `frames` frames are, going by those that were measured; None where there are none of these."""
    if not measured:
        return None
    share = frames / len(measured)
    return Estimate(
        frames,
        round(share * sum(seen.instances for seen in measured)),
        round(share * sum(seen.patches or 0 for seen in measured)),
        round(share * sum(seen.output_bytes for seen in measured)),
        len(measured),
    )
