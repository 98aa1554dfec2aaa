"""Whether a job may write where it is told to, and can: asked before the work, not after it."""

from __future__ import annotations

import os
from uuid import uuid4

from pipeline import storage
from pipeline.records import InputError


def check_apart(output: str, source: str) -> None:
    """Raise InputError where an output is a job's input, or one of the two lies in the other.

    It could replace the input, or be taken for a part of it by the next run.
    """
    if storage.contains(source, output) or storage.contains(output, source):
        raise InputError(f"{output}: expected an output apart from {source}")


def check_kept(output: str) -> None:
    """Raise InputError where an output lies in the copy of the working directory that Ray makes of a submitted job.

    Ray removes it later, and makes another one when a file in it has changed.
    """
    path = storage.absolute(output)
    if os.path.isabs(path) and "/runtime_resources/working_dir_files/" in path:
        raise InputError(
            f"{output}: is below the working directory that Ray unpacks for a job, and removes later; expected an"
            " absolute path or the URL of a store"
        )


def check_writable(url: str) -> None:
    """Raise InputError where no file can be written under this name, found out by writing one beside it."""
    if storage.is_dir(url):
        raise InputError(f"{url}: is a folder, expected the name of a file to write")
    _try(f"{url}.{uuid4().hex}.tmp", url)


def check_writable_folder(output: str) -> None:
    """As `check_writable`, of a folder with a ledger, found out by writing a file beside that."""
    _try(f"{output}/_ledger/trial-{uuid4().hex}", output)


def _try(trial: str, named: str) -> None:
    try:
        storage.put(trial, b"")
        storage.remove(trial)
    except OSError as error:
        raise InputError(f"{named}: cannot be written ({error.strerror or error})") from None
