from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.preparation import prepare
from pipeline.training_patches import PrepareConfig
from tests.truths import make_truth, predict

pytestmark = pytest.mark.slow


def _shards(output: Path) -> dict[str, list[dict]]:
    return {
        str(path.relative_to(output)): pq.read_table(path).to_pylist() for path in sorted(output.glob("*/*.parquet"))
    }


def test_a_cluster_and_one_process_cut_the_same_shards(cluster, tmp_path):
    truth = make_truth(tmp_path / "data", frames=7)
    (truth.parent / "images" / "frame5.png").write_bytes(b"rubbish")
    settings = {
        "ground_truth": str(truth),
        "images": str(truth.parent / "images"),
        "predictions": str(predict(truth)),
        "coarsened": 0.5,
        "composite": 0.5,
        "max_instances": 5,
        "frames_per_block": 2,
        "val_share": 0.3,
    }
    one, many = (
        prepare(PrepareConfig(output=str(tmp_path / name), local=local, **settings), log=lambda _: None)
        for name, local in (("one", True), ("many", False))
    )
    assert _shards(tmp_path / "one") == _shards(tmp_path / "many")
    assert one.card["patches"] == many.card["patches"]
    # One of the five objects drawn is in the image that cannot be read.
    assert one.card["instances"] == many.card["instances"] == 4
    assert list(many.aside) == ["frame5"]
