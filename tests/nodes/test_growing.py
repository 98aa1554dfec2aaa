"""A cluster that begins without any machine to work on, and grows when a job asks for some."""

import json
import sys

import pytest
import torch

from tests.nodes.clusters import growing
from tests.nodes.jobs import refine
from tests.stores.conftest import objects

pytestmark = pytest.mark.slow

MACHINES = """
import json, ray
ray.init(logging_level="ERROR", log_to_driver=False)
print(json.dumps([{kind: node["Resources"].get(kind, 0) for kind in ("CPU", "GPU")} for node in ray.nodes()]))
"""


def refined_while_growing(here, store, inputs, output, types, *flags):
    """The ended job, and the CPUs and GPUs of the machines that are there then."""
    with growing(here, store.url, types) as environment:
        done = here.start(refine(inputs, output, "--workers=1", *flags), environment)
        done.wait()
        asked = here.start([sys.executable, "-c", MACHINES], environment)
        assert asked.wait() == 0, asked.said()
    print(done.said())
    return done, sorted((node["CPU"], node["GPU"]) for node in json.loads(asked.said().splitlines()[-1]))


def test_a_cluster_without_machines_grows_by_what_the_stages_need(here, store, inputs, bucket):
    types = {"reading": {"CPU": 1}, "refining": {"CPU": 1}}
    done, machines = refined_while_growing(here, store, inputs, f"{bucket}/out", types, "--device=cpu")
    assert done.wait() == 0
    assert objects(f"{bucket}/out") == inputs.refined
    assert machines == [(0, 0), (1, 0), (1, 0)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="makes believe in a GPU, and there is one")
def test_it_grows_by_a_gpu_on_which_the_network_does_not_fall_back_to_the_cpu(here, store, inputs, bucket):
    types = {"reading": {"CPU": 1}, "refining": {"GPU": 1}}
    done, machines = refined_while_growing(here, store, inputs, f"{bucket}/out", types, "--device=gpu")
    assert done.wait() == 1
    assert "has a GPU by Ray's account, but torch" in done.said()
    assert machines == [(0, 0), (0, 1), (1, 0)]
