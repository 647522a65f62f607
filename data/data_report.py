"""What the log says about a data set before training: what is trained, what is masked, what is not used, and why.

Everything that comes from the data is printed as ASCII on one line, so no text of a file can act on a terminal.
"""

from collections import Counter
from collections.abc import Sequence

from data.error_filter import TurnDecision
from data.json_records import one_line
from data.loss_weights import EncodedTrajectory
from data.trajectories import LEFT_OUT_NULLS, Trajectory


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
    examples: dict[tuple[str, str], list[tuple[Trajectory, TurnDecision]]] = {}
    n_calls = 0
    for trajectory, row in zip(trajectories, encoded, strict=True):
        for turn in row.turn_decisions:
            message = trajectory.messages[turn.message_index]
            n_calls += message.call is not None or message.fault is not None
            if turn.masked:
                examples.setdefault((turn.category, turn.rule), []).append((trajectory, turn))
    n_masked = sum(map(len, examples.values()))
    if 2 * n_masked <= n_calls:
        return []
    lines = [f"warning: {n_masked} of {n_calls} calls are masked and train nothing; the most frequent rules:"]
    by_count = sorted(examples.items(), key=lambda item: -len(item[1]))  # stable: the first met of equals
    for (category, rule), turns in by_count[:3]:
        trajectory, turn = turns[0]
        call = trajectory.messages[turn.message_index].call
        name = "" if call is None else f" {one_line(call.name)}"
        matched = f" ({one_line(turn.matched_text, 120)})" if turn.matched_text else ""
        lines.append(
            f"warning: {len(turns)} x {category}, {one_line(rule)}{matched}; first at {trajectory.source} "
            f"message {turn.message_index}{name}"
        )
    return lines
