"""The stages without Ray: the network in this process, reading and writing in helpers beside it."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from model.heap import keep_freed_memory
from pipeline.config import Device
from pipeline.flow.blocks import UNKNOWN, in_blocks, patches_per_block, patches_per_frame
from pipeline.flow.plan import Plan, Stages
from pipeline.records import FrameRef, InputError
from pipeline.stages import Block
from pipeline.work import Receipt

if TYPE_CHECKING:
    from model import Refiner


def run_local(plan: Plan) -> Iterator[list[Receipt]]:
    """Refine all frames on this machine; yields the receipts of each block, in order.

    InputError where a GPU is wanted and none is there.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = on_gpu(plan.device)
    per_frame = patches_per_frame(plan) if _reaches_children(plan.stages) else UNKNOWN
    blocks = in_blocks(plan, per_frame, patches=patches_per_block(gpus)).frames
    yield from refine_blocks(plan.stages, plan.load_refiner, blocks, helpers_beside(cpus, gpus))


def on_gpu(device: Device) -> bool:
    """Whether the network runs on a GPU of this machine; InputError where it is to and there is none."""
    import torch

    if device == "gpu" and not torch.cuda.is_available():
        raise InputError("device is gpu: torch finds none on this machine, expected one, or device cpu")
    return device != "cpu" and torch.cuda.is_available()


def helpers_beside(cpus: int, gpus: bool) -> int:
    """Processes that read and write beside a network process which has so many CPUs to itself.

    Where it computes on them, a quarter of them is more than reading and writing need. On a GPU it takes one CPU of
    about sixteen, to copy.
    """
    return max(1, cpus - cpus // 16 if gpus else cpus // 4)


def refine_blocks(
    stages: Stages,
    load_refiner: Callable[[], Refiner],
    blocks: Iterable[list[FrameRef]],
    helpers: int,
    network_isolated: bool = False,
) -> Iterator[list[Receipt]]:
    """Yields the receipts of each block, in order.

    While the network refines one block, `helpers` threads read the next ones and write the last. What they do to a
    frame happens in a child process each, so that a frame that crashes or hangs it is set aside like any other fault;
    with `network_isolated` so does what the network does.
    """
    keep_freed_memory()
    reaches = _reaches_children(stages)
    read = stages.extract_isolated if reaches else stages.extract_all
    write = stages.finish_isolated if reaches else stages.finish
    refiner = None if network_isolated else load_refiner()
    with ThreadPoolExecutor(helpers) as threads:
        upcoming: deque[Future[Block]] = deque()
        written: deque[Future[list[Receipt]]] = deque()
        ahead = iter(blocks)

        def read_ahead() -> None:
            while len(upcoming) <= helpers and (block := next(ahead, None)):
                upcoming.append(threads.submit(read, block))

        def blocks_read() -> Iterator[Block]:
            read_ahead()
            while upcoming:
                waiting = time.perf_counter()
                works, patches = upcoming.popleft().result()
                works[0].seconds["wait"] = time.perf_counter() - waiting
                read_ahead()
                yield works, patches

        def blocks_refined() -> Iterator[Block]:
            if refiner is not None:
                yield from stages.refine(blocks_read(), refiner)
                return
            for works, patches in blocks_read():
                yield stages.refine_isolated(works, patches, load_refiner)

        try:
            for works, probabilities in blocks_refined():
                written.append(threads.submit(write, works, probabilities))
                while len(written) > helpers or (written and written[0].done()):
                    yield written.popleft().result()
            while written:
                yield written.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _reaches_children(stages: Stages) -> bool:
    """Whether a child process sees the same files: those in memory are this process' own."""
    urls = stages.images, stages.writer.output, stages.reader.predictions
    return not any(url.startswith("memory:") for url in urls)
