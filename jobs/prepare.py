"""Cut a patch data set: `python jobs/prepare.py --ground-truth G --images I --output O`."""

from __future__ import annotations

import sys

from pipeline.config import parse
from pipeline.preparation import prepare
from pipeline.records import InputError
from pipeline.redaction import redacted
from pipeline.training_patches import PrepareConfig


def main() -> int:
    """Exit status: 0 when there are patches; 1 when there are none, or on any fault if strict; 130 after Ctrl-C."""
    try:
        config = parse(PrepareConfig, sys.argv[1:])
        prepared = prepare(config)
    except (InputError, OSError) as error:
        print(redacted(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(prepared)
    return 1 if not prepared.card["shards"] or (config.strict and prepared.aside) else 0


if __name__ == "__main__":
    sys.exit(main())
