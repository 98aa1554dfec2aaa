"""One fault tried on one output: run, disturb, run again until it is done, and measure what the output has become."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.ledger import read_receipts
from tests.dumps import tree
from tests.faults import processes
from tests.faults.bench import COMMITTED, PATIENCE_S, Bench, Job, Switches

LINGER_S = 30.0
"""How long the daemons of a killed job may take to notice and end."""


@dataclass(frozen=True)
class Outcome:
    """What one trial came to."""

    fault: str
    form: str
    right: bool
    """Whether the output files, orphans left out, are those of an undisturbed run, byte by byte, and no others."""
    duplicates: int
    """Frames that the output or the ledger has more than once."""
    gaps: int
    """Frames that the output or the ledger does not have."""
    orphans: list[str]
    """Temporary files, parts that the ledger does not name, and a lease that is still held."""
    recomputed: int
    """Times an image was read again, beyond what an undisturbed run reads."""
    rewritten: int
    """Times a worker wrote a frame (Cityscapes) or a part of several frames that had been written before."""
    finished_again: int
    """Frames refined anew though the ledger had them as finished when the job was stopped."""
    leaked: list[str]
    """Processes that outlived the runs."""
    runs: int
    seconds: float
    """From the start of the first run to the end of the last."""
    undisturbed_s: float


@dataclass
class Trial:
    """The runs on one output. All of them have the same switches, so that reads add up."""

    bench: Bench
    fault: str
    form: str
    local: bool = False
    placement: str = "auto"
    output: str = ""
    """A folder, with or without `watched://`; one of the trial's own unless given."""
    env: dict[str, str] = field(default_factory=dict)
    runs: int = 0

    def __post_init__(self) -> None:
        self.bench.started += 1
        self.root = self.bench.root / f"trial{self.bench.started}"
        (self.root / "switches").mkdir(parents=True)
        self.switches = Switches(self.root / "switches")
        self.output = self.output or str(self.root / "output")
        self.folder = Path(self.output.removeprefix("watched://"))
        self._known = set(processes.below(self.bench.root))
        self._read_then: list[tuple[int, set[str]]] = []
        self._began = 0.0

    def start(self, **env: str) -> Job:
        """Run the job; not waited for."""
        environment = self.bench.environment(self.switches.folder, **self.env, **env)
        return self.begin(self.bench.start(self.command(), environment))

    def command(self) -> list[str]:
        """The job's command line."""
        where = "--local" if self.local else f"--placement={self.placement}"
        return self.bench.command(self.form, self.output, where)

    @contextmanager
    def holding(self, ending: str, nth: int, events: tuple[str, ...] = ("replace", "put")) -> Iterator[None]:
        """Whoever comes to the nth such event, or a later one, waits there until the block is left."""
        below = "/images/" if "get" in events else str(self.folder)
        self.switches.set("hold", list(events), ending, below, nth=nth)
        try:
            yield
        finally:
            self.switches.lift()

    def await_held(self, job: Job) -> int:
        """The pid of a process that is held."""
        return job.await_that(self.switches.held, "a process that comes to the point where it is held")[0]

    def finished(self) -> set[str]:
        """Frames that the ledger has as finished."""
        return {entry["frame_id"] for entry in read_receipts(str(self.folder)) if not entry["error"]}

    def await_finished(self, job: Job, more_than: int = 0) -> None:
        job.await_that(lambda: len(self.finished()) > more_than, f"more than {more_than} frames in the ledger")

    def mark(self) -> None:
        """What the ledger has as finished now must not be read again from now on."""
        self._read_then.append((len(self.switches.reads()), self.finished()))

    def _is_commit(self, name: str) -> bool:
        return name.endswith(COMMITTED[self.form]) and not name.startswith("part-")

    def forget_marks(self) -> None:
        """What was finished may be read again after all: it has been damaged."""
        self._read_then.clear()

    def await_silence(self) -> list[str]:
        """What is left, after a while, of the processes started since this trial began."""
        deadline = time.monotonic() + LINGER_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def _left(self) -> list[str]:
        titles = map(processes.title, set(processes.below(self.bench.root)) - self._known)
        return sorted(title for title in titles if title and title not in processes.SLOW_TO_END)

    def begin(self, job: Job) -> Job:
        """Count a run that was started by other means than `start`."""
        self._began = self._began or time.monotonic()
        self.runs += 1
        return job

    def stop(self, job: Job, number: int) -> int:
        """Send a signal to the driver and wait until it and its cluster are gone; returns the exit status."""
        job.kill(number)
        status = job.wait()
        self.mark()
        return status

    def complete(self, attempts: int = 1) -> str:
        """Run until the job ends well; returns what it said the last time."""
        for attempt in range(attempts):
            job = self.start()
            status, said = job.wait(PATIENCE_S + self.bench.frames), job.said()
            if status == 0 and ", 0 set aside" in said:
                return said
            assert attempt + 1 < attempts, f"run {self.runs} ended with {status}:\n{said}"
        raise AssertionError("no attempt")

    def finish(self) -> Outcome:
        """Measure the output after the last run."""
        seconds = time.monotonic() - self._began
        clean = self.bench.undisturbed.get((self.form, self.local))
        entries = list(read_receipts(str(self.folder)))
        left = orphans(self.folder, {entry["part"] for entry in entries})
        files = {name: content for name, content in tree(self.folder).items() if name not in left}
        in_ledger = Counter(entry["frame_id"] for entry in entries if not entry["error"])
        in_output = frames_in_output(self.form, self.folder)
        expected = set(clean.in_ledger) if clean else set(in_ledger)
        expected_in_output = set(clean.in_output) if clean else set(in_output)
        reads = self.switches.reads()
        written = [name for name in self.switches.writes() if self._is_commit(name)]
        again = 0
        for begin, finished in self._read_then:
            names = {entry["file_name"] for entry in entries if entry["frame_id"] in finished}
            again += len(names & set(reads[begin:]))
        measured = Undisturbed(seconds, files, in_ledger, in_output, len(reads))
        if clean is None:
            clean = self.bench.undisturbed[self.form, self.local] = measured
        return Outcome(
            self.fault,
            self.form,
            right=files == clean.files,
            duplicates=sum(count > 1 for count in (*in_ledger.values(), *in_output.values())),
            gaps=len(expected - set(in_ledger)) + len(expected_in_output - set(in_output)),
            orphans=left,
            recomputed=len(reads) - clean.reads,
            rewritten=len(written) - len(set(written)),
            finished_again=again,
            leaked=self.await_silence(),
            runs=self.runs,
            seconds=seconds,
            undisturbed_s=clean.seconds,
        )


@dataclass(frozen=True)
class Undisturbed:
    """What a run without a fault came to."""

    seconds: float
    files: dict[str, bytes]
    in_ledger: Counter[str]
    in_output: Counter[Any]
    reads: int


def undisturbed(bench: Bench, form: str, *, local: bool) -> None:
    """Make the run that others are compared with, unless the bench has it."""
    if bench.without_ray and not local:
        undisturbed(bench, form, local=True)
        bench.undisturbed[form, False] = bench.undisturbed[form, True]
    if (form, local) not in bench.undisturbed:
        trial = Trial(bench, "none", form, local)
        trial.complete()
        trial.finish()
        assert len(bench.undisturbed[form, local].in_ledger) > bench.frames / 2


def frames_in_output(form: str, folder: Path) -> Counter[Any]:
    """How often the final output has each frame (Parquet, Cityscapes) or each entry (COCO)."""
    if form == "coco":
        file = folder / "refined.json"
        entries = json.loads(file.read_text()) if file.exists() else []
        return Counter((entry["image_id"], entry["category_id"]) for entry in entries)
    if form == "parquet":
        files = sorted(folder.glob("part-*.parquet"))
        return Counter(name for file in files for name in pq.read_table(file)["frame_id"].to_pylist())
    return Counter(str(path.relative_to(folder)) for path in folder.rglob(f"*{COMMITTED['cityscapes']}"))


def orphans(folder: Path, parts: set[str]) -> list[str]:
    """Files that a finished output should not have, as paths below it."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        is_part = name.startswith("_ledger/parts/") and path.suffix == ".parquet"
        if path.suffix == ".tmp" or path.name == "lease.json" or (is_part and name not in parts):
            found.append(name)
    return found
