"""From results rows to counts, percentages, 95 % intervals (E20) and errors by category."""

from collections.abc import Mapping, Sequence

from eval.confidence import Z_95, wilson_interval

METRICS = ("TS", "PI", "CF")
CALL_METRICS = ("DE", "CE")  # shares of calls, n_calls of a summary; every other metric is a share of its n records


def rate_summary(name: str, count: int, n: int) -> dict:
    """`name` -> count, with `_percent` and the 95 % Wilson interval in percent. Raises ValueError for n = 0."""
    low, high = wilson_interval(count, n, Z_95)  # E20
    return {
        name: count,
        f"{name}_percent": round(100 * count / n, 2),
        f"{name}_interval_95": [round(100 * low, 2), round(100 * high, 2)],
    }


def rates(rows: Sequence[dict], metrics: Sequence[str] = METRICS) -> dict:
    """n, and for each of `metrics` (0 or 1 in every row) count, percentage and interval."""
    counts = {metric: sum(row[metric] for row in rows) for metric in metrics}
    summary: dict = {"n": len(rows), **counts}
    for metric, count in counts.items():
        summary |= rate_summary(metric, count, len(rows))
    return summary


def count_errors(rows: Sequence[dict]) -> dict[str, int]:
    """Number of rows by the category that their `reason` begins with, in alphabetical order."""
    categories = sorted(row["reason"].split(":", 1)[0] for row in rows if row["reason"])
    return {category: categories.count(category) for category in dict.fromkeys(categories)}


def summarize_results(rows: Sequence[dict], metrics: Sequence[str] = METRICS) -> dict:
    """The rates of results rows and `errors`, the rows by category of error. Raises ValueError for no rows."""
    return {**rates(rows, metrics), "errors": count_errors(rows)}


def denominator_of(summary: Mapping, metric: str) -> int:
    """The denominator of a metric: the calls of all dialogues for DE and CE, else the records."""
    return summary.get("n_calls", summary["n"]) if metric in CALL_METRICS else summary["n"]
