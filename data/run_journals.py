"""The journals of a run (docs/metrics.md), read for charts and pages: every line that is good, and words on the others.

A run that was killed, a full disk or an editor may leave anything in them. What is not a number where one belongs is
left out, and so is a line without its step.
"""

from collections.abc import Callable
from pathlib import Path

from data.json_records import DataError, check_regular_file, parse_json


def read_journal(path: Path, clean: Callable[[dict], dict | None]) -> tuple[list[dict], list[str]]:
    """(rows, problems) of a file of one JSON object per line; a missing file has no rows and no problem.

    clean: a row as it is used, or None for a row that is not what it should be. At most two problems: a torn last line,
    and the other damaged lines with their number and the first of them. Raises DataError for a file that is unreadable.
    """
    if not path.exists():
        return [], []
    check_regular_file(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise DataError(f"{path}: found {error.strerror or error}, expected a readable file") from None
    rows, faults, torn = [], [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, f"{path.name}:{number}")
            row = clean(value) if isinstance(value, dict) else None
            if row is None:
                raise DataError(f"{path.name}:{number}: found something else, expected a line of this journal")
            rows.append(row)
        except DataError as error:
            (torn if number == len(lines) else faults).append(str(error))
    problems = [f"{path.name}: {len(faults)} damaged lines are left out; the first: {faults[0]}"] if faults else []
    if torn:
        problems.append(f"{path.name}: the last line is torn, as a killed run leaves it, and is left out")
    return rows, problems


def is_number(value: object) -> bool:
    """A finite number of a size that a run writes; no boolean."""
    return type(value) in (int, float) and abs(value) < 1e15


def clean_metrics(row: dict) -> dict | None:
    """The numbers of a line of metrics.jsonl, None without a step."""
    numbers = {key: value for key, value in row.items() if is_number(value)}
    return numbers if "step" in numbers else None


def clean_sample(row: dict) -> dict | None:
    """A line of samples.jsonl, None unless it has step, iteration, reward and response."""
    has_numbers = all(is_number(row.get(key)) for key in ("step", "iteration", "reward"))
    return row if has_numbers and isinstance(row.get("response"), str) else None


def clean_evaluation(row: dict) -> dict | None:
    """Step and the summaries of a line of evaluations.jsonl that have a mean reward and its interval."""
    if not is_number(row.get("step")):
        return None
    summaries = {name: row[name] for name in ("greedy", "sampled") if _has_interval(row.get(name))}
    return {"step": row["step"], **summaries}


def _has_interval(summary: object) -> bool:
    if not isinstance(summary, dict) or not is_number(summary.get("mean_reward")):
        return False
    interval = summary.get("interval_95")
    return isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))
