"""What a process of a job does at an event: note it, wait, or fail, as the rule in the folder of switches says."""

from __future__ import annotations

import errno
import json
import os
import time
from typing import Any

FOLDER = os.environ.get("FAULTS_SWITCHES", "")
POLL_S = 0.02


class HTTPError(Exception):
    """What the client library of a store raises; fsspec packages make an OSError of it and keep it as the cause."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def failure(how: str) -> OSError:
    """The exception of a store that fails in one of the ways that pass: `500`, `503`, `time-out`."""
    if how == "time-out":
        return TimeoutError(errno.ETIMEDOUT, "the store did not answer in time")
    error = OSError(errno.EBUSY, "please reduce your request rate") if how == "503" else OSError(errno.EIO, "internal")
    error.__cause__ = HTTPError(int(how))
    return error


def note(log: str, line: str) -> int:
    """Append one line to a log of the folder; returns its bytes up to there: lines of one length count themselves."""
    file = os.open(os.path.join(FOLDER, log), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"{line}\n".encode())
        return os.lseek(file, 0, os.SEEK_CUR)
    finally:
        os.close(file)


def happens(event: str, path: str) -> None:
    """An event at a path. The rule of the moment may hold this process until it is lifted, or make it fail."""
    rule = _rule()
    if rule is None or event not in rule["events"] or not path.endswith(rule["ending"]) or rule["below"] not in path:
        return
    number = note(f"{rule['name']}.count", ".") // 2
    if rule["action"] == "hold":
        if number >= rule["nth"]:
            note(f"{rule['name']}.held", str(os.getpid()))
            while _rule() == rule:
                time.sleep(POLL_S)
    elif rule["action"] == "slow":
        time.sleep(rule["seconds"])
    elif number % rule["nth"] == 0:
        raise failure(rule["action"])


def _rule() -> dict[str, Any] | None:
    try:
        with open(os.path.join(FOLDER, "rule.json")) as file:
            return json.load(file)
    except FileNotFoundError:
        return None
