import time

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline import storage
from pipeline.records import InputError


def test_what_was_put_is_read_listed_and_removed(root):
    storage.put(f"{root}/b/two.TXT", b"2222")
    storage.put(f"{root}/one.txt", b"1")
    storage.put(f"{root}/b/two.TXT", b"again")
    assert storage.find(root, (".txt",)) == ["b/two.TXT", "one.txt"]
    assert storage.read(f"{root}/b/two.TXT") == b"again"
    assert storage.read(f"{root}/b/two.TXT", 1, 3) == b"ga"
    storage.remove(f"{root}/one.txt")
    storage.remove(f"{root}/one.txt")
    assert not storage.exists(f"{root}/one.txt")


def test_names_are_those_of_one_folder_alone(root):
    for path in ("b/two.txt", "b/one.TXT", "b/deeper/three.txt", "b/four.csv", "five.txt"):
        storage.put(f"{root}/{path}", b"1")
    assert storage.names(f"{root}/b", (".txt",)) == ["one.TXT", "two.txt"]
    assert storage.names(f"{root}/nowhere", (".txt",)) == []


def test_the_attributes_that_macos_keeps_beside_files_are_no_files_of_a_dump(root):
    for path in ("a.png", "._a.png", "b/a_pred.txt", "b/._a_pred.txt"):
        storage.put(f"{root}/{path}", b"1")
    assert storage.find(root, ("",)) == ["a.png", "b/a_pred.txt"]
    assert sorted(path for path, _ in storage.versions(root)) == ["a.png", "b/a_pred.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(root):
    storage.put(f"{root}/x.bin", b"old")

    def write_and_fail():
        with storage.open_write(f"{root}/x.bin") as file:
            file.write(b"new")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_and_fail()
    assert storage.read(f"{root}/x.bin") == b"old"
    assert storage.find(root, ("",)) == ["x.bin"]


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path):
    storage.put(f"{tmp_path}/{'x' * 255}", b"1")
    assert storage.read(f"{tmp_path}/{'x' * 255}") == b"1"
    assert not storage.exists(f"{tmp_path}/{'x' * 256}")
    with pytest.raises(OSError, match=f"too long: '{tmp_path}/x+'$"):
        storage.put(f"{tmp_path}/{'x' * 256}", b"1")
    assert storage.find(str(tmp_path), ("",)) == ["x" * 255]


def test_a_missing_file_or_folder_is_named(root):
    with pytest.raises(InputError, match=r"nowhere\.png: no such file"):
        storage.read(f"{root}/nowhere.png")
    with pytest.raises(InputError, match="nowhere: expected a folder"):
        storage.find(f"{root}/nowhere", (".png",))


@pytest.mark.parametrize("url", ["memory://bucket/images", "relative/images"])
def test_a_folder_is_the_same_with_and_without_a_slash_at_its_end(url):
    assert storage.absolute(f"{url}/") == storage.absolute(url)
    assert storage.absolute("memory://") == "memory://"


@pytest.mark.parametrize("relative", ["../x.png", "/etc/passwd", "a/../../x", "..\\x.png", "", "s3://b/x", "a\0b"])
def test_a_path_that_leaves_its_folder_is_refused(relative):
    with pytest.raises(InputError, match="expected a path that stays below"):
        storage.join("/data/predictions", relative)


def test_a_version_is_another_once_a_file_was_written_anew(root):
    for name in ("a.txt", "b/c.txt"):
        storage.put(f"{root}/{name}", b"12")
    before = dict(storage.versions(root))
    assert set(before) == {"a.txt", "b/c.txt"}
    assert storage.versions_of(root, ["b/c.txt", "nowhere", "a.txt"]) == [before["b/c.txt"], "", before["a.txt"]]
    assert storage.versions_of(f"{root}/a.txt", [""]) == [before["a.txt"]]
    time.sleep(0.01)
    storage.put(f"{root}/a.txt", b"34")
    after = dict(storage.versions(root))
    assert after["a.txt"] != before["a.txt"]
    assert after["b/c.txt"] == before["b/c.txt"]


@pytest.fixture
def version(monkeypatch):
    """The version of a file of which a store tells its size, 5, and what is given."""

    def of(**told):
        monkeypatch.setattr(MemoryFileSystem, "info", lambda *_: {"size": 5, **told})
        return storage.versions_of("memory://store", ["a.txt"])[0]

    return of


@pytest.mark.parametrize("name", ["mtime", "modificationTime", "modify"])
def test_the_time_of_a_change_is_known_by_all_its_names(version, name):
    assert version(**{name: 17}) == "5:17"


def test_a_file_of_which_a_store_tells_neither_tag_nor_time_is_never_the_same_as_before(version):
    assert version() != version()


def test_the_version_of_a_link_is_that_of_the_file_it_leads_to(tmp_path):
    (tmp_path / "file").write_bytes(b"12")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "broken").symlink_to("nowhere")
    found = dict(storage.versions(str(tmp_path)))
    assert found["link"] == found["file"] != found["broken"] == ""


def test_a_file_is_created_once(root):
    assert storage.create(f"{root}/new", b"first")
    assert not storage.create(f"{root}/new", b"second")
    assert storage.read(f"{root}/new") == b"first"
    assert storage.find(root, ("",)) == ["new"]


def test_what_a_killed_writer_has_left_is_swept_and_nothing_else(tmp_path):
    left = tmp_path / "a" / f"x.png.{'0a' * 16}.tmp"
    left.parent.mkdir()
    kept = [tmp_path / "a" / "x.png", tmp_path / "notes.tmp", tmp_path / f"{'0a' * 16}.tmp.png"]
    for path in (left, *kept):
        path.write_bytes(b"")
    storage.sweep_temporary(str(tmp_path))
    assert not left.exists()
    assert all(path.exists() for path in kept)


def test_an_output_below_another_is_not_swept_with_it(tmp_path):
    other = tmp_path / "inner" / "x.0123456789abcdef0123456789abcdef.tmp"
    (other.parent / "_ledger").mkdir(parents=True)
    other.touch()
    storage.sweep_temporary(str(tmp_path))
    assert other.exists()
    storage.sweep_temporary(str(other.parent))
    assert not other.exists()


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"x\.png") as error, storage.open_write(str(tmp_path / "x.png")):
        raise OSError(28, "No space left on device")
    assert error.value.errno == 28
    assert list(tmp_path.iterdir()) == []
