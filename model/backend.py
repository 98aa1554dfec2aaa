"""Which library runs the network, and in which precision; none of them is loaded to tell."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

Backend = Literal["auto", "torch", "openvino", "triton"]

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_INSTALL = {"openvino": "pip install 'bpr-ray[openvino]'", "triton": "it comes with torch for CUDA"}


class UnsupportedError(ValueError):
    """A backend, precision or batch size that cannot be had here; the message says what was expected."""


def resolve_backend(backend: Backend, device_type: str = "cpu") -> Literal["torch", "openvino", "triton"]:
    """The backend behind `auto` on a device, where it can run: OpenVINO on a CPU, Triton on a GPU, else torch.

    Triton also needs a C compiler and Python's headers. Raises UnsupportedError for a backend that is asked for and is
    of another device or cannot run.
    """
    if backend not in get_args(Backend):
        raise UnsupportedError(f"backend is {backend!r}: expected one of {', '.join(get_args(Backend))}")
    fast = {"cpu": "openvino", "cuda": "triton"}.get(device_type, "torch")
    if backend not in ("auto", "torch", fast):
        kind = "a CPU" if backend == "openvino" else "a CUDA device"
        raise UnsupportedError(
            f"backend is '{backend}' on device '{device_type}': expected {kind}; elsewhere 'torch' runs"
        )
    if backend == "torch" or fast == "torch":
        return "torch"
    missing = _what_lacks(fast)
    if missing and backend != "auto":
        raise UnsupportedError(f"backend is '{backend}', {missing}")
    return "torch" if missing else fast


def _what_lacks(backend: str) -> str:
    try:
        version(backend)
    except PackageNotFoundError:
        return f"which is not installed: {_INSTALL[backend]}"
    if backend == "triton":
        # It builds the launchers of its kernels when they are first used.
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "which needs a C compiler: install gcc, or name one by CC"
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            return "which needs Python's headers: install python3-dev"
    return ""
