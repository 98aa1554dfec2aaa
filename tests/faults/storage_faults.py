"""Faults of what lies under the files: a disk that is full, writes cut short by a power loss, a store that fails."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.ledger import read_receipts
from tests.faults.bench import COMMITTED, Bench
from tests.faults.trial import Outcome, Trial, undisturbed

DISK_BYTES = 4 << 20
LEFT_BYTES = 120 << 10
"""What is free of the disk when the job starts: too little for its output, enough for some frames."""


def disk_full(bench: Bench, form: str) -> Outcome:
    """A file system of 4 MB in memory, filled by another's file, which is removed before the job is run again."""
    undisturbed(bench, form, local=False)
    with _disk(bench.root / "disk") as disk:
        trial = Trial(bench, "disk full", form, output=f"{disk}/output")
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(DISK_BYTES - LEFT_BYTES))
        job = trial.start()
        status, said = job.wait(), job.said()
        assert status == 1, said
        assert "No space left on device" in said, said
        trial.mark()
        ballast.unlink()
        trial.complete()
        return trial.finish()


@contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs to be root, with the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def torn_segment(bench: Bench, form: str) -> Outcome:
    """The ledger's newest segment has lost its second half, and one more is empty."""
    trial = _killed(bench, "torn write: ledger", form)
    segments = sorted((trial.folder / "_ledger").glob("*.jsonl"))
    content = segments[-1].read_bytes()
    segments[-1].write_bytes(content[: len(content) * 2 // 3])
    segments[-1].with_name(f"{int(segments[-1].stem) + 1:020d}.jsonl").write_bytes(b"")
    trial.forget_marks()
    trial.complete()
    return trial.finish()


def torn_part(bench: Bench, form: str) -> Outcome:
    """A part that the ledger names has lost its second half."""
    trial = _killed(bench, "torn write: part", form)
    part = trial.folder / next(read_receipts(str(trial.folder)))["part"]
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    trial.forget_marks()
    # The run that finds the part may end with a line that says so; the next one has to do its frames again.
    trial.complete(attempts=2)
    return trial.finish()


def torn_frame(bench: Bench, form: str) -> Outcome:
    """Of a frame that the ledger does not have, a PNG and the list were cut short, under their own names."""
    trial = _killed(bench, "torn write: frame", form)
    stem = next(
        f"frame_{i:03d}" for i in range(bench.frames) if f"frame_{i:03d}" not in trial.finished() and i % 4 != 3
    )
    (trial.folder / f"{stem}_0.png").write_bytes(b"\x89PNG\r\n")
    (trial.folder / f"{stem}_pred.txt").write_bytes(f"{stem}_0.png 24 0.".encode())
    trial.complete()
    return trial.finish()


def _killed(bench: Bench, fault: str, form: str) -> Trial:
    """A trial whose first run was killed when some blocks were in the ledger."""
    undisturbed(bench, form, local=True)
    trial = Trial(bench, fault, form, local=True)
    with trial.holding(COMMITTED[form], 9 if form == "cityscapes" else 5):
        job = trial.start()
        trial.await_finished(job)
        trial.await_held(job)
        trial.stop(job, signal.SIGKILL)
    return trial


def failing_store(bench: Bench, form: str, how: str) -> Outcome:
    """Every 7th answer of the store that has images and output is an error that passes: `500`, `503` or `time-out`."""
    undisturbed(bench, form, local=True)
    trial = Trial(bench, f"store: every 7th answer {how}", form, local=True)
    trial.output = f"watched://{trial.output}"
    trial.switches.set(how, ["get", "put"], nth=7)
    trial.complete()
    return trial.finish()


def slow_store(bench: Bench, form: str) -> Outcome:
    """Every answer of the store that has images and output takes 0.1 s."""
    undisturbed(bench, form, local=True)
    trial = Trial(bench, "store: 0.1 s for every answer", form, local=True)
    trial.output = f"watched://{trial.output}"
    trial.switches.set("slow", ["get", "put"], seconds=0.1)
    trial.complete()
    return trial.finish()
