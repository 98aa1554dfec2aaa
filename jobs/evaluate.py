"""Measure what refinement did: `python jobs/evaluate.py --images I --coarse C --refined R --ground-truth G`."""

from __future__ import annotations

import json
import sys

from jobs import ended
from pipeline import storage
from pipeline.config import parse
from pipeline.evaluation import EvaluateConfig, evaluate
from pipeline.evaluation_report import report
from pipeline.evaluation_results import results, text
from pipeline.report import write_page


def main() -> int:
    """Exit status: 0 when all images were measured; 1 when some could not be, or none; 130 after Ctrl-C."""
    return ended(_evaluate)


def _evaluate() -> int:
    config = parse(EvaluateConfig, sys.argv[1:])
    outcome = evaluate(config)
    found = results(outcome)
    print(text(found))
    if config.output:
        output = config.output.rstrip("/")
        storage.put(f"{output}/evaluation.json", json.dumps(found.as_json(), indent=1).encode())
        storage.put(f"{output}/evaluation.txt", (text(found) + "\n").encode())
        write_page(f"{output}/report.html", report(config, outcome, found))
        print(f"report       {output}/report.html")
    return 1 if found.aside else 0


if __name__ == "__main__":
    sys.exit(main())
