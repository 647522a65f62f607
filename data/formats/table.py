"""The one table of prompt formats, and what every part of the project does with a format by its name.

    tl          TL-CodeLLaMA-2    Table 13    text      name(p="v")
    plain       the bundled base  Table 13    text      name(p: "v").
    toolllama   ToolLLaMA-2       Table 6     text      Thought: .. \\nAction: name\\nAction Input: {..}
    nexusraven  NexusRaven-2      Table 7     text      Call: name(p='v'); name(q=1)<bot_end>
    chatglm4    ChatGLM-4         Table 8     chat      name\\n{..}
    qwen2       Qwen-2            Table 9     chat      as toolllama
    llama31     LLaMA-3.1         Table 10    chat      {"name": .., "parameters": {..}}
    qwen25      Qwen-2.5          Table 11    chat      <tool_call>\\n{"name": .., "arguments": {..}}\\n</tool_call>
    openai      GPT series        Table 12    chat API  {"tool_calls": [..]}
    react       any               ToolEyes    text or chat API, as toolllama

To add a format, write data/formats/NAME.py with a record FORMAT and list it here. docs/evaluation.md says what the
paper's tables leave open and what was decided.
"""

from collections.abc import Sequence

from data.formats import chatglm4, llama31, nexusraven, openai, plain, qwen2, qwen25, react, tl, toolllama
from data.formats.prompt_format import (
    Dialogue,
    PromptFormat,
    Segment,
    TextEncoder,
    encode_segments,
    end_of_turn_id,
    find_controls,
)
from data.tool_calls import ToolCall, ToolCallError, render_tool_call
from data.trajectories import Message

FORMATS: dict[str, PromptFormat] = {
    module.FORMAT.name: module.FORMAT
    for module in (tl, plain, toolllama, nexusraven, chatglm4, qwen2, llama31, qwen25, openai, react)
}
PROMPT_FORMATS = tuple(FORMATS)
COMPLETION_FORMATS = tuple(name for name, entry in FORMATS.items() if entry.dialogue_segments is not None)
# Forms in which a model can be trained: text that is both read and written, and that is not a server's chat API.
TRAINING_FORMATS = tuple(
    name
    for name, entry in FORMATS.items()
    if entry.dialogue_segments is not None and entry.render_calls is not None and entry.chat_request is None
)
DEFAULT_FORMAT = tl.FORMAT.name  # of training, and of prediction files that do not say theirs

_NEXT_TURN = Message("assistant", "")


def find_format(name: str) -> PromptFormat:
    """The format of this name. Raises ValueError for an unknown one."""
    if name not in PROMPT_FORMATS:
        raise ValueError(f"found format {name!a}, expected one of {', '.join(PROMPT_FORMATS)}")
    return FORMATS[name]


def dialogue_segments(tools: list[dict], messages: Dialogue, prompt_format: str = DEFAULT_FORMAT) -> list[Segment]:
    """The dialogue as segments, one target per assistant's message.

    `tools` are OpenAI function dicts. Raises PromptError for a dialogue that the format cannot hold, ValueError for a
    format without text.
    """
    segments_of = find_format(prompt_format).dialogue_segments
    if segments_of is None:
        raise ValueError(f"found format {prompt_format!a}, expected one of {', '.join(COMPLETION_FORMATS)}")
    return segments_of(tools, messages)


def prompt_segments(tools: list[dict], messages: Dialogue, prompt_format: str = DEFAULT_FORMAT) -> list[Segment]:
    """What asks for the assistant's next turn: the dialogue with that turn, up to its words. Raises as above."""
    segments = dialogue_segments(tools, [*messages, _NEXT_TURN], prompt_format)
    last = max(index for index, segment in enumerate(segments) if segment.is_target)
    return segments[:last]


def prompt_text(tools: list[dict], messages: Dialogue, prompt_format: str = DEFAULT_FORMAT) -> str:
    """The prompt for a completions endpoint, control tokens as text. Raises as dialogue_segments.

    The start is left out (BOS, `[gMASK]<sop>`): such an endpoint puts it before any text by itself.
    """
    return "".join(segment.text for segment in prompt_segments(tools, messages, prompt_format))


def encode_prompt(
    tools: list[dict], messages: Dialogue, tokenizer: TextEncoder, prompt_format: str = DEFAULT_FORMAT
) -> list[int]:
    """Ids of the prompt for a model of ours: start, then each control token as one id and each text by itself.

    A query that contains "<|im_end|>" cannot end a turn. Raises as dialogue_segments, and PromptError for a
    tokenizer without the format's control tokens.
    """
    segments = prompt_segments(tools, messages, prompt_format)
    return [token for _, ids in encode_segments(segments, tokenizer, FORMATS[prompt_format]) for token in ids]


def end_of_turn_ids(tokenizer: TextEncoder, prompt_format: str = DEFAULT_FORMAT) -> list[int]:
    """The tokens that a trained model of this format ends its turns with: first that after a call, then others.

    Raises PromptError for a tokenizer without the control tokens of the format, which it names.
    """
    turns = [Message("assistant", "", ToolCall("f", {})), Message("assistant", "words")]
    segments = dialogue_segments([], [Message("user", ""), *turns], prompt_format)
    find_controls(segments, tokenizer, FORMATS[prompt_format])
    ends = [end_of_turn_id(segment.end, tokenizer) for segment in segments if segment.is_target]
    return list(dict.fromkeys(ends))


def parse_output(output: str, prompt_format: str) -> list[ToolCall]:
    """All calls of a model's raw output, in its order, at least one and at most call_text.MAX_CALLS.

    Raises ToolCallError, one line of ASCII, if the output is anything but calls of this format with JSON values (no
    NaN, no key twice, at most data.tool_calls.MAX_NESTING levels); ValueError for an unknown format.
    """
    parse_calls = find_format(prompt_format).parse_calls
    if not isinstance(output, str):
        raise ToolCallError(f"found {type(output).__name__}, expected the text that a model wrote")
    return parse_calls(output)


def render_output(calls: Sequence[ToolCall], prompt_format: str) -> str:
    """What a model of this format writes for `calls`: parse_output reads the same calls back, types included.

    Raises ToolCallError for calls outside the grammar, for no call, and for several where the format has one;
    ValueError for a format that is unknown or never rendered (`plain`).
    """
    entry = find_format(prompt_format)
    if entry.render_calls is None:
        raise ValueError(f"found format {prompt_format!a}, expected one that is also written")
    for call in calls:
        render_tool_call(call)
    if not calls or len(calls) > 1 and entry.has_one_call:
        raise ToolCallError(f"found {len(calls)} calls, expected one")
    return entry.render_calls(calls)
