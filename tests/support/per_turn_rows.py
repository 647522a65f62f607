"""One row per assistant turn, as the released code writes them: the oracle for data.loss_weights.encode_trajectory."""

from array import array

from data.error_filter import decide_masked_turns
from data.formats.prompt_format import encode_segments
from data.formats.table import DEFAULT_FORMAT, FORMATS, dialogue_segments
from data.loss_weights import CONTEXT, EncodedTrajectory, TextEncoder, encode_names, scale_turn, weigh_turn
from data.tool_documents import offered_names
from data.trajectories import Trajectory


def expand_per_turn(
    trajectory: Trajectory,
    tokenizer: TextEncoder,
    *,
    error_filter: str,
    key_tokens: bool,
    max_key_token_weight: float,
    loss_normalization: str,
) -> list[EncodedTrajectory]:
    """The released way: per kept turn a row of its whole prefix, only that turn trained.

    Each row is its prefix plus EOS, shifted by one; its weights are those of encode_trajectory for that turn.
    """
    decisions = tuple(decide_masked_turns(trajectory, error_filter))
    masked = {decision.message_index: decision.masked for decision in decisions}
    name_ids = encode_names(offered_names(trajectory.tools), tokenizer)
    segments, rows = dialogue_segments(trajectory.tools, trajectory.messages), []
    for last, segment in enumerate(segments):
        if not segment.is_target or masked[segment.message_index]:
            continue
        if trajectory.messages[segment.message_index].weight == 0:
            continue
        *prefix, (_, turn_ids) = encode_segments(segments[: last + 1], tokenizer, FORMATS[DEFAULT_FORMAT])
        prefix_ids = [token_id for _, ids in prefix for token_id in ids]
        call = trajectory.messages[segment.message_index].call
        raw_weights, codes = weigh_turn(
            segment,
            turn_ids,
            None if call is None else call.name,
            name_ids,
            tokenizer,
            max_key_token_weight=max_key_token_weight if key_tokens else None,
        )
        weights, share = scale_turn(raw_weights, loss_normalization)
        row, n_context = [*prefix_ids, *turn_ids, tokenizer.eos_id], len(prefix_ids) - 1
        rows.append(
            EncodedTrajectory(
                id=f"{trajectory.id}#{segment.message_index}",
                input_ids=array("i", row[:-1]),
                target_ids=array("i", row[1:]),
                loss_weights=array("d", [0.0] * n_context + weights),
                class_codes=bytes([CONTEXT] * n_context + codes),
                message_indices=array("i", [-1] * n_context + [segment.message_index] * len(weights)),
                turn_decisions=decisions,
                trained_turns=1,
                trained_tokens=len(weights),
                denominator=share,
            )
        )
    return rows
