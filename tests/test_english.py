"""Pages, docstrings, comments, help lines and error messages avoid phrases that are never right in this project."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A phrase, and what to write instead. CONTRIBUTING.md ("Habits") asks for plain native English.
PHRASES = {
    r"stands?\b(?!-)(?! for\b)": "is, has, appears",
    r"standing at\b": "found at, is at",
    r"behind\b": "after",
    r"beside\b": "next to, with, in addition to",
    r"(?:the|one) seam\b": "the only place",
    r"(?:is|are) no (?:calls?|text|number|list|string|object|prompt|JSON|file|folder|plain value)\b": "is not a",
    r"what one rank skips\b": "say which rank does what",
    r"has not[,.;)]": "lacks",
    r"starts at nothing\b": "scores zero",
    r"take in what\b": "read what",
    r"anew\b": "again",
    r"nobody\b(?!\)|,| =)": "no one, or say who",
    r"command goes on\b": "command continues",
}
ALLOWED = re.compile(r"left behind|leaves? behind|behind a proxy", re.IGNORECASE)
BANNED = re.compile(r"\b(?:" + "|".join(f"({phrase})" for phrase in PHRASES) + ")", re.IGNORECASE)


def files() -> list[str]:
    command = ["git", "ls-files", "*.py", "*.md", "*.sh", "*.cu"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is not a git checkout, so the list of product files is unknown")
    return [name for name in listed.stdout.split() if not name.startswith("tests/") and (ROOT / name).is_file()]


def faults(text: str) -> list[tuple[int, str]]:
    """(line, what to change) of every banned phrase."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for match in BANNED.finditer(ALLOWED.sub("", line)):
            advice = next(advice for group, advice in zip(match.groups(), PHRASES.values(), strict=True) if group)
            found.append((number, f"{match[0]!r}: write {advice!r}"))
    return found


def test_the_rule_finds_what_it_should():
    assert [number for number, _ in faults("it stands here\nfine\nbehind it\na stand-in left behind")] == [1, 3]


def test_no_phrase_that_is_never_right():
    found = [f"{name}:{line}: {fault}" for name in files() for line, fault in faults((ROOT / name).read_text("utf-8"))]
    assert not found, "\n".join(found)
