"""The report shows the true borders of the masks, close up where they changed, in one file that loads nothing."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.records import InputError, Instance, cut_to_box
from pipeline.report import ReportFrame, ReportInstance, write_picture, write_report
from pipeline.report.contours import choose_windows, contour_lines, trace
from pipeline.report.frames import CROPS_PER_FRAME, change_of


def instance(mask: np.ndarray) -> Instance:
    return Instance("0", 24, 0.9, *cut_to_box(mask))


def frame(name: str = "street", label: str = "car", shift: int = 4) -> ReportFrame:
    image = np.full((120, 200, 3), 90, np.uint8)
    coarse, refined = np.zeros((2, 120, 200), bool)
    coarse[40:80, 50:90] = True
    refined[40:80, 50 + shift : 90 + shift] = True
    return ReportFrame(name, image, [ReportInstance(label, instance(coarse), instance(refined))])


def filled(outlines: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centre lies inside the outlines, by the even-odd rule."""
    crossings = np.zeros(shape, int)
    for outline in outlines:
        for (x, y1), (_, y2) in zip(outline[1::2], np.roll(outline, -1, axis=0)[1::2]):
            crossings[min(y1, y2) : max(y1, y2), x:] += 1
    return crossings % 2 == 1


@pytest.mark.parametrize("seed", range(8))
def test_outlines_enclose_exactly_the_pixels_of_the_mask(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((13, 17)) < (0.15, 0.5, 0.85)[seed % 3]
    outlines = trace(mask)
    for outline in outlines:
        steps = np.diff(np.concatenate([outline, outline[:1]]), axis=0)
        assert (steps[0::2, 1] == 0).all()
        assert (steps[1::2, 0] == 0).all()
        assert (steps != 0).any(axis=1).all()
    assert (filled(outlines, mask.shape) == mask).all()


def test_an_empty_mask_has_no_outline() -> None:
    assert trace(np.zeros((0, 0), bool)) == []
    assert trace(np.zeros((5, 5), bool)) == []


def test_an_outline_lies_where_its_mask_lies_in_the_frame() -> None:
    (outline,) = trace(np.ones((2, 3), bool), origin=(10, 20))
    assert {tuple(corner) for corner in outline.tolist()} == {(10, 20), (13, 20), (13, 22), (10, 22)}


def test_a_contour_leaves_out_where_the_frame_cuts_the_mask() -> None:
    mask = np.zeros((10, 12), bool)
    mask[4:, 3:7] = True
    (line,) = contour_lines(instance(mask), (10, 12))
    assert {tuple(line[0]), tuple(line[-1])} == {(3, 10), (7, 10)}
    assert {tuple(corner) for corner in line.tolist()} == {(3, 10), (3, 4), (7, 4), (7, 10)}
    assert contour_lines(instance(np.ones((10, 12), bool)), (10, 12)) == []


def test_change_of_are_those_only_one_of_the_masks_has() -> None:
    (one,) = frame(shift=4).instances
    changed = change_of(one, (120, 200))
    assert changed.sum() == 2 * 4 * 40
    assert changed[40:80, 50:54].all()
    assert changed[40:80, 90:94].all()


def test_a_window_is_centred_where_the_masks_differ() -> None:
    change = np.zeros((300, 400), bool)
    change[140:160, 230:250] = True
    ((x1, y1, x2, y2),) = choose_windows(change, 80, 4)
    assert (x2 - x1, y2 - y1) == (80, 80)
    assert abs((x1 + x2) / 2 - 240) <= 1
    assert abs((y1 + y2) / 2 - 150) <= 1


def test_windows_come_by_size_of_the_change_and_never_overlap() -> None:
    rng = np.random.default_rng(0)
    change = np.zeros((300, 400), bool)
    change[200:230, 300:330] = True
    change[:150] = rng.random((150, 400)) < 0.02
    windows = choose_windows(change, 64, 6)
    assert len(windows) == 6
    first = windows[0]
    assert first[0] <= 300 < 330 <= first[2]
    assert first[1] <= 200 < 230 <= first[3]
    seen = np.zeros(change.shape, int)
    for x1, y1, x2, y2 in windows:
        assert 0 <= x1 < x2 <= 400
        assert 0 <= y1 < y2 <= 300
        seen[y1:y2, x1:x2] += 1
    assert seen.max() == 1


def test_a_window_stays_in_a_frame_and_shrinks_to_a_small_one() -> None:
    corner = np.zeros((100, 100), bool)
    corner[:3, :3] = True
    assert choose_windows(corner, 80, 4) == [(0, 0, 80, 80)]
    assert choose_windows(np.ones((30, 50), bool), 80, 4) == [(0, 0, 50, 30)]


def test_nothing_changed_means_no_window() -> None:
    assert choose_windows(np.zeros((100, 100), bool), 80, 4) == []


def page(tmp_path: Path, *frames: ReportFrame, title: str = "Before and after") -> str:
    write_report(str(tmp_path / "report.html"), frames, title, {"frames": str(len(frames)), "weights": "<hrnet>"})
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_loads_nothing_and_holds_its_photographs(tmp_path: Path) -> None:
    html = page(tmp_path, frame("one"), frame("two"))
    assert not re.search(r"https?:|//\w|@import|<script|<link|<iframe", re.sub(r"base64,[\w+/=]+", "", html))
    references = re.findall(r'(?:href|src)="([^"]*)"', html)
    assert all(target.startswith(("#", "data:image/jpeg;base64,")) for target in references)
    assert sum(target.startswith("data:") for target in references) == 2


def test_every_reference_in_the_page_has_its_one_target(tmp_path: Path) -> None:
    html = page(tmp_path, frame("one"), frame("two"))
    targets = re.findall(r' id="([^"]*)"', html)
    assert len(targets) == len(set(targets))
    assert {target[1:] for target in re.findall(r'href="(#[^"]*)"', html)} <= set(targets)


def test_names_labels_and_facts_are_escaped(tmp_path: Path) -> None:
    html = page(tmp_path, frame('<b>"a"&b', label="<i>x</i>"), title="a < b")
    assert "<b>&quot;" not in html
    assert "<i>x" not in html
    assert "&lt;b&gt;&quot;a&quot;&amp;b" in html
    assert "&lt;i&gt;x&lt;/i&gt;" in html
    assert "<title>a &lt; b</title>" in html
    assert "&lt;hrnet&gt;" in html


def test_the_page_states_what_changed_and_describes_its_pictures(tmp_path: Path) -> None:
    html = page(tmp_path, frame(shift=4))
    assert "320 pixels changed" in html
    assert "1,600" in html
    pictures = re.findall(r"<svg [^>]*>", html)
    assert 3 <= len(pictures) <= 1 + 2 * CROPS_PER_FRAME
    assert all(re.search(r'role="img" aria-label="[^"]*street', picture) for picture in pictures)


def test_a_frame_without_change_is_shown_without_close_ups(tmp_path: Path) -> None:
    html = page(tmp_path, frame(shift=0))
    assert "No pixel changed in this frame." in html
    assert "<figure" not in html


def test_a_frame_without_instances_and_an_empty_mask_are_shown(tmp_path: Path) -> None:
    bare = ReportFrame("bare", np.zeros((20, 30, 3), np.uint8), [])
    gone = frame("gone")
    gone.instances[0].refined.mask = np.zeros((0, 0), bool)
    html = page(tmp_path, bare, gone)
    assert "0 instances" in html
    assert "1,600 pixels changed" in html


def test_no_more_than_two_photographs_are_held_at_a_time(tmp_path: Path) -> None:
    images: list[weakref.ref[np.ndarray]] = []

    def frames() -> Iterator[ReportFrame]:
        for number in range(6):
            images.append(weakref.ref((one := frame(f"frame{number}")).image))
            assert sum(image() is not None for image in images) <= 2
            yield one
            del one

    write_report(str(tmp_path / "report.html"), frames(), "t", {})
    html = (tmp_path / "report.html").read_text()
    assert re.findall(r">(frame\d)<", html) == [f"frame{number}" for number in range(6)]


def test_a_page_that_fails_half_way_is_not_left_behind(tmp_path: Path) -> None:
    def frames() -> Iterator[ReportFrame]:
        yield frame()
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        write_report(str(tmp_path / "report.html"), frames(), "t", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_the_picture_is_one_wide_png(tmp_path: Path, pairs: int) -> None:
    write_picture(str(tmp_path / "picture.png"), [frame(), frame(shift=9), frame(shift=2)], pairs)
    picture = cv2.imread(str(tmp_path / "picture.png"))
    assert picture.shape[1] == 1600
    assert 250 < picture.shape[0] < 900


def test_a_picture_of_no_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no mask has changed"):
        write_picture(str(tmp_path / "picture.png"), [frame(shift=0)])
