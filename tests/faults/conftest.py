"""One bench for all tests of faults, so that the undisturbed runs are made once."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.faults import bench as benches


@pytest.fixture(scope="session")
def bench() -> Iterator[benches.Bench]:
    if sys.platform != "linux":
        pytest.skip("looks for processes in /proc")
    with benches.bench(without_ray=True) as made:
        yield made
