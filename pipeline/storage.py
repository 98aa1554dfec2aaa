"""Files behind any fsspec URL: list, read, write atomically. Nothing else in the pipeline opens a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import IO, Any
from uuid import uuid4

import fsspec

from pipeline.records import InputError

_TAGS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "updated", "modified", "created")
"""What stores call the tag of a file's content, or the time of its last change; a tag tells more, and comes first."""


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a store whose package is not installed, or that does not exist
        raise InputError(f"{url}: {error}") from None


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def is_local(url: str) -> bool:
    """Whether a URL names files of this machine."""
    return _is_local(_open(url)[0])


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


def versions(root: str) -> Iterator[tuple[str, str]]:
    """Path, relative to the folder `root`, and version of all files below it, in no order, from the listing alone.

    A version is another whenever the file may have changed: its size with its modification time, or with the content
    tag of an object store. It is empty where the store tells neither, and for a link to nothing.
    """
    fs, path = _open(root)
    if not fs.isdir(path):
        raise InputError(f"{root}: expected a folder")
    base = path.rstrip("/")
    if not _is_local(fs):
        fs.invalidate_cache(path)
        for found, info in fs.find(path, detail=True).items():
            yield found[len(base) + 1 :], _version_of(info)
        return
    folders = [base or "/"]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    yield entry.path[len(base) + 1 :], _local_version(entry)


def versions_of(root: str, paths: Sequence[str]) -> list[str]:
    """The versions, as in `versions`, of single files below the folder `root`, one question each; empty where none is.

    `paths` are known to stay below the folder; an empty one is `root` itself, which may be a file.
    """
    fs, base = _open(root)
    base = base.rstrip("/")
    if _is_local(fs):
        return [_local_version(f"{base}/{path}" if path else base) for path in paths]

    def ask(path: str) -> str:
        try:
            return _version_of(fs.info(f"{base}/{path}" if path else base))
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise _unreadable(f"{root}/{path}", error) from None

    with ThreadPoolExecutor(32) as threads:
        return list(threads.map(ask, paths))


def _local_version(file: str | os.DirEntry[str]) -> str:
    try:
        status = file.stat() if isinstance(file, os.DirEntry) else os.stat(file)
    except OSError:
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"


def _version_of(info: Mapping[str, Any]) -> str:
    tag = next((info[name] for name in _TAGS if info.get(name)), None)
    if tag is None:
        return ""
    # Stores write it in another way when asked for one file.
    tag = tag.timestamp() if isinstance(tag, datetime) else str(tag).strip('"')
    return f"{info.get('size')}:{tag}"


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


def create(url: str, data: bytes) -> bool:
    """Write a file whole unless it is there; whether this call has written it.

    Of several processes that call this at once, one writes: on local file systems, and on stores whose fsspec package
    has a create mode (s3fs, gcsfs, memory). On others, and on local ones without hard links, two may.
    """
    fs, path = _open(url)
    if not _is_local(fs):
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError, ValueError):
            if fs.exists(path):
                return False
            fs.pipe_file(path, data)
        return True
    temporary = f"{path}.{uuid4().hex}.tmp"
    put(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        if os.path.exists(path):
            return False
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return True


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Let one process at a time pass, where the folder is local and its file system has locks; elsewhere all do."""
    fs, path = _open(folder)
    if not _is_local(fs):
        yield
        return
    import fcntl

    os.makedirs(path, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
