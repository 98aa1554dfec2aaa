"""The stages on a Ray cluster: the only file that knows Ray Data.

spread:  todo -> read + extract (CPU tasks) -> refine (actors) -> assemble + commit (CPU tasks) -> receipts -> driver
fused:   todo -> all of it in the network's actor and its helper processes -> receipts -> driver

Spread, rows are whole frames, and their patches and probabilities travel between the stages in Arrow tables, without a
copy but those into shared memory. Nothing but the outputs touches the disk.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.flow.blocks import Blocks, in_blocks, patches_per_block, patches_per_frame
from pipeline.flow.in_workers import (
    RefineActor,
    WholeActor,
    count_attempts,
    extract_batch,
    loading,
    work_batch,
    write_batch,
)
from pipeline.flow.plan import Plan
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
)
from pipeline.isolation import close_idle
from pipeline.records import InputError
from pipeline.work import Receipt

_BACKLOG_BLOCKS, _BLOCKS_AT_WORK = 12, 2
"""Blocks of mean size for which there is memory: so many for each network process, so that none waits for a block, and
so many for each CPU, so that all can read. Reading gets about two thirds of the sum from Ray Data, which counts a block
as soon as it is being read."""

_IN_HAND = 3
"""Blocks that an actor may have in hand: its network refines one while the last is given away and the next taken in."""

_FUSED_BLOCKS_ON_CPU, _FUSED_BLOCKS_ON_GPU = 16, 64
"""Blocks that a fused actor is given in one call, for each of its helpers. Few calls, as the network waits at the begin
of each for the first block; but if the actor dies, all blocks of the call are done again. About a minute of a GPU."""

_UNTAKEN = 64
"""Finished blocks of a fused actor that may wait for the driver, which takes them up ten times a second. By Ray Data's
default an actor stands still once two are waiting."""

_HANDING_OUT_CPUS = 0.01
"""What a task reserves that hands blocks to a fused actor, and computes nothing. With a whole CPU, runs that share a
machine would wait for each other for ever: their actors leave none. Not 0, as an actor may reserve: Ray Data would make
the task part of the actor."""

_FUSED_TURNS = 4
"""Times that each of several fused actors is given blocks at least, so that all end at about the same time."""


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

    attempts = count_attempts()
    whole = {"batch_size": None, "batch_format": "pyarrow", **selected_by(wish.extract_label)}
    # Without a limit everything is cut long before the network gets to it, and waits in memory.
    cpus = sum(node["Resources"].get("CPU", 0) for node in alive_nodes())
    backlog = (_BACKLOG_BLOCKS * pool.size + _BLOCKS_AT_WORK * cpus) * blocks.patches * plan.stages.cutting.patch_bytes
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=backlog)
    # An actor that has one block in hand is not idle.
    context.autoscaling_config.actor_pool_util_downscaling_threshold /= _IN_HAND
    return (
        _read_blocks(blocks.frames)
        .map_batches(partial(extract_batch, stages=plan.stages, attempts=attempts), **whole)
        .map_batches(
            RefineActor,
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
        .map_batches(partial(write_batch, stages=plan.stages, attempts=attempts, ledger=plan.ledger), **whole)
    )


def _fused(plan: Plan, blocks: Blocks, wish: Placement, pool: Pool, context: Any) -> Any:
    from ray.data import ActorPoolStrategy

    # Every row of receipts leaves the actor at once: what has not left it is done again when it dies.
    context.target_max_block_size = 1
    context._max_num_blocks_in_streaming_gen_buffer = _UNTAKEN
    at_once = blocks_at_once(len(blocks.frames), pool)
    calls = [blocks.frames[start : start + at_once] for start in range(0, len(blocks.frames), at_once)]
    handed_out = _read_blocks([[call] for call in calls], num_cpus=_HANDING_OUT_CPUS, concurrency=min(2, len(calls)))
    return handed_out.map_batches(
        WholeActor,
        fn_constructor_args=(plan.stages, loading(plan, pool), pool.helpers, count_attempts(), plan.ledger),
        batch_size=1,
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
        results = rows.map_batches(partial(work_batch, work=work, attempts=count_attempts()), batch_size=None)
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            yield from map(pickle.loads, batch["result"])


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
        if isinstance(error, ExecutionTimeoutError):
            reason = f"{reason.partition('. ')[0]}: the machines may have no room beside other work, see `ray status`"
        raise InputError(f"Ray gave up ({reason:.300}); the same command goes on from here") from None


def _read_blocks(blocks: Sequence[Sequence[Any]], **task: Any) -> Any:
    """A Ray data set with one read task per block, so that a block is a unit of work and of repetition.

    A row is one item, pickled; `task` says what reading reserves.
    """
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
    return ray.data.read_datasource(Source(), override_num_blocks=len(blocks), **task)
