import time

import fsspec
import pytest

from pipeline import storage, stores
from pipeline.records import InputError
from pipeline.stores import AwayError, NotGivenError, StoreError
from tests.deploy.heads import free_ports
from tests.stores.server import FAULTS, denying, one_by_one

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setenv("BPR_STORE_TIMEOUT_S", "2")
    monkeypatch.setenv("BPR_STORE_PATIENCE_S", "30")


@pytest.fixture
def brief(monkeypatch):
    """The patience of a run that gives up at once."""
    monkeypatch.setenv("BPR_STORE_PATIENCE_S", "0.5")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_now_and_then_is_asked_again(s3, bucket, fault):
    names = [f"folder/{i}.bin" for i in range(6)]
    with s3.failing(0.4, fault):
        for name in names:
            storage.put(f"{bucket}/{name}", name.encode())
        assert [storage.read(f"{bucket}/{name}").decode() for name in names] == names
        assert storage.read(f"{bucket}/{names[0]}", 2, 5) == names[0].encode()[2:5]
        assert storage.find(bucket, (".bin",)) == names
        assert set(dict(storage.versions(bucket))) == {*names}
        assert all(storage.versions_of(bucket, names))
        assert storage.create(f"{bucket}/once", b"1")
        assert not storage.create(f"{bucket}/once", b"2")
        for name in names[:3]:
            storage.remove(f"{bucket}/{name}")
        assert [storage.exists(f"{bucket}/{name}") for name in names] == [False] * 3 + [True] * 3
    assert s3.failed[fault] >= 5


def test_a_listing_of_many_answers_does_not_begin_anew_where_one_fails(s3, bucket, monkeypatch):
    names = [f"{i:02d}.bin" for i in range(12)]
    for name in names:
        storage.put(f"{bucket}/{name}", b"")
    monkeypatch.setattr(s3, "app", one_by_one(s3.app))
    with s3.failing(0.4, "503", only="list-type"):
        assert storage.find(bucket, (".bin",)) == names
    assert s3.failed["503"] >= 3


def test_a_store_that_hangs_is_asked_again(s3, bucket, monkeypatch):
    monkeypatch.setenv("BPR_STORE_TIMEOUT_S", "0.3")
    storage.put(f"{bucket}/x", b"x" * 10)
    with s3.failing(0.5, "hang", hanging_s=1.0):
        assert [storage.read(f"{bucket}/x") for _ in range(4)] == [b"x" * 10] * 4
    assert s3.failed["hang"]


@pytest.mark.parametrize("fault", ["503", "closed", "hang"])
def test_a_store_that_stays_away_is_given_up_with_one_line_that_names_the_file(s3, bucket, brief, monkeypatch, fault):
    monkeypatch.setenv("BPR_STORE_TIMEOUT_S", "0.2")
    storage.put(f"{bucket}/x", b"x")
    url = f"{bucket}/x"
    calls = [
        (AwayError, r"read \(.+; tried for [0-2] s", lambda: storage.read(url)),
        (AwayError, r"read \(.+; tried for [0-2] s", lambda: storage.exists(url)),
        (AwayError, r"read \(.+; tried for \d+ s", lambda: storage.find(bucket, ("x",))),
        (StoreError, r"written \(.+; tried for [0-2] s", lambda: storage.put(url, b"y")),
        (StoreError, r"written \(.+; tried for [0-2] s", lambda: storage.remove(url)),
    ]
    with s3.failing(1.0, fault, hanging_s=0.5):
        for kind, reason, call in calls:
            with pytest.raises(kind, match=rf"^s3://.*: cannot be {reason}\)$"):
                call()
    assert storage.read(url) == b"x"


def test_what_no_repetition_would_change_is_asked_once(s3, bucket):
    def requests(error, match, call):
        s3.counts.clear()
        with pytest.raises(error, match=match):
            call()
        return s3.counts.total()

    missing = "s3://no-such-bucket-here"
    assert requests(InputError, r"nowhere: no such file$", lambda: storage.read(f"{bucket}/nowhere")) == 1
    assert requests(StoreError, r"/x: cannot be written \(.*bucket", lambda: storage.put(f"{missing}/x", b"")) == 1
    assert requests(InputError, f"{missing}: expected a folder", lambda: storage.find(missing, (".png",))) <= 3


def test_access_that_is_denied_is_told_at_once(s3, bucket, monkeypatch):
    monkeypatch.setattr(s3, "app", denying("403 Forbidden", "AccessDenied"))
    started = time.monotonic()
    with pytest.raises(InputError, match=r"/x: cannot be read \(.*Denied") as denied:
        storage.read(f"{bucket}/x")
    assert denied.type is InputError, "others may be read"
    with pytest.raises(StoreError, match=r"/x: cannot be written \(.*Denied"):
        storage.put(f"{bucket}/x", b"")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("status", "code"), [("400 Bad Request", "ExpiredToken"), ("403 No", "InvalidAccessKeyId"), ("401 Who", "X")]
)
def test_credentials_that_are_not_accepted_are_no_matter_of_one_file(s3, bucket, monkeypatch, status, code):
    monkeypatch.setattr(s3, "app", denying(status, code))
    with pytest.raises(AwayError, match=rf"/x: cannot be read \(.*{code}"):
        storage.read(f"{bucket}/x")


def test_a_file_that_a_store_never_gives_while_it_gives_others_is_a_matter_of_this_file(s3, bucket, brief):
    for name in "xy":
        storage.put(f"{bucket}/{name}", b"1")
    storage.read(f"{bucket}/y")
    with s3.failing(1.0, "500", only="/x?"), pytest.raises(NotGivenError, match=r"/x: cannot be read .*; tried"):
        storage.read(f"{bucket}/x")
    with s3.failing(1.0, "500"), pytest.raises(AwayError, match=r"/x: cannot be read .*; tried"):
        storage.read(f"{bucket}/x")


@pytest.fixture
def anew(s3):
    """Lets stores be opened by the variables of the test."""

    def forget():
        type(fsspec.filesystem("s3")).clear_instance_cache()
        stores.of_many_requests.cache_clear()

    forget()
    yield
    forget()


def test_a_store_that_takes_no_connection_is_asked_again(anew, brief, monkeypatch):
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    for call in (storage.read, storage.exists, lambda url: storage.find(url, ("",))):
        with pytest.raises(AwayError, match=r"^s3://b/x: cannot be read \(Could not connect .*; tried for \d+ s\)$"):
            call("s3://b/x")
    with pytest.raises(StoreError, match=r"^s3://b/x: cannot be written \(Could not connect .*; tried for \d+ s\)$"):
        storage.put("s3://b/x", b"")


def test_credentials_that_are_not_there_are_no_matter_of_one_file(anew, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(AwayError, match=r"^s3://b/x: cannot be read \(.*credentials"):
        storage.read("s3://b/x")


def test_a_file_created_though_the_answer_was_lost_counts_as_created(s3, bucket):
    answered = s3.app
    lost = []

    def losing(environ, start_response):
        answer = answered(environ, start_response)
        if environ["REQUEST_METHOD"] == "PUT" and not lost:
            lost.append(b"".join(answer))
            raise ConnectionAbortedError
        return answer

    s3.app = losing
    try:
        assert storage.create(f"{bucket}/lease", b"mine")
        assert lost
        assert not storage.create(f"{bucket}/lease", b"theirs")
    finally:
        s3.app = answered
    assert storage.read(f"{bucket}/lease") == b"mine"


def test_a_file_sent_in_pieces_is_whole_also_on_a_flaky_store(s3, bucket, monkeypatch):
    monkeypatch.setattr(storage, "UPLOAD_BYTES", 5 << 20)
    piece = bytes(range(256)) * (4 << 10)
    with s3.failing(0.3, "500", "503", "closed"), storage.open_write(f"{bucket}/large") as file:
        for _ in range(60):
            file.write(piece)
    assert s3.counts["POST"] >= 2
    monkeypatch.setattr(storage, "READ_BYTES", 7 << 20)
    with s3.failing(0.3, "500", "cut", "closed"), storage.open_read(f"{bucket}/large") as file:
        assert file.read(3) == piece[:3]
        file.seek(-3, 2)
        assert file.read() == piece[-3:]
        file.seek(0)
        assert all(file.read(len(piece)) == piece for _ in range(60))
        assert not file.read(1)


def test_a_file_sent_in_pieces_is_not_there_when_its_writer_fails(s3, bucket, monkeypatch):
    monkeypatch.setattr(storage, "UPLOAD_BYTES", 5 << 20)
    storage.put(f"{bucket}/large", b"old")

    def write_and_fail():
        with storage.open_write(f"{bucket}/large") as file:
            for _ in range(60):
                file.write(bytes(1 << 20))
            raise RuntimeError("killed")

    s3.counts.clear()
    with pytest.raises(RuntimeError, match="killed"):
        write_and_fail()
    assert s3.counts["DELETE"] == 1, "the pieces are taken back"
    assert storage.read(f"{bucket}/large") == b"old"
    assert storage.find(bucket, ("",)) == ["large"]


@pytest.mark.parametrize("fault", ["503", "429", "cut"])
def test_a_web_server_that_fails_now_and_then_is_asked_again(web, tmp_path, fault):
    for i in range(8):
        (tmp_path / "web" / f"{i}.png").write_bytes(b"image %d" % i)
    with web.failing(0.4, fault):
        assert [storage.read(f"{web.url}/{i}.png") for i in range(8)] == [b"image %d" % i for i in range(8)]
        assert storage.exists(f"{web.url}/1.png")
        assert all(storage.versions_of(web.url, ["1.png", "2.png"]))
        with storage.open_read(f"{web.url}/3.png") as file:
            assert file.read() == b"image 3"
    assert web.failed[fault]
    with pytest.raises(InputError, match=r"9\.png: no such file"):
        storage.read(f"{web.url}/9.png")


def test_a_web_server_that_stays_away_is_not_taken_for_a_missing_file(web, tmp_path, brief):
    (tmp_path / "web" / "1.png").write_bytes(b"image")
    with web.failing(1.0, "503"):
        for call in (storage.read, storage.exists):
            with pytest.raises(InputError, match=r"1\.png: cannot be read \(.*; tried for"):
                call(f"{web.url}/1.png")


def test_settings_that_are_no_seconds_are_refused(monkeypatch):
    monkeypatch.setenv("BPR_STORE_PATIENCE_S", "two")
    with pytest.raises(InputError, match="BPR_STORE_PATIENCE_S is 'two': expected seconds"):
        stores.patience_s()
