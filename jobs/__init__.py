"""Entry points, one to a file, and how they end: with one line instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from model.backend import UnsupportedError
from model.bundled import CheckpointError
from pipeline.records import InputError
from pipeline.redaction import redacted

UNREAD = 141
"""Exit status where nobody reads the output to its end, as in `| head -1`; shells have it of what SIGPIPE ends."""


def unread(error: Exception) -> bool:
    """Whether an error is that nobody reads standard output any more; what is still to be printed then goes nowhere."""
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        print(flush=True)  # connections to stores and processes break in the same words
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def ended(job: Callable[[], int], *also: type[Exception], interrupted: str = "interrupted") -> int:
    """The exit status of a job: what it returns; 1 after an error that says what was expected; 130 after Ctrl-C;
    141 where nobody reads its output any more.

    `also` are kinds of such errors that only this job knows.
    """
    try:
        status = job()
        print(end="", flush=True)  # later, at the interpreter's end, a reader that has gone would be a traceback
        return status
    except (InputError, CheckpointError, UnsupportedError, OSError, *also) as error:
        if unread(error):
            return UNREAD
        print(redacted(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
