import ast
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import tyro
import yaml

from pipeline import config as job_config
from tests.docs.pages import PAGES, ROOT, anchors, blocks, commands, fragments, links

FRAGMENTS = {page: fragments(page) for page in PAGES}
COMMANDS = {page: found for page in PAGES if (found := [*commands(page), *FRAGMENTS[page]])}
SETTINGS = [
    path
    for room in ("jobs", "pipeline", "model")
    for path in sorted((ROOT / room).rglob("*.py"))
    if "Config:\n" in path.read_text()
]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Parsed(BaseException):
    """A job's command line was understood; nothing of the job is run."""


@pytest.fixture
def only_parsing(monkeypatch):
    real = tyro.cli

    def cli(*arguments, **settings):
        real(*arguments, **settings)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", cli)
    # The YAML files of the pages are not there.
    settings = b"{predictions: p, images: i, output: o}"
    monkeypatch.setattr(job_config.storage, "read", lambda url: settings)


def _said(job: str, words: list[str], monkeypatch, capsys) -> str | None:
    """What a job says of a command line that it does not take, or of `--help`; None where it takes it."""
    module = importlib.import_module(f"jobs.{job}")
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *words])
    with pytest.raises((Parsed, SystemExit)) as ended:
        module.main()
    text = "".join(capsys.readouterr())
    return None if ended.type is Parsed else text


@pytest.mark.parametrize("page", COMMANDS, ids=_name)
def test_every_command_of_a_page_is_one_that_its_job_takes(page, only_parsing, monkeypatch, capsys):
    for script, *words in COMMANDS[page]:
        assert (ROOT / script).is_file(), f"{script} is not there"
        folder, job = script.removesuffix(".py").split("/")
        given = [word for word in words if word != "..."]
        if folder == "examples" or not given:
            continue
        said = _said(job, given, monkeypatch, capsys)
        # What stands for more, or is a part of a command, leaves out what the job needs; but names nothing it lacks.
        if said is not None and "Required options" in said and (words != given or [script, *words] in FRAGMENTS[page]):
            continue
        assert said is None, f"{script} {' '.join(words)}: {said}"


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag of every job."""
    found: set[str] = set()
    for path in sorted((ROOT / "jobs").glob("*.py")):
        if path.name != "__init__.py":
            job = importlib.import_module(f"jobs.{path.stem}")
            helped = io.StringIO()
            with pytest.MonkeyPatch.context() as patch, redirect_stdout(helped):
                patch.setattr(sys, "argv", [path.name, "--help"])
                with pytest.raises(SystemExit):
                    job.main()
            found |= set(re.findall(r"--[\w.-]*\w", helped.getvalue()))
    return found


@pytest.mark.parametrize(("job", "place"), [("status", "OUTPUT"), ("convert", "INPUT")])
def test_help_names_what_a_job_takes_without_a_flag(job, place, only_parsing, monkeypatch, capsys):
    usage = (_said(job, ["--help"], monkeypatch, capsys) or "").partition("\n\n")[0]
    assert place in usage


@pytest.mark.parametrize("source", SETTINGS, ids=_name)
def test_what_help_says_of_a_flag_is_one_line_in_the_source_as_help_keeps_its_breaks(source):
    for settings in ast.walk(ast.parse(source.read_text())):
        if isinstance(settings, ast.ClassDef) and settings.name.endswith("Config"):
            said = [node.value.value for node in settings.body if isinstance(node, ast.Expr)]
            assert [one for one in said[1:] if "\n" in one] == []


FOREIGN = {"--metrics-export-port", "--runtime-env", "--runtime-env-json", "--shm-size"}
"""Flags of Ray and Docker that the pages speak of."""


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_flag_that_a_page_speaks_of_is_one_of_a_job(page, flags):
    spoken = set(re.findall(r"(?:`|#[^\n]*?)(--[\w.-]*\w)", page.read_text()))
    assert spoken - flags - FOREIGN == set()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_within_the_repository_leads_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(file), f"{path or page.name} has no heading {anchor}"


def test_every_room_the_architecture_names_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:jobs|pipeline|model|examples|tests)/[\w/.]*)`", text)
    assert len(named) > 15
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = {path for entry in nav for path in entry.values()}
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    loaded = re.findall(
        r'(?:src|href)="(https?://[^"]+)"[^>]*(?:rel="stylesheet"|></script>)',
        (tmp_path / "site" / "index.html").read_text(),
    )
    assert loaded == []


@pytest.mark.slow
def test_the_quickstart_runs_as_it_is_written(tmp_path):
    pytest.importorskip("skimage", reason="its photographs are those of the demo")
    lines = [line for block in blocks(ROOT / "docs" / "index.md", "sh") for line in block.splitlines()]
    assert len(lines) >= 6
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for line in lines:
        words = line.split()
        assert words[0] == "python"
        command = [sys.executable, str(ROOT / words[1]), *words[2:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    assert (tmp_path / "demo" / "report.html").is_file()
    assert (tmp_path / "evaluation" / "report.html").is_file()
    assert "with_pandas" in done.stdout


def test_make_takes_a_python_that_is_supported_before_a_newer_one(tmp_path):
    for name in ("python3", "python3.12", "python3.14"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    command = [shutil.which("make"), "--dry-run", "demo", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path}/python3.12 -m venv {tmp_path}/venv\n")
