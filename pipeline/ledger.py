"""What a run has done and what it has set aside, kept beside its output. The driver is the only writer."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from pipeline import storage
from pipeline.records import InputError
from pipeline.stages import Receipt

FLUSH_SECONDS = 2.0
"""At most so much finished work is done again after a crash of the driver."""


class Ledger:
    """Immutable segments of receipts in `<output>/_ledger/`, written after the outputs they speak of."""

    def __init__(self, output: str) -> None:
        self.root = f"{output.rstrip('/')}/_ledger"
        self.parts: dict[str, str] = {}
        """Frame id of every finished frame -> the part that holds it (empty where frames are files of their own)."""
        self.aside: dict[str, str] = {}
        """Frame id of every frame set aside -> why."""
        self._pending: list[Receipt] = []
        self._flushed = time.monotonic()

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Load what earlier runs with the same fingerprint have done.

        Raises InputError where the output holds frames of a run with other settings, naming the first that differs,
        and where it cannot be written. A run that finished no frame leaves the output to any other.
        """
        run = f"{self.root}/run.json"
        before, segments = None, []
        if storage.exists(run):
            before = _parse(run, storage.read(run))
            segments = [f"{self.root}/{name}" for name in storage.find(self.root, (".jsonl",))]
            for receipt in read_receipts(self.root.removesuffix("/_ledger")):
                self._note(receipt)
        if before == fingerprint:
            return
        if before is not None and self.parts:
            key = min(key for key in {*before, *fingerprint} if before.get(key) != fingerprint.get(key))
            raise InputError(
                f"{run}: this output was made with {key} = {before.get(key)!r}, not {fingerprint.get(key)!r};"
                " choose another output, or remove this one"
            )
        for segment in segments:
            storage.remove(segment)
        self.aside = {}
        try:
            storage.put(run, json.dumps(fingerprint, indent=1, sort_keys=True).encode())
        except OSError as error:
            raise InputError(f"{self.root}: cannot write the output there ({error.strerror or error})") from None

    def forget_others(self, frame_ids: Container[str]) -> None:
        """Drop frames from those set aside that are no longer in the dump."""
        self.aside = {frame_id: error for frame_id, error in self.aside.items() if frame_id in frame_ids}

    def _note(self, entry: dict[str, Any]) -> None:
        frame_id = entry["frame_id"]
        if entry["error"]:
            self.aside[frame_id] = entry["error"]
        else:
            self.parts[frame_id] = entry["part"]
            self.aside.pop(frame_id, None)

    def record(self, receipts: Iterable[Receipt]) -> None:
        """Take note of finished frames; they are on storage at the latest FLUSH_SECONDS later."""
        for receipt in receipts:
            self._note({"frame_id": receipt.frame_id, "error": receipt.error, "part": receipt.part})
            self._pending.append(receipt)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the receipts since the last flush as one new segment."""
        if self._pending:
            lines = "".join(json.dumps(asdict(receipt)) + "\n" for receipt in self._pending)
            storage.put(f"{self.root}/{time.time_ns():020d}.jsonl", lines.encode())
            self._pending = []
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush, and write the quarantine table `quarantine.csv` (frame_id, error) where a frame was set aside."""
        self.flush()
        table = f"{self.root}/quarantine.csv"
        if self.aside:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["frame_id", "error"])
            writer.writerows(sorted(self.aside.items()))
            storage.put(table, text.getvalue().encode())
        else:
            storage.remove(table)


def read_receipts(output: str) -> Iterator[dict[str, Any]]:
    """The receipts of all runs on an output, in the order of their frames' ends; none where it has no ledger."""
    root = f"{output.rstrip('/')}/_ledger"
    if storage.exists(f"{root}/run.json"):
        for name in storage.find(root, (".jsonl",)):
            for line in storage.read(f"{root}/{name}").splitlines():
                yield _parse(f"{root}/{name}", line)


def _parse(url: str, data: bytes) -> dict[str, Any]:
    try:
        return json.loads(data)
    except ValueError:
        raise InputError(f"{url}: expected json as an earlier run wrote it; the file is damaged") from None
