"""What each stage of a frame costs on one thread, beside its floor: the least that its work could cost here."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from model import Refiner
from pipeline.benchmark.made_dump import MadeDump
from pipeline.dump import reader, writer
from pipeline.guard import GuardConfig
from pipeline.images import decode_image
from pipeline.records import Frame, FrameRef, Instance
from pipeline.stages import Cutting, assemble, commit, crop_all, place, refine
from pipeline.work import Work

Result = TypeVar("Result")

DECODE, ENCODE = "read + decode", "encode + write"
HANDLING = (DECODE, "propose", "crop", "paste + guard", ENCODE)

BLOCK_FRAMES = 8
"""Frames that are refined and written together, as in a job."""


@dataclass(frozen=True)
class Stage:
    """One stage, per frame."""

    name: str
    cpu_ms: float
    """CPU milliseconds, of all threads."""
    moved_mb: float
    """Megabytes that it takes in and gives out."""
    floor_ms: float
    """CPU milliseconds of its floor."""
    floor: str
    """What that is."""

    @property
    def ratio(self) -> float:
        return self.cpu_ms / self.floor_ms


@dataclass(frozen=True)
class Handling:
    """The stages around the network; medians over the frames."""

    patches: float
    """Mean of a frame."""
    copy_gb_per_s: float
    """Memory bandwidth of one thread; bytes read and bytes written both count."""
    stages: list[Stage]
    crops: list[np.ndarray] = field(repr=False)
    """The patches (n, P, P, 4) uint8 of each frame."""

    @property
    def cpu_ms(self) -> float:
        """Per frame, of all that is not the network."""
        return sum(stage.cpu_ms for stage in self.stages)

    @property
    def floor_ms(self) -> float:
        """Per frame, of nothing but decoding the inputs and encoding the outputs."""
        return sum(stage.floor_ms for stage in self.stages if stage.name in (DECODE, ENCODE))

    @property
    def ratio(self) -> float:
        return self.cpu_ms / self.floor_ms


def measure_handling(dump: MadeDump, frames: int) -> Handling:
    """Run the stages around the network on the first frames of a dump, each beside its floor.

    The coarse mask moved by a pixel stands for its probabilities, so that guard and encoding see realistic masks.
    """
    cv2.setNumThreads(1)
    config = dump.config("handled")
    source = reader(config.predictions, config.images, dump.scenery.form, image_pattern=config.image_pattern)
    sink = writer(config.output, dump.scenery.form, dump.scenery.form)
    cutting, guard = Cutting(dump.scenery.nms_threshold), GuardConfig()
    libraries = _coco_libraries(dump) if dump.scenery.form == "coco" else _png_library(dump)
    cpu, moved = defaultdict(list), defaultdict(list)
    crops = []

    def timed(name: str, call: Callable[..., Result], *arguments: Any) -> Result:
        ms, result = _cpu_ms(call, *arguments)
        cpu[name].append(ms)
        return result

    def read(ref: FrameRef) -> tuple[np.ndarray, list[Instance]]:
        image = decode_image(str(dump.images / ref.file_name))
        return image, list(source.read(ref, image.shape[1], image.shape[0]))

    works = []
    for ref in source.list_frames()[:frames]:
        decode, encode, image_bytes, mask_bytes = libraries(ref)
        decoded = timed("decode floor", decode)
        timed("encode floor", encode, decoded)
        image, instances = timed(DECODE, read, ref)
        size = image.shape[1], image.shape[0]
        boxes = timed("propose", place, instances, size, cutting, guard)
        patches = timed("crop", crop_all, image, instances, boxes, cutting)
        probabilities = np.roll(patches[..., 3], 1, axis=2).astype(np.uint16) * np.uint16(65535)
        work = Work(ref.frame_id, Frame(ref.frame_id, ref.file_name, *size, instances), boxes, file_name=ref.file_name)
        coarse = _mask_bytes(instances)
        timed("paste + guard", assemble, work, probabilities, guard)
        refined = _mask_bytes(instances)
        works.append(work)
        moved[DECODE].append(image_bytes + mask_bytes + image.nbytes + coarse)
        moved["propose"].append(coarse + sum(placed.nbytes for placed in boxes))
        moved["crop"].append(2 * patches.nbytes)
        moved["paste + guard"].append(probabilities.nbytes + coarse + refined)
        # The files written are about as large as those that were read.
        moved[ENCODE].append(refined + mask_bytes)
        crops.append(patches)
    # The first part that a process writes loads libraries; a job's worker does that once.
    commit(works[:1], sink)
    for i in range(0, len(works), BLOCK_FRAMES):
        block = works[i : i + BLOCK_FRAMES]
        ms, receipts = _cpu_ms(commit, block, sink)
        if errors := [receipt.error for receipt in receipts if receipt.error]:
            raise RuntimeError(errors[0])
        cpu[ENCODE] += [ms / len(block)] * len(block)

    bandwidth = _copy_gb_per_s()
    stages = []
    for name in HANDLING:
        mb = float(np.median(moved[name])) / 1e6
        floor_ms, floor = mb / bandwidth, "copying its bytes"
        if name in (DECODE, ENCODE):
            floor_ms = float(np.median(cpu["decode floor" if name == DECODE else "encode floor"]))
            floor = f"{'pycocotools and OpenCV' if dump.scenery.form == 'coco' else 'OpenCV'} alone"
        stages.append(Stage(name, float(np.median(cpu[name])), mb, floor_ms, floor))
    return Handling(float(np.mean([len(part) for part in crops])), bandwidth, stages, crops)


def network_stage(crops: Sequence[np.ndarray], refiner: Refiner, bare: Refiner) -> Stage:
    """The network as a job runs it, on the patches of some frames in blocks, beside `bare` batches of the same patches.

    Measured in turns, twice each; `bare` is the refiner with the best batch there is.
    """
    stage_ms, floor_ms = [], []
    everything = np.concatenate(crops)
    blocks = [crops[i : i + BLOCK_FRAMES] for i in range(0, len(crops), BLOCK_FRAMES)]

    def in_blocks() -> None:
        for _ in refine((([Work("") for _ in block], block) for block in blocks), refiner, 0):
            pass

    bare.probabilities(everything[: bare.batch_size])
    for _ in range(2):
        floor_ms.append(_cpu_ms(bare.probabilities, everything)[0] / len(crops))
        stage_ms.append(_cpu_ms(in_blocks)[0] / len(crops))
    # Four channels of a byte in, one of two bytes out.
    mb = everything.nbytes * 1.5 / len(crops) / 1e6
    return Stage(
        "network", float(np.median(stage_ms)), mb, float(np.median(floor_ms)), f"bare, batches of {bare.batch_size}"
    )


def _mask_bytes(instances: Sequence[Instance]) -> int:
    return sum(instance.mask.nbytes for instance in instances)


Libraries = Callable[[FrameRef], tuple[Callable[[], Any], Callable[[Any], Any], int, int]]
"""For a frame, what decodes its inputs, what encodes what that returns, and the inputs' bytes: image, masks."""


def _png_library(dump: MadeDump) -> Libraries:
    def of_frame(ref: FrameRef) -> tuple[Callable[[], Any], Callable[[Any], Any], int, int]:
        image, stem = dump.images / ref.file_name, Path(ref.file_name).stem
        masks = [dump.predictions / f"{stem}_{k}.png" for k in range(dump.scenery.instances)]

        def decode() -> list[np.ndarray]:
            return [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (image, *masks)]

        def encode(decoded: list[np.ndarray]) -> list[Any]:
            return [cv2.imencode(".png", mask) for mask in decoded[1:]]

        return decode, encode, image.stat().st_size, sum(path.stat().st_size for path in masks)

    return of_frame


def _coco_libraries(dump: MadeDump) -> Libraries:
    lines: dict[str, list[str]] = defaultdict(list)
    for entry in json.loads(dump.predictions.read_text()):
        lines[str(entry["image_id"])].append(json.dumps(entry))

    def of_frame(ref: FrameRef) -> tuple[Callable[[], Any], Callable[[Any], Any], int, int]:
        image, mine = dump.images / ref.file_name, lines[ref.frame_id]

        def decode() -> list[np.ndarray]:
            cv2.imread(str(image))
            return [coco_mask.decode(json.loads(line)["segmentation"]) for line in mine]

        def encode(masks: list[np.ndarray]) -> list[str]:
            return [json.dumps(coco_mask.encode(np.asfortranarray(mask))["counts"].decode()) for mask in masks]

        return decode, encode, image.stat().st_size, sum(map(len, mine))

    return of_frame


def _copy_gb_per_s() -> float:
    source = np.ones(64 << 20, np.uint8)
    target = np.zeros_like(source)
    ms = min(_cpu_ms(np.copyto, target, source)[0] for _ in range(5))
    return 2 * source.nbytes / 1e6 / ms


def _cpu_ms(call: Callable[..., Result], *arguments: Any) -> tuple[float, Result]:
    started = time.process_time()
    result = call(*arguments)
    return (time.process_time() - started) * 1e3, result
