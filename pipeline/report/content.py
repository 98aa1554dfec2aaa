"""What stands on the report's page, as plain values that know nothing of files or metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.report.cards import Card


@dataclass(frozen=True, slots=True)
class Delta:
    """One headline score in percent, before and after, the higher the better. None or NaN is `no value`."""

    name: str
    before: float | None
    """None where there is only one value to show."""
    after: float | None


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a BarGroup, a class or a size, in percent. None or NaN is `no value`, as without any ground truth."""

    label: str
    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True)
class BarGroup:
    """Bars from 0 to 100 %, the higher the better, in the order given; a person can sort them."""

    title: str
    rows: Sequence[Bar]
    note: str = ""
    bound: bool = False
    """Whether `after` is an upper bound instead of what refinement made; it is named and coloured as such."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many instances fall into each bin of a change. Bins are drawn equally wide, whatever they span."""

    title: str
    edges: Sequence[float]
    """Increasing, one more than `counts`; a bin that lies wholly above 0 is a gain, one wholly below a loss."""
    counts: Sequence[int]
    note: str = ""


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
