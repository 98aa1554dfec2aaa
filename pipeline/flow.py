"""The stages in one process (`run_local`) or on a cluster (`run_ray`): the only file that knows Ray Data.

    todo -> read + extract (CPU tasks) -> refine (actors) -> assemble + commit (CPU tasks) -> receipts -> driver

Rows are whole frames; between the stages travel their patches and probabilities as ragged tensor columns. Nothing but
the outputs touches the disk.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import storage
from pipeline.formats import Reader, Writer
from pipeline.guard import GuardConfig
from pipeline.records import FrameRef
from pipeline.stages import Cutting, Receipt, Work, assemble, commit, extract, refine

if TYPE_CHECKING:
    from model import Refiner


_BACKLOG_BLOCKS = 4
"""Blocks that may wait in memory for each network process, so that it never waits for one."""


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs to know about a run; small and picklable."""

    reader: Reader
    writer: Writer
    images: str
    cutting: Cutting
    guard: GuardConfig
    load_refiner: Callable[[], Refiner]
    blocks: list[list[FrameRef]]
    """The frames to do, in groups that are refined and committed together."""


def run_local(plan: Plan) -> Iterator[list[Receipt]]:
    """All stages in this process; yields the receipts of each block.

    The next block is read while the network refines one and the last is written.
    """
    refiner = plan.load_refiner()

    def read(block: list[FrameRef]) -> list[tuple[Work, np.ndarray]]:
        return [extract(ref, plan.reader, plan.images, plan.cutting, plan.guard) for ref in block]

    def write(works: list[Work], probabilities: list[np.ndarray]) -> list[Receipt]:
        for work, part in zip(works, probabilities):
            assemble(work, part, plan.guard)
        return commit(works, plan.writer)

    with ThreadPoolExecutor(1) as readers, ThreadPoolExecutor(1) as writers:
        upcoming = readers.submit(read, plan.blocks[0])
        written = None
        for following in [*plan.blocks[1:], None]:
            extracted = upcoming.result()
            if following is not None:
                upcoming = readers.submit(read, following)
            works, patches = [work for work, _ in extracted], [part for _, part in extracted]
            probabilities = refine(works, patches, refiner, plan.cutting.padding)
            if written is not None:
                yield written.result()
            written = writers.submit(write, works, probabilities)
        if written is not None:
            yield written.result()


def run_ray(plan: Plan, workers: int | None, gpus_per_worker: float) -> Iterator[list[Receipt]]:
    """The same stages as Ray Data operators, on the cluster at RAY_ADDRESS or a new one on this machine."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

    with _ray_session():
        pool, resources, threads = _pool(ray.cluster_resources(), len(_alive_nodes()), workers, gpus_per_worker)
        context = _data_context()
        # Without a limit everything is cut long before the network gets to it, and waits in memory.
        backlog = _BACKLOG_BLOCKS * pool * len(plan.blocks[0]) * plan.cutting.frame_bytes
        context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=backlog)
        with DataContext.current(context):
            rows = (
                ray.data.read_datasource(_blocks_source(plan.blocks))
                .map(partial(_extract_row, plan=replace(plan, blocks=[])))
                .map_batches(
                    _RefineActor,
                    fn_constructor_args=(plan.load_refiner, plan.cutting.padding, threads),
                    batch_size=len(plan.blocks[0]),
                    compute=ActorPoolStrategy(min_size=1, max_size=pool),
                    **resources,
                )
                .map_batches(partial(_write_batch, writer=plan.writer, guard=plan.guard), batch_size=None)
            )
            for batch in rows.iter_batches(batch_size=None, prefetch_batches=0):
                yield [pickle.loads(receipt) for receipt in batch["receipt"]]


def map_blocks(blocks: list[list[Any]], work: Callable[[list[Any]], Any], *, local: bool) -> Iterator[Any]:
    """`work` of every block of picklable items, as they finish: in this process, or as tasks of the Ray cluster."""
    if local:
        yield from map(work, blocks)
        return
    import ray
    from ray.data import DataContext

    with _ray_session(), DataContext.current(_data_context()):
        # A whole block is one row: Ray Data puts small blocks together as it likes.
        rows = ray.data.read_datasource(_blocks_source([[block] for block in blocks]))
        results = rows.map_batches(partial(_work_batch, work=work), batch_size=None)
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            yield from map(pickle.loads, batch["result"])


def _work_batch(batch: dict[str, np.ndarray], work: Callable[[list[Any]], Any]) -> dict[str, np.ndarray]:
    import cv2

    cv2.setNumThreads(1)
    results = [pickle.dumps(work(pickle.loads(block))) for block in batch["item"]]
    return {"result": np.array(results, object)}


def _data_context() -> Any:
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A block is a batch: splitting one would make the network wait for its rest.
    context.target_max_block_size = None
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = 600
    context.memory_usage_poll_interval_s = None
    return context


def _extract_row(row: dict[str, Any], plan: Plan) -> dict[str, Any]:
    import cv2

    cv2.setNumThreads(1)
    work, patches = extract(pickle.loads(row["item"]), plan.reader, plan.images, plan.cutting, plan.guard)
    return {"work": pickle.dumps(work), "patches": patches}


class _RefineActor:
    def __init__(self, load_refiner: Callable[[], Refiner], padding: int, threads: int) -> None:
        self.load_refiner, self.padding, self.threads = load_refiner, padding, threads
        self.refiner: Refiner | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.refiner is None:
            import torch

            # Ray calls this from another thread than __init__. A network touched in both would keep two teams of OpenMP
            # threads, which are then put to sleep after every layer: a third of the rate on two cores.
            torch.set_num_threads(self.threads)
            self.refiner = self.load_refiner()
        works = [pickle.loads(work) for work in batch["work"]]
        # One column of ragged tensors arrives as one array where all rows happen to have the same shape.
        parts = refine(works, list(batch["patches"]), self.refiner, self.padding)
        probabilities = np.empty(len(parts), object)
        for i, part in enumerate(parts):
            probabilities[i] = part
        return {"work": np.array([pickle.dumps(work) for work in works], object), "probabilities": probabilities}


def _write_batch(batch: dict[str, np.ndarray], writer: Writer, guard: GuardConfig) -> dict[str, np.ndarray]:
    import cv2

    cv2.setNumThreads(1)
    works = [pickle.loads(work) for work in batch["work"]]
    for work, probabilities in zip(works, batch["probabilities"]):
        assemble(work, probabilities, guard)
    return {"receipt": np.array([pickle.dumps(receipt) for receipt in commit(works, writer)], object)}


def _blocks_source(blocks: list[list[Any]]) -> Any:
    """A Ray Data source with one read task per block, so that a block is a unit of work and of repetition."""
    import pyarrow as pa
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Blocks(Datasource):
        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            tasks = []
            for block in blocks:
                rows = [pickle.dumps(item) for item in block]
                metadata = BlockMetadata(
                    num_rows=len(rows), size_bytes=sum(map(len, rows)), input_files=None, exec_stats=None
                )
                tasks.append(ReadTask(lambda rows=rows: [pa.table({"item": pa.array(rows, pa.binary())})], metadata))
            return tasks

    return Blocks()


def _alive_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def _pool(
    resources: dict[str, float], nodes: int, workers: int | None, gpus_per_worker: float
) -> tuple[int, dict[str, float], int]:
    """How many network processes at most, what each reserves, and its threads.

    With GPUs an actor reserves no CPU: Ray would set one aside for each, and starve the reading tasks without a word.
    Without, an actor uses all threads of its machine but leaves a quarter of its CPUs (at least one) for the other
    stages.
    """
    gpus, cpus = resources.get("GPU", 0), int(resources.get("CPU", 1))
    if gpus:
        return workers or max(1, int(gpus / gpus_per_worker)), {"num_gpus": gpus_per_worker, "num_cpus": 0}, 1
    workers = workers or max(1, nodes)
    share = max(1, cpus // workers)
    reserved = share - max(1, share // 4)
    # Not a whole number: Ray Data would run cutting inside the network's actor if both reserved the same.
    return workers, {"num_cpus": reserved - 0.01 if reserved else 0}, share


@contextmanager
def _ray_session() -> Iterator[None]:
    """Join the Ray cluster this process belongs to, or start one and stop it again."""
    import ray

    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR)
    else:
        ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    try:
        # Ray has put its own handler in the place of ours.
        with terminated_as_exit():
            yield
    finally:
        ray.shutdown()


@contextmanager
def terminated_as_exit() -> Iterator[None]:
    """Let SIGTERM (`ray job stop`, a preempted node) unwind like Ctrl-C, so that the ledger is flushed."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # only the main thread may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def load_refiner(checkpoint: str, precision: Any, batch_size: int | None) -> Refiner:
    """The network of a checkpoint, in the process that will run it."""
    from model import Refiner
    from model.checkpoint import load

    return Refiner(load(checkpoint, storage.read(checkpoint)), precision=precision, batch_size=batch_size)
