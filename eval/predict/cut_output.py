"""Where an output ends: before the first of its stop texts."""

from collections.abc import Sequence


def cut_at(text: str, stop_texts: Sequence[str]) -> tuple[str, bool]:
    """`text` before the first of `stop_texts`, and whether there was one."""
    ends = [position for stop in stop_texts if (position := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
