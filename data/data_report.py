"""What the log says about a data set before training: what is trained, what is masked, what is not used, and why.

Everything that comes from the data is printed as ASCII on one line, so no text of a file can act on a terminal.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.batches import why_dropped
from data.error_filter import TurnDecision
from data.loss_weights import EncodedTrajectory
from data.tool_calls import render_tool_call
from data.trajectories import LEFT_OUT_NULLS, Trajectory
from printable import one_line

N_EXAMPLES = 2  # of each rule, in data_report.json
EXAMPLE_CHARACTERS = 300  # of a call or a feedback there


def data_report(
    trajectories: Sequence[Trajectory],
    encoded: Sequence[EncodedTrajectory],
    kept: Sequence[EncodedTrajectory],
    notes: Sequence[str],
    *,
    max_tokens: int,
) -> dict:
    """What data_report.json of a run holds (docs/metrics.md): counts, masked turns by rule with examples, `notes`, and
    each dropped trajectory.

    Arguments as describe_data; notes: the lines of the log; max_tokens: as in drop_unusable.
    """
    return {
        "trajectories": len(trajectories),
        "trained_trajectories": len(kept),
        "tokens": sum(map(len, kept)),
        "assistant_turns": sum(len(row.turn_decisions) for row in encoded),
        "trained_turns": sum(row.trained_turns for row in kept),
        "trained_tokens": sum(row.trained_tokens for row in kept),
        "masked": [
            {
                "category": turns[0][1].category,
                "rule": turns[0][1].rule,
                "turns": len(turns),
                "examples": [_example(trajectory, turn) for trajectory, turn in turns[:N_EXAMPLES]],
            }
            for turns in _masked_by_rule(trajectories, encoded)
        ],
        "notes": list(notes),
        "dropped": [
            {"id": row.id, "reason": reason, "tokens": len(row)}
            for row in encoded
            if (reason := why_dropped(row, max_tokens))
        ],
    }


def _example(trajectory: Trajectory, turn: TurnDecision) -> dict:
    """One masked turn: where it is, its call, the text that the rule matched, and the feedback; texts are cut."""
    message, after = (trajectory.messages[turn.message_index :] + [None])[:2]
    feedback = after.content if after is not None and after.role == "tool" else ""
    return {
        "id": trajectory.id,
        "source": Path(trajectory.source).name,  # the file's name and the line
        "message_index": turn.message_index,
        "call": (message.content if message.call is None else render_tool_call(message.call))[:EXAMPLE_CHARACTERS],
        "matched_text": turn.matched_text,
        "feedback": feedback[:EXAMPLE_CHARACTERS],
    }


def _masked_by_rule(
    trajectories: Sequence[Trajectory], encoded: Sequence[EncodedTrajectory]
) -> list[list[tuple[Trajectory, TurnDecision]]]:
    """The masked turns of each category and rule, the most frequent rule first; of equals the first met."""
    by_rule: dict[tuple[str, str], list[tuple[Trajectory, TurnDecision]]] = {}
    for trajectory, row in zip(trajectories, encoded, strict=True):
        for turn in row.turn_decisions:
            if turn.masked:
                by_rule.setdefault((turn.category, turn.rule), []).append((trajectory, turn))
    return sorted(by_rule.values(), key=len, reverse=True)  # stable


def describe_data(
    trajectories: Sequence[Trajectory],
    encoded: Sequence[EncodedTrajectory],
    kept: Sequence[EncodedTrajectory],
    error_filter: str,
) -> list[str]:
    """Lines for the log. `encoded`: one row per trajectory, in their order; `kept`: those that will be trained.

    Masked turns are counted over all rows: a trajectory whose turns are all masked is not among `kept`. If more than
    half of all calls are masked, the last lines are a warning with the three most frequent rules.
    """
    lines = [
        f"{len(kept)} trajectories of {sum(map(len, kept))} tokens; trained: "
        f"{sum(row.trained_turns for row in kept)} turns, {sum(row.trained_tokens for row in kept)} tokens"
    ]
    masked = Counter(turn.category for row in encoded for turn in row.turn_decisions if turn.masked)
    counts = ", ".join(f"{category} {count}" for category, count in sorted(masked.items())) or "none"
    lines.append(f"turns masked by error_filter={error_filter}: {counts}")
    if n_excluded := sum(row.excluded_turns for row in encoded):
        lines.append(f"turns of weight 0 in the data: {n_excluded}, kept as context and not trained")
    left_out: Counter[str] = Counter()
    for trajectory in trajectories:
        left_out.update(trajectory.left_out)
    if n_thoughts := sum(row.left_out_thoughts for row in encoded):
        lines.append(
            f"{n_thoughts} turns have text next to the call: the prompt has no place for it, so it is not trained"
        )
    if n_nulls := left_out.pop(LEFT_OUT_NULLS, 0):
        lines.append(
            f"{n_nulls} null arguments dropped: no document has or allows them (columnar storage pads with null)"
        )
    lines += [f"{n} {kind}: not read" for kind, n in left_out.most_common(5)]
    lines += [f"{len(left_out) - 5} more kinds of such texts: not read"] if len(left_out) > 5 else []
    return lines + _warn_of_masking(trajectories, encoded)


def _warn_of_masking(trajectories: Sequence[Trajectory], encoded: Sequence[EncodedTrajectory]) -> list[str]:
    """The warning, or nothing if at most half of all calls are masked."""
    by_rule = _masked_by_rule(trajectories, encoded)
    n_masked = sum(map(len, by_rule))
    n_calls = 0
    for trajectory, row in zip(trajectories, encoded, strict=True):
        messages = [trajectory.messages[turn.message_index] for turn in row.turn_decisions]
        n_calls += sum(message.call is not None or message.fault is not None for message in messages)
    if 2 * n_masked <= n_calls:
        return []
    lines = [f"warning: {n_masked} of {n_calls} calls are masked and train nothing; the most frequent rules:"]
    for turns in by_rule[:3]:
        trajectory, turn = turns[0]
        call = trajectory.messages[turn.message_index].call
        name = "" if call is None else f" {one_line(call.name)}"
        matched = f" ({one_line(turn.matched_text, 120)})" if turn.matched_text else ""
        lines.append(
            f"warning: {len(turns)} x {turn.category}, {one_line(turn.rule)}{matched}; first at {trajectory.source} "
            f"message {turn.message_index}{name}"
        )
    return lines
