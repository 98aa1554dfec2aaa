"""Run lengths equal pycocotools on any mask, and nothing wrong with them gets past the reader."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pipeline import rle
from pipeline.records import InputError, cut_to_box


@st.composite
def masks(draw):
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mask = np.zeros((height, width), bool)
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    bottom, right = draw(st.integers(top, height)), draw(st.integers(left, width))
    mask[top:bottom, left:right] = rng.random((bottom - top, right - left)) < draw(st.sampled_from([0.1, 0.5, 0.95, 1]))
    return mask


def full(mask, origin, width, height):
    frame = np.zeros((height, width), bool)
    frame[origin[1] : origin[1] + mask.shape[0], origin[0] : origin[0] + mask.shape[1]] = mask
    return frame


@settings(max_examples=300, deadline=None)
@given(masks())
def test_strings_and_masks_equal_pycocotools(mask):
    height, width = mask.shape
    official = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    crop, origin = cut_to_box(mask)
    assert rle.encode(crop, origin, width, height) == official
    decoded, place = rle.decode(official, [height, width], width, height)
    assert place == origin
    assert np.array_equal(decoded, crop)
    assert decoded.flags.c_contiguous


@settings(max_examples=100, deadline=None)
@given(masks())
def test_a_list_of_counts_means_the_same_as_the_string(mask):
    height, width = mask.shape
    column_major = np.concatenate([[0], mask.T.ravel(), [2]])
    edges = np.flatnonzero(np.diff(column_major))
    runs = np.diff(edges, prepend=0).tolist()
    crop, origin = cut_to_box(mask)
    decoded, place = rle.decode(runs, [height, width], width, height)
    assert np.array_equal(full(decoded, place, width, height), mask)
    assert place == origin
    assert decoded.shape == crop.shape


def test_a_box_that_is_larger_than_the_object_encodes_the_same():
    loose = np.zeros((6, 5), bool)
    loose[2:4, 1:3] = True
    tight, origin = cut_to_box(loose)
    assert rle.encode(loose, (3, 4), 20, 30) == rle.encode(tight, (3 + origin[0], 4 + origin[1]), 20, 30)
    assert rle.encode(np.zeros((6, 5), bool), (3, 4), 20, 30) == rle.encode(np.zeros((0, 0), bool), (0, 0), 20, 30)


def test_runs_of_no_pixels_are_read_over():
    decoded, origin = rle.decode([2, 0, 1, 2, 0, 1, 6], [4, 3], 3, 4)
    assert np.array_equal(full(decoded, origin, 3, 4).T.ravel(), [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0])


def test_a_large_frame_has_runs_of_several_groups():
    mask = np.zeros((1024, 2048), bool)
    mask[:, 2000:2001] = True
    crop, origin = cut_to_box(mask)
    counts = rle.encode(crop, origin, 2048, 1024)
    assert counts == coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert rle.decode(counts, [1024, 2048], 2048, 1024)[1] == (2000, 0)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("", "cover 0 pixels"),
        ([], "cover 0 pixels"),
        ([11], "cover 11 pixels, expected 3 x 4 = 12"),
        ([6, 7], "cover 13 pixels"),
        ([14, -2], "below 0"),
        ([2**61, 2**61, 2**61, 2**61], "cover"),
        ([2**70], "list of integers"),
        ([6.0, 6.0], "list of integers"),
        ([True, 11], "list of integers"),
        ([[12]], "list of integers"),
        (None, "string or a list"),
        ({"a": 1}, "string or a list"),
        ("é", "not ASCII"),
        ("5 7", "no run length is written with"),
        ("ooooo", "end within a run length"),
        ("oooooooo0", "no image has"),
        ("0oooooooo0", "no image has"),
        ("oooooo?", "below 0|cover"),
        ("N>", "below 0"),
    ],
)
def test_counts_that_are_no_run_lengths_of_the_frame_are_refused(counts, message):
    with pytest.raises(InputError, match=message):
        rle.decode(counts, [3, 4], 4, 3)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=30))
def test_any_string_is_either_a_mask_or_an_input_error(counts):
    try:
        mask, (left, top) = rle.decode(counts, [7, 5], 5, 7)
    except InputError:
        return
    official = coco_mask.decode({"size": [7, 5], "counts": counts})
    assert np.array_equal(full(mask, (left, top), 5, 7), official)


@pytest.mark.parametrize("size", [None, [4, 3], [3], "34", [3, 4, 1], 12])
def test_a_size_that_is_not_the_frames_is_refused(size):
    with pytest.raises(InputError, match=r"expected \[height, width\] = \[3, 4\]"):
        rle.decode([12], size, 4, 3)


def test_polygons_equal_pycocotools_also_where_they_leave_the_frame():
    polygons = [[2.5, 3.0, 20.2, 4.0, 12.0, 18.7], [-5, -5, 6, -5, 6, 6, -5, 6], [25, 25, 60, 25, 40, 29]]
    merged = coco_mask.merge(coco_mask.frPyObjects(polygons, 32, 30))
    mask, origin = rle.from_polygons(polygons, 30, 32)
    assert np.array_equal(full(mask, origin, 30, 32), coco_mask.decode(merged))


def test_a_polygon_is_as_long_as_its_outline_wherever_it_lies():
    circle = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    points = np.stack([5000 + 30 * np.cos(circle), 40 + 30 * np.sin(circle)], axis=1)
    mask, origin = rle.from_polygons([points.ravel().tolist()], 6000, 80)
    assert origin == (4970, 10)
    assert abs(mask.sum() - np.pi * 30**2) < 60


@pytest.mark.parametrize(
    ("polygons", "message"),
    [
        ([], "expected RLE or a list of polygons"),
        (None, "expected RLE or a list of polygons"),
        ([[1, 2, 3, 4]], "at least 3 points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "at least 3 points"),
        ([1, 2, 3, 4, 5, 6], "at least 3 points"),
        ([[1, 2, 3, 4, 5, "6"]], "numbers up to"),
        ([[1, 2, 3, 4, 5, float("nan")]], "numbers up to"),
        ([[1, 2, 3, 4, 5, 1e9]], "numbers up to"),
        ([[1, 2, 3, 4, 5, 10**400]], "numbers up to"),
        ([[0, 0, 900000, 0] * 2], "outline of more than"),
    ],
)
def test_malformed_polygons_are_refused(polygons, message):
    with pytest.raises(InputError, match=message):
        rle.from_polygons(polygons, 30, 32)
