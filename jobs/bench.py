"""What a frame costs here, stage by stage, beside the least it could cost; every ratio from one run."""

from __future__ import annotations

import sys
from functools import partial

import tyro

from jobs import ended
from pipeline.benchmark.modes import BenchConfig, bench


def main() -> int:
    """Exit status: 1 where a smoke run fails, or nothing could be measured; 130 after Ctrl-C."""
    return ended(_bench)


def _bench() -> int:
    return 0 if bench(tyro.cli(BenchConfig), partial(print, flush=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
