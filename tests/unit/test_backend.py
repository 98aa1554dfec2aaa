from importlib.metadata import PackageNotFoundError

import pytest

from model import backend
from model.backend import resolve_backend


@pytest.fixture
def machine(monkeypatch):
    """Lets a machine have some libraries and programs and no others."""

    def has(*names):
        def version(name):
            if name not in names:
                raise PackageNotFoundError(name)

        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(backend, "version", version)
        monkeypatch.setattr(backend.shutil, "which", lambda name: name if name in names else None)

    return has


def test_each_device_has_a_library_of_its_own(machine):
    machine("openvino", "triton", "gcc")
    assert resolve_backend("auto") == "openvino"
    assert resolve_backend("auto", "cuda") == "triton"
    assert resolve_backend("auto", "mps") == "torch"
    assert {resolve_backend("torch", device) for device in ("cpu", "cuda", "mps")} == {"torch"}


@pytest.mark.parametrize("names", [(), ("triton",)])
def test_torch_runs_where_the_others_cannot(machine, names):
    machine(*names)
    assert resolve_backend("auto") == "torch"
    assert resolve_backend("auto", "cuda") == "torch"


def test_who_asks_for_a_library_that_cannot_run_is_told_what_lacks(machine, monkeypatch, tmp_path):
    machine()
    with pytest.raises(ValueError, match="not installed: pip install"):
        resolve_backend("openvino")
    with pytest.raises(ValueError, match="not installed: it comes with torch"):
        resolve_backend("triton", "cuda")
    machine("triton")
    with pytest.raises(ValueError, match="needs a C compiler: install gcc"):
        resolve_backend("triton", "cuda")
    machine("triton", "gcc")
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="needs Python's headers"):
        resolve_backend("triton", "cuda")


def test_a_library_that_is_none_of_ours_is_refused():
    with pytest.raises(ValueError, match="backend is 'onnx': expected one of auto, torch, openvino, triton"):
        resolve_backend("onnx")


@pytest.mark.parametrize(
    ("name", "device", "expected"), [("openvino", "cuda", "a CPU"), ("triton", "cpu", "a CUDA device")]
)
def test_a_library_of_another_device_is_refused(name, device, expected):
    with pytest.raises(ValueError, match=f"'{device}': expected {expected}"):
        resolve_backend(name, device)
