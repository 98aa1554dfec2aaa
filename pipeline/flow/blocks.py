"""Which frames travel together: as many as have about the patches that suit the network."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipeline.flow.plan import Plan, Stages
from pipeline.isolation import ChildError, isolated
from pipeline.records import FrameRef

PATCHES_ON_CPU, PATCHES_ON_GPU, PATCHES_SENT_TO_GPU = 1024, 4096, 8192
"""Patches of a block: enough that giving it out costs little beside refining it, and many times the batch of a network
that blocks are sent to, which fills no batch across them."""

MOST_FRAMES = 512
"""Frames of a block, however few patches they have: when its process dies, all of it is done again."""

UNKNOWN = 128.0
"""Patches of a frame that has not been looked at, about a Cityscapes frame's."""

BLOCKS_PER_PROCESS, BLOCKS_PER_CPU = 4, 2
"""Blocks that a dump is cut into at least, so that all processes end at about the same time."""

SAMPLE_FRAMES, SAMPLE_SECONDS = 8, 20.0
"""Frames that are cut to learn how many patches a frame has, and how long that may take."""


@dataclass(frozen=True)
class Blocks:
    """A run's frames in blocks, in their order."""

    frames: list[list[FrameRef]]
    patches: int
    """About how many a block has, by which memory is planned."""


def patches_per_frame(plan: Plan) -> float:
    """Mean number of patches of some frames, taken evenly from the run's.

    UNKNOWN for a run of few frames, and where `frames_per_block` is given. Frames are read in a child process; one that
    is broken does not count, and is set aside by name when its turn comes.
    """
    refs = plan.refs
    if plan.frames_per_block is not None or len(refs) < SAMPLE_FRAMES * SAMPLE_FRAMES:
        return UNKNOWN
    counts, end = [], time.monotonic() + SAMPLE_SECONDS
    with isolated(2 * plan.stages.limits.memory_bytes) as child:
        for ref in refs[:: len(refs) // SAMPLE_FRAMES][:SAMPLE_FRAMES]:
            if (left := end - time.monotonic()) <= 0:
                break
            try:
                count = child.call(_count_patches, plan.stages, ref, seconds=left)
            except ChildError:
                continue
            if count is not None:
                counts.append(count)
    return sum(counts) / len(counts) if counts else UNKNOWN


def _count_patches(stages: Stages, ref: FrameRef) -> int | None:
    work, _ = stages.extract(ref)
    return None if work.error else work.patches


def patches_per_block(gpus: bool, sent: bool = False) -> int:
    """Patches of a block for a network on CPUs, or on GPUs, where blocks are `sent` to it or are read beside it."""
    if not gpus:
        return PATCHES_ON_CPU
    return PATCHES_SENT_TO_GPU if sent else PATCHES_ON_GPU


def in_blocks(
    plan: Plan, per_frame: float, *, patches: int = PATCHES_ON_CPU, processes: int = 1, cpus: float = 1
) -> Blocks:
    """The run's frames in blocks of about `patches` patches, a frame having `per_frame`.

    Blocks are smaller where there would else be too few of them for the network's `processes` and for all `cpus`.
    """
    size = plan.frames_per_block
    if size is None:
        wanted = round(patches / max(1.0, per_frame))
        least = max(BLOCKS_PER_PROCESS * processes, int(BLOCKS_PER_CPU * cpus))
        size = max(1, min(wanted, MOST_FRAMES, -(-len(plan.refs) // least)))
    frames = [plan.refs[i : i + size] for i in range(0, len(plan.refs), size)]
    return Blocks(frames, max(1, round(size * per_frame)))
