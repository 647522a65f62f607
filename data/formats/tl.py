"""Trajectories to prompt text (paper Table 13) and to token ids, segment by segment.

    System: Function:
    def name(p: string, q: string = None):
        ...
    User: query
    Assistant: name(p="value")</s>
    Output: feedback

Training and inference share one segment function, and every segment is encoded on its own. So the ids of a prompt are a
prefix of the ids of the training sample, and no token spans the border of a turn, whatever the user's text holds.
"""

from dataclasses import dataclass

from data.tool_calls import render_tool_call
from data.tool_documents import tool_parameters
from data.trajectories import Message, Trajectory

# No space behind the colon: the LLaMA tokenizer puts it into the first token of the call (`_get`). A prompt that ends
# with the space makes the model start with a token it never saw there; symptom: names without their first letters.
ASSISTANT_HEADER = "\nAssistant:"


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the prompt that is encoded by itself."""

    text: str
    message_index: int | None  # index into the messages; None for the system segment with the tools
    is_target: bool  # the assistant's own words, which training predicts (with EOS after them)


def render_tools(tools: list[dict]) -> str:
    """The documents of all tools as Python-like signatures, two newlines between them (Table 13).

    `tools` are OpenAI function dicts. Required parameters stand first, in the order of `required`; the others follow
    with ` = None`. A parameter without type is `any`; several types are joined by `|`.
    """
    return "\n\n".join(_render_tool(tool["function"]) for tool in tools)


def _render_tool(function: dict) -> str:
    properties, required = tool_parameters(function)
    optional = [name for name in properties if name not in required]
    schemas = [(name, properties.get(name) or {}) for name in required + optional]
    signature = ", ".join(
        f"{name}: {_type_name(schema)}{' = None' if name in optional else ''}" for name, schema in schemas
    )
    lines = [
        "Function:",
        f"def {function['name']}({signature}):",
        '    """',
        f"    {function.get('description') or ''}",
        "",
        "    Args:",
    ]
    lines += [f"    {name} ({_type_name(schema)}): {schema.get('description') or ''}" for name, schema in schemas]
    return "\n".join([*lines, '    """'])


def _type_name(schema: dict) -> str:
    kind = schema.get("type") or "any"
    return "|".join(str(entry) for entry in kind) if isinstance(kind, list) else str(kind)


def trajectory_segments(trajectory: Trajectory) -> list[Segment]:
    """The trajectory as segments; joined, their texts are the prompt of Table 13 without BOS and EOS.

    A call is rendered by `render_tool_call`; a plain text turn and an unparsable call stand as they are in the file.
    """
    return message_segments(trajectory.tools, trajectory.messages)


def message_segments(tools: list[dict], messages: list[Message]) -> list[Segment]:
    """`trajectory_segments` for tools and messages that are not (yet) a trajectory."""
    system = [message.content for message in messages if message.role == "system"]
    segments = [Segment("System: " + "\n\n".join([*system, render_tools(tools)]), None, False)]
    for index, message in enumerate(messages):
        if message.role == "user":
            segments.append(Segment(f"\nUser: {message.content}", index, False))
        elif message.role == "tool":
            segments.append(Segment(f"\nOutput: {message.content}", index, False))
        elif message.role == "assistant":
            words = message.content if message.call is None else render_tool_call(message.call)
            segments.append(Segment(ASSISTANT_HEADER, index, False))
            segments.append(Segment(f" {words}", index, True))
        elif message.role != "system":
            raise ValueError(f"message {index} has role {message.role!r}, expected system, user, assistant or tool")
    return segments


def encode_segments(segments: list[Segment], tokenizer) -> list[list[int]]:
    """Token ids per segment. BOS, where the tokenizer has one, opens the first; later ones continue a line of text."""
    first, *rest = segments
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [bos + tokenizer.encode(first.text), *(tokenizer.encode_continuation(segment.text) for segment in rest)]


def encode_prompt(tools: list[dict], messages: list[Message], tokenizer) -> list[int]:
    """Ids from BOS to the header "\\nAssistant:" that asks for the next turn: what the model is given at inference."""
    segments = [*message_segments(tools, messages), Segment(ASSISTANT_HEADER, None, False)]
    return [token for ids in encode_segments(segments, tokenizer) for token in ids]
