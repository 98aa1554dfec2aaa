"""Which library runs the network on a CPU; neither torch nor OpenVINO is loaded to tell."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

Backend = Literal["auto", "torch", "openvino"]


def resolve_backend(backend: Backend, device_type: str = "cpu") -> Literal["torch", "openvino"]:
    """The backend behind `auto` on a device: OpenVINO on a CPU where it is installed, torch everywhere else.

    Raises ValueError where OpenVINO is asked for but not installed, or not on a CPU.
    """
    if backend == "openvino" and device_type != "cpu":
        raise ValueError(f"backend is 'openvino' on device '{device_type}': expected a CPU; elsewhere 'torch' runs")
    if backend == "torch" or device_type != "cpu":
        return "torch"
    try:
        version("openvino")
    except PackageNotFoundError:
        if backend == "openvino":
            raise ValueError("backend is 'openvino', which is not installed: pip install 'bpr-ray[openvino]'") from None
        return "torch"
    return "openvino"
