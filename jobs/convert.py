"""Convert predictions of another library: `python jobs/convert.py --from detectron2 INPUT --output results.json`."""

from __future__ import annotations

import sys

from jobs import ended
from pipeline.config import parse
from pipeline.conversion import ConvertConfig, convert


def main() -> int:
    """Exit status: 0 when the json has been written, 1 otherwise; 130 after Ctrl-C."""
    return ended(_convert, interrupted="interrupted; nothing was written")


def _convert() -> int:
    print(convert(parse(ConvertConfig, sys.argv[1:])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
