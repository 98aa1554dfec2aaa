"""Every job as `ray job submit` runs it, on a head started like a cluster's: exit codes, logs, ids, what is sent."""

from __future__ import annotations

import re
import shutil
import uuid
import zipfile
from collections.abc import Iterator

import pytest
from ray._private.runtime_env.packaging import create_package

from tests.deploy.heads import ROOT, Head, started_head
from tests.dumps import make_dump
from tests.truths import make_truth, predict

TRAINING = (
    "--side-px 16 --batch-size 4 --val-patches 8 --workers 1 --gpus-per-worker 0 --fit.recipe adamw --fit.steps 3"
)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head() as head:
        yield head


def _log(submitted: str) -> str:
    """What the job itself has printed, out of what `ray job submit` shows."""
    return submitted.partition("Running entrypoint for job")[2].partition("\n")[2].partition("WebSocket closed")[0]


@pytest.mark.slow
def test_every_job_runs_where_it_is_submitted_and_its_log_reads_well_without_a_terminal(head, tmp_path):
    dump = make_dump(tmp_path / "dump", frames=4).root
    truth = make_truth(tmp_path / "truth", frames=4)
    images = truth.parent / "images"
    coarse = predict(truth)
    given = f"--predictions {coarse} --images {images} --image-list {truth}"
    out = tmp_path / "out"
    script = f"""
        echo == check; python jobs/check.py {given} --output {out}/refined
        echo == refine; python jobs/refine.py {given} --output {out}/refined
        echo == again; bpr-refine {given} --output {out}/refined
        echo == status; python jobs/status.py {out}/refined
        echo == evaluate; python jobs/evaluate.py --images {images} --coarse {coarse} \
            --refined {out}/refined/refined.json --ground-truth {truth} --output {out}/evaluation
        echo == prepare; python jobs/prepare.py --ground-truth {truth} --images {images} --output {out}/patches \
            --val-share 0.5
        echo == look; python jobs/look.py --data {out}/patches --output {out}/sheet.png
        echo == train; python jobs/train.py --data {out}/patches --output {out}/trained {TRAINING}
        echo == grade; python jobs/grade.py --ground-truth {truth} --images {images} --kinds grow --every 2
        echo == refine a folder; python jobs/refine.py --predictions {dump}/cityscapes --images {dump}/images \
            --output {out}/folder
    """
    submitted = head.submit(script)
    assert submitted.returncode == 0, submitted.stdout
    log = _log(submitted.stdout)
    print(log)
    parts = dict(re.findall(r"== ([a-z ]+)\n(.*?)(?=\n== |\Z)", log, re.DOTALL))
    for name, expected in (
        ("refine", "4 refined now, 0 before, 0 set aside"),
        ("again", "0 refined now, 4 before, 0 set aside"),
        ("status", "4"),
        ("evaluate", "AP"),
        ("train", "3"),
        ("grade", "grow"),
    ):
        assert expected in parts[name]
    for path in ("refined/refined.json", "evaluation/report.html", "sheet.png", "trained/weights.safetensors"):
        assert (out / path).stat().st_size > 0
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", log)
    assert not re.search(r"Traceback|WARN|ERROR|\(pid=|it/s\]", log)
    assert max(len(part.splitlines()) for part in parts.values()) < 60


@pytest.mark.slow
def test_a_failing_job_fails_the_submission_and_says_why_in_one_line(head, tmp_path):
    script = f"python jobs/refine.py --predictions {tmp_path}/none --images {tmp_path} --output {tmp_path}/out"
    submitted = head.submit(script)
    assert submitted.returncode != 0
    assert "failed with exit code 1" in submitted.stdout
    assert next(line for line in _log(submitted.stdout).splitlines() if line).startswith(f"error: {tmp_path}/none")
    assert "Traceback" not in submitted.stdout


@pytest.mark.slow
def test_a_job_refuses_an_output_in_the_folder_that_ray_removes(head, tmp_path):
    dump = make_dump(tmp_path / "dump", frames=1).root
    given = f"--predictions {dump}/cityscapes --images {dump}/images"
    submitted = head.submit(
        f"python jobs/check.py {given} --output refined || python jobs/refine.py {given} --output refined"
    )
    assert submitted.returncode != 0
    says = "refined: is below the working directory that Ray unpacks for a job, and removes later"
    assert _log(submitted.stdout).count(says) == 2


@pytest.mark.slow
def test_a_submission_id_lets_only_one_job_through(head):
    name = f"--submission-id=refine-{uuid.uuid4().hex}"
    assert head.submit("true", name).returncode == 0
    again = head.submit("true", name)
    assert again.returncode != 0
    assert "already exists" in again.stdout


@pytest.mark.slow
def test_a_job_that_was_stopped_leaves_its_submission_with_0(head):
    name = f"refine-{uuid.uuid4().hex}"
    submitted = head.submit(f"ray job stop --address {head.address} {name}; sleep 60", f"--submission-id={name}")
    assert submitted.returncode == 0
    assert "was stopped" in submitted.stdout


def test_a_submitted_job_takes_code_weights_pins_and_settings_along_and_nothing_else(tmp_path):
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    names = zipfile.ZipFile(package).namelist()
    tops = {name.split("/")[0] for name in names if not name.endswith((".yaml", ".yml")) or "/" in name}
    assert tops == {"constraints.txt", "deploy", "jobs", "model", "pipeline"}
    assert [name for name in names if name.startswith("deploy/")] == ["deploy/requirements.txt"]
    assert "model/weights/hrnet18s_128.safetensors" in names
    assert not [name for name in names if "__pycache__" in name or "cluster" in name]
    assert package.stat().st_size < 20e6


def test_settings_go_along_by_either_ending_of_yaml(tmp_path):
    (tmp_path / "work").mkdir()
    for name in ("nightly.yaml", "nightly.yml", "cluster.yaml", "mkdocs.yml", "notes.txt"):
        (tmp_path / "work" / name).touch()
    shutil.copy(ROOT / ".rayignore", tmp_path / "work")
    create_package(str(tmp_path / "work"), tmp_path / "package.zip", include_gitignore=True)
    assert sorted(zipfile.ZipFile(tmp_path / "package.zip").namelist()) == ["nightly.yaml", "nightly.yml"]
