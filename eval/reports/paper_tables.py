"""The paper's published numbers (published_results.json) and its Tables 3, 4 and 5 with a run of ours below them."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from eval.confidence import attainable_count
from eval.rates import denominator_of

PUBLISHED = Path(__file__).parent / "published_results.json"
DECIMALS = 2  # digits of the paper's percentages
ONE_CALL_VARIANT = "first_call"  # of BFCL: how a model of one call per turn can reach what the paper prints
TITLES = {"table3": "Table 3: single-turn", "table4": "Table 4: multi-turn", "table5": "Table 5: ablation"}


@cache
def read_published() -> dict:
    """published_results.json: `source`, `records` and `metrics` by benchmark, the rows of the tables. Read only."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def benchmarks_of(table: str) -> list[str]:
    """The benchmarks that a table of the paper has columns of, in its order."""
    return [name for name in read_published()["metrics"] if name in read_published()[table][0]]


def unattainable_cells() -> list[tuple[str, str, str, float]]:
    """(table, model, `benchmark metric`, percentage) of every published share of records that no k/n gives.

    DE and CE are shares of calls whose number is not published, so nothing can be said of them.
    """
    published, found = read_published(), []
    for table in TITLES:
        for row in published[table]:
            for benchmark in benchmarks_of(table):
                for metric, percent in zip(published["metrics"][benchmark], row[benchmark], strict=True):
                    if (
                        metric in published["shares_of_records"]
                        and attainable_count(percent, published["records"][benchmark], DECIMALS) is None
                    ):
                        found.append((table, row["model"], f"{benchmark} {metric}", percent))
    return found


def paper_tables(summaries: Mapping[str, Mapping], name: str) -> list[tuple[str, list[list[str]], list[str]]]:
    """(title, table, notes) of each paper table that has a benchmark in `summaries` with all its metrics.

    `summaries`: benchmark -> summary with `<metric>_percent`; `name` is our row's, after theirs. Columns of benchmarks
    that were not run are left out; where the run is of fewer records than published, a note says so. Published cells
    that cannot be k/n are marked with `?`. Where the outputs of a benchmark with parallel calls hold one call per turn,
    a second row of ours has its variant `first_call`.
    """
    published, odd = read_published(), set(unattainable_cells())
    tables = []
    for key, title in TITLES.items():
        columns = [
            (benchmark, metric)
            for benchmark in benchmarks_of(key)
            if _has_metrics(summaries, benchmark)
            for metric in published["metrics"][benchmark]
        ]
        if not columns:
            continue
        rows = [["model", *(f"{benchmark} {metric}" for benchmark, metric in columns)]]
        for row in published[key]:
            cells = [_cell(row, benchmark, metric, key, odd) for benchmark, metric in columns]
            rows.append([" ".join(filter(None, (row["model"], row.get("size", "")))), *cells])
        rows.append([name, *(_our_cell(summaries[benchmark], metric) for benchmark, metric in columns)])
        rows += _one_call_rows(summaries, name, columns)
        shown = {benchmark for benchmark, _ in columns}
        tables.append((title, rows, _notes(summaries, sorted(shown), any("?" in cell for row in rows for cell in row))))
    return tables


def _our_cell(summary: Mapping, metric: str) -> str:
    return f"{summary[f'{metric}_percent']:.2f}" if denominator_of(summary, metric) else "-"


def _one_call_rows(summaries: Mapping[str, Mapping], name: str, columns: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Our row by ONE_CALL_VARIANT, for each benchmark whose summary says that its outputs hold one call per turn."""
    return [
        [
            f"{name}, {ONE_CALL_VARIANT} of {one}",
            *(
                f"{summaries[one]['variants'][ONE_CALL_VARIANT][f'{metric}_percent']:.2f}" if benchmark == one else "-"
                for benchmark, metric in columns
            ),
        ]
        for one in dict.fromkeys(benchmark for benchmark, _ in columns)
        if summaries[one].get("one_call_per_turn") and ONE_CALL_VARIANT in summaries[one].get("variants", {})
    ]


def _has_metrics(summaries: Mapping[str, Mapping], benchmark: str) -> bool:
    return benchmark in summaries and all(
        f"{metric}_percent" in summaries[benchmark] for metric in read_published()["metrics"][benchmark]
    )


def _cell(row: Mapping, benchmark: str, metric: str, table: str, odd: set) -> str:
    percent = row[benchmark][read_published()["metrics"][benchmark].index(metric)]
    mark = "?" if (table, row["model"], f"{benchmark} {metric}", percent) in odd else ""
    return f"{percent:.2f}{mark}"


def _notes(summaries: Mapping[str, Mapping], shown: Sequence[str], has_marks: bool) -> list[str]:
    published = read_published()
    notes = ["Rows but the last: percentages as the paper prints them, other prompts and scorers than ours possible."]
    notes += [
        f"{benchmark}: {summaries[benchmark]['n']} of {published['records'][benchmark]} records were run; not "
        "comparable."
        for benchmark in shown
        if summaries[benchmark]["n"] != published["records"][benchmark]
    ]
    for benchmark in shown:
        executors = summaries[benchmark].get("executors", {})
        if executors.get("simulated"):
            notes.append(
                f"{benchmark}: {executors['simulated']} of its {sum(executors.values())} calls were answered by the "
                "simulated executor; the paper's models called the real tools."
            )
    notes += [note for benchmark, note in published["notes"].items() if benchmark in shown]
    notes += [
        f"{benchmark}: the outputs hold one call per turn, and many records want several; {ONE_CALL_VARIANT} compares "
        "the first call only."
        for benchmark in shown
        if summaries[benchmark].get("one_call_per_turn")
    ]
    if has_marks:
        notes.append("?: no whole number of records gives this percentage.")
    return notes
