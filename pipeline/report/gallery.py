"""A gallery as HTML: cards in a row that snaps, one in sight at a time; a script adds buttons, keys and the slider."""

from __future__ import annotations

import base64
from html import escape

from pipeline.report.cards import Card, View
from pipeline.report.content import Gallery

PIXELATED_BELOW_PX = 300
"""An overview narrower than this is shown so large that its pixels are shown as they are."""


def gallery(one: Gallery, key: str) -> str:
    """The section of one gallery; its cards have the ids `<key>-1`, `<key>-2`, ..."""
    title = f'<h2 id="{key}-title">{escape(one.title)}<small>{len(one.cards):,}</small></h2>'
    head = f'{title}<p class="caption">{escape(one.explanation)}</p>'
    if not one.cards:
        body = '<p class="none">None in this run.</p>'
    else:
        has_truth = any(card.overview.truth is not None for card in one.cards)
        cards = "".join(_card(card, f"{key}-{i}", i, len(one.cards)) for i, card in enumerate(one.cards, 1))
        thumbs = "".join(_thumb(card, f"{key}-{i}", i) for i, card in enumerate(one.cards, 1))
        body = (
            f'{_tools(has_truth, len(one.cards))}<div class="cards" tabindex="0" role="group" '
            f'aria-label="Cards; the arrow keys turn them">{cards}</div>'
            f'<nav class="strip" aria-label="All cards of {escape(one.title)}">{thumbs}</nav>'
        )
    return f'<section class="panel gallery" id="{key}" aria-labelledby="{key}-title">{head}{body}</section>'


def _tools(has_truth: bool, count: int) -> str:
    def toggle(name: str, text: str, key: str, checked: bool, mark: str = "", kind: str = "") -> str:
        return (
            f'<label{kind} title="{text} (key {key})"><input type="checkbox" class="see-{name}"'
            f"{' checked' if checked else ''}>{mark}{text}</label>"
        )

    toggles = [
        toggle(side, side.capitalize(), side[0], side != "truth", f'<i class="{side}"></i>')
        for side in ("coarse", "refined", "truth")
        if side != "truth" or has_truth
    ]
    toggles.append(toggle("slider", "Slider", "s", False, kind=' class="js-only"'))
    return (
        f'<div class="tools">{"".join(toggles)}<span class="pager js-only">'
        '<button type="button" class="previous" aria-label="Previous">←</button>'
        f"<output>1 / {count}</output>"
        '<button type="button" class="next" aria-label="Next">→</button></span></div>'
    )


def _card(card: Card, key: str, number: int, count: int) -> str:
    label, view = escape(card.label), card.overview
    x1, y1, x2, y2 = view.box
    size = f'viewBox="0 0 {view.width} {view.height}"'
    sides = [("coarse", view.coarse), ("refined", view.refined)]
    sides += [] if view.truth is None else [("truth", view.truth)]
    # The slider cuts the two sides where it stands, so that each is a layer of its own.
    layers = "".join(
        f'<svg class="contour {side}" {size} aria-hidden="true"><defs><path id="{key}-{side}" d="{path}"/></defs>'
        f'<use class="casing" href="#{key}-{side}"/><use class="line" href="#{key}-{side}"/></svg>'
        for side, path in sides
    )
    small = " small" if view.width < PIXELATED_BELOW_PX else ""
    close_ups = "".join(_close_up(one, f"{key}-z{i}", label) for i, one in enumerate(card.close_ups, 1))
    return (
        f'<article class="card" id="{key}" aria-label="{number} of {count}: {label}"><header><h3>{label}</h3>'
        f'<p>{escape(card.note)}</p></header><div class="well"><div class="stage{small}" '
        f'style="--ratio:{view.width / view.height:.4f}"><svg {size} role="img" '
        f'aria-label="{label}, {x2 - x1} by {y2 - y1} pixels at x {x1}, y {y1}">{_image(view, f"{key}-photo")}</svg>'
        f'{layers}<div class="divide"></div><input class="cut" type="range" min="0" max="100" value="50" '
        'aria-label="Coarse to the left, refined to the right"></div></div><div class="close-ups">'
        f"{close_ups or '<p>Nothing changed in this instance: no close-ups.</p>'}</div></article>"
    )


def _close_up(view: View, key: str, label: str) -> str:
    x1, y1, x2, y2 = view.box
    truth = [("truth", view.truth)] if view.truth is not None else []
    pair = []
    for side, path in (("coarse", view.coarse), ("refined", view.refined)):
        contours = "".join(f'<g class="contour {name}">{_line(d)}</g>' for name, d in [(side, path), *truth])
        image = _image(view, f"{key}-photo") if side == "coarse" else f'<use href="#{key}-photo"/>'
        pair.append(
            f'<div><svg viewBox="0 0 {view.width} {view.height}" role="img" aria-label="Close-up of {label} with the '
            f'{side} contour">{image}{contours}</svg><span><i class="{side}"></i>{side}</span></div>'
        )
    return (
        f'<figure><div class="pair">{"".join(pair)}</div>'
        f"<figcaption>{x2 - x1} by {y2 - y1} pixels at x {x1}, y {y1}</figcaption></figure>"
    )


def _thumb(card: Card, key: str, number: int) -> str:
    view = card.overview
    return (
        f'<a href="#{key}" aria-label="{number}: {escape(card.label)}" title="{escape(card.label)}">'
        f'<svg viewBox="0 0 {view.width} {view.height}" preserveAspectRatio="xMidYMid slice" aria-hidden="true">'
        f'<use href="#{key}-photo"/></svg></a>'
    )


def _line(path: str) -> str:
    return f'<path class="casing" d="{path}"/><path class="line" d="{path}"/>'


def _image(view: View, key: str) -> str:
    data = base64.b64encode(view.jpeg).decode()
    return f'<image id="{key}" width="{view.width}" height="{view.height}" href="data:image/jpeg;base64,{data}"/>'
