from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.augment import Augmentation
from pipeline import patch_dataset
from pipeline.patch_dataset import PATCH_SCHEMA, PatchBatches, PatchDataset, pack, unpack, write_shards
from pipeline.records import InputError
from tests.conftest import random_patches

PLAIN = Augmentation(flip=False, distort=False)


def _patches(count, seed=0, side=32):
    return np.concatenate([random_patches(count, side, seed), random_patches(count, side, seed + 1)[..., 3:]], axis=-1)


def _keys(count, split="train"):
    key = {"frame_id": "f", "instance_id": "i", "category_id": 1, "box": [0, 0, 1, 1], "iou": 0.9, "visit": 0}
    return [key | {"origin": "prediction", "split": split} for _ in range(count)]


@pytest.fixture
def dataset(tmp_path):
    """200 patches in 10 shards, whose first image pixel numbers them."""
    patches = _patches(200)
    patches[:, 0, 0, 0] = np.arange(200)
    for i in range(10):
        part = slice(20 * i, 20 * i + 20)
        write_shards(str(tmp_path / "data"), {"train": pack(patches[part], _keys(20))}, f"{i:02d}")
    return PatchDataset([str(tmp_path / "data")], "train"), patches


def test_patches_come_back_as_they_were_written():
    patches = _patches(5)
    assert np.array_equal(unpack(pack(patches, _keys(5))), patches)


def test_a_split_is_read_in_order_and_shared_between_processes(dataset):
    data, patches = dataset
    assert (data.rows, data.side_px) == (200, 32)
    assert np.array_equal(np.concatenate(list(data.iterate(64))), patches)
    shares = [np.concatenate(list(data.iterate(64, rank, 3)))[:, 0, 0, 0] for rank in range(3)]
    assert sorted(np.concatenate(shares)) == list(range(200))
    assert len(np.concatenate(list(data.iterate(8, limit=30)))) == 30


def test_patches_that_were_cut_again_give_another_fingerprint(dataset):
    data, patches = dataset
    again = PatchDataset(data.urls, "train")
    assert again.fingerprint == data.fingerprint
    # As many under the same name.
    write_shards(data.urls[0], {"train": pack(patches[20:40] // 2, _keys(20))}, "01")
    assert PatchDataset(data.urls, "train").fingerprint != data.fingerprint


def test_a_corrected_target_gives_another_fingerprint_though_no_file_has_another_size(dataset):
    data, patches = dataset
    corrected = patches[20:40].copy()
    corrected[3, 5, 7, 4] ^= 1
    write_shards(data.urls[0], {"train": pack(corrected, _keys(20))}, "01")
    assert PatchDataset(data.urls, "train").fingerprint != data.fingerprint


def test_an_epoch_shows_every_patch_once_and_each_epoch_in_another_order(dataset, monkeypatch):
    monkeypatch.setattr(patch_dataset, "WINDOW_ROWS", 60)
    batches = PatchBatches(dataset[0], 8, 0, PLAIN, 32)
    assert len(batches) == 25
    epochs = [[n for step in range(25) for n in batches[25 * epoch + step][:, 0, 0, 0]] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(200))
    assert epochs[0] != epochs[1]
    # The patches of several shards, 20 in each, are mixed.
    assert len({number // 20 for number in epochs[0][:20]}) > 1


def test_any_step_can_be_asked_for_out_of_order(dataset):
    first, second = (PatchBatches(dataset[0], 8, 3, Augmentation(), 24) for _ in range(2))
    in_order = [first[step] for step in range(40)]
    for step in (39, 7, 30):
        assert np.array_equal(second[step], in_order[step])
    assert in_order[0].shape == (8, 24, 24, 5)


def test_processes_see_different_patches(dataset):
    shares = [PatchBatches(dataset[0], 8, 0, PLAIN, 32, rank, 2) for rank in range(2)]
    assert shares[0].steps_per_epoch == shares[1].steps_per_epoch == 12
    seen = [{n for step in range(12) for n in share[step][:, 0, 0, 0]} for share in shares]
    assert not seen[0] & seen[1]


def test_a_world_that_the_data_cannot_feed_is_refused(dataset):
    with pytest.raises(InputError, match="200 patches in 10 shards cannot feed 11 processes"):
        PatchBatches(dataset[0], 8, 0, PLAIN, 32, 0, 11)
    with pytest.raises(InputError, match="patches of 32 px, expected at least 64"):
        PatchBatches(dataset[0], 8, 0, PLAIN, 64)


def test_an_empty_folder_and_a_missing_split_are_refused(dataset, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no train patch"):
        PatchDataset([str(tmp_path / "empty")], "train")
    with pytest.raises(InputError, match="no val patch"):
        PatchDataset(dataset[0].urls, "val")
    with pytest.raises(InputError, match="expected a folder"):
        PatchDataset([str(tmp_path / "nowhere")], "train")


@pytest.mark.parametrize("content", [b"rubbish", None])
def test_a_shard_of_another_form_is_named(tmp_path, content):
    shard = tmp_path / "train" / "a-000.parquet"
    shard.parent.mkdir()
    if content is None:
        pq.write_table(pa.table({"image": [b""]}), shard)
    else:
        shard.write_bytes(content)
    with pytest.raises(InputError, match=r"a-000\.parquet: "):
        PatchDataset([str(tmp_path)], "train")


def test_patches_of_different_sides_are_refused(dataset, tmp_path):
    write_shards(str(tmp_path / "other"), {"train": pack(_patches(4, side=64), _keys(4))}, "x")
    with pytest.raises(InputError, match="different sides"):
        PatchDataset([*dataset[0].urls, str(tmp_path / "other")], "train")


def _shard(tmp_path, count=3, **columns):
    """A data set of one shard in which some columns, given as their values, have been replaced."""
    table = pack(_patches(count), _keys(count))
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, PATCH_SCHEMA.field(name), pa.array(values, PATCH_SCHEMA.field(name).type))
    (tmp_path / "train").mkdir()
    pq.write_table(table, tmp_path / "train" / "a-000.parquet")
    return str(tmp_path)


@pytest.mark.parametrize("side", [-64, 0, None, 10**6])
def test_a_shard_of_patches_without_a_side_is_named(tmp_path, side):
    with pytest.raises(InputError, match=rf"a-000\.parquet: patches of sides \[{side}\], expected one side"):
        PatchDataset([_shard(tmp_path, side=[side] * 3)], "train")


SMALLER = pack(_patches(1, side=16), _keys(1))["image"][0].as_py()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [None, b"", b""]}, r"a-000\.parquet: expected image, coarse, target and one side in all rows"),
        ({"target": [None] * 3}, r"a-000\.parquet: expected image, coarse, target and one side in all rows"),
        ({"target": [b"1" * 128, b"1" * 128, b"1" * 127]}, r"a-000\.parquet: expected 32 x 32 bits as target"),
        ({"coarse": [b"1" * 129] * 3}, r"a-000\.parquet: expected 32 x 32 bits as coarse"),
        ({"image": [b""] * 3}, "patch of i in f: expected a PNG of 32 x 32 pixels"),
        ({"image": [b"rubbish"] * 3}, "patch of i in f: expected a PNG of 32 x 32 pixels"),
        ({"image": [SMALLER] * 3}, "patch of i in f: expected a PNG of 32 x 32 pixels"),
    ],
)
def test_rows_that_are_no_patches_are_named(tmp_path, columns, message):
    data = PatchDataset([_shard(tmp_path, **columns)], "train")
    with pytest.raises(InputError, match=message):
        data.take(np.arange(3))


def test_a_shard_that_was_damaged_after_it_was_opened_is_named(dataset):
    data, _ = dataset
    Path(data.shards[0].url).write_bytes(b"rubbish")
    with pytest.raises(InputError, match=r"00-000\.parquet: cannot be read"):
        data.take(np.arange(3))


def test_a_folder_above_the_data_set_is_refused_with_what_was_expected(dataset, tmp_path):
    with pytest.raises(InputError, match=r"data/train/00-000\.parquet: expected shards below train/ and val/"):
        PatchDataset([str(tmp_path)], "train")


def test_shards_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(patch_dataset, "SHARD_ROWS", 6)
    write_shards(str(tmp_path), {"val": pack(_patches(14), _keys(14, "val"))}, "x")
    sizes = [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "val").iterdir())]
    assert sizes == [6, 6, 2]
