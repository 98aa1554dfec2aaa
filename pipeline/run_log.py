"""What a run tells while it goes on: lines for people, or one json object a line for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

from pipeline.records import printable
from pipeline.redaction import redacted
from pipeline.work import Receipt

LogFormat = Literal["text", "json"]

ALL_ASIDE = 20
"""Frames set aside of which each is told; of the later ones every power of two."""


class RunLog:
    """Hands lines to `write`.

    As json they have `time` (ISO 8601, UTC), `level`, `run_id` (empty before the run holds its output) and `event`:
    `start`, `progress`, `set_aside` (with `frame_id` and `reason`), `finished`, `interrupted` or `failed` (`reason`).
    """

    def __init__(self, form: LogFormat, write: Callable[[str], None]) -> None:
        self.json, self.write = form == "json", write
        self.run_id = ""
        self._aside = 0

    def event(self, event: str, level: str = "info", **facts: Any) -> None:
        """One line of json; nothing as text, which has its own lines."""
        if self.json:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "level": level, "run_id": self.run_id, "event": event, **facts}
            self.write(json.dumps(line))

    def set_aside(self, receipts: Sequence[Receipt]) -> None:
        """Name frames that were set aside, as it happens; all are in the quarantine table in the end."""
        for receipt in receipts:
            if not receipt.error:
                continue
            self._aside += 1
            if self._aside > ALL_ASIDE and self._aside & (self._aside - 1):
                continue
            reason = redacted(receipt.error)
            self.event("set_aside", "warning", frame_id=receipt.frame_id, reason=reason, set_aside=self._aside)
            if not self.json:
                if sys.stderr.isatty():  # there the line of progress stands
                    print("\r\033[K", end="", file=sys.stderr, flush=True)
                self.write(f"set aside {printable(receipt.frame_id)}: {reason}")

    @contextmanager
    def telling_the_end(self) -> Iterator[None]:
        """A last line where an exception ends the run."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self.event("interrupted", "warning")
            raise
        except Exception as error:
            self.event("failed", "error", reason=one_line(error))
            raise


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks and what gives access; with its kind where it is no message to us."""
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return redacted(f"{kind}{' '.join(str(error).split())}")[:1000]
