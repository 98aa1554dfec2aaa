"""What a run of the benchmark has measured, as tables, as plain values, and as charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from model.rates import BASE, Rate
from pipeline.benchmark.chart import Bar, Chart
from pipeline.benchmark.cost import CostModel
from pipeline.benchmark.end_to_end import EndToEnd
from pipeline.benchmark.feed import Feed
from pipeline.benchmark.handling import Handling, Stage
from pipeline.benchmark.scale import BLOCK_FRAMES, ScaleRun

RAY_CALLS_PER_BLOCK = 3
"""Read and cut, refine, paste and write: what a block on Ray takes at least."""


BUSY = 0.9
"""Share of the cores that the bare network got, below which a machine was not its own."""


@dataclass
class Results:
    """Filled by the parts of a run as they end; empty where one was not asked for."""

    scenery: str = ""
    handling: Handling | None = None
    network: Stage | None = None
    bare_patches_per_s: dict[int, float] = field(default_factory=dict)
    """By patches per batch."""
    ways: list[Rate] = field(default_factory=list)
    """To run the network, beside the reference's."""
    jobs: list[EndToEnd] = field(default_factory=list)
    ray_start_s: float = 0.0
    ray_task_ms: float = 0.0
    """An empty task, of many at once."""
    actors: list[ScaleRun] = field(default_factory=list)
    """With a fixed delay, by number of actors."""
    dumps: list[ScaleRun] = field(default_factory=list)
    """Without delay, by size of the dump."""
    feeds: list[Feed] = field(default_factory=list)
    """Of each way the most, and what a stand-in of a slower pace got."""
    cost: CostModel | None = None

    def plain(self) -> dict[str, Any]:
        """For a json, with the ratios."""
        values = asdict(self) | {"handling": None, "network": None}
        if self.handling is not None:
            stages = [stage for stage in (*self.handling.stages, self.network) if stage]
            values["stages"] = [asdict(stage) | {"ratio": stage.ratio} for stage in stages]
            values["handling"] = {
                name: getattr(self.handling, name)
                for name in ("patches", "copy_gb_per_s", "cpu_ms", "floor_ms", "ratio")
            }
        values["jobs"] = [asdict(job) | {"ratio": job.ratio} for job in self.jobs]
        # A json has no infinity.
        values["feeds"] = [asdict(feed) | ({"busy": feed.busy} if feed.busy else {"pace": None}) for feed in self.feeds]
        return {name: value for name, value in values.items() if value}

    def charts(self) -> list[Chart]:
        """What was measured in charts, each of one unit."""
        charts = []
        if self.handling is not None:
            bars = [
                Bar(stage.name, stage.cpu_ms, stage.floor_ms, f"{stage.cpu_ms:.1f} ms, {stage.ratio:.2f}x")
                for stage in self.handling.stages
            ]
            charts.append(Chart("CPU ms per frame outside the network; below: floor", bars))
        if self.ways:
            base = next(way for way in self.ways if way.name == BASE).patches_per_s
            bars = [Bar(way.name, way.patches_per_s, base, f"{way.patches_per_s:.0f}") for way in self.ways]
            charts.append(Chart(f"patches/s of the bare network; below: {BASE}", bars))
        if self.jobs:
            bars = [
                Bar(job.way, job.patches_per_s, job.bare_patches_per_s, f"{job.patches_per_s:.0f}, {job.ratio:.2f}x")
                for job in self.jobs
            ]
            charts.append(Chart("patches/s end to end; below: the bare network", bars))
        if self.feeds:
            bars = [
                Bar(
                    most.way,
                    most.patches_per_s,
                    paced.patches_per_s,
                    f"{most.patches_per_s:.0f}, {paced.busy:.2f} busy",
                )
                for most, paced in zip(self.feeds[::2], self.feeds[1::2])
            ]
            charts.append(Chart("patches/s that the CPUs feed a GPU; below: one of a given pace", bars))
        if self.actors:
            one = self.actors[0]
            bars = [
                Bar(
                    f"{run.actors} actors",
                    run.frames_per_s,
                    run.actors * one.frames_per_s / one.actors,
                    f"{run.frames_per_s:.0f} frames/s",
                )
                for run in self.actors
            ]
            charts.append(Chart("simulated GPUs, frames/s; below: as many times one actor", bars))
        if self.dumps:
            bars = [
                Bar(
                    f"{run.frames:,} frames",
                    run.driver_peak_mb,
                    run.driver_before_mb,
                    f"{run.driver_peak_mb:.0f} MB, {run.frames_per_s:.0f} frames/s",
                )
                for run in self.dumps
            ]
            charts.append(Chart("memory of the driver, MB; below: before the flow", bars))
        return charts


def stage_table(handling: Handling, network: Stage | None) -> str:
    """One line for each stage in a frame's order, and the sum of all that is not the network."""
    lines = [
        f"{'stage':<16}{'CPU ms/frame':>13}{'MB/frame':>10}{'patches/s':>11}{'floor ms':>10}{'ratio':>8}  floor is",
    ]

    def line(name: str, cpu_ms: float, moved_mb: float, floor_ms: float, floor: str) -> str:
        per_s = 1e3 * handling.patches / cpu_ms
        return f"{name:<16}{cpu_ms:13.1f}{moved_mb:10.2f}{per_s:11.0f}{floor_ms:10.2f}{cpu_ms / floor_ms:8.2f}  {floor}"

    for stage in _in_order(handling, network):
        lines.append(line(stage.name, stage.cpu_ms, stage.moved_mb, stage.floor_ms, stage.floor))
    moved = sum(stage.moved_mb for stage in handling.stages)
    lines.append(line("handling", handling.cpu_ms, moved, handling.floor_ms, "decode + encode alone"))
    lines.append(
        f"{handling.patches:.0f} patches per frame; patches/s are per CPU second;"
        f" copies run at {handling.copy_gb_per_s:.1f} GB/s"
    )
    return "\n".join(lines)


def _in_order(handling: Handling, network: Stage | None) -> list[Stage]:
    return [*handling.stages[:3], *([network] if network else []), *handling.stages[3:]]


JOB_HEAD = f"{'job':<8}{'frames':>8}{'patches/s':>11}{'bare':>10}{'ratio':>7}{'cores':>7}{'start s':>9}{'peak MB':>9}"


def job_line(job: EndToEnd) -> str:
    """One way to run the job, under JOB_HEAD."""
    return (
        f"{job.way:<8}{job.frames:8d}{job.patches_per_s:11.1f}{job.bare_patches_per_s:10.1f}{job.ratio:7.2f}"
        f"{job.cores:7.2f}{job.start_s:9.1f}{job.peak_mb:9.0f}"
    )


def rays_price(jobs: Sequence[EndToEnd]) -> list[str]:
    """What Ray costs against running without, and whether these ratios hold."""
    lines = []
    local = next((job for job in jobs if job.way == "local"), None)
    for job in jobs:
        if local and job.way != "local":
            price = f"{job.ratio / local.ratio:.2f}x of run_local's share of the bare network"
            lines.append(f"Ray's price, {job.way}: {price}")
    if any(job.cores < BUSY for job in jobs):
        lines.append(f"others were using the machine (cores below {BUSY}): these ratios drift")
    return lines


def left_by_handling(handling: Handling, bare_patches_per_s: float, cpus: int) -> str:
    """The most of the bare network that a job can reach where both share the CPUs."""
    network_ms = 1e3 * cpus * handling.patches / bare_patches_per_s
    most = network_ms / (network_ms + handling.cpu_ms)
    return f"handling, on the same {cpus} CPUs, leaves at most {most:.2f}x of the bare network"


FEED_HEAD = f"{'fed':<8}{'pace':>10}{'patches/s':>11}{'busy':>7}{'per CPU':>9}"


def feed_line(feed: Feed, cpus: int, gpu_patches_per_s: float) -> str:
    """One run with the stand-in, under FEED_HEAD; of one that waited for nothing, what follows for a GPU."""
    line = f"{feed.way:<8}{feed.pace:10.0f}{feed.patches_per_s:11.0f}"
    if feed.busy:
        return f"{line}{feed.busy:7.2f}"
    per_cpu = feed.patches_per_s / cpus
    needed = (
        f"a GPU of {gpu_patches_per_s:,.0f} patches/s takes {gpu_patches_per_s / per_cpu:.0f} CPUs like these {cpus}"
    )
    return f"{line}{'':7}{per_cpu:9.0f}  {needed}"


SCALE_HEAD = (
    f"{'frames':>8}{'actors':>8}{'delay s':>9}{'frames/s':>10}{'start s':>9}{'wall s':>8}"
    f"{'driver MB':>11}{'before':>8}{'ms/block':>10}{'wait ms':>9}"
)


def scale_line(run: ScaleRun) -> str:
    """One simulated run, under SCALE_HEAD; ms/block is the driver's CPU, `wait` an actor's for each block."""
    return (
        f"{run.frames:8d}{run.actors:8d}{run.delay_s:9.2f}{run.frames_per_s:10.1f}{run.start_s:9.1f}"
        f"{run.wall_s:8.1f}{run.driver_peak_mb:11.0f}{run.driver_before_mb:8.0f}{run.driver_ms_per_block:10.1f}"
        f"{run.wait_ms:9.1f}"
    )


def block_price(run: ScaleRun, ray_task_ms: float) -> str:
    """What a block without delay takes on Ray beside empty tasks, and what bounds a cluster."""
    return (
        f"a block of {BLOCK_FRAMES} frames without delay: {run.ms_per_block:.0f} ms of this machine,"
        f" {run.ms_per_block / (RAY_CALLS_PER_BLOCK * ray_task_ms):.1f}x of {RAY_CALLS_PER_BLOCK} empty tasks;"
        f" {run.driver_ms_per_block:.0f} ms of CPU in the driver, so that it gives out"
        f" {1e3 / run.driver_ms_per_block:.0f} blocks/s at most"
    )
