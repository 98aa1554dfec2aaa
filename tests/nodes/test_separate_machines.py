"""Jobs on two machines with addresses, processes and disks of their own: namespaces of Linux."""

import sys
from contextlib import ExitStack

import pytest

from tests.nodes.clusters import JOINED, RAY, STORE_BYTES
from tests.nodes.jobs import prepare, refine, shards, train
from tests.nodes.machines import machines, why_not
from tests.nodes.store import witnessed
from tests.stores.conftest import objects
from tests.unit.test_training import SMALL

HINDRANCE = why_not()

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(HINDRANCE), reason=HINDRANCE)]

HEAD, WORKER = "head", "worker"


class Site:
    """Two machines with Ray on them, and the store at an address of their network."""

    def __init__(self, here, made, store):
        self.here, self.store = here, store
        self.machines = {machine.name: machine for machine in made}
        self.gcs = f"{self.machines[HEAD].address}:6379"
        self.addresses = {machine.address for machine in made}

    def start(self, machine, words, **more):
        environment = self.here.environment(self.store.url, machine, NO_PROXY="*", no_proxy="*", **more)
        return self.here.start(self.machines[machine].command(words), environment)

    def node(self, machine, *flags):
        """Starts Ray there."""
        ray = self.here.root / machine / "tmp" / "ray"
        words = [RAY, "start", "--block", "--num-cpus=1", f"--object-store-memory={STORE_BYTES}", f"--temp-dir={ray}"]
        return self.start(machine, [*words, f"--node-ip-address={self.machines[machine].address}", *flags])

    def has(self, count):
        """Whether there are so many nodes."""
        return self.start(HEAD, [sys.executable, "-c", JOINED, str(count)], RAY_ADDRESS=self.gcs).wait() == 0

    def run(self, words):
        """Runs a job on the head's machine to its end, and returns what it said."""
        job = self.start(HEAD, words, RAY_ADDRESS=self.gcs)
        assert job.wait() == 0, job.said()
        return job.said()

    def asked(self, method, within):
        """The addresses that such requests to the store came from."""
        return {one.address for one in self.store.requests if one.method == method and within in one.path}


@pytest.fixture(scope="module")
def site(here, s3):
    with ExitStack() as stack:
        listening, made = stack.enter_context(machines(here.root, [HEAD, WORKER]))
        site = Site(here, made, stack.enter_context(witnessed(listening)))
        head = site.node(HEAD, "--head", "--port=6379", "--include-dashboard=false")
        head.await_that(lambda: site.has(1), "a head that drivers can join")
        worker = site.node(WORKER, f"--address={site.gcs}")
        worker.await_that(lambda: site.has(2), "a node that has joined")
        yield site


def test_a_dump_is_refined_by_both_machines_to_the_bytes_of_one_process(site, inputs, bucket):
    site.run(refine(inputs, f"{bucket}/out"))
    assert objects(f"{bucket}/out") == inputs.refined
    assert site.asked("GET", "/dump/images/") == site.addresses


def test_patches_are_cut_by_both_machines_to_the_bytes_of_one_process(site, inputs, bucket):
    site.run(prepare(inputs, f"{bucket}/patches"))
    assert shards(f"{bucket}/patches") == inputs.shards
    assert site.asked("PUT", "/patches/train/") == site.addresses


def test_a_worker_on_each_machine_trains(site, inputs, bucket):
    said = site.run(train(inputs, f"{bucket}/run", "--workers=2", "--fit.steps=4", *SMALL))
    assert "training: hrnet18s_128, 4 steps of 2 x 4 patches" in said
    assert site.asked("GET", "/edges/train/") == site.addresses
    assert objects(f"{bucket}/run")["log.jsonl"].count(b"\n") == 4


def test_machines_that_see_another_output_end_the_run(site, inputs):
    # A path that every machine has, on a disk of its own.
    output = site.here.root / "out"
    job = site.start(HEAD, refine(inputs, str(output), "--placement=spread"), RAY_ADDRESS=site.gcs)
    assert job.wait() == 1, job.said()
    assert f"error: {output}: is another place on machine" in job.said()
    site.start(HEAD, ["rm", "-r", str(output)]).wait()
    site.start(WORKER, ["rm", "-rf", str(output)]).wait()


def test_nothing_but_the_store_is_left_with_files_of_the_jobs(site):
    left = {file for machine in site.machines.values() for file in machine.files() if "ray" not in file.parts}
    assert left == set()
