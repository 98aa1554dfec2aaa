import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("model", "pipeline", "jobs")
UPWARDS = {("refiner.py", "pipeline.stages"), ("refiner.py", "pipeline.guard")}
"""`Refiner.refine` takes whole masks, and so calls the stages."""
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def _imports(path):
    """(module, whether at the top of the file) of every import."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            yield name, node in tree.body


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_from_jobs_to_pipeline_to_model_and_never_back(path):
    room = ROOMS.index(path.relative_to(ROOT).parts[0])
    for name, _ in _imports(path):
        imported = name.split(".")[0]
        if imported in ROOMS and (path.name, name) not in UPWARDS:
            assert ROOMS.index(imported) <= room, f"{path.name} imports {name}"


def test_only_the_flow_training_and_the_benchmark_know_ray():
    knowing = {
        str(path.relative_to(ROOT)) for path in FILES if any(name.split(".")[0] == "ray" for name, _ in _imports(path))
    }
    flow = {f"pipeline/flow/{name}.py" for name in ("in_workers", "metrics", "on_ray", "session")}
    assert knowing == {*flow, "pipeline/training_on_ray.py", "pipeline/benchmark/scale.py"}


@pytest.mark.parametrize(
    "name",
    ["stages", "work", "images", "guard", "patches", "proposals", "records", "formats/cityscapes", "formats/coco"],
)
def test_torch_stays_out_of_the_processes_that_only_cut_and_paste(name):
    path = ROOT / "pipeline" / f"{name}.py"
    assert not any(module.split(".")[0] in ("torch", "model") for module, top in _imports(path) if top)
