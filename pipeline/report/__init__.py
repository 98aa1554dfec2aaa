"""Pages that a person looks at: what refinement changed, in numbers and in pictures, in one file that loads nothing."""

from pipeline.report.cards import Card, View, make_card
from pipeline.report.content import Bar, BarGroup, Delta, Gallery, Histogram, Report, Table
from pipeline.report.frames import ReportFrame, ReportInstance, write_picture, write_report
from pipeline.report.page import write_page

__all__ = [
    "Bar",
    "BarGroup",
    "Card",
    "Delta",
    "Gallery",
    "Histogram",
    "Report",
    "ReportFrame",
    "ReportInstance",
    "Table",
    "View",
    "make_card",
    "write_page",
    "write_picture",
    "write_report",
]
