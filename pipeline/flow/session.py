"""The Ray session a job runs in, the machines it finds there, and how many network processes fit on them."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import Device
from pipeline.flow.local import helpers_beside
from pipeline.records import InputError

INSIST_SECONDS = 30.0
"""How long a process may take to end after a signal before it is told again."""

_HEAD_PATIENCE_S = 60.0
"""How long the head of the cluster may be away at the start, in seconds; Ray itself tries for a quarter of an hour."""

_DATA_THREADS = ("StreamingExecutor", "iter_threaded")
"""How the names of the threads begin in which Ray Data schedules tasks and fetches what they return."""

_DATA_PATIENCE_S = 20.0
"""How long these may take to notice that nobody wants their results any more: seconds, on a machine with much to do."""

_insisting: list[threading.Timer] = []
_open_contexts: list[Any] = []
"""One for each `stopped_by_signals` that is not left: they nest, as Ray puts its own handlers in the place of ours."""


@dataclass(frozen=True)
class Placement:
    """Where a run wants its stages."""

    mode: Literal["auto", "spread", "fused"] = "auto"
    """Reading and writing as tasks anywhere, or in helper processes beside the network."""
    workers: int | None = None
    gpus_per_worker: float = 1.0
    device: Device = "auto"
    refine_label: str | None = None
    extract_label: str | None = None


def selected_by(label: str | None) -> dict[str, Any]:
    """The options by which Ray keeps a stage to machines with a label, given as `key=value`."""
    if label is None:
        return {}
    key, _, value = label.partition("=")
    if not key or not value:
        raise InputError(f"label is {label!r}: expected one of machines, such as bpr-role=extract")
    return {"label_selector": {key: value}}


def labelled(nodes: Sequence[Mapping[str, Any]], label: str | None) -> list[Mapping[str, Any]]:
    """The machines with a label, as Ray describes them; all where none of them has it, or none is asked for."""
    wanted = selected_by(label).get("label_selector", {}).items()
    return [node for node in nodes if wanted <= node["Labels"].items()] or [*nodes]


@dataclass(frozen=True)
class Pool:
    """The network processes of a run."""

    size: int
    """Most of them at a time."""
    resources: dict[str, float]
    """What each reserves of its machine, as Ray names it."""
    threads: int
    """CPU threads each computes with."""
    helpers: int
    """Processes each reads and writes with, where it is fused."""


def network_pool(nodes: Sequence[Mapping[str, float]], wish: Placement) -> Pool:
    """How the network is spread over the machines that are alive, `nodes` being the resources of each.

    With GPUs a process reserves no CPU: Ray would set one aside for each, and starve the reading tasks without a word.
    Without, `workers` (one per machine unless given) processes take shares of the CPUs that leave each of them a place,
    use all threads of their share, and leave a quarter of it (at least one) to the other stages. InputError where
    machines are to come later and nobody says for how many.
    """
    gpus, workers = sum(node.get("GPU", 0) for node in nodes), wish.workers
    if wish.device == "gpu" and not gpus and workers is None:
        raise InputError("device is gpu and no machine with one is up: expected --workers to say how many may come")
    if wish.device == "gpu" or (gpus and wish.device == "auto"):
        size = workers or max(1, sum(room(node.get("GPU", 0), wish.gpus_per_worker) for node in nodes))
        beside = [node.get("CPU", 0) * wish.gpus_per_worker / node["GPU"] for node in nodes if node.get("GPU")]
        helpers = helpers_beside(int(min(beside, default=1)), gpus=True)
        return Pool(size, {"num_gpus": wish.gpus_per_worker, "num_cpus": 0}, 1, helpers)
    cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        # An autoscaler has still to start them, and does so only for what is reserved.
        if workers is None:
            raise InputError("no machine is up: expected --workers to say how many may come, and --device cpu or gpu")
        return Pool(workers, {"num_cpus": 0.99}, 1, 1)
    size = workers or len(cpus)
    share, _ = threads_of(cpus, size)
    reserved = share - max(1, share // 4)
    # Not a whole number: Ray Data would run cutting inside the network's process if both reserved the same.
    return Pool(size, {"num_cpus": reserved - 0.01 if reserved else 0}, share, helpers_beside(share, gpus=False))


def room(there: float, share: float) -> int:
    """How many processes that take `share` GPUs (or CPUs) each fit a machine with `there` of them.

    Where the share is less than one, no process gets parts of two GPUs.
    """
    return int(there // share) if share >= 1 else int(there) * int(1 / share + 1e-6)


def threads_of(cpus: Sequence[int], processes: int) -> tuple[int, int]:
    """The most CPUs that each process can have on machines with `cpus`, and for how many there is room then."""
    for threads in range(max(cpus), 0, -1):
        if sum(count // threads for count in cpus) >= processes:
            return threads, processes
    return 1, sum(cpus)


def without_gpus() -> None:
    """Hide the GPUs of the machine from this process, which has not reserved one: Ray leaves them visible to it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def placed(nodes: Sequence[Mapping[str, float]], pool: Pool, wish: Placement) -> Literal["spread", "fused"]:
    """Where the stages run: as wished, else fused where all there is to compute on is one machine.

    A machine without a GPU is not all there is where GPUs are still to come.
    """
    if wish.mode != "auto":
        return wish.mode
    alone = len(nodes) == 1 and ("num_gpus" not in pool.resources or nodes[0].get("GPU", 0) > 0)
    return "fused" if alone else "spread"


def alive_nodes() -> list[dict[str, Any]]:
    """The machines of the running session that have CPUs or GPUs to work with, as Ray describes them."""
    import ray

    return [
        node for node in ray.nodes() if node["Alive"] and any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))
    ]


def cluster_named() -> bool:
    """Whether RAY_ADDRESS names a cluster to join; `local` asks for one on this machine, as there is without it."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def may_grow() -> bool:
    """Whether `ray_cluster` joins a cluster, to which machines may come; not where it starts one on this machine."""
    import ray

    return ray.is_initialized() or cluster_named()


def alone_without(kind: str) -> InputError:
    """What is wrong where a stage needs GPUs (or CPUs) that nobody will add."""
    return InputError(f"no {kind} on this machine, on which Ray runs alone: expected a cluster by RAY_ADDRESS")


@contextmanager
def ray_cluster(**settings: Any) -> Iterator[None]:
    """Join the Ray cluster this process belongs to, or start one and stop it again; `settings` go to ray.init.

    InputError or OSError where there is none to join, or none starts.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    if not cluster_named():
        settings |= {"address": "local", "include_dashboard": False}
        if not os.access(os.path.expanduser("~"), os.W_OK):
            # Ray would keep the token of its sessions there.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    else:
        _await_head(os.environ["RAY_ADDRESS"])
    try:
        ray.init(logging_level=logging.ERROR, **settings)
    except OSError:
        raise
    except Exception as error:  # a bare one, such as where its folder is full
        logs = os.path.join(os.environ.get("RAY_TMPDIR", "/tmp"), "ray")
        reason = " ".join(str(error).split())
        raise InputError(f"Ray did not start ({reason:.300}): expected room for its logs in {logs}") from None
    try:
        yield
    finally:
        try:
            _await_ray_data()
        finally:
            ray.shutdown()


def _await_head(address: str) -> None:
    """Wait until something listens where RAY_ADDRESS says; InputError if nothing does, or if it is no address."""
    if address == "auto" or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"RAY_ADDRESS is {address!r}: expected host:port of a cluster's head, auto or local")
    deadline = time.monotonic() + _HEAD_PATIENCE_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"RAY_ADDRESS is {address}, where nothing listens ({error}): expected the head of a running cluster"
                ) from None
        time.sleep(1)


def _await_ray_data() -> None:
    """Wait until no thread of Ray Data needs the session: one that does afterwards ends the process or starts Ray anew.

    Ray Data itself waits two seconds for it where a data set is left before its end, as after Ctrl-C.
    """
    deadline = time.monotonic() + _DATA_PATIENCE_S
    for thread in threading.enumerate():
        if thread.name.startswith(_DATA_THREADS):
            thread.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def ray_session() -> Iterator[None]:
    """As `ray_cluster`, while signals go on stopping this process (`stopped_by_signals`)."""
    import ray

    joined = ray.is_initialized()
    if joined:
        # Actors of an earlier run of this process, above all of one that failed, keep their CPUs until it is collected.
        gc.collect()
    # A starting Ray puts its own handler in the place of ours.
    with ray_cluster(), nullcontext() if joined else stopped_by_signals():
        yield


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM (`ray job stop`, a preempted node) unwind like Ctrl-C, so that the ledger is flushed.

    Either comes again where the process has not ended INSIST_SECONDS later, as an exception may be lost in a callback
    and a cluster may not come to its end; after as long again the process ends at once. Only the main thread may ask
    for it; elsewhere nothing changes.
    """

    def leave(number: int, frame: Any) -> None:
        for wait, end in ((INSIST_SECONDS, os.kill), (2 * INSIST_SECONDS, _end_at_once)):
            timer = threading.Timer(wait, end, (os.getpid(), number))
            timer.daemon = True
            timer.start()
            _insisting.append(timer)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    try:
        before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        yield
        return
    _open_contexts.append(leave)
    try:
        yield
    finally:
        _open_contexts.pop()
        for number, handler in before.items():
            signal.signal(number, handler)
        while not _open_contexts and _insisting:
            _insisting.pop().cancel()


@contextmanager
def noted_signals(received: list[int]) -> Iterator[None]:
    """SIGTERM and Ctrl-C are added to a list instead of ending the process; a second one ends it."""

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_at_once(pid: int, number: int) -> None:
    os._exit(128 + number)
