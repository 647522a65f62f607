"""One encoded sample as turns of tokens with class and weight, for the terminal and the page. No layout in here."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.error_filter import TurnDecision
from data.loss_weights import CONTEXT, EOS, TOKEN_CLASSES, EncodedTrajectory, TextEncoder
from data.trajectories import Trajectory
from printable import terminal_lines

ROLE_TITLES = {"user": "user", "assistant": "assistant", "tool": "tool output", "system": "system text"}


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token as the reader sees it in the text."""

    text: str  # printable: control and bidirectional characters are written as escapes
    token_id: int
    kind: str  # one of TOKEN_CLASSES
    key_weight: float  # w of E4: 1 for a trained token that is not a key token, 0 for one that is not trained
    loss_weight: float  # what the loss multiplies with, scaled for the normalisation
    position: int  # input position that predicts it; -1 for the row's first token, which nothing predicts
    is_evidence: bool  # part of the text for which the turn before was masked


@dataclass(frozen=True, slots=True)
class TurnView:
    """One message, or the system text with the tools (message_index -1)."""

    message_index: int
    title: str
    call_name: str | None
    decision: TurnDecision | None  # assistant turns only
    tokens: list[TokenView]

    @property
    def is_trained(self) -> bool:
        return any(token.loss_weight for token in self.tokens)

    @property
    def is_excluded(self) -> bool:
        return any(token.kind == "excluded" for token in self.tokens)

    @property
    def loss_weight_sum(self) -> float:
        return sum(token.loss_weight for token in self.tokens)


@dataclass(frozen=True, slots=True)
class SampleView:
    """One trajectory and what was decided about it."""

    id: str
    source: str
    settings: dict[str, str]
    turns: list[TurnView]
    n_positions: int
    trained_turns: int
    trained_tokens: int
    loss_weight_sum: float
    denominator: float


def view_sample(
    trajectory: Trajectory,
    row: EncodedTrajectory,
    raw_row: EncodedTrajectory,
    tokenizer: TextEncoder,
    *,
    settings: dict[str, str],
) -> SampleView:
    """Tokens in reading order, grouped by message; every position of the row that predicts something appears once.

    row, raw_row: the same trajectory encoded with the chosen normalisation and with `sum`, whose weights are plain w.
    After a trained turn both EOS (predicted) and the next segment's first token (which nothing predicts) are shown.
    """
    decisions = {decision.message_index: decision for decision in row.turn_decisions}
    groups: dict[int, list[TokenView]] = {-1: [], **{index: [] for index in range(len(trajectory.messages))}}

    def add(token_id: int, message_index: int, position: int, *, code: int = CONTEXT) -> None:
        raw_weight, weight = 0.0, 0.0
        if position >= 0:
            raw_weight, weight = raw_row.loss_weights[position], row.loss_weights[position]
        groups[message_index].append(
            TokenView(
                terminal_lines(tokenizer.piece(token_id)),
                token_id,
                TOKEN_CLASSES[code],
                raw_weight,
                weight,
                position,
                False,
            )
        )

    add(row.input_ids[0], -1, -1)
    for position, code in enumerate(row.class_codes):
        is_last = position + 1 == len(row)
        if code == EOS or not is_last:
            add(row.target_ids[position], row.message_indices[position], position, code=code)
        if code == EOS and not is_last:  # the next input is not the target: show it as context
            add(row.input_ids[position + 1], row.message_indices[position + 1], -1)
    turns = [_view_turn(trajectory, index, tokens, decisions) for index, tokens in groups.items() if tokens]
    return SampleView(
        trajectory.id,
        trajectory.source,
        settings,
        turns,
        len(row),
        row.trained_turns,
        row.trained_tokens,
        sum(row.loss_weights),
        row.denominator,
    )


def _view_turn(
    trajectory: Trajectory, index: int, tokens: list[TokenView], decisions: dict[int, TurnDecision]
) -> TurnView:
    if index == -1:
        return TurnView(-1, "system text and tools", None, None, tokens)
    message = trajectory.messages[index]
    before = decisions.get(index - 1)
    if message.role == "tool" and before is not None and before.masked and before.matched_text:
        tokens = mark_evidence(tokens, before.matched_text)
    return TurnView(
        index,
        ROLE_TITLES.get(message.role, message.role),
        None if message.call is None else message.call.name,
        decisions.get(index),
        tokens,
    )


def mark_evidence(tokens: Sequence[TokenView], matched_text: str) -> list[TokenView]:
    """The tokens that overlap the first occurrence of `matched_text` (whose end may be cut to `...`) are evidence."""
    wanted = terminal_lines(matched_text.removesuffix("..."))
    start = "".join(token.text for token in tokens).find(wanted)
    if start < 0:
        return list(tokens)
    marked, end, offset = [], start + len(wanted), 0
    for token in tokens:
        overlaps = offset < end and offset + len(token.text) > start
        marked.append(
            TokenView(
                token.text, token.token_id, token.kind, token.key_weight, token.loss_weight, token.position, overlaps
            )
        )
        offset += len(token.text)
    return marked
