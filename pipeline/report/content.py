"""What stands on the report's page, as plain values that know nothing of files or metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.report.cards import Card

Better = Literal["higher", "lower"]
"""Which direction is an improvement; None where a change is neither good nor bad."""


@dataclass(frozen=True, slots=True)
class Delta:
    """One headline number, before and after. Values are as shown (AP as 36.4, not 0.364); None or NaN is `no value`."""

    name: str
    before: float | None
    """None where there is only one value to show."""
    after: float | None
    digits: int = 1
    """Decimals shown; a change is called one if it does not round to zero."""
    unit: str = ""
    """Written after the value. A difference of `%` is written in points."""
    better: Better | None = "higher"
    note: str = ""
    """A line of small print: over what the number is taken."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a BarGroup: a class, a size. None or NaN is `no value`, such as a class without ground truth."""

    label: str
    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True)
class BarGroup:
    """Bars from 0 on one common scale, in the order given; a person can sort them."""

    title: str
    rows: Sequence[Bar]
    digits: int = 1
    unit: str = ""
    better: Better | None = "higher"
    note: str = ""
    full: float | None = None
    """What the whole width stands for, so that groups compare; the largest value of the group unless given."""
    bound: bool = False
    """Whether `after` is an upper bound instead of what refinement made; it is named and coloured as such."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many instances fall into each bin. Bins are drawn equally wide, whatever they span."""

    title: str
    edges: Sequence[float]
    """Increasing. One more than `counts`; or one less, where the first and the last bin are open."""
    counts: Sequence[int]
    note: str = ""
    unit: str = ""
    better: Better | None = None
    """Colours what lies beyond zero as gain or loss."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text and numbers. Numbers are right-aligned, integers with thousands, None and NaN as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    digits: int | Sequence[int] = 3
    """Decimals of its floats, or of those in each column."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Cards to page through. The caller samples: every card stays in the page."""

    title: str
    explanation: str
    cards: Sequence[Card]


@dataclass(frozen=True, slots=True)
class Report:
    """One page. Every text is shown as it is given; what is empty is left out."""

    title: str
    facts: Mapping[str, str]
    """Figures in the page's head, such as {"frames": "500"}."""
    lead: str = ""
    """The answer in one sentence."""
    headline: Sequence[Delta] = ()
    bars: Sequence[BarGroup] = ()
    histograms: Sequence[Histogram] = ()
    galleries: Sequence[Gallery] = ()
    """One without cards is shown, saying so."""
    tables: Sequence[Table] = ()
