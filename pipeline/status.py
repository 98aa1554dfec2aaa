"""How far a run is, or how it ended, told from its output's ledger alone."""

from __future__ import annotations

import json
import math
import time
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import tyro

from pipeline import storage
from pipeline.ledger import counting, read_receipts
from pipeline.progress import STAGES, by_status
from pipeline.records import InputError, printable

RECENT_SECONDS = 300.0
"""How far back the recent rate looks."""

PAUSE_SECONDS = 600.0
"""A longer time without a frame lies between two runs, and does not count for the rate."""

BLOCK_SECONDS = 0.1
"""The frames of one block leave the network within less than this."""

ALIVE_SECONDS = 120.0
"""A run whose last sign is older than this has ended, or hangs."""

SHOWN_ERRORS = 5


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Say how far a run is, from its output alone; it may be running, finished or dead, here or elsewhere."""

    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """The output folder of the run; any fsspec URL."""
    watch: bool = False
    """Say it again and again until the run ends; on a terminal in the same place, else one line each time."""
    every: float = 5.0
    """Seconds from one look to the next."""
    json: bool = False
    """Print json for programs; while watching, one object a line."""

    def __post_init__(self) -> None:
        if not self.every > 0:
            raise InputError(f"every is {self.every}: expected a number of seconds above 0")


@dataclass(frozen=True)
class Status:
    """What became of a dump's frames so far, over all runs on one output."""

    output: str
    run_id: str
    """The latest run; empty where its output does not tell."""
    outcome: str
    """How that run ended: `finished`, `interrupted`, `failed`, or `died` without a word; `running` until then.

    Empty where its output does not tell.
    """
    reason: str
    """Why it failed."""
    done: int
    set_aside: int
    left: int | None
    """Frames that the latest run had to do and has not; None where its output does not tell."""
    instances: int
    patches: int
    refined: int
    """Instances with a refined mask."""
    reasons: dict[str, int]
    """Number of instances that have a reason (`guard.REASONS`), by reason."""
    frames_per_s: float | None
    """While frames were coming, over all runs; None for a single block."""
    recent_frames_per_s: float | None
    """The same over the last RECENT_SECONDS."""
    seconds_per_frame: dict[str, float]
    """Mean seconds of a worker for one frame, by stage."""
    last_errors: list[tuple[str, str]]
    """(frame id, reason) of the frames set aside last, the newest first."""
    last_sign_s: float | None
    """Seconds since the ledger was last written or the lease renewed; None where neither is there."""
    alive: bool
    """Whether a run seems to be going on."""
    eta_s: float | None
    """Seconds until nothing is left, of a run that is alive."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def line(self) -> str:
        """All that changes while a run goes on."""
        left = "" if self.left is None else f"  {self.left} left"
        eta = "" if self.eta_s is None else f"  eta {_duration(self.eta_s)}"
        rate = _rate(self.recent_frames_per_s or self.frames_per_s)
        state = self.outcome or self._state()
        return f"{state}  {self.done} done  {self.set_aside} set aside{left}  {rate} frames/s{eta}"

    def __str__(self) -> str:
        left = "" if self.left is None else f", {self.left} left"
        lines = [
            f"state        {self._state()}",
            f"frames       {self.done} done, {self.set_aside} set aside{left}",
            f"instances    {self.instances}, {by_status(self.refined, self.reasons)}",
            f"patches      {self.patches}",
            f"frames/s     {_rate(self.recent_frames_per_s)} in the last {RECENT_SECONDS / 60:.0f} min,"
            f" {_rate(self.frames_per_s)} overall",
        ]
        if self.eta_s is not None:
            lines.append(f"eta          {_duration(self.eta_s)}")
        if self.seconds_per_frame:
            told = "  ".join(f"{stage} {seconds:.3f}" for stage, seconds in self.seconds_per_frame.items())
            lines.append(f"s/frame      {told}")
        lines += [f"set aside    {printable(frame_id)}: {error}" for frame_id, error in self.last_errors]
        if self.set_aside > len(self.last_errors):
            lines.append(f"set aside    ... {self.set_aside - len(self.last_errors)} more")
        return "\n".join(lines)

    def _state(self) -> str:
        sign = "" if self.last_sign_s is None else f", last sign {_duration(self.last_sign_s)} ago"
        if self.outcome:
            return f"run {self.run_id} {self.outcome}{sign}" + (f": {self.reason}" if self.reason else "")
        if not sign:
            return "no frame has come yet"
        return f"{'seems alive' if self.alive else 'no run seems to be going on'}{sign}"


class _Frame(NamedTuple):
    """What the last receipt of a frame says; small, as there are millions."""

    error: str
    instances: int
    refined: int
    patches: int
    reasons: dict[str, int] | None


class StatusReader:
    """Reads the state of an output again and again, and of its ledger only what is new."""

    def __init__(self, output: str) -> None:
        self.output = storage.absolute(output)
        self.root = f"{self.output}/_ledger"
        self._forget()

    def read(self, now: float | None = None) -> Status:
        """The state of the runs on the output, at the Unix time `now` (that of the call unless given).

        InputError where there is no ledger, or where it is damaged.
        """
        now = time.time() if now is None else now
        if not storage.exists(f"{self.root}/run.json"):
            raise InputError(f"{self.output}: expected the output of a run, there is no _ledger/run.json")
        record = self._record()
        signs = self._take_in_what_is_new(record.get("started")), record.get("started"), record.get("ended")
        sign = max((moment for moment in signs if moment is not None), default=None)
        # A run that has ended does not renew its lease; one that ended by itself has said so.
        age = None if sign is None else max(0.0, now - sign)
        outcome = record.get("outcome", "")
        alive = outcome in ("", "running") and age is not None and age < ALIVE_SECONDS
        if outcome == "running" and not alive:
            outcome = "died"
        errors = [(frame_id, frame.error) for frame_id, frame in self._frames.items() if frame.error]
        reasons: Counter[str] = Counter()
        for frame in self._frames.values():
            reasons.update(frame.reasons or {})
        ordered = sorted(self._times)
        recent = _frames_per_s([moment for moment in ordered if moment > now - RECENT_SECONDS])
        overall = _frames_per_s(ordered)
        left = max(0, record["todo"] - self._came) if "todo" in record else None
        rate = recent or overall
        return Status(
            output=self.output,
            run_id=record.get("run_id", ""),
            outcome=outcome,
            reason=record.get("reason", ""),
            done=len(self._frames) - len(errors),
            set_aside=len(errors),
            left=left,
            instances=sum(frame.instances for frame in self._frames.values()),
            patches=sum(frame.patches for frame in self._frames.values()),
            refined=sum(frame.refined for frame in self._frames.values()),
            reasons=dict(reasons.most_common()),
            frames_per_s=overall,
            recent_frames_per_s=recent,
            seconds_per_frame={stage: self._seconds[stage] / self._worked for stage in STAGES if self._seconds[stage]},
            last_errors=errors[: -SHOWN_ERRORS - 1 : -1],
            last_sign_s=age,
            alive=alive,
            eta_s=left / rate if alive and left and rate else None,
        )

    def _forget(self) -> None:
        self._frames: dict[str, _Frame] = {}
        self._seconds: Counter[str] = Counter()
        self._times, self._worked = array("d"), 0
        self._came = 0
        """Frames that the latest run has done or set aside."""
        self._read: set[str] = set()
        self._before: tuple[Any, ...] = ()

    def _record(self) -> dict[str, Any]:
        """What is kept of the latest run."""
        runs = f"{self.root}/runs"
        names = storage.names(runs, (".json",))
        return _object(f"{runs}/{names[-1]}") if names else {}

    def _take_in_what_is_new(self, started: float | None) -> float | None:
        """Read the segments not read yet; the Unix time of the newest one, by its name, or of the lease's heartbeat."""
        found = storage.names(self.root, (".jsonl", ".withdrawn.json"))
        written = {name: int(name.split(".")[0]) / 1e9 for name in found if name.split(".")[0].isdecimal()}
        segments = [name for name in counting(found) if name in written]
        # What earlier segments say may not hold any more once another run has begun, or has withdrawn frames.
        before = (started, sum(name.endswith(".withdrawn.json") for name in written))
        if before != self._before or not self._read <= {*segments}:
            self._forget()
            self._before = before
        new = [name for name in segments if name not in self._read]
        try:
            for ours in (False, True):
                of_run = [name for name in new if (started is not None and written[name] >= started) == ours]
                for receipt in read_receipts(self.output, of_run) if of_run else ():
                    self._take_in(receipt)
                    self._came += ours
        except InputError:
            # A run that starts puts segments together, and removes them.
            if {*segments} <= {*storage.names(self.root, (".jsonl",))}:
                raise
            self._forget()
            return self._take_in_what_is_new(started)
        self._read.update(new)
        signs = [written[name] for name in segments]
        if lease := _object(f"{self.root}/lease.json"):
            heartbeat = lease.get("heartbeat")
            if isinstance(heartbeat, int | float):
                signs.append(float(heartbeat))
        return max(signs, default=None)

    def _take_in(self, receipt: dict[str, Any]) -> None:
        # Set aside again, a frame belongs behind those that were before.
        self._frames.pop(receipt["frame_id"], None)
        self._frames[receipt["frame_id"]] = _Frame(
            receipt["error"],
            receipt["instances"],
            receipt["refined"],
            receipt["patches"],
            receipt.get("reasons") or None,
        )
        self._seconds.update(receipt["seconds"])
        self._worked += bool(receipt["seconds"])
        # Frames that the listing rejected never came to the network.
        if receipt["refined_at"]:
            self._times.append(receipt["refined_at"])


def _frames_per_s(times: list[float]) -> float | None:
    """Frames per second, given the sorted Unix times they came at; a run's first block only starts the clock."""
    came, span, first = 0, 0.0, None
    for before, moment in pairwise([-math.inf, *times]):
        if first is None or moment - before > PAUSE_SECONDS:
            first = moment
        elif moment - first > BLOCK_SECONDS:
            came += 1
        if moment > first:
            span += moment - before
    return came / span if came else None


def _object(url: str) -> dict[str, Any]:
    """The content of a file; nothing where none is, as a run removes its lease when it ends."""
    try:
        content = json.loads(storage.read_if_there(url) or b"{}")
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{url}: expected json as a run writes it; the file is damaged")
    return content


def _rate(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _duration(seconds: float) -> str:
    """For example `12 s`, `3 min`, `5.2 h` or `2.0 days`."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
