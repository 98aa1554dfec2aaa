"""The report in a browser: pictures are seen, buttons, keys and toggles work, and the browser complains of nothing."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.records import Instance, cut_to_box
from pipeline.report import ReportFrame, ReportInstance, write_page, write_report
from tests.reports import EVIL, a_report, photograph

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium installed")

ONE_PROCESS = "--allow-file-access-from-files"
"""Files are of one origin then, so that a frame may write into the page around it."""

ACTIONS = r"""
const all = selector => [...document.querySelectorAll(selector)];
const first = selector => document.querySelector(selector);
const shown = element => element.getClientRects().length > 0 && getComputedStyle(element).display !== "none";
const press = (key, on = document.body) => on.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const at = number => first(`#gallery-${number} output`).value;
const inSight = number => all(`#gallery-${number} .card`).filter(card => {
  const [a, b] = [card.getBoundingClientRect(), card.parentNode.getBoundingClientRect()];
  return a.left < b.right - 1 && a.right > b.left + 1;
}).map(card => card.id);
const column = k => all("#table-1 tbody tr").map(row => row.cells[k].textContent);
const ground = () => getComputedStyle(document.body).backgroundColor;
const report = () => {
  const result = { width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth };
  result.wide = all("body *").filter(element => element.getBoundingClientRect().right > innerWidth + 1
    && !element.closest(".cards, .strip, .scroll, nav")).map(element => element.outerHTML.slice(0, 80));
  result.small = all(".stage > svg:not(.truth), .pair svg")
    .filter(svg => svg.getBoundingClientRect().width < 100).length;
  result.start = [at(1), at(2), inSight(1), inSight(2)];
  first("#gallery-1 .next").click();
  result.next = [at(1), inSight(1), location.hash];
  first("#gallery-1 .previous").click();
  first("#gallery-1 .previous").click();
  result.wrapped = [at(1), inSight(1)];
  first("#gallery-1 .strip a:nth-child(2)").click();
  result.thumb = [at(1), inSight(1), first("#gallery-1 .strip [aria-current]").getAttribute("href")];
  press("ArrowRight", first("#gallery-3 .cards"));
  result.key = [at(1), at(3), inSight(3)];
  press("ArrowRight", first("#gallery-3 .current .cut"));
  result.rangeKey = at(3);
  result.reachable = all("#gallery-3 .card").map(card => card.inert);
  const contours = side => all(`#gallery-1 .current .contour.${side}`).map(shown);
  result.contours = ["coarse", "refined", "truth"].map(contours);
  first("#gallery-1 .see-coarse").click();
  press("t", first("#gallery-1 .next"));
  result.toggled = ["coarse", "refined", "truth"].map(contours);
  result.untouched = all("#gallery-2 .current .contour.coarse").map(shown);
  result.handle = [shown(first("#gallery-1 .current .cut"))];
  first("#gallery-1 .see-slider").click();
  const range = first("#gallery-1 .current .cut");
  range.value = 25;
  range.dispatchEvent(new Event("input", { bubbles: true }));
  result.handle.push(shown(range));
  result.clip = ["coarse", "refined"].map(side => getComputedStyle(first(`#gallery-1 .current .${side}`)).clipPath);
  result.kept = all("#gallery-1 .cut").map(other => other.value);
  result.rows = [column(1)];
  first("#table-1 thead th:nth-child(2) button").click();
  result.rows.push(column(1));
  first("#table-1 thead th:nth-child(2) button").click();
  result.rows.push(column(1));
  result.grounds = ["light", "dark"].map(theme => (first(`[name=theme][value=${theme}]`).click(), ground()));
  return result;
};
parent.document.querySelector("pre").textContent = JSON.stringify(report());
"""


def browse(page: Path, tmp_path: Path, *flags: str) -> tuple[str, list[str]]:
    """The DOM (or nothing, with a screenshot) and what the browser's console said."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0"]
    command += [*flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode(), re.findall(r".*CONSOLE.*", done.stderr.decode(errors="replace"))


def acted(tmp_path: Path, width: int, fragment: str = "") -> dict[str, Any]:
    """What ACTIONS found on a page of that width: in a frame, for a browser's window does not become that narrow."""
    write_page(str(tmp_path / "report.html"), a_report(EVIL))
    page = (tmp_path / "report.html").read_text()
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    (tmp_path / "acting.html").write_text(page.replace("</body>", f'<script type="module">{ACTIONS}</script></body>'))
    (tmp_path / "outer.html").write_text(
        f'<body style="margin:0"><pre></pre><iframe src="acting.html{fragment}" '
        f'style="border:0;width:{width}px;height:900px"></iframe>'
    )
    dom, said = browse(tmp_path / "outer.html", tmp_path, "--dump-dom", "--window-size=1400,900", ONE_PROCESS)
    assert said == []
    found = re.search(r"<pre>(.+?)</pre>", dom, re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_buttons_keys_and_toggles_do_what_they_say(tmp_path: Path, width: int) -> None:
    seen = acted(tmp_path, width, "#gallery-2-3")
    assert seen["wide"] == []
    assert (seen["width"], seen["overflow"], seen["small"]) == (width, 0, 0)
    assert seen["start"] == ["1 / 3", "3 / 3", ["gallery-1-1"], ["gallery-2-3"]]
    assert seen["next"] == ["2 / 3", ["gallery-1-2"], "#gallery-1-2"]
    assert seen["wrapped"] == ["3 / 3", ["gallery-1-3"]]
    assert seen["thumb"] == ["2 / 3", ["gallery-1-2"], "#gallery-1-2"]
    assert seen["key"] == ["2 / 3", "2 / 3", ["gallery-3-2"]]
    assert seen["rangeKey"] == "2 / 3"
    assert seen["reachable"] == [True, False, True]
    assert [set(side) for side in seen["contours"]] == [{True}, {True}, {False}]
    assert [set(side) for side in seen["toggled"]] == [{False}, {True}, {True}]
    assert set(seen["untouched"]) == {True}
    assert seen["handle"] == [False, True]
    assert seen["clip"] == ["inset(0px 75% 0px 0px)", "inset(0px 0px 0px 25%)"]
    assert seen["kept"] == ["25"] * 3
    assert seen["rows"] == [["3", "1", "2"], ["3", "2", "1"], ["1", "2", "3"]]
    assert seen["grounds"][0] != seen["grounds"][1]


@pytest.mark.slow
def test_the_page_is_seen_with_its_photographs_and_the_browser_complains_of_nothing(tmp_path: Path) -> None:
    write_page(str(tmp_path / "report.html"), a_report(EVIL))
    picture = tmp_path / "picture.png"
    _, said = browse(tmp_path / "report.html", tmp_path, f"--screenshot={picture}", "--window-size=1280,3600")
    assert said == []
    pixels = cv2.imread(str(picture))[..., ::-1].astype(int)
    assert pixels.shape == (3600, 1280, 3)
    red_disc = np.abs(pixels - (200, 40, 40)).max(axis=2) < 40
    assert red_disc.sum() > 3 * 40_000
    for colour in ((255, 216, 61), (77, 184, 255)):
        assert (np.abs(pixels - colour).max(axis=2) < 40).sum() > 1000


@pytest.mark.slow
def test_numbers_and_cards_are_there_without_a_script(tmp_path: Path) -> None:
    write_page(str(tmp_path / "report.html"), a_report())
    page = re.sub(r'<script type="module">.*?</script>', "", (tmp_path / "report.html").read_text(), flags=re.DOTALL)
    (tmp_path / "still.html").write_text(page)
    picture = tmp_path / "picture.png"
    _, said = browse(tmp_path / "still.html", tmp_path, f"--screenshot={picture}", "--window-size=1280,3600")
    assert said == []
    pixels = cv2.imread(str(picture))[..., ::-1].astype(int)
    assert (np.abs(pixels - (200, 40, 40)).max(axis=2) < 40).sum() > 3 * 40_000


@pytest.mark.slow
def test_on_paper_each_frame_takes_one_page(tmp_path: Path) -> None:
    image = photograph(size=(512, 512))
    refined = np.zeros((512, 512), bool)
    refined[100:400, 100:400] = True
    coarse = Instance("0", 24, 0.9, *cut_to_box(np.roll(refined, 9, axis=(0, 1))))
    change = ReportInstance("car", coarse, Instance("0", 24, 0.9, *cut_to_box(refined)))
    write_report(str(tmp_path / "report.html"), [ReportFrame("street", image, [change])] * 2, "Before and after", {})
    paper = tmp_path / "report.pdf"
    browse(tmp_path / "report.html", tmp_path, f"--print-to-pdf={paper}")
    assert len(re.findall(rb"/Type /Page\b", paper.read_bytes())) <= 3
