"""What a frame costs here, stage by stage, beside the least it could cost; every figure from one run."""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pipeline import benchmark
from pipeline.benchmark_prepare import measure_preparation


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Make a Cityscapes-like dump and measure handling, the bare network, and the whole job against each other."""

    frames: int = 20
    """Frames of 2048 x 1024 px with 20 instances each."""
    checkpoint: str = "hrnet18s_128"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    local: bool = False
    """Measure the job without Ray."""
    memory: bool = False
    """Also run ten times the frames and compare the peak memory."""
    prepare: bool = False
    """Measure only what cutting and keeping training patches costs."""


def main() -> int:
    config = tyro.cli(BenchConfig)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if config.prepare:
            cost = measure_preparation(root, config.frames)
            print(f"training patches           {cost.patches}")
            print(f"prepare, whole             {cost.prepare_per_s:.0f} patches/s in one process")
            print(f"three PNG files each       {cost.files_per_s:.0f} patches/s, encoding and writing alone")
            print(
                f"MB per 1000 patches        {cost.shards_mb_per_1000:.2f} shards, {cost.files_mb_per_1000:.2f} files"
            )
            return 0
        benchmark.make_dump(root, config.frames)
        handling = benchmark.measure_handling(root, min(config.frames, benchmark.DISTINCT))
        print(f"patches per frame          {handling.patches:.0f}")
        print("CPU ms per frame, one thread, outside the network")
        for name in ("decode_floor", "encode_floor", "extract", "assemble", "commit"):
            print(f"  {name:<24} {getattr(handling, name):8.1f}")
        print(f"handling / floor           {handling.ratio:.2f}")
        arguments = ["--checkpoint", config.checkpoint, "--precision", config.precision, *["--local"] * config.local]
        peaks = []
        for frames in [config.frames, *[10 * config.frames] * config.memory]:
            benchmark.make_dump(root, frames)
            # The machine's speed drifts: the bare network is measured on both sides of the job.
            before = benchmark.bare_rates(config.checkpoint, config.precision)
            text, peak = benchmark.run_job(root, f"refined_{frames}", arguments)
            after = benchmark.bare_rates(config.checkpoint, config.precision)
            bare = {batch: (before[batch] + after[batch]) / 2 for batch in before}
            print("bare network, patches/s    " + "  ".join(f"{batch}: {rate:.1f}" for batch, rate in bare.items()))
            print(text.strip())
            if found := re.search(r"\(([\d.]+)/s after start-up\)", text):
                print(f"job / bare network         {float(found[1]) / max(bare.values()):.2f}")
            print(f"peak memory                {peak:.0f} MB at {frames} frames", flush=True)
            peaks.append(peak)
        if config.memory:
            print(f"peak memory, 10x frames    {peaks[1] / peaks[0]:.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
