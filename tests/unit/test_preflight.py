import json
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import check as job
from pipeline import preflight, preflight_frames
from pipeline.flow.session import Placement
from pipeline.guard import GuardConfig
from pipeline.lease import Lease
from pipeline.limits import LimitsConfig
from pipeline.preflight import CheckConfig, check, cluster
from pipeline.records import InputError
from pipeline.run import run as refine_dump
from tests.dumps import make_dump

KINDS = ("images", "image files", "masks", "sizes", "categories", "frame ids")


@pytest.fixture
def dump(tmp_path):
    return make_dump(tmp_path / "dump", frames=6)


@pytest.fixture
def config(tmp_path, dump, checkpoint_path, monkeypatch):
    """Makes the settings of a check, from those of a run."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def of(form="cityscapes", output="out", checkpoint=checkpoint_path, **settings):
        shared = {name: settings.pop(name) for name in ("sample", "cluster", "probe", "json") if name in settings}
        run = dump.config(form, tmp_path / output, checkpoint, **settings)
        return CheckConfig(**{name: getattr(run, name) for name in asdict(run)}, **shared)

    return of


def _errors(report):
    return {found.name: found for found in report.checks if found.level == "error"}


def _files(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize(
    ("settings", "level", "message"),
    [
        ({"device": "cpu", "precision": "fp32"}, "ok", r"this machine runs the network \(cpu (openvino|torch) fp32\)"),
        ({"device": "gpu"}, "error", "device is gpu: torch finds none on this machine, expected one, or device cpu"),
    ],
)
def test_without_ray_it_loads_the_network_as_the_run_would(config, monkeypatch, settings, level, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (found,) = (found for found in check(config(local=True, **settings)).checks if found.name == "device")
    assert found.level == level
    assert re.fullmatch(message, found.message)


def test_without_ray_a_missing_gpu_is_found_beside_a_wrong_checkpoint(config, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "w.pth").write_bytes(b"no weights")
    found = _errors(check(config(checkpoint=tmp_path / "w.pth", local=True, device="gpu")))
    assert {"checkpoint", "device"} <= found.keys()


def test_without_ray_a_precision_that_this_machine_lacks_is_found(config, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr("model.openvino_backend.can_calculate_in", lambda precision: precision == "fp32")
    found = _errors(check(config(local=True, device="cpu", precision="bf16", backend="openvino")))
    assert found["device"].message == "precision is 'bf16', in which this CPU cannot calculate: expected fp32"


@pytest.mark.parametrize("form", ["cityscapes", "coco", "parquet"])
def test_a_sound_dump_passes_every_check_and_nothing_is_changed(tmp_path, config, form):
    before = _files(tmp_path)
    report = check(config(form))
    assert not report.failed
    assert {found.level for found in report.checks} == {"ok"}
    assert [found.name for found in report.checks] == [
        "checkpoint", "output", "earlier run", "predictions", *KINDS, "space"
    ]  # fmt: skip
    assert _files(tmp_path) == before


@pytest.mark.parametrize("form", ["cityscapes", "coco", "parquet"])
def test_the_estimate_over_all_frames_is_what_the_run_then_does(config, form):
    settings = config(form, local=True, nms_threshold=0.4)
    estimate = check(settings).estimate
    summary = refine_dump(settings, log=lambda _: None)
    assert (estimate.frames, estimate.instances) == (summary.frames, summary.instances)
    assert estimate.patches == summary.patches > 0
    assert estimate.output_bytes > 0
    after = check(settings)
    assert after.estimate.frames == 0
    assert "same settings" in next(found for found in after.checks if found.name == "earlier run").message


def test_a_dump_whose_objects_are_mostly_too_small_for_the_guard_is_told_so(config):
    warnings = {}
    for area in (2, 10**6):
        report = check(config(guard=GuardConfig(min_area=area)))
        warnings[area] = [found.message for found in report.checks if found.level == "warning"]
        assert not report.failed
    assert warnings[2] == []
    (message,) = warnings[10**6]
    assert re.fullmatch(r"(\d+) of \d+ instances have fewer pixels than guard\.min_area \(1000000\) .*", message)


def test_images_of_12_bits_in_16_are_named_as_too_dark(dump, config):
    path = dump.root / "images" / "frame_002.png"
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).astype(np.uint16)
    cv2.imwrite(str(path), image * 257)
    assert all(found.level == "ok" for found in check(config()).checks)
    cv2.imwrite(str(path), image * 16)
    (found,) = (found for found in check(config()).checks if found.level == "warning")
    assert (found.name, found.findings, found.count) == ("brightness", [str(path)], 1)


@pytest.mark.parametrize("form", ["coco", "parquet"])
@pytest.mark.parametrize("sample", [0, 2])
def test_an_image_that_is_missing_is_named_though_it_may_not_be_sampled(dump, config, form, sample):
    for number in (0, 5):
        (dump.root / "images" / f"frame_{number:03d}.png").unlink()
    found = _errors(check(config(form, sample=sample)))
    assert set(found) == {"images"}
    assert found["images"].count == 2
    assert found["images"].findings[0] == f"{dump.root}/images/frame_000.png: no such file"


@pytest.mark.parametrize("form", ["cityscapes", "coco"])
def test_nothing_is_said_to_be_sound_where_no_image_is_there(dump, config, form):
    for path in (dump.root / "images").iterdir():
        path.unlink()
    report = check(config(form))
    told = {found.name: found.message for found in report.checks}
    assert set(_errors(report)) == {"images"}
    assert all(told[name].startswith("nothing could be looked at") for name in ("image files", "masks", "sizes"))


def test_a_listing_error_is_named_where_it_stands(dump, config):
    (dump.root / "images" / "frame_002.png").unlink()
    found = _errors(check(config(sample=1)))
    assert set(found) == {"images"}
    assert "frame_002_pred.txt: expected an image frame_002.png" in found["images"].findings[0]


def test_at_most_five_findings_are_named_and_the_others_counted(dump, config):
    for path in (dump.root / "images").iterdir():
        path.write_bytes(b"rubbish")
    report = check(config())
    found = _errors(report)["image files"]
    assert (len(found.findings), found.count) == (5, 6)
    assert "... 1 more" in str(report)
    assert report.estimate is None


def test_a_mask_of_another_size_is_named(dump, config):
    cv2.imwrite(str(dump.root / "cityscapes" / "frame_000_0.png"), np.zeros((7, 9), np.uint8))
    found = _errors(check(config()))
    assert set(found) == {"sizes"}
    assert "frame_000_0.png: mask of 9 x 7 pixels" in found["sizes"].findings[0]


def test_run_lengths_of_another_size_are_named(dump, config):
    results = json.loads((dump.root / "results.json").read_text())
    results[0]["segmentation"]["size"] = [7, 7]
    (dump.root / "results.json").write_text(json.dumps(results))
    found = _errors(check(config("coco")))
    assert set(found) == {"sizes"}
    assert "results.json: entry 0: mask size [7, 7]" in found["sizes"].findings[0]


def test_a_row_of_another_size_than_its_image_is_named(dump, config):
    table = pq.read_table(dump.root / "frames.parquet")
    rows = table.to_pylist()
    rows[1]["height"] += 1
    pq.write_table(table.from_pylist(rows, table.schema), dump.root / "frames.parquet")
    assert set(_errors(check(config("parquet")))) == {"sizes"}


def test_unknown_categories_are_named(dump, config):
    path = dump.root / "cityscapes" / "frame_000_pred.txt"
    path.write_text(path.read_text().replace(" 24 ", " 99 "))
    assert "frame_000_pred.txt:1: unknown category 99" in _errors(check(config()))["categories"].findings[0]
    results = json.loads((dump.root / "results.json").read_text())
    results[0]["category_id"] = 99
    (dump.root / "results.json").write_text(json.dumps(results))
    found = _errors(check(config("coco", sample=1)))
    assert "unknown category 99" in found["categories"].findings[0]


def test_a_damaged_mask_is_named(dump, config):
    (dump.root / "cityscapes" / "frame_000_0.png").write_bytes(b"rubbish")
    (dump.root / "cityscapes" / "frame_002_0.png").unlink()
    found = _errors(check(config()))
    assert set(found) == {"masks"}
    assert found["masks"].count == 2
    assert f"{dump.root}/cityscapes/frame_000_0.png: expected a PNG" in found["masks"].findings


def test_a_frame_id_that_occurs_twice_is_named(dump, config):
    table = pq.read_table(dump.root / "frames.parquet")
    rows = table.to_pylist()
    rows[1]["frame_id"] = rows[0]["frame_id"]
    pq.write_table(table.from_pylist(rows, table.schema), dump.root / "frames.parquet")
    found = _errors(check(config("parquet")))
    assert set(found) == {"frame ids"}
    assert "frame_000 occurs more often" in found["frame ids"].findings[0]


def test_a_file_that_breaks_the_decoder_is_a_finding_too(config, monkeypatch):
    def breaks(*_):
        raise cv2.error("too large")

    monkeypatch.setattr(preflight_frames, "decode_image", breaks)
    found = _errors(check(config()))["image files"]
    assert found.count == 6
    assert "frame_000.png: error: too large" in found.findings[0]


def test_a_sample_is_the_same_each_time_and_grows_into_a_larger_one(config, monkeypatch):
    looked_at, decode = set(), preflight_frames.decode_image
    monkeypatch.setattr(preflight_frames, "decode_image", lambda url, *of: looked_at.add(url) or decode(url, *of))

    def sampled(count):
        looked_at.clear()
        estimate = check(config(sample=count)).estimate
        assert (estimate.measured, estimate.frames) == (len(looked_at), 6)
        return {*looked_at}

    smaller, again, larger = (sampled(count) for count in (2, 2, 4))
    assert smaller == again < larger
    assert (len(smaller), len(larger), len(sampled(0))) == (2, 4, 6)


def test_a_listing_that_cannot_be_read_is_one_finding(dump, config):
    (dump.root / "results.json").write_text('[{"image_id": ')
    report = check(config("coco"))
    assert set(_errors(report)) == {"predictions"}
    assert "results.json: byte" in _errors(report)["predictions"].message
    assert report.estimate is None


def test_a_missing_folder_of_images_is_one_finding(dump, config):
    (dump.root / "images").rename(dump.root / "elsewhere")
    assert set(_errors(check(config("parquet")))) == {"images"}


@pytest.mark.parametrize("content", [b"", b"rubbish"])
def test_a_checkpoint_that_does_not_load_is_found_beside_other_faults(dump, config, tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    (dump.root / "images" / "frame_000.png").unlink()
    found = _errors(check(config(checkpoint=tmp_path / "w.pth")))
    assert set(found) == {"checkpoint", "images"}
    assert "w.pth: not a torch checkpoint" in found["checkpoint"].message


def test_a_checkpoint_of_no_known_configuration_is_found(config, tmp_path):
    import torch

    torch.save({"decode_head.conv_seg.weight": torch.zeros(2, 7, 1, 1)}, tmp_path / "w.pth")
    found = _errors(check(config(checkpoint=tmp_path / "w.pth")))
    assert "w.pth: key 'decode_head.conv_seg.weight' has shape (2, 7, 1, 1)" in found["checkpoint"].message


def test_a_checkpoint_that_is_not_there_is_found(config):
    found = _errors(check(config(checkpoint="hrnet")))
    assert "hrnet: no such checkpoint file, nor bundled weights" in found["checkpoint"].message


@pytest.mark.parametrize("output", ["dump/cityscapes", "dump", "dump/cityscapes/refined"])
def test_an_output_in_the_predictions_is_found(config, output):
    assert "expected an output apart from" in _errors(check(config(output=output)))["output"].message


def test_a_final_file_of_somebody_else_in_the_output_is_found(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "refined.json").write_text("[]")
    found = _errors(check(config("coco")))
    assert "no run on this output has written it" in found["earlier run"].message
    assert not check(config("coco", restart=True)).failed


def test_a_frame_that_would_not_fit_the_memory_is_found(config, dump):
    cv2.imwrite(str(dump.root / "images" / "frame_000.png"), np.zeros((7000, 7000), np.uint8))
    found = _errors(check(config("coco", limits=LimitsConfig(memory_gb=0.1))))
    assert "image of 7000 x 7000 pixels, expected one that fits limits" in found["image files"].findings[0]


@pytest.mark.parametrize("probe", [False, True])
def test_an_output_below_a_file_cannot_be_written(config, tmp_path, probe):
    (tmp_path / "file").write_text("in the way")
    found = _errors(check(config(output="file/out", probe=probe)))
    assert set(found) == {"output"}
    assert f"{tmp_path}/file/out: cannot be written" in found["output"].message


def test_an_output_without_permission_cannot_be_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"no permission in {tmp_path}" in _errors(check(config()))["output"].message


def test_a_store_is_written_to_only_with_probe_and_then_left_as_it_was(config):
    import fsspec

    store = fsspec.filesystem("memory")
    settings = config()
    object.__setattr__(settings, "output", "memory://preflight/out")
    (found,) = (found for found in check(settings).checks if found.name == "output")
    assert found.level == "warning"
    object.__setattr__(settings, "probe", True)
    (found,) = (found for found in check(settings).checks if found.name == "output")
    assert found.level == "ok"
    assert store.find("/preflight") == []


def test_every_setting_in_which_an_earlier_run_differs_is_named(config, tmp_path):
    refine_dump(config(local=True), log=lambda _: None)
    found = _errors(check(config(nms_threshold=0.4, padding=4)))["earlier run"]
    run = f"{tmp_path}/out/_ledger/run.json"
    assert found.findings == [f"{run}: nms_threshold = 0.55, not 0.4", f"{run}: padding = 0, not 4"]
    assert "--restart" in found.message


def test_other_settings_are_no_error_where_the_run_is_to_restart(config):
    refine_dump(config(local=True), log=lambda _: None)
    report = check(config(nms_threshold=0.4, restart=True))
    assert not report.failed
    assert report.estimate.frames == 6


def test_a_damaged_ledger_is_found(config, tmp_path):
    refine_dump(config(local=True), log=lambda _: None)
    run = tmp_path / "out" / "_ledger" / "run.json"
    run.write_bytes(run.read_bytes()[:-20])
    found = _errors(check(config()))
    assert set(found) == {"earlier run"}
    assert str(run) in found["earlier run"].message


def test_frames_that_have_changed_since_they_were_refined_count_as_work_to_do(config, dump):
    refine_dump(config(local=True), log=lambda _: None)
    assert check(config()).estimate.frames == 0
    image = dump.root / "images" / "frame_001.png"
    image.write_bytes(image.read_bytes() + b"\0")
    assert check(config()).estimate.frames == 1


def test_a_run_that_is_going_on_is_told(config, tmp_path):
    with Lease(str(tmp_path / "out")):
        found = [found for found in check(config()).checks if found.level == "warning"]
    assert ["is writing this output" in found.message for found in found] == [True]


def test_too_little_space_is_found(config, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "about 3 kB needed, 1 kB free" in _errors(check(config()))["space"].message


@pytest.mark.parametrize(
    ("nodes", "mode", "workers", "level", "message"),
    [
        ([{"CPU": 2.0}], "spread", None, "warning", "1.01 CPUs are left for reading and writing"),
        ([{"CPU": 2.0}], "auto", None, "ok", "1 network processes, which read and write as well"),
        ([{"CPU": 16.0}], "spread", None, "ok", "1 network processes, 4.01 CPUs for the other stages"),
        ([{"CPU": 16.0}] * 4, "auto", None, "ok", "4 network processes, 16.04 CPUs"),
        ([{"CPU": 16.0}] * 4, "fused", None, "ok", "4 network processes, which read and write as well"),
        ([{"CPU": 16.0, "GPU": 2.0}], "spread", None, "ok", "2 network processes, 16 CPUs"),
        ([{"CPU": 16.0, "GPU": 2.0}], "auto", 4, "warning", "of 4 network processes with 1 GPUs only 2 find a place"),
        ([{"CPU": 1.0, "GPU": 1.0}], "spread", None, "warning", "1 CPUs are left"),
        ([{"CPU": 4.0}, {"CPU": 28.0}], "auto", None, "ok", "2 network processes"),
    ],
)
def test_a_cluster_on_which_the_run_can_work(nodes, mode, workers, level, message):
    found = cluster(nodes, Placement(mode, workers))
    assert found.level == level
    assert message in found.message


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus_per_worker", "message"),
    [
        ([], None, 1.0, "expected at least 1 CPU"),
        (
            [{"CPU": 16.0, "GPU": 1.0}] * 2,
            None,
            2.0,
            "needs 2 GPUs of one machine, the largest has 1; the run would wait for ever",
        ),
    ],
)
def test_a_cluster_on_which_the_run_would_wait_without_a_word_is_an_error(nodes, workers, gpus_per_worker, message):
    with pytest.raises(InputError, match=message):
        cluster(nodes, Placement(workers=workers, gpus_per_worker=gpus_per_worker))


def test_gpus_that_are_not_up_may_come_on_a_cluster_but_not_where_ray_runs_alone():
    wish = Placement(device="gpu", workers=2)
    assert "waits until an autoscaler starts machines" in cluster([{"CPU": 2.0}], wish).message
    with pytest.raises(InputError, match="no GPU on this machine, on which Ray runs alone"):
        cluster([{"CPU": 2.0}], wish, grows=False)


def test_a_cluster_is_looked_at_where_ray_address_names_one_or_on_demand(config, monkeypatch):
    monkeypatch.setattr(preflight, "ray_session", nullcontext)
    monkeypatch.setattr(
        preflight, "alive_nodes", lambda: [{"Resources": {"CPU": 16.0, "GPU": 1.0}, "Labels": {"bpr-role": "refine"}}]
    )
    looked = [
        [found.message for found in check(config(sample=1, **settings)).checks if found.name == "cluster"]
        for settings in ({}, {"cluster": True}, {"cluster": True, "local": True})
    ]
    assert [len(messages) for messages in looked] == [0, 1, 0]
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")

    def unreachable():
        raise ConnectionError("no head at somewhere:6379")

    monkeypatch.setattr(preflight, "ray_session", unreachable)
    assert "no head at somewhere:6379" in _errors(check(config(sample=1)))["cluster"].message


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the job in this process: exit status, standard output, standard error."""

    def call(*arguments):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(sys, "argv", ["jobs/check.py", *map(str, arguments)])
        return job.main(), *capsys.readouterr()

    return call


@pytest.fixture
def nightly(tmp_path, dump, checkpoint_path):
    """A YAML file of the refine job."""
    path = tmp_path / "nightly.yaml"
    path.write_text(
        f"predictions: {dump.root}/cityscapes\nimages: {dump.root}/images\noutput: {tmp_path}/out\n"
        f"checkpoint: {checkpoint_path}\nguard: {{min_iou: 0.4}}\n"
    )
    return path


def test_the_job_takes_the_yaml_file_of_the_run_and_exits_with_0(run, nightly):
    status, out, error = run(nightly, "--sample", "0", "--limit", "2")
    assert (status, error) == (0, "")
    assert "ok       predictions  2 frames, read as cityscapes\n" in out
    assert out.endswith("0 errors, 0 warnings\n")


def test_the_job_exits_with_1_on_an_error_and_speaks_json(run, nightly, dump):
    (dump.root / "images" / "frame_000.png").unlink()
    status, out, error = run(nightly, "--json")
    assert (status, error) == (1, "")
    told = json.loads(out)
    assert not told["ok"]
    assert [found["name"] for found in told["checks"] if found["level"] == "error"] == ["images"]
    assert told["estimate"]["frames"] == 5


def test_paths_in_a_store_that_does_not_exist_are_one_finding(run, nightly):
    status, out, error = run(nightly, "--images", "nosuchstore://bucket")
    assert (status, error) == (1, "")
    assert "error    settings     nosuchstore://bucket: Protocol not known" in out


def test_a_label_that_no_machine_has_is_told(config, monkeypatch):
    monkeypatch.setattr(preflight, "ray_session", nullcontext)
    machine = {"Resources": {"CPU": 16.0, "GPU": 1.0}, "Labels": {"bpr-role": "refine"}}
    monkeypatch.setattr(preflight, "alive_nodes", lambda: [machine])
    settings = config(cluster=True, refine_label="bpr-role=refine", extract_label="bpr-role=extract")
    (found,) = (found for found in check(settings).checks if found.level == "warning")
    assert "no machine that is up has the label bpr-role=extract" in found.message


def test_gpus_that_are_to_come_are_a_warning_and_their_number_must_be_known():
    found = cluster([], Placement(device="gpu", workers=4))
    assert (found.level, "no GPU is up" in found.message) == ("warning", True)
    with pytest.raises(InputError, match="expected --workers"):
        cluster([], Placement(device="gpu"))
