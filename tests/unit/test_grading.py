import pytest

from pipeline.grading import MEASURES, grade, table
from pipeline.records import InputError
from tests.truths import make_truth, true_mask


@pytest.fixture
def truth(tmp_path):
    return make_truth(tmp_path / "data", frames=3)


def _grade(truth, refine, kinds=("grow", "wobble"), **settings):
    return list(grade(str(truth), str(truth.parent / "images"), refine, kinds, **settings))


def test_a_refiner_that_does_nothing_leaves_every_score(truth):
    grades = _grade(truth, lambda image, masks: masks)
    assert len(grades) == 6
    assert all(one.coarse == one.refined and not one.worse for one in grades)
    assert all(0.5 < one.coarse[0] < 1 for one in grades)


def test_a_perfect_refiner_scores_one_everywhere(truth):
    by_size = {true_mask(truth, i + 1).sum(): true_mask(truth, i + 1) for i in range(3)}

    def perfect(image, masks):
        bright = (image[..., 0] >= 140).astype(masks.dtype)
        best = min(by_size.values(), key=lambda mask: (mask != bright).sum())
        return best[None]

    grades = _grade(truth, perfect)
    assert all(one.refined == (1.0,) * len(MEASURES) for one in grades)
    assert "1.0000" in table(grades).splitlines()[-1]


def test_a_refiner_that_destroys_masks_is_seen_in_the_share_of_worse_objects(truth):
    grades = _grade(truth, lambda image, masks: masks * 0)
    assert all(one.worse for one in grades)
    assert table(grades).splitlines()[-1].endswith("100.0%")


def test_coarse_masks_depend_on_seed_object_and_kind_alone(truth):
    def keep(image, masks):
        return masks

    assert _grade(truth, keep) == _grade(truth, keep)
    assert _grade(truth, keep, kinds=("wobble",)) == [one for one in _grade(truth, keep) if one.kind == "wobble"]
    assert _grade(truth, keep) != _grade(truth, keep, seed=1)


def test_an_unknown_kind_and_a_truth_without_objects_are_refused(truth, tmp_path):
    with pytest.raises(InputError, match="kind 'burn'"):
        _grade(truth, lambda image, masks: masks, kinds=("burn",))
    empty = make_truth(tmp_path / "empty", frames=0)
    with pytest.raises(InputError, match="no object"):
        _grade(empty, lambda image, masks: masks)
