"""Numbers among the settings that must lie within bounds; one that does not is a line that names it."""

from __future__ import annotations

from typing import Any

from pipeline.records import InputError


def check_bounds(settings: Any, name: str, least: float, most: float | None = None, *, group: str = "") -> None:
    """Raise InputError where the setting `name` is below `least` or above `most`; one that is left open (None) passes.

    `group` stands before the name, as in `guard.`.
    """
    value = getattr(settings, name)
    if value is not None and not (value >= least and (most is None or value <= most)):
        expected = f"at least {least}" + (f", at most {most}" if most is not None else "")
        raise InputError(f"{group}{name} is {value}: expected {expected}")


def check_nms_threshold(value: float) -> None:
    """Raise InputError for an IoU that would suppress all patches, or none."""
    if not 0 < value < 1:
        raise InputError(f"nms_threshold is {value}: expected a number between 0 and 1")
