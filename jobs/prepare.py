"""Cut a patch data set: `python jobs/prepare.py --ground-truth G --images I --output O`."""

from __future__ import annotations

import sys

from jobs import ended
from pipeline.config import parse
from pipeline.preparation import prepare
from pipeline.training_patches import PrepareConfig


def main() -> int:
    """Exit status: 0 when there are patches; 1 when there are none, or on any fault if strict; 130 after Ctrl-C."""
    return ended(_prepare, interrupted="interrupted; the same command goes on from here")


def _prepare() -> int:
    config = parse(PrepareConfig, sys.argv[1:])
    prepared = prepare(config)
    print(prepared)
    return 1 if not prepared.card["shards"] or (config.strict and prepared.aside) else 0


if __name__ == "__main__":
    sys.exit(main())
