"""From results rows to figures: summaries with 95 % intervals, report.md, the comparison of several runs."""

from collections.abc import Mapping, Sequence

from data.json_records import DataError
from eval.confidence import are_disjoint, attainable_count, mcnemar_p_value
from eval.predict.prediction_files import DTYPE_NAMES
from eval.rates import CALL_METRICS, METRICS, denominator_of
from eval.reports.paper_tables import paper_tables
from printable import markdown_text

DIALOGUE_METRICS = ("DE", "CE", "VA")
SUMMARY_DECIMALS = 2  # digits of the percentages in a summary
METRICS_NOTE = (
    "DE, lower is better: share of calls that contradict the tool's documentation (tool or parameter not "
    "documented, required parameter missing). CE, lower is better: share of all other failed calls, including "
    "outputs that are not a call. VA: share of dialogues that the model ends in time with an answer."
)
EXECUTOR_NOTE = (
    "local: a tool of this project did what the document says. simulated: the feedback follows from the "
    "document alone and is not that of the real tool, which a machine without its service cannot call. "
    "recorded: taken from the benchmark's own prediction file. Shares of errors depend on who answered."
)


def format_rate(summary: Mapping, metric: str) -> str:
    """`95.3 [92.3, 97.2]`: percentage and interval of one metric; "-" for 0 of 0."""
    if not denominator_of(summary, metric):
        return "-"
    low, high = summary[f"{metric}_interval_95"]
    return f"{summary[f'{metric}_percent']:.1f} [{low:.1f}, {high:.1f}]"


def with_dtype(name: str, run: Mapping) -> str:
    """`name` and the type in which the predictions of a summary.json were computed, fp32 or bf16, where it is known."""
    return f"{name}, {DTYPE_NAMES[run['dtype']]}" if run.get("dtype") in DTYPE_NAMES else name


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first row the head, columns padded so that it also reads well on a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def format_share(count: int, n: int) -> str:
    """A percentage, "-" for 0 of 0."""
    return f"{100 * count / n:.1f}" if n else "-"


def metrics_of(summary: Mapping) -> list[str]:
    """The metrics of a summary: every key that also has a percentage and an interval, in order."""
    return [key for key in summary if f"{key}_percent" in summary and f"{key}_interval_95" in summary]


def is_lower_better(metric: str) -> bool:
    """Whether a metric counts errors: DE and CE, of calls or of dialogues."""
    return metric.startswith(CALL_METRICS)


def unattainable_rates(summary: Mapping) -> list[str]:
    """One line per metric of a summary whose percentage cannot be k/n, or is not that of its own count."""
    lines = []
    for metric in metrics_of(summary):
        n, percent = denominator_of(summary, metric), summary[f"{metric}_percent"]
        if n and attainable_count(percent, n, SUMMARY_DECIMALS) != summary[metric]:  # without calls, no share of them
            lines.append(f"{metric}: found {percent} %, expected {summary[metric]} of {n}")
    return lines


def format_report(run: Mapping) -> str:
    """report.md of one run, `run` as in summary.json: rates, variants, errors, the paper's tables with this run."""
    source = (
        f"predictions {markdown_text(run['predictions'])}"
        if run["predictions"]
        else f"greedy output of {markdown_text(run['model'])}, prompt format {run['prompt_format']}"
    )
    benchmarks = {with_dtype(name, run): summary for name, summary in run["benchmarks"].items()}
    calls = {name: summary for name, summary in benchmarks.items() if all(key in summary for key in METRICS)}
    dialogues = {name: summary for name, summary in benchmarks.items() if "n_calls" in summary}
    parts = ["# Evaluation", f"Scored: {with_dtype(source, run)}."]
    parts += [
        f"{name}: {summary['n']} of {summary['of_records']} records, evenly spread (--limit)."
        for name, summary in run["benchmarks"].items()
        if "of_records" in summary
    ]
    if calls:
        parts += [
            format_table(
                [
                    ["benchmark", "n", *(f"{metric} % [95 %]" for metric in METRICS)],
                    *(
                        [name, str(summary["n"]), *(format_rate(summary, metric) for metric in METRICS)]
                        for name, summary in calls.items()
                    ),
                ]
            ),
            "TS tool selection, PI parameter identification, CF content filling; brackets: 95 % intervals.",
        ]
    parts += _dialogue_tables(dialogues)
    others = [
        [
            name,
            metric + (" (primary)" if summary.get("primary") == metric else ""),
            str(summary["n"]),
            format_rate(summary, metric),
        ]
        for name, summary in benchmarks.items()
        if name not in calls and name not in dialogues
        for metric in metrics_of(summary)
    ]
    if others:
        parts.append(format_table([["benchmark", "metric", "n", "% [95 %]"], *others]))
    parts += _breakdowns(calls)
    parts += _unfit_table(benchmarks)
    errors = [
        [name, markdown_text(category), str(count), format_share(count, summary.get("n_calls", summary["n"]))]
        for name, summary in benchmarks.items()
        for category, count in summary.get("errors", {}).items()
    ]
    if errors:
        unit = "records" if not dialogues else "calls" if len(dialogues) == len(benchmarks) else "records or calls"
        parts += ["## Errors", format_table([["benchmark", "error", unit, "%"], *errors])]
    for title, table, notes in paper_tables(run["benchmarks"], with_dtype("this run", run)):
        parts += [f"## {title}", format_table(table), " ".join(notes)]
    odd = [f"{name} {line}" for name, summary in benchmarks.items() for line in unattainable_rates(summary)]
    if odd:
        parts += ["## Warnings", "\n".join(f"* {line}" for line in odd)]
    return "\n\n".join(parts) + "\n"


def _unfit_table(benchmarks: Mapping[str, Mapping]) -> list[str]:
    """How many prompts leave no room for an output; nothing where every one does."""
    rows = [
        [name, str(count), format_share(count, summary["n"])]
        for name, summary in benchmarks.items()
        if (count := summary.get("errors", {}).get("no output", 0) + summary.get("ends", {}).get("prompt_too_long", 0))
    ]
    if not rows:
        return []
    table = format_table([["benchmark", "prompts", "% of its records"], *rows])
    note = "A question without room for an output counts as wrong; a dialogue ends there (--max_dialogue_tokens)."
    return ["## Prompts that do not fit", table, note]


def _dialogue_tables(dialogues: Mapping[str, Mapping]) -> list[str]:
    """Multi-turn benchmarks: DE and CE of calls, VA of dialogues, the shares of dialogues, who answered the calls."""
    if not dialogues:
        return []
    head = ["dialogues", "calls", *(f"{metric} % [95 %]" for metric in DIALOGUE_METRICS)]
    rows = [[name, *_dialogue_cells(summary)] for name, summary in dialogues.items()]
    parts = [format_table([["benchmark", *head], *rows]), METRICS_NOTE]
    parts += _dialogue_shares(dialogues)
    scenarios = [
        [name, markdown_text(scenario), *_dialogue_cells(part)]
        for name, summary in dialogues.items()
        for scenario, part in summary.get("by_scenario", {}).items()
    ]
    if scenarios:
        parts += ["## Dialogues by scenario", format_table([["benchmark", "scenario", *head], *scenarios])]
    ends = [
        [name, markdown_text(end), str(count), format_share(count, summary["n"])]
        for name, summary in dialogues.items()
        for end, count in summary.get("ends", {}).items()
    ]
    if ends:
        parts += ["## How dialogues ended", format_table([["benchmark", "end", "dialogues", "%"], *ends])]
    answered = [
        [name, executor, str(count), format_share(count, sum(summary["executors"].values()))]
        for name, summary in dialogues.items()
        for executor, count in summary.get("executors", {}).items()
    ]
    if answered:
        parts += [
            "## Who answered the calls",
            format_table([["benchmark", "executor", "calls", "%"], *answered]),
            EXECUTOR_NOTE,
        ]
    return parts


def _dialogue_shares(dialogues: Mapping[str, Mapping]) -> list[str]:
    """Shares of whole dialogues, and answer_right by the number of requests in the query."""
    others = [
        [
            name,
            metric,
            "lower" if is_lower_better(metric) else "higher",
            str(summary["n"]),
            format_rate(summary, metric),
        ]
        for name, summary in dialogues.items()
        for metric in metrics_of(summary)
        if metric not in DIALOGUE_METRICS
    ]
    parts = []
    if others:
        parts += [
            "## Shares of dialogues",
            format_table([["benchmark", "metric", "better", "dialogues", "% [95 %]"], *others]),
        ]
        if any(row[1] == "answer_right" for row in others):
            parts.append("answer_right: the final answer holds every requested result.")
    requests = [
        [name, markdown_text(number), str(part["n"]), format_rate(part, "answer_right")]
        for name, summary in dialogues.items()
        for number, part in summary.get("by_requests", {}).items()
    ]
    if requests:
        parts.append(
            format_table([["benchmark", "requests in the query", "dialogues", "answer_right % [95 %]"], *requests])
        )
    return parts


def _dialogue_cells(summary: Mapping) -> list[str]:
    cells = [format_rate(summary, metric) if f"{metric}_percent" in summary else "-" for metric in DIALOGUE_METRICS]
    return [str(summary["n"]), str(summary["n_calls"]), *cells]


def _breakdowns(calls: Mapping[str, Mapping]) -> list[str]:
    """Tables of the other scoring variants, the primary one named, and of the parts of a benchmark."""
    parts = []
    for title, key in (
        ("Variants of the rules", "variants"),
        ("By scenario", "by_scenario"),
        ("By kind of noise", "by_noise"),
        ("By API", "by_api"),
    ):
        rows = [
            [
                name,
                markdown_text(part) + (" (primary)" if key == "variants" and part == summary.get("primary") else ""),
                str(rates["n"]),
                *(format_rate(rates, metric) for metric in METRICS),
            ]
            for name, summary in calls.items()
            for part, rates in summary.get(key, {}).items()
            if all(metric in metrics_of(rates) for metric in METRICS)
        ]
        if rows:
            head = ["benchmark", key.removeprefix("by_").removesuffix("s"), "n", *(f"{m} % [95 %]" for m in METRICS)]
            parts += [f"## {title}", format_table([head, *rows])]
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def compare_rates(baseline: Mapping, other: Mapping, metric: str) -> str:
    """The verdict on `other` against `baseline`: `higher` or `lower` only if their 95 % intervals are disjoint.

    For a metric that counts errors it adds which of the two is better; "-" if one of them is 0 of 0. Disjoint intervals
    are a cautious test: overlapping ones do not show that two rates are equal.
    """
    if not denominator_of(baseline, metric) or not denominator_of(other, metric):
        return "-"
    if not are_disjoint(tuple(baseline[f"{metric}_interval_95"]), tuple(other[f"{metric}_interval_95"])):
        return "intervals overlap"
    is_higher = other[f"{metric}_percent"] > baseline[f"{metric}_percent"]
    words = ("higher (worse)", "lower (better)") if is_lower_better(metric) else ("higher", "lower")
    return words[0 if is_higher else 1] + ", intervals disjoint"


def format_mcnemar(baseline: Mapping[int, dict], other: Mapping[int, dict], metric: str) -> str:
    """`p 0.031 (1 lost, 6 won)`: McNemar's exact test on rows of the same records, index -> row.

    A record that has an error is lost where `metric` counts errors. "-" without rows, and for shares of calls, since
    the calls of two runs are not paired.
    """
    if not baseline or not other or metric in CALL_METRICS:
        return "-"
    lost, won = paired_counts(baseline, other, metric)
    return f"p {mcnemar_p_value(lost, won):.2g} ({lost} lost, {won} won)"


def paired_counts(baseline: Mapping[int, dict], other: Mapping[int, dict], metric: str) -> tuple[int, int]:
    """(records lost, records won) of `other` against `baseline`: rows of the same records, index -> row."""
    # (good before, good now) of each record
    pairs = [
        tuple(bool(rows[index][metric]) != is_lower_better(metric) for rows in (baseline, other)) for index in baseline
    ]
    return pairs.count((True, False)), pairs.count((False, True))


def format_comparison(
    names: Sequence[str], runs: Sequence[Mapping], results: Sequence[Mapping[str, Mapping[int, dict]]] | None = None
) -> str:
    """Table over benchmarks and metrics, one column per run and one verdict per run after the first.

    Only benchmarks that all runs have. `results`, one per run, benchmark -> index -> results row, adds McNemar's test
    on the paired records. Raises DataError if no benchmark is shared, or if runs scored different records.
    """
    baseline = runs[0]["benchmarks"]
    shown_names = [with_dtype(markdown_text(name), run) for name, run in zip(names, runs)]
    shared = [benchmark for benchmark in baseline if all(benchmark in run["benchmarks"] for run in runs)]
    if not shared:
        raise DataError(f"{', '.join(names)}: found no benchmark that all runs have, expected at least one")
    table = [
        [
            "benchmark",
            "n",
            "metric",
            *(f"{name} % [95 %]" for name in shown_names),
            *(f"{name} vs {shown_names[0]}" for name in shown_names[1:]),
            *(f"McNemar, {name} vs {shown_names[0]}" for name in shown_names[1:] if results),
        ]
    ]
    for benchmark in shared:
        summaries = [run["benchmarks"][benchmark] for run in runs]
        for name, summary in zip(names, summaries):
            if (summary["n"], summary["answers_sha256"]) != (summaries[0]["n"], summaries[0]["answers_sha256"]):
                raise DataError(
                    f"{name}: found other {benchmark} records (n {summary['n']}) than in {names[0]} "
                    f"(n {summaries[0]['n']}), expected the same ones"
                )
        rows = [_paired_rows(name, benchmark, each, results[0]) for name, each in zip(names, results or [])]
        for metric in metrics_of(summaries[0]):
            if all(metric in metrics_of(summary) for summary in summaries):
                n = " / ".join(dict.fromkeys(str(denominator_of(summary, metric)) for summary in summaries))
                table.append(
                    [
                        markdown_text(benchmark),
                        n,
                        markdown_text(metric) + (", lower is better" if is_lower_better(metric) else ""),
                        *(format_rate(summary, metric) for summary in summaries),
                        *(compare_rates(summaries[0], summary, metric) for summary in summaries[1:]),
                        *(format_mcnemar(rows[0], other, metric) for other in rows[1:]),
                    ]
                )
    return format_table(table)


def _paired_rows(name: str, benchmark: str, result: Mapping, baseline: Mapping) -> Mapping[int, dict]:
    rows, expected = result.get(benchmark, {}), baseline.get(benchmark, {})
    if rows and expected and rows.keys() != expected.keys():
        raise DataError(f"{name}: found results of other {benchmark} records than in the first run, expected the same")
    return rows
