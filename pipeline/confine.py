"""Files of others, opened only where they are what they seem: plain files that lie below the folder they are named in.

A dump from elsewhere may have links to this machine's secrets, which an error line or a report would quote; devices
and pipes, which never end; and an output folder may have links through which one would write to other places.
Object stores have nothing of the kind.
"""

from __future__ import annotations

import os
import stat

from pipeline import storage
from pipeline.records import InputError


def inside(root: str, relative: str, largest: int | None = None) -> str:
    """The URL of a file below the folder `root` that may be read.

    InputError where the path leads out of the folder, by itself or through links, or to no plain file, or to one of
    more than `largest` bytes. The folder itself may be a link. A missing file is no error here; reading it will be one.
    """
    url = storage.join(root, relative)
    if not storage.is_local(url):
        return url
    path = storage.absolute(url)
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file system takes
        return url
    if not storage.contains(root, url):
        raise InputError(f"{url}: expected a file that lies below {root}, found a link to another place")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{url}: expected a plain file")
    if largest is not None and found.st_size > largest:
        raise InputError(f"{url}: expected a file of at most {largest} bytes, found {found.st_size}")
    return url


def writable(root: str, relative: str) -> str:
    """The URL of a file to write, or remove, below the folder `root`; a link in its own place would be replaced.

    InputError where the folder it is to lie in is elsewhere, through `..` or links; `root` itself may be a link.
    """
    url = storage.join(root, relative)
    if "/" in relative and not storage.contains(root, url.rpartition("/")[0]):
        raise InputError(f"{url}: expected a folder that lies below {root}, found a link to another place")
    return url
