"""The store that nodes share, with all inputs on it, and what the same jobs make of them in one process."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from pipeline.preparation import prepare
from pipeline.run import run
from pipeline.training_patches import PrepareConfig
from tests.dumps import make_dump, tree
from tests.nodes.clusters import Place, place
from tests.nodes.store import Witness, witnessed
from tests.stores.conftest import bucket, s3, upload
from tests.truths import make_truth, predict
from tests.unit.test_training import write_edges

__all__ = ["bucket", "s3"]

FRAMES = 16
"""Of the dump that is refined."""
PHOTOGRAPHS = 8
"""Of the data set that is cut."""


@dataclass(frozen=True)
class Inputs:
    """What lies on the store: `url`/dump, /truth, /edges and /weights.pth; and what becomes of it in one process."""

    url: str
    refined: dict[str, bytes]
    """The output of the run, in Parquet's form."""
    shards: dict[str, bytes]
    """Of the patch data set."""


@pytest.fixture(scope="session")
def inputs(s3, tmp_path_factory: pytest.TempPathFactory, checkpoint_path: Path) -> Inputs:
    root = tmp_path_factory.mktemp("inputs")
    dump = make_dump(root / "dump", FRAMES)
    truth = make_truth(root / "truth", PHOTOGRAPHS)
    predictions = predict(truth)
    write_edges(root / "edges")
    (root / "weights.pth").write_bytes(checkpoint_path.read_bytes())
    url = f"s3://inputs-{uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(url)
    upload(root, url)
    output = tmp_path_factory.mktemp("outputs")
    run(dump.config("parquet", output / "refined", checkpoint_path, local=True), log=lambda line: None)
    prepare(
        PrepareConfig(
            ground_truth=str(truth),
            predictions=str(predictions),
            images=str(truth.parent / "images"),
            output=str(output / "patches"),
            frames_per_block=1,
            local=True,
        ),
        log=lambda line: None,
    )
    shards = {name: data for name, data in tree(output / "patches").items() if name.endswith(".parquet")}
    return Inputs(url, tree(output / "refined"), shards)


@pytest.fixture(scope="module")
def here() -> Iterator[Place]:
    if sys.platform != "linux":
        pytest.skip("looks for processes in /proc")
    with place() as made:
        yield made


@pytest.fixture(scope="module")
def store(s3) -> Iterator[Witness]:
    """The session's store by another door, where every request is noted."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        with witnessed(listening) as witness:
            yield witness
