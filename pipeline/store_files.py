"""Files on a store that are read, and written, piece by piece."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import fsspec


class RangeReader(io.RawIOBase):
    """A file of which every piece is asked for by itself, so that one that fails can be asked for again."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self.fetch, self.size, self.place = fetch, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = max(0, start + offset)
        return self.place

    def readinto(self, buffer: Any) -> int:
        end = min(self.place + len(buffer), self.size)
        if end <= self.place:
            return 0
        data = self.fetch(self.place, end)
        if len(data) > end - self.place:
            raise OSError(f"expected {end - self.place} bytes, got {len(data)}")
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


class Upload(io.BufferedIOBase):
    """A file that is sent as a whole where it is small, and else in pieces; it is there once it is finished."""

    def __init__(
        self,
        fs: fsspec.AbstractFileSystem,
        path: str,
        most_bytes: float,
        put: Callable[[bytes], None],
        once: Callable[[Callable[[], Any]], Any],
    ) -> None:
        """`put` sends all of it, a file of more than `most_bytes` goes in pieces by calls of `once`."""
        self.fs, self.path, self.most_bytes, self.put, self.once = fs, path, most_bytes, put, once
        self.held = bytearray()
        self.place = 0
        self.pieces: Any = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.place += len(view)
        if self.pieces is None and len(self.held) + len(view) > self.most_bytes:
            # What is not committed can be left without a trace.
            self.pieces = self.once(lambda: self.fs.open(self.path, "wb", autocommit=False))
            self.fs.transaction.files.clear()
            held, self.held = bytes(self.held), bytearray()
            self.once(lambda: self.pieces.write(held))
        if self.pieces is None:
            self.held += view
        else:
            self.once(lambda: self.pieces.write(bytes(view)))
        return len(view)

    def finish(self) -> None:
        """Send what is held, or complete what was sent."""
        if self.pieces is None:
            self.put(bytes(self.held))
        else:
            self.once(self.pieces.close)
            self.once(self.pieces.commit)

    def abandon(self) -> None:
        """Leave nothing of it behind."""
        if self.pieces is not None:
            with suppress(Exception):
                self.pieces.discard()
            # Closing would send the rest.
            self.pieces.closed = True
