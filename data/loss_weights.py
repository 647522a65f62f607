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

The row above is in the paper's own format. In another one (data/formats/) a turn may hold more than its call: the text
before it, `{"name": "` and the like are trained with weight 1. The call of E3 and E4 begins with the first token that
has a character of the tool's name, and EOS is the control token that ends a turn of the format.
Lists here are not tensors, so they carry no shape suffix; T in the docstrings is the number of input positions.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from data.error_filter import TurnDecision, decide_masked_turns
from data.formats.call_text import json_text
from data.formats.prompt_format import Segment, TextEncoder, encode_segments, end_of_turn_id
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
    target_ids: array  # (T,) int32: the next id, or the end of the turn at the last token of a trained turn
    loss_weights: array  # (T,) float64, already scaled for the normalisation; 0 = not trained
    class_codes: bytes  # (T,) index into TOKEN_CLASSES of the target token
    message_indices: array  # (T,) int32: the message of the target token, or the one before the format's own tokens;
    # -1 = before the first message, or the end of the row
    turn_decisions: tuple[TurnDecision, ...]  # one per assistant turn: masked or not, and why
    trained_turns: int  # turns with weight
    trained_tokens: int  # target tokens with weight, EOS included
    denominator: float  # what this trajectory adds to the global denominator
    excluded_turns: int = 0  # turns of weight 0 in the data, masked ones included
    left_out_thoughts: int = 0  # turns whose text next to the call has no place in the format

    @property
    def token_classes(self) -> list[str]:
        """(T,) class name of each target token, one of TOKEN_CLASSES."""
        return [TOKEN_CLASSES[code] for code in self.class_codes]

    def __len__(self) -> int:
        return len(self.input_ids)


# ---------------------------------------------------------------------------------------------------------------------
# One turn


def count_tokens_before(ids: Sequence[int], text: str, tokenizer: TextEncoder) -> int:
    """How many of `ids` lie wholly within `text`. The text of the ids must begin with `text`.

    A token that spans the border, such as ` get` after a blank, is not among them.
    """
    if not text:
        return 0
    # Both texts are decoded, because a tokenizer may normalise characters, and decoding cuts a leading space.
    n_characters = len(tokenizer.decode(tokenizer.encode_continuation(text)))
    ends = range(1, len(ids) + 1)
    return bisect_right(ends, n_characters, key=lambda end: len(tokenizer.decode(list(ids[:end]))))


def name_place(segment: Segment) -> tuple[str, str]:
    """The characters before the name of a call, in its line, and the one after it: equal for all calls of a format."""
    start, end = segment.name_span
    return segment.text[:start].rpartition("\n")[2], segment.text[end : end + 1]


def encode_names(
    names: Sequence[str], tokenizer: TextEncoder, place: tuple[str, str] = (" ", "(")
) -> dict[str, Sequence[int]]:
    """Name -> its ids as they would be in the sample, from its first token through the character after it; each once.

    place: name_place of the call; merges differ at another. A name in quotes is written as in JSON.
    Keyed by text: merged brackets (`get()` against `get(`) would hide that two names are equal.
    """
    before, after = place
    result = {}
    for name in dict.fromkeys(names):  # keeps the order, drops duplicates
        written = json_text(name)[1:-1] if after == '"' else name
        ids = tokenizer.encode_continuation(f"{before}{written}{after}")
        result[name] = ids[count_tokens_before(ids, before, tokenizer) :]
    return result


def weigh_turn(
    segment: Segment,
    ids: Sequence[int],
    call_name: str | None,
    name_ids: dict[str, Sequence[int]],
    tokenizer: TextEncoder,
    *,
    max_key_token_weight: float | None,
) -> tuple[list[float], list[int]]:
    """Unscaled weights and class codes of one trained turn, EOS (weight 1) appended: both one longer than the ids.

    segment, ids: the target and its ids. call_name: None for plain text, which has weight 1 throughout. name_ids:
    encode_names of the offered tools. max_key_token_weight: None gives every token weight 1.
    """
    weights, codes = [1.0] * len(ids), [NORMAL] * len(ids)
    if max_key_token_weight is not None and call_name is not None:
        start = count_tokens_before(ids, segment.text[: segment.name_span[0]], tokenizer)
        call_ids = ids[start:]
        key_positions = find_key_tokens(call_ids, [ids for name, ids in name_ids.items() if name != call_name])  # E3
        weights[start:] = weigh_key_tokens(key_positions, len(call_ids), max_key_token_weight)  # E5
        for position in key_positions:
            codes[start + position] = KEY
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
    prompt_format: str = DEFAULT_FORMAT,
) -> EncodedTrajectory:
    """The whole trajectory as one row (module docstring); every segment is encoded on its own, BOS once at the start.

    error_filter: structured, substring or none (data.error_filter). Masked turns get weight 0 (E2) and stay context;
    so do turns for which the data itself says weight 0, whatever the filter. prompt_format: data.formats.table.
    Nothing is cut: data.batches.drop_unusable drops rows that are too long or train nothing, and reports them.
    Raises PromptError for a dialogue that the format cannot hold, and for a tokenizer without its control tokens.
    """
    decisions = tuple(decide_masked_turns(trajectory, error_filter))
    masked = {decision.message_index: decision.masked for decision in decisions}
    names = offered_names(trajectory.tools)
    names_at: dict[tuple[str, str], dict[str, Sequence[int]]] = {}  # the place is the same for all turns of a format
    row, entry, message_index = _Row(), FORMATS[prompt_format], -1
    segments = dialogue_segments(trajectory.tools, trajectory.messages, prompt_format)
    for segment, ids in encode_segments(segments, tokenizer, entry):
        row.input_ids += ids
        message_index = message_index if segment.message_index is None else segment.message_index
        message = trajectory.messages[message_index] if segment.is_target else None
        if message is not None and message.thought.strip() and message.thought not in segment.text:
            row.left_out_thoughts += 1
        if message is None or masked[message_index] or not message.weight:  # E2
            row.add_context(
                CONTEXT if message is None else MASKED if masked[message_index] else EXCLUDED, message_index
            )
            continue
        call_name, name_ids = None if message.call is None else message.call.name, {}
        if key_tokens and call_name is not None:
            place = name_place(segment)
            names_at[place] = names_at.get(place) or encode_names(names, tokenizer, place)
            name_ids = names_at[place]
        max_weight = max_key_token_weight if key_tokens else None
        weights, codes = weigh_turn(segment, ids, call_name, name_ids, tokenizer, max_key_token_weight=max_weight)
        weights, share = scale_turn(weights, loss_normalization)
        row.add_turn([*ids, end_of_turn_id(segment.end, tokenizer)], weights, codes, share, message_index)
    return row.finish(trajectory, decisions, tokenizer.eos_id)


class _Row:
    """A row while it grows. State: its columns and counts so far, as in EncodedTrajectory."""

    def __init__(self) -> None:
        self.input_ids, self.target_ids, self.loss_weights, self.codes, self.message_indices = [], [], [], [], []
        self.trained_turns, self.trained_tokens, self.denominator, self.left_out_thoughts = 0, 0, 0.0, 0

    def add_turn(
        self, target_ids: list[int], weights: list[float], codes: list[int], share: float, message_index: int
    ) -> None:
        """Targets of a trained turn, whose ids are in input_ids: one more than its ids, the last one ends the turn."""
        self.trained_turns, self.trained_tokens = self.trained_turns + 1, self.trained_tokens + len(target_ids)
        self.denominator += share
        self._extend(target_ids, weights, codes, message_index)

    def add_context(self, code: int, message_index: int) -> None:
        """Targets of weight 0 (E2) for the input ids that have none yet.

        The row's first id, which nothing predicts, gets none, nor does the first one after a trained turn: EOS is the
        target already.
        """
        target_ids = self.input_ids[len(self.target_ids) + 1 :]
        self._extend(target_ids, [0.0] * len(target_ids), [code] * len(target_ids), message_index)

    def finish(self, trajectory: Trajectory, decisions: tuple[TurnDecision, ...], eos_id: int) -> EncodedTrajectory:
        """The whole row. If it ends in context, its last token predicts nothing."""
        if len(self.target_ids) < len(self.input_ids):
            self._extend([eos_id], [0.0], [CONTEXT], -1)
        return EncodedTrajectory(
            id=trajectory.id,
            input_ids=array("i", self.input_ids),
            target_ids=array("i", self.target_ids),
            loss_weights=array("d", self.loss_weights),
            class_codes=bytes(self.codes),
            message_indices=array("i", self.message_indices),
            turn_decisions=decisions,
            trained_turns=self.trained_turns,
            trained_tokens=self.trained_tokens,
            denominator=self.denominator,
            excluded_turns=sum(message.weight == 0 for message in trajectory.messages),
            left_out_thoughts=self.left_out_thoughts,
        )

    def _extend(self, target_ids: list[int], weights: list[float], codes: list[int], message_index: int) -> None:
        self.target_ids += target_ids
        self.loss_weights += weights
        self.codes += codes
        self.message_indices += [message_index] * len(target_ids)
