"""Training on Ray Train: several processes, on one machine or many, that end and begin again together."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from model.bundled import CheckpointError
from model.fit import FitError
from pipeline.flow.session import noted_signals, ray_cluster, room, threads_of
from pipeline.records import InputError
from pipeline.redaction import redacted
from pipeline.stores import open_store
from pipeline.training import Interrupted, Say, TrainConfig, train

WORKER_RESTARTS = 3
SAVE_SECONDS = 60.0
"""How long the driver waits for the checkpoint when it is told to stop."""


def train_on_ray(config: TrainConfig, say: Say, received: list[int], check: Callable[[], None]) -> None:
    """Train in the processes that `config.workers` asks for, on the running cluster or one of this machine's own.

    `received` fills with the signals that ask to stop; then Interrupted says from where the same command goes on.
    `check` raises where the output is another run's by now. InputError says in one line why training failed.
    """
    import ray

    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise InputError(
            f"workers is {config.workers}: needs Ray Train, pip install 'bpr-ray[train]' ({error})"
        ) from None

    least, most = config.workers_range
    # What workers print stays with them.
    with ray_cluster(log_to_driver=False), tempfile.TemporaryDirectory() as scratch:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        on_gpus = config.gpus_per_worker > 0 and any(node.get("GPU") for node in nodes)
        if on_gpus:
            reserved, threads = {"CPU": 1, "GPU": config.gpus_per_worker}, None
            places = room_on_gpus(nodes, config.gpus_per_worker)
        else:
            threads, places = threads_of([int(node.get("CPU", 0)) for node in nodes], most)
            reserved = {"CPU": threads}
        if places < least:
            kind = "GPUs, and a CPU beside them," if on_gpus else "CPUs"
            raise InputError(f"workers is {config.workers}: the cluster has {kind} for {places} only")
        desk = ray.remote(_Desk).options(num_cpus=0).remote()
        trainer = TorchTrainer(
            partial(_worker, config, desk, threads),
            # Besides tensors on GPUs, processes exchange scores, which live on CPUs.
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=least if least == most else (least, most), use_gpu=on_gpus, resources_per_worker=reserved
            ),
            run_config=RunConfig(
                name="train",
                **_place_of_notes(config.output, scratch, len(nodes)),
                failure_config=FailureConfig(max_failures=WORKER_RESTARTS),
                # Ray leaves GPUs visible that are not reserved, and Ray Train has torch take one before `_worker` runs.
                worker_runtime_env={} if on_gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
            ),
        )
        # Not before: a starting Ray puts its own handlers in place of others.
        with noted_signals(received):
            _watch(trainer.fit, desk, say, received, check)


class _Desk:
    """An actor between the driver and the first worker: lines to show, the request to stop, why training ended."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, bool]] = []
        self.stopping = False
        self.interrupted: str | None = None
        self.fault: str | None = None

    def show(self, line: str, passing: bool) -> None:
        if passing and self.lines and self.lines[-1][1]:
            self.lines.pop()
        self.lines.append((line, passing))

    def stop(self) -> None:
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping

    def end(self, interrupted: str | None = None, fault: str | None = None) -> None:
        # Of several workers that fail, the first knows why.
        self.interrupted = self.interrupted or interrupted
        self.fault = self.fault or fault

    def ended(self) -> bool:
        return bool(self.interrupted or self.fault)

    def take(self) -> tuple[list[tuple[str, bool]], str | None, str | None]:
        lines, self.lines = self.lines, []
        return lines, self.interrupted, self.fault


def _worker(config: TrainConfig, desk: Any, threads: int | None) -> None:
    """One process of Ray Train. What no retry would change is told to the desk, after which a retry ends at once."""
    import ray
    import torch

    if ray.get(desk.ended.remote()):
        return
    if threads:
        torch.set_num_threads(threads)
    try:
        train(config, lambda line, passing=False: desk.show.remote(line, passing), _Asking(desk))
    except Interrupted as reason:
        ray.get(desk.end.remote(interrupted=str(reason)))
        raise
    except (InputError, CheckpointError, FitError) as error:
        ray.get(desk.end.remote(fault=redacted(str(error))))
        raise


class _Asking:
    """Whether the driver wants training to stop, asked without waiting for the answer."""

    def __init__(self, desk: Any) -> None:
        self.desk, self.answer = desk, None

    def __call__(self) -> bool:
        import ray

        if self.answer is None:
            self.answer = self.desk.is_stopping.remote()
        if not ray.wait([self.answer], timeout=0)[0]:
            return False
        stopping, self.answer = ray.get(self.answer), None
        return stopping


def room_on_gpus(nodes: Sequence[Mapping[str, float]], share: int) -> int:
    """For how many workers with `share` GPUs and a CPU each there is room on nodes with such resources."""
    return sum(min(room(node.get("GPU", 0), share), int(node.get("CPU", 0))) for node in nodes)


def _watch(fit: Callable[[], Any], desk: Any, say: Say, received: list[int], check: Callable[[], None]) -> None:
    """Run the trainer in another thread, so that this one can show lines, pass on signals, and `check` the output."""
    import ray

    failure: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = None
    while True:
        thread.join(0.2)
        check()
        over = not thread.is_alive()
        if received and deadline is None:
            desk.stop.remote()
            deadline = time.monotonic() + SAVE_SECONDS
        lines, interrupted, fault = ray.get(desk.take.remote())
        for line, passing in lines:
            say(line, passing)
        if fault:
            raise InputError(fault)
        if interrupted or (deadline and time.monotonic() > deadline):
            raise Interrupted(interrupted or "stopped; the same command goes on from the last checkpoint")
        if over:
            break
    if failure:
        raise InputError(_cause(failure[0]))


def _cause(error: BaseException) -> str:
    """One line out of Ray Train's report: the error of the worker that failed for a reason of its own."""
    from ray.train import TrainingFailedError
    from ray.train.v2.api.exceptions import WorkerGroupError

    if not isinstance(error, TrainingFailedError):
        raise error
    reasons = [str(error)]
    if isinstance(error, WorkerGroupError):
        reasons = [f"worker {rank}: {_last_line(cause)}" for rank, cause in sorted(error.worker_failures.items())]
        # The others then report no more than that the connection to it was lost.
        reasons.sort(key=lambda reason: "Connection" in reason or "RuntimeError" in reason)
    return f"training failed {WORKER_RESTARTS + 1} times, at last with {_last_line(reasons[0])}"


def _place_of_notes(output: str, scratch: str, machines: int) -> dict[str, Any]:
    """Where Ray Train keeps its own notes, nothing of value: several machines expect them on common storage."""
    if machines == 1:
        return {"storage_path": scratch}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    # Arrow's own stores know nothing of the options by which ours are reached.
    store, path = open_store(f"{output}/_ray")
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(store))}


def _last_line(error: object) -> str:
    return redacted(([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1])
