import json
import os
import subprocess
import sys

import fsspec
import pytest

from pipeline import storage, stores
from pipeline.records import InputError


def _read_elsewhere(url, options):
    """What another process reads that has these environment variables and none of ours about stores."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
    code = "import sys; from pipeline import storage; sys.stdout.buffer.write(storage.read(sys.argv[1]))"
    quiet = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "BPR_STORE_PATIENCE_S": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, url], env=environment | quiet | options, capture_output=True, timeout=60
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsspec variables", "fsspec file", "botocore variables", "botocore profile"])
def test_a_store_is_found_by_the_options_of_its_package(s3, bucket, tmp_path, way):
    storage.put(f"{bucket}/x", b"found")
    config = {"s3": {"endpoint_url": s3.url, "key": "a", "secret": "b", "config_kwargs": {"read_timeout": 5}}}
    (tmp_path / "conf.json").write_text(json.dumps(config))
    (tmp_path / "aws").write_text(
        f"[profile lab]\nregion = us-east-1\nendpoint_url = {s3.url}\n"
        "aws_access_key_id = a\naws_secret_access_key = b\n"
    )
    options = {
        "fsspec variables": {"FSSPEC_S3_ENDPOINT_URL": s3.url, "FSSPEC_S3_KEY": "a", "FSSPEC_S3_SECRET": "b"},
        "fsspec file": {"FSSPEC_CONFIG_DIR": str(tmp_path)},
        "botocore variables": {
            "AWS_ENDPOINT_URL_S3": s3.url,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
        },
        "botocore profile": {"FSSPEC_S3_PROFILE": "lab", "AWS_CONFIG_FILE": str(tmp_path / "aws")},
    }[way]
    found = _read_elsewhere(f"{bucket}/x", options)
    assert found.stdout == b"found", found.stderr.decode()[-500:]


def test_what_the_user_sets_goes_before_our_defaults(monkeypatch):
    given = {"config_kwargs": {"read_timeout": 7, "retries": {"total_max_attempts": 3}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", given)
    fs, path = stores.open_store("s3://bucket/key")
    assert path == "bucket/key"
    assert fs.config_kwargs["read_timeout"] == 7
    assert fs.config_kwargs["retries"] == {"total_max_attempts": 3}
    assert fs.config_kwargs["max_pool_connections"] == stores.REQUESTS


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "s4://x"])
def test_a_store_that_does_not_exist_is_one_line(url):
    with pytest.raises(InputError, match=f"{url}: .*") as refused:
        storage.read(url)
    assert "\n" not in str(refused.value)
