"""Say how far a run is: `python jobs/status.py OUTPUT`."""

from __future__ import annotations

import json
import sys

from pipeline.config import parse
from pipeline.records import InputError
from pipeline.redaction import redacted
from pipeline.status import StatusConfig, read_status


def main() -> int:
    """Exit status: 0 when the output has a ledger, 1 otherwise; 130 after Ctrl-C."""
    try:
        config = parse(StatusConfig, sys.argv[1:])
        status = read_status(config.output, config.left)
    except (InputError, OSError) as error:
        print(redacted(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(status.as_json(), indent=1) if config.json else status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
