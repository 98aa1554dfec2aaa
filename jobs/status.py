"""Say how far a run is: `python jobs/status.py OUTPUT`, or `--watch` it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator

from jobs import ended
from pipeline.config import parse
from pipeline.status import Status, StatusConfig, StatusReader


def main() -> int:
    """Exit status: 0 when the output has a ledger, and a watched run has finished; else 1, or 130 after Ctrl-C."""
    return ended(_status)


def _status() -> int:
    config = parse(StatusConfig, sys.argv[1:])
    reader = StatusReader(config.output)
    if config.watch:
        return 0 if _show(_looks(reader, config.every), config.json) else 1
    status = reader.read()
    print(json.dumps(status.as_json(), indent=1) if config.json else status)
    return 0


def _looks(reader: StatusReader, every: float) -> Iterator[Status]:
    """The status again and again, for the last time when the run is not going on any more."""
    while True:
        status = reader.read()
        yield status
        if not status.alive:
            return
        time.sleep(every)


def _show(looks: Iterator[Status], as_json: bool) -> bool:
    """Print every look, in the place of the one before on a terminal; whether the run has finished in the last."""
    painted, status = 0, None
    for status in looks:
        if as_json:
            print(json.dumps(status.as_json()), flush=True)
        elif sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            lines = [line[:width] for line in str(status).splitlines()]
            back = f"\033[{painted}F\033[J" if painted else ""
            print(back + "\n".join(lines), flush=True)
            painted = len(lines)
        elif status.alive:
            print(f"{time.strftime('%H:%M:%S')}  {status.line}", flush=True)
        else:
            print(status, flush=True)
    return status is not None and status.outcome in ("finished", "")


if __name__ == "__main__":
    sys.exit(main())
