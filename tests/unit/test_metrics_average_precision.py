import copy
import json
import math
from dataclasses import replace
from functools import partial

import faster_coco_eval as faster
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.ground_truth import CocoTruth, TrueFrame
from pipeline.metrics import cityscapes_ap
from pipeline.metrics.average_precision import average_precision
from pipeline.metrics.boundary import COCO_RATIO
from pipeline.metrics.boundary_f import boundary_f_frame
from pipeline.metrics.matching import LVIS, Matches, Rules, match_frame
from pipeline.metrics.oracle import oracle
from pipeline.records import Frame, InputError
from tests.scenes import CATEGORIES, Scene, frame_of, instance, quietly, random_scene, square, true_instance

SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=12, deadline=None, derandomize=True)


def _matches(scene: Scene, rules: Rules) -> list[Matches]:
    return [match_frame(i, truth, frame, rules) for i, (truth, frame) in enumerate(zip(scene.truths, scene.frames))]


def _measure(scene: Scene, rules: Rules):
    return average_precision(Matches.merge(_matches(scene, rules)), scene.categories)


def _official(scene: Scene, kind: str = "segm", cls=COCOeval, coco_cls=COCO, **options):
    """(stats, precision) of pycocotools' evaluation, or of another of its form."""
    truth = coco_cls()
    truth.dataset = copy.deepcopy(scene.annotations())
    quietly(truth.createIndex)
    results = quietly(truth.loadRes, copy.deepcopy(scene.results()))
    evaluation = cls(truth, results, kind, **options)
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        quietly(step)
    return evaluation


def _as_official(number: float) -> float:
    return -1.0 if math.isnan(number) else number


@FEW
@given(SEEDS)
def test_every_number_equals_pycocotools_to_the_last_digit(seed):
    scene = random_scene(seed)
    if not any(frame.instances for frame in scene.frames):
        return
    official = _official(scene)
    ours = _measure(scene, Rules())
    assert np.array_equal(ours.precision, official.eval["precision"][..., 2])
    assert [_as_official(number) for number in ours.numbers().values()] == official.stats[:6].tolist()


@FEW
@given(SEEDS)
def test_only_the_best_predictions_of_a_category_count(seed):
    scene = random_scene(seed, images=2)
    if not any(frame.instances for frame in scene.frames):
        return
    official = _official(scene)
    official.params.maxDets = [1, 2, 3]
    quietly(official.evaluate)
    quietly(official.accumulate)
    assert np.array_equal(_measure(scene, Rules(per_category=3)).precision, official.eval["precision"][..., 2])


@FEW
@given(SEEDS)
def test_parts_merge_in_any_order_to_the_same_numbers(seed):
    parts = _matches(random_scene(seed, images=5), Rules())
    together = average_precision(Matches.merge(parts), CATEGORIES)
    grouped = average_precision(
        Matches.merge([parts[3], Matches.merge([parts[1], parts[4]]), Matches(), parts[0], parts[2]]), CATEGORIES
    )
    assert np.array_equal(together.precision, grouped.precision)


@FEW
@given(SEEDS)
def test_boundary_ap_equals_the_independent_implementation(seed):
    scene = random_scene(seed, blank=False)
    if not any(frame.instances for frame in scene.frames):
        return
    official = _official(
        scene,
        "boundary",
        cls=faster.COCOeval_faster,
        coco_cls=faster.COCO,
        boundary_dilation_ratio=COCO_RATIO,
    )
    ours = list(_measure(scene, Rules(boundary_ratio=COCO_RATIO)).numbers().values())
    assert [_as_official(number) for number in ours] == pytest.approx(official.stats[:6].tolist(), abs=1e-12)


@FEW
@given(SEEDS)
def test_lvis_numbers_equal_the_independent_implementation(seed):
    scene = random_scene(seed, lvis=True, blank=False)
    if not any(frame.instances for frame in scene.frames):
        return
    official = _official(scene, cls=faster.COCOeval_faster, coco_cls=faster.COCO, lvis_style=True).stats_as_dict
    # It takes empty predictions for wrong ones, which LVIS's own tool does not see.
    measured = _measure(scene, replace(LVIS, leave_out_empty=False))
    ours = measured.numbers() | measured.frequency_numbers(scene.frequencies)
    names = {"AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75", "APs": "AP_small", "APm": "AP_medium", "APl": "AP_large"}
    for name, number in ours.items():
        assert _as_official(number) == pytest.approx(official[names.get(name, name)], abs=1e-12), name


@pytest.mark.parametrize("lvis", [False, True])
def test_files_read_in_another_order_give_the_same_numbers(lvis, tmp_path):
    scene = random_scene(3, images=6, lvis=lvis)
    annotations = scene.annotations()
    for image in annotations["images"]:
        if lvis:
            image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
    annotations["images"].reverse()
    (tmp_path / "truth.json").write_text(json.dumps(annotations))
    truth = CocoTruth(str(tmp_path / "truth.json"))
    listing = truth.list_frames()
    rules = LVIS if lvis else Rules()
    parts = [match_frame(ref.order, truth.read(ref), scene.frames[ref.order], rules) for ref in listing.refs]
    measured = average_precision(Matches.merge(parts), listing.categories)
    assert np.array_equal(measured.precision, _measure(scene, rules).precision)
    assert listing.frequencies == (scene.frequencies or {})
    assert listing.refs[0].file_name == ("val2017/5.png" if lvis else "5.png")


_square = partial(square, side=40, size=(80, 120))


def _ap(truth: TrueFrame, frame: Frame, rules: Rules = Rules()):  # noqa: B008
    return average_precision(match_frame(0, truth, frame, rules), [1, 2])


def test_a_perfect_prediction_has_ap_1_and_a_missed_object_halves_the_recall():
    truth = TrueFrame(120, 80, [true_instance(_square(5)), true_instance(_square(70))])
    both = frame_of(instance(_square(5)), instance(_square(70)), size=(80, 120))
    assert _ap(truth, both).mean() == pytest.approx(1)
    assert _ap(truth, frame_of(instance(_square(5)), size=(80, 120))).mean() == pytest.approx(51 / 101)


def test_a_category_without_truths_has_no_number_and_does_not_enter_the_mean():
    truth = TrueFrame(120, 80, [true_instance(_square(5))])
    measured = _ap(truth, frame_of(instance(_square(5)), instance(_square(70), category=2), size=(80, 120)))
    assert math.isnan(measured.mean(categories=[2]))
    assert measured.mean() == pytest.approx(1)


def test_predictions_of_unknown_categories_are_counted():
    truth = TrueFrame(120, 80, [true_instance(_square(5))])
    measured = _ap(truth, frame_of(instance(_square(5)), instance(_square(70), category=9), size=(80, 120)))
    assert measured.unknown == {9: 1}


def test_without_predictions_ap_is_0_and_without_anything_there_is_none():
    assert _ap(TrueFrame(120, 80, [true_instance(_square(5))]), frame_of(size=(80, 120))).mean() == 0
    assert math.isnan(_ap(TrueFrame(120, 80, []), frame_of(size=(80, 120))).mean())


def test_a_prediction_on_a_crowd_is_neither_right_nor_wrong():
    truth = TrueFrame(120, 80, [true_instance(_square(5)), true_instance(_square(60, side=60, top=0), crowd=True)])
    inside = [instance(_square(65 + 3 * i, side=20), score=0.9) for i in range(3)]
    assert _ap(truth, frame_of(*inside, instance(_square(5)), size=(80, 120))).mean() == pytest.approx(1)


def test_boundary_ap_sees_a_ragged_edge_that_mask_ap_does_not():
    ragged = _square(20, side=70, top=5)
    ragged[5:75:2, 20:22] = False
    truth = TrueFrame(120, 80, [true_instance(_square(20, side=70, top=5))])
    frame = frame_of(instance(ragged), size=(80, 120))
    assert _ap(truth, frame).mean() == pytest.approx(1)
    assert _ap(truth, frame, Rules(boundary_ratio=0.01)).mean() < 1


def test_lvis_counts_the_best_300_predictions_of_a_frame_over_all_categories():
    truth = TrueFrame(120, 80, [true_instance(_square(5))], negative_categories=frozenset({2}))
    better = [instance(_square(70), category=2, score=0.9) for _ in range(300)]
    assert _ap(truth, frame_of(*better, instance(_square(5)), size=(80, 120)), LVIS).mean() == 0
    assert _ap(truth, frame_of(*better[1:], instance(_square(5)), size=(80, 120)), LVIS).mean() == pytest.approx(1)


def test_coco_counts_the_best_100_predictions_of_a_category_in_a_frame():
    truth = TrueFrame(120, 80, [true_instance(_square(5))])
    better = [instance(_square(70), score=0.9) for _ in range(100)]
    assert _ap(truth, frame_of(*better, instance(_square(5)), size=(80, 120))).mean() == 0
    assert _ap(truth, frame_of(*better[1:], instance(_square(5)), size=(80, 120))).mean() > 0


def test_lvis_sees_masks_of_any_shape_but_empty_ones():
    odd = _square(5)
    odd[10:20, 5:15] = False
    truth = TrueFrame(120, 80, [true_instance(odd)])
    frame = frame_of(instance(np.zeros_like(odd), score=0.9), instance(odd), size=(80, 120))
    assert _ap(truth, frame, LVIS).mean() == pytest.approx(1)
    assert _ap(truth, frame).mean() < 1


@pytest.mark.parametrize("measure", [partial(match_frame, 0), cityscapes_ap.match_frame, boundary_f_frame, oracle])
def test_predictions_for_another_size_are_one_clear_error_of_every_measure(measure):
    truth = TrueFrame(120, 80, [])
    with pytest.raises(InputError, match=r"^frame.png: predictions for 80 x 120 pixels, expected 120 x 80"):
        measure(truth, frame_of(size=(120, 80)))
    outside = instance(_square(5))
    outside.origin = (100, 10)
    with pytest.raises(InputError, match=r"^frame.png: instance 0 covers .* expected it within 120 x 80"):
        measure(truth, frame_of(outside, size=(80, 120)))
