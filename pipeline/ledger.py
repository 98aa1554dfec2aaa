"""What a run has done and what it has set aside, kept beside its output. The driver is the only writer."""

from __future__ import annotations

import csv
import io
import json
import socket
import sys
import threading
import time
from bisect import bisect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from pipeline import storage
from pipeline.records import InputError
from pipeline.work import Receipt

FLUSH_SECONDS = 2.0
"""At most so much finished work is done again after a crash of the driver."""

REACHED_SECONDS = 10
"""How long a file may take until every machine sees it: network file systems keep what they have seen for a while."""

READ_AHEAD = 64
"""Files of a ledger read at once."""

MERGED_FROM, MERGED_BYTES = 256, 32 << 20
"""Segments of earlier runs from which on they are put together, and about how many bytes then lie in one."""

_SEGMENT, _MERGED, _WITHDRAWN = ".jsonl", ".merged.jsonl", ".withdrawn.json"


@lru_cache(maxsize=1)
def check_reached(output: str) -> None:
    """Raise InputError where this process does not see the ledger that the driver has begun on an output.

    On several machines a local path is another folder on each of them.
    """
    for _ in range(REACHED_SECONDS):
        if storage.exists(f"{output}/_ledger/run.json"):
            return
        time.sleep(1)
    host = socket.gethostname()
    raise InputError(f"{output}: is another place on machine {host}, expected storage that all machines reach")


class Ledger:
    """Immutable segments of receipts in `<output>/_ledger/`, written after the outputs they speak of.

    A run that starts puts those of earlier runs together where they are many. `<number>.merged.jsonl` has all that the
    segments up to this number had since the merged one before it; they do not count any more, and are removed.
    """

    def __init__(self, output: str, confirm: Callable[[], None] = lambda: None) -> None:
        """`confirm` raises where this run must not write any more."""
        self.confirm = confirm
        self.output = output.rstrip("/")
        self.root = f"{self.output}/_ledger"
        self.parts: dict[str, str] = {}
        """Frame id of every finished frame -> the part that holds it (empty where frames are files of their own)."""
        self.identities: dict[str, str] = {}
        """Frame id of every finished frame -> what its inputs were (`pipeline.identity`); empty where unknown."""
        self.aside: dict[str, str] = {}
        """Frame id of every frame set aside -> why."""
        self.anew = False
        """Whether what earlier runs have done counts for nothing: they had another fingerprint, or it is a restart."""
        self.withdrawn: set[str] = set()
        """Frames whose inputs changed after they were finished, and that no run has finished since."""
        self._renewed: dict[str, list[str]] = {}
        self._pending: list[Receipt] = []
        self._flushed = time.monotonic()
        self._flushing = threading.Lock()
        self._newest = 0
        self._started = False

    def open(self, fingerprint: dict[str, Any]) -> None:
        """`load`, then `start`, for a job that knows no `--restart`."""
        self.load(fingerprint, advice="choose another output")
        self.start(fingerprint)

    def load(
        self,
        fingerprint: dict[str, Any],
        *,
        restart: bool = False,
        advice: str = "choose another output, or --restart to refine every frame anew",
    ) -> None:
        """Know what earlier runs have done.

        Raises InputError where the output holds frames of a run with another fingerprint, naming the first difference,
        unless it is to `restart`. A run that finished no frame leaves the output to any other.
        """
        run = f"{self.root}/run.json"
        data = storage.read_if_there(run)
        if data is None:
            return
        before = _parse(run, data)
        self.anew = restart or before != fingerprint
        self._newest = max((int(name.split(".")[0]) for name in self._numbered()), default=0)
        gone = _withdrawn(self.root)
        # A segment cut short by a power loss only costs the work of its last frames.
        for entry in _standing(self.root, gone):
            self._note(entry["frame_id"], entry["error"], entry["part"], entry.get("identity", ""))
        self.withdrawn = {
            frame_id
            for frame_id, (_, changed) in gone.items()
            if changed and frame_id not in self.parts and frame_id not in self.aside
        }
        for frame_id, (old, new) in self._read_renewed().items():
            if self.identities.get(frame_id) == old:
                self.identities[frame_id] = new
                self._renewed[frame_id] = [old, new]
        if before != fingerprint and self.parts and not restart:
            key = min(key for key in {*before, *fingerprint} if before.get(key) != fingerprint.get(key))
            raise InputError(
                f"{run}: this output was made with {key} = {before.get(key)!r}, not {fingerprint.get(key)!r}; {advice}"
            )

    def start(self, fingerprint: dict[str, Any]) -> None:
        """Write under which fingerprint frames are refined from now on, and forget what counts for nothing (`anew`)."""
        self._started = True
        there = storage.exists(f"{self.root}/run.json")
        if there:
            self._merge()
        if there and not self.anew:
            return
        if there:
            # One by one, the oldest first: no frame must seem finished that was set aside, or taken back, later.
            for name in self._numbered():
                storage.remove(f"{self.root}/{name}")
            self.note("identities.json", {})
            storage.remove(f"{self.root}/finished.json")
        self.parts, self.identities, self.aside, self._renewed = {}, {}, {}, {}
        self.withdrawn = set()
        try:
            self.note("run.json", fingerprint)
        except OSError as error:
            raise InputError(f"{self.root}: cannot write the output there ({error.strerror or error})") from None

    def forget_others(self, frame_ids: Container[str]) -> None:
        """Drop frames from those set aside that are no longer in the dump."""
        self.aside = {frame_id: error for frame_id, error in self.aside.items() if frame_id in frame_ids}

    def withdraw(self, changed: Iterable[str], removed: Iterable[str]) -> None:
        """Take back that frames are finished, on storage before anything else happens to them."""
        changed, removed = sorted(changed), sorted(removed)
        if not changed and not removed:
            return
        self.note(self._next(_WITHDRAWN), {"changed": changed, "removed": removed})
        for frame_id in (*changed, *removed):
            self.parts.pop(frame_id, None)
            self.identities.pop(frame_id, None)
        self.withdrawn = (self.withdrawn | set(changed)) - set(removed)

    def renew(self, identities: Mapping[str, str]) -> None:
        """Note what the inputs of frames are now, where an identity has changed though the frame has not."""
        if identities:
            for frame_id, identity in identities.items():
                self._renewed[frame_id] = [self._renewed.get(frame_id, [self.identities[frame_id]])[0], identity]
                self.identities[frame_id] = identity
            self.note("identities.json", self._renewed)

    def file_names(self, frame_ids: Container[str]) -> dict[str, str]:
        """The image's path of each of these frames when it was last finished, withdrawn or not."""
        found = {}
        for _, entry in _segments(self.root):
            if entry["frame_id"] in frame_ids and not entry["error"]:
                found[entry["frame_id"]] = entry.get("file_name", "")
        return found

    def note(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep what is known of a run as json, under a name of its own below the ledger."""
        storage.put(f"{self.root}/{name}", json.dumps(content, indent=1, sort_keys=True).encode())

    def finished(self) -> tuple[str | None, list[str]]:
        """The key under which the final output was last written, and its files.

        The key is None where it never was, or that is not known.
        """
        url = f"{self.root}/finished.json"
        data = storage.read_if_there(url)
        with suppress(InputError):
            found = _parse(url, data) if data is not None else {}
            return found.get("key"), found.get("files", [])
        return None, []

    def note_finished(self, key: str | None, files: Sequence[str] = ()) -> None:
        """Keep the key of the final output as it is now, and its files; None while it is being written."""
        self.note("finished.json", {"key": key, "files": list(files)})

    def record(self, receipts: Iterable[Receipt]) -> None:
        """Take note of finished frames; they are on storage with the next `flush`, for which it may be time."""
        for receipt in receipts:
            self._note(receipt.frame_id, receipt.error, receipt.part, receipt.identity)
            self._pending.append(receipt)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the receipts since the last flush as one new segment."""
        with self._flushing:
            if receipts := list(self._pending):
                self.confirm()
                lines = "".join(json.dumps(asdict(receipt)) + "\n" for receipt in receipts)
                storage.put(f"{self.root}/{self._next(_SEGMENT)}", lines.encode())
                # Others may have come meanwhile.
                del self._pending[: len(receipts)]
            self._flushed = time.monotonic()

    @contextmanager
    def flushed(self) -> Iterator[None]:
        """A context in which a thread flushes as well, so that no receipt waits long for the next ones to come.

        What the store raises there is passed over: the next `record` or `flush` of the run itself meets it again.
        """
        left = threading.Event()

        def flush_in_time() -> None:
            while not left.wait(FLUSH_SECONDS):
                with suppress(Exception):
                    self.flush()

        thread = threading.Thread(target=flush_in_time, name="ledger", daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()

    def close(self) -> None:
        """Flush, and write the quarantine table `quarantine.csv` (frame_id, error) where a frame was set aside.

        A ledger that was never started is left as it is.
        """
        if not self._started:
            return
        self.confirm()
        self.flush()
        table = f"{self.root}/quarantine.csv"
        if self.aside:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["frame_id", "error"])
            writer.writerows(sorted(self.aside.items()))
            storage.put(table, text.getvalue().encode(errors="backslashreplace"))
        else:
            storage.remove(table)

    def _merge(self) -> None:
        """Put the segments together where they are many: on a store each of them is a request for every later run.

        A frame that was withdrawn between two segments may be finished by the second: such two stay apart.
        """
        found = self._numbered()
        withdrawals = [name for name in found if name.endswith(_WITHDRAWN)]
        segments = [name for name in found if name.endswith(_SEGMENT) and not name.endswith(_MERGED)]
        left = [name for name in counting(found) if not name.endswith(_MERGED)]
        if len(left) >= MERGED_FROM:
            held, held_bytes, last = [], 0, left[0]
            for name, data in _contents(self.root, left):
                if held_bytes > MERGED_BYTES or bisect(withdrawals, last) < bisect(withdrawals, name):
                    self._put_merged(last, held)
                    held, held_bytes = [], 0
                # One that was cut short does not end its last line.
                held += [data, b"" if data.endswith(b"\n") else b"\n"]
                held_bytes, last = held_bytes + len(data), name
            self._put_merged(last, held)
            left = []
        # There may be some of a run that was killed here.
        storage.at_once(lambda name: storage.remove(f"{self.root}/{name}"), {*segments} - {*left})

    def _put_merged(self, last: str, contents: Sequence[bytes]) -> None:
        self.confirm()
        url = f"{self.root}/{last.removesuffix(_SEGMENT)}{_MERGED}"
        storage.put(url, b"".join(contents))
        storage.sync(url)

    def _note(self, frame_id: str, error: str, part: str, identity: str) -> None:
        if error:
            self.aside[frame_id] = error
            self.parts.pop(frame_id, None)
            self.identities.pop(frame_id, None)
        else:
            # A part has many frames, and its name comes anew with each of them.
            self.parts[frame_id] = sys.intern(part)
            self.identities[frame_id] = identity
            self.aside.pop(frame_id, None)
        self._renewed.pop(frame_id, None)
        self.withdrawn.discard(frame_id)

    def _next(self, ending: str) -> str:
        # On another machine the clock may be behind that of the run before, whose files must stay the older ones.
        self._newest = max(time.time_ns(), self._newest + 1)
        return f"{self._newest:020d}{ending}"

    def _numbered(self) -> list[str]:
        names = storage.names(self.root, (_SEGMENT, _WITHDRAWN))
        return [name for name in names if name.split(".")[0].isdecimal()]

    def _read_renewed(self) -> dict[str, list[str]]:
        url = f"{self.root}/identities.json"
        data = storage.read_if_there(url)
        return _parse(url, data) if data is not None else {}


def read_receipts(output: str, segments: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The receipts of all runs on an output, in the order of their frames' ends; none where it has no ledger.

    Only those in `segments`, where these are given by name. Those of frames that were withdrawn later are left out. A
    line that a power loss has torn is passed over: its frame is one that was not finished.
    """
    root = f"{output.rstrip('/')}/_ledger"
    if storage.exists(f"{root}/run.json"):
        yield from _standing(root, _withdrawn(root), segments)


def _standing(
    root: str, gone: Mapping[str, tuple[str, bool]], segments: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """As `read_receipts`, knowing which frames are `gone` (`_withdrawn`)."""
    for name, entry in _segments(root, segments):
        if entry["frame_id"] not in gone or name > gone[entry["frame_id"]][0]:
            yield entry


def _segments(root: str, segments: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every receipt, or those of some segments, with the name of its segment."""
    names = counting(storage.names(root, (_SEGMENT,))) if segments is None else segments
    for name, data in _contents(root, names):
        for line in data.splitlines():
            with suppress(InputError):
                yield name, _parse(f"{root}/{name}", line)


def counting(names: Sequence[str]) -> list[str]:
    """Of the sorted names of files, those of the segments that no merged one has replaced."""
    newest = max((name for name in names if name.endswith(_MERGED)), default="")
    return [name for name in names if name.endswith(_MERGED) or (name.endswith(_SEGMENT) and name > newest)]


def _contents(root: str, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """The names of files of a ledger and their contents, some of which are read ahead."""
    with ThreadPoolExecutor(16) as threads:
        for start in range(0, len(names), READ_AHEAD):
            chunk = names[start : start + READ_AHEAD]
            yield from zip(chunk, threads.map(lambda name: storage.read(f"{root}/{name}"), chunk))


def _withdrawn(root: str) -> dict[str, tuple[str, bool]]:
    """Frames taken back -> the name of the file that last said so, and whether they changed (or were removed)."""
    gone = {}
    for name, data in _contents(root, storage.names(root, (_WITHDRAWN,))):
        for kind, frame_ids in _parse(f"{root}/{name}", data).items():
            gone.update(dict.fromkeys(frame_ids, (name, kind == "changed")))
    return gone


def _parse(url: str, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{url}: expected json as an earlier run wrote it; the file is damaged")
    return content
