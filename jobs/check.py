"""Say what is wrong before a run starts: `python jobs/check.py --predictions P --images I --output O`."""

from __future__ import annotations

import json
import sys

from jobs import ended
from pipeline.config import parse
from pipeline.preflight import CheckConfig, check


def main() -> int:
    """Exit status: 0 when no check found an error, 1 otherwise; 130 after Ctrl-C."""
    return ended(_check)


def _check() -> int:
    config = parse(CheckConfig, sys.argv[1:])
    report = check(config)
    print(json.dumps(report.as_json(), indent=1) if config.json else report)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
