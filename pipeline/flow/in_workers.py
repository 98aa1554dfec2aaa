"""What Ray's tasks and actors do with a block, and what they do with one that their process did not survive."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import pickle
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from model.heap import keep_freed_memory
from pipeline.flow.columns import packed, unpacked, unpickled, work_columns, works_in
from pipeline.flow.local import refine_blocks
from pipeline.flow.network_thread import NetworkThread
from pipeline.flow.plan import Plan, Stages
from pipeline.flow.session import Pool, without_gpus
from pipeline.ledger import check_reached
from pipeline.records import InputError

if TYPE_CHECKING:
    from model import Refiner

_SUSPECT = 2
"""Attempts at a batch that ended their process, after which the network refines each of its frames in a child."""


def count_attempts() -> Any:
    """An actor that counts how often each piece of work was begun but not ended.

    Ray tries again for ever what its process does not survive, and does not tell it how often that was.
    """
    import ray

    class Attempts:
        def __init__(self) -> None:
            self.begun: Counter[str] = Counter()

        def begin(self, key: str) -> int:
            self.begun[key] += 1
            return self.begun[key] - 1

        def end(self, key: str) -> None:
            self.begun.pop(key, None)

    return ray.remote(Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


@contextmanager
def _attempt(attempts: Any, stage: str, key: str) -> Iterator[int]:
    """The number of earlier attempts at a piece of work that did not come to their end."""
    import ray
    from ray.exceptions import RayActorError

    try:
        earlier = ray.get(attempts.begin.remote(f"{stage} {key}"))
    except RayActorError:  # its machine is gone, and with it all that was counted
        earlier = 0
    yield earlier
    attempts.end.remote(f"{stage} {key}")


def extract_batch(batch: pa.Table, stages: Stages, attempts: Any) -> pa.Table:
    refs, works, patches = unpickled(batch["item"]), [], []
    with _attempt(attempts, "extract", refs[0].frame_id) as earlier:
        for ref in refs:
            if earlier:
                (work,), (part,) = stages.extract_isolated([ref])
            else:
                with _ended_after(stages.limits.seconds):
                    (work,), (part,) = stages.extract_all([ref])
            works.append(work)
            patches.append(part)
    return pa.table({**work_columns(works), "patches": packed(patches)})


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End this process where it takes longer: nothing else stops a call into C. Ray tries its task again."""
    # Unlike a thread of Python's it also ends a call that holds the interpreter's lock.
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


class RefineActor:
    def __init__(self, stages: Stages, load: Callable[[], Refiner], attempts: Any) -> None:
        keep_freed_memory()
        self.stages, self.load, self.attempts = stages, load, attempts
        self.network = NetworkThread(stages, load)

    def __call__(self, batch: pa.Table) -> pa.Table:
        works, sealed = unpickled(batch["work"]), batch["sealed"]
        if any(work.in_pieces for work in works):
            works, sealed = works_in(batch), None
        side = self.stages.cutting.side_px
        patches = unpacked(batch["patches"], (side, side, 4), np.uint8)
        with _attempt(self.attempts, "refine", works[0].frame_id) as earlier:
            if earlier >= _SUSPECT:
                works, parts = self.stages.refine_isolated(works, patches, self.load)
            else:
                works, parts = self.network.refine((works, patches))
        return pa.table({**work_columns(works, sealed), "probabilities": packed(parts)})


def loading(plan: Plan, pool: Pool) -> Callable[[], Refiner]:
    """What loads the network in a process of the pool, for what that has reserved."""
    return partial(_loaded, plan.load_refiner, pool.threads, "num_gpus" in pool.resources)


def _loaded(load: Callable[[], Refiner], threads: int, on_gpu: bool) -> Refiner:
    import torch

    if not on_gpu:
        without_gpus()
    torch.set_num_threads(threads)
    refiner = load()
    if on_gpu and refiner.arithmetic.startswith("cpu "):
        raise InputError(
            f"{socket.gethostname()} has a GPU by Ray's account, but torch {torch.__version__} finds none: expected a"
            " torch for CUDA and a driver that suits it, or --device cpu"
        )
    return refiner


def write_batch(batch: pa.Table, stages: Stages, attempts: Any, ledger: bool) -> dict[str, np.ndarray]:
    if ledger:
        check_reached(stages.writer.output)
    works, side = works_in(batch), stages.cutting.patch_px
    probabilities = unpacked(batch["probabilities"], (side, side), np.uint16)
    with _attempt(attempts, "write", works[0].frame_id) as earlier:
        if earlier:
            receipts = stages.finish_isolated(works, probabilities)
        else:
            with _ended_after(stages.limits.seconds):
                receipts = stages.finish(works, probabilities)
    return {"receipts": np.array([pickle.dumps(receipts)], object)}


class WholeActor:
    def __init__(self, stages: Stages, load: Callable[[], Refiner], helpers: int, attempts: Any, ledger: bool) -> None:
        if ledger:
            check_reached(stages.writer.output)
        self.stages, self.load, self.helpers, self.attempts = stages, load, helpers, attempts
        # Loaded in the thread that calls, which is not the one that makes the actor.
        self.network = lru_cache(load)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        (call,) = batch["item"]
        blocks = pickle.loads(call)
        with _attempt(self.attempts, "fused", blocks[0][0].frame_id) as earlier:
            suspect = earlier >= _SUSPECT
            load = self.load if suspect else self.network
            for receipts in refine_blocks(self.stages, load, blocks, self.helpers, network_isolated=suspect):
                yield {"receipts": np.array([pickle.dumps(receipts)], object)}


def work_batch(batch: dict[str, np.ndarray], work: Callable[[list[Any]], Any], attempts: Any) -> dict[str, np.ndarray]:
    import cv2

    cv2.setNumThreads(1)
    results = []
    for item in batch["item"]:
        block = pickle.loads(item)
        with _attempt(attempts, "work", hashlib.sha256(item).hexdigest()) as earlier:
            if earlier > _SUSPECT:
                raise InputError(f"the process that works on these has died {earlier} times: {block!r:.500}")
            results.append(pickle.dumps(work(block)))
    return {"result": np.array(results, object)}
