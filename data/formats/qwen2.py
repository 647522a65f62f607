"""Qwen-2 (Table 9): chat, ReAct inside the user's turn.

Calls and feedback of one question share one turn of the assistant. The answer is `Thought: ..`, `Action: name`,
`Action Input: {json}`; what the model writes from "Observation:" on is cut.
"""

from data.formats.call_text import fault, json_text, react_target, render_react, take_react_call
from data.formats.chatml import CHATML_ENDS, chatml_end, chatml_header, chatml_turn
from data.formats.prompt_format import Dialogue, PromptFormat, Segment, join_context, split_system
from data.tool_calls import ToolCall
from data.tool_documents import tool_parameters

_STOP_STRINGS = (*CHATML_ENDS, "\nObservation:")


def dialogue_segments(tools: list[dict], messages: Dialogue) -> list[Segment]:
    """The first query holds the tools and the form; the assistant's turn stays open until the user speaks again."""
    system, turns = split_system(messages)
    segments = chatml_turn("system", system or "You are a helpful assistant.")
    is_open, previous = False, ""  # the assistant's turn; the role before
    for index, message in turns:
        if message.role == "user":
            content = message.content if previous else _question(tools, message.content)
            segments += [*(chatml_end() if is_open else []), *chatml_turn("user", content, index)]
        else:
            segments += [] if is_open else chatml_header()
            if message.role == "tool":
                segments.append(Segment(f"\nObservation: {message.content}\n", index))
            else:
                newline = [Segment("\n", index)] if previous == "assistant" else []
                segments += [*newline, react_target(index, message, parse_calls, end="<|im_end|>")]
        is_open, previous = message.role != "user", message.role
    return join_context(segments)


def _document(function: dict) -> str:
    """One line per tool; the parameters are a list of objects, in the form of Qwen's own examples."""
    properties, required = tool_parameters(function)
    parameters = [
        {
            "name": name,
            "description": schema.get("description") or "",
            "required": name in required,
            "schema": {key: value for key, value in schema.items() if key != "description"},
        }
        for name, schema in properties.items()
    ]
    name = function["name"]
    return (
        f"{name}: Call this tool to interact with the {name} API. What is the {name} API useful for? "
        f"{function.get('description') or ''} Parameters: {json_text(parameters)} Format the arguments as a JSON "
        "object."
    )


def _question(tools: list[dict], query: str) -> str:
    documents = "\n\n".join(_document(tool["function"]) for tool in tools)
    names = ",".join(tool["function"]["name"] for tool in tools)
    return f"""\
Answer the following questions as best you can. You have access to the following tools:

{documents}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {query}"""


def parse_calls(text: str) -> list[ToolCall]:
    """One call; an observation after it is the model's own invention and not read."""
    call, position = take_react_call(text, _STOP_STRINGS)
    if position != len(text) and not text.startswith("Observation:", position):
        raise fault(text, position, "the end of the text after the arguments")
    return [call]


FORMAT = PromptFormat(
    name="qwen2",
    parse_calls=parse_calls,
    render_calls=render_react,
    dialogue_segments=dialogue_segments,
    stop_strings=_STOP_STRINGS,
    has_one_call=True,
)
