"""The settings behind every flag of a job; a YAML file gives them, flags override it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

import tyro
import yaml

from model.backend import Precision
from pipeline import storage
from pipeline.bounds import check_bounds, check_nms_threshold
from pipeline.guard import GuardConfig
from pipeline.limits import LimitsConfig
from pipeline.proposals import PATCH_PX
from pipeline.records import InputError
from pipeline.run_log import LogFormat

Config = TypeVar("Config")

Format = Literal["cityscapes", "coco", "parquet"]

Device = Literal["auto", "cpu", "gpu"]

Quality = Literal["fast", "default", "best"]

NMS_THRESHOLDS: dict[Quality, dict[str, float]] = {
    "fast": {"cityscapes": 0.25, "coco": 0.15, "parquet": 0.15},
    "default": {"cityscapes": 0.55, "coco": 0.25, "parquet": 0.25},
    "best": {"cityscapes": 0.55, "coco": 0.35, "parquet": 0.35},
}
"""IoU above which one patch suppresses another; `default` is what the reference takes for each kind of data set."""

MAX_PATCH_PX = 4096
"""Largest side of a patch with its padding; of larger ones a few would not fit the memory."""

MAX_BATCH = 65_536
"""Most patches of a batch; more would not fit the memory of any GPU."""

MAX_BLOCK_FRAMES = 512
"""Most frames of a block: it may take so many times `limits.seconds`, and operating systems do not wait much longer."""


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """Refine the instance masks of a whole dump.

    Settings may also come from a YAML file, named first: `jobs/refine.py nightly.yaml --limit 100`.
    """

    predictions: str
    """The coarse masks: a Cityscapes folder, a COCO results json, or Parquet; any fsspec URL."""
    images: str
    """The folder the images lie in, flat or by city; any fsspec URL."""
    output: str
    """The folder for the refined dump; running again with the same output does only what is missing or has changed."""
    format: Format | Literal["auto"] = "auto"
    """Form of the predictions; `auto` tells it by what is there."""
    output_format: Format | Literal["same"] = "same"
    """Form of the output; `same` is the input's."""
    image_list: str | None = None
    """COCO only: a json whose `images` give each image_id its file_name (annotations are not needed)."""
    image_pattern: str | None = None
    """COCO only: the file name as a pattern, for example '{image_id:012d}.jpg', instead of a list."""
    checkpoint: str = "hrnet18s_128"
    """Bundled weights by name, our .safetensors, or the reference's .pth; any fsspec URL."""
    quality: Quality = "default"
    """How many patches to spend: `fast` saves a quarter (Cityscapes: half), `best` takes a third more (there: none)."""
    nms_threshold: float | None = None
    """Patches that overlap more than this IoU are thinned out; by default as `quality` says."""
    patch_size: int = PATCH_PX
    """Side of a patch in frame pixels; the published checkpoints expect 64."""
    padding: int = 0
    """Context added around each patch on every side, in frame pixels."""
    parity: bool = False
    """As the reference, with its slips at the right and bottom border, no guard, fp32; equal proposals row-major."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    precision: Precision = "auto"
    """Arithmetic of the network; `auto` is fp16 on a GPU, bf16 on a CPU that computes in it, else fp32."""
    backend: Literal["auto", "torch", "openvino"] = "auto"
    """What runs the network; `auto` is OpenVINO on a CPU and Triton beside torch on a GPU, where installed."""
    batch_size: int | None = None
    """Patches per network batch; the default suits the device."""
    frames_per_block: int | None = None
    """Frames that travel and are committed together; by default as many as have about 1,000 patches, more on GPUs."""
    workers: int | None = None
    """Network processes at most; default one per GPU, or one per machine without any."""
    device: Device = "auto"
    """What they compute on; `auto` is GPUs where the cluster has some now, `gpu` also waits for an autoscaler's."""
    refine_label: str | None = None
    """Only machines with this label, as in `bpr-role=refine`, run network processes."""
    extract_label: str | None = None
    """Only machines with this label, as in `bpr-role=extract`, read, cut, paste and write."""
    gpus_per_worker: float = 1.0
    """GPUs (or a share of one) for each network process, where the cluster has GPUs."""
    placement: Literal["auto", "spread", "fused"] = "auto"
    """Where reading and writing happen: on all CPUs of the cluster, or beside the network in helper processes."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    local: bool = False
    """Run on this machine, without Ray."""
    log_format: LogFormat = "text"
    """What goes to the log: lines for people, or one json object a line with run id, event, and frame id."""
    limit: int | None = None
    """Only the first so many frames of the dump."""
    strict: bool = False
    """Exit with an error if any frame was set aside, not only if all were."""
    prune: bool = False
    """Remove the outputs of frames that earlier runs have finished and the dump does not have any more."""
    restart: bool = False
    """Forget what earlier runs on the output have done, also under other settings, and refine every frame anew."""

    def settled(self) -> RefineConfig:
        """The same settings, with what `parity` decides: no guard, and fp32 unless something else is asked for."""
        if not self.parity:
            return self
        precision = "fp32" if self.precision == "auto" else self.precision
        return replace(self, guard=GuardConfig(enabled=False), precision=precision)

    def threshold(self, form: Format) -> float:
        """The NMS threshold for predictions of a form."""
        return NMS_THRESHOLDS[self.quality][form] if self.nms_threshold is None else self.nms_threshold

    def __post_init__(self) -> None:
        if self.nms_threshold is not None:
            check_nms_threshold(self.nms_threshold)
        check_patch_size(self.patch_size, self.padding)
        if not 0 < self.gpus_per_worker < math.inf or (self.gpus_per_worker > 1 and self.gpus_per_worker % 1):
            raise InputError(f"gpus_per_worker is {self.gpus_per_worker}: expected a number above 0, whole above 1")
        check_bounds(self, "batch_size", 1, MAX_BATCH)
        check_bounds(self, "frames_per_block", 1, MAX_BLOCK_FRAMES)
        check_bounds(self, "workers", 1)
        check_bounds(self, "limit", 1)


def check_patch_size(patch_size: int, padding: int) -> None:
    """Raise InputError for patches that are too small to refine, or too large to hold in memory."""
    for name, value, least in (("patch_size", patch_size, 8), ("padding", padding, 0)):
        if value < least:
            raise InputError(f"{name} is {value}: expected at least {least}")
    if patch_size + 2 * padding > MAX_PATCH_PX:
        raise InputError(
            f"patch_size is {patch_size} and padding {padding}: expected at most {MAX_PATCH_PX} px on a side together"
        )


def parse(config_class: type[Config], arguments: list[str]) -> Config:
    """A job's settings from its command line; a first argument ending in .yaml or .yml is read as if it were flags.

    A nested group of settings is a mapping in the file. Raises InputError for a file that is not a mapping of known
    settings, SystemExit for wrong flags and for --help.
    """
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        path = arguments[0]
        content = storage.read(path)
        try:
            settings = yaml.load(content, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # of values such as 09, and of endless nesting
            hint = "; a value with braces needs quotes around it" if b"{" in content else ""
            raise InputError(f"{path}: not YAML ({' '.join(str(error).split())}){hint}") from None
        arguments = [*_flags(path, config_class, settings), *arguments[1:]]
    return tyro.cli(config_class, args=arguments)


def with_absolute(config: Config, *names: str) -> Config:
    """The same settings with the paths of these names, as far as they are given, meaning the same in every process.

    InputError where one is empty, as of a shell's variable that is not set: it would name this folder, or the root.
    """
    given = {name: url for name in names if (url := getattr(config, name)) is not None}
    for name, url in given.items():
        if not url:
            raise InputError(f"{name} is empty: expected a path or URL")
    return replace(config, **{name: storage.absolute(url) for name, url in given.items()})


class _Loader(yaml.SafeLoader):
    """Takes no key twice, and does without YAML 1.1's integers to the base of 60, by which `2:8` would be 128."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, re.compile(r"[-+]?[0-9]+$") if tag.endswith(":int") else pattern) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            name = str(key.value).replace("-", "_")
            if name in names:
                raise yaml.YAMLError(f"{key.value} is given twice, again in line {key.start_mark.line + 1}")
            names.add(name)
        return super().construct_mapping(node, deep)


def _flags(path: str, config_class: type, settings: Any, group: str = "") -> list[str]:
    if not isinstance(settings, dict):
        place = f" under {group.rstrip('.')}" if group else ""
        raise InputError(f"{path}: expected a mapping of settings{place}, got {type(settings).__name__}")
    known = get_type_hints(config_class)
    flags = []
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in known:
            first, _, rest = name.partition(".")
            if rest and is_dataclass(known.get(first)):
                raise InputError(f"{path}: unknown setting '{group}{key}'; write {first}: with {rest}: below it")
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {group}{near[0]}?" if near else f"known are {', '.join(known)}"
            raise InputError(f"{path}: unknown setting '{group}{key}'; {hint}")
        flag = group + name.replace("_", "-")
        if is_dataclass(known[name]):
            flags += _flags(path, known[name], value, f"{flag}.")
        elif known[name] is bool:
            if not isinstance(value, bool):
                raise InputError(f"{path}: {group}{key} is {value!r}: expected true or false")
            flags.append(f"--{flag}" if value else f"--{group}no-{name.replace('_', '-')}")
        elif any(isinstance(one, dict | list) for one in (value if isinstance(value, list) else [value])):
            raise InputError(f"{path}: {group}{key} is {value!r:.80}: expected a plain value")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{flag}={value}")
    return flags
