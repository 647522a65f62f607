"""The part of a run page that compares evaluations: rates, paired differences, and the same prompts side by side."""

from collections.abc import Mapping, Sequence

from charts import interval_chart
from data.run_journals import is_number
from data.tool_calls import ToolCall, ToolCallError, render_tool_call
from eval.confidence import mcnemar_p_value
from eval.rates import CALL_METRICS, denominator_of
from eval.records import Record
from eval.reports.page_parts import figures, folded, html_text, items, marked_differences, paragraph, section, table
from eval.reports.report import METRICS_NOTE, format_rate, format_share, is_lower_better, metrics_of, paired_counts
from eval.reports.run_folders import RunFolder, read_questions
from eval.reports.training_page import settings_part

N_PROMPTS = 5  # shown side by side of each benchmark
METRIC_NAMES = {
    "TS": "right tool (TS)",
    "PI": "right tool and parameters (PI)",
    "CF": "right calls (CF)",
    "DE": "calls with DE, lower is better",
    "CE": "calls with CE, lower is better",
    "VA": "valid answers (VA)",
    "DE_dialogues": "dialogues with DE, lower is better",
    "CE_dialogues": "dialogues with CE, lower is better",
    "answer_right": "right answers",
}
RATES_NOTE = (
    "Brackets are 95 % Wilson intervals. TS: the right tool; PI: also the right parameters; CF: also the right values. "
    + METRICS_NOTE
)
PAIRS_NOTE = (
    "Each evaluation against the one before it, on the same records. Won: records that only the later one has right; "
    "lost: those that only the earlier one has right. p is that of McNemar's exact test, two-sided, for this row "
    "alone: of many rows without any difference, up to one in twenty has a p below 0.05."
)


def evaluations_section(folders: Sequence[RunFolder], identifier: str) -> str:
    """All evaluation folders together, as HTML."""
    notes = [f"{folder.name}: {problem}" for folder in folders for problem in folder.problems]
    pages = [paragraph(f"{folder.name}: {_source_of(folder)}") + settings_part(folder) for folder in folders]
    return section(
        2,
        "Evaluations",
        identifier,
        items(notes, "problems") if notes else "",
        section(3, "Rates", f"{identifier}-rates", *_rate_parts(folders, identifier)),
        section(3, "Paired differences", f"{identifier}-pairs", *_pair_parts(folders)),
        section(3, "The same prompts side by side", f"{identifier}-answers", *_answer_parts(folders)),
        section(3, "Settings and machines of the evaluations", f"{identifier}-settings", *pages),
    )


def _source_of(folder: RunFolder) -> str:
    model, predictions = folder.config.get("model"), folder.config.get("predictions")
    return f"predictions of {predictions}" if predictions else f"model {model}" if model else "model not known"


def describe_evaluations(folders: Sequence[RunFolder]) -> list[str]:
    """The main count of each benchmark in plain sentences, with paired tests."""
    sentences = []
    for name in benchmarks_of(folders):
        having = [folder for folder in folders if name in folder.summaries]
        metric = main_metric(having[0].summaries[name])
        having = [folder for folder in having if metric in metrics_of(folder.summaries[name])]
        if metric is None:
            continue
        counts = [
            f"{folder.name} {summary[metric]} of {summary['n']} ({summary[f'{metric}_percent']:.1f} %)"
            for folder in having
            for summary in [folder.summaries[name]]
        ]
        sentence = f"{name}, {METRIC_NAMES.get(metric, metric)}: {', '.join(counts)}."
        for before, after, (lost, won) in pairs_of(having, name, metric):
            p_value = mcnemar_p_value(lost, won)
            if p_value < 0.05:
                verdict = f"{after} is {'better' if won > lost else 'worse'} than {before}"
            else:
                verdict = f"Between {after} and {before} there is no clear difference"
            shown = "p < 0.001" if p_value < 0.001 else f"p {p_value:.2g}"
            sentence += f" {verdict} ({won} won, {lost} lost, {shown})."
        sentences.append(sentence)
    return sentences


def benchmarks_of(folders: Sequence[RunFolder]) -> list[str]:
    """Every benchmark that a folder has, in the order of the folders."""
    return list(dict.fromkeys(name for folder in folders for name in folder.summaries))


def main_metric(summary: Mapping) -> str | None:
    """The metric that says most: the whole call, the whole answer, else the primary or the first one."""
    metrics = metrics_of(summary)
    preferred = ("CF", "answer_right", summary.get("primary"), "VA", *metrics)
    return next((metric for metric in preferred if metric in metrics and metric not in CALL_METRICS), None)


# ---------------------------------------------------------------------------------------------------------------------
# Rates


def _rate_parts(folders: Sequence[RunFolder], identifier: str) -> list[str]:
    names = benchmarks_of(folders)
    if not names:
        return [paragraph("No evaluation has a summary.json, so there are no rates.")]
    rows, charts = [], []
    for name in names:
        for metric in _metrics_of_all(folders, name):
            cells = [_rate_cell(folder, name, metric) for folder in folders]
            rows.append([name, METRIC_NAMES.get(metric, metric), *cells])
    for metric in dict.fromkeys(metric for name in names for metric in _metrics_of_all(folders, name)):
        groups = {name: bars for name in names if (bars := _bars(folders, name, metric))}
        if groups:
            charts.append(interval_chart(METRIC_NAMES.get(metric, metric), groups))
    head = ["benchmark", "metric", *(f"{folder.name}, % [95 %]" for folder in folders)]
    return [
        table("Rates of all evaluations", head, rows),
        paragraph(RATES_NOTE, "note"),
        figures(charts, f"{identifier}-chart"),
        *_error_parts(folders),
    ]


def _metrics_of_all(folders: Sequence[RunFolder], name: str) -> list[str]:
    return list(dict.fromkeys(metric for folder in folders for metric in metrics_of(folder.summaries.get(name, {}))))


def _rate_cell(folder: RunFolder, name: str, metric: str) -> str:
    summary = folder.summaries.get(name, {})
    if metric not in metrics_of(summary):
        return "-"
    return f"{format_rate(summary, metric)}, n = {denominator_of(summary, metric)}"


def _bars(folders: Sequence[RunFolder], name: str, metric: str) -> list[tuple[str, float, float, float]]:
    """(folder, percent, low, high) of each folder that has the metric, of at least one record or call."""
    bars = []
    for folder in folders:
        summary = folder.summaries.get(name, {})
        if metric in metrics_of(summary) and denominator_of(summary, metric):
            numbers = (summary[f"{metric}_percent"], *summary[f"{metric}_interval_95"])
            if all(is_number(number) and 0 <= number <= 100 for number in numbers):
                bars.append((folder.name, *numbers))
    return bars


def _error_parts(folders: Sequence[RunFolder]) -> list[str]:
    """What the wrong records, or calls of dialogues, were wrong in."""
    rows = []
    for name in benchmarks_of(folders):
        counts = [folder.summaries.get(name, {}).get("errors", {}) for folder in folders]
        counts = [each if isinstance(each, dict) else {} for each in counts]
        for category in dict.fromkeys(category for each in counts for category in each):
            cells = []
            for folder, each in zip(folders, counts, strict=True):
                if name not in folder.summaries:
                    cells.append("-")
                    continue
                summary, count = folder.summaries[name], each.get(category, 0)
                share = format_share(count, summary.get("n_calls", summary["n"])) if type(count) is int else "-"
                cells.append(f"{count} ({share} %)")
            rows.append([name, category, *cells])
    head = ["benchmark", "error", *(folder.name for folder in folders)]
    return [folded("Errors by category", table("Records or calls by error", head, rows))] if rows else []


# ---------------------------------------------------------------------------------------------------------------------
# Paired differences


def pairs_of(folders: Sequence[RunFolder], name: str, metric: str) -> list[tuple[str, str, tuple[int, int]]]:
    """(before, after, (lost, won)) of each two folders in a row that scored the same records of a benchmark."""
    pairs = []
    for before, after in zip(folders, folders[1:]):
        summaries = [folder.summaries.get(name, {}) for folder in (before, after)]
        rows = [folder.results.get(name, {}) for folder in (before, after)]
        is_same = summaries[0].get("answers_sha256") == summaries[1].get("answers_sha256")
        if is_same and rows[0] and rows[0].keys() == rows[1].keys() and all(metric in metrics_of(s) for s in summaries):
            pairs.append((before.name, after.name, paired_counts(*rows, metric)))
    return pairs


def _pair_parts(folders: Sequence[RunFolder]) -> list[str]:
    if len(folders) < 2:
        return [paragraph("Give two or more evaluation folders to compare them.")]
    rows = []
    for name in benchmarks_of(folders):
        having = [folder for folder in folders if name in folder.summaries]
        for metric in _metrics_of_all(having, name):
            for before, after, (lost, won) in pairs_of(having, name, metric) if metric not in CALL_METRICS else ():
                n = next(folder.summaries[name]["n"] for folder in having if folder.name == after)
                points = 100 * (won - lost) / n * (-1 if is_lower_better(metric) else 1) + 0.0  # no -0.0
                cells = [METRIC_NAMES.get(metric, metric), str(n), f"{points:+.1f}", str(won), str(lost)]
                cells.append(f"{mcnemar_p_value(lost, won):.2g}")
                rows.append([f"{name}: {after} against {before}", *cells])
    if not rows:
        return [paragraph("No two evaluations scored the same records, so there are no paired differences.")]
    head = ["benchmark and evaluations", "metric", "n", "difference, points", "won", "lost", "exact p"]
    return [table("Paired differences", head, rows), paragraph(PAIRS_NOTE, "note")]


# ---------------------------------------------------------------------------------------------------------------------
# Side by side


def _answer_parts(folders: Sequence[RunFolder]) -> list[str]:
    """Some prompts of each benchmark with the answer of each evaluation."""
    parts = []
    for name in dict.fromkeys([*benchmarks_of(folders), *(name for folder in folders for name in folder.outputs)]):
        having = [folder for folder in folders if folder.outputs.get(name)]
        shared = sorted(set.intersection(*(set(folder.outputs[name]) for folder in having))) if having else []
        if not shared:
            parts.append(paragraph(f"{name}: the evaluations have no answer in common."))
            continue
        questions = read_questions(having, name)
        chosen = choose_records(having, name, shared)
        note = f"{len(chosen)} of {len(shared)} records, those first on which the evaluations differ."
        if not questions:
            note += " The benchmark's file is missing or was changed since, so the prompts are not shown."
        blocks = (_prompt(having, name, index, questions.get(index)) for index in chosen)
        parts += [f"<h4>{html_text(name)}</h4>", paragraph(note), *blocks]
    if not parts:
        return [paragraph("No evaluation has predictions, so there are no answers to show.")]
    note = (
        "Marked (underlined) are the words in which an answer differs from that of the evaluation before it; "
        "in the first one, those in which it differs from the second."
    )
    return [paragraph(note, "note"), *parts]


def choose_records(folders: Sequence[RunFolder], name: str, indices: Sequence[int]) -> list[int]:
    """At most N_PROMPTS records: in turn one of each pattern of right and wrong, patterns with a change first."""
    groups: dict[tuple, list[int]] = {}
    for index in indices:
        groups.setdefault(tuple(_verdict(folder, name, index)[0] for folder in folders), []).append(index)
    ordered = sorted(groups.items(), key=lambda item: len(set(item[0])) == 1)  # stable
    chosen = []
    for depth in range(max(map(len, groups.values()))):
        chosen += [group[depth] for _, group in ordered if depth < len(group)]
    return sorted(chosen[:N_PROMPTS])


def _verdict(folder: RunFolder, name: str, index: int) -> tuple[str, str]:
    """("right", "wrong" or "not scored", the reason of the scorer)."""
    row = folder.results.get(name, {}).get(index)
    metric = main_metric(folder.summaries.get(name, {}))
    if row is None or metric is None:
        return "not scored", ""
    reason = row.get("reason")
    return "right" if row.get(metric) else "wrong", reason if isinstance(reason, str) else ""


def _prompt(folders: Sequence[RunFolder], name: str, index: int, record: Record | None) -> str:
    """One prompt: what was asked, what is right, and the answers."""
    parts = [f"<h5>{html_text(f'{name}, record {index}')}</h5>"]
    if record is not None:
        parts.append(paragraph(f"Asked: {_question_of(record)}"))
        if offered := [str(tool["function"].get("name")) for tool in record.tools]:
            parts.append(paragraph(f"Tools offered: {', '.join(offered)}", "note"))
        if right := _right_answer(record):
            parts.append(paragraph(f"Right: {right}"))
    texts = [folder.outputs[name][index] for folder in folders]
    answers = []
    for number, (folder, text) in enumerate(zip(folders, texts, strict=True)):
        other = texts[number - 1] if number else texts[min(1, len(texts) - 1)]
        verdict, reason = _verdict(folder, name, index)
        kind = f", {reason.partition(':')[0]}" if reason and verdict == "wrong" else ""
        detail = paragraph(reason, "note") if ":" in reason and verdict == "wrong" else ""
        answer = f"<dd><pre>{marked_differences(text, other)}</pre>{detail}</dd>"
        answers.append(f"<div><dt>{html_text(f'{folder.name}: {verdict}{kind}')}</dt>{answer}</div>")
    return f'<article>{"".join(parts)}<dl class="answers">{"".join(answers)}</dl></article>'


def _question_of(record: Record) -> str:
    said = [message.content for message in record.messages if message.role == "user"]
    return said[-1] if said else record.text


def _right_answer(record: Record) -> str:
    """The first accepted answer, as the paper writes calls; "" where the file has none."""
    if not record.gold:
        return record.answer
    try:
        return ", ".join(render_tool_call(ToolCall(call.name, call.arguments)) for call in record.gold[0].calls)
    except ToolCallError:
        return ", ".join(call.name for call in record.gold[0].calls)
