import json
import sys
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from jobs import grade as job
from model import checkpoint
from model.hrnet import CONFIGS, RefinementNetwork
from pipeline.grading import samples
from pipeline.guard import GuardConfig
from pipeline.pareto import (
    BASELINE,
    HRNET48_PRICE,
    SETTINGS,
    WITH_SECOND,
    Remembering,
    Second,
    Setting,
    Trial,
    attempt,
    second_of,
    thin,
    trials,
)
from pipeline.pareto_report import plot, points, table
from pipeline.proposals import boundary_strength, propose
from pipeline.records import InputError, cut_to_box
from tests.truths import make_truth

SIZE = (240, 320)
GUARD = GuardConfig()


@pytest.fixture
def coarse():
    return cv2.ellipse(np.zeros(SIZE, np.uint8), (160, 120), (110, 80), 20, 0, 360, 1, -1)


@pytest.fixture
def image(coarse):
    """The object is bright, and reaches five pixels further on the left than the coarse mask."""
    true = coarse | np.roll(coarse, -5, axis=1)
    return np.repeat(true[..., None] * np.uint8(200), 3, axis=2)


def by_brightness(patches, zoom):
    return (patches[..., 0] > 100).astype(np.uint16) * np.uint16(65535)


def _attempt(image, coarse, **settings):
    return attempt(image, coarse, Setting(name="one", **settings), by_brightness, GUARD)


def test_fewer_patches_leave_more_of_the_boundary_uncovered(image, coarse):
    _, few, _, gaps = _attempt(image, coarse, nms_threshold=0.05)
    refined, many, cost, none = _attempt(image, coarse, nms_threshold=0.55)
    assert few < many == cost
    assert gaps > none == 0
    assert np.array_equal(refined, image[..., 0] > 0)


@pytest.mark.parametrize(("settings", "passes"), [({"zoom": 0.5}, 0.25), ({"flip": True}, 2), ({"iterations": 2}, 2)])
def test_the_cost_is_in_passes_of_a_whole_patch(image, coarse, settings, passes):
    # With nothing to change, the second iteration has the patches of the first.
    image = np.repeat(coarse[..., None] * np.uint8(200), 3, axis=2)
    plain = _attempt(image, coarse)
    assert _attempt(image, coarse, **settings)[2] == passes * plain[2]


def test_patches_that_the_first_pass_confirms_stay_as_they_are_and_cost_only_that_pass(image, coarse):
    asked = []

    def network(patches, zoom):
        asked.append((len(patches), zoom))
        return by_brightness(patches, zoom)

    setting = Setting(name="one", confirm=0.02)
    refined, patches, cost, _ = attempt(image, coarse, setting, network, GUARD)
    (first, half), (second, whole) = asked
    assert (half, whole) == (0.5, 1.0)
    assert patches == first > second > 0
    assert cost == first / 4 + second
    assert np.array_equal(refined[:, 200:], coarse[:, 200:] != 0)
    assert not np.array_equal(refined, coarse != 0)


def test_a_mask_that_the_first_pass_confirms_everywhere_costs_a_quarter(coarse):
    image = np.repeat(coarse[..., None] * np.uint8(200), 3, axis=2)
    refined, patches, cost, _ = _attempt(image, coarse, confirm=0.01)
    assert cost == patches / 4
    assert np.array_equal(refined, coarse != 0)


def test_a_second_network_is_asked_about_the_patches_of_which_the_first_is_not_sure(image, coarse):
    asked = []

    def unsure_on_the_left(patches, zoom):
        answers = by_brightness(patches, zoom)
        left = (patches[..., 0] > 100) != (patches[..., 3] != 0)
        answers[left.any(axis=(1, 2))] = 30000
        return answers

    def right_answers(patches, boxes):
        asked.extend(boxes.tolist())
        return by_brightness(patches, 1.0)

    def tried(**settings):
        second = Second(right_answers, 10.0)
        return attempt(image, coarse, Setting(name="one", **settings), unsure_on_the_left, GUARD, second)

    plain, patches, cost, _ = tried()
    assert (patches, asked) == (cost, [])
    assert not np.array_equal(plain, image[..., 0] > 0)
    refined, patches, cost, _ = tried(doubt=0.1)
    assert np.array_equal(refined, image[..., 0] > 0)
    assert 0 < len(asked) < patches
    assert cost == patches + 10 * len(asked)
    assert all(x1 < 200 for x1, *_ in asked)
    assert tried(doubt=0.9)[2] == patches


def test_the_bound_is_a_second_network_that_knows_the_truth(tmp_path):
    truth = make_truth(tmp_path, frames=2)
    some = list(samples(str(truth), str(tmp_path / "images"), ("grow",), []))

    def at_a_loss(patches, zoom):
        return np.full(patches.shape[:3], 30000, np.uint16)

    settings = [Setting(name="none"), Setting(name="all", doubt=0.0, bound=True)]
    guard = GuardConfig(min_area=0, enabled=False)
    found = list(trials(some, settings, at_a_loss, guard))
    assert len(found) == 2 * len(some)
    for none, every in zip(found[::2], found[1::2]):
        assert every.refined[0] == pytest.approx(1, abs=0.01)
        assert every.refined[0] > none.refined[0]
        assert every.cost == none.cost + HRNET48_PRICE * every.patches


def test_the_price_of_a_second_network_is_in_multiply_adds(monkeypatch):
    def random(name):
        return RefinementNetwork(CONFIGS[name]).eval()

    monkeypatch.setattr(checkpoint, "load", random)
    assert second_of("hrnet48_256", "hrnet18s_128").price == pytest.approx(HRNET48_PRICE, rel=0.01)


def test_thinned_boxes_cover_what_all_boxes_cover(coarse):
    mask, origin = cut_to_box(coarse)
    boxes = propose(mask, origin, SIZE[::-1], 0.55)

    def covered(some):
        out = np.zeros(SIZE, bool)
        for x1, y1, x2, y2 in some.tolist():
            out[y1:y2, x1:x2] = True
        return out & (boundary_strength(coarse) > 0)

    few = thin(boxes, mask, origin)
    assert len(few) < len(boxes)
    assert np.array_equal(covered(few), covered(boxes))


def test_no_patch_passes_the_network_twice():
    asked = []

    def network(patches, zoom):
        asked.append(len(patches))
        return by_brightness(patches, zoom)

    remembering = Remembering(network)
    patches = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 4), np.uint8)
    first = remembering(patches[:3], 1.0)
    assert np.array_equal(remembering(patches, 1.0), by_brightness(patches, 1.0))
    assert np.array_equal(first, by_brightness(patches[:3], 1.0))
    remembering(patches[:2], 0.5)
    assert asked == [3, 2, 2]


def test_every_setting_is_tried_on_every_mask_that_the_guard_does_not_pass_over(tmp_path):
    truth = make_truth(tmp_path, frames=2)
    settings = [Setting(name="a"), Setting(name="b", nms_threshold=0.55)]

    def tried(guard):
        some = samples(str(truth), str(tmp_path / "images"), ("grow", "wobble"), [])
        return list(trials(some, settings, by_brightness, guard))

    found = tried(GuardConfig(min_area=0))
    assert [(one.kind, one.setting) for one in found] == 2 * [(k, s) for k in ("grow", "wobble") for s in "ab"]
    assert all(a.coarse == b.coarse for a, b in zip(found[::2], found[1::2]))
    assert tried(GuardConfig(min_area=10**6)) == []


def _trial(setting, cost, gain, key="a", kind="grow"):
    return Trial(key, kind, setting, 100, 5, int(cost), cost, (0.5,) * 4, (0.5 + gain,) * 4)


def test_the_front_has_the_settings_that_no_cheaper_one_equals():
    found = points([_trial(*one) for one in (("a", 10, 0.1), ("b", 20, 0.3), ("c", 20, 0.2), ("d", 30, 0.3))], {}, "b")
    assert [point.setting for point in found if point.front] == ["a", "b"]


def test_a_bound_is_not_on_the_front_and_keeps_nothing_off_it():
    (bound,) = [setting.name for setting in SETTINGS if setting.name == "perfect 4%"]
    found = points([_trial(*one) for one in ((BASELINE, 10, 0.1), (bound, 5, 0.4))], {}, BASELINE)
    assert [(point.setting, point.front) for point in found] == [(BASELINE, True), (bound, False)]
    assert bound not in plot(found, BASELINE)


def test_kinds_count_by_their_weight():
    some = [_trial("a", 10, 0.1), _trial("a", 20, 0.5, kind="mask_head")]
    (point,) = points(some, {"mask_head": 3.0}, "a")
    assert (point.cost, point.gain[0]) == (17.5, pytest.approx(0.4))


def test_intervals_are_of_differences_on_the_same_images():
    # The images differ by far more than the settings do.
    gains = np.random.default_rng(0).uniform(0, 0.4, 20)
    some = [_trial("a", 10, gain, key=str(i)) for i, gain in enumerate(gains)]
    some += [replace(one, setting="b", refined=tuple(x + 0.01 for x in one.refined)) for one in some]
    a, b = points(some, {}, "a")
    assert (a.low, a.high) == ((0,) * 4, (0,) * 4)
    assert b.low == pytest.approx((0.01,) * 4)
    assert b.high == pytest.approx((0.01,) * 4)
    noisy = [*some[:20], *(replace(one, setting="b") for one in reversed(some[:20]))]
    b = points(noisy, {}, "a")[1]
    assert b.low[0] < -0.02 < 0.02 < b.high[0]


def test_table_and_plot_name_every_setting_and_leave_hopeless_ones_out_of_the_plot_alone():
    found = points([_trial(*one) for one in (("a < b", 10, 0.1), ("c", 20, 0.3), ("poor", 30, 0.01))], {}, "a < b")
    assert [line.split()[0] for line in table(found).splitlines()[1:]] == ["*", "*", "poor"]
    texts = [
        text.text for text in ElementTree.fromstring(plot(found, "a < b")).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"a < b", "c"} < set(texts)
    assert "poor" not in texts


def test_labels_of_the_plot_cover_neither_points_nor_one_another():
    near = [
        ("first", 10, 0.1),
        ("second", 10.2, 0.101),
        ("third", 10.4, 0.1),
        ("fourth", 10.6, 0.1005),
        ("far", 30, 0.2),
    ]
    root = ElementTree.fromstring(plot(points([_trial(*one) for one in near], {}, "first"), "first"))
    space = "{http://www.w3.org/2000/svg}"
    labels = [one for one in root.iter(f"{space}text") if one.get("class", "").startswith("label")]
    boxes = []
    for one in labels:
        x, y, width = float(one.get("x")), float(one.get("y")), 6.5 * len(one.text)
        left = x - width if one.get("text-anchor") == "end" else x
        boxes.append((left, y - 10, left + width, y + 3))
    boxes += [
        (float(one.get("cx")) - 4, float(one.get("cy")) - 4, float(one.get("cx")) + 4, float(one.get("cy")) + 4)
        for one in root.iter(f"{space}circle")
    ]
    assert len(boxes) == 10
    assert not [
        (a, b)
        for a, b in combinations(boxes, 2)
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] and {a, b} & {*boxes[:5]}
    ]


def test_there_is_no_plot_beside_a_baseline_that_gains_nothing():
    with pytest.raises(InputError, match="gains nothing"):
        plot(points([_trial("a", 10, 0.0)], {}, "a"), "a")


def test_the_job_writes_every_trial_and_the_plot(tmp_path, monkeypatch, capsys):
    truth = make_truth(tmp_path, frames=1)
    monkeypatch.setattr(job, "network_of", lambda checkpoint, precision: by_brightness)
    flags = ["--ground-truth", truth, "--images", tmp_path / "images", "--guard.min-area", 1, "--kinds", "grow"]
    monkeypatch.setattr(sys, "argv", ["grade", *map(str, flags), "--pareto", str(tmp_path / "out")])
    assert job.main() == 0
    names = {setting.name for setting in SETTINGS}
    assert BASELINE in names
    content = json.loads((tmp_path / "out" / "pareto.json").read_text())
    assert {one["setting"] for one in content["trials"]} == {one["setting"] for one in content["points"]} == names
    assert (tmp_path / "out" / "pareto.svg").read_text().startswith("<svg")
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)

    plain = sys.argv
    monkeypatch.setattr(sys, "argv", [*plain, "--flip"])
    assert job.main() == 1
    assert "settings of its own" in capsys.readouterr().err

    second = Second(lambda patches, boxes: by_brightness(patches, 1.0), 40.0)
    monkeypatch.setattr(job, "second_of", lambda path, first, precision: second)
    monkeypatch.setattr(sys, "argv", [*plain, "--second-checkpoint", "large.pth"])
    assert job.main() == 0
    printed = capsys.readouterr().out
    assert all(setting.name in printed for setting in WITH_SECOND)

    monkeypatch.setattr(sys, "argv", [*plain[:-2], "--second-checkpoint", "large.pth"])
    assert job.main() == 1
    assert "expected both" in capsys.readouterr().err
