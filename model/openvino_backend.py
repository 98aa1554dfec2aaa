"""The folded network as an OpenVINO model: the same function, about 1.3 times as fast as torch on a CPU.

The graph is built from the network's own operations: nothing is traced, exported or cached, and it is ready in a
second.
"""

from __future__ import annotations

import operator
import sys
from functools import lru_cache
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import fx, nn

from model.backend import UnsupportedError
from model.hrnet import RefinementNetwork, output_resize
from model.preprocess import MEAN_RGB, STD_RGB, resize_patches

if TYPE_CHECKING:
    import openvino

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def _openvino() -> Any:
    """The library, without what it does on import otherwise: report its use to its maker over the network."""
    reporting = "openvino_telemetry"
    silenced = "openvino" not in sys.modules and sys.modules.setdefault(reporting, None) is None  # type: ignore[arg-type]
    try:
        import openvino
        import openvino.opset13
    finally:
        if silenced:
            del sys.modules[reporting]
    return openvino


@lru_cache(maxsize=1)
def _core() -> openvino.Core:
    """The one of this process, which never ends.

    One that ended on another thread than it began on would take the stack with it on which the latter's signal handlers
    run: the next Ctrl-C, or end of a child, would be a segmentation fault.
    """
    return _openvino().Core()


class _AsOpenVino(fx.Interpreter):
    """Runs the folded network on OpenVINO's nodes in place of tensors, which makes its graph."""

    def __init__(self, network: RefinementNetwork) -> None:
        super().__init__(fx.symbolic_trace(network))
        self.ops = _openvino().opset13

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        if isinstance(layer, nn.Identity):
            return args[0]
        if isinstance(layer, nn.ReLU):
            return self.ops.relu(args[0])
        assert isinstance(layer, nn.Conv2d), f"{target}: {type(layer).__name__} has no OpenVINO form here"
        weight = self.ops.constant(layer.weight.float().numpy())
        out = self.ops.convolution(args[0], weight, layer.stride, layer.padding, layer.padding, layer.dilation)
        if layer.bias is None:
            return out
        return self.ops.add(out, self.ops.constant(layer.bias.float().numpy()[None, :, None, None]))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is F.relu:
            return self.ops.relu(args[0])
        if target in (operator.add, operator.iadd):
            return self.ops.add(*args)
        if target is F.interpolate:
            return self.ops.interpolate(
                args[0],
                np.array(kwargs["size"], np.int64),
                "linear_onnx",
                "sizes",
                coordinate_transformation_mode="half_pixel",
                axes=np.array([2, 3], np.int64),
            )
        if target is getattr and args[1] == "shape":
            return tuple(args[0].output(0).shape)
        assert target is operator.getitem, f"{target} has no OpenVINO form here"
        return operator.getitem(*args)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert target == "add_", f"Tensor.{target} has no OpenVINO form here"
        return self.ops.add(*args)


def as_openvino(network: RefinementNetwork, batch_size: int, patch_px: int) -> openvino.Model:
    """A folded network with all around it: resized patches (N, S, S, 4) uint8 to probabilities (N, P, P) uint16.

    N is `batch_size`, S the network's input side, P `patch_px`. Normalisation, output resize, sigmoid and fixed point
    (65535 = 1) are part of the model.
    """
    ov, as_nodes = _openvino(), _AsOpenVino(network)
    ops, side = as_nodes.ops, network.config.input_px
    patches = ops.parameter([batch_size, side, side, 4], np.uint8, name="patches")
    centred = ops.subtract(ops.convert(patches, np.float32), ops.constant(np.float32([*MEAN_RGB, 0.5])))
    normalised = ops.divide(centred, ops.constant(np.float32([*STD_RGB, 0.5])))
    logits = as_nodes.run(ops.transpose(normalised, np.array([0, 3, 1, 2])))
    resize = ops.constant(output_resize(side, patch_px).numpy())
    resized = ops.matmul(ops.matmul(resize, logits, False, False), resize, False, True)
    probability = ops.sigmoid(ops.squeeze(resized, np.array([1])))
    fixed_point = ops.round(ops.multiply(probability, ops.constant(np.float32(65535))), "half_to_even")
    return ov.Model([ops.convert(fixed_point, np.uint16)], [patches], network.config.name)


def can_calculate_in(precision: str) -> bool:
    """Whether OpenVINO can on this CPU, be it by emulation."""
    return precision == "fp32" or precision.upper() in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoNetwork:
    """A folded network compiled for this CPU, for as many callers at once as it has threads.

    Every batch runs on one thread, whatever their number. In fp32 the probabilities are within 1e-4 of torch's; on CPUs
    of one kind they do not depend on a patch's place or company in the batch, the batch size, or the number of threads.
    """

    def __init__(self, network: RefinementNetwork, precision: str, batch_size: int, threads: int) -> None:
        self.network, self.batch_size = network, batch_size
        if not can_calculate_in(precision):
            possible = " or ".join(filter(can_calculate_in, HINTS))
            raise UnsupportedError(
                f"precision is '{precision}', in which this CPU cannot calculate: expected {possible}"
            )
        self.settings = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "NUM_STREAMS": threads,
            "INFERENCE_NUM_THREADS": threads,
            # Processes that share a machine would all be pinned to its first cores.
            "ENABLE_CPU_PINNING": False,
        }
        self.requests: dict[int, SimpleQueue[openvino.InferRequest]] = {}
        """By the patches' side, what the threads take turns with; each has memory of its own."""

    def prepare(self, patch_px: int) -> None:
        """Compile for patches of this side, where that was not done yet."""
        if patch_px not in self.requests:
            model = as_openvino(self.network, self.batch_size, patch_px)
            compiled = _core().compile_model(model, "CPU", self.settings)
            requests: SimpleQueue[openvino.InferRequest] = SimpleQueue()
            for _ in range(self.settings["NUM_STREAMS"]):
                requests.put(compiled.create_infer_request())
            self.requests[patch_px] = requests

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Probabilities (N, P, P) uint16 of one full batch (N, P, P, 4) uint8, P having been prepared for."""
        requests = self.requests[patches.shape[1]]
        request = requests.get()
        try:
            request.infer([resize_patches(patches, self.network.config.input_px)], share_inputs=True)
            return request.get_output_tensor(0).data.copy()
        finally:
            requests.put(request)
