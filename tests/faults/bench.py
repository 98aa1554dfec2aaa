"""A small dump, the undisturbed runs on it, and jobs that are started, watched and stopped as a user would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.conftest import seeded_network
from tests.dumps import make_dump
from tests.faults import processes
from tests.faults.hooks.switch import POLL_S

REPOSITORY = Path(__file__).resolve().parents[2]
PREDICTIONS = {"cityscapes": "cityscapes", "coco": "results.json", "parquet": "frames.parquet"}
COMMITTED = {"cityscapes": "_pred.txt", "coco": ".parquet", "parquet": ".parquet"}
"""Ending of the file that a worker writes last of a frame (Cityscapes) or of a block (a part)."""

FRAMES, FRAMES_PER_BLOCK = 24, 2
PATIENCE_S = 240.0
"""How long a condition is waited for; machines that run tests can be slow."""


def await_that(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Wait until a condition holds, and return what it returned; AssertionError says what did not happen."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s in vain: {what}"
        time.sleep(POLL_S)
    return value


@dataclass
class Job:
    """One run of `jobs/refine.py` in a process group of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    root: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Its exit status."""
        await_that(lambda: self.process.poll() is not None, f"the end of the job; {self.said()}", patience_s)
        return self.process.returncode

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def await_that(self, condition: Callable[[], Any], what: str) -> Any:
        """As the function of this name, but only as long as the job runs."""

        def still() -> Any:
            ended = self.process.poll() is not None
            value = condition()
            assert value or not ended, f"the job ended before: {what}\n{self.said()}"
            return value

        return await_that(still, what)

    def process_of(self, is_wanted: Callable[[int], bool], what: str) -> int:
        """The pid of a process below this job's, or of its cluster, that is as wanted."""
        return self.await_that(lambda: next(filter(is_wanted, processes.below(self.root)), None), what)


@dataclass
class Switches:
    """The harness's side of `hooks/switch.py`: one rule at a time for all processes of a trial."""

    folder: Path
    rules: int = 0

    def set(self, action: str, events: list[str], ending: str = "", below: str = "", **settings: Any) -> None:
        """From now on this happens at these events on paths that end with `ending` and have `below` in them."""
        self.rules += 1
        rule = {"name": f"rule{self.rules}", "action": action, "events": events, "ending": ending, "below": below}
        draft = self.folder / "draft.json"
        draft.write_text(json.dumps(rule | settings))
        draft.rename(self.folder / "rule.json")

    def lift(self) -> None:
        (self.folder / "rule.json").unlink(missing_ok=True)

    def held(self) -> list[int]:
        """Pids of the processes that the present rule holds."""
        file = self.folder / f"rule{self.rules}.held"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def reads(self) -> list[str]:
        """The images that workers have read, in order, once for every time."""
        return self._names("reads.log", "/images/")

    def writes(self) -> list[str]:
        """The files that were written whole, in order, once for every time."""
        return self._names("writes.log")

    def _names(self, log: str, below: str = "") -> list[str]:
        file = self.folder / log
        lines = file.read_text().splitlines() if file.exists() else []
        return [Path(line.split(" ", 1)[1]).name for line in lines if below in line]


@dataclass
class Bench:
    """A dump and a checkpoint below a folder of their own, where every job started here has its working directory."""

    root: Path
    frames: int = FRAMES
    without_ray: bool = False
    """Whether undisturbed runs are made in one process: the bytes are the same, their seconds are not."""
    undisturbed: dict[tuple[str, bool], Any] = field(default_factory=dict)
    """What `trial.Trial.finish` measured of runs without a fault, by output format and whether in one process."""
    started: int = 0

    def prepare(self) -> None:
        make_dump(self.root / "dump", self.frames)
        torch.save(
            {"meta": {"CLASSES": ("background", "foreground")}, "state_dict": seeded_network().state_dict()},
            self.root / "weights.pth",
        )

    def environment(self, switches: Path, **more: str) -> dict[str, str]:
        path = [str(REPOSITORY), str(Path(__file__).parent / "hooks")]
        # What this process was told about Ray is not meant for the jobs.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FAULTS_"))}
        return kept | {
            "PYTHONPATH": os.pathsep.join(path),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "FAULTS_SWITCHES": str(switches),
            "RAY_TMPDIR": str(self.root),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            **more,
        }

    def command(self, form: str, output: str, *flags: str) -> list[str]:
        """The job's command line; images are read through `watched://`, so that every read is counted."""
        listing = [f"--image-list={self.root}/dump/images.json"] if form == "coco" else []
        return [
            sys.executable,
            str(REPOSITORY / "jobs" / "refine.py"),
            f"--predictions={self.root}/dump/{PREDICTIONS[form]}",
            f"--images=watched://{self.root}/dump/images",
            f"--output={output}",
            f"--checkpoint={self.root}/weights.pth",
            f"--frames-per-block={FRAMES_PER_BLOCK}",
            # A network with random weights changes every mask, and the guard would refuse them all.
            "--guard.no-enabled",
            "--nms-threshold=0.25",
            *listing,
            *flags,
        ]

    def start(self, command: list[str], environment: dict[str, str]) -> Job:
        self.started += 1
        log = self.root / f"job{self.started}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=self.root, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        return Job(process, log, self.root)


@contextmanager
def bench(frames: int = FRAMES, *, without_ray: bool = False) -> Iterator[Bench]:
    """A bench that ends every process it has started and removes its folder."""
    # Short: the paths of Ray's sockets may have 107 characters.
    root = Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp")).resolve()
    made = Bench(root, frames, without_ray)
    try:
        made.prepare()
        yield made
        await_that(lambda: not processes.below(root), "the end of all processes of the bench", 120)
    finally:
        processes.end(processes.below(root))
        shutil.rmtree(root, ignore_errors=True)
