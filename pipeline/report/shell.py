"""The frame of every page: head, title, facts, and the switch between light and dark."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape

from pipeline.report.style import SHARED_STYLE

CLOSING = "</main></body></html>\n"

_THEMES = "".join(
    f'<label><input type="radio" name="theme" value="{theme}"{" checked" if theme == "auto" else ""}>'
    f"<span>{theme.capitalize()}</span></label>"
    for theme in ("auto", "light", "dark")
)


SIDES = {
    "coarse": "coarse mask, as it came in",
    "refined": "refined mask, as it goes out",
    "truth": "ground truth",
    "bound": "upper bound",
}


def opening(
    title: str,
    facts: Mapping[str, str],
    style: str,
    *,
    script: str = "",
    lead: str = "",
    links: Mapping[str, str] | None = None,
    sides: Sequence[str] = ("coarse", "refined"),
) -> str:
    """A page up to its first section. `links` are the names of its sections by their ids; only `script` may run.

    The legend names the `sides` that the page shows, keys of SIDES.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing is ever loaded, and no text that is shown can act: the browser itself sees to it.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'" + (
        f"; script-src 'sha256-{digest}'" if script else ""
    )
    figures = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    legend = "".join(f'<span><i class="{side}"></i>{SIDES[side]}</span>' for side in sides)
    anchors = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name in (links or {}).items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{SHARED_STYLE}{style}</style></head><body>"
        '<div class="top"><div>'
        + (f'<nav aria-label="Sections">{anchors}</nav>' if anchors else "")
        + f'<fieldset class="theme"><legend>Colours</legend>{_THEMES}</fieldset></div></div>'
        f"<header><h1>{escape(title)}</h1>"
        + (f'<p class="lead">{escape(lead)}</p>' if lead else "")
        + (f'<dl class="facts">{figures}</dl>' if figures else "")
        + f'<p class="legend">{legend}</p></header>'
        # A module runs once the whole page is there.
        + (f'<script type="module">{script}</script>' if script else "")
        + "<main>"
    )
