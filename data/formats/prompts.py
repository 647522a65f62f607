"""Prompts of the ten models of the paper's Table 3, in each one's own format (Appendix B, Tables 6 to 13).

    tl          TL-CodeLLaMA-2    Table 13    completion, data/formats/tl.py
    plain       the bundled base  Table 13    the same prompt; only the answers differ
    toolllama   ToolLLaMA-2       Table 6     completion, ReAct
    nexusraven  NexusRaven-2      Table 7     completion
    chatglm4    ChatGLM-4         Table 8     chat, roles as control tokens
    qwen2       Qwen-2            Table 9     chat, ReAct inside the user's turn
    llama31     LLaMA-3.1         Table 10    chat, tools in the first user turn
    qwen25      Qwen-2.5          Table 11    chat, tools in the system turn
    openai      GPT series        Table 12    messages and tools of the chat API, no text
    react       any               ToolEyes    completion or chat without native tools, ReAct; ToolEyes' published prompt

A prompt is a list of parts, ordinary text and control tokens. A control token becomes one id; text becomes the ids of
its characters, so nobody who writes "<|im_end|>" into a query can end a turn. docs/evaluation.md lists what the
tables leave open and what was decided.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from data.formats.outputs import OUTPUT_FORMATS, json_text, openai_tool_call, render_output
from data.formats.tl import ASSISTANT_HEADER, encode_prompt, message_segments, render_tools
from data.tool_calls import ToolCall
from data.tool_documents import tool_parameters
from data.trajectories import Message
from model.tokenizer import Tokenizer

PROMPT_FORMATS = OUTPUT_FORMATS  # every format has both sides
COMPLETION_FORMATS = tuple(name for name in PROMPT_FORMATS if name != "openai")

# What stands before the text of a prompt without being shown in the paper's table. Other formats get the tokenizer's
# BOS if it has one; that of LLaMA-3.1 is part of its table.
_START_TOKENS = {"chatglm4": ("[gMASK]", "<sop>")}
_BOS_OF_LLAMA31 = "<|begin_of_text|>"
# NexusRaven's mark is a token of its own in some copies of the tokenizer and plain characters in others.
_MAY_BE_TEXT = ("<human_end>", "<bot_end>")


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A piece of a prompt: one control token, or text that is encoded as characters."""

    text: str
    is_control: bool


@dataclass(frozen=True, slots=True)
class WrittenTurn:
    """A turn that the model wrote earlier in this dialogue: later prompts hold its text word for word, thoughts too.

    It stands among Messages. Only `openai` sends it back in pieces, because its API wants calls by name and number.
    """

    content: str  # the raw output
    calls: tuple[ToolCall, ...]  # what was read from it; () if that is no call
    role: str = "assistant"
    call: None = None  # no call to be rendered in place of the content


class PromptError(ValueError):
    """The dialogue has no prompt in this format, or the tokenizer lacks one of its control tokens."""


# ------------------------------------------------------------------------------------------------------------ interface


def render_prompt(
    tools: list[dict], messages: Sequence[Message | WrittenTurn], prompt_format: str
) -> str | tuple[list[dict], list[dict]]:
    """The prompt that asks for the assistant's next turn: text, or (messages, tools) of the chat API for `openai`.

    The text holds control tokens as text and no BOS but that of `llama31`; see encode_formatted_prompt and
    completion_text for the two ways to send it. `tools` are OpenAI function dicts. Raises PromptError for a dialogue
    that does not begin with the user, ValueError for an unknown format.
    """
    if prompt_format == "openai":
        _check_first_message(messages)
        return _openai_messages(messages), tools
    return "".join(part.text for part in prompt_parts(tools, messages, prompt_format))


def react_messages(tools: list[dict], messages: Sequence[Message | WrittenTurn]) -> list[dict]:
    """The `react` prompt as messages of the chat API, the tools inside the system message: no native tool calls.

    Feedback goes into user messages with "Function: " in front; the API's own role for it takes native calls only.
    Raises PromptError as render_prompt.
    """
    _check_first_message(messages)
    system, turns = _split_system(messages)
    result = [{"role": "system", "content": _react_system(tools, system)}]
    for message in turns:
        if message.role == "tool":
            result.append({"role": "user", "content": f"Function: {message.content}"})
        else:
            result.append({"role": message.role, "content": _words(message, "react")})
    return result


def completion_text(tools: list[dict], messages: Sequence[Message | WrittenTurn], prompt_format: str) -> str:
    """The prompt for a completions endpoint, which puts BOS (or `[gMASK]<sop>`) before any text by itself.

    With the BOS of `llama31` kept, the model would see two. Raises as render_prompt; ValueError for `openai`.
    """
    parts = prompt_parts(tools, messages, prompt_format)
    return "".join(part.text for part in parts).removeprefix(_BOS_OF_LLAMA31 if parts[0].is_control else "")


def prompt_parts(tools: list[dict], messages: Sequence[Message | WrittenTurn], prompt_format: str) -> list[PromptPart]:
    """The prompt as text and control tokens; raises as render_prompt, and ValueError for `openai`."""
    if prompt_format not in COMPLETION_FORMATS:
        raise ValueError(f"found format {prompt_format!a}, expected one of {', '.join(COMPLETION_FORMATS)}")
    if prompt_format in ("tl", "plain"):
        segments = message_segments(tools, _tl_messages(messages))
        return [PromptPart(text, False) for text in (*(segment.text for segment in segments), ASSISTANT_HEADER)]
    _check_first_message(messages)
    system, turns = _split_system(messages)
    if prompt_format == "react":
        return _react_parts(tools, system, turns)
    if prompt_format == "toolllama":
        return _toolllama_parts(tools, system, turns)
    if prompt_format == "nexusraven":
        return _nexusraven_parts(tools, system, turns)
    if prompt_format == "chatglm4":
        return _chatglm4_parts(tools, system, turns)
    if prompt_format == "qwen2":
        return _qwen2_parts(tools, system, turns)
    if prompt_format == "llama31":
        return _llama31_parts(tools, system, turns)
    return _qwen25_parts(tools, system, turns)


def encode_formatted_prompt(
    tools: list[dict], messages: Sequence[Message | WrittenTurn], prompt_format: str, tokenizer: Tokenizer
) -> list[int]:
    """Ids of the prompt for a model of ours: start token, then each control token as one id, each text by itself.

    `tl` and `plain` are encoded segment by segment, as in training. Raises as prompt_parts, and PromptError if the
    tokenizer has no such control token: that of another model would spell it out in characters.
    """
    if prompt_format in ("tl", "plain"):
        return encode_prompt(tools, _tl_messages(messages), tokenizer)
    parts = prompt_parts(tools, messages, prompt_format)
    start = [PromptPart(text, True) for text in _START_TOKENS.get(prompt_format, ())]
    id_of_control = {part.text: tokenizer.control_id(part.text) for part in [*start, *parts] if part.is_control}
    for text, token_id in id_of_control.items():
        if token_id is None and text not in _MAY_BE_TEXT:
            raise PromptError(
                f"--prompt_format {prompt_format}: found no token {text} in the tokenizer, expected that "
                "of a model of this format"
            )
    ids: list[int] = []
    if not start and prompt_format != "llama31" and tokenizer.bos_id is not None:
        ids.append(tokenizer.bos_id)
    is_first_text = True  # SentencePiece puts a space before the first text only
    for part in _merged(
        [
            PromptPart(part.text, id_of_control.get(part.text) is not None and part.is_control)
            for part in [*start, *parts]
        ]
    ):
        if part.is_control:
            ids.append(id_of_control[part.text])
        else:
            ids += tokenizer.encode(part.text) if is_first_text else tokenizer.encode_continuation(part.text)
            is_first_text = False
    return ids


# --------------------------------------------------------------------------------------------------------------- pieces


def _check_first_message(messages: Sequence[Message | WrittenTurn]) -> None:
    roles = [message.role for message in messages if message.role != "system"]
    if not roles or roles[0] != "user":
        raise PromptError(f"found {roles[0] if roles else 'no message'} first, expected the user's query")
    for role in roles:
        if role not in ("user", "assistant", "tool"):
            raise PromptError(f"found role {role!a}, expected system, user, assistant or tool")


def _split_system(messages: Sequence[Message | WrittenTurn]) -> tuple[str, list[Message | WrittenTurn]]:
    """The system text of the dialogue, "" if it has none, and the other messages."""
    return "\n\n".join(message.content for message in messages if message.role == "system"), [
        message for message in messages if message.role != "system"
    ]


def _parts(*texts: str) -> list[PromptPart]:
    """Parts of a template: what looks like a control token is one. Only for texts of this file, never for a user's."""
    return [PromptPart(text, text.startswith(("<|", "<human_end>", "<bot_end>"))) for text in texts]


def _merged(parts: Sequence[PromptPart]) -> list[PromptPart]:
    """Neighbouring texts as one, so that their ids are those of the whole text between two control tokens."""
    result: list[PromptPart] = []
    for part in parts:
        if result and not part.is_control and not result[-1].is_control:
            result[-1] = PromptPart(result[-1].text + part.text, False)
        elif part.text:
            result.append(part)
    return result


def _text(text: str) -> PromptPart:
    return PromptPart(text, False)


def _words(message: Message | WrittenTurn, prompt_format: str) -> str:
    """What is said: an assistant's call in this format's own form, or the text."""
    if isinstance(message, WrittenTurn) and prompt_format in ("toolllama", "nexusraven", "react"):
        return message.content.lstrip()  # these templates write the white space in front
    return message.content if message.call is None else render_output([message.call], prompt_format)


def _tl_messages(messages: Sequence[Message | WrittenTurn]) -> list[Message]:
    """The dialogue for data/formats/tl.py, which writes the space that the model's first token has in front."""
    return [
        Message("assistant", message.content.removeprefix(" ")) if isinstance(message, WrittenTurn) else message
        for message in messages
    ]


def _required_outside(function: dict) -> dict:
    """The function with `required` beside `parameters`, where Table 6 has it."""
    _, required = tool_parameters(function)
    parameters = {key: value for key, value in (function.get("parameters") or {}).items() if key != "required"}
    return {
        **{key: value for key, value in function.items() if key != "required"},
        "parameters": parameters,
        "required": required,
    }


def _sorted_keys(value: object) -> object:
    """Objects with their keys in alphabetical order, as Tables 10 and 11 have them."""
    if isinstance(value, dict):
        return {key: _sorted_keys(value[key]) for key in sorted(value)}
    return [_sorted_keys(item) for item in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------- ToolLLaMA (Table 6)

_TOOLLLAMA_SYSTEM = """\
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


def _toolllama_parts(tools: list[dict], system: str, turns: Sequence[Message | WrittenTurn]) -> list[PromptPart]:
    documents = [{"type": "function", "function": _required_outside(tool["function"])} for tool in tools]
    before = f"{system}\n\n" if system else ""
    lines = [f"System: {before}{_TOOLLLAMA_SYSTEM}{json_text(documents)}"]
    for message in turns:
        role = {"user": "User", "assistant": "Assistant", "tool": "Function"}[message.role]
        words = _words(message, "toolllama") if message.role == "assistant" else message.content
        lines.append(f"{role}: {words}")
    return [_text("\n".join([*lines, "Assistant:\n"]))]


# ------------------------------------------------------------------------------------------------ NexusRaven (Table 7)


def _nexusraven_parts(tools: list[dict], system: str, turns: Sequence[Message | WrittenTurn]) -> list[PromptPart]:
    """One query with one answer is the model's own form; later turns continue in the same marks, a form of ours."""
    end = '    """'
    documents = "\n\n".join(
        f"{render_tools([tool]).removesuffix(end)}\n    Returns:\n    string: The feedback from the tool.\n{end}"
        for tool in tools
    )
    parts = [_text("\n\n".join(text for text in (system, documents) if text))]
    for message in turns:
        if message.role == "user":
            parts += [_text(f"\n\nUser Query: {message.content}"), *_parts("<human_end>")]
        elif message.role == "assistant":
            parts += [_text(f"\n{_words(message, 'nexusraven')}"), *_parts("<bot_end>")]
        else:
            parts += [_text(f"\nOutput: {message.content}"), *_parts("<human_end>")]
    return _merged(parts)


# ------------------------------------------------------------------------------------------------- ChatGLM-4 (Table 8)

_CHATGLM4_SYSTEM = (
    "\u4f60\u662f\u4e00\u4e2a\u540d\u4e3a ChatGLM \u7684\u4eba\u5de5\u667a\u80fd\u52a9\u624b\u3002"
    "\u4f60\u662f\u57fa\u4e8e\u667a\u8c31AI\u8bad\u7ec3\u7684\u8bed\u8a00\u6a21\u578b GLM-4 "
    "\u6a21\u578b\u5f00\u53d1\u7684\uff0c\u4f60\u7684\u4efb\u52a1\u662f\u9488\u5bf9\u7528\u6237\u7684\u95ee\u9898"
    "\u548c\u8981\u6c42\u63d0\u4f9b\u9002\u5f53\u7684\u7b54\u590d\u548c\u652f\u6301\u3002"
)  # who it is
_CHATGLM4_TOOLS = "\n\n# \u53ef\u7528\u5de5\u5177"  # "available tools"
_CHATGLM4_FORM = (
    "\n\u5728\u8c03\u7528\u4e0a\u8ff0\u51fd\u6570\u65f6\uff0c\u8bf7\u4f7f\u7528 Json "
    "\u683c\u5f0f\u8868\u793a\u8c03\u7528\u7684\u53c2\u6570\u3002"
)  # "write the arguments as JSON"


def _chatglm4_parts(tools: list[dict], system: str, turns: Sequence[Message | WrittenTurn]) -> list[PromptPart]:
    documents = "".join(
        f"\n\n## {tool['function']['name']}\n\n{json_text(tool['function'])}{_CHATGLM4_FORM}" for tool in tools
    )
    identity = f"{system}\n\n{_CHATGLM4_SYSTEM}" if system else _CHATGLM4_SYSTEM
    parts = [*_parts("<|system|>"), _text(f"\n{identity}{_CHATGLM4_TOOLS}{documents}")]
    for message in turns:
        if message.role == "assistant":  # the name of a called tool stands in the line of the role
            is_text = message.call is None and not isinstance(message, WrittenTurn)  # the model writes its own newline
            newline = "\n" if is_text else ""
            parts += [*_parts("<|assistant|>"), _text(f"{newline}{_words(message, 'chatglm4')}")]
        else:
            role = "<|user|>" if message.role == "user" else "<|observation|>"
            parts += [*_parts(role), _text(f"\n{message.content}")]
    return _merged([*parts, *_parts("<|assistant|>")])


# ---------------------------------------------------------------------------------------------------- Qwen-2 (Table 9)


def _qwen2_tool(function: dict) -> str:
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


def _qwen2_question(tools: list[dict], query: str) -> str:
    documents = "\n\n".join(_qwen2_tool(tool["function"]) for tool in tools)
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


def _qwen2_parts(tools: list[dict], system: str, turns: Sequence[Message | WrittenTurn]) -> list[PromptPart]:
    """Calls and observations of one question stand in one turn of the assistant, which the answer continues."""
    parts = _chatml_turn("system", system or "You are a helpful assistant.")
    is_open = False  # the assistant's turn
    for index, message in enumerate(turns):
        if message.role == "user":
            parts += [*_parts("<|im_end|>"), _text("\n")] if is_open else []
            parts += _chatml_turn("user", _qwen2_question(tools, message.content) if index == 0 else message.content)
            is_open = False
            continue
        if not is_open:
            parts += [*_parts("<|im_start|>"), _text("assistant\n")]
            is_open = True
        if message.role == "tool":
            parts.append(_text(f"\nObservation: {message.content}\n"))
        else:
            newline = "\n" if turns[index - 1].role == "assistant" else ""
            parts.append(_text(f"{newline}{_words(message, 'qwen2')}"))
    return _merged(parts if is_open else [*parts, *_parts("<|im_start|>"), _text("assistant\n")])


def _chatml_turn(role: str, content: str) -> list[PromptPart]:
    return [*_parts("<|im_start|>"), _text(f"{role}\n{content}"), *_parts("<|im_end|>"), _text("\n")]


# ------------------------------------------------------------------------------------------------ LLaMA-3.1 (Table 10)

_LLAMA31_SYSTEM = "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_LLAMA31_FORM = """\
Given the following functions, please respond with a JSON for a function call with its proper arguments that best \
answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\
Do not use variables.

"""


def _llama31_parts(tools: list[dict], system: str, turns: Sequence[Message | WrittenTurn]) -> list[PromptPart]:
    documents = "".join(f"{json_text(_sorted_keys(tool), indent=4)}\n\n" for tool in tools)
    parts = [*_parts(_BOS_OF_LLAMA31), *_llama31_turn("system", _LLAMA31_SYSTEM + system)]
    for index, message in enumerate(turns):
        if message.role == "user":
            before = _LLAMA31_FORM + documents if index == 0 else ""
            parts += _llama31_turn("user", before + message.content)
        elif message.role == "assistant":
            parts += _llama31_turn("assistant", _words(message, "llama31"))
        else:  # the model's own template writes the feedback as a JSON string
            parts += _llama31_turn("ipython", json_text(message.content))
    return _merged([*parts, *_llama31_turn("assistant", "")[:-1]])


def _llama31_turn(role: str, content: str) -> list[PromptPart]:
    return [
        *_parts("<|start_header_id|>"),
        _text(role),
        *_parts("<|end_header_id|>"),
        _text(f"\n\n{content}"),
        *_parts("<|eot_id|>"),
    ]


# ------------------------------------------------------------------------------------------------- Qwen-2.5 (Table 11)


def _qwen25_parts(tools: list[dict], system: str, turns: Sequence[Message | WrittenTurn]) -> list[PromptPart]:
    documents = "".join(f"{json_text(_sorted_keys(tool))}\n" for tool in tools)
    parts = _chatml_turn(
        "system",
        f"""\
{system or "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{documents}</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>""",
    )
    for message in turns:
        if message.role == "assistant":
            parts += _chatml_turn("assistant", _words(message, "qwen25"))
        elif message.role == "tool":
            parts += _chatml_turn("user", f"<tool_response>\n{message.content}\n</tool_response>")
        else:
            parts += _chatml_turn("user", message.content)
    return _merged([*parts, *_parts("<|im_start|>"), _text("assistant\n")])


# ------------------------------------------------------------------------------------------------------ GPT (Table 12)


def _openai_messages(messages: Sequence[Message | WrittenTurn]) -> list[dict]:
    """Messages of the chat API. It refuses a call without feedback, so the user's answer to one becomes its feedback.

    Such are the answers to ask_to_user. Several calls of one turn get their feedback in their order.
    """
    result: list[dict] = []
    open_calls: list[str] = []  # ids of the latest turn's calls that nobody has answered
    for index, message in enumerate(messages):
        if message.role == "assistant":
            entry = _openai_turn(message, index)
            open_calls = [call["id"] for call in entry.get("tool_calls", [])]
            result.append(entry)
        elif open_calls and message.role in ("tool", "user"):
            result.append({"role": "tool", "tool_call_id": open_calls.pop(0), "content": message.content})
        else:
            role = "user" if message.role == "tool" else message.role
            result.append({"role": role, "content": message.content})
    return result


def _openai_turn(message: Message | WrittenTurn, index: int) -> dict:
    """An assistant's message; ids follow from its place, since a server may give none, or one twice."""
    if not isinstance(message, WrittenTurn):
        if message.call is None:
            return {"role": "assistant", "content": message.content}
        return {"role": "assistant", "content": None, "tool_calls": [openai_tool_call(message.call, index)]}
    try:
        value = json.loads(message.content)
    except (ValueError, RecursionError):
        value = None
    text = value.get("content") if isinstance(value, dict) else None
    text = text if isinstance(text, str) and text else None
    if not message.calls:  # calls that cannot be read are sent back as text: the API would refuse them as calls
        has_calls = isinstance(value, dict) and bool(value.get("tool_calls"))
        return {"role": "assistant", "content": message.content if has_calls or text is None else text}
    return {
        "role": "assistant",
        "content": text,
        "tool_calls": [
            {**openai_tool_call(call, index), "id": f"call_{index}_{number}"}
            for number, call in enumerate(message.calls)
        ],
    }


# ------------------------------------------------------------------------------------------ ToolEyes' published prompt

_REACT_TASK = """\
You are an expert in using tools to handle real-time queries from users.
First I will give you the task description, and your task start.
At each step, your task is to give your thought to analyze the current state, decide the next step, with a function \
call to actually excute your step.
After the call, you will get the call result, and you are now in a new state.
Then you will analyze your status now, then decide what to do next...
After many (Thought-call) pairs, you finally perform the task, then you can give your final answer.

"""
REACT_FORM = """\
Desired format:
Thought: <The thought>
Action: <The tool you decide to use>
Action Input: <The parameters for the tool>"""
_REACT_RULES = """

Remember:
1. You should ALWAYS think about what to do, but all the thought is short, at most in 3 sentences.
2. The action to take should be one of the given tools below.
3. The "Action Input" needs to provide a dict similar to {parameter_1: value_1, parameter_2: value_2} to call action.
4. Always use the "finish" tool upon task completion. The final answer should be comprehensive enough for the user. \
If the task is unmanageable, use the "finish" tool and respond with "I cannot handle the task".

Task description: You should use tools to help handle the real time user queries. Specifically, you have access of the \
following tools:
"""


def _react_system(tools: list[dict], system: str) -> str:
    documents = json.dumps([tool["function"] for tool in tools])
    before = f"{system}\n\n" if system else ""
    return f"{before}{_REACT_TASK}{REACT_FORM}{_REACT_RULES}{documents}\n\nLet's Begin!"


def _react_parts(tools: list[dict], system: str, turns: Sequence[Message | WrittenTurn]) -> list[PromptPart]:
    lines = [f"System: {_react_system(tools, system)}"]
    for message in turns:
        role = {"user": "User", "assistant": "Assistant", "tool": "Function"}[message.role]
        lines.append(f"{role}: {_words(message, 'react')}")
    return [_text("\n".join([*lines, "Assistant:"]))]
