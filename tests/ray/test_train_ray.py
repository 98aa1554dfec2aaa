"""Training on Ray Train, two workers on this machine's CPUs, as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import train as job
from pipeline.config import parse
from pipeline.records import InputError
from pipeline.training import TrainConfig, claimed, prepare
from tests.unit.test_training import SMALL, write_edges

pytest.importorskip("ray.train")

pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path):
    """Starts the job with two workers in a process of its own; `data` and `output` lie below tmp_path."""
    started = []
    write_edges(tmp_path / "data")

    def call(*flags):
        command = [sys.executable, job.__file__, "--data", tmp_path / "data", "--output", tmp_path / "output", *SMALL]
        # In a group of its own, so that a Ray left behind by a failed test can be found.
        process = subprocess.Popen(
            [*map(str, command), "--workers=2", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def _workers(process):
    """The process ids of the training workers below a driver, by Linux's process table."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "stat").read_text()
                titles[int(folder.name)] = (folder / "cmdline").read_text()
            except OSError:
                continue
            parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])

    def below(pid):
        while pid in parents and pid != process.pid:
            pid = parents[pid]
        return pid == process.pid

    return sorted(pid for pid, title in titles.items() if title.startswith("ray::RayTrainWorker") and below(pid))


def _wait_for_checkpoint(process, output):
    while not (output / "last.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def _steps(output):
    return [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_training_goes_on_when_a_worker_is_killed(start, tmp_path):
    process = start("--fit.steps=16")
    _wait_for_checkpoint(process, tmp_path / "output")
    workers = _workers(process)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    # The driver holds the output for all of them, whoever comes and goes.
    command = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "output"), *SMALL, "--fit.steps=16"]
    second = prepare(parse(TrainConfig, command))
    with (
        pytest.raises(InputError, match=rf"lease\.json: run \w+ on host .*, pid {process.pid}, is writing"),
        claimed(second),
    ):
        pass
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert "training: hrnet18s_128, 16 steps of 2 x 4 patches" in out
    assert "going on after step" in out
    assert _steps(tmp_path / "output") == list(range(1, 17))
    card = json.loads((tmp_path / "output" / "weights.json").read_text())
    assert (card["batch_size"], card["validation"]["patches"]) == (8, 16)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_workers_on_cpus_are_started_without_sight_of_the_machines_gpus(start, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    process = start("--fit.steps=60", "--gpus-per-worker=0")
    _wait_for_checkpoint(process, tmp_path / "output")
    started_with = [Path(f"/proc/{worker}/environ").read_bytes().split(b"\0") for worker in _workers(process)]
    assert len(started_with) == 2
    assert all(b"CUDA_VISIBLE_DEVICES=" in environment for environment in started_with)


def test_sigterm_saves_and_the_same_command_goes_on(start, tmp_path):
    process = start("--fit.steps=60")
    _wait_for_checkpoint(process, tmp_path / "output")
    process.terminate()
    out, error = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert error == ""
    done = len(_steps(tmp_path / "output"))
    assert f"stopped after step {done} of 60; the same command goes on from there" in out
    assert _workers(process) == []


def test_a_fault_in_a_worker_is_one_line_and_not_tried_again(start, tmp_path):
    data = tmp_path / "data" / "train"
    for shard in data.iterdir():
        content = shard.read_bytes()
        shard.write_bytes(content[:4] + content[4:].replace(b"\x89PNG", b"XPNG"))
    process = start("--fit.steps=8")
    out, error = process.communicate()
    assert process.returncode == 1
    assert error.startswith("error: ")
    assert "expected a PNG" in error
    assert error.count("\n") == 1
    assert out.count("training:") == 1


def test_more_workers_than_the_cluster_has_room_for_are_refused(start, tmp_path):
    count = (os.cpu_count() or 1) + 1
    # The data feeds so many: one more shard for each.
    for number in range(count):
        (tmp_path / "data" / "train" / f"more{number}.parquet").write_bytes(
            next((tmp_path / "data" / "train").iterdir()).read_bytes()
        )
    process = start("--fit.steps=8", f"--workers={count}")
    _, error = process.communicate()
    assert process.returncode == 1
    assert error == f"error: workers is {count}: the cluster has CPUs for {count - 1} only\n"
