"""What a frame costs here, stage by stage, beside the least it could cost; every ratio from one run."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from jobs import ended
from model.backend import Precision
from model.rates import rates, table
from model.refiner import Refiner
from pipeline import demo_dump, storage
from pipeline.benchmark import results as tables
from pipeline.benchmark.chart import svg
from pipeline.benchmark.cost import CostModel
from pipeline.benchmark.end_to_end import EndToEnd, Way, best_network, run_job
from pipeline.benchmark.feed import measure_feed
from pipeline.benchmark.handling import measure_handling, network_stage
from pipeline.benchmark.made_dump import CITYSCAPES, COCO, DISTINCT, MadeDump, Scenery, decoded, make_dump
from pipeline.benchmark.preparation import measure_preparation
from pipeline.benchmark.results import Results
from pipeline.benchmark.scale import BLOCK_FRAMES, simulate
from pipeline.bounds import check_bounds
from pipeline.guard import GuardConfig
from pipeline.outputs import check_writable
from pipeline.records import InputError, Instance, cut_to_box
from pipeline.stages import Cutting, cut

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


def main() -> int:
    """Exit status: 1 where a smoke run fails, or nothing could be measured; 130 after Ctrl-C."""
    return ended(_bench)


def _bench() -> int:
    config = tyro.cli(BenchConfig)
    modes = {"network": network, "memory": memory, "prepare": prepare, "scale": scale, "feed": feed, "smoke": smoke}
    chosen = [name for name in modes if getattr(config, name)]
    if len(chosen) > 1:
        raise InputError(f"expected one of --{' and --'.join(chosen)}")
    for path in (config.json, config.plot):
        if path:
            check_writable(path)
    results = Results()
    with tempfile.TemporaryDirectory() as folder:
        status = (modes[chosen[0]] if chosen else stages_and_job)(config, Path(folder), results)
    if config.json:
        storage.put(config.json, (json.dumps(results.plain(), indent=1) + "\n").encode())
    if config.plot:
        storage.put(config.plot, svg(results.charts()).encode())
    return status


def stages_and_job(config: BenchConfig, root: Path, results: Results) -> int:
    dump = _made(config, root, _frames(config), results)
    results.handling = measure_handling(dump, HANDLED)
    crops = results.handling.crops
    patches = np.concatenate(crops)
    usual, best, results.bare_patches_per_s = best_network(config.checkpoint, config.precision, patches)
    results.network = network_stage(crops, usual, best)
    print(tables.stage_table(results.handling, results.network), end="\n\n", flush=True)
    print(
        "bare network, patches/s by batch: "
        + ", ".join(f"{batch}: {per_s:.1f}" for batch, per_s in results.bare_patches_per_s.items())
    )
    print(tables.JOB_HEAD, flush=True)
    for way in config.ways:
        _run_job(config, dump, way, best, patches, results)
    on_gpu, bare = best.device.type != "cpu", max(results.bare_patches_per_s.values())
    if not on_gpu:
        print(tables.left_by_handling(results.handling, bare, torch.get_num_threads()))
    print(*tables.rays_price(results.jobs), "", sep="\n")
    rate = bare if on_gpu else config.gpu_patches_per_s
    results.cost = CostModel(results.handling.patches, results.handling.cpu_ms, rate, measured=on_gpu)
    print(results.cost.text())
    return 0


def smoke(config: BenchConfig, root: Path, results: Results) -> int:
    if config.precision == "auto" and not torch.cuda.is_available():
        # The faster the network, the larger the share of handling: in fp32 the limit means the same on all CPUs.
        config = replace(config, precision="fp32")
    dump = _made(config, root, _frames(config), results)
    for _ in range(SMOKE_TRIES):
        handling = measure_handling(dump, HANDLED)
        if results.handling is None or handling.ratio < results.handling.ratio:
            results.handling = handling
        if handling.ratio <= SMOKE_HANDLING:
            break
    print(tables.stage_table(results.handling, None), end="\n\n", flush=True)
    patches = np.concatenate(results.handling.crops)
    _, best, results.bare_patches_per_s = best_network(config.checkpoint, config.precision, patches, seconds=1)
    print(tables.JOB_HEAD, flush=True)
    for _ in range(SMOKE_TRIES):
        if _run_job(config, dump, "fused", best, patches, results).ratio >= SMOKE_JOB:
            break
    print(*tables.rays_price(results.jobs), sep="\n")
    handling_ratio, job_ratio = results.handling.ratio, max(job.ratio for job in results.jobs)
    sound = handling_ratio <= SMOKE_HANDLING and job_ratio >= SMOKE_JOB
    print(
        f"{'passed' if sound else 'FAILED'}: handling {handling_ratio:.2f}x its floor (at most {SMOKE_HANDLING}),"
        f" job {job_ratio:.2f}x the bare network (at least {SMOKE_JOB})"
    )
    return 0 if sound else 1


def memory(config: BenchConfig, root: Path, results: Results) -> int:
    few = _frames(config)
    dump = _made(config, root, few, results)
    patches = np.concatenate(measure_handling(dump, HANDLED).crops)
    _, best, results.bare_patches_per_s = best_network(config.checkpoint, config.precision, patches)
    print(tables.JOB_HEAD, flush=True)
    for way in config.ways:
        small, large = (
            _run_job(config, _made(config, root, frames, results), way, best, patches, results)
            for frames in (few, 10 * few)
        )
        print(f"{way}: peak memory of ten times the frames {large.peak_mb / small.peak_mb:.2f}x", flush=True)
    return 0


def network(config: BenchConfig, root: Path, results: Results) -> int:
    results.ways = rates(config.checkpoint, _photograph_patches())
    print(table(results.ways))
    return 0


def prepare(config: BenchConfig, root: Path, results: Results) -> int:
    cost = measure_preparation(_made(config, root, _frames(config), results))
    print(f"training patches           {cost.patches}")
    print(f"prepare, whole             {cost.prepare_per_s:.0f} patches/s in one process")
    print(f"three PNG files each       {cost.files_per_s:.0f} patches/s, encoding and writing alone")
    print(f"MB per 1000 patches        {cost.shards_mb_per_1000:.2f} shards, {cost.files_mb_per_1000:.2f} files")
    return 0


def feed(config: BenchConfig, root: Path, results: Results) -> int:
    cpus = os.cpu_count() or 1
    frames = config.frames or round(FEED_PATCHES_PER_CPU * cpus / _scenery(config).patches)
    dump = _made(config, root, frames, results)
    with _simulated_cluster(results, cpus, gpus=1):
        print(tables.FEED_HEAD, flush=True)
        for way in config.ways:
            most = measure_feed(dump, way, math.inf)
            for found in most, measure_feed(dump, way, FEED_PACE * most.patches_per_s):
                results.feeds.append(found)
                print(tables.feed_line(found, cpus, config.gpu_patches_per_s), flush=True)
    return 0


def scale(config: BenchConfig, root: Path, results: Results) -> int:
    with _simulated_cluster(results, max(4, os.cpu_count() or 1), gpus=max(ACTORS)):
        print(f"Ray starts in {results.ray_start_s:.1f} s; an empty task takes {results.ray_task_ms:.2f} ms")
        print(tables.SCALE_HEAD, flush=True)
        for actors in ACTORS:
            frames = 20 * actors * BLOCK_FRAMES
            results.actors.append(simulate(frames, actors, BLOCK_DELAY_S))
            print(tables.scale_line(results.actors[-1]), flush=True)
        frames = 100
        while frames <= config.scale_frames:
            results.dumps.append(simulate(frames, ACTORS[-1], 0.0))
            print(tables.scale_line(results.dumps[-1]), flush=True)
            frames *= 10
        if results.dumps:
            print(tables.block_price(results.dumps[-1], results.ray_task_ms))
    return 0


def _scenery(config: BenchConfig) -> Scenery:
    scenery = COCO if config.coco else CITYSCAPES
    return decoded(scenery) if config.decoded else scenery


def _frames(config: BenchConfig) -> int:
    patches = GPU_PATCHES if torch.cuda.is_available() else CPU_PATCHES
    return config.frames or round(patches / _scenery(config).patches)


def _made(config: BenchConfig, root: Path, frames: int, results: Results) -> MadeDump:
    results.scenery = _scenery(config).name
    return make_dump(root, _scenery(config), frames)


def _run_job(
    config: BenchConfig, dump: MadeDump, way: Way, bare: Refiner, patches: np.ndarray, results: Results
) -> EndToEnd:
    flags = ["--checkpoint", config.checkpoint, "--precision", config.precision]
    results.jobs.append(run_job(dump, way, flags, bare, patches))
    print(tables.job_line(results.jobs[-1]), flush=True)
    return results.jobs[-1]


def _photograph_patches() -> np.ndarray:
    """Patches (N, P, P, 4) uint8 along the coarse masks of the demo's photographs."""
    parts = []
    for photo in demo_dump.PHOTOGRAPHS:
        instances = [
            Instance(str(k), 1, 1.0, *cut_to_box(mask)) for k, mask in enumerate(demo_dump.coarse_masks(photo))
        ]
        parts.append(cut(demo_dump.photograph(photo.name), instances, Cutting(0.25), GuardConfig())[1])
    return np.concatenate(parts)


@contextmanager
def _simulated_cluster(results: Results, cpus: int, gpus: int) -> Iterator[None]:
    """A cluster on this machine that believes in GPUs, for other processes to join; also times Ray itself."""
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
        results.ray_start_s = time.perf_counter() - started
        empty = ray.remote(lambda: None)
        ray.get([empty.remote() for _ in range(100)])
        started, tasks = time.perf_counter(), 1000
        ray.get([empty.remote() for _ in range(tasks)])
        results.ray_task_ms = (time.perf_counter() - started) / tasks * 1e3
        yield
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
