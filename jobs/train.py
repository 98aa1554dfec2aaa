"""Train the refiner on patch data sets: `python jobs/train.py --data D --output O`, here or on Ray Train."""

from __future__ import annotations

import sys
import time

from jobs import ended
from model.fit import FitError
from pipeline.config import parse
from pipeline.flow import noted_signals
from pipeline.progress import LOG_SECONDS
from pipeline.training import Interrupted, TrainConfig, claimed, prepare, train
from pipeline.training_on_ray import train_on_ray


def main() -> int:
    """Exit status: 0 when the weights are written, now or before; 1 after an error; 128 + signal when told to stop."""
    return ended(_train, FitError)


def _train() -> int:
    config = parse(TrainConfig, sys.argv[1:])
    prepared = prepare(config)
    if prepared is None:
        print(f"{config.output}: training is finished already; --restart starts anew")
        return 0
    received: list[int] = []
    try:
        with claimed(prepared) as check:
            if config.workers_range[1]:
                train_on_ray(prepared.config, _Console(), received, check)
            else:
                with noted_signals(received):
                    train(prepared.config, _Console(), lambda: bool(received), check)
    except Interrupted as reason:
        print(reason)
        return 128 + received[0]
    return 0


class _Console:
    """Shows lines; passing ones overwrite each other on a terminal, and are thinned out in a log."""

    def __init__(self) -> None:
        self.live, self.passing, self.logged = sys.stdout.isatty(), False, time.monotonic()

    def __call__(self, line: str, passing: bool = False) -> None:
        now = time.monotonic()
        if passing and now - self.logged < (0.2 if self.live else LOG_SECONDS):
            return
        if passing:
            self.logged = now
        start = "\r\033[K" if self.passing else ""
        self.passing = passing and self.live
        print(f"{start}{line}", end="" if self.passing else "\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
