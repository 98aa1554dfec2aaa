import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import dump as forms
from pipeline import flow, stages
from pipeline.flow import on_ray
from pipeline.flow.session import alive_nodes, network_pool, ray_session
from pipeline.formats.cityscapes import CityscapesReader
from pipeline.guard import GuardConfig
from pipeline.ledger import Ledger
from pipeline.records import InputError
from pipeline.run import run as refine_dump
from tests.dumps import make_dump, tree

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class FewTravelReader(CityscapesReader):
    """Lets the patches of a frame travel only where they are few, in whatever process it reads."""

    def read(self, ref, width, height) -> Iterator:
        stages.IN_PIECES = 8
        yield from super().read(ref, width, height)


@pytest.mark.parametrize("form", ["cityscapes", "coco", "parquet"])
def test_a_cluster_and_one_process_write_the_same_bytes(cluster, tmp_path, checkpoint_path, form):
    dump = make_dump(tmp_path / "dump", frames=7)
    one = refine_dump(dump.config(form, tmp_path / "local", checkpoint_path, local=True), log=lambda _: None)
    many = refine_dump(dump.config(form, tmp_path / "ray", checkpoint_path), log=lambda _: None)
    # A COCO results json does not mention frames without an entry.
    expected = sum(bool(masks) for masks in dump.masks) if form == "coco" else 7
    assert one.frames == many.frames == expected
    assert one.patches == many.patches > 20
    assert one.refined == many.refined > 5
    local = tree(tmp_path / "local")
    assert len(local) >= (1 if form != "cityscapes" else 14)
    assert local == tree(tmp_path / "ray")


def test_on_a_cluster_a_bad_frame_is_set_aside_and_the_others_are_refined(cluster, tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump")
    (dump.root / "images" / "frame_003.png").write_bytes(b"not an image")
    config = dump.config("cityscapes", tmp_path / "out", checkpoint_path)
    summary = refine_dump(config, log=lambda _: None)
    assert summary.frames == 4
    assert list(summary.quarantined) == ["frame_003"]
    assert "frame_003.png: expected an image" in summary.quarantined["frame_003"]
    assert not (tmp_path / "out" / "frame_003_pred.txt").exists()
    ledger = Ledger(str(tmp_path / "out"))
    assert Path(ledger.root, "quarantine.csv").read_text().startswith("frame_id,error\nframe_003,")


def refuse(*_):
    raise InputError("precision is 'fp16', in which this CPU cannot calculate: expected fp32")


@pytest.mark.parametrize("placement", ["fused", "spread"])
def test_what_an_actor_cannot_do_at_all_is_one_line(cluster, tmp_path, checkpoint_path, monkeypatch, capfd, placement):
    monkeypatch.setattr(flow, "load_refiner", refuse)
    dump = make_dump(tmp_path / "dump", frames=2)
    config = dump.config("coco", tmp_path / "out", checkpoint_path, placement=placement)
    with pytest.raises(InputError) as caught:
        refine_dump(config, log=lambda _: None)
    assert type(caught.value) is InputError
    assert str(caught.value) == "precision is 'fp16', in which this CPU cannot calculate: expected fp32"
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_that_failed_takes_no_cpu_from_the_next_of_its_process(cluster, tmp_path, checkpoint_path, monkeypatch):
    import ray

    monkeypatch.setattr(flow, "load_refiner", refuse)
    config = make_dump(tmp_path / "dump", frames=2).config("coco", tmp_path / "out", checkpoint_path)
    gc.disable()
    try:
        with pytest.raises(InputError):
            refine_dump(config, log=lambda _: None)
        with ray_session():
            deadline = time.monotonic() + 30
            while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
                assert time.monotonic() < deadline, ray.available_resources()
                time.sleep(0.1)
    finally:
        gc.enable()


def test_a_run_started_again_on_a_cluster_does_only_what_is_missing(cluster, tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump")
    first = refine_dump(dump.config("parquet", tmp_path / "out", checkpoint_path, limit=3), log=lambda _: None)
    second = refine_dump(dump.config("parquet", tmp_path / "out", checkpoint_path), log=lambda _: None)
    refine_dump(dump.config("parquet", tmp_path / "whole", checkpoint_path, local=True), log=lambda _: None)
    assert (first.frames, first.done_before) == (3, 0)
    assert (second.frames, second.done_before) == (2, 3)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_on_a_cluster_a_block_stays_whole_through_every_stage(cluster, tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump", frames=7)
    config = dump.config("cityscapes", tmp_path / "out", checkpoint_path, placement="spread", frames_per_block=2)
    refine_dump(config, log=lambda _: None)
    (record,) = (tmp_path / "out" / "_ledger" / "runs").iterdir()
    place = json.loads(record.read_text())["place"]
    assert place["frames_per_block"] == 2
    stages = re.findall(r"Operator \d+ (.*): (\d+) tasks executed, (\d+) blocks", place["ray_data_stats"])
    assert [counts for _, *counts in stages] == [["4", "4"]] * 3, stages


def test_patches_of_any_size_and_frames_in_pieces_come_through_a_spread_run(
    cluster, tmp_path, checkpoint_path, monkeypatch
):
    dump = make_dump(tmp_path / "dump", frames=7)
    settings = {"patch_size": 32, "padding": 3, "frames_per_block": 3}
    refine_dump(dump.config("cityscapes", tmp_path / "local", checkpoint_path, local=True, **settings), print)
    monkeypatch.setattr(stages, "IN_PIECES", stages.IN_PIECES)  # to be put back
    monkeypatch.setattr(forms, "reader", lambda predictions, images, *_: FewTravelReader(predictions, images))
    config = dump.config("cityscapes", tmp_path / "out", checkpoint_path, placement="spread", **settings)
    summary = refine_dump(config, print)
    assert (summary.frames, summary.refined > 5) == (7, True)
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


@pytest.mark.slow
def test_a_fused_actor_does_not_stand_still_until_the_driver_has_taken_up_what_is_finished(
    cluster, tmp_path, checkpoint_path, monkeypatch
):
    import ray

    looks, wait = [], ray.wait

    def seldom(*given, **named):
        # Only in between does it matter.
        time.sleep(1 if 0 < len([*(tmp_path / "out").rglob("*_pred.txt")]) < 16 else 0)
        looks.append(time.time())
        return wait(*given, **named)

    monkeypatch.setattr(ray, "wait", seldom)
    dump = make_dump(tmp_path / "dump", frames=16)
    # Passed over by the guard, so that the network takes no time.
    flags = {"placement": "fused", "frames_per_block": 1, "guard": GuardConfig(min_area=10**6)}
    config = dump.config("cityscapes", tmp_path / "out", checkpoint_path, **flags)
    assert refine_dump(config, log=lambda _: None).frames == 16
    written = [path.stat().st_mtime for path in (tmp_path / "out").rglob("*_pred.txt")]
    assert len(written) == 16
    assert sum(min(written) < look < max(written) for look in looks) <= 4


@pytest.fixture
def occupied(cluster):
    """Lets something else reserve all CPUs of the cluster but so many."""
    import ray

    class Other:
        def here(self):
            return True

    others = []

    def leave(cpus):
        reserved = round(ray.cluster_resources()["CPU"] - cpus, 2)
        others.append(ray.remote(Other).options(num_cpus=reserved).remote())
        assert ray.get(others[-1].here.remote())

    yield leave
    for other in others:
        ray.kill(other)


def test_a_fused_run_goes_on_beside_others_that_have_left_no_cpu_but_for_its_network(
    occupied, tmp_path, checkpoint_path, monkeypatch
):
    nodes = [node["Resources"] for node in alive_nodes()]
    occupied(network_pool(nodes, flow.Placement()).resources["num_cpus"] + 0.05)
    monkeypatch.setattr(on_ray, "standstill_s", lambda *_: 20)
    config = make_dump(tmp_path / "dump", frames=3).config(
        "cityscapes", tmp_path / "out", checkpoint_path, placement="fused"
    )
    assert refine_dump(config, log=lambda _: None).frames == 3


def test_a_run_for_which_others_leave_no_room_says_so(occupied, tmp_path, checkpoint_path, monkeypatch):
    occupied(0.5)
    monkeypatch.setattr(on_ray, "standstill_s", lambda *_: 5)
    config = make_dump(tmp_path / "dump", frames=3).config(
        "cityscapes", tmp_path / "out", checkpoint_path, placement="fused"
    )
    with pytest.raises(InputError, match=r"no progress .*: the machines may have no room beside other work, see `ray"):
        refine_dump(config, log=lambda _: None)


def test_a_run_that_starts_ray_needs_no_home(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump", frames=2).root
    (tmp_path / "file").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    given = {"predictions": dump / "cityscapes", "images": dump / "images", "checkpoint": checkpoint_path}
    done = subprocess.run(
        [
            *(sys.executable, str(Path(__file__).parents[2] / "jobs" / "refine.py"), f"--output={tmp_path / 'out'}"),
            *(f"--{name}={path}" for name, path in given.items()),
        ],
        env={**environment, "HOME": str(tmp_path / "file" / "home")},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "2 refined now" in done.stdout


LEFT_EARLY = """
import time
from pipeline.flow.on_ray import map_blocks
from ray.data._internal.execution.streaming_executor import StreamingExecutor

step = StreamingExecutor._scheduling_loop_step

def late(self, topology):
    time.sleep(3)
    return step(self, topology)

results = map_blocks([[number] for number in range(9)], sum, local=False)
next(results)
StreamingExecutor._scheduling_loop_step = late
time.sleep(0.2)
results.close()
print("left")
"""


def test_a_run_left_early_outlives_its_ray_however_slowly_that_ends():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LEFT_EARLY], cwd=root, env=environment, capture_output=True, text=True, timeout=180
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr
