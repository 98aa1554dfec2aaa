import json
import os
import signal
import time
from contextlib import nullcontext
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from model.backend import UnsupportedError
from model.checkpoint import CheckpointError
from pipeline import flow
from pipeline.config import RefineConfig
from pipeline.flow import Plan, Stages, in_workers, load_refiner, on_ray, session
from pipeline.flow.on_ray import blocks_at_once
from pipeline.flow.session import Placement, Pool, labelled, network_pool, placed, selected_by
from pipeline.formats.cityscapes import CityscapesReader
from pipeline.guard import GuardConfig
from pipeline.limits import LimitsConfig
from pipeline.records import InputError
from pipeline.run import run as refine_dump
from pipeline.stages import Cutting
from pipeline.work import Work
from tests.dumps import make_dump, tree
from tests.poison import Blur


def _run(config: RefineConfig):
    return refine_dump(config, log=lambda _: None)


@pytest.mark.parametrize("form", ["cityscapes", "coco", "parquet"])
def test_a_run_started_again_changes_nothing_and_does_nothing(tmp_path, checkpoint_path, form, monkeypatch):
    dump = make_dump(tmp_path / "dump")
    config = dump.config(form, tmp_path / "out", checkpoint_path, local=True)
    first = _run(config)
    before = tree(tmp_path / "out")
    monkeypatch.setattr(flow, "run_local", lambda plan: pytest.fail("nothing is left to do"))
    again = _run(config)
    assert again.frames == 0
    assert again.done_before == first.frames > 0
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("form", ["cityscapes", "coco", "parquet"])
def test_a_run_that_died_between_blocks_is_completed_to_the_same_bytes(tmp_path, checkpoint_path, form, monkeypatch):
    dump = make_dump(tmp_path / "dump")
    _run(dump.config(form, tmp_path / "whole", checkpoint_path, local=True))
    config = dump.config(form, tmp_path / "out", checkpoint_path, local=True)
    original = flow.run_local

    def dies_after_two(plan):
        for number, receipts in enumerate(original(plan)):
            if number == 1:
                raise KeyboardInterrupt
            yield receipts

    monkeypatch.setattr(flow, "run_local", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        _run(config)
    monkeypatch.setattr(flow, "run_local", original)
    second = _run(config)
    assert second.done_before == 2
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_the_bytes_do_not_depend_on_how_frames_are_grouped(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump", frames=7)
    for size in (1, 3, 50):
        _run(dump.config("cityscapes", tmp_path / str(size), checkpoint_path, local=True, frames_per_block=size))
    assert tree(tmp_path / "1") == tree(tmp_path / "3") == tree(tmp_path / "50")


def test_every_form_leads_to_the_same_refined_masks(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump")
    for form in ("cityscapes", "coco", "parquet"):
        config = dump.config(
            form, tmp_path / form, checkpoint_path, local=True, output_format="cityscapes", nms_threshold=0.25
        )
        _run(config)
    changed = 0
    for i, masks in enumerate(dump.masks):
        for k, coarse in enumerate(masks):
            names = (
                f"cityscapes/frame_{i:03d}_{k}.png",
                f"coco/frame_{i:03d}_{k:03d}.png",
                f"parquet/frame_{i:03d}_{k:03d}.png",
            )
            first, *others = (cv2.imread(str(tmp_path / name), cv2.IMREAD_UNCHANGED) for name in names)
            assert set(np.unique(first)) <= {0, 255}
            assert all(np.array_equal(first, other) for other in others)
            assert first.any() or not coarse.any()
            changed += not np.array_equal(first > 0, coarse > 0)
    assert changed > 3


def test_empty_masks_come_back_unchanged(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump")
    assert not dump.masks[1][0].any()
    _run(dump.config("cityscapes", tmp_path / "out", checkpoint_path, local=True))
    assert not cv2.imread(str(tmp_path / "out" / "frame_001_0.png"), cv2.IMREAD_UNCHANGED).any()


def test_other_settings_on_the_same_output_are_refused_by_name(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump", frames=2)
    _run(dump.config("coco", tmp_path / "out", checkpoint_path, local=True))
    with pytest.raises(InputError, match=r"made with nms_threshold = 0\.25, not 0\.5"):
        _run(dump.config("coco", tmp_path / "out", checkpoint_path, local=True, nms_threshold=0.5))


def test_another_threshold_of_the_guard_is_another_run_unless_it_is_off(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump", frames=1)

    def again(output, **settings):
        _run(dump.config("coco", tmp_path / output, checkpoint_path, local=True, **settings))

    again("on", guard=GuardConfig())
    with pytest.raises(InputError, match=r"made with guard\.min_iou = 0\.3, not 0\.4"):
        again("on", guard=GuardConfig(min_iou=0.4))
    with pytest.raises(InputError, match=r"made with guard\.enabled = True, not False"):
        again("on", guard=GuardConfig(enabled=False))
    again("off", guard=GuardConfig(enabled=False))
    again("off", guard=GuardConfig(enabled=False, min_iou=0.4))


def test_parity_switches_the_guard_and_half_precision_off(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump", frames=1)
    strict = GuardConfig(min_confidence=1.0)
    guarded = _run(dump.config("parquet", tmp_path / "guarded", checkpoint_path, local=True, guard=strict))
    assert guarded.reasons
    assert guarded.refined == 0
    parity = _run(dump.config("parquet", tmp_path / "parity", checkpoint_path, local=True, guard=strict, parity=True))
    assert parity.reasons == {}
    assert parity.refined == parity.instances == 3
    (record,) = (tmp_path / "parity").glob("_ledger/runs/*.json")
    assert [made.split()[-1] for made in json.loads(record.read_text())["arithmetic"]] == ["fp32"]


def test_a_precision_that_the_machine_lacks_is_one_clear_error(tmp_path, checkpoint_path, monkeypatch):
    def refuse(*_, precision, **__):
        raise UnsupportedError(f"precision is '{precision}', in which this CPU cannot calculate: expected fp32")

    monkeypatch.setattr("model.Refiner", refuse)
    dump = make_dump(tmp_path / "dump", frames=1)
    with pytest.raises(InputError, match="'fp16', in which this CPU cannot calculate: expected fp32"):
        _run(dump.config("coco", tmp_path / "out", checkpoint_path, local=True, precision="fp16"))


def test_frames_with_faults_are_set_aside_each_with_its_reason_and_tried_again_when_mended(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump", frames=6)
    good = (dump.root / "images" / "frame_000.png").read_bytes()
    (dump.root / "images" / "frame_000.png").unlink()
    (dump.root / "cityscapes" / "frame_002_0.png").write_bytes(b"rubbish")
    (dump.root / "cityscapes" / "frame_004_pred.txt").write_text("frame_004_0.png 24\n")
    (dump.root / "cityscapes" / "frame_005_pred.txt").write_text("../x.png 24 0.5\n")
    config = dump.config("cityscapes", tmp_path / "out", checkpoint_path, local=True)
    summary = _run(config)
    assert summary.frames == 2
    reasons = summary.quarantined
    assert set(reasons) == {"frame_000", "frame_002", "frame_004", "frame_005"}
    assert "frame_000" in reasons["frame_000"]
    assert "frame_002_0.png" in reasons["frame_002"]
    assert "frame_004_pred.txt:1: expected" in reasons["frame_004"]
    assert "../x.png" in reasons["frame_005"]
    assert all("\n" not in reason for reason in reasons.values())
    (dump.root / "images" / "frame_000.png").write_bytes(good)
    mended = _run(config)
    assert (mended.frames, mended.done_before) == (1, 2)
    assert set(mended.quarantined) == {"frame_002", "frame_004", "frame_005"}
    assert (tmp_path / "out" / "frame_000_pred.txt").exists()


def test_an_rle_of_another_size_and_an_unknown_category_are_set_aside(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump")
    results = json.loads((dump.root / "results.json").read_text())
    results[0]["segmentation"]["size"] = [7, 7]
    results[-1]["category_id"] = 99
    (dump.root / "results.json").write_text(json.dumps(results))
    summary = _run(dump.config("coco", tmp_path / "out", checkpoint_path, local=True))
    assert len(summary.quarantined) == 2
    first, last = (summary.quarantined[str(entry["image_id"])] for entry in (results[0], results[-1]))
    assert "results.json" in first
    assert "99" in last
    refined = json.loads((tmp_path / "out" / "refined.json").read_text())
    aside = {results[0]["image_id"], results[-1]["image_id"]}
    assert [e["image_id"] for e in refined] == [e["image_id"] for e in results if e["image_id"] not in aside]


def test_frames_that_the_listing_rejects_start_no_cluster(tmp_path, checkpoint_path, monkeypatch):
    dump = make_dump(tmp_path / "dump", frames=2)
    for path in (dump.root / "images").iterdir():
        path.unlink()
    monkeypatch.setattr(flow, "run_ray", lambda *_: pytest.fail("no frame can be refined"))
    summary = _run(dump.config("cityscapes", tmp_path / "out", checkpoint_path))
    assert summary.frames == 0
    assert set(summary.quarantined) == {"frame_000", "frame_001"}


def test_two_frames_of_one_image_never_overwrite_each_other(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump", frames=2)
    listing = json.loads((dump.root / "images.json").read_text())
    listing["images"][1]["file_name"] = listing["images"][0]["file_name"]
    (dump.root / "images.json").write_text(json.dumps(listing))
    config = dump.config("coco", tmp_path / "out", checkpoint_path, local=True, output_format="cityscapes")
    summary = _run(config)
    assert summary.frames == 1
    assert "expected one frame per image in a Cityscapes folder, frame 10 has it as well" in summary.quarantined["11"]


def test_a_wrong_checkpoint_is_found_before_a_cluster_starts(tmp_path, monkeypatch):
    dump = make_dump(tmp_path / "dump", frames=1)
    (tmp_path / "w.pth").write_bytes(b"rubbish")
    monkeypatch.setattr(flow, "run_ray", lambda *_: pytest.fail("the checkpoint is wrong"))
    with pytest.raises(CheckpointError, match=r"w\.pth: not a torch checkpoint"):
        _run(dump.config("coco", tmp_path / "out", tmp_path / "w.pth"))


def test_an_unwritable_output_is_one_clear_line(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump", frames=1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file/out/_ledger: cannot write the output there"):
        _run(dump.config("parquet", tmp_path / "file" / "out", checkpoint_path, local=True))


def test_a_dump_without_frames_is_an_error_that_names_it(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump", frames=1)
    (dump.root / "results.json").write_text("[]")
    with pytest.raises(InputError, match=r"results\.json: no frame found"):
        _run(dump.config("coco", tmp_path / "out", checkpoint_path, local=True))


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([{"CPU": 2.0}], None, Pool(1, {"num_cpus": 0.99}, 2, 1)),
        ([{"CPU": 1.0}], None, Pool(1, {"num_cpus": 0}, 1, 1)),
        ([{"CPU": 16.0}] * 4, None, Pool(4, {"num_cpus": 11.99}, 16, 4)),
        ([{"CPU": 16.0}] * 4, 1, Pool(1, {"num_cpus": 11.99}, 16, 4)),
        ([{"CPU": 16.0}, {"CPU": 4.0}, {"CPU": 4.0}], 6, Pool(6, {"num_cpus": 2.99}, 4, 1)),
        ([{"CPU": 16.0, "GPU": 2.0}], None, Pool(2, {"num_gpus": 1.0, "num_cpus": 0}, 1, 8)),
        ([{"CPU": 16.0, "GPU": 2.0}], 1, Pool(1, {"num_gpus": 1.0, "num_cpus": 0}, 1, 8)),
        ([], 3, Pool(3, {"num_cpus": 0.99}, 1, 1)),
    ],
)
def test_network_processes_fit_the_machines_and_leave_cpus_for_the_other_stages(nodes, workers, expected):
    assert network_pool(nodes, Placement(workers=workers)) == expected


def test_gpus_that_an_autoscaler_will_start_are_waited_for_in_a_known_number():
    nothing_up = [{"CPU": 1.0}]
    expected = Pool(4, {"num_gpus": 1.0, "num_cpus": 0}, 1, 1)
    assert network_pool(nothing_up, Placement(device="gpu", workers=4)) == expected
    with pytest.raises(InputError, match="expected --workers to say how many may come"):
        network_pool(nothing_up, Placement(device="gpu"))


def test_machines_that_an_autoscaler_will_start_are_waited_for_in_a_known_number():
    with pytest.raises(InputError, match="no machine is up: expected --workers to say how many may come"):
        network_pool([], Placement())


@pytest.mark.parametrize(
    ("gpus", "share", "expected"),
    [([1] * 8, 0.6, 8), ([2], 0.4, 4), ([2], 0.25, 8), ([1, 3], 2, 1), ([2, 5], 2, 3), ([4, 4], 1, 8), ([1], 1 / 3, 3)],
)
def test_processes_that_share_gpus_are_as_many_as_find_a_place_on_one(gpus, share, expected):
    nodes = [{"CPU": 16.0, "GPU": float(count)} for count in gpus]
    assert network_pool(nodes, Placement(gpus_per_worker=share)).size == expected


def test_the_network_stays_on_cpus_where_it_is_told_to():
    assert "num_gpus" not in network_pool([{"CPU": 16.0, "GPU": 2.0}], Placement(device="cpu")).resources


def test_a_label_is_a_key_and_a_value():
    assert selected_by("bpr-role=extract") == {"label_selector": {"bpr-role": "extract"}}
    assert selected_by(None) == {}
    with pytest.raises(InputError, match="label is 'extract': expected one of machines"):
        selected_by("extract")


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_request_to_stop_that_was_lost_comes_again(monkeypatch, number, raised):
    monkeypatch.setattr(session, "INSIST_SECONDS", 0.3)
    before = signal.getsignal(number)
    with session.stopped_by_signals():
        with session.stopped_by_signals(), pytest.raises(raised):
            signal.raise_signal(number)
        with pytest.raises(raised):
            time.sleep(20)
    assert signal.getsignal(number) == before
    time.sleep(0.8)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "RAY_ADDRESS is 127.0.0.1:1, where nothing listens .*Connection refused"),
        ("head:99999999", "RAY_ADDRESS is head:99999999, where nothing listens"),
        ("head", "RAY_ADDRESS is 'head': expected host:port"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line_and_not_awaited_for_long(monkeypatch, address, said):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(session, "_HEAD_PATIENCE_S", 0)
    with pytest.raises(InputError, match=said), session.ray_cluster():
        pass


def test_a_ray_that_does_not_start_is_one_line_that_names_its_folder(monkeypatch):
    def fail(**_):
        raise Exception("The node timed out\nduring startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/scratch")
    monkeypatch.setattr("ray.init", fail)
    with (
        pytest.raises(InputError, match=r"did not start \(The node timed out during startup.\): .* in /scratch/ray"),
        session.ray_cluster(),
    ):
        pass


CPUS, GPU, BOTH = {"CPU": 8.0}, {"GPU": 1.0, "CPU": 0.0}, {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "wish", "expected"),
    [
        ([CPUS], Placement(), "fused"),
        ([BOTH], Placement(), "fused"),
        ([CPUS, CPUS], Placement(), "spread"),
        ([GPU, CPUS], Placement(), "spread"),
        ([CPUS], Placement(device="gpu", workers=4), "spread"),
        ([BOTH], Placement("spread"), "spread"),
        ([CPUS, BOTH], Placement("fused"), "fused"),
    ],
)
def test_stages_share_the_network_process_where_one_machine_is_all_there_is(nodes, wish, expected):
    assert placed(nodes, network_pool(nodes, wish), wish) == expected


@pytest.mark.parametrize(
    ("blocks", "pool", "expected"),
    [
        (1, Pool(1, {"num_cpus": 0.99}, 2, 1), 1),
        (100, Pool(1, {"num_cpus": 0.99}, 2, 1), 16),
        (100, Pool(1, {"num_gpus": 1.0, "num_cpus": 0}, 1, 15), 100),
        (100_000, Pool(1, {"num_gpus": 1.0, "num_cpus": 0}, 1, 15), 960),
        (100, Pool(8, {"num_gpus": 1.0, "num_cpus": 0}, 1, 15), 3),
    ],
)
def test_a_fused_actor_gets_many_blocks_at_once_and_several_actors_get_some_often(blocks, pool, expected):
    assert blocks_at_once(blocks, pool) == expected


def test_a_frame_at_fault_leaves_the_others_of_its_block_as_they_are_and_in_order(tmp_path):
    dump = make_dump(tmp_path / "dump", frames=3)
    predictions, images = dump.root / "cityscapes", dump.root / "images"
    reader = CityscapesReader(str(predictions), str(images))
    stages = flow.Stages(reader, None, str(images), Cutting(0.55), GuardConfig(), LimitsConfig())
    refs = reader.list_frames()
    (images / refs[1].file_name).unlink()
    works, patches = stages.extract_isolated(refs)
    assert [work.frame_id for work in works] == [ref.frame_id for ref in refs]
    assert [bool(work.error) for work in works] == [False, True, False]
    assert refs[1].file_name in works[1].error
    for ref, work, part in zip(refs, works, patches):
        alone, expected = stages.extract(ref)
        work.open()
        assert np.array_equal(part, expected)
        assert work.patches == alone.patches == len(expected)


@pytest.mark.parametrize(
    ("up", "frames", "seconds", "expected"), [(True, 8, 300, 3300), (True, 8, 10, 600), (False, 2, 10, 1800)]
)
def test_a_run_is_given_up_no_sooner_than_every_frame_of_a_block_may_have_hung(up, frames, seconds, expected):
    # By its task, by a child together with the others, then all of them alone.
    assert on_ray.standstill_s(up, frames, seconds) == expected > (2 + frames) * seconds


def test_a_process_that_has_reserved_no_gpu_sees_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    plan = Plan(None, lambda: SimpleNamespace(arithmetic=os.environ["CUDA_VISIBLE_DEVICES"]), [])
    threads = torch.get_num_threads()
    assert in_workers.loading(plan, Pool(1, {"num_gpus": 1, "num_cpus": 0}, threads, 1))().arithmetic == "0,1"
    assert in_workers.loading(plan, Pool(1, {"num_cpus": 0.99}, threads, 1))().arithmetic == ""


def test_a_network_that_gets_a_gpu_from_ray_but_none_from_torch_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    plan = Plan(None, lambda: SimpleNamespace(arithmetic="cpu torch fp32"), [])
    threads = torch.get_num_threads()
    with pytest.raises(InputError, match=r"has a GPU by Ray's account, but torch .* finds none: expected a torch for"):
        in_workers.loading(plan, Pool(1, {"num_gpus": 1, "num_cpus": 0}, threads, 1))()
    assert in_workers.loading(plan, Pool(1, {"num_cpus": 0.99}, threads, 1))().arithmetic == "cpu torch fp32"


def test_the_network_is_loaded_for_the_device_that_was_asked_for(monkeypatch, checkpoint_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_refiner(str(checkpoint_path), "fp32", 2, "torch", "auto", "cpu").device.type == "cpu"


@pytest.mark.parametrize("address", ["", "local"])
def test_a_gpu_is_not_waited_for_where_ray_runs_on_this_machine_alone(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(on_ray, "ray_session", nullcontext)
    monkeypatch.setattr(on_ray, "alive_nodes", lambda: [{"Resources": {"CPU": 2.0}, "Labels": {}}])
    with pytest.raises(InputError, match="no GPU on this machine, on which Ray runs alone: expected a cluster by"):
        next(on_ray.run_ray(Plan(None, None, []), Placement(device="gpu", workers=1)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_wanted_without_ray_has_to_be_there(tmp_path, checkpoint_path):
    dump = make_dump(tmp_path / "dump", frames=1)
    with pytest.raises(InputError, match="device is gpu: torch finds none on this machine"):
        _run(dump.config("coco", tmp_path / "out", checkpoint_path, local=True, device="gpu"))


def test_only_machines_with_the_label_of_refining_count_for_its_processes():
    nodes = [{"Labels": {"bpr-role": role}} for role in ("refine", "extract", "refine")]
    assert labelled(nodes, "bpr-role=refine") == [nodes[0], nodes[2]]
    assert labelled(nodes, "bpr-role=other") == labelled(nodes, None) == nodes


def test_what_the_network_cannot_do_is_an_error_of_the_run_not_a_traceback():
    class Full(Blur):
        def each(self, blocks):
            raise UnsupportedError("batch_size is 2, for which cuda has no memory left")
            yield

    stages = Stages(None, None, "", Cutting(0.25), GuardConfig(), LimitsConfig())
    with pytest.raises(InputError, match="batch_size is 2, for which cuda has no memory left"):
        list(stages.refine([([Work("a")], [np.zeros((1, 64, 64, 4), np.uint8)])], Full()))
