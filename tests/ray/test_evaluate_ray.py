import pytest

from pipeline.evaluation import EvaluateConfig, evaluate
from pipeline.evaluation_results import results
from tests.truths import make_truth, predict

pytestmark = pytest.mark.slow


def test_a_cluster_and_one_process_find_the_same_numbers(cluster, tmp_path):
    truth = make_truth(tmp_path / "data", frames=9)
    settings = {
        "images": str(truth.parent / "images"),
        "ground_truth": str(truth),
        "coarse": str(predict(truth)),
        "oracle": True,
        "frames_per_block": 2,
    }
    one, many = (
        results(evaluate(EvaluateConfig(local=local, **settings), log=lambda _: None)) for local in (True, False)
    )
    assert one.as_json() | {"wall_s": 0} == many.as_json() | {"wall_s": 0}
    assert one.overall["all right"]["AP"] == 1.0
