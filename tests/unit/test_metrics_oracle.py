import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ground_truth import TrueFrame
from pipeline.metrics.oracle import boundary_band, oracle
from tests.scenes import frame_of, instance, random_scene, square, true_instance, whole


def _plain_band(mask: np.ndarray, reach: float) -> np.ndarray:
    """Pixels with one of the other kind at most so far away, by looking at all pairs."""
    places = np.stack(np.indices(mask.shape), -1).reshape(-1, 2)
    flat = mask.ravel() != 0
    if flat.all() or not flat.any():
        return np.zeros(mask.shape, bool)
    near = np.empty(len(flat), bool)
    for side in (True, False):
        apart = places[flat == side][:, None] - places[flat != side][None]
        near[flat == side] = ((apart**2).sum(-1) <= reach**2).any(axis=1)
    return near.reshape(mask.shape)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_the_band_equals_a_search_over_all_pairs_of_pixels(seed, reach):
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.random((5, 6)) < 0.4, np.ones((5, 5))) != 0
    one = instance(mask)
    if not one.mask.size:
        return
    assert np.array_equal(whole(boundary_band(one, reach, 30, 25), 25, 30), _plain_band(mask, reach))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_only_pixels_in_reach_change_and_they_are_right(seed):
    scene = random_scene(seed, images=1)
    truth, frame = scene.truths[0], scene.frames[0]
    for reach, corrected in zip((1, 3, math.inf), oracle(truth, frame, (1, 3, math.inf))):
        for before, after in zip(frame.instances, corrected.instances):
            old, new = (whole(one, truth.height, truth.width) != 0 for one in (before, after))
            if np.array_equal(old, new):
                continue
            band = np.ones(old.shape, bool)
            if not math.isinf(reach):
                band = whole(boundary_band(before, reach, truth.width, truth.height), truth.height, truth.width) != 0
            targets = [whole(one, truth.height, truth.width) != 0 for one in truth.instances if not one.crowd]
            assert any(np.array_equal(new, np.where(band, target, old)) for target in targets)


def test_squares_that_are_one_pixel_off_become_right_within_one_pixel():
    truth = TrueFrame(100, 60, [true_instance(square(20)), true_instance(square(60))])
    (frame,) = oracle(truth, frame_of(instance(square(21)), instance(square(59)), size=(60, 100)), (1.0,))
    for one, left in zip(frame.instances, (20, 60)):
        assert np.array_equal(whole(one, 60, 100), square(left))


def test_what_matches_no_truth_of_its_class_stays():
    truth = TrueFrame(100, 60, [true_instance(square(20)), true_instance(square(60), 2, crowd=True)])
    frame = frame_of(
        instance(square(38)),
        instance(square(20), 2),
        instance(square(61), 2),
        instance(square(0, 0)),
        size=(60, 100),
    )
    for corrected in oracle(truth, frame):
        assert corrected.instances == frame.instances
