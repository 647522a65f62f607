"""The part of a run page that shows one SFT or PPO run: settings, data, curves, sample responses."""

import json
from collections.abc import Mapping, Sequence

from charts import (
    PPO_QUANTITIES,
    SFT_QUANTITIES,
    Quantity,
    format_number,
    mean_interval,
    mean_width,
    points_of,
    ppo_charts,
    rollouts_of,
    sft_charts,
    stretch_means,
    trend_chart,
    trend_of,
)
from eval.reports.page_parts import figures, folded, html_text, items, marked_differences, paragraph, section, table
from eval.reports.run_folders import PPO, RunFolder, last_step_of
from svg import Chart

N_ROWS = 10  # of the table with the numbers of the curves
N_SAMPLES = 8  # responses shown over the run
HELD_OUT_QUANTITIES = (
    Quantity("Loss on held-out data", "nats", ("held_out/loss",), is_averaged=False),
    Quantity("Right greedy calls on held-out data", "count", ("held_out/right_calls",), is_averaged=False),
)


def training_section(folder: RunFolder, identifier: str) -> str:
    """The run as HTML. `identifier` begins the ids of its elements."""
    return section(
        2,
        f"{folder.name}: {folder.kind} run, {progress_of(folder)}",
        identifier,
        items(folder.problems, "problems") if folder.problems else "",
        section(3, "Settings and machine", f"{identifier}-settings", settings_part(folder)),
        section(3, "Data", f"{identifier}-data", *_data_parts(folder.report)),
        section(3, "Curves", f"{identifier}-curves", *_curve_parts(folder, identifier)),
        section(3, "Sample responses", f"{identifier}-samples", *_sample_parts(folder)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# In words


def describe_training(folder: RunFolder) -> str:
    """How far the run got and what its curve did, in plain sentences."""
    first = f"{folder.name} is {'a PPO' if folder.kind == PPO else 'an SFT'} run, {progress_of(folder)}."
    return " ".join([first, *(_describe_reward(folder) if folder.kind == PPO else _describe_loss(folder.metrics))])


def progress_of(folder: RunFolder) -> str:
    """`finished, 60 of 60 optimizer steps`."""
    planned = last_step_of(folder)
    done = int(folder.metrics[-1]["step"]) if folder.metrics else 0
    steps = f"{done:,} optimizer steps" if planned is None else f"{done:,} of {planned:,} optimizer steps"
    return f"{'finished' if folder.is_finished else 'not finished'}, {steps}"


def _describe_loss(metrics: Sequence[Mapping]) -> list[str]:
    losses = [row["sft/loss"] for row in metrics if "sft/loss" in row]
    if not losses:
        return []
    n = mean_width(len(losses))
    first, last = sum(losses[:n]) / n, sum(losses[-n:]) / n
    change = "fell" if last < first else "rose" if last > first else "stayed"
    return [
        f"The training loss {change} from {format_number(first)} to {format_number(last)} nats "
        f"(means of the first and the last {n} of {len(losses):,} steps). Lower is better."
    ]


def _describe_reward(folder: RunFolder) -> list[str]:
    sentences = []
    until = critic_only_until(folder)
    if until:
        sentences.append(f"Up to step {until:,} it trains the critic alone: the model's answers do not change there.")
    numbers = sorted({row["iteration"] for row in folder.samples})
    n = mean_width(len(numbers))
    stretches = [
        [row["reward"] for row in folder.samples if row["iteration"] in chosen]
        for chosen in (set(numbers[:n]), set(numbers[-n:]))
    ]
    if len(numbers) < 2 or min(map(len, stretches)) < 2:
        return sentences
    (first, *first_interval), (last, *last_interval) = map(mean_interval, stretches)
    is_apart = first_interval[1] < last_interval[0] or last_interval[1] < first_interval[0]
    verdict = "the intervals do not overlap" if is_apart else "the intervals overlap, so this shows no change"
    sentences.append(
        f"The mean reward of a sampled response was {_with_interval(first, first_interval)} in the first {n} of "
        f"{len(numbers):,} iterations (n = {len(stretches[0])} responses) and {_with_interval(last, last_interval)} in "
        f"the last {n} (n = {len(stretches[1])}). Brackets are 95 % intervals; {verdict}. Rewards are between -2 and "
        "1; higher is better."
    )
    return sentences


def _with_interval(mean: float, interval: Sequence[float]) -> str:
    return f"{mean:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def critic_only_until(folder: RunFolder) -> int:
    """The last optimizer step of the iterations that train the critic alone; 0 = there are none."""
    iterations = folder.config.get("critic_only_iterations")
    if type(iterations) is not int:
        return 0
    return int(max((row["step"] for row in folder.metrics if row.get("iteration", iterations) < iterations), default=0))


# ---------------------------------------------------------------------------------------------------------------------
# Settings and data


def settings_part(folder: RunFolder) -> str:
    """The settings that differ from their defaults, then all, then the machine; folded."""
    config, defaults = folder.config, folder.environment.get("changed_from")
    if not config:
        return paragraph("config.json is missing or damaged: the settings are not known.")
    head, changed = ["setting", "value"], ""
    if isinstance(defaults, dict):
        rows = [
            [name, value_text(config.get(name)), value_text(default)]
            for name, default in defaults.items()
            if name in config
        ]
        title = f"{len(rows)} of {len(config)} settings differ from their defaults"
        if rows:
            changed = table("Settings that differ from their defaults", [*head, "default"], rows)
    else:
        title, changed = "Settings", paragraph("environment.json does not say which settings are the defaults.")
    every = table(f"All {len(config)} settings", head, [[name, value_text(value)] for name, value in config.items()])
    if folder.history:
        rows = [[row["setting"], *_texts(row, "step", "old", "new")] for row in folder.history]
        changed += table("Settings changed on the way (--override)", ["setting", "after step", "old", "new"], rows)
    machine = {name: value for name, value in folder.environment.items() if name != "changed_from"}
    parts = [folded(title, changed + folded("All settings", every))]
    if machine:
        rows = [[name.replace("_", " "), value_text(value)] for name, value in machine.items()]
        parts.append(folded("Machine and versions", table("Machine and versions", ["what", "value"], rows)))
    return "\n".join(parts)


def value_text(value: object) -> str:
    """A value of a JSON file in words."""
    if isinstance(value, list):
        return " ".join(map(value_text, value))
    return value or "(empty)" if isinstance(value, str) else json.dumps(value)


def _data_parts(report: Mapping) -> list[str]:
    """What was read, what was masked by which rule, with examples, and the run's own lines about it."""
    if not report:
        return [paragraph("data_report.json is missing or damaged: what the run read is not known.")]
    counts = [[key.replace("_", " "), f"{value:,}"] for key, value in report.items() if type(value) is int]
    parts = [table("What the run read", ["what", "count"], counts)] if counts else []
    rules = [each for each in _list(report, "masked") if isinstance(each, dict)]
    if rules:
        rows = [_texts(each, "rule", "category", "turns") for each in rules]
        caption = "Assistant turns masked because their call failed (MAE)"
        parts.append(table(caption, ["rule", "category", "turns"], rows))
        head = ["where", "message", "rule", "call", "what the rule found", "feedback"]
        examples = [
            [*_texts(example, "source", "message_index"), *_texts(each, "rule")]
            + _texts(example, "call", "matched_text", "feedback")
            for each in rules
            for example in _list(each, "examples")
            if isinstance(example, dict)
        ]
        parts.append(folded("Examples of masked turns", table("First masked turns of each rule", head, examples)))
    elif "masked" in report:
        parts.append(paragraph("No turn was masked."))
    notes = [value_text(note) for note in _list(report, "notes")]
    return [*parts, folded("What the log says about the data", items(notes))] if notes else parts


def _texts(mapping: Mapping, *keys: str) -> list[str]:
    return [value_text(mapping.get(key)) for key in keys]


def _list(mapping: Mapping, key: str) -> list:
    value = mapping.get(key)
    return value if isinstance(value, list) else []


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def _curve_parts(folder: RunFolder, identifier: str) -> list[str]:
    if not folder.metrics:
        return [paragraph("There is no curve: metrics.jsonl holds no step.")]
    if folder.kind == PPO:
        iterations = folder.config.get("critic_only_iterations")
        drawn = ppo_charts(
            folder.metrics, folder.samples, folder.evaluations, iterations if type(iterations) is int else 0
        )
        quantities = PPO_QUANTITIES
    else:
        drawn, quantities = sft_charts(folder.metrics) + _held_out_charts(folder.held_out), SFT_QUANTITIES
    return [
        figures(drawn, f"{identifier}-chart"),
        folded("Numbers of the curves", numbers_table(folder.metrics, quantities)),
    ]


def _held_out_charts(rows: Sequence[Mapping]) -> list[Chart]:
    asked = {row["held_out/calls"] for row in rows if "held_out/calls" in row}
    units = {"count": f"of {max(asked):g}" if asked else "count"}
    return [
        trend_chart(quantity.title, units.get(quantity.unit, quantity.unit), [trend_of("", points, 1, "evaluations")])
        for quantity in HELD_OUT_QUANTITIES
        if (points := points_of(rows, quantity)[quantity.keys[0]])
    ]


def numbers_table(metrics: Sequence[Mapping], quantities: Sequence[Quantity]) -> str:
    """Means over N_ROWS stretches of the run, one column per curve."""
    n_steps = -(-len(metrics) // N_ROWS)
    head, columns = ["steps"], []
    for quantity in quantities:
        for name, key in zip(quantity.names, quantity.keys, strict=True):
            if any(key in row for row in metrics):
                head.append(f"{quantity.title}{', ' if name else ''}{name}, {quantity.unit}")
                columns.append((key, quantity.is_of_rollout))
    rows = []
    for start in range(0, len(metrics), n_steps):
        stretch = metrics[start : start + n_steps]
        cells = []
        for key, is_of_rollout in columns:
            values = [row[key] for row in (rollouts_of(stretch) if is_of_rollout else stretch) if key in row]
            cells.append(format_number(stretch_means(values, len(values))[0]) if values else "-")
        first, last = (f"{stretch[end]['step']:g}" for end in (0, -1))
        rows.append([first if first == last else f"{first} to {last}", *cells])
    caption = f"Means of up to {n_steps} steps each, of {len(metrics):,} logged" if n_steps > 1 else "Every logged step"
    return table(caption, head, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Sample responses


def _sample_parts(folder: RunFolder) -> list[str]:
    """The first response of some iterations, from the first to the last, with the gold call next to it."""
    if folder.kind != PPO:
        return [paragraph("SFT samples no responses. Evaluations of its model show what it answers.")]
    firsts = list({row["iteration"]: row for row in reversed(folder.samples)}.values())[::-1]
    if not firsts:
        return [paragraph("There is no sample: samples.jsonl holds no response.")]
    places = [round(i * (len(firsts) - 1) / (N_SAMPLES - 1)) for i in range(N_SAMPLES)]
    chosen = [firsts[place] for place in dict.fromkeys(places)]
    note = (
        f"The first response of {len(chosen)} of {len(firsts):,} iterations, sampled at the training temperature. "
        "Words that differ between response and gold call are marked (underlined)."
    )
    return [paragraph(note, "note"), *(_sample(row) for row in chosen)]


def _sample(row: Mapping) -> str:
    response, gold = row["response"].strip(), row.get("gold")
    gold = gold if isinstance(gold, str) else ""
    title = (
        f"Step {row['step']:g}: {value_text(row.get('category')).replace('_', ' ')}, reward {row['reward']:+.2f}"
        + (f", KL {row['kl']:.2f} nats" if isinstance(row.get("kl"), float) else "")
    )
    answers = _answer("response", marked_differences(response, gold) if gold else html_text(response)) + _answer(
        "gold call", marked_differences(gold, response) if gold else "not logged by this run"
    )
    parts = [f"<h4>{html_text(title)}</h4>", paragraph(f"Asked: {request_of(row)}")]
    parts += [f'<dl class="answers">{answers}</dl>', paragraph(value_text(row.get("explanation", "")), "note")]
    return f"<article>{''.join(parts)}</article>"


def _answer(name: str, marked: str) -> str:
    return f"<div><dt>{html_text(name)}</dt><dd><pre>{marked}</pre></dd></div>"


def request_of(row: Mapping) -> str:
    """What the user asked: logged, or the end of the prompt."""
    if isinstance(row.get("request"), str):
        return row["request"]
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        return "not logged"
    return prompt.rpartition("\nUser:")[2].partition("\nAssistant:")[0].strip()[-400:]
