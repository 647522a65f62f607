"""What a prompt format is: a frozen record of plain functions, and the segments that its dialogues are made of.

A dialogue is a list of segments: control tokens, context, and targets, which are the words of the assistant. Every
segment is encoded on its own. A prompt is the dialogue up to the next target, so its ids are a prefix of the ids of the
whole dialogue: training and inference see the same tokens, whatever the user's text holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from data.tool_calls import ToolCall
from data.trajectories import Message


class TextEncoder(Protocol):
    """The part of a tokenizer that is needed, as `model.tokenizer.load_tokenizer` returns it."""

    bos_id: int | None  # None: the tokenizer has none (Qwen-2) and rows start with text
    eos_id: int

    def encode(self, text: str) -> list[int]: ...

    def encode_continuation(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def control_id(self, text: str) -> int | None: ...

    def piece(self, token_id: int) -> str: ...


class PromptError(ValueError):
    """The dialogue has no prompt in this format, or the tokenizer lacks one of the format's control tokens."""


@dataclass(frozen=True, slots=True)
class WrittenTurn:
    """A turn that the model wrote earlier in this dialogue: later prompts hold its text word for word, thoughts too.

    It appears among Messages. Only `openai` sends it back in pieces, because its API wants calls by name and number.
    """

    content: str  # the raw output
    calls: tuple[ToolCall, ...]  # what was read from it; () if that is not a call
    role: str = "assistant"
    call: None = None  # no call to be rendered in place of the content


Dialogue = Sequence[Message | WrittenTurn]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a dialogue that is encoded by itself: a control token as one id, text as its characters."""

    text: str
    message_index: int | None = None  # index into the messages, the first of several; None for the system text
    is_target: bool = False  # the assistant's own words, which training predicts (and the end of the turn after them)
    is_control: bool = False  # a control token of the template, never of a user
    name_span: tuple[int, int] | None = None  # of a target that is a call: where in `text` the tool's name is written
    end: str = ""  # of a target: the control token that ends the turn; "" is the tokenizer's EOS


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """One format. Its file in data/formats/ has the record, data/formats/table.py lists all of them."""

    name: str  # the value of --prompt_format
    # The calls of a raw output, at least one and at most call_text.MAX_CALLS; ToolCallError for anything else.
    parse_calls: Callable[[str], list[ToolCall]]
    # What a model of this format writes for its calls, checked by the caller; None: earlier turns have another form.
    render_calls: Callable[[Sequence[ToolCall]], str] | None
    # (tools, messages) -> segments; every assistant's message is exactly one target, and nothing before a target
    # depends on it. Raises PromptError. None: the format is messages of the chat API and has no text.
    dialogue_segments: Callable[[list[dict], Dialogue], list[Segment]] | None
    # (tools, messages) -> (messages, tools) of the chat API, tools [] where the messages hold them; None: completions.
    chat_request: Callable[[list[dict], Dialogue], tuple[list[dict], list[dict]]] | None = None
    # Text that ends a turn: control tokens other than the tokenizer's EOS, and words that the model must not write.
    stop_strings: tuple[str, ...] = ()
    has_one_call: bool = False  # per turn
    start_tokens: tuple[str, ...] | None = None  # before the first segment; None: the tokenizer's BOS, if it has one
    may_spell_controls: bool = False  # in characters, where the tokenizer has no such token
    reminder: str = ""  # the form of an answer, for a model that has missed it


# ---------------------------------------------------------------------------------------------------------------------
# Making segments


def control(text: str) -> Segment:
    """A control token of a template."""
    return Segment(text, is_control=True)


def call_target(index: int, pieces: tuple[str, str, str], end: str = "") -> Segment:
    """The target for a call, written as `pieces`: what comes before its name, the name, what comes after it."""
    before, name, _ = pieces
    return Segment("".join(pieces), index, True, name_span=(len(before), len(before) + len(name)), end=end)


def split_system(messages: Dialogue) -> tuple[str, list[tuple[int, Message | WrittenTurn]]]:
    """The system text of the dialogue, "" if it has none, and the other messages with their index.

    Raises PromptError for a dialogue that does not begin with the user, and for an unknown role.
    """
    turns = [(index, message) for index, message in enumerate(messages) if message.role != "system"]
    if not turns or turns[0][1].role != "user":
        raise PromptError(f"found {turns[0][1].role if turns else 'no message'} first, expected the user's query")
    for _, message in turns:
        if message.role not in ("user", "assistant", "tool"):
            raise PromptError(f"found role {message.role!a}, expected system, user, assistant or tool")
    return "\n\n".join(message.content for message in messages if message.role == "system"), turns


def strip_written(message: Message | WrittenTurn) -> Message | WrittenTurn:
    """A model's own turn without white space in front, for templates that write it themselves."""
    return replace(message, content=message.content.lstrip()) if isinstance(message, WrittenTurn) else message


def join_context(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbouring context texts as one, so that their ids are those of the whole text; empty ones go."""
    result: list[Segment] = []
    for segment in segments:
        is_context = not segment.is_control and not segment.is_target
        if is_context and result and not result[-1].is_control and not result[-1].is_target:
            result[-1] = replace(result[-1], text=result[-1].text + segment.text)
        elif segment.text or not is_context:
            result.append(segment)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def find_controls(
    segments: Sequence[Segment], tokenizer: TextEncoder, prompt_format: PromptFormat
) -> dict[str, int | None]:
    """The id of every control token of a dialogue, its start and the ends of its turns included.

    None for one that the tokenizer lacks where the format may spell it. Raises PromptError where it may not: the
    tokenizer of another model would spell it out in characters.
    """
    texts = [*(prompt_format.start_tokens or ()), *(part.text for part in segments if part.is_control)]
    texts += [part.end for part in segments if part.end]
    id_of_control = {text: tokenizer.control_id(text) for text in texts}
    missing = [text for text, token_id in id_of_control.items() if token_id is None]
    if missing and not prompt_format.may_spell_controls:
        raise PromptError(
            f"--prompt_format {prompt_format.name}: found no token {', '.join(missing)} in the tokenizer, expected "
            "that of a model of this format"
        )
    return id_of_control


def encode_segments(
    segments: Sequence[Segment], tokenizer: TextEncoder, prompt_format: PromptFormat
) -> list[tuple[Segment, list[int]]]:
    """(segment, its ids) in order; the ids of the start are with the first. Only the first text opens a sequence.

    Control tokens that the tokenizer lacks become part of the context around them if the format allows that. Raises
    PromptError if it does not: the tokenizer of another model would spell them out in characters.
    """
    id_of_control = find_controls(segments, tokenizer, prompt_format)
    missing = [text for text, token_id in id_of_control.items() if token_id is None]
    if missing:
        segments = join_context(
            [replace(part, is_control=part.is_control and part.text not in missing) for part in segments]
        )
    if prompt_format.start_tokens is None:
        start_ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    else:
        start_ids = [id_of_control[text] for text in prompt_format.start_tokens]
    result, is_first_text = [], True  # SentencePiece puts a space before the first text only
    for segment in segments:
        if segment.is_control:
            ids = [id_of_control[segment.text]]
        else:
            ids = tokenizer.encode(segment.text) if is_first_text else tokenizer.encode_continuation(segment.text)
            is_first_text = False
        result.append((segment, start_ids + ids))
        start_ids = []
    return result


def end_of_turn_id(end: str, tokenizer: TextEncoder) -> int:
    """The token that ends a turn whose target has this `end`: training predicts it, generation stops at it.

    It is the tokenizer's EOS for "", and for a control token that the tokenizer spells in characters.
    """
    token_id = tokenizer.control_id(end) if end else None
    return tokenizer.eos_id if token_id is None else token_id


def find_stop_ids(stop_texts: Sequence[str], tokenizer: TextEncoder) -> frozenset[int]:
    """Where generation stops: EOS, and those of `stop_texts` that are control tokens of the tokenizer."""
    return frozenset({tokenizer.eos_id, *map(tokenizer.control_id, stop_texts)} - {None})
