"""Pieces of an HTML page: headings, tables, folded parts, charts, words with marks. Every text is escaped here."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

from printable import cut, html_text
from svg import Chart, inline

MAX_TEXT = 1000  # characters of one text of a run
_WORDS = re.compile(r"\w+|\s+|[^\w\s]")
_NUMBER = re.compile(r"-?[\d.,]+(?:e[-+]?\d+)?(?: \[.*\])?(?: %)?|-")


def paragraph(words: str, classes: str = "") -> str:
    """One paragraph of plain text."""
    return f"<p{_class(classes)}>{html_text(words)}</p>"


def items(lines: Iterable[str], classes: str = "") -> str:
    """A list of plain texts."""
    return f"<ul{_class(classes)}>{''.join(f'<li>{html_text(line)}</li>' for line in lines)}</ul>"


def folded(summary: str, body: str) -> str:
    """Something that is shown on demand."""
    return f"<details><summary>{html_text(summary)}</summary>{body}</details>"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in a box that scrolls by itself; the first cell of a row is its head."""
    heads = "".join(f'<th scope="col">{html_text(cell)}</th>' for cell in head)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{_class('n' if _NUMBER.fullmatch(cell) else '')}>{html_text(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{html_text(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" role="region" aria-label="{html_text(caption)}" tabindex="0"><table>'
        f"<caption>{html_text(caption)}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>"
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def figures(charts: Sequence[Chart], identifier: str) -> str:
    """Charts next to each other, as many as fit. `identifier` begins the ids and differs between calls."""
    drawn = (inline(chart, f"{identifier}-{number}") for number, chart in enumerate(charts, 1))
    return '<div class="charts">' + "".join(f"<figure>{each}</figure>" for each in drawn) + "</div>"


def section(level: int, title: str, identifier: str, *parts: str) -> str:
    """A part of the page under a heading that a link can go to."""
    heading = f'<h{level} id="{identifier}">{html_text(title)}</h{level}>'
    return f'<section aria-labelledby="{identifier}">\n{heading}\n' + "\n".join(filter(None, parts)) + "\n</section>"


def marked_differences(text: str, other: str) -> str:
    """`text` as HTML with the words marked that `other` does not have at their place."""
    words, others = _WORDS.findall(cut(text, MAX_TEXT)), _WORDS.findall(cut(other, MAX_TEXT))
    parts = []
    for operation, start, end, *_ in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        piece = html_text("".join(words[start:end]))
        parts.append(piece if operation == "equal" or not piece.strip() else f"<mark>{piece}</mark>")
    return "".join(parts)


def _class(classes: str) -> str:
    return f' class="{classes}"' if classes else ""
