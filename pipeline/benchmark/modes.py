"""What `jobs/bench.py` can measure, mode by mode, on a dump made for it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from model.backend import Precision
from model.rates import rates, table
from model.refiner import Refiner
from pipeline import demo_dump, storage
from pipeline.benchmark import results as tables
from pipeline.benchmark.chart import svg
from pipeline.benchmark.cost import CostModel
from pipeline.benchmark.end_to_end import EndToEnd, Way, best_network, memory_mb, run_job
from pipeline.benchmark.feed import measure_feed
from pipeline.benchmark.handling import measure_handling, network_stage
from pipeline.benchmark.made_dump import CITYSCAPES, COCO, DISTINCT, MadeDump, Scenery, decoded, make_dump
from pipeline.benchmark.preparation import measure_preparation
from pipeline.benchmark.results import Results
from pipeline.benchmark.scale import BLOCK_FRAMES, simulate, simulated_cluster
from pipeline.bounds import check_bounds
from pipeline.guard import GuardConfig
from pipeline.outputs import check_writable
from pipeline.records import InputError, Instance, cut_to_box
from pipeline.stages import Cutting, cut

MODES = ("network", "memory", "prepare", "scale", "feed", "smoke")
"""What can be measured instead of stages and job."""

HANDLED = 3 * DISTINCT
"""Frames whose handling is measured, so that a moment of noise does not make the median."""

SMOKE_HANDLING = 2.0
"""Times decoding and encoding alone that handling may take in the smoke run."""
SMOKE_JOB = 0.75
"""Share of the bare network that the job must reach in it."""
SMOKE_TRIES = 3
"""A machine that others use as well is sometimes slow; the best try counts."""

CPU_PATCHES, GPU_PATCHES = 2_800, 500_000
"""Patches of the dump that the job refines, unless its frames are given: some ten seconds of the network's time."""

ACTORS = (1, 2, 4)
FEED_PATCHES_PER_CPU = 75_000
"""Of the dump that is fed to a GPU that is not there: ten seconds of a CPU for decoded frames, thirty for others."""
FEED_PACE = 0.75
"""Of what the CPUs can feed at most, as the pace of the GPU that is to be kept busy."""

BLOCK_DELAY_S = 1.0
"""Long enough that four actors leave two cores time for the rest; 8 Cityscapes frames take it at 1000 patches/s."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Make a dump; measure its handling, the bare network and the whole job against each other.

    Any of `--network`, `--memory`, `--prepare`, `--scale`, `--feed` and `--smoke` measures something else instead.
    """

    coco: bool = False
    """640x480 JPEG images and a results json, instead of 2048x1024 PNG images and masks."""
    decoded: bool = False
    """The frames with next to nothing to decode, for a GPU with fewer CPU cores than decoding would need."""
    frames: int | None = None
    """Frames of the dump that the job refines; by default about 2,800 patches of them, or 500,000 on a GPU."""
    ways: tuple[Way, ...] = ("local", "fused", "spread")
    """How the job is run: without Ray, on Ray in one actor, on Ray spread over tasks."""
    checkpoint: str = "hrnet18s_128"
    """Bundled weights by name, our .safetensors, or the reference's .pth."""
    precision: Precision = "auto"
    """Arithmetic of the network; `auto` is what jobs/refine.py would take here."""
    gpu_patches_per_s: float = 70_000.0
    """Rate of one GPU that cost model and `--feed` assume where none is at hand; about an H200's, bundled weights."""
    network: bool = False
    """Every way to run the network here, on patches of the demo's photographs, beside the reference's."""
    memory: bool = False
    """Peak memory of the job on ten times the frames, beside that on the frames."""
    prepare: bool = False
    """What cutting and keeping training patches costs."""
    scale: bool = False
    """The flow on Ray alone, simulated: against the number of GPU actors, and the size of the dump."""
    scale_frames: int = 10_000
    """The largest dump that is simulated; from 100 on in powers of ten."""
    feed: bool = False
    """How many patches/s these CPUs would feed a GPU with, and whether one somewhat slower would always be busy."""
    smoke: bool = False
    """Fail where handling exceeds twice its floor, or the job falls under 75 % of the bare network; about a minute."""
    json: str | None = None
    """File for all figures."""
    plot: str | None = None
    """File for an SVG."""

    def __post_init__(self) -> None:
        check_bounds(self, "frames", 1)


def bench(config: BenchConfig, say: Callable[[str], None]) -> bool:
    """Measure what the settings ask for, saying what comes out as it does; False where a smoke run fails.

    InputError where the settings do not fit each other, or nothing could be measured.
    """
    chosen = [name for name in MODES if getattr(config, name)]
    if len(chosen) > 1:
        raise InputError(f"expected one of --{' and --'.join(chosen)}")
    for path in (config.json, config.plot):
        if path:
            check_writable(path)
    with tempfile.TemporaryDirectory() as folder:
        run = Bench(config, Path(folder), say)
        getattr(run, chosen[0] if chosen else "stages_and_job")()
    if config.json:
        storage.put(config.json, (json.dumps(run.results.plain(), indent=1) + "\n").encode())
    if config.plot:
        storage.put(config.plot, svg(run.results.charts()).encode())
    return run.passed


@dataclass
class Bench:
    """One run of the benchmark; every mode is a method."""

    config: BenchConfig
    root: Path
    """A folder for dumps."""
    say: Callable[[str], None]
    results: Results = field(default_factory=Results)
    passed: bool = True
    """Whether a smoke run has met its marks."""

    def stages_and_job(self) -> None:
        config, results = self.config, self.results
        dump = self._made(self._frames())
        results.handling = measure_handling(dump, HANDLED)
        crops = results.handling.crops
        patches = np.concatenate(crops)
        usual, best, results.bare_patches_per_s = best_network(config.checkpoint, config.precision, patches)
        results.network = network_stage(crops, usual, best)
        self.say(f"{tables.stage_table(results.handling, results.network)}\n")
        by_batch = ", ".join(f"{batch}: {per_s:.1f}" for batch, per_s in results.bare_patches_per_s.items())
        self.say(f"bare network, patches/s by batch: {by_batch}")
        self.say(tables.JOB_HEAD)
        for way in config.ways:
            self._job(dump, way, best, patches)
        on_gpu, bare = best.device.type != "cpu", max(results.bare_patches_per_s.values())
        if not on_gpu:
            self.say(tables.left_by_handling(results.handling, bare, torch.get_num_threads()))
        self.say("\n".join([*tables.rays_price(results.jobs), ""]))
        rate = bare if on_gpu else config.gpu_patches_per_s
        results.cost = CostModel(results.handling.patches, results.handling.cpu_ms, rate, measured=on_gpu)
        self.say(results.cost.text())

    def smoke(self) -> None:
        results = self.results
        if self.config.precision == "auto" and not torch.cuda.is_available():
            # The faster the network, the larger the share of handling: in fp32 the limit means the same on all CPUs.
            self.config = replace(self.config, precision="fp32")
        config = self.config
        dump = self._made(self._frames())
        for _ in range(SMOKE_TRIES):
            handling = measure_handling(dump, HANDLED)
            if results.handling is None or handling.ratio < results.handling.ratio:
                results.handling = handling
            if handling.ratio <= SMOKE_HANDLING:
                break
        self.say(f"{tables.stage_table(results.handling, None)}\n")
        patches = np.concatenate(results.handling.crops)
        _, best, results.bare_patches_per_s = best_network(config.checkpoint, config.precision, patches, seconds=1)
        self.say(tables.JOB_HEAD)
        for _ in range(SMOKE_TRIES):
            if self._job(dump, "fused", best, patches).ratio >= SMOKE_JOB:
                break
        self.say("\n".join(tables.rays_price(results.jobs)))
        handling_ratio, job_ratio = results.handling.ratio, max(job.ratio for job in results.jobs)
        self.passed = handling_ratio <= SMOKE_HANDLING and job_ratio >= SMOKE_JOB
        self.say(
            f"{'passed' if self.passed else 'FAILED'}: handling {handling_ratio:.2f}x its floor (at most"
            f" {SMOKE_HANDLING}), job {job_ratio:.2f}x the bare network (at least {SMOKE_JOB})"
        )

    def memory(self) -> None:
        if not memory_mb(os.getpid()):
            raise InputError("memory: this system does not tell that of all processes of a job, expected Linux")
        few = self._frames()
        patches = np.concatenate(measure_handling(self._made(few), HANDLED).crops)
        _, best, self.results.bare_patches_per_s = best_network(self.config.checkpoint, self.config.precision, patches)
        self.say(tables.JOB_HEAD)
        for way in self.config.ways:
            small, large = (self._job(self._made(frames), way, best, patches) for frames in (few, 10 * few))
            self.say(f"{way}: peak memory of ten times the frames {large.peak_mb / small.peak_mb:.2f}x")

    def network(self) -> None:
        self.results.ways = rates(self.config.checkpoint, _photograph_patches())
        self.say(table(self.results.ways))

    def prepare(self) -> None:
        cost = measure_preparation(self._made(self._frames()))
        self.say(f"training patches           {cost.patches}")
        self.say(f"prepare, whole             {cost.prepare_per_s:.0f} patches/s in one process")
        self.say(f"three PNG files each       {cost.files_per_s:.0f} patches/s, encoding and writing alone")
        self.say(f"MB per 1000 patches        {cost.shards_mb_per_1000:.2f} shards, {cost.files_mb_per_1000:.2f} files")

    def feed(self) -> None:
        config, results, cpus = self.config, self.results, os.cpu_count() or 1
        dump = self._made(config.frames or round(FEED_PATCHES_PER_CPU * cpus / self._scenery().patches))
        with simulated_cluster(cpus, gpus=1) as (results.ray_start_s, results.ray_task_ms):
            self.say(tables.FEED_HEAD)
            for way in config.ways:
                most = measure_feed(dump, way, math.inf)
                for found in most, measure_feed(dump, way, FEED_PACE * most.patches_per_s):
                    results.feeds.append(found)
                    self.say(tables.feed_line(found, cpus, config.gpu_patches_per_s))

    def scale(self) -> None:
        results, cpus = self.results, max(4, os.cpu_count() or 1)
        with simulated_cluster(cpus, gpus=max(ACTORS)) as (results.ray_start_s, results.ray_task_ms):
            self.say(f"Ray starts in {results.ray_start_s:.1f} s; an empty task takes {results.ray_task_ms:.2f} ms")
            self.say(tables.SCALE_HEAD)
            for actors in ACTORS:
                results.actors.append(simulate(20 * actors * BLOCK_FRAMES, actors, BLOCK_DELAY_S))
                self.say(tables.scale_line(results.actors[-1]))
            frames = 100
            while frames <= self.config.scale_frames:
                results.dumps.append(simulate(frames, ACTORS[-1], 0.0))
                self.say(tables.scale_line(results.dumps[-1]))
                frames *= 10
            if results.dumps:
                self.say(tables.block_price(results.dumps[-1], results.ray_task_ms))

    def _scenery(self) -> Scenery:
        scenery = COCO if self.config.coco else CITYSCAPES
        return decoded(scenery) if self.config.decoded else scenery

    def _frames(self) -> int:
        patches = GPU_PATCHES if torch.cuda.is_available() else CPU_PATCHES
        return self.config.frames or round(patches / self._scenery().patches)

    def _made(self, frames: int) -> MadeDump:
        self.results.scenery = self._scenery().name
        return make_dump(self.root, self._scenery(), frames)

    def _job(self, dump: MadeDump, way: Way, bare: Refiner, patches: np.ndarray) -> EndToEnd:
        flags = ["--checkpoint", self.config.checkpoint, "--precision", self.config.precision]
        self.results.jobs.append(run_job(dump, way, flags, bare, patches))
        self.say(tables.job_line(self.results.jobs[-1]))
        return self.results.jobs[-1]


def _photograph_patches() -> np.ndarray:
    """Patches (N, P, P, 4) uint8 along the coarse masks of the demo's photographs."""
    parts = []
    for photo in demo_dump.PHOTOGRAPHS:
        instances = [
            Instance(str(k), 1, 1.0, *cut_to_box(mask)) for k, mask in enumerate(demo_dump.coarse_masks(photo))
        ]
        parts.append(cut(demo_dump.photograph(photo.name), instances, Cutting(0.25), GuardConfig())[1])
    return np.concatenate(parts)
