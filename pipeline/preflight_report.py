"""What a check before a run has found, for people and for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SHOWN = 5
"""Findings that a check names; of the others there is the number."""

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    level: Level
    message: str
    findings: list[str] = field(default_factory=list)
    """At most SHOWN lines, each naming a file."""
    count: int = 0
    """How many findings there are."""

    def __str__(self) -> str:
        lines = [f"{self.level:<8} {self.name:<12} {self.message}"]
        lines += [f"{'':<21} {finding}" for finding in self.findings]
        if self.count > len(self.findings):
            lines.append(f"{'':<21} ... {self.count - len(self.findings)} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class Estimate:
    """What a run would have to do; everything but `frames` is extrapolated from the frames that were measured."""

    frames: int
    instances: int
    patches: int
    output_bytes: int
    measured: int

    def __str__(self) -> str:
        about = "" if self.measured >= self.frames else "about "
        return (
            f"{'':<8} {'to do':<12} {self.frames} frames, {about}{self.instances} instances,"
            f" {about}{self.patches} patches, about {size_of(self.output_bytes)} of output"
            f" (from {self.measured} frames)"
        )


@dataclass(frozen=True)
class Report:
    """All checks that could be made; one that needs what another found wrong is left out."""

    checks: list[Check]
    estimate: Estimate | None

    @property
    def failed(self) -> bool:
        """Whether any check found an error."""
        return any(check.level == "error" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """`{"ok", "checks": [{"name", "level", "message", "findings", "count"}], "estimate"}`."""
        return {"ok": not self.failed, **asdict(self)}

    def __str__(self) -> str:
        levels = Counter(check.level for check in self.checks)
        lines = [*map(str, self.checks), *([str(self.estimate)] if self.estimate else [])]
        counts = [f"{levels[level]} {level}{'s' * (levels[level] != 1)}" for level in ("error", "warning")]
        return "\n".join([*lines, ", ".join(counts)])


def size_of(count: int) -> str:
    """For example `12 kB`, `84.0 MB` or `1.2 GB`."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
