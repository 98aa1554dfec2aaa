"""docs/cluster.md promises tests and files by name: they have to be there."""

from __future__ import annotations

import re

from tests.deploy.heads import ROOT

PAGE = (ROOT / "docs" / "cluster.md").read_text()


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    defined = {
        name
        for path in (ROOT / "tests" / "deploy").glob("*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert named
    assert named <= defined


def test_every_file_that_the_page_names_exists():
    named = set(re.findall(r"(?:deploy|tests|jobs)/[\w./-]+\.(?:ya?ml|py|txt)", PAGE))
    assert len(named) > 8
    assert not {name for name in named if not (ROOT / name).exists()}
