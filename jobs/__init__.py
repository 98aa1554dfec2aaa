"""Entry points, one to a file, and how they end: with one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from model.backend import UnsupportedError
from model.bundled import CheckpointError
from pipeline.records import InputError
from pipeline.redaction import redacted


def ended(job: Callable[[], int], *also: type[Exception], interrupted: str = "interrupted") -> int:
    """The exit status of a job: what it returns; 1 after an error that says what was expected; 130 after Ctrl-C.

    `also` are kinds of such errors that only this job knows.
    """
    try:
        return job()
    except (InputError, CheckpointError, UnsupportedError, OSError, *also) as error:
        print(redacted(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
