import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ground_truth import TrueFrame
from pipeline.metrics.boundary import boundary_f_score
from pipeline.metrics.boundary_f import BoundaryF, boundary_f_frame
from tests.scenes import frame_of, instance, random_scene, square, true_instance, whole

_square = partial(square, top=20, size=(80, 90))


def _measure(truths, *predictions, **tolerance) -> BoundaryF:
    return boundary_f_frame(TrueFrame(90, 80, truths), frame_of(*predictions, size=(80, 90)), **tolerance)


def test_af_is_the_mean_over_the_objects_of_a_category_and_then_over_categories():
    truths = [true_instance(_square(0), 1), true_instance(_square(50), 1), true_instance(_square(20), 2)]
    predictions = [instance(_square(0), 1), instance(_square(53), 1), instance(_square(22), 2)]
    measured = _measure(truths, *predictions, tolerance_px=1)
    scores = [boundary_f_score(_square(a), _square(b), 1) for a, b in ((0, 0), (50, 53), (20, 22))]
    assert measured.per_category() == pytest.approx({1: (scores[0] + scores[1]) / 2, 2: scores[2]})
    assert measured.mean() == pytest.approx(np.mean(list(measured.per_category().values())))


def test_objects_that_were_not_found_and_crowds_do_not_count():
    truths = [true_instance(_square(0)), true_instance(_square(50)), true_instance(_square(50), 2, crowd=True)]
    measured = _measure(truths, instance(_square(0)), instance(_square(20)), instance(_square(55, side=10), 2))
    assert measured.found == {1: 1}
    assert measured.mean() == 1


def test_without_predictions_there_is_no_number():
    assert math.isnan(_measure([true_instance(_square(0))]).mean())


def test_the_tolerance_is_in_pixels_or_a_share_of_the_diagonal():
    truths, prediction = [true_instance(_square(20))], instance(_square(23))
    assert _measure(truths, prediction).mean() < 0.8
    assert _measure(truths, prediction, tolerance_px=3).mean() == 1
    large = boundary_f_frame(TrueFrame(2048, 1024, truths), frame_of(prediction, size=(1024, 2048)))
    assert large.mean() == 1


def test_the_tolerance_is_3_px_in_an_image_of_cityscapes_unless_given():
    scores = []
    for shift in (3, 4):
        masks = np.zeros((2, 1024, 2048), bool)
        masks[0, 100:200, 100:200] = masks[1, 100:200, 100 + shift : 200 + shift] = True
        truth = TrueFrame(2048, 1024, [true_instance(masks[0])])
        scores.append(boundary_f_frame(truth, frame_of(instance(masks[1]), size=(1024, 2048))).mean())
    assert scores[1] < scores[0] == 1


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_masks_cut_to_boxes_score_as_in_the_whole_frame(seed):
    scene = random_scene(seed, images=1)
    truth, frame = scene.truths[0], scene.frames[0]
    for one in truth.instances:
        one.crowd = False
        held = [p for p in frame.instances if p.category_id == one.category_id]
        alone = boundary_f_frame(TrueFrame(truth.width, truth.height, [one]), frame, tolerance_px=2)
        scores = [
            boundary_f_score(whole(p, truth.height, truth.width), whole(one, truth.height, truth.width), 2)
            for p in held
        ]
        assert not alone.found or any(abs(alone.mean() - score) < 1e-9 for score in scores)


def test_parts_merge_in_any_order_to_the_same_number():
    scene = random_scene(5, images=6)
    parts = [boundary_f_frame(truth, frame) for truth, frame in zip(scene.truths, scene.frames)]
    grouped = [parts[5], BoundaryF.merge([parts[2], parts[0]]), BoundaryF(), BoundaryF.merge(parts[4:2:-1]), parts[1]]
    assert BoundaryF.merge(parts) == BoundaryF.merge(grouped)
