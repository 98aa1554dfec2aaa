"""The project as a wheel, in an environment of its own and away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.deploy.heads import ROOT

pytestmark = pytest.mark.slow

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "jobs", "model", "pipeline")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def _run(*command: str | Path, cwd: Path) -> str:
    # Without what would let Python find the checkout.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | {"RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: setuptools would leave its folders among them."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={built}", source, cwd=source)
    (found,) = built.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that holds the wheel.

    The dependencies are those of the running tests, found through a .pth file. Python reads no .pth files in the
    folders that one names, so that the checkout installed for development stays out.
    """
    root = tmp_path_factory.mktemp("environment")
    _run(sys.executable, "-m", "venv", "--without-pip", root, cwd=root)
    python = root / "bin" / "python"
    _run(sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index", wheel, cwd=root)
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=root).strip())
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(ours) + "\n")
    return root / "bin"


def test_the_wheel_holds_code_and_weights_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"bpr_ray", "jobs", "model", "pipeline"}
    assert {"model/weights/hrnet18s_128.safetensors", "model/py.typed", "pipeline/py.typed"} <= set(names)
    for room in ("jobs", "model", "pipeline"):
        missing = {str(path.relative_to(ROOT)) for path in (ROOT / room).rglob("*.py")} - set(names)
        assert not missing
    assert wheel.stat().st_size < 20e6


def test_its_modules_are_its_own_and_not_the_checkouts(installed, tmp_path):
    found = _run(installed / "python", "-c", "import jobs, pipeline, model; print(model.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(installed.parent)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_console_script_tells_its_flags(installed, tmp_path, script):
    assert "usage:" in _run(installed / script, "--help", cwd=tmp_path).lower()


def test_the_demo_runs_in_an_empty_folder(installed, tmp_path):
    printed = _run(installed / "python", "-m", "jobs.demo", "--output", "out", cwd=tmp_path)
    assert "5 refined now, 0 before, 0 set aside" in printed
    assert (tmp_path / "out" / "report.html").stat().st_size > 1e5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
