"""How fast the CPUs of this machine feed a GPU: the job with a stand-in for the network, at a pace that is given."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from model.gpu import BATCHES_UNDER_WAY
from model.parts import Parts
from pipeline.benchmark.end_to_end import Way
from pipeline.benchmark.made_dump import MadeDump
from pipeline.dump import reader, writer
from pipeline.flow import Placement, Plan, Stages, run_ray
from pipeline.flow.blocks import in_blocks, patches_per_block
from pipeline.flow.local import helpers_beside, refine_blocks
from pipeline.guard import GuardConfig
from pipeline.limits import LimitsConfig
from pipeline.records import InputError
from pipeline.stages import Cutting
from pipeline.work import Receipt

BATCH = 1024
"""Patches of a batch, as a GPU has them of hrnet18s_128."""


@dataclass(frozen=True)
class Feed:
    """One run."""

    way: Way
    pace: float
    """Patches/s that the stand-in makes; infinite where it answers at once."""
    patches_per_s: float
    """That the job made, between the stand-in's answers to the first block and to the last."""

    @property
    def busy(self) -> float:
        """Share of the time that a GPU of this pace would have worked."""
        return self.patches_per_s / self.pace


class Paced:
    """Takes the place of a Refiner on a GPU: as long as its work, and with its copies, but nothing is computed.

    The answer to a patch is its coarse mask, moved by a pixel, so that guard and writer see realistic masks.
    """

    arithmetic = "none"

    def __init__(self, patches_per_s: float) -> None:
        self.patches_per_s = patches_per_s
        self.places = 0

    def each(self, blocks: Iterable[Sequence[np.ndarray]]) -> Iterator[np.ndarray]:
        """As Refiner.each: a block's answer may come after the next block has been asked for."""
        taken: np.ndarray | None = None
        under_way: deque[tuple[float, np.ndarray]] = deque()
        free_at = 0.0
        for block in blocks:
            patches, start = Parts(*block), 0
            answer = np.empty((len(patches), patches.side, patches.side), np.uint16)
            if taken is None or taken.shape[1] != patches.side:
                taken = np.empty((BATCH, patches.side, patches.side, 4), np.uint8)
            while start < len(patches):
                count = patches.copy(start, taken)
                moved = np.roll(taken[:count, :, :, 3], 1, axis=2)
                np.multiply(moved, np.uint16(65535), out=answer[start : start + count], dtype=np.uint16)
                start += count
                free_at = max(free_at, time.perf_counter()) + count / self.patches_per_s
                # It takes no more than a few batches ahead of its work.
                _sleep_until(free_at - BATCHES_UNDER_WAY * BATCH / self.patches_per_s)
                while under_way and under_way[0][0] <= time.perf_counter():
                    yield under_way.popleft()[1]
            under_way.append((free_at, answer))
        for done_at, answer in under_way:
            _sleep_until(done_at)
            yield answer


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


def measure_feed(dump: MadeDump, way: Way, pace: float) -> Feed:
    """Refine the dump anew; on Ray in the running session, which has to have a GPU, be it in name only.

    InputError where the dump is too short for a rate.
    """
    config = dump.config(f"fed_{way}")
    source = reader(config.predictions, config.images, dump.scenery.form, image_pattern=config.image_pattern)
    sink = writer(config.output, dump.scenery.form, dump.scenery.form)
    cutting = Cutting(dump.scenery.nms_threshold)
    stages = Stages(source, sink, str(config.images), cutting, GuardConfig(), LimitsConfig())
    plan = Plan(stages, partial(Paced, pace), source.list_frames())
    if way == "local":
        refs = in_blocks(plan, dump.scenery.patches, patches=patches_per_block(gpus=True)).frames
        arriving = refine_blocks(stages, plan.load_refiner, refs, helpers_beside(os.cpu_count() or 1, gpus=True))
    else:
        arriving = run_ray(plan, Placement(way))
    blocks = sorted(arriving, key=lambda receipts: receipts[0].refined_at)
    _raise_fault([receipt for receipts in blocks for receipt in receipts])
    seconds = blocks[-1][0].refined_at - blocks[0][0].refined_at
    if not seconds:
        raise InputError(f"expected more frames than the {dump.frames} of this dump, for a rate between two blocks")
    counts = [sum(receipt.patches for receipt in receipts) for receipts in blocks]
    return Feed(way, pace, sum(counts[1:]) / seconds)


def _raise_fault(receipts: Sequence[Receipt]) -> None:
    if faults := [receipt.error for receipt in receipts if receipt.error]:
        raise RuntimeError(faults[0])
