"""Files behind any fsspec URL: list, read, write atomically. Nothing else in the pipeline opens a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO
from uuid import uuid4

import fsspec

from pipeline.records import InputError


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a store whose package is not installed, or that does not exist
        raise InputError(f"{url}: {error}") from None


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def stays_below(relative: str) -> bool:
    """Whether a path leads to some place below any folder it is appended to: not absolute, and not through `..`."""
    parts = relative.replace("\\", "/").split("/")
    # fsspec takes `a::b` for a chain of file systems, so a name with it could lead anywhere.
    return bool(parts[0]) and ".." not in parts and not any(s in relative for s in ("://", "::", "\0"))


def join(root: str, relative: str) -> str:
    """`relative` below the folder `root`; raises InputError where it would leave it."""
    if not stays_below(relative):
        raise InputError(f"{relative!r}: expected a path that stays below {root}")
    return f"{root.rstrip('/')}/{relative}"


def absolute(url: str) -> str:
    """A local path made absolute, so that it means the same in every process; any other URL as it is."""
    fs, path = _open(url)
    return os.path.abspath(path) if _is_local(fs) else url


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = _open(url)
    return fs.exists(path)


def is_dir(url: str) -> bool:
    fs, path = _open(url)
    return fs.isdir(path)


def check_folder(url: str) -> None:
    """Raise InputError where a local folder is missing; other stores may know files only."""
    fs, path = _open(url)
    if _is_local(fs) and not fs.isdir(path):
        raise InputError(f"{url}: expected a folder")


def contains(folder: str, url: str) -> bool:
    """Whether a file or folder is `folder` itself or lies below it, also through symbolic links."""
    (fs, root), (other, path) = _open(folder), _open(url)
    if _is_local(fs):
        root, path = os.path.realpath(root), os.path.realpath(path)
    return fs == other and f"{path.rstrip('/')}/".startswith(f"{root.rstrip('/')}/")


def find(root: str, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted paths, relative to the folder `root`, of all files below it with one of the endings (lower case)."""
    fs, path = _open(root)
    if not fs.isdir(path):
        raise InputError(f"{root}: expected a folder")
    fs.invalidate_cache(path)
    base = path.rstrip("/")
    return sorted(found[len(base) + 1 :] for found in fs.find(path) if found.lower().endswith(suffixes))


def read(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes of a file, or of the range [start, end) of it. InputError names a file that cannot be read."""
    fs, path = _open(url)
    try:
        return fs.cat_file(path, start=start, end=end)
    except OSError as error:
        raise _unreadable(url, error) from None


@contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """A file for reading from begin to end without holding it in memory."""
    fs, path = _open(url)
    try:
        file = fs.open(path, "rb")
    except OSError as error:
        raise _unreadable(url, error) from None
    with file:
        yield file


def _unreadable(url: str, error: OSError) -> InputError:
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return InputError(f"{url}: no such file")
    return InputError(f"{url}: cannot be read ({error.strerror or error})")


def put(url: str, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, replacing an older one."""
    fs, path = _open(url)
    if _is_local(fs):
        with open_write(url) as file:
            file.write(data)
    else:
        fs.pipe_file(path, data)


@contextmanager
def open_write(url: str) -> Iterator[IO[bytes]]:
    """A file for writing piece by piece that appears under its name only once it is closed without an exception."""
    fs, path = _open(url)
    if not _is_local(fs):
        # An object store publishes an upload when it is completed; leaving early discards it.
        with fs.transaction, fs.open(path, "wb") as file:
            yield file
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def remove(url: str) -> None:
    """Delete one file; a file that is not there is no error."""
    fs, path = _open(url)
    if fs.exists(path):
        fs.rm_file(path)


def size(url: str) -> int:
    """Bytes of a file."""
    fs, path = _open(url)
    return int(fs.size(path))
