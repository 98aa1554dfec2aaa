"""The Dockerfile, read instruction by instruction; that its steps install what works is test_wheel.py's."""

from __future__ import annotations

import re
from fnmatch import fnmatch

from tests.deploy.heads import ROOT

TEXT = (ROOT / "deploy" / "Dockerfile").read_text()


def _instructions() -> list[tuple[str, str]]:
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


def _stages() -> list[list[tuple[str, str]]]:
    stages: list[list[tuple[str, str]]] = []
    for name, rest in _instructions():
        if name == "FROM":
            stages.append([])
        if stages:
            stages[-1].append((name, rest))
    return stages


def test_the_image_holds_what_an_earlier_stage_has_built_and_runs_as_no_root():
    build, image = _stages()
    assert build[0][1].endswith(" AS build")
    assert [rest for name, rest in image if name == "COPY"] == ["--from=build /opt/bpr /opt/bpr"]
    assert not [rest for name, rest in image if name == "RUN" and "pip" in rest]
    assert [rest for name, rest in image if name == "USER"] == ["1000:1000"]
    # Nothing after it goes back to root.
    assert "useradd --uid 1000 " in next(rest for name, rest in image if name == "RUN")


def test_one_argument_chooses_between_cpu_and_cuda():
    build, _ = _stages()
    assert ("ARG", "TORCH_INDEX=https://download.pytorch.org/whl/cpu") in build
    installed = [rest for name, rest in build if name == "RUN" and "${TORCH_INDEX}" in rest]
    assert len(installed) == 1
    assert "--requirement deploy/requirements.txt" in installed[0]
    assert "--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu" in TEXT


def test_everything_copied_is_in_the_repository_and_not_ignored():
    rules = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().split()
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = set()
    for name, rest in _stages()[0]:
        if name == "COPY":
            copied |= set(rest.split()[:-1])
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    assert not any(fnmatch(source, rule) for source in copied for rule in rules[1:] if not rule.startswith("!"))


def test_python_and_the_console_scripts_are_on_the_path_of_every_shell():
    _, image = _stages()
    assert "PATH=/opt/bpr/bin:$PATH" in next(rest for name, rest in image if name == "ENV")
    assert any("'export PATH=/opt/bpr/bin:$PATH' > /etc/profile.d/" in rest for name, rest in image if name == "RUN")
