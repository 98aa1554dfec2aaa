import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline import dump as forms
from pipeline import flow
from pipeline.formats.cityscapes import CityscapesReader
from pipeline.run import run as refine_dump
from tests.dumps import make_dump, tree
from tests.poison import Blur

pytestmark = pytest.mark.slow


def _note(folder: str) -> None:
    node = ray.get_runtime_context().get_node_id()
    open(os.path.join(folder, node), "w").close()


@dataclass(frozen=True)
class NotingReader(CityscapesReader):
    """Leaves the id of every machine that it reads on in a folder."""

    notes: str = ""

    def read(self, ref, width, height) -> Iterator:
        _note(self.notes)
        yield from super().read(ref, width, height)


@dataclass
class NotingNetwork(Blur):
    notes: str

    def probabilities(self, *patches):
        _note(self.notes)
        return super().probabilities(*patches)


@pytest.fixture
def machines() -> Iterator[dict[str, str]]:
    """A head, and two machines with labels: role -> node id."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes = {
            role: cluster.add_node(num_cpus=2, labels={"bpr-role": role}).node_id for role in ("extract", "refine")
        }
        ray.init(address=cluster.address, logging_level="ERROR")
        yield nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_each_stage_keeps_to_the_machines_with_its_label(machines, tmp_path, checkpoint_path, monkeypatch):
    dump = make_dump(tmp_path / "dump", frames=7)
    read, refined = tmp_path / "read", tmp_path / "refined"
    read.mkdir()
    refined.mkdir()
    monkeypatch.setattr(forms, "reader", lambda p, i, *_: NotingReader(p, i, notes=str(read)))
    monkeypatch.setattr(flow, "load_refiner", lambda *_: NotingNetwork(str(refined)))
    config = dump.config(
        "cityscapes",
        tmp_path / "out",
        checkpoint_path,
        frames_per_block=2,
        extract_label="bpr-role=extract",
        refine_label="bpr-role=refine",
    )
    assert refine_dump(config, log=lambda _: None).frames == 7
    assert os.listdir(read) == [machines["extract"]]
    assert os.listdir(refined) == [machines["refine"]]
    assert len(tree(tmp_path / "out")) > 7
