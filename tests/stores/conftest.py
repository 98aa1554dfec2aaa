"""An S3 store for the session, and a new bucket in it for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from tests.stores.server import Server, files_app, s3_app, serving

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


@pytest.fixture(scope="session")
def s3() -> Iterator[Server]:
    """A store that this process, and those that it starts, find through botocore's environment variables."""
    with pytest.MonkeyPatch.context() as patch, serving(s3_app()) as server:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": server.url}.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        yield server


@pytest.fixture
def bucket(s3: Server) -> str:
    """The URL of an empty bucket."""
    name = f"bucket-{uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Server]:
    """A web server of the files below tmp_path / "web"."""
    (tmp_path / "web").mkdir()
    with pytest.MonkeyPatch.context() as patch, serving(files_app(tmp_path / "web")) as server:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("no_proxy", "127.0.0.1")
        yield server


def upload(folder: Path, url: str) -> None:
    """Put all files below a folder into a bucket."""
    fs = fsspec.filesystem("s3")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())


def objects(url: str) -> dict[str, bytes]:
    """Every object's content below a URL by its path, the ledger left out."""
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    root = url.removeprefix("s3://")
    return {
        path.removeprefix(f"{root}/"): fs.cat_file(path) for path in sorted(fs.find(root)) if "/_ledger/" not in path
    }
