"""The stages on a Ray cluster: the only file that knows Ray Data.

spread:  todo -> read + extract (CPU tasks) -> refine (actors) -> assemble + commit (CPU tasks) -> receipts -> driver
fused:   todo -> all of it in the network's actor and its helper processes -> receipts -> driver

Spread, rows are whole frames, and their patches and probabilities travel between the stages in Arrow tables, without a
copy but those into shared memory. Nothing but the outputs touches the disk.
"""

from __future__ import annotations

import faulthandler
import hashlib
import logging
import os
import pickle
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from model.heap import keep_freed_memory
from pipeline.flow.blocks import Blocks, in_blocks, patches_per_block, patches_per_frame
from pipeline.flow.columns import packed, unpacked, unpickled, work_columns, works_in
from pipeline.flow.local import refine_blocks
from pipeline.flow.network_thread import NetworkThread
from pipeline.flow.plan import Plan, Stages
from pipeline.flow.session import (
    Placement,
    Pool,
    alive_nodes,
    alone_without,
    labelled,
    may_grow,
    network_pool,
    placed,
    ray_session,
    selected_by,
    without_gpus,
)
from pipeline.isolation import close_idle
from pipeline.ledger import check_reached
from pipeline.records import InputError
from pipeline.work import Receipt

if TYPE_CHECKING:
    from model import Refiner

_BACKLOG_BLOCKS, _BLOCKS_AT_WORK = 12, 2
"""Blocks of mean size for which there is memory: so many for each network process, so that none waits for a block, and
so many for each CPU, so that all can read. Reading gets about two thirds of the sum from Ray Data, which counts a block
as soon as it is being read."""

_IN_HAND = 3
"""Blocks that an actor may have in hand: its network refines one while the last is given away and the next taken in."""

_FUSED_BLOCKS_ON_CPU, _FUSED_BLOCKS_ON_GPU = 16, 64
"""Blocks that a fused actor is given in one call, for each of its helpers. Few calls, as the network waits at the begin
of each for the first block; but if the actor dies, all blocks of the call are done again. About a minute of a GPU."""

_FUSED_TURNS = 4
"""Times that each of several fused actors is given blocks at least, so that all end at about the same time."""

_SUSPECT = 2
"""Attempts at a batch that ended their process, after which the network refines each of its frames in a child."""


def run_ray(plan: Plan, wish: Placement) -> Iterator[list[Receipt]]:
    """The stages on the cluster at RAY_ADDRESS or a new one on this machine; yields the receipts of each block.

    `auto` is fused where everything is on one machine, whose CPUs have enough to do without copies between stages; else
    spread, so that all CPUs of the cluster keep the GPUs fed. InputError where a stage fails as a whole, such as on a
    full disk.
    """
    from ray.data import DataContext

    grows = may_grow()
    sampling = ThreadPoolExecutor(1)
    sample = sampling.submit(patches_per_frame, plan)
    with sampling, ray_session():
        nodes = [node["Resources"] for node in alive_nodes()]
        pool = network_pool([node["Resources"] for node in labelled(alive_nodes(), wish.refine_label)], wish)
        mode = placed(nodes, pool, wish)
        context = _data_context()
        kind = "GPU" if "num_gpus" in pool.resources else "CPU"
        up = any(node.get(kind) for node in nodes)
        if not up and not grows:
            raise alone_without(kind)
        with DataContext.current(context), _one_line_for_faults():
            cpus, gpus = sum(node.get("CPU", 0) for node in nodes), kind == "GPU"
            patches = patches_per_block(gpus, sent=mode == "spread")
            blocks = in_blocks(plan, sample.result(), patches=patches, processes=pool.size, cpus=cpus)
            close_idle()
            size = len(blocks.frames[0])
            context.execution_no_progress_timeout_s = standstill_s(up, size, plan.stages.limits.seconds)
            plan.place.update(placement=mode, machines=len(nodes), pool=asdict(pool), frames_per_block=size)
            rows = (_fused if mode == "fused" else _spread)(plan, blocks, wish, pool, context)
            for batch in rows.iter_batches(batch_size=None, prefetch_batches=0):
                for receipts in batch["receipts"]:
                    yield pickle.loads(receipts)
            plan.place["ray_data_stats"] = rows.stats()


def standstill_s(up: bool, frames: int, seconds: float) -> int:
    """Seconds without any progress after which Ray Data gives a run up.

    `up` says whether machines for the network are there yet: the first ones of an autoscaler may have to install
    everything. Blocks have so many `frames`, of which each may take `seconds`: a block that takes longer is given up by
    its task, then by a child process, then each of its frames alone, and all of them may hang.
    """
    return int(max(600 if up else 1800, (frames + 3) * seconds))


def _spread(plan: Plan, blocks: Blocks, wish: Placement, pool: Pool, context: Any) -> Any:
    from ray.data import ActorPoolStrategy, ExecutionResources

    attempts = _count_attempts()
    whole = {"batch_size": None, "batch_format": "pyarrow", **selected_by(wish.extract_label)}
    # Without a limit everything is cut long before the network gets to it, and waits in memory.
    cpus = sum(node["Resources"].get("CPU", 0) for node in alive_nodes())
    backlog = (_BACKLOG_BLOCKS * pool.size + _BLOCKS_AT_WORK * cpus) * blocks.patches * plan.stages.cutting.patch_bytes
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=backlog)
    # An actor that has one block in hand is not idle.
    context.autoscaling_config.actor_pool_util_downscaling_threshold /= _IN_HAND
    return (
        _read_blocks(blocks.frames)
        .map_batches(partial(_extract_batch, stages=plan.stages, attempts=attempts), **whole)
        .map_batches(
            _RefineActor,
            fn_constructor_args=(plan.stages, loading(plan, pool), attempts),
            batch_size=len(blocks.frames[0]),
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=1,
                initial_size=pool.size,
                max_size=pool.size,
                max_concurrent_calls_per_actor=_IN_HAND,
                enable_true_multi_threading=True,
            ),
            **pool.resources,
            **selected_by(wish.refine_label),
        )
        .map_batches(partial(_write_batch, stages=plan.stages, attempts=attempts, ledger=plan.ledger), **whole)
    )


def _fused(plan: Plan, blocks: Blocks, wish: Placement, pool: Pool, context: Any) -> Any:
    from ray.data import ActorPoolStrategy

    # Every row of receipts leaves the actor at once: what has not left it is done again when it dies.
    context.target_max_block_size = 1
    return _read_blocks([[block] for block in blocks.frames]).map_batches(
        _WholeActor,
        fn_constructor_args=(plan.stages, loading(plan, pool), pool.helpers, _count_attempts(), plan.ledger),
        batch_size=blocks_at_once(len(blocks.frames), pool),
        compute=ActorPoolStrategy(min_size=1, initial_size=pool.size, max_size=pool.size),
        **pool.resources,
        **selected_by(wish.refine_label),
    )


def blocks_at_once(blocks: int, pool: Pool) -> int:
    """Of so many blocks, those that a fused actor of the pool is given at a time."""
    most = (_FUSED_BLOCKS_ON_GPU if "num_gpus" in pool.resources else _FUSED_BLOCKS_ON_CPU) * pool.helpers
    turns = pool.size * (_FUSED_TURNS if pool.size > 1 else 1)
    return max(1, min(most, blocks // turns))


def map_blocks(blocks: list[list[Any]], work: Callable[[list[Any]], Any], *, local: bool) -> Iterator[Any]:
    """What `work` returns for every block of picklable items, as they finish: here, or as tasks of the Ray cluster."""
    if local:
        yield from map(work, blocks)
        return
    from ray.data import DataContext

    with ray_session(), DataContext.current(_data_context()), _one_line_for_faults():
        # A whole block is one row: Ray Data puts small blocks together as it likes.
        rows = _read_blocks([[block] for block in blocks])
        results = rows.map_batches(partial(_work_batch, work=work, attempts=_count_attempts()), batch_size=None)
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            yield from map(pickle.loads, batch["result"])


def _work_batch(batch: dict[str, np.ndarray], work: Callable[[list[Any]], Any], attempts: Any) -> dict[str, np.ndarray]:
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


def _data_context() -> Any:
    from ray.data import DataContext

    # It logs what it then raises, twice and at length, in front of the one line that says it.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A block is a batch: splitting one would make the network wait for its rest.
    context.target_max_block_size = None
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = 600
    context.memory_usage_poll_interval_s = None
    # What is raised in a task would otherwise not reach the driver, but only that something was.
    context.raise_original_map_exception = True
    return context


@contextmanager
def _one_line_for_faults() -> Iterator[None]:
    """Raise what a task raised, where it is the store's or the input's fault, instead of Ray's account of it."""
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except (RayError, ExecutionTimeoutError) as error:
        cause: BaseException | None = error
        # Ray's own error is of the type of what it wraps, too, but has a traceback as its text.
        while cause is not None and (isinstance(cause, RayTaskError) or not isinstance(cause, InputError | OSError)):
            cause = cause.cause if isinstance(cause, RayTaskError) else cause.__cause__
        if isinstance(cause, InputError):
            # Ray Data adds, on another line, how to make it try again; an InputError has `\n` for a line's end.
            raise InputError(str(cause).partition("\\nFailed to ")[0]) from None
        if cause is not None:
            raise cause from None
        if isinstance(error, RayTaskError):
            raise  # a fault in our own code, which deserves its traceback
        reason = " ".join(str(error).split())
        raise InputError(f"Ray gave up ({reason:.300}); the same command goes on from here") from None


def _count_attempts() -> Any:
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


def _extract_batch(batch: pa.Table, stages: Stages, attempts: Any) -> pa.Table:
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


class _RefineActor:
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


def _write_batch(batch: pa.Table, stages: Stages, attempts: Any, ledger: bool) -> dict[str, np.ndarray]:
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


class _WholeActor:
    def __init__(self, stages: Stages, load: Callable[[], Refiner], helpers: int, attempts: Any, ledger: bool) -> None:
        if ledger:
            check_reached(stages.writer.output)
        self.stages, self.load, self.helpers, self.attempts = stages, load, helpers, attempts
        # Loaded in the thread that calls, which is not the one that makes the actor.
        self.network = lru_cache(load)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        blocks = [pickle.loads(block) for block in batch["item"]]
        with _attempt(self.attempts, "fused", blocks[0][0].frame_id) as earlier:
            suspect = earlier >= _SUSPECT
            load = self.load if suspect else self.network
            for receipts in refine_blocks(self.stages, load, blocks, self.helpers, network_isolated=suspect):
                yield {"receipts": np.array([pickle.dumps(receipts)], object)}


def _read_blocks(blocks: list[list[Any]]) -> Any:
    """A Ray data set with one read task per block, so that a block is a unit of work and of repetition."""
    import ray
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Source(Datasource):
        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            tasks = []
            for block in blocks:
                rows = [pickle.dumps(item) for item in block]
                metadata = BlockMetadata(num_rows=len(rows), size_bytes=sum(map(len, rows)), exec_stats=None)
                tasks.append(ReadTask(lambda rows=rows: [pa.table({"item": pa.array(rows, pa.binary())})], metadata))
            return tasks

    # Unless told how many there are, Ray Data splits blocks until they are hundreds.
    return ray.data.read_datasource(Source(), override_num_blocks=len(blocks))
