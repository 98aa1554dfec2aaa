"""One run at a time on an output: a file that the run keeps renewing, and that the next takes over once it is not."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from pipeline import storage
from pipeline.records import InputError

HEARTBEAT_SECONDS = 10.0
"""How often a run renews its lease."""

DEAD_SECONDS = 60.0
"""A lease not renewed for longer belongs to a run that is dead; on its own machine Linux tells that at once."""

SETTLE_SECONDS = 2.0
"""How long two runs that take over at once on an object store wait to see whose lease has stayed."""


class Lease:
    """A context in which this process is the only one that writes below `output`; holds `_ledger/lease.json`.

    Entering raises InputError where another run holds the lease, naming it. On local file systems one of any number of
    processes gets it. Object stores have nothing to replace a file by only if nobody else has: there the first lease on
    an output is exclusive where `storage.create` is; of two runs that take over from a dead one at once, the last to
    write gets it, the other stops after SETTLE_SECONDS, or at the latest with its next heartbeat. Both would have
    written the same bytes.
    """

    def __init__(self, output: str) -> None:
        self.root = f"{output.rstrip('/')}/_ledger"
        self.url = f"{self.root}/lease.json"
        self.run_id = uuid4().hex[:12]
        self.started = time.time()
        self.taken_over = False
        """Whether the run before has died with the lease."""
        self._lost = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._acquire()
        except OSError as error:
            raise InputError(f"{self.root}: cannot write the output there ({error.strerror or error})") from None
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with storage.locked(self.root):
            if (self._read() or {}).get("run_id") == self.run_id:
                storage.remove(self.url)

    def check(self) -> None:
        """Raise InputError where another run has taken the output over."""
        if self._lost:
            raise InputError(self._lost)

    def confirm(self) -> None:
        """As `check`, by a look at the lease as it is now: before what could not be taken back."""
        self.check()
        self._lost = self._loss()
        self.check()

    def held_by_another(self) -> str:
        """Who is writing the output now, as far as heartbeats tell; empty where nobody is."""
        holder = self._read()
        alive = holder and not _is_dead_here(holder) and _beats(holder)
        return self._refusal(holder) if holder and alive else ""

    def _acquire(self) -> None:
        holder = self._read()
        self.taken_over = holder is not None
        if refusal := self.held_by_another():
            raise InputError(refusal)
        if holder and not _is_dead_here(holder):
            # Its clock may differ, or this one was set: what counts is whether it still beats.
            time.sleep(1.5 * HEARTBEAT_SECONDS)
        with storage.locked(self.root):
            now = self._read()
            if now is None and storage.create(self.url, self._content()):
                return
            now = now or self._read()
            if now and now != holder:
                raise InputError(self._refusal(now))
            storage.put(self.url, self._content())
        if not storage.is_local(self.url):
            time.sleep(SETTLE_SECONDS)
            now = self._read() or {}
            if now.get("run_id") != self.run_id:
                raise InputError(self._refusal(now))

    def _refusal(self, holder: dict[str, Any]) -> str:
        return (
            f"{self.url}: run {holder.get('run_id')} on host {holder.get('host')}, pid {holder.get('pid')}, is writing"
            f" this output (last heartbeat {_age(holder):.0f} s ago); wait for its end, or stop it and start again"
            f" {DEAD_SECONDS:.0f} s later"
        )

    def _loss(self) -> str:
        """Why the output is not this run's any more, by the lease as it is now; empty while it is."""
        holder = self._read()
        if holder is None:
            # A run that has taken over and come to its end meanwhile has removed it.
            return f"{self.url}: is not there any more, another run has had this output meanwhile; start again"
        return self._refusal(holder) if holder.get("run_id", self.run_id) != self.run_id else ""

    def _content(self) -> bytes:
        return json.dumps(
            {
                "run_id": self.run_id,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process_space": _process_space(),
                "started": self.started,
                "heartbeat": time.time(),
            }
        ).encode()

    def _read(self) -> dict[str, Any] | None:
        """What the lease says: nothing where it is damaged, None where none is there."""
        data = storage.read_if_there(self.url)
        if data is None:
            return None
        try:
            content = json.loads(data)
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _renew(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                with storage.locked(self.root):
                    self._lost = self._loss()
                    if self._lost:
                        return
                    storage.put(self.url, self._content())
            except Exception:  # a store that fails for a moment; when it does for long, another run takes over
                continue


def _beats(holder: dict[str, Any]) -> bool:
    """Whether the holder has renewed its lease of late; one far ahead of this clock may be of any time."""
    heartbeat = holder.get("heartbeat")
    return isinstance(heartbeat, int | float) and abs(time.time() - heartbeat) <= DEAD_SECONDS


def _age(holder: dict[str, Any]) -> float:
    heartbeat = holder.get("heartbeat")
    return max(0.0, time.time() - heartbeat) if isinstance(heartbeat, int | float) else float("inf")


def _process_space() -> str:
    """What a pid must be seen from to mean the same process; empty where that is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is there no more."""
    pid, space = holder.get("pid"), _process_space()
    if not space or holder.get("process_space") != space or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
