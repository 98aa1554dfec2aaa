"""The refine job as a user meets it on the command line: what it prints, how it exits, what it leaves behind."""

import json
import os
import signal
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import refine as job
from pipeline import flow
from tests.dumps import make_dump, tree
from tests.poison import Blur

LOAD_REFINER = flow.load_refiner
INPUTS = {"cityscapes": "cityscapes", "coco": "results.json", "parquet": "frames.parquet"}
OUTPUTS = {"cityscapes": "", "coco": "refined.json", "parquet": "part-00000.parquet"}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the job in this process: exit status, standard output, standard error."""
    monkeypatch.setattr(flow, "load_refiner", lambda *_: Blur())

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["jobs/refine.py", *map(str, arguments)])
        try:
            status = job.main()
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def dump(tmp_path):
    return make_dump(tmp_path / "dump", frames=3).root


@pytest.fixture
def flags(tmp_path, dump, checkpoint_path):
    """The flags that refine the dump in one of its forms; others may be added, or given again to replace these."""

    def of(form="cityscapes", output="out", **settings):
        chosen = {"predictions": dump / INPUTS[form], "images": dump / "images", "checkpoint": checkpoint_path}
        if form == "coco":
            chosen["image_list"] = dump / "images.json"
        chosen |= {"output": tmp_path / output, **settings}
        return ["--local", *(f"--{name.replace('_', '-')}={value}" for name, value in chosen.items())]

    return of


def _is_one_line(error, *parts):
    """Whether standard error is one `error:` line that has all the parts in it."""
    return error.startswith("error: ") and error.count("\n") == 1 and all(str(part) in error for part in parts)


@pytest.mark.parametrize("output_form", INPUTS)
@pytest.mark.parametrize("form", INPUTS)
def test_any_form_becomes_any_other_and_that_can_be_refined_again(run, flags, dump, tmp_path, form, output_form):
    status, out, error = run(*flags(form, output_format=output_form, limit=1))
    assert (status, error) == (0, "")
    assert "1 refined now, 0 before, 0 set aside" in out
    settings = {"predictions": tmp_path / "out" / OUTPUTS[output_form]}
    if output_form == "coco" and form != "coco":
        settings["image_list"] = tmp_path / "out" / "images.json"
    status, out, error = run(*flags(output_form, "again", **settings))
    assert (status, error) == (0, "")
    assert "1 refined now, 0 before, 0 set aside" in out


def test_the_same_command_again_does_nothing_and_starts_no_ray(run, flags, tmp_path, monkeypatch):
    assert run(*flags())[0] == 0
    before = tree(tmp_path)
    for name in ("run_local", "run_ray"):
        monkeypatch.setattr(flow, name, lambda *_: pytest.fail("nothing is left to do"))
    status, out, _ = run(*flags(), "--no-local")
    assert status == 0
    assert "0 refined now, 3 before" in out
    assert tree(tmp_path) == before


@pytest.mark.parametrize("form", INPUTS)
def test_a_limit_raised_step_by_step_ends_with_the_bytes_of_one_run(run, flags, tmp_path, form):
    for limit in (1, 2, 100):
        assert run(*flags(form, "steps", limit=limit))[0] == 0
    assert run(*flags(form, "whole"))[0] == 0
    assert tree(tmp_path / "steps") == tree(tmp_path / "whole")


def test_control_c_is_one_line_and_the_next_run_goes_on(run, flags, tmp_path, monkeypatch):
    original = flow.run_local

    def interrupted(plan):
        yield next(original(plan))
        raise KeyboardInterrupt

    monkeypatch.setattr(flow, "run_local", interrupted)
    status, out, error = run(*flags(frames_per_block=1))
    assert (status, out) == (130, "dump         3 new, 0 changed, 0 removed, 0 unchanged\n")
    assert error == "interrupted; the same command goes on from here\n"
    monkeypatch.setattr(flow, "run_local", original)
    assert "2 refined now, 1 before" in run(*flags(frames_per_block=1))[1]


def test_sigterm_as_of_ray_job_stop_is_told_like_control_c(run, flags, monkeypatch):
    monkeypatch.setattr(flow, "run_local", lambda plan: os.kill(os.getpid(), signal.SIGTERM))
    status, _, error = run(*flags())
    assert (status, error) == (143, "interrupted; the same command goes on from here\n")


def test_a_frame_set_aside_fails_the_job_only_if_strict_or_alone(run, flags, dump):
    (dump / "images" / "frame_000.png").unlink()
    status, out, _ = run(*flags())
    assert status == 0
    assert "set aside    frame_000: " in out
    assert "quarantine.csv" in out
    assert run(*flags(), "--strict")[0] == 1
    assert run(*flags(output="alone", limit=1))[0] == 1


def test_a_bad_frame_taken_out_of_the_dump_is_forgotten(run, flags, dump, tmp_path):
    (dump / "images" / "frame_000.png").unlink()
    assert run(*flags(), "--strict")[0] == 1
    (dump / "cityscapes" / "frame_000_pred.txt").unlink()
    assert run(*flags(), "--strict")[0] == 0
    assert not (tmp_path / "out" / "_ledger" / "quarantine.csv").exists()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nrubbish"])
def test_an_image_that_is_empty_or_broken_is_named_in_one_line(run, flags, dump, tmp_path, content):
    (dump / "images" / "frame_000.png").write_bytes(content)
    run(*flags(limit=1))
    table = (tmp_path / "out" / "_ledger" / "quarantine.csv").read_text()
    assert table == f"frame_id,error\nframe_000,{dump}/images/frame_000.png: expected an image that OpenCV can decode\n"


def test_a_file_name_that_leaves_the_images_is_reported_where_it_stands(run, flags, dump):
    listed = json.loads((dump / "images.json").read_text())
    listed["images"][0]["file_name"] = "../x.png"
    (dump / "images.json").write_text(json.dumps(listed))
    out = run(*flags("coco", limit=1))[1]
    assert f"{dump}/results.json: entry 0: image '../x.png', expected a path that stays below {dump}/images" in out


def test_names_from_a_dump_cannot_lead_out_of_the_output(run, flags, dump, tmp_path):
    table = pq.read_table(dump / "frames.parquet")
    rows = table.to_pylist()[:2]
    rows[0]["instances"][0]["instance_id"] = "../../stolen.png"
    rows[1]["frame_id"] = "../../frame_001"
    pq.write_table(table.from_pylist(rows, table.schema), dump / "frames.parquet")
    before = tree(dump)
    assert run(*flags("parquet", "deep/out", output_format="cityscapes"))[0] == 0
    assert tree(dump) == before
    assert {path.name for path in tmp_path.iterdir()} == {"dump", "deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("form", "output"),
    [
        ("cityscapes", "dump/cityscapes"),
        ("cityscapes", "dump/cityscapes/refined"),
        ("cityscapes", "link"),
        ("cityscapes", "dump"),
        ("parquet", "dump"),
        ("coco", "dump"),
    ],
)
def test_an_output_that_could_replace_the_predictions_is_refused(run, flags, dump, tmp_path, form, output):
    (tmp_path / "link").symlink_to(dump / "cityscapes")
    before = tree(tmp_path)
    status, _, error = run(*flags(form, output))
    assert status == 1
    assert _is_one_line(error, "expected an output apart from", dump / INPUTS[form])
    assert tree(tmp_path) == before
    assert not list(tmp_path.rglob("_ledger"))


def test_a_cityscapes_output_in_the_folder_of_the_photographs_is_refused(run, flags, dump):
    status, _, error = run(*flags("cityscapes", output=dump / "images"))
    assert status == 1
    assert _is_one_line(error, "expected an output apart from the images in")
    assert not (dump / "images" / "_ledger").exists()


@pytest.mark.parametrize("form", ["coco", "parquet"])
def test_a_final_file_that_no_run_has_written_is_replaced_by_restart_only(run, flags, tmp_path, form):
    result = tmp_path / "out" / OUTPUTS[form]
    result.parent.mkdir()
    result.write_text("of somebody else")
    status, _, error = run(*flags(form))
    assert status == 1
    assert _is_one_line(error, result, "no run on this output has written it")
    assert result.read_text() == "of somebody else"
    assert run(*flags(form), "--restart")[0] == 0
    assert run(*flags(form))[0] == 0
    assert result.read_bytes() != b"of somebody else"


def test_instances_of_two_frames_that_share_their_names_share_no_png(run, flags, dump, tmp_path):
    table = pq.read_table(dump / "frames.parquet")
    rows = table.to_pylist()
    for row in rows:
        for number, instance in enumerate(row["instances"]):
            instance["instance_id"] = f"{number}.png"
    pq.write_table(pa.Table.from_pylist(rows, table.schema), dump / "frames.parquet")
    assert run(*flags("parquet", output_format="cityscapes"))[0] == 0
    listed = [
        line.split()[0] for path in (tmp_path / "out").rglob("*_pred.txt") for line in path.read_text().splitlines()
    ]
    assert sum(len(row["instances"]) for row in rows) == len(listed) == len({*listed})
    assert {path.name for path in (tmp_path / "out").rglob("*.png")} == {*listed}


def test_a_run_that_finished_nothing_does_not_hold_its_output(run, flags, dump, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run(*flags(images=tmp_path / "empty"))[0] == 1
    assert run(*flags(limit=1), "--strict")[0] == 0
    status, _, error = run(*flags(limit=1, nms_threshold=0.3))
    assert status == 1
    assert _is_one_line(error, "run.json: this output was made with nms_threshold = 0.55, not 0.3")


def test_another_image_pattern_does_not_mix_into_an_output(run, flags, dump):
    pattern = flags("coco", image_pattern="frame_00{image_id:.2s}.png")
    assert run(*flags("coco", limit=1))[0] == 0
    status, _, error = run(*(flag for flag in pattern if not flag.startswith("--image-list")))
    assert status == 1
    assert _is_one_line(error, "made with image_list")


@pytest.mark.parametrize("pattern", ["{id}.jpg", "{}.jpg", "frame.jpg", "{image_id:012", "{image_id.real}.jpg"])
def test_a_pattern_without_an_image_id_is_refused_at_once(run, flags, dump, pattern):
    settings = [flag for flag in flags("coco") if not flag.startswith("--image-list")]
    status, _, error = run(*settings, f"--image-pattern={pattern}")
    assert status == 1
    assert _is_one_line(error, pattern, "expected a name such as '{image_id:012d}.jpg'")


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-20])
    return path


@pytest.mark.parametrize(
    ("form", "expected", "harm"),
    [
        ("coco", "expected the rest of an object", lambda dump: _truncated(dump / "results.json")),
        ("coco", "expected json", lambda dump: _truncated(dump / "images.json")),
        ("parquet", "expected a Parquet file", lambda dump: _truncated(dump / "frames.parquet")),
    ],
)
def test_a_truncated_file_is_one_line_that_names_it(run, flags, dump, form, expected, harm):
    path = harm(dump)
    status, _, error = run(*flags(form))
    assert status == 1
    assert _is_one_line(error, path, expected)


@pytest.mark.parametrize(
    ("form", "settings", "expected"),
    [
        ("cityscapes", {"predictions": "/nowhere"}, "/nowhere: no such file or folder of predictions"),
        ("coco", {"predictions": "/nowhere.json"}, "/nowhere.json: no such file"),
        ("coco", {"image_list": "/nowhere.json"}, "/nowhere.json: no such file"),
        ("coco", {"image_pattern": "{image_id}.png"}, "or image_pattern ('{image_id:012d}.jpg') beside COCO"),
        ("parquet", {"predictions": "/nowhere.parquet"}, "/nowhere.parquet: no such file"),
        ("parquet", {"images": "/nowhere"}, "/nowhere: expected a folder"),
        ("parquet", {"image_list": "/x.json"}, "image_list and image_pattern are for COCO json"),
        ("parquet", {"output": "/dev/null/out"}, "/dev/null/out/_ledger: cannot write the output there"),
        ("parquet", {"images": "nosuchstore://bucket"}, "nosuchstore://bucket: Protocol not known"),
        ("parquet", {"checkpoint": "hrnet"}, "hrnet: no such checkpoint file, nor bundled weights"),
        ("parquet", {"checkpoint": "/"}, "/: no such file"),
    ],
)
def test_a_wrong_path_is_one_line_that_names_it(run, flags, form, settings, expected):
    status, out, error = run(*flags(form, **settings))
    assert (status, out) == (1, "")
    assert _is_one_line(error, expected)


def test_a_wrong_path_is_told_before_it_is_asked_how_its_images_are_named(run, tmp_path):
    status, _, error = run("--predictions=/nowhere.json", f"--images={tmp_path}", f"--output={tmp_path}/out", "--local")
    assert status == 1
    assert _is_one_line(error, "/nowhere.json: no such file or folder of predictions")


def test_a_folder_named_as_a_json_file_is_no_such_file(run, flags, tmp_path):
    (tmp_path / "folder.json").mkdir()
    status, _, error = run(*flags("coco", predictions=tmp_path / "folder.json"))
    assert status == 1
    assert _is_one_line(error, f"{tmp_path}/folder.json: no such file")


def test_the_folder_of_a_coco_output_is_answered_with_the_file_that_is_meant(run, flags, tmp_path):
    assert run(*flags("coco", limit=1))[0] == 0
    status, _, error = run(*flags(predictions=tmp_path / "out", output="again"))
    assert status == 1
    assert _is_one_line(
        error, f"{tmp_path}/out: COCO results are given by their file; expected {tmp_path}/out/refined.json"
    )


def _another_network(path):
    torch.save({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, path)


def _one_key_less(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    state.pop("backbone.conv1.weight")
    torch.save(state, path)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (_another_network, "missing key 'decode_head.conv_seg.weight'; not a boundary refinement checkpoint"),
        (_one_key_less, "missing key 'backbone.conv1.weight' of hrnet18s_128"),
        (lambda path: path.write_text("hello"), "not a torch checkpoint"),
        (lambda path: path.write_text(""), "not a torch checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line_and_may_be_replaced(
    run, flags, tmp_path, checkpoint_path, monkeypatch, harm, expected
):
    monkeypatch.setattr(flow, "load_refiner", LOAD_REFINER)
    path = tmp_path / "other.pth"
    path.write_bytes(checkpoint_path.read_bytes())
    harm(path)
    status, _, error = run(*flags(checkpoint=path))
    assert status == 1
    assert _is_one_line(error, path, expected)
    assert run(*flags(limit=1))[0] == 0


def test_a_damaged_ledger_is_one_line_that_names_the_file(run, flags, tmp_path):
    assert run(*flags(limit=1))[0] == 0
    _truncated(tmp_path / "out" / "_ledger" / "run.json")
    status, _, error = run(*flags(limit=1))
    assert status == 1
    assert _is_one_line(error, tmp_path / "out" / "_ledger" / "run.json", "the file is damaged")


def test_frames_whose_receipts_are_torn_are_refined_again(run, flags, tmp_path):
    assert run(*flags(limit=2))[0] == 0
    (segment,) = (tmp_path / "out" / "_ledger").glob("*.jsonl")
    segment.write_bytes(segment.read_bytes()[:-9])
    assert "1 refined now, 1 before" in run(*flags(limit=2))[1]


def test_a_torn_part_is_one_line_and_its_frames_are_refined_again(run, flags, tmp_path):
    assert run(*flags("coco", limit=2, frames_per_block=2))[0] == 0
    (part,) = (tmp_path / "out" / "_ledger" / "parts").iterdir()
    whole = tree(tmp_path / "out")
    _truncated(part)
    (tmp_path / "out" / "refined.json").unlink()
    status, _, error = run(*flags("coco", limit=2, frames_per_block=2))
    assert status == 1
    assert _is_one_line(error, part, "the same command refines the 2 frames of 1 such parts again")
    assert run(*flags("coco", limit=2, frames_per_block=2))[0] == 0
    assert tree(tmp_path / "out") == whole


def test_a_full_disk_is_one_line(run, flags, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "/data/out/frame_000_0.png")

    monkeypatch.setattr("pipeline.formats.cityscapes.CityscapesWriter.commit", full)
    # What is patched here is not patched in a child process.
    monkeypatch.setattr("pipeline.flow.local._reaches_children", lambda _: False)
    status, _, error = run(*flags())
    assert status == 1
    assert _is_one_line(error, "No space left on device", "/data/out/frame_000_0.png")


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--limit=0", "limit is 0: expected at least 1"),
        ("--precision=int8", "invalid choice 'int8'"),
        ("--bogus", "Unrecognized options: --bogus"),
    ],
)
def test_a_wrong_flag_is_named_and_exits_with_2(run, flags, tmp_path, flag, expected):
    status, _, error = run(*flags(), flag)
    assert status == 2
    assert expected in error
    assert not (tmp_path / "out").exists()


def _yaml(tmp_path, flags, *more):
    lines = [flag[2:].replace("=", ": ", 1) if "=" in flag else f"{flag[2:]}: true" for flag in flags]
    (tmp_path / "nightly.yaml").write_text("\n".join([*lines, *more]))
    return tmp_path / "nightly.yaml"


def test_flags_override_the_yaml_file(run, flags, tmp_path):
    path = _yaml(tmp_path, flags(), "limit: 3", "batch_size: null", "format:")
    status, out, error = run(path, "--limit", "1")
    assert (status, error) == (0, "")
    assert "1 refined now" in out


def test_a_wrong_or_missing_yaml_file_is_one_line_that_names_it(run, flags, tmp_path):
    wrong = _yaml(tmp_path, flags(), "limt: 3"), "unknown setting 'limt'; did you mean limit?"
    for path, expected in (wrong, (tmp_path / "none.yaml", "none.yaml: no such file")):
        status, _, error = run(path)
        assert status == 1
        assert _is_one_line(error, path, expected)


def test_paths_may_be_relative_hold_spaces_and_be_urls(run, flags, dump, tmp_path, monkeypatch):
    place = tmp_path / "mit Leer % 日本 #1"
    dump.rename(place)
    monkeypatch.chdir(place)
    settings = {"predictions": "cityscapes", "images": "images/", "limit": 1}
    assert run(*flags(**settings, output="a b"))[0] == 0
    settings = {"predictions": f"file://{place}/cityscapes", "images": f"file://{place}/images", "limit": 1}
    assert run(*flags(**settings) + [f"--output=file://{tmp_path}/url"])[0] == 0
    assert tree(tmp_path / "a b") == tree(tmp_path / "url") != {}
    assert {path.name for path in Path.cwd().iterdir()} == {*INPUTS.values(), "images", "images.json"}


def test_files_in_memory_are_refused_where_other_processes_would_look_for_them(run, flags):
    _, *arguments, _ = flags()
    status, _, error = run(*arguments, "--output=memory://out")
    assert status == 1
    assert _is_one_line(error, "memory://", "expected --local")
