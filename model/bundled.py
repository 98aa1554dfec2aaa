"""The weights that ship with the package, by name; torch stays out, so that a path can be told without it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this network; the message names the file and the first wrong key."""


def bundled() -> dict[str, Path]:
    """Names and paths of the weights that ship with the package."""
    folder = Path(str(resources.files("model") / "weights"))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def missing(path_or_name: str) -> str:
    """The error line on a checkpoint that is neither a file nor a bundled name."""
    known = ", ".join(bundled()) or "none"
    return f"{path_or_name}: no such checkpoint file, nor bundled weights (bundled: {known})"


def resolve(path_or_name: str) -> str:
    """The path behind a bundled name such as `hrnet18s_128`; anything else is taken as a path and returned as it is."""
    return str(bundled().get(path_or_name, path_or_name))
