"""What a person sees of a run: one line that grows, and a summary at the end."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.guard import REASONS
from pipeline.records import printable
from pipeline.redaction import redacted
from pipeline.work import Receipt

STAGES = ("extract", "refine", "assemble", "commit")
LOG_SECONDS = 10.0
"""How often a log without a terminal gets a line."""


@dataclass(frozen=True)
class Summary:
    """The outcome of a run. `seconds` are summed over all workers, by stage."""

    output: str
    frames: int
    done_before: int
    instances: int
    refined: int
    patches: int
    quarantined: dict[str, str]
    """Frame id -> why it was set aside, over all runs on this output."""
    seconds: dict[str, float]
    wall_s: float
    patches_per_s: float | None
    """Of the flow, from when the first block left the network to the last frame finished; None for a single block."""
    reasons: dict[str, int]
    """Number of instances that have a reason (`guard.REASONS`), by reason."""
    arithmetic: tuple[str, ...] = ()
    """What refined them (`Refiner.arithmetic`); several where machines differ, none where nothing was to do."""
    new: int = 0
    """Frames of the dump that no earlier run on this output has finished."""
    changed: int = 0
    """Frames that one has finished, with another image or other predictions."""
    unchanged: int = 0
    removed: int = 0
    """Frames that earlier runs have finished and the dump does not have any more."""
    pruned: bool = False
    """Whether the outputs of those were removed."""

    def __str__(self) -> str:
        lines = [
            f"frames       {self.frames} refined now, {self.done_before} before, {len(self.quarantined)} set aside",
            f"instances    {self.instances}, {by_status(self.refined, self.reasons)}",
            f"patches      {self.patches}"
            + (f" ({self.patches_per_s:.1f}/s after start-up)" if self.patches_per_s else ""),
            "seconds      "
            + "  ".join(f"{stage} {self.seconds.get(stage, 0.0):.1f}" for stage in STAGES)
            + f"  (summed over workers); wall {self.wall_s:.1f}",
        ]
        if self.arithmetic:
            lines.insert(3, f"network      {', '.join(self.arithmetic)}")
        for frame_id, error in list(self.quarantined.items())[:5]:
            lines.append(f"set aside    {printable(frame_id)}: {error}")
        if len(self.quarantined) > 5:
            lines.append(f"set aside    ... {len(self.quarantined) - 5} more")
        if self.quarantined:
            lines.append(f"             all in {redacted(self.output)}/_ledger/quarantine.csv")
        lines.append(f"output       {redacted(self.output)}")
        return "\n".join(lines)


def by_status(refined: int, reasons: Mapping[str, int]) -> str:
    """For example `90 refined (3 far_pieces), 2 kept (2 too_small), 8 rejected (5 uncertain, 3 iou)`."""
    parts = []
    for status, known in REASONS.items():
        counts = {reason: reasons[reason] for reason in known if reasons.get(reason)}
        count = refined if status == "refined" else sum(counts.values())
        told = ", ".join(f"{counts[reason]} {reason}" for reason in sorted(counts, key=counts.get, reverse=True))
        parts.append(f"{count} {status}" + (f" ({told})" if told else ""))
    return ", ".join(parts)


class _FirstBlock(NamedTuple):
    """What had come when the first block left the network, Unix time `at`; rates are taken from there."""

    at: float
    frames: int
    patches: int


class Progress:
    """Counts receipts and prints `refine 152/552  12.0 frames/s  set aside 1  eta 33s`, `refine` being the verb."""

    def __init__(
        self,
        total: int,
        done_before: int,
        log: Callable[[str], None],
        verb: str = "refine",
        event: Callable[..., None] | None = None,
    ) -> None:
        """`event`, where given, is told the numbers instead of a line being made of them."""
        self.total, self.done_before, self.log, self.verb, self.event = total, done_before, log, verb, event
        self.frames = self.instances = self.refined = self.patches = self.quarantined = 0
        self.reasons: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.arithmetic: set[str] = set()
        self.first: _FirstBlock | None = None
        self.last = self.logged = self.started = time.time()
        self.live = event is None and sys.stderr.isatty()

    def update(self, receipts: Sequence[Receipt]) -> None:
        """Count the frames of one block; now and then say how far the run is."""
        for receipt in receipts:
            self.frames += not receipt.error
            self.quarantined += bool(receipt.error)
            self.instances += receipt.instances
            self.refined += receipt.refined
            self.reasons.update(receipt.reasons)
            self.patches += receipt.patches
            self.seconds.update(receipt.seconds)
            self.counts.update(receipt.counts)
            if receipt.arithmetic:
                self.arithmetic.add(receipt.arithmetic)
        if self.first is None and receipts[0].refined_at:
            self.first = _FirstBlock(receipts[0].refined_at, self.frames + self.quarantined, self.patches)
        self._tell()

    def count(self, frames: int, aside: int) -> None:
        """As `update`, for frames of which there are no receipts: those done, and those set aside."""
        self.frames += frames
        self.quarantined += aside
        self._tell()

    def _tell(self) -> None:
        self.last = time.time()
        finished = self.frames + self.quarantined == self.total
        if self.last - self.logged > (0.2 if self.live else LOG_SECONDS) or finished:
            self.logged = self.last
            self._say(finished)

    def _say(self, finished: bool) -> None:
        count = self.frames + self.quarantined
        since_first = self.first and self._rate(self.first.at, count - self.first.frames)
        rate = since_first or count / max(self.last - self.started, 1e-3)
        # Until a second block is there, the rate is that of starting up.
        eta_s = (self.total - count) / rate if since_first or not self.first or finished else None
        if self.event is not None:
            numbers: dict[str, Any] = {"frames": count, "of": self.total, "set_aside": self.quarantined}
            known = {} if eta_s is None else {"eta_s": round(eta_s, 1)}
            self.event("progress", **numbers, frames_per_s=round(rate, 3), **known)
            return
        eta = "" if eta_s is None else f"  eta {eta_s:.0f}s"
        line = f"{self.verb} {count}/{self.total}  {rate:.1f} frames/s  set aside {self.quarantined}{eta}"
        if self.live:
            print(f"\r{line}\033[K", end="\n" if finished else "", file=sys.stderr, flush=True)
        else:
            self.log(line)

    def summary(self, output: str, aside: Mapping[str, str], wall_s: float) -> Summary:
        """The outcome, `wall_s` seconds after the run began."""
        return Summary(
            output,
            self.frames,
            self.done_before,
            self.instances,
            self.refined,
            self.patches,
            dict(aside),
            dict(self.seconds),
            wall_s,
            self.patches_per_s,
            dict(self.reasons),
            tuple(sorted(self.arithmetic)),
        )

    @property
    def patches_per_s(self) -> float | None:
        """As in `Summary`."""
        return self._rate(self.first.at, self.patches - self.first.patches) if self.first else None

    def _rate(self, since: float, count: int) -> float | None:
        """What came per second since a Unix time; None where nothing did."""
        return count / max(self.last - since, 1e-3) if count else None
