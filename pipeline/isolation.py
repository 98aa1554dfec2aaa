"""Calls in a child process, so that one that crashes, hangs or fills the memory is known by name and hurts nobody else.

Decoders are written in C: what a broken file does to them no `except` can see.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

_idle: list[Isolated] = []
"""Children that wait for the next one to borrow them: each takes about half a second to start."""

_borrowing = threading.Lock()


class ChildError(Exception):
    """The child did not survive a call; the message says of what."""


class OverdueError(ChildError):
    """The child was ended because it did not answer in time."""


class Isolated:
    """A child process that runs one call after the other and is replaced when one ends it."""

    def __init__(self, memory_bytes: int | None = None) -> None:
        """`memory_bytes` is what the child may allocate beside the interpreter itself; on Linux only."""
        self.memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def call(self, function: Callable[..., Result], *arguments: Any, seconds: float | None = None) -> Result:
        """`function(*arguments)`, all picklable, as the child computes it; its exceptions are raised here.

        Raises OverdueError where the child does not answer within `seconds`, and ChildError where it ends before it
        answers, twice: the first time it may have been the victim of somebody else.
        """
        try:
            return self._call(function, arguments, seconds)
        except OverdueError:
            raise
        except ChildError:
            return self._call(function, arguments, seconds)

    def _call(self, function: Callable[..., Result], arguments: tuple[Any, ...], seconds: float | None) -> Result:
        try:
            connection = self._start(getattr(function, "__module__", None))
            connection.send_bytes(pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL))
            if not connection.poll(seconds):
                self.close()
                raise OverdueError(f"took longer than {seconds:g} s")
            succeeded, value = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise ChildError(self._cause_of_death()) from None
        except BaseException:
            # An answer nobody waited for would be taken for that of the next call.
            self.close()
            raise
        if succeeded:
            return value
        raise value

    def close(self) -> None:
        """End the child; the next call starts another."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def _start(self, module: str | None) -> Connection:
        """The pipe to a child that has what it needs to run: starting one does not count as time of its first call."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._connection is None:
            self._connection, theirs = Pipe()
            command = [sys.executable, "-m", "pipeline.isolation", str(theirs.fileno()), str(self.memory_bytes or 0)]
            path = os.pathsep.join(entry for entry in sys.path if entry)
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
            )
            theirs.close()
            self._connection.send_bytes(pickle.dumps((_prepare, (module,))))
            self._connection.recv_bytes()
        return self._connection

    def _cause_of_death(self) -> str:
        assert self._process is not None
        status = self._process.wait()
        self.close()
        if status >= 0:
            return f"ended its process with status {status}"
        name = signal.Signals(-status).name
        return f"killed its process ({name}{', as when memory runs out' if name == 'SIGKILL' else ''})"


@contextmanager
def isolated(memory_bytes: int | None = None) -> Iterator[Isolated]:
    """Borrow a child with this limit; it is kept for the next one."""
    with _borrowing:
        found = next((child for child in _idle if child.memory_bytes == memory_bytes), None)
        if found is not None:
            _idle.remove(found)
    child = found or Isolated(memory_bytes)
    try:
        yield child
    finally:
        _idle.append(child)


@atexit.register
def close_idle() -> None:
    """End the children that nobody has borrowed."""
    while _idle:
        _idle.pop().close()


def _serve(descriptor: int, memory_bytes: int) -> None:
    # The parent decides what becomes of Ctrl-C and of a request to stop, which both of them get.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _limit_memory(memory_bytes)
    with Connection(descriptor) as connection:
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:
                return
            try:
                function, arguments = pickle.loads(request)
                del request
                answer = pickle.dumps((True, function(*arguments)), pickle.HIGHEST_PROTOCOL)
            except Exception as error:
                answer = _failure(error)
            connection.send_bytes(answer)


def _prepare(module: str | None) -> None:
    if module:
        import_module(module)


def _failure(error: Exception) -> bytes:
    try:
        return pickle.dumps((False, error))
    except Exception:
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))


def _limit_memory(memory_bytes: int) -> None:
    if memory_bytes and sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        own = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        limit = own + memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


def _end_with_parent(parent: int) -> None:
    """A child at work in a long call does not notice that its pipe has no other end any more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
