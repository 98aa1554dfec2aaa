"""Faults of what runs below the driver: workers, actors, raylets, nodes, the object store, a job that is stopped."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.heads import UNDRAINED, free_ports
from tests.faults import processes
from tests.faults.bench import COMMITTED, Bench, Job
from tests.faults.nodes import nodes
from tests.faults.trial import Outcome, Trial, undisturbed

STORE_BYTES = 80 << 20
"""Ray's least is 75 MiB."""


def sigkill_of_tasks(bench: Bench, form: str, placement: str = "spread") -> Outcome:
    """Of a process in the midst of reading an image, and of one about to give a file its name."""
    undisturbed(bench, form, local=False)
    killed = {"spread": "task workers", "fused": "helpers of the network's actor"}[placement]
    trial = Trial(bench, f"SIGKILL of two {killed}", form, placement=placement)
    with trial.holding(".png", 6, ("get",)):
        job = trial.start()
        os.kill(trial.await_held(job), signal.SIGKILL)
    with trial.holding(COMMITTED[form], 2):
        os.kill(trial.await_held(job), signal.SIGKILL)
    assert job.wait() == 0, job.said()
    return trial.finish()


def sigkill_of_the_actor(bench: Bench, form: str, placement: str = "spread") -> Outcome:
    """While its network computes."""
    undisturbed(bench, form, local=False)
    trial = Trial(bench, f"SIGKILL of the network's actor ({placement})", form, placement=placement)
    # Most images wait until the actor is known: it would be done with all of them before.
    with trial.holding(".png", 5, ("get",)):
        job = trial.start()
        trial.await_held(job)
        actor = job.process_of(processes.is_network, "a worker with a network")
    begin = processes.cpu_s(actor)
    job.await_that(lambda: processes.cpu_s(actor) > begin + 0.2, "a network that computes")
    os.kill(actor, signal.SIGKILL)
    assert job.wait() == 0, job.said()
    return trial.finish()


def sigkill_of_the_raylet(bench: Bench, form: str) -> Outcome:
    """On a cluster of one node, where the job cannot go on: it has to end, and the next one to finish its work."""
    undisturbed(bench, form, local=False)
    trial = Trial(bench, "SIGKILL of the only raylet", form, placement="spread")
    with trial.holding(COMMITTED[form], 7):
        job = trial.start(RAY_health_check_initial_delay_ms="0", RAY_health_check_period_ms="500")
        trial.await_finished(job)
        trial.await_held(job)
        os.kill(job.process_of(processes.is_raylet, "a raylet"), signal.SIGKILL)
        assert job.wait() != 0, job.said()
        trial.mark()
    assert not (left := trial.await_silence()), left
    trial.complete()
    return trial.finish()


def loss_of_a_node(bench: Bench, form: str) -> Outcome:
    """One of two worker nodes goes with all its processes, while one of its workers writes."""
    undisturbed(bench, form, local=False)
    trial = Trial(bench, "loss of one of two nodes", form)
    with nodes(bench, trial, {"num_cpus": 0}, [{"num_cpus": 2}, {"num_cpus": 2}]) as cluster:
        with trial.holding(COMMITTED[form], 4):
            job = trial.start()
            cluster.remove(processes.raylet_of(trial.await_held(job)))
        assert job.wait() == 0, job.said()
    return trial.finish()


def object_store_full(bench: Bench, form: str) -> Outcome:
    """Another job of the cluster has filled the object store and holds on to it."""
    undisturbed(bench, form, local=False)
    trial = Trial(bench, "object store full", form, placement="spread")
    with nodes(bench, trial, {"num_cpus": 2, "object_store_memory": STORE_BYTES}, []) as cluster:
        cluster.fill(STORE_BYTES - (2 << 20))
        trial.complete()
    return trial.finish()


def job_stop(bench: Bench, form: str) -> Outcome:
    """`ray job submit`, then `ray job stop`, which sends SIGTERM and 3 s later SIGKILL; then submitted again."""
    undisturbed(bench, form, local=False)
    trial = Trial(bench, "ray job stop", form)
    command = trial.command()
    with _head(bench, trial) as ray:
        with trial.holding(COMMITTED[form], 7):
            first = trial.begin(ray("job", "submit", "--submission-id=first", "--", *command))
            trial.await_finished(first)
            trial.await_held(first)
            stopping = ray("job", "stop", "first")
            assert stopping.wait() == 0, stopping.said()
            first.wait()
            trial.mark()
        again = trial.begin(ray("job", "submit", "--submission-id=again", "--", *command))
        assert again.wait() == 0, again.said()
    return trial.finish()


@contextmanager
def _head(bench: Bench, trial: Trial) -> Iterator[Callable[..., Job]]:
    """A head node that listens on free ports, its dashboard on the loopback only; yields what runs `ray <words>`."""
    ports = free_ports(5)
    environment = bench.environment(
        trial.switches.folder,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(16),
        RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{ports[0]}",
        **UNDRAINED,
    )

    def ray(*words: str) -> Job:
        return bench.start([str(Path(sys.executable).parent / "ray"), *words], environment)

    before = set(processes.below(bench.root))
    head = ray(
        *("start", "--head", "--block", "--num-cpus=2", "--port=0", "--disable-usage-stats"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={ports[0]}", f"--temp-dir={bench.root}/head"),
        *(f"--ray-client-server-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}"),
        *(f"--dashboard-agent-grpc-port={ports[3]}", f"--metrics-export-port={ports[4]}"),
    )
    try:
        head.await_that(lambda: ray("job", "list").wait() == 0, "a head node that takes jobs")
        yield ray
    finally:
        head.kill(signal.SIGTERM)
        try:
            head.wait(60)
        finally:
            processes.end(set(processes.below(bench.root)) - before)
