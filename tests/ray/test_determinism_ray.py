import pytest

from pipeline.run import run as refine_dump
from tests.dumps import make_dump, tree

pytestmark = pytest.mark.slow

WAYS = [
    {"placement": "spread", "workers": 1, "frames_per_block": 1},
    {"placement": "spread", "workers": 2, "frames_per_block": 3},
    {"placement": "fused", "workers": 1, "frames_per_block": 2},
    {"placement": "fused", "workers": 2, "frames_per_block": 1},
    {"local": True, "frames_per_block": 50},
]


@pytest.mark.parametrize("form", ["cityscapes", "coco", "parquet"])
def test_the_bytes_depend_neither_on_placement_nor_workers_nor_blocks(cluster, tmp_path, checkpoint_path, form):
    dump = make_dump(tmp_path / "dump", frames=7)
    trees = []
    for number, way in enumerate(WAYS):
        output = tmp_path / str(number)
        summary = refine_dump(dump.config(form, output, checkpoint_path, **way), log=lambda _: None)
        assert summary.refined > 5
        trees.append(tree(output))
    assert all(found == trees[0] for found in trees[1:])


def test_with_openvino_the_bytes_do_not_depend_on_the_size_of_the_networks_batches(tmp_path, checkpoint_path):
    pytest.importorskip("openvino")
    dump = make_dump(tmp_path / "dump", frames=4)
    trees = []
    for size in (1, 5, 16):
        config = dump.config("parquet", tmp_path / str(size), checkpoint_path, local=True, batch_size=size)
        refine_dump(config, log=lambda _: None)
        trees.append(tree(tmp_path / str(size)))
    assert trees[0] == trees[1] == trees[2]


def test_a_dump_refined_in_three_runs_of_other_placements_has_the_bytes_of_one(cluster, tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump", frames=7)
    refine_dump(dump.config("coco", tmp_path / "whole", checkpoint_path, local=True), log=lambda _: None)
    for limit, way in zip((2, 5, None), WAYS[1:4]):
        refine_dump(dump.config("coco", tmp_path / "out", checkpoint_path, limit=limit, **way), log=lambda _: None)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
