"""Whether a job may write where it is told to, and can: asked before the work, not after it."""

from __future__ import annotations

from uuid import uuid4

from pipeline import storage
from pipeline.records import InputError


def check_apart(output: str, source: str) -> None:
    """Raise InputError where an output is a job's input, or one of the two lies in the other.

    It could replace the input, or be taken for a part of it by the next run.
    """
    if storage.contains(source, output) or storage.contains(output, source):
        raise InputError(f"{output}: expected an output apart from {source}")


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
