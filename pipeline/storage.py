"""Files behind any fsspec URL: list, read, write atomically. Nothing else in the pipeline opens a file."""

from __future__ import annotations

import errno
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from typing import IO, Any, TypeVar
from uuid import uuid4

from pipeline import stores
from pipeline.records import InputError
from pipeline.store_files import RangeReader, Upload
from pipeline.stores import asked, open_store

READ_BYTES = 8 << 20
"""Bytes asked for at once of a file on a store that is read piece by piece."""

UPLOAD_BYTES = 48 << 20
"""Bytes of a file up to which it goes to a store in one request; a longer one goes in pieces of this size or more."""

traffic = {"read": 0, "written": 0}
"""Bytes of the files that this process has read and written, whole or a range of them; streams are not counted."""

_TAGS = (
    *("ETag", "etag", "md5Hash", "generation"),
    *("LastModified", "last_modified", "updated", "modified", "mtime", "modificationTime", "modify", "created"),
)
"""What stores call the tag of a file's content, or the time of its last change; a tag tells more, and comes first."""

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")

_Item = TypeVar("_Item")


def is_local(url: str) -> bool:
    """Whether a URL names files of this machine."""
    return stores.is_local(open_store(url)[0])


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
    """A local path made absolute, so that it means the same in every process; a URL without slashes at its end."""
    fs, path = open_store(url)
    if stores.is_local(fs):
        return os.path.abspath(path)
    return url.rstrip("/") if path.strip("/") else url


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    return _kind(url) is not None


def is_dir(url: str) -> bool:
    return _kind(url) == "directory"


def _kind(url: str) -> str | None:
    """What is there, `file` or `directory`; listing a folder only to know this would take a store long."""
    fs, path = open_store(url)
    try:
        return fs.info(path)["type"] if stores.is_local(fs) else asked(url, lambda: fs.info(path), reading=True)["type"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # which none can have that is there
            raise
        return None


def check_folder(url: str) -> None:
    """Raise InputError where a local folder is missing; other stores may know files only."""
    fs, path = open_store(url)
    if stores.is_local(fs) and not fs.isdir(path):
        raise InputError(f"{url}: expected a folder")


def contains(folder: str, url: str) -> bool:
    """Whether a file or folder is `folder` itself or lies below it, also through symbolic links."""
    (fs, root), (other, path) = open_store(folder), open_store(url)
    if stores.is_local(fs):
        root, path = os.path.realpath(root), os.path.realpath(path)
    return fs == other and f"{path.rstrip('/')}/".startswith(f"{root.rstrip('/')}/")


def find(root: str, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted paths, relative to the folder `root`, of all files below it with one of the endings (lower case).

    Names that begin with `._` are passed over: macOS keeps a file's attributes under them, in archives, too.
    """
    fs, path = open_store(root)
    if not stores.is_local(fs):
        return sorted(found for found, _ in _listing(root) if found.lower().endswith(suffixes))
    check_folder(root)
    base = path.rstrip("/")
    paths = [found[len(base) + 1 :] for found in fs.find(path) if found.lower().endswith(suffixes)]
    return sorted(found for found in paths if not _of_macos(found))


def names(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted names, with one of the endings (lower case), in a folder, none of one that is not there.

    What lies in its folders is not listed: that may be very many files, of which a store names a thousand an answer.
    """
    fs, path = open_store(folder)
    listed = partial(stores.of_many_requests(fs).ls, path, detail=False)
    try:
        found = listed() if stores.is_local(fs) else asked(folder, listed, reading=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in map(os.path.basename, found) if name.lower().endswith(suffixes))


def _listing(root: str) -> list[tuple[str, dict[str, Any]]]:
    """Path, relative to the folder `root`, and properties of all files below it, as a store lists them."""
    fs, path = open_store(root)
    below = f"{path.rstrip('/')}/"
    try:
        listed = asked(root, partial(stores.of_many_requests(fs).find, path, detail=True), reading=True)
    except FileNotFoundError:
        listed = {}
    # A store may show folders as empty files whose names end with a slash.
    found = [
        (name[len(below) :], info)
        for name, info in listed.items()
        if name.startswith(below) and not name.endswith("/") and not _of_macos(name)
    ]
    if not found and not is_dir(root):
        raise InputError(f"{root}: expected a folder")
    return found


def _of_macos(path: str) -> bool:
    return path.rpartition("/")[2].startswith("._")


def versions(root: str) -> Iterator[tuple[str, str]]:
    """Path, relative to the folder `root`, and version of all that `find` finds, in no order, from the listing alone.

    A version is another whenever the file may have changed: its size with its modification time, or with the content
    tag of an object store. Where the store tells neither it is another each time, and empty for a link to nothing.
    """
    fs, path = open_store(root)
    if not stores.is_local(fs):
        yield from ((found, _version_of(info)) for found, info in _listing(root))
        return
    check_folder(root)
    base = path.rstrip("/")
    folders = [base or "/"]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif not _of_macos(entry.name):
                    yield entry.path[len(base) + 1 :], _local_version(entry)


def versions_of(root: str, paths: Sequence[str]) -> list[str]:
    """The versions, as in `versions`, of single files below the folder `root`, one question each; empty where none is.

    `paths` are known to stay below the folder; an empty one is `root` itself, which may be a file.
    """
    fs, base = open_store(root)
    base = base.rstrip("/")
    if stores.is_local(fs):
        return [_local_version(f"{base}/{path}" if path else base) for path in paths]

    def ask(path: str) -> str:
        place = f"{base}/{path}" if path else base
        try:
            return _version_of(asked(f"{root}/{path}" if path else root, lambda: fs.info(place), reading=True))
        except FileNotFoundError:
            return ""

    with ThreadPoolExecutor(stores.REQUESTS) as threads:
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
        # Not known is not the same as before.
        return f"{info.get('size')}:{uuid4().hex}"
    # Stores write it in another way when asked for one file.
    tag = tag.timestamp() if isinstance(tag, datetime) else str(tag).strip('"')
    return f"{info.get('size')}:{tag}"


def read(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes of a file, or of the range [start, end) of it. InputError names a file that cannot be read."""
    data = read_if_there(url, start, end)
    if data is None:
        raise InputError(f"{url}: no such file")
    return data


def read_if_there(url: str, start: int | None = None, end: int | None = None) -> bytes | None:
    """As `read`, but None where no such file is; one request instead of two."""
    fs, path = open_store(url)

    def fetch() -> bytes:
        return fs.cat_file(path, start=start, end=end)

    try:
        data = fetch() if stores.is_local(fs) else asked(url, fetch, reading=True)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(url, error) from None
    traffic["read"] += len(data)
    return data


@contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """A file for reading from begin to end without holding it in memory; it can be sought in."""
    fs, path = open_store(url)
    try:
        if stores.is_local(fs):
            file = fs.open(path, "rb")
        else:
            info = asked(url, lambda: fs.info(path), reading=True)
            if info["type"] == "directory":
                raise IsADirectoryError(path)
            if (info.get("size") or 0) <= READ_BYTES:
                # A web server that does not tell the size will not send a part of it either.
                file = io.BytesIO(read(url))
            else:
                raw = RangeReader(lambda start, end: read(url, start, end), int(info["size"]))
                file = io.BufferedReader(raw, READ_BYTES)
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
    fs, path = open_store(url)
    if stores.is_local(fs):
        with open_write(url) as file:
            file.write(data)
    else:
        _written(url, lambda: fs.pipe_file(path, data))
    traffic["written"] += len(data)


def sync(url: str) -> None:
    """Let a file outlast a loss of power, before what it replaces is removed; one on a store does."""
    fs, path = open_store(url)
    if not stores.is_local(fs):
        return
    for place in (path, os.path.dirname(path)):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _written(url: str, call: Callable[[], Any], again: bool = True) -> Any:
    try:
        return asked(url, call, reading=False, again=again)
    except FileNotFoundError as error:  # a bucket, most often
        raise stores.StoreError(f"{url}: cannot be written ({stores.describe(error)})") from None


def create(url: str, data: bytes) -> bool:
    """Write a file whole unless it is there; whether this call has written it.

    Of several processes that call this at once, one writes: on local file systems, and on stores whose fsspec package
    has a create mode (s3fs, gcsfs, adlfs, memory). On others, and on local ones without hard links, two may.
    `data` must differ between those that call: what a store has taken though its answer was lost is told by it.
    """
    fs, path = open_store(url)
    if not stores.is_local(fs):
        try:
            _written(url, lambda: fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            return read_if_there(url) == data
        except (NotImplementedError, TypeError, ValueError):
            if exists(url):
                return False
            put(url, data)
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
    fs, path = open_store(folder)
    if not stores.is_local(fs):
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
    fs, path = open_store(url)
    if not stores.is_local(fs):
        upload = Upload(
            stores.of_many_requests(fs),
            path,
            UPLOAD_BYTES if stores.takes_pieces(fs) else math.inf,
            lambda data: put(url, data),
            lambda call: _written(url, call, again=False),
        )
        try:
            yield upload
            upload.finish()
        except BaseException:
            upload.abandon()
            raise
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Not named after the file, whose name may have as many characters as a file system takes.
    temporary = os.path.join(os.path.dirname(path), f".{uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            raise OSError(error.errno, error.strerror, path) from None  # a full disk names no file
        raise


def sweep_temporary(folder: str) -> None:
    """Delete what processes that were killed while they wrote have left below a folder; only local ones have any.

    Folders below it that are an output of their own, by their ledger, are left alone.
    """
    fs, path = open_store(folder)
    if not stores.is_local(fs):
        return
    for place, folders, names in os.walk(path):
        folders[:] = [folder for folder in folders if not os.path.isdir(os.path.join(place, folder, "_ledger"))]
        for name in names:
            if _TEMPORARY.search(name):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(place, name))


def remove(url: str) -> None:
    """Delete one file; a file that is not there is no error."""
    fs, path = open_store(url)
    with suppress(FileNotFoundError):
        if stores.is_local(fs):
            os.unlink(path)
        else:
            asked(url, lambda: fs.rm_file(path), reading=False)


def at_once(call: Callable[[_Item], object], items: Iterable[_Item]) -> None:
    """`call` for every item, many at once and in no order: a store answers late, but many requests at once."""
    with ThreadPoolExecutor(stores.REQUESTS) as threads:
        for _ in threads.map(call, items):
            pass


def size(url: str) -> int:
    """Bytes of a file. InputError names one that is not there."""
    fs, path = open_store(url)
    try:
        return int(fs.size(path) if stores.is_local(fs) else asked(url, lambda: fs.size(path), reading=True))
    except FileNotFoundError:
        raise InputError(f"{url}: no such file") from None
