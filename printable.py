"""Text from outside on its way to a reader: terminal, log, error line, Markdown, HTML page, picture.

Data, models, file names, tool documents, endpoints and outputs may hold anything: escape sequences, bidirectional
overrides, invisible characters, markup. Every place that shows such text calls one of these functions.

Two families. `shown` and `one_line` quote a value for a message: ASCII, backslashes doubled, cut with a count. The
others change only what has no picture of its own, so that applying them twice changes nothing more.
"""

import html
import json
import math
import re

MAX_MESSAGE = 2000  # characters of an error line
MAX_LINE = 4000  # characters of one line of a log
MAX_CELL = 200  # characters of one text in Markdown
# letters and marks that str.isprintable() admits although they show nothing: fillers, joiners, variation selectors
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


# ---------------------------------------------------------------------------------------------------------------------
# Values in messages


def shown(value: object, limit: int = 60) -> str:
    """`value` as Python would write it, in printable ASCII; cut after `limit` characters, with a count.

    Of values that cannot be written, integers of thousands of digits and bottomless nesting, only the kind.
    """
    if type(value) is int and abs(value) >= 10**50:
        return f"a whole number of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    try:
        return cut(ascii(value), limit)
    except (RecursionError, ValueError):  # ValueError: Python's limit on the digits of an integer
        return f"a {type(value).__name__} that is too large to be shown"


def one_line(text: str, limit: int = 60) -> str:
    """`text` without quotes as printable ASCII on one line, cut after `limit` characters; backslashes are doubled."""
    return cut(ascii(text)[1:-1], limit)


def listed(names: list[str], limit: int = 8) -> str:
    """Names joined by commas: the first `limit` of them, each of bounded length, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(one_line(name, 120) for name in names[:limit]) + more


def message_line(message: object) -> str:
    """A message as one line of printable ASCII; the middle of more than MAX_MESSAGE characters is cut, with a count.

    Backslashes stay as they are, since `shown` has doubled those of the values.
    """
    words = re.sub(r"[ \t\r\n\f\v]+", " ", str(message).strip())
    line = "".join(each if " " <= each <= "~" else ascii(each)[1:-1] for each in words)
    if len(line) <= MAX_MESSAGE:
        return line
    part = MAX_MESSAGE // 2 - 20
    return f"{line[:part]}... ({len(line)} characters) ...{line[-part:]}"


def cut(text: str, limit: int) -> str:
    """`text`, or its first `limit` characters and how many it has."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


# ---------------------------------------------------------------------------------------------------------------------
# Terminal and logs


def terminal_text(text: str) -> str:
    """`text` on one line, for a terminal: controls, line ends, bidi and invisible characters as Python escapes."""
    return "".join(each if each.isprintable() and not _INVISIBLE.match(each) else ascii(each)[1:-1] for each in text)


def terminal_lines(text: str) -> str:
    """terminal_text of every line of `text`: line feeds stay."""
    return "\n".join(map(terminal_text, text.split("\n")))


def log_text(text: str) -> str:
    """terminal_lines for a log: each line is cut after MAX_LINE characters, with a count."""
    return "\n".join(cut(line, MAX_LINE) for line in terminal_lines(text).split("\n"))


def json_line(value: object) -> str:
    """One JSON value as a line of printable ASCII; json.dumps alone lets DEL through."""
    return json.dumps(value).replace("\x7f", "\\u007f")


# ---------------------------------------------------------------------------------------------------------------------
# Markup


def markdown_text(text: str) -> str:
    """`text` on one line, for Markdown, table cells included: it shows as it is and can mark nothing up.

    Cut after MAX_CELL characters, with a count. An underscore inside a word marks nothing up and stays as it is.
    """
    plain = cut(terminal_text(text), MAX_CELL)
    escaped = re.sub(r"[\\`*\[\]<>|~&$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", plain)
    return re.sub(r"(?i):(?=//)|(?<=www)\.", r"\\\g<0>", escaped)  # addresses that readers make links of


def html_text(text: str) -> str:
    """`text` for an HTML page, in its text or in a quoted attribute: terminal_lines with `<>&` and quotes escaped."""
    return html.escape(terminal_lines(text))
