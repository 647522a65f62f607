"""ToolLLaMA-2 (Table 6): text, ReAct, one call: `Thought: ..`, `Action: name`, `Action Input: {json}`."""

from data.formats.call_text import fault, json_text, react_target, render_react, take_react_call
from data.formats.prompt_format import Dialogue, PromptFormat, Segment, join_context, split_system, strip_written
from data.tool_calls import ToolCall
from data.tool_documents import tool_parameters

_STOP_STRINGS = ("</s>",)

_SYSTEM = """\
You are AutoGPT, you can use many tools(functions) to do the following task.
First I will give you the task description, and your task start.
At each step, you need to give your thought to analyze the status now and what to do next, with a function call to \
actually excute your step. Your output should follow this format:
Thought:
Action
Action Input:

After the call, you will get the call result, and you are now in a new state.
Then you will analyze your status now, then decide what to do next...
After many (Thought-call) pairs, you finally perform the task, then you can give your finial answer.
Remember:
1.the state change is irreversible, you can't go back to one of the former state, if you want to restart the task, \
say I give up and restart:
2.All the thought is short, at most in 5 sentence.
3.You can do more then one trys, so if your plan is to continusly try some conditions, you can do one of the \
conditions per try.
Let's Begin!
Task description: You should use functions to help handle the real time user querys. Remember:
1.ALWAYS call Finishfunction at the end of the task. And the final answer should contain enough information to show \
to the user.If you can't handle the task, or you find that function calls always fail(the function is not valid now), \
use function Finish-;give_up_and_restart.
2.Do not use origin tool names, use only subfunctions' names.
Specifically, you have access to the following APIs: """


def dialogue_segments(tools: list[dict], messages: Dialogue) -> list[Segment]:
    """The system text with the tools, then one line per message; a turn begins after "Assistant:" and a line break."""
    system, turns = split_system(messages)
    documents = [{"type": "function", "function": _required_outside(tool["function"])} for tool in tools]
    before = f"{system}\n\n" if system else ""
    segments = [Segment(f"System: {before}{_SYSTEM}{json_text(documents)}")]
    for index, message in turns:
        if message.role == "assistant":
            segments += [Segment("\nAssistant:\n", index), react_target(index, strip_written(message), parse_calls)]
        else:
            role = "User" if message.role == "user" else "Function"
            segments.append(Segment(f"\n{role}: {message.content}", index))
    return join_context(segments)


def _required_outside(function: dict) -> dict:
    """The function with `required` next to `parameters`, where Table 6 has it."""
    _, required = tool_parameters(function)
    parameters = {key: value for key, value in (function.get("parameters") or {}).items() if key != "required"}
    return {
        **{key: value for key, value in function.items() if key != "required"},
        "parameters": parameters,
        "required": required,
    }


def parse_calls(text: str) -> list[ToolCall]:
    """One call, and nothing after it but the end of the turn."""
    call, position = take_react_call(text, _STOP_STRINGS)
    if position != len(text):
        raise fault(text, position, "the end of the text after the arguments")
    return [call]


FORMAT = PromptFormat(
    name="toolllama",
    parse_calls=parse_calls,
    render_calls=render_react,
    dialogue_segments=dialogue_segments,
    stop_strings=_STOP_STRINGS,
    has_one_call=True,
)
