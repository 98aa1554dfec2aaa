"""The report's page says what it was given, escapes it, loads nothing, and stays small."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline.report import Bar, BarGroup, Delta, Histogram, Report, Table, write_page
from tests.reports import EVIL, a_card, a_report


def written(tmp_path: Path, report: Report) -> str:
    write_page(str(tmp_path / "report.html"), report)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class Seen(HTMLParser):
    """All tags, their attributes and ids, and the text outside of style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.texts.append(data)

    def __contains__(self, text: str) -> bool:
        return any(text in one for one in self.texts)


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    html = written(tmp_path, a_report())
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|<img|<object", re.sub(r"base64,[\w+/=]+", "", html))
    targets = [
        attrs[name] or "" for _, attrs in Seen(html).tags for name in ("href", "src", "action", "data") if name in attrs
    ]
    assert all(target.startswith(("#", "data:image/jpeg;base64,")) for target in targets)
    assert "default-src 'none'" in html


def test_every_reference_has_its_one_target(tmp_path: Path) -> None:
    tags = Seen(written(tmp_path, a_report())).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    named = [attrs["href"] or "" for _, attrs in tags if "href" in attrs]
    named += [f"#{attrs['aria-labelledby']}" for _, attrs in tags if "aria-labelledby" in attrs]
    assert {target[1:] for target in named if target.startswith("#")} <= set(ids)


def test_text_is_shown_as_it_is_and_never_acts(tmp_path: Path) -> None:
    seen = Seen(written(tmp_path, a_report(EVIL)))
    kinds = [tag for tag, _ in seen.tags]
    assert kinds.count("script") == 1
    assert kinds.count("style") == 1
    assert "img" not in kinds
    assert not [name for _, attrs in seen.tags for name in attrs if name.startswith("on")]
    assert sum(EVIL in text for text in seen.texts) >= 15
    assert [attrs for _, attrs in seen.tags if EVIL in (attrs.get("aria-label") or "")]


def test_a_change_is_named_by_its_direction(tmp_path: Path) -> None:
    deltas = [
        Delta("AP", 30.0, 31.5),
        Delta("AP small", 12.0, 11.2),
        Delta("AF", 61.21, 61.23),
        Delta("AP50", None, 52.3),
        Delta("AP rare", 4.0, float("nan")),
    ]
    html = written(tmp_path, Report("t", {}, headline=deltas))
    items = re.findall(r"<li>.*?</li>", html)
    assert '<b>31.5</b><p>from 30.0 <span class="gain">▲\N{NO-BREAK SPACE}+1.5</span>' in items[0]
    assert '<span class="loss">▼\N{NO-BREAK SPACE}\N{MINUS SIGN}0.8</span>' in items[1]
    assert '<span class="same">±0.0</span>' in items[2]
    assert "<b>52.3</b>" in items[3]
    assert "span" not in items[3]
    assert "<b>\N{EN DASH}</b>" in items[4]


def test_bars_reach_from_0_to_100_percent_and_a_missing_value_has_none(tmp_path: Path) -> None:
    rows = [Bar("car", 20.0, 40.0), Bar("bus", 10.0, None), Bar("train", None, float("nan"))]
    html = written(tmp_path, Report("t", {}, bars=[BarGroup("AP by class", rows)]))
    car, bus, train = re.findall(r'<tr><th scope="row">.*?</tr>', html)
    assert re.findall(r'class="(\w+)" y="\d+" width="([\d.]+)"', car) == [("coarse", "20.00"), ("refined", "40.00")]
    assert re.findall(r'class="(\w+)" y="\d+" width="([\d.]+)"', bus) == [("coarse", "10.00")]
    assert "<rect" not in train
    assert train.count("\N{EN DASH}") == 3


def test_bounds_are_drawn_and_named_so(tmp_path: Path) -> None:
    group = BarGroup("AP, upper bound", [Bar("all right", 20.0, 40.0)], bound=True)
    html = written(tmp_path, Report("t", {}, bars=[group]))
    assert re.findall(r'class="(\w+)" y="\d+" width="([\d.]+)"', html) == [("coarse", "20.00"), ("bound", "40.00")]
    assert ">Bound</th>" in html
    assert ">Refined</th>" not in html


def test_bars_without_a_before_have_one_column(tmp_path: Path) -> None:
    html = written(tmp_path, Report("t", {}, bars=[BarGroup("AP by size", [Bar("all", None, 2.0)])]))
    assert ">Value</th>" in html
    assert ">Coarse</th>" not in html


@pytest.mark.parametrize(
    ("group", "named"),
    [
        (BarGroup("AP", [Bar("all", 30.0, None)]), ["coarse mask, as it came in"]),
        (BarGroup("AP", [Bar("all", None, 30.0)]), ["refined mask, as it goes out"]),
        (BarGroup("AP", [Bar("all", 30.0, 60.0)], bound=True), ["coarse mask, as it came in", "upper bound"]),
    ],
)
def test_the_legend_names_what_the_page_shows_and_nothing_else(
    tmp_path: Path, group: BarGroup, named: list[str]
) -> None:
    page = written(tmp_path, Report("Evaluation", {}, bars=[group]))
    assert re.findall(r"</i>([^<]*)</span>", page.partition('class="legend"')[2].partition("</p>")[0]) == named


def test_bars_without_an_after_have_one_column(tmp_path: Path) -> None:
    html = written(tmp_path, Report("t", {}, bars=[BarGroup("AP by size", [Bar("all", 2.0, None)])]))
    assert ">Value</th>" in html
    assert ">Refined</th>" not in html
    assert '<rect class="coarse"' in html


def test_bars_of_nothing_but_zeros_or_nothing_at_all_are_shown(tmp_path: Path) -> None:
    groups = [BarGroup("zeros", [Bar("car", 0.0, 0.0)]), BarGroup("nothing", [])]
    assert "zeros" in Seen(written(tmp_path, Report("t", {}, bars=groups)))


def test_a_histogram_colours_gains_and_losses_beside_zero(tmp_path: Path) -> None:
    one = Histogram("Change in IoU", [-0.2, -0.1, 0, 0.1, 0.2], [1, 2, 8, 4])
    html = written(tmp_path, Report("t", {}, histograms=[one]))
    assert re.findall(r'<rect class="(gain|loss)".*?height="([\d.]+)"', html) == [
        ("loss", "12.50"),
        ("loss", "25.00"),
        ("gain", "100.00"),
        ("gain", "50.00"),
    ]
    assert "<title>0 to 0.1: 8 (53.3%)</title>" in html
    assert "15 in 4 bins" in html


def test_a_histogram_of_nothing_is_shown(tmp_path: Path) -> None:
    assert "0 in 2 bins" in written(tmp_path, Report("t", {}, histograms=[Histogram("Changed", [0, 1, 2], [0, 0])]))


def test_edges_that_do_not_fit_the_counts_leave_no_page_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'Changed': 2 edges for 2 counts"):
        write_page(str(tmp_path / "report.html"), Report("t", {}, histograms=[Histogram("Changed", [0, 1], [1, 2])]))
    assert list(tmp_path.iterdir()) == []


def test_a_table_shows_numbers_as_numbers_and_every_row(tmp_path: Path) -> None:
    rows = [["car", 12345, 0.12345, None]] + [[f"class{i}", i, float(i), float("nan")] for i in range(40)]
    html = written(tmp_path, Report("t", {}, tables=[Table("Per class", ["Class", "Instances", "IoU", "AP"], rows)]))
    assert '<td data-value="12345">12,345</td><td data-value="0.12345">0.123</td><td data-value="">\N{EN DASH}' in html
    assert html.count("<tr>") == 42
    assert 'tabindex="0" role="region" aria-label="Per class"' in html


def test_each_column_of_a_table_may_have_decimals_of_its_own(tmp_path: Path) -> None:
    table = Table("Changes", ["Class", "Pixels", "Share"], [["car", 123.4, 5.678]], digits=[0, 0, 1])
    html = written(tmp_path, Report("t", {}, tables=[table]))
    assert '<td data-value="123.4">123</td><td data-value="5.678">5.7</td>' in html


def test_what_is_empty_is_left_out_but_an_empty_gallery_and_table_say_so(tmp_path: Path) -> None:
    bare = written(tmp_path, Report("t", {}))
    assert "<section" not in bare
    assert "<nav" not in bare
    full = Seen(written(tmp_path, a_report()))
    assert "None in this run." in full
    assert "None." in Seen(written(tmp_path, Report("t", {}, tables=[Table("Set aside", ["Frame"], [])])))


def test_the_truth_is_offered_only_where_there_is_one(tmp_path: Path) -> None:
    with_truth, without = a_report(), a_report(truth=False)
    assert 'class="see-truth"' in written(tmp_path, with_truth)
    assert "ground truth</span>" in written(tmp_path, with_truth)
    assert 'class="see-truth"' not in written(tmp_path, without)
    assert "ground truth</span>" not in written(tmp_path, without)


def test_galleries_of_a_hundred_photographs_make_a_page_of_a_few_megabytes(tmp_path: Path) -> None:
    photograph = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    largest = a_card(photograph)
    report = a_report(cards=[largest] * 24)
    assert len(report.galleries) == 4
    assert len(written(tmp_path, report)) < 6_000_000
