import copy
import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ground_truth import CityscapesTruth, TrueFrame
from pipeline.metrics.boundary import CITYSCAPES_RATIO, boundary_iou, boundary_region, dilation_px
from pipeline.metrics.cityscapes_ap import (
    EVALUATED,
    OVERLAPS,
    CityscapesMatches,
    cityscapes_ap,
    match_frame,
)
from pipeline.metrics.overlap import intersection
from tests.scenes import frame_of, instance, quietly, random_street, square, true_instance, write_street

SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=10, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Runs the official evaluation on [(ids, frame)] in folders of its own; None where it fails on its own account."""
    evaluation = pytest.importorskip(
        "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling", reason="cityscapesscripts is not installed"
    )

    def run(streets):
        root = tmp_path_factory.mktemp("official")
        args = copy.deepcopy(evaluation.args)
        args.quiet, args.JSONOutput = True, False
        args.gtInstancesFile, args.predictionPath = str(root / "gtInstances.json"), str(root)
        pairs = [write_street(root, f"{i:03d}", ids, frame) for i, (ids, frame) in enumerate(streets)]
        with pytest.MonkeyPatch.context() as patch:
            # NumPy 2.3 has no in1d any more, and json cannot write NumPy's numbers.
            patch.setattr(np, "in1d", lambda *given: np.isin(*given).ravel(), raising=False)
            patch.setattr(evaluation, "writeDict2JSON", lambda *given: None)
            patch.chdir(root)
            try:
                return quietly(evaluation.evaluateImgLists, *map(list, zip(*pairs)), args)
            except IndexError:
                return None

    return run


def _streets(seed, count=4):
    return [random_street(seed + i) for i in range(count)]


def _measure(streets, **options):
    return cityscapes_ap(CityscapesMatches.merge([match_frame(truth, frame, **options) for _, truth, frame in streets]))


@FEW
@given(seed=SEEDS)
def test_the_table_equals_the_official_one_exactly(official, seed):
    streets = _streets(seed)
    theirs = official([(ids, frame) for ids, _, frame in streets])
    if theirs is None:
        return
    ours = _measure(streets)
    assert np.array_equal(ours.per_class, theirs["resultApMatrix"][0], equal_nan=True)
    numbers, averages = ours.numbers(), theirs["averages"]
    assert numbers == {"AP": averages["allAp"], "AP50": averages["allAp50%"]} or math.isnan(numbers["AP"])
    for category, found in zip(EVALUATED, averages["classes"].values()):
        expected = pytest.approx((found["ap"], found["ap50%"]), abs=1e-15, nan_ok=True)
        assert tuple(ours.numbers(category).values()) == expected


@FEW
@given(seed=SEEDS)
def test_parts_merge_in_any_order_to_the_same_numbers(seed):
    parts = [match_frame(truth, frame) for _, truth, frame in _streets(seed)]
    together = cityscapes_ap(CityscapesMatches.merge(parts)).per_class
    pairs = [CityscapesMatches.merge(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    backwards = cityscapes_ap(CityscapesMatches.merge(pairs[::-1])).per_class
    assert np.array_equal(together, backwards, equal_nan=True)


def test_id_images_read_from_files_give_the_same_parts(tmp_path):
    ids, truth, frame = random_street(2)
    write_street(tmp_path, "a", ids, frame)
    source = CityscapesTruth(str(tmp_path), str(tmp_path))
    read = source.read(source.list_frames().refs[0])
    assert np.array_equal(read.void, truth.void)
    ours, expected = match_frame(read, frame), match_frame(truth, frame)
    assert len(ours.score)
    assert all(np.array_equal(getattr(ours, f.name), getattr(expected, f.name)) for f in fields(ours))


def _plain_boundary_table(streets):
    """The definition read aloud: every prediction at every overlap by itself, and precision over all thresholds."""
    table = np.full((len(EVALUATED), len(OVERLAPS)), np.nan)
    for k, label in enumerate(EVALUATED):
        for o, least in enumerate(OVERLAPS):
            scored, missed, wanted = [], 0, 0
            for _, truth, frame in streets:
                dilation = dilation_px(truth.width, truth.height, CITYSCAPES_RATIO)
                claims = {}
                truths = [one for one in truth.instances if one.category_id == label]
                for p in (one for one in frame.instances if one.category_id == label and one.mask.any()):
                    ignored, matched = int(np.count_nonzero(p.mask & truth.void[_window(p)])), False
                    for one in truths:
                        common = intersection(p, one)
                        if not intersection(boundary_region(p, dilation), boundary_region(one, dilation)):
                            continue
                        iou = min(common / (p.area + one.area - common), boundary_iou(p, one, dilation))
                        if iou > least:
                            matched = True
                            claims.setdefault(one.instance_id, []).append(p.score)
                        ignored += common * (one.crowd + (one.area < 100))
                    if not matched and ignored / p.area <= least:
                        scored.append((p.score, False))
                for one in truths:
                    if not one.crowd and one.area >= 100:
                        wanted += 1
                        scores = sorted(claims.get(one.instance_id, []))
                        missed += not scores
                        scored += [(score, score_i == len(scores) - 1) for score_i, score in enumerate(scores)]
            if wanted:
                table[k, o] = _plain_area(scored, missed)
    return table


def _plain_area(scored, missed):
    right = sum(hit for _, hit in scored)
    points = []
    for threshold in sorted({score for score, _ in scored}):
        kept = [hit for score, hit in scored if score >= threshold]
        points.append((sum(kept) / len(kept), sum(kept) / (right + missed)))
    points.append((1.0, 0.0))
    recalls = [points[0][1], *(recall for _, recall in points), 0.0]
    return sum(precision * (recalls[i] - recalls[i + 2]) / 2 for i, (precision, _) in enumerate(points))


def _window(one):
    (left, top), (height, width) = one.origin, one.mask.shape
    return slice(top, top + height), slice(left, left + width)


@FEW
@given(seed=SEEDS)
def test_the_boundary_table_equals_a_plain_reading_of_its_definition(seed):
    streets = _streets(seed)
    ours = _measure(streets, boundary_ratio=CITYSCAPES_RATIO).per_class
    assert ours == pytest.approx(_plain_boundary_table(streets), abs=1e-12, nan_ok=True)


def _car_ap(truths, *predictions, void=None):
    truth = TrueFrame(100, 60, truths, void=void)
    return cityscapes_ap(match_frame(truth, frame_of(*predictions, size=(60, 100)))).numbers(26)["AP50"]


def test_a_prediction_on_void_or_on_a_group_is_not_wrong():
    car, right = true_instance(square(5), 26), instance(square(5), 26, 0.5)
    stray = instance(square(60), 26, 0.9)
    assert _car_ap([car], right, stray) < 0.8
    assert _car_ap([car], right, stray, void=square(60)) == 1
    assert _car_ap([car, true_instance(square(60), 26, crowd=True)], right, stray) == 1


def test_a_small_region_need_not_be_found():
    assert _car_ap([true_instance(square(5), 26), true_instance(square(60, 9), 26)], instance(square(5), 26)) == 1


def test_the_second_prediction_on_an_object_is_wrong():
    cars = [true_instance(square(5), 26), true_instance(square(60), 26)]
    best, second, other = instance(square(5), 26, 0.9), instance(square(5), 26, 0.8), instance(square(60), 26, 0.7)
    assert _car_ap(cars, best, other) == 1
    assert _car_ap(cars, best, second, other) < 1


def test_without_predictions_that_count_ap_is_0_and_without_truths_there_is_none():
    car = true_instance(square(5), 26)
    assert _car_ap([car]) == 0
    assert _car_ap([car], instance(square(60), 26), void=square(60)) == 0
    assert math.isnan(_car_ap([], instance(square(60), 26)))


def test_predictions_of_classes_that_are_not_evaluated_are_counted():
    frame = frame_of(instance(square(5), 29), instance(square(5), 7), instance(square(5), 26), size=(60, 100))
    assert match_frame(TrueFrame(100, 60, []), frame).unknown == 2
