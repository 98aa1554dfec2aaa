"""The whole job against the bare network: the same patches, in the same run of the benchmark."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from model import Refiner
from model.backend import Precision, UnsupportedError
from model.rates import rate
from pipeline.benchmark.made_dump import MadeDump

Way = Literal["local", "fused", "spread"]
"""Where the stages of a job run: without Ray, or as Ray places them."""


BARE_SECONDS = 3.0
"""About how long the bare network is measured before a job, and again after it."""


@dataclass(frozen=True)
class EndToEnd:
    """One run of the job."""

    way: Way
    frames: int
    patches_per_s: float
    """From when the first block left the network to the last frame written."""
    bare_patches_per_s: float
    """The bare network, mean of right before and right after; machines drift."""
    cores: float
    """Share of the cores that the bare network got: below about 0.9 others were using them, and the ratio drifts; 1 for
    a network on a GPU."""
    start_s: float
    """All the rest: the process, Ray, the network, the first block."""
    peak_mb: float
    """Memory of all its processes together, shared memory counted once; 0 where the system does not tell."""

    @property
    def ratio(self) -> float:
        return self.patches_per_s / self.bare_patches_per_s


def best_network(
    checkpoint: str, precision: Precision, patches: np.ndarray, seconds: float = 1.5
) -> tuple[Refiner, Refiner, dict[int, float]]:
    """The network as a job has it, at its best batch, and patches/s by batch on patches (N, P, P, 4) uint8.

    Tried are the default batch and four times that; both are measured twice, in turns, and the faster turn counts.
    """
    usual = Refiner.from_checkpoint(checkpoint, precision=precision)
    larger = Refiner.from_checkpoint(checkpoint, precision=precision, batch_size=4 * usual.batch_size)
    found: dict[int, float] = {}
    for refiner in (usual, larger) * 2:
        try:
            measured = rate(refiner, patches, seconds)
        except UnsupportedError:  # a GPU without memory for the larger batch
            if refiner is usual:
                raise
            continue
        found[refiner.batch_size] = max(measured, found.get(refiner.batch_size, 0))
    return usual, max(usual, larger, key=lambda refiner: found.get(refiner.batch_size, 0)), found


def run_job(dump: MadeDump, way: Way, flags: Sequence[str], bare: Refiner, patches: np.ndarray) -> EndToEnd:
    """Refine the dump anew in a process of its own, with the bare network on `patches` (N, P, P, 4) before and after.

    RuntimeError where the job fails, or was too short for a rate.
    """
    config = dump.config(f"refined_{way}")
    command = [sys.executable, "-m", "jobs.refine", "--restart", "--strict"]
    for name in ("predictions", "images", "output", "nms_threshold", "image_pattern"):
        if (value := getattr(config, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--local"] if way == "local" else ["--placement", way]
    before, cores_before = _bare(bare, patches)
    text, peak = _run([*command, *flags])
    after, cores_after = _bare(bare, patches)
    count = re.search(r"^patches +(\d+) \(([\d.]+)/s", text, re.MULTILINE)
    wall = re.search(r"wall ([\d.]+)", text)
    if count is None or wall is None:
        raise RuntimeError(f"expected a rate from a job on {dump.frames} frames, which takes more than one block")
    per_s = float(count[2])
    return EndToEnd(
        way,
        dump.frames,
        per_s,
        bare_patches_per_s=(before + after) / 2,
        cores=(cores_before + cores_after) / 2,
        start_s=float(wall[1]) - int(count[1]) / per_s,
        peak_mb=peak,
    )


def _bare(refiner: Refiner, patches: np.ndarray) -> tuple[float, float]:
    """Patches per second of the network alone, and the share of its threads that had a core."""
    wall, cpu = time.perf_counter(), time.process_time()
    per_s = rate(refiner, patches, BARE_SECONDS)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return per_s, cpu / (wall * torch.get_num_threads()) if refiner.device.type == "cpu" else 1.0


def _run(command: Sequence[str]) -> tuple[str, float]:
    """What a command printed, and its processes' peak memory in MB."""
    peak = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.5):
                peak = max(peak, memory_mb(job.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        text, errors = job.communicate()
        done.set()
        watcher.join()
    if job.returncode:
        raise RuntimeError(f"the job ended with {job.returncode}: {errors[-2000:]}")
    return text, peak


def memory_mb(pid: int) -> float:
    """Memory of a process and all its descendants, what they share counted once; 0 where the system does not tell."""
    if not os.path.isdir("/proc"):
        return 0.0
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    total, queue = 0, [pid]
    while queue:
        current = queue.pop()
        queue += children.get(current, [])
        try:
            rollup = Path(f"/proc/{current}/smaps_rollup").read_text()
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total / 1024
