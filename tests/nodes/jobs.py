"""The command lines of jobs on the inputs that the tests share."""

from __future__ import annotations

import sys
from typing import Any

from tests.faults.bench import REPOSITORY
from tests.nodes.conftest import Inputs
from tests.stores.conftest import objects


def job(name: str, *flags: str, **settings: Any) -> list[str]:
    """The command line of `jobs/<name>.py`; `frames_per_block=2` becomes `--frames-per-block=2`."""
    given = [f"--{setting.replace('_', '-')}={value}" for setting, value in settings.items()]
    return [sys.executable, str(REPOSITORY / "jobs" / f"{name}.py"), *given, *flags]


def refine(inputs: Inputs, output: str, *flags: str) -> list[str]:
    """The job that makes `inputs.refined`."""
    return job(
        "refine",
        # A network with random weights changes every mask, and the guard would refuse them all.
        "--guard.no-enabled",
        *flags,
        predictions=f"{inputs.url}/dump/frames.parquet",
        images=f"{inputs.url}/dump/images",
        output=output,
        checkpoint=f"{inputs.url}/weights.pth",
        frames_per_block=2,
    )


def prepare(inputs: Inputs, output: str) -> list[str]:
    """The job that makes `inputs.shards`."""
    return job(
        "prepare",
        predictions=f"{inputs.url}/truth/predicted.json",
        ground_truth=f"{inputs.url}/truth/truth.json",
        images=f"{inputs.url}/truth/images",
        output=output,
        frames_per_block=1,
    )


def train(inputs: Inputs, output: str, *flags: str) -> list[str]:
    return job("train", *flags, data=f"{inputs.url}/edges", output=output)


def shards(url: str) -> dict[str, bytes]:
    """The shards of a patch data set by their paths; the card beside them also names where the inputs lay."""
    return {name: data for name, data in objects(url).items() if name.endswith(".parquet")}
