"""ToolEyes' published prompt for any model: ReAct, as text or as a chat without native tools; one call.

The answer is that of `toolllama`, its arguments also as a Python dict.
"""

import json

from data.formats.call_text import checked_call, react_target, render_react, take_react_name
from data.formats.prompt_format import Dialogue, PromptFormat, Segment, join_context, split_system, strip_written
from data.tool_calls import ToolCall, ToolCallError, parse_value

_TASK = """\
You are an expert in using tools to handle real-time queries from users.
First I will give you the task description, and your task start.
At each step, your task is to give your thought to analyze the current state, decide the next step, with a function \
call to actually excute your step.
After the call, you will get the call result, and you are now in a new state.
Then you will analyze your status now, then decide what to do next...
After many (Thought-call) pairs, you finally perform the task, then you can give your final answer.

"""
_FORM = """\
Desired format:
Thought: <The thought>
Action: <The tool you decide to use>
Action Input: <The parameters for the tool>"""
_RULES = """

Remember:
1. You should ALWAYS think about what to do, but all the thought is short, at most in 3 sentences.
2. The action to take should be one of the given tools below.
3. The "Action Input" needs to provide a dict similar to {parameter_1: value_1, parameter_2: value_2} to call action.
4. Always use the "finish" tool upon task completion. The final answer should be comprehensive enough for the user. \
If the task is unmanageable, use the "finish" tool and respond with "I cannot handle the task".

Task description: You should use tools to help handle the real time user queries. Specifically, you have access of the \
following tools:
"""


def _system(tools: list[dict], system: str) -> str:
    documents = json.dumps([tool["function"] for tool in tools])
    before = f"{system}\n\n" if system else ""
    return f"{before}{_TASK}{_FORM}{_RULES}{documents}\n\nLet's Begin!"


def dialogue_segments(tools: list[dict], messages: Dialogue) -> list[Segment]:
    """The system text with the tools, then one line per message; the model writes the space before its words."""
    system, turns = split_system(messages)
    segments = [Segment(f"System: {_system(tools, system)}")]
    for index, message in turns:
        if message.role == "assistant":
            segments += [
                Segment("\nAssistant:", index),
                react_target(index, strip_written(message), parse_calls, before=" "),
            ]
        else:
            role = "User" if message.role == "user" else "Function"
            segments.append(Segment(f"\n{role}: {message.content}", index))
    return join_context(segments)


def chat_request(tools: list[dict], messages: Dialogue) -> tuple[list[dict], list[dict]]:
    """The messages of the chat API, the tools inside the system message: no native tool calls.

    Feedback goes into user messages with "Function: " in front; the API's own role for it takes native calls only.
    """
    system, turns = split_system(messages)
    result = [{"role": "system", "content": _system(tools, system)}]
    for index, message in turns:
        if message.role == "tool":
            result.append({"role": "user", "content": f"Function: {message.content}"})
        elif message.role == "assistant":
            result.append(
                {"role": "assistant", "content": react_target(index, strip_written(message), parse_calls).text}
            )
        else:
            result.append({"role": "user", "content": message.content})
    return result, []


def parse_calls(text: str) -> list[ToolCall]:
    """As ToolEyes' own loop reads it: a dict in JSON or Python; `finish` is a call, whatever comes after its name.

    To cut arguments of `finish` the `"}` at the end is added first; if they still are no dict, it has none.
    """
    name, position = take_react_name(text)
    source = text[position:]
    is_finish = name.lower() == "finish"
    reason = ""
    for attempt in (source, source.rstrip() + '"}') if is_finish else (source,):
        try:
            return [checked_call(name, parse_value(attempt))]
        except ToolCallError as error:
            reason = f"Action Input: {error}"
    if is_finish:
        return [checked_call(name, {})]
    raise ToolCallError(reason)


FORMAT = PromptFormat(
    name="react",
    parse_calls=parse_calls,
    render_calls=render_react,
    dialogue_segments=dialogue_segments,
    chat_request=chat_request,
    has_one_call=True,
    reminder=_FORM,
)
