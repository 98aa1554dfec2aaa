"""The pages of the documentation and what is written in them: commands, and links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "model" / "weights").glob("*.md")),
]

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, *languages: str) -> list[str]:
    """What stands between fences of these languages, lines that end in a backslash joined with the next."""
    found = _FENCE.findall(page.read_text())
    return [text.replace("\\\n", " ") for language, text in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """Every `python jobs/...` or `python examples/...` between a page's fences as words, comments left out."""
    return _commands([line for block in blocks(page, "sh", "text", "") for line in block.splitlines()])


def fragments(page: Path) -> list[list[str]]:
    """The same in the page's running text, where commands may be parts of some."""
    return _commands([found.replace("\n", " ") for found in re.findall(r"`([^`]*)`", _FENCE.sub("", page.read_text()))])


def _commands(lines: list[str]) -> list[list[str]]:
    found = (re.search(r"python ((?:jobs|examples)/\w+\.py.*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures that lie in the repository."""
    text = _FENCE.sub("", page.read_text())
    return [target for target in _LINK.findall(text) if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings can be linked to, as MkDocs and code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
