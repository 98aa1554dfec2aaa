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


@pytest.mark.skipif(torch.cuda.is_available(), reason="makes believe in a GPU, and there is one")
def test_a_cluster_without_machines_grows_by_what_the_stages_need(here, store, inputs, bucket):
    types = {"reading": {"CPU": 1}, "refining": {"GPU": 1}}
    with growing(here, store.url, types) as environment:
        done = here.start(refine(inputs, f"{bucket}/out", "--device=gpu", "--workers=1"), environment)
        assert done.wait() == 0, done.said()
        asked = here.start([sys.executable, "-c", MACHINES], environment)
        assert asked.wait() == 0, asked.said()
    print(done.said())
    assert objects(f"{bucket}/out") == inputs.refined
    machines = json.loads(asked.said().splitlines()[-1])
    assert sorted((node["CPU"], node["GPU"]) for node in machines) == [(0, 0), (0, 1), (1, 0)]
