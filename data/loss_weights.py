"""A trajectory as ids with one loss weight per target token, in a single row.

The released code writes one row per assistant turn, each with its whole prefix encoded again. Under causal attention
one row over the whole trajectory gives the same log-probabilities, because position i sees ids 0..i in both. One detail
makes the two exactly equal: after a trained call the model has to say EOS, while the context of the later turns goes
on with a newline. So `target_ids` is not `input_ids` shifted by one:

    input_ids   ...  Assistant :   .get  (   )    \\n  Output ...
    target_ids  ...  :         .get  (   )    EOS  Output  :  ...
    weight       0   0         9     1   1    1    0   ...

Erroneous turns (MAE, E2) keep their place in the context and get weight 0 ("masked"), and so do turns of weight 0 in
the data ("excluded"). Key tokens (PKT, E5) weigh more than 1.
Lists here are not tensors, so they carry no shape suffix; T in the docstrings is the number of input positions.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from data.error_filter import TurnDecision, decide_masked_turns
from data.formats.prompt_format import TextEncoder, encode_segments
from data.formats.table import DEFAULT_FORMAT, FORMATS, dialogue_segments
from data.key_tokens import find_key_tokens, weigh_key_tokens
from data.tool_documents import offered_names
from data.trajectories import Trajectory

TOKEN_CLASSES = ("context", "masked", "normal", "key", "eos", "excluded")
LOSS_NORMALIZATIONS = ("turn_mean", "token_mean", "sum")
CONTEXT, MASKED, NORMAL, KEY, EOS, EXCLUDED = range(len(TOKEN_CLASSES))


@dataclass(frozen=True, slots=True, eq=False)
class EncodedTrajectory:
    """One trajectory, T input positions. Position i belongs to the token that it has to predict, `target_ids[i]`."""

    id: str
    input_ids: array  # (T,) int32, BOS first where the tokenizer has one
    target_ids: array  # (T,) int32: the next id, or EOS at the last token of a trained turn
    loss_weights: array  # (T,) float64, already scaled for the normalisation; 0 = not trained
    class_codes: bytes  # (T,) index into TOKEN_CLASSES of the target token
    message_indices: array  # (T,) int32: the message of the target token, -1 = system text or end of the row
    turn_decisions: tuple[TurnDecision, ...]  # one per assistant turn: masked or not, and why
    trained_turns: int  # turns with weight
    trained_tokens: int  # target tokens with weight, EOS included
    denominator: float  # what this trajectory adds to the global denominator
    excluded_turns: int = 0  # turns of weight 0 in the data, masked ones included

    @property
    def token_classes(self) -> list[str]:
        """(T,) class name of each target token, one of TOKEN_CLASSES."""
        return [TOKEN_CLASSES[code] for code in self.class_codes]

    def __len__(self) -> int:
        return len(self.input_ids)


# ---------------------------------------------------------------------------------------------------------------------
# One turn


def without_leading_blanks(ids: Sequence[int], tokenizer: TextEncoder) -> Sequence[int]:
    """`ids` from the first one that is more than whitespace: some tokenizers have the leading space as its own piece.

    Such a space precedes every call. It decides nothing and must not be taken for the first token of the name.
    """
    start = 0
    while start < len(ids) and not tokenizer.piece(ids[start]).strip():
        start += 1
    return ids[start:]


def encode_names(names: Sequence[str], tokenizer: TextEncoder) -> dict[str, Sequence[int]]:
    """Name -> its ids as they would be in the sample, leading space and bracket included; each name once.

    Keyed by text: merged brackets (`get()` against `get(`) would hide that two names are equal.
    """
    return {
        name: without_leading_blanks(tokenizer.encode_continuation(f" {name}("), tokenizer)
        for name in dict.fromkeys(names)  # keeps the order, drops duplicates
    }


def weigh_turn(
    target_text_ids: Sequence[int],
    call_name: str | None,
    name_ids: dict[str, Sequence[int]],
    tokenizer: TextEncoder,
    *,
    max_key_token_weight: float | None,
) -> tuple[list[float], list[int]]:
    """Unscaled weights and class codes of one trained turn, EOS (weight 1) appended: both one longer than the ids.

    call_name: None for plain text, which has weight 1 throughout. name_ids: encode_names of the offered tools.
    max_key_token_weight: None gives every token weight 1.
    """
    weights, codes = [1.0] * len(target_text_ids), [NORMAL] * len(target_text_ids)
    if max_key_token_weight is not None and call_name is not None:
        call_ids = without_leading_blanks(target_text_ids, tokenizer)
        n_blank = len(target_text_ids) - len(call_ids)
        key_positions = find_key_tokens(call_ids, [ids for name, ids in name_ids.items() if name != call_name])  # E3
        weights[n_blank:] = weigh_key_tokens(key_positions, len(call_ids), max_key_token_weight)  # E5
        for position in key_positions:
            codes[n_blank + position] = KEY
    return weights + [1.0], codes + [EOS]


def scale_turn(weights: Sequence[float], loss_normalization: str) -> tuple[list[float], float]:
    """Weights of one turn as the loss needs them, and the turn's share of the global denominator.

    The loss of a step is `sum_i w_i * ce_i` over all ranks and micro-batches, divided once by the sum of the shares:
    turn_mean   w / (sum of the turn's w), share 1: mean over turns of the weighted mean of a turn   # E6
    token_mean  w, share sum of w: weighted mean over all tokens                                     # E7
    sum         w, share 0: the caller divides by 1, the paper's plain sum                           # E8
    Raises ValueError for another name.
    """
    total = sum(weights)
    if loss_normalization == "turn_mean":
        return [weight / total for weight in weights], 1.0  # E6
    if loss_normalization == "token_mean":
        return list(weights), total  # E7
    if loss_normalization == "sum":
        return list(weights), 0.0  # E8
    known = ", ".join(LOSS_NORMALIZATIONS)
    raise ValueError(f"loss_normalization: found {loss_normalization!r}, expected one of {known}")


# ---------------------------------------------------------------------------------------------------------------------
# One row per trajectory


def encode_trajectory(
    trajectory: Trajectory,
    tokenizer: TextEncoder,
    *,
    error_filter: str,
    key_tokens: bool,
    max_key_token_weight: float,
    loss_normalization: str,
) -> EncodedTrajectory:
    """The whole trajectory as one row (module docstring); every segment is encoded on its own, BOS once at the start.

    error_filter: structured, substring or none (data.error_filter). Masked turns get weight 0 (E2) and stay context;
    so do turns for which the data itself says weight 0, whatever the filter.
    Nothing is cut: data.batches.drop_unusable drops rows that are too long or train nothing, and reports them.
    """
    decisions = tuple(decide_masked_turns(trajectory, error_filter))
    masked = {decision.message_index: decision.masked for decision in decisions}
    name_ids = encode_names(offered_names(trajectory.tools), tokenizer) if key_tokens else {}
    input_ids, target_ids = [], []
    loss_weights, codes, message_indices = [], [], []
    trained_turns, trained_tokens, denominator = 0, 0, 0.0
    segments = dialogue_segments(trajectory.tools, trajectory.messages)
    for segment, ids in encode_segments(segments, tokenizer, FORMATS[DEFAULT_FORMAT]):
        # 1 for the row's first id, which nothing predicts, and after a trained turn, where EOS is the target already.
        n_filled = len(target_ids) - (len(input_ids) - 1)
        input_ids += ids
        message_index = -1 if segment.message_index is None else segment.message_index
        if segment.is_target and not masked[message_index] and trajectory.messages[message_index].weight:
            call = trajectory.messages[message_index].call
            raw_weights, turn_codes = weigh_turn(
                ids,
                None if call is None else call.name,
                name_ids,
                tokenizer,
                max_key_token_weight=max_key_token_weight if key_tokens else None,
            )
            turn_weights, share = scale_turn(raw_weights, loss_normalization)
            turn_targets = [*ids, tokenizer.eos_id]
            trained_turns, trained_tokens = trained_turns + 1, trained_tokens + len(turn_targets)
            denominator += share
        else:
            turn_targets = ids[n_filled:]
            turn_weights = [0.0] * len(turn_targets)  # E2: masked turns and context train nothing
            code = CONTEXT if not segment.is_target else MASKED if masked[message_index] else EXCLUDED
            turn_codes = [code] * len(turn_targets)
        target_ids += turn_targets
        loss_weights += turn_weights
        codes += turn_codes
        message_indices += [message_index] * len(turn_targets)
    if len(target_ids) < len(input_ids):  # the row ends in context: its last token predicts nothing
        target_ids, loss_weights = [*target_ids, tokenizer.eos_id], [*loss_weights, 0.0]
        codes, message_indices = [*codes, CONTEXT], [*message_indices, -1]
    return EncodedTrajectory(
        id=trajectory.id,
        input_ids=array("i", input_ids),
        target_ids=array("i", target_ids),
        loss_weights=array("d", loss_weights),
        class_codes=bytes(codes),
        message_indices=array("i", message_indices),
        turn_decisions=decisions,
        trained_turns=trained_turns,
        trained_tokens=trained_tokens,
        denominator=denominator,
        excluded_turns=sum(message.weight == 0 for message in trajectory.messages),
    )
