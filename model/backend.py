"""Which library runs the network; none of them is loaded to tell."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

Backend = Literal["auto", "torch", "openvino", "triton"]

_INSTALL = {"openvino": "pip install 'bpr-ray[openvino]'", "triton": "it comes with torch for CUDA"}


def resolve_backend(backend: Backend, device_type: str = "cpu") -> Literal["torch", "openvino", "triton"]:
    """The backend behind `auto` on a device, where it can run: OpenVINO on a CPU, Triton on a GPU, else torch.

    Triton also needs a C compiler. Raises ValueError for a backend that is asked for and is of another device or
    cannot run.
    """
    fast = {"cpu": "openvino", "cuda": "triton"}.get(device_type, "torch")
    if backend not in ("auto", "torch", fast):
        kind = "a CPU" if backend == "openvino" else "a CUDA device"
        raise ValueError(f"backend is '{backend}' on device '{device_type}': expected {kind}; elsewhere 'torch' runs")
    if backend == "torch" or fast == "torch":
        return "torch"
    missing = _what_lacks(fast)
    if missing and backend != "auto":
        raise ValueError(f"backend is '{backend}', {missing}")
    return "torch" if missing else fast


def _what_lacks(backend: str) -> str:
    try:
        version(backend)
    except PackageNotFoundError:
        return f"which is not installed: {_INSTALL[backend]}"
    if backend == "triton" and not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))):
        return "which needs a C compiler: install gcc, or name one by CC"
    return ""
