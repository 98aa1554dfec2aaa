"""Jobs on two Ray nodes that share a store and nothing else."""

import json
import subprocess
import sys

import pytest

from tests.nodes.clusters import cluster
from tests.nodes.jobs import prepare, refine, shards, train
from tests.stores.conftest import objects
from tests.unit.test_training import SMALL

pytestmark = pytest.mark.slow

NODES = ["east", "west"]

ALONE = """
import sys, torch, torch.distributed as dist
from jobs import train
torch.set_num_threads(1)
rank = int(sys.argv.pop(1))
dist.init_process_group("gloo", init_method=sys.argv.pop(1), rank=rank, world_size=2)
sys.exit(train.main())
"""
"""One of two processes that train together without Ray."""


@pytest.fixture(scope="module")
def two_nodes(here, store):
    with cluster(here, store.url, NODES) as environment:
        yield environment


def test_a_dump_is_refined_on_both_nodes_to_the_bytes_of_one_process(two_nodes, here, store, inputs, bucket):
    done = here.start(refine(inputs, f"{bucket}/out"), two_nodes)
    assert done.wait() == 0, done.said()
    assert objects(f"{bucket}/out") == inputs.refined
    assert store.objects_by_node("GET", "/dump/images/").keys() == {*NODES}


def test_patches_are_cut_on_both_nodes_to_the_bytes_of_one_process(two_nodes, here, store, inputs, bucket):
    done = here.start(prepare(inputs, f"{bucket}/patches"), two_nodes)
    assert done.wait() == 0, done.said()
    assert shards(f"{bucket}/patches") == inputs.shards
    assert store.objects_by_node("GET", "/truth/images/").keys() == {*NODES}
    assert store.objects_by_node("PUT", "/patches/train/").keys() == {*NODES}


def test_a_worker_on_each_node_trains_to_the_bytes_of_two_processes_without_ray(
    two_nodes, here, store, inputs, bucket, tmp_path
):
    flags = [*SMALL, "--fit.steps=6"]
    done = here.start(train(inputs, f"{bucket}/run", "--workers=2", *flags), two_nodes)
    alone = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", ALONE, str(rank), f"file://{tmp_path}/meet"),
                *(f"--data={inputs.url}/edges", f"--output={tmp_path}/run", *flags),
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    for process in alone:
        _, error = process.communicate()
        assert process.returncode == 0, error
    assert done.wait() == 0, done.said()
    assert "training: hrnet18s_128, 6 steps of 2 x 4 patches" in done.said()
    assert store.objects_by_node("GET", "/edges/train/").keys() == {"driver", *NODES}
    made = objects(f"{bucket}/run")
    for name in ("log.jsonl", "weights.safetensors"):
        assert made[name] == (tmp_path / "run" / name).read_bytes()
    assert json.loads(made["weights.json"])["batch_size"] == 8


def test_nothing_but_the_store_is_left_with_files_of_the_jobs(two_nodes, here):
    assert [file for node in ("driver", "head", *NODES) for file in here.left(node)] == []
