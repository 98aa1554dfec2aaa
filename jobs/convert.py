"""Convert predictions of another library: `python jobs/convert.py --from detectron2 INPUT --output results.json`."""

from __future__ import annotations

import sys

from pipeline.config import parse
from pipeline.conversion import ConvertConfig, convert
from pipeline.records import InputError
from pipeline.redaction import redacted


def main() -> int:
    """Exit status: 0 when the json has been written, 1 otherwise; 130 after Ctrl-C."""
    try:
        converted = convert(parse(ConvertConfig, sys.argv[1:]))
    except (InputError, OSError) as error:
        print(redacted(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(converted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
