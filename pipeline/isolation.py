"""Calls in a child process, so that one that crashes, hangs or fills the memory is known by name and hurts nobody else.

Decoders are written in C: what a broken file does to them no `except` can see.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")

Buffer = bytes | bytearray | memoryview

_PIECE_BYTES, _PIECES = 1 << 20, 1024
"""What one system call takes at most: as many pieces as IOV_MAX allows, and less than the 2 GiB that macOS allows."""

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
        self._socket: socket.socket | None = None
        self._environment: dict[str, str] = {}

    @property
    def outdated(self) -> bool:
        """Whether the child was started in another environment, such as with credentials that have changed since."""
        return self._process is not None and self._environment != {**os.environ}

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
            ours = self._start(getattr(function, "__module__", None))
            _send(ours, _pickled((function, arguments)))
            if not wait([ours], seconds):
                self.close()
                raise OverdueError(f"took longer than {seconds:g} s")
            succeeded, value = _unpickled(_receive(ours))
        except (EOFError, ConnectionError):
            raise ChildError(self._cause_of_death()) from None
        except BaseException:
            # An answer nobody waited for would be taken for that of the next call.
            self.close()
            raise
        if succeeded:
            return value
        if isinstance(value, MemoryError):
            self.close()
            raise ChildError("ran out of memory")
        raise value

    def close(self) -> None:
        """End the child; the next call starts another."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._socket = None

    def _start(self, module: str | None) -> socket.socket:
        """The socket of a child that has what it needs to run: starting it does not count as time of its first call."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._socket is None:
            self._socket, theirs = socket.socketpair()
            for end in self._socket, theirs:
                end.settimeout(None)  # others may have set a default, which would keep either from waiting
            # By `-m` it would look for the package in the working directory first, which may have one of that name.
            path = f"import sys; sys.path[:] = {[str(entry) for entry in sys.path]!r}"
            serve = f"import pipeline.isolation; pipeline.isolation._serve({theirs.fileno()}, {self.memory_bytes or 0})"
            self._environment = {**os.environ}
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", f"{path}; {serve}"],
                    pass_fds=[theirs.fileno()],
                    env={**self._environment, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                )
            _send(self._socket, _pickled((_prepare, (module,))))
            _receive(self._socket)
        return self._socket

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
    if child.outdated:
        child.close()
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
    with socket.socket(fileno=descriptor) as ours:
        while ours.recv(1, socket.MSG_PEEK):
            # Where a request is too large for the memory, this ends the process: the stream cannot be taken up again.
            _send(ours, _answer(_receive(ours)))


def _answer(request: Sequence[Buffer]) -> list[Buffer]:
    try:
        function, arguments = _unpickled(request)
        return _pickled((True, function(*arguments)))
    except Exception as error:
        return _failure(error)


def _pickled(value: Any) -> list[Buffer]:
    """The pickle of a value, and after it the memory of the arrays in it, which is not copied."""
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, pickle.HIGHEST_PROTOCOL, buffer_callback=arrays.append)
    return [pickled, *(array.raw() for array in arrays)]


def _unpickled(parts: Sequence[Buffer]) -> Any:
    """What `_pickled` was given; its arrays are where they were received."""
    return pickle.loads(parts[0], buffers=parts[1:])


def _send(to: socket.socket, parts: Sequence[Buffer]) -> None:
    """Send the parts, and before them their number and sizes."""
    head = struct.pack(f"{1 + len(parts)}Q", len(parts), *map(len, parts))
    _move([head, *parts], to.sendmsg)


def _receive(source: socket.socket) -> list[Buffer]:
    """The parts that were sent, each in writable memory of its own; EOFError where the sender has ended."""

    def fill(buffers: Sequence[Buffer]) -> None:
        _move(buffers, lambda pieces: source.recvmsg_into(pieces, 0, socket.MSG_WAITALL)[0])

    fill([number := bytearray(8)])
    fill([sizes := bytearray(8 * struct.unpack("Q", number)[0])])
    # Unlike a bytearray, an array is not cleared first.
    parts: list[Buffer] = [np.empty(size, np.uint8).data for (size,) in struct.iter_unpack("Q", sizes)]
    fill(parts)
    return parts


def _move(buffers: Sequence[Buffer], step: Callable[[list[memoryview]], int]) -> None:
    """Send all buffers, or fill them, in few steps: each gives up the GIL, and may wait long to get it back."""
    views = map(memoryview, buffers)
    left = deque(view[i : i + _PIECE_BYTES] for view in views for i in range(0, len(view), _PIECE_BYTES))
    while left:
        moved = step(list(islice(left, _PIECES)))
        if not moved:
            raise EOFError
        while left and moved >= len(left[0]):
            moved -= len(left.popleft())
        if moved:
            left[0] = left[0][moved:]


def _prepare(module: str | None) -> None:
    if module:
        import_module(module)


def _failure(error: Exception) -> list[Buffer]:
    try:
        return _pickled((False, error))
    except Exception:
        return _pickled((False, RuntimeError(f"{type(error).__name__}: {error}")))


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
