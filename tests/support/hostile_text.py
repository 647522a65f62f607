"""Hostile text for every program, and an oracle of its own for what a reader may be shown.

The oracle asks unicodedata for categories and html.parser for tags; it shares no code with printable.py.
"""

import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

# an OSC title, a colour, C1's CSI, bidi override and isolate, invisible ones, line ends of other kinds, markup, maths
HOSTILE = (
    "\x1b]0;owned\x07\x1b[31m\x9b2J\u202egnp\u202c\u2066x\u2069\u200b\u2060\ufeff\u00ad\u3164\u2028\u2029\x85\x7f\x00\r"
    "EVIL|`code`<b onclick=x>![i](http://e.example/x)</b><script>alert(1)</script>&amp;$\\frac{1}{2}$_u_ *s* \ue000"
)
LONG = HOSTILE + "A" * 50_000
# what a file system, a flag and a call of the text format take
FOLDER_NAME = "m\u202egnp\u2066\u200b\u2028\u3164|`c`<b>![i](e.example)$a^$_u_"
TOOL_NAME = "get\u202e_weather\u200b|`c`<b>$a^$\ue000"

_HIDDEN = {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}


def faults_of_text(text: str) -> list[str]:
    """Characters that act on a terminal, reorder a line or show nothing, each with what stands before it."""
    faults = [
        f"{character!a} after {text[max(0, place - 30) : place]!a}"
        for place, character in enumerate(text)
        if unicodedata.category(character) in _HIDDEN and character not in "\n\r" or character in "\u3164\ufe0f\u034f"
    ]
    faults += ["a carriage return of the data"] * ("\rEVIL" in text)
    return faults[:5]


def faults_of_markdown(text: str) -> list[str]:
    """Raw HTML, links, images, code, and rows of another number of cells than the line above them."""
    plain = re.sub(r"\\[!-/:-@\[-`{-~]", "", text)  # an escaped mark marks nothing
    faults = [f"{mark!r} unescaped" for mark in ("<", "](", "`", "http:", "_u_", "*s*") if mark in plain]
    rows = [line.count("|") if line.startswith("|") else 0 for line in plain.split("\n")]
    faults += ["a torn table"] * any(a and b and a != b for a, b in zip(rows, rows[1:]))
    return faults + faults_of_text(text)


class Outline(HTMLParser):
    """Tags with their attributes' names, and whether there are comments."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[tuple[str, ...]] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add((tag, *sorted(name for name, _ in attrs)))
        self.words += [value for _, value in attrs if value]

    def handle_data(self, data):
        self.words.append(data)


def faults_of_markup(text: str, harmless: str) -> list[str]:
    """Tags or attributes that the page of harmless data lacks, and what the words of the page must not hold."""
    outline = Outline(text)
    faults = [f"tag {tag}" for tag in sorted(outline.tags - Outline(harmless).tags)]
    return faults + faults_of_text(text) + [fault for words in outline.words for fault in faults_of_text(words)]


def written(folder: Path, suffix: str) -> list[Path]:
    """Files of a suffix below a folder."""
    return sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())
