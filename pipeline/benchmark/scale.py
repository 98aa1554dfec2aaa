"""What the flow on Ray itself costs, and how it scales: made frames, and a stand-in that waits as for a GPU."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np

from pipeline.flow import Placement, Plan, Stages, run_ray
from pipeline.guard import GuardConfig
from pipeline.ledger import Ledger
from pipeline.limits import LimitsConfig
from pipeline.progress import Progress
from pipeline.records import Frame, FrameRef, Instance
from pipeline.stages import Cutting

BLOCK_FRAMES = 8
SIDE_PX = 96
DRAWN = "frame.png"
"""The one image that is every frame's."""


@dataclass(frozen=True)
class ScaleRun:
    """One simulated dump, driven from a process of its own."""

    frames: int
    actors: int
    delay_s: float
    """What the stand-in takes for a block."""
    frames_per_s: float
    """Of the second half of the dump, when all actors are up, but for its last blocks."""
    start_s: float
    """From the call of the flow to the first receipt."""
    wall_s: float
    driver_before_mb: float
    """Memory of the driver with the dump listed, before the flow."""
    driver_peak_mb: float
    driver_ms_per_block: float
    """CPU milliseconds of the driver, at the same time."""
    wait_ms: float
    """What an actor waits for a block, at the same time."""

    @property
    def ms_per_block(self) -> float:
        return 1e3 * BLOCK_FRAMES / self.frames_per_s


@dataclass(frozen=True)
class MadeReader:
    """Every frame has one disc."""

    predictions: str = ""

    def list_frames(self, known: Mapping[str, str] | None = None) -> list[FrameRef]:
        return []

    def read(self, ref: FrameRef, width: int, height: int) -> Iterator[Instance]:
        mask = np.zeros((48, 48), np.uint8)
        cv2.circle(mask, (24, 24), 23, 1, cv2.FILLED)
        yield Instance("0", 1, 1.0, mask.astype(bool), (24, 24))

    def identity(self, ref: FrameRef, instances: Sequence[Instance]) -> str:
        return ref.identity


@dataclass(frozen=True)
class NoWriter:
    """Writes nothing."""

    output: str = ""
    result: ClassVar[str] = ""

    def commit(self, frames: Sequence[Frame]) -> str:
        return ""

    def finish(self, refs: Sequence[FrameRef], parts: Mapping[str, str]) -> list[str]:
        return []

    def withdraw(self, gone: Sequence[FrameRef], listed: Sequence[FrameRef]) -> None:
        pass


@dataclass(frozen=True)
class Waiting:
    """Takes the place of a Refiner: waits for a fixed time and answers with the coarse mask."""

    delay_s: float
    arithmetic: str = "none"
    places: int = 0

    def each(self, blocks: Iterable[Sequence[np.ndarray]]) -> Iterator[np.ndarray]:
        for patches in blocks:
            time.sleep(self.delay_s)
            yield np.concatenate(patches)[..., 3] * np.uint16(65535)


@contextmanager
def simulated_cluster(cpus: int, gpus: int) -> Iterator[tuple[float, float]]:
    """A cluster on this machine that believes in GPUs, for other processes to join.

    Yields the seconds that Ray took to start, and the milliseconds of an empty task, of many at once.
    """
    import ray

    started = time.perf_counter()
    ray.init(
        address="local",
        num_cpus=cpus,
        num_gpus=gpus,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    try:
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        start_s = time.perf_counter() - started
        empty = ray.remote(lambda: None)
        ray.get([empty.remote() for _ in range(100)])
        started, tasks = time.perf_counter(), 1000
        ray.get([empty.remote() for _ in range(tasks)])
        yield start_s, (time.perf_counter() - started) / tasks * 1e3
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        ray.shutdown()


def simulate(frames: int, actors: int, delay_s: float) -> ScaleRun:
    """Run a dump of that many made frames through the cluster that RAY_ADDRESS names, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_drive, frames, actors, delay_s).result()


def _drive(frames: int, actors: int, delay_s: float) -> ScaleRun:
    with tempfile.TemporaryDirectory() as folder, closing(Ledger(f"{folder}/output")) as ledger:
        noise = np.random.default_rng(0).integers(0, 256, (SIDE_PX, SIDE_PX, 3), np.uint8)
        cv2.imwrite(str(Path(folder) / DRAWN), noise)
        ledger.open({})
        refs = [FrameRef(f"made_{number:09d}", DRAWN, identity=f"{number:032x}") for number in range(frames)]
        stages = Stages(MadeReader(), NoWriter(), folder, Cutting(0.25), GuardConfig(), LimitsConfig())
        progress = Progress(frames, 0, log=lambda line: None)
        before = _memory_mb("VmRSS")
        started = time.perf_counter()
        arrivals: list[float] = []
        cpu: list[float] = []
        waits: list[float] = []
        plan = Plan(stages, partial(Waiting, delay_s), refs, BLOCK_FRAMES)
        for receipts in run_ray(plan, Placement("spread", workers=actors)):
            ledger.record(receipts)
            progress.update(receipts)
            arrivals.append(time.perf_counter())
            cpu.append(time.process_time())
            waits.append(sum(receipt.seconds.get("wait", 0.0) for receipt in receipts))
        if progress.frames != frames:
            raise RuntimeError(f"{frames - progress.frames} simulated frames were set aside: {ledger.aside}"[:1000])
        # At first not all actors are up, and at last not all have a block.
        half = len(arrivals) // 2
        last = len(arrivals) - 1 - min(2 * actors, half // 2)
        timed = last - half
        return ScaleRun(
            frames,
            actors,
            delay_s,
            frames_per_s=timed * BLOCK_FRAMES / (arrivals[last] - arrivals[half]),
            start_s=arrivals[0] - started,
            wall_s=arrivals[-1] - started,
            driver_before_mb=before,
            driver_peak_mb=_memory_mb("VmHWM"),
            driver_ms_per_block=(cpu[last] - cpu[half]) / timed * 1e3,
            wait_ms=float(np.mean(waits[half:last])) * 1e3,
        )


def _memory_mb(name: str) -> float:
    """Resident memory of this process now (`VmRSS`) or at its peak (`VmHWM`); its peak where /proc is missing."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1024)
