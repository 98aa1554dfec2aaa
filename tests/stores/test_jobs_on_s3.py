"""Whole jobs whose inputs and outputs lie on an S3 store."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load

from pipeline import lease, storage
from pipeline.evaluation import EvaluateConfig, evaluate
from pipeline.preparation import prepare
from pipeline.records import InputError
from pipeline.run import run
from pipeline.training import Interrupted, claimed, train
from pipeline.training import prepare as prepare_training
from pipeline.training_patches import PrepareConfig
from tests.dumps import make_dump, tree
from tests.stores.conftest import objects, upload
from tests.stores.server import denying
from tests.truths import make_truth, predict
from tests.unit.test_training import settings as training_settings
from tests.unit.test_training import write_edges

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FORMS = ["cityscapes", "coco", "parquet"]
FRAMES = 8


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    return make_dump(tmp_path_factory.mktemp("dump") / "dump", frames=FRAMES)


def _on_s3(dump, bucket, form, checkpoint, **settings):
    """The settings of a run from `bucket`/in to `bucket`/out."""
    upload(dump.root, f"{bucket}/in")
    config = dump.config(form, f"{bucket}/out", checkpoint, **{"local": True, **settings})
    paths = {name: getattr(config, name) for name in ("predictions", "images", "image_list")}
    return replace(config, **{n: path and path.replace(str(dump.root), f"{bucket}/in") for n, path in paths.items()})


def _arguments(config):
    """The command line of a run with these settings."""
    given = {"predictions": config.predictions, "images": config.images, "output": config.output}
    given |= {"checkpoint": config.checkpoint, "frames-per-block": config.frames_per_block}
    given |= {"image-list": config.image_list} if config.image_list else {}
    options = [f"--{name}={value}" for name, value in given.items()]
    return [sys.executable, str(ROOT / "jobs" / "refine.py"), "--guard.no-enabled", *options]


def _quiet(config):
    return run(config, log=lambda line: None)


@pytest.fixture(scope="module")
def expected(dump, checkpoint_path, tmp_path_factory):
    """By form, the output of the same run on the local disk."""
    found = {}
    for form in FORMS:
        output = tmp_path_factory.mktemp(form)
        _quiet(dump.config(form, output, checkpoint_path, local=True))
        found[form] = tree(output)
    return found


MOST_REQUESTS = {
    "cityscapes": {"LIST": 3.0, "PUT": 4.0},
    "coco": {"LIST": 2.5, "PUT": 2.0},
    "parquet": {"LIST": 2.5, "PUT": 2.0},
}
"""Per frame of a dump so small that the requests of the run itself are most of them."""


@pytest.mark.parametrize("form", FORMS)
def test_a_dump_on_s3_is_refined_to_the_bytes_of_a_local_run_with_few_requests(
    s3, bucket, dump, checkpoint_path, expected, form
):
    config = _on_s3(dump, bucket, form, checkpoint_path)
    s3.counts.clear()
    assert not _quiet(config).quarantined
    print(form, {kind: round(count / FRAMES, 2) for kind, count in sorted(s3.counts.items())})
    assert all(s3.counts[kind] <= most * FRAMES for kind, most in MOST_REQUESTS[form].items()), s3.counts
    assert objects(f"{bucket}/out") == expected[form]
    again = _quiet(config)
    assert (again.frames, again.new, again.changed) == (0, 0, 0)


@pytest.mark.parametrize("form", ["cityscapes", "parquet"])
def test_a_run_on_a_store_in_trouble_ends_with_the_same_bytes_and_nothing_set_aside(
    s3, bucket, dump, checkpoint_path, expected, form, monkeypatch
):
    monkeypatch.setenv("BPR_STORE_TIMEOUT_S", "2")
    config = _on_s3(dump, bucket, form, checkpoint_path)
    with s3.failing(0.2):
        assert not _quiet(config).quarantined
    assert s3.failed.total() > 3
    assert objects(f"{bucket}/out") == expected[form]


def test_a_run_whose_store_goes_away_for_long_ends_with_one_line_and_goes_on_later(
    s3, bucket, dump, checkpoint_path, expected
):
    config = _on_s3(dump, bucket, "cityscapes", checkpoint_path)
    with s3.failing(1.0, "503", only="/out/frame_003"):
        done = subprocess.run(
            [*_arguments(config), "--local"],
            env={**os.environ, "BPR_STORE_PATIENCE_S": "0.3"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    assert re.search(r"^error: s3://.*/out/frame_003\S*: cannot be .*; tried for \d+ s\)$", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    assert not _quiet(config).quarantined
    assert objects(f"{bucket}/out") == expected["cityscapes"]


@pytest.mark.parametrize("local", [True, False])
def test_a_run_whose_credentials_expire_ends_instead_of_setting_the_other_frames_aside(
    s3, bucket, dump, checkpoint_path, expected, monkeypatch, local
):
    config = _on_s3(dump, bucket, "coco", checkpoint_path, local=local)
    name = f"GET /{bucket.removeprefix('s3://')}/in/images/frame_002"
    with monkeypatch.context() as patch:
        patch.setattr(s3, "app", denying("400 Bad Request", "ExpiredToken", s3.app, only=name))
        with pytest.raises(InputError, match=r"frame_002.png: cannot be read \(.*ExpiredToken"):
            _quiet(config)
    assert not _quiet(config).quarantined
    assert objects(f"{bucket}/out") == expected["coco"]


def test_an_image_that_the_store_never_gives_does_not_stop_the_others(s3, bucket, dump, checkpoint_path, monkeypatch):
    monkeypatch.setenv("BPR_STORE_PATIENCE_S", "1")
    config = _on_s3(dump, bucket, "coco", checkpoint_path, local=True)
    name = f"GET /{bucket.removeprefix('s3://')}/in/images/frame_002"
    monkeypatch.setattr(s3, "app", denying("500 Internal Server Error", "InternalError", s3.app, only=name))
    summary = _quiet(config)
    (reason,) = summary.quarantined.values()
    assert re.search(r"/in/images/frame_002\.png: cannot be read \(.*; tried for", reason)


def test_images_of_a_web_server_and_predictions_on_s3_go_together(
    s3, bucket, web, tmp_path, dump, checkpoint_path, expected
):
    for path in (dump.root / "images").iterdir():
        (tmp_path / "web" / path.name).write_bytes(path.read_bytes())
    config = replace(_on_s3(dump, bucket, "parquet", checkpoint_path), images=web.url)
    with web.failing(0.3, "503", "429"):
        assert not _quiet(config).quarantined
    assert web.failed.total()
    assert objects(f"{bucket}/out") == expected["parquet"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose a pid is, else the next run waits for it")
@pytest.mark.parametrize("form", ["cityscapes", "coco"])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(s3, bucket, dump, checkpoint_path, expected, form):
    config = _on_s3(dump, bucket, form, checkpoint_path, frames_per_block=1)
    process = subprocess.Popen(
        [*_arguments(config), "--local"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ending = "_pred.txt" if form == "cityscapes" else ".parquet"
    committed = f"{bucket}/out" if form == "cityscapes" else f"{bucket}/out/_ledger/parts"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if storage.exists(committed) and len(storage.find(committed, (ending,))) >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = _quiet(config)
    assert not resumed.quarantined
    assert {n: hashlib.sha256(d).digest() for n, d in objects(f"{bucket}/out").items()} == {
        n: hashlib.sha256(d).digest() for n, d in expected[form].items()
    }


def test_workers_of_ray_find_the_store_by_the_options_of_the_driver(s3, bucket, dump, checkpoint_path, expected):
    config = _on_s3(dump, bucket, "parquet", checkpoint_path)
    hidden = ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_ADDRESS")
    options = {"FSSPEC_S3_ENDPOINT_URL": s3.url, "FSSPEC_S3_KEY": "test", "FSSPEC_S3_SECRET": "test"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | options
    done = subprocess.run(_arguments(config), env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert objects(f"{bucket}/out") == expected["parquet"]


def test_of_runs_that_start_at_once_on_s3_one_gets_the_lease(s3, bucket):
    def start(_):
        try:
            return lease.Lease(f"{bucket}/out").__enter__()
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(start, range(4)))
    refused = [message for message in found if isinstance(message, str)]
    assert len(refused) == 3
    assert all("is writing this output" in message for message in refused)
    next(holder for holder in found if not isinstance(holder, str)).__exit__(None, None, None)
    with lease.Lease(f"{bucket}/out"):
        pass


def test_what_was_written_is_listed_at_once_also_after_an_older_listing(s3, bucket):
    for number in range(3):
        storage.put(f"{bucket}/out/{number}.txt", b"")
        assert len(storage.find(f"{bucket}/out", (".txt",))) == number + 1
    import boto3

    # As another process would: nothing in this one knows of it.
    client = boto3.client("s3", endpoint_url=s3.url)
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key="out/other.txt", Body=b"")
    assert storage.exists(f"{bucket}/out/other.txt")
    assert len(storage.find(f"{bucket}/out", (".txt",))) == 4


def test_patches_are_cut_and_evaluated_on_s3(s3, bucket, tmp_path):
    truth = make_truth(tmp_path / "data")
    predictions = predict(truth)
    upload(truth.parent, f"{bucket}/in")
    place = {path: f"{bucket}/in/{path.relative_to(truth.parent)}" for path in (truth, predictions)}
    common = {"images": f"{bucket}/in/images", "ground_truth": place[truth], "local": True}
    made = prepare(
        PrepareConfig(**common, predictions=place[predictions], output=f"{bucket}/patches", val_share=0.0),
        log=lambda line: None,
    )
    assert not made.aside
    assert json.loads(storage.read(f"{bucket}/patches/card.json"))["instances"] == made.card["instances"] > 0
    listed = evaluate(EvaluateConfig(**common, coarse=place[predictions]), log=lambda line: None)
    assert listed.listing is not None
    assert not listed.unpaired


def test_training_on_s3_goes_on_from_its_checkpoint(s3, bucket, tmp_path):
    data = tmp_path / "edges"
    write_edges(data)
    upload(data, f"{bucket}/data")

    def begun(output, data, stop_after=None):
        lines = []
        prepared = prepare_training(training_settings(data, output, "--fit.steps=4", "--workers=0"))
        with claimed(prepared) as check:
            train(
                prepared.config,
                lambda line, passing=False: lines.append(line),
                lambda: stop_after and len(lines) >= stop_after,
                check,
            )

    begun(tmp_path / "undisturbed", str(data))
    with pytest.raises(Interrupted):
        begun(f"{bucket}/run", f"{bucket}/data", stop_after=2)
    assert storage.exists(f"{bucket}/run/last.pt")
    begun(f"{bucket}/run", f"{bucket}/data")
    resumed, undisturbed = (
        load(storage.read(f"{output}/weights.safetensors")) for output in (f"{bucket}/run", tmp_path / "undisturbed")
    )
    assert resumed.keys() == undisturbed.keys()
    assert all(resumed[name].equal(weights) for name, weights in undisturbed.items())
    assert storage.find(f"{bucket}/run/tb", ("",))
