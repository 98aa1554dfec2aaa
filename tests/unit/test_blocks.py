import shutil
from functools import partial

import pytest

from pipeline.flow.blocks import (
    MOST_FRAMES,
    PATCHES_ON_CPU,
    PATCHES_ON_GPU,
    PATCHES_SENT_TO_GPU,
    UNKNOWN,
    Blocks,
    in_blocks,
    patches_per_block,
    patches_per_frame,
)
from pipeline.flow.plan import Plan, Stages
from pipeline.formats.cityscapes import CityscapesReader
from pipeline.guard import GuardConfig
from pipeline.limits import LimitsConfig
from pipeline.records import FrameRef
from pipeline.stages import Cutting
from tests.dumps import make_dump


def _plan(frames: int, frames_per_block: int | None = None) -> Plan:
    refs = [FrameRef(str(number), "") for number in range(frames)]
    return Plan(None, lambda: None, refs, frames_per_block)


def _size(blocks: Blocks) -> int:
    return len(blocks.frames[0])


@pytest.mark.parametrize(
    ("gpus", "sent", "patches"),
    [(False, False, PATCHES_ON_CPU), (True, False, PATCHES_ON_GPU), (True, True, PATCHES_SENT_TO_GPU)],
)
def test_a_block_has_about_the_patches_that_suit_the_device(gpus, sent, patches):
    blocks = in_blocks(_plan(10_000), 100.0, patches=patches_per_block(gpus, sent))
    assert _size(blocks) == round(patches / 100)
    assert blocks.patches == pytest.approx(patches, rel=0.05)


def test_the_blocks_have_every_frame_once_in_order():
    plan = _plan(1001)
    assert [ref for block in in_blocks(plan, 30.0).frames for ref in block] == plan.refs


def test_frames_with_more_patches_than_a_block_travel_alone():
    assert _size(in_blocks(_plan(1000), 20_000.0)) == 1


def test_frames_without_patches_do_not_make_a_block_of_the_whole_dump():
    assert _size(in_blocks(_plan(100_000), 0.0)) == MOST_FRAMES


def test_a_small_dump_is_cut_so_that_every_process_and_cpu_has_work():
    assert len(in_blocks(_plan(64), 10.0, processes=4).frames) == 16
    assert len(in_blocks(_plan(640), 10.0, cpus=32).frames) == 64
    assert len(in_blocks(_plan(3), 10.0, processes=4).frames) == 3


def test_whoever_says_how_many_frames_gets_them():
    assert [len(block) for block in in_blocks(_plan(7, frames_per_block=3), 5000.0, processes=9).frames] == [3, 3, 1]


def test_a_sample_of_a_dump_tells_its_patches_and_passes_over_broken_frames(tmp_path):
    dump = make_dump(tmp_path / "dump", frames=1)
    predictions, images = dump.root / "cityscapes", dump.root / "images"
    stages = Stages(
        CityscapesReader(str(predictions), str(images)), None, str(images), Cutting(0.55), GuardConfig(), LimitsConfig()
    )
    (ref,) = stages.reader.list_frames()
    expected = stages.extract(ref)[0].patches
    assert expected > 5
    assert patches_per_frame(Plan(stages, partial(int), [ref] * 63)) == UNKNOWN
    assert patches_per_frame(Plan(stages, partial(int), [ref] * 64)) == expected
    broken = FrameRef("broken", "missing.png", ref.source)
    assert patches_per_frame(Plan(stages, partial(int), [broken, *[ref] * 63])) == expected
    shutil.rmtree(images)
    assert patches_per_frame(Plan(stages, partial(int), [ref] * 64)) == UNKNOWN
