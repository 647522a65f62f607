"""TL-CodeLLaMA-2 (Table 13), the format of the paper's own models and of training.

    System: Function:
    def name(p: string, q: string = None):
        ...
    User: query
    Assistant: name(p="value")</s>
    Output: feedback

Training and inference share one segment function, and every segment is encoded on its own. So the ids of a prompt are a
prefix of the ids of the training sample, and no token spans the border of a turn, whatever the user's text holds.
"""

from data.formats.prompt_format import Dialogue, PromptFormat, Segment, WrittenTurn, call_target
from data.tool_calls import ToolCall, parse_tool_call, render_tool_call
from data.tool_documents import tool_parameters

# No space after the colon: the LLaMA tokenizer puts it into the first token of the call (`_get`). A prompt that ends
# with the space makes the model start with a token it never saw there; symptom: names without their first letters.
ASSISTANT_HEADER = "\nAssistant:"


def render_tools(tools: list[dict]) -> str:
    """The documents of all tools as Python-like signatures, two newlines between them (Table 13).

    `tools` are OpenAI function dicts. Required parameters come first, in the order of `required`; the others follow
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


def dialogue_segments(tools: list[dict], messages: Dialogue) -> list[Segment]:
    """The dialogue as segments; joined, their texts are the prompt of Table 13 without BOS and EOS.

    A call is rendered by `render_tool_call`; plain text and an unparsable call keep the words of the file. Raises
    ValueError for an unknown role.
    """
    system = [message.content for message in messages if message.role == "system"]
    segments = [Segment("System: " + "\n\n".join([*system, render_tools(tools)]))]
    for index, message in enumerate(messages):
        if message.role == "user":
            segments.append(Segment(f"\nUser: {message.content}", index))
        elif message.role == "tool":
            segments.append(Segment(f"\nOutput: {message.content}", index))
        elif message.role == "assistant":
            segments.append(Segment(ASSISTANT_HEADER, index))
            if message.call is not None:
                before, name, after = call_pieces(message.call)
                segments.append(call_target(index, (f" {before}", name, after)))
            else:  # a model's own turn has the space already
                words = message.content.removeprefix(" ") if isinstance(message, WrittenTurn) else message.content
                segments.append(Segment(f" {words}", index, True))
        elif message.role != "system":
            raise ValueError(f"message {index} has role {message.role!r}, expected system, user, assistant or tool")
    return segments


def call_pieces(call: ToolCall) -> tuple[str, str, str]:
    """A call in the call form: what comes before its name (nothing), the name, the arguments in their brackets."""
    return "", call.name, render_tool_call(call).removeprefix(call.name)


FORMAT = PromptFormat(
    name="tl",
    parse_calls=lambda text: [parse_tool_call(text)],
    render_calls=lambda calls: render_tool_call(calls[0]),
    dialogue_segments=dialogue_segments,
    has_one_call=True,
)
