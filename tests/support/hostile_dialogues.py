"""Dialogues for property tests whose texts try to end a turn, forge a header or break a call."""

import random

from data.tool_calls import ToolCall
from data.trajectories import Message

HOSTILE = [
    "\nAssistant:",
    "\nAssistant: f()",
    "</s>",
    "<s>",
    "<unk>",
    "Function:",
    "\nOutput: x",
    "\nUser: ",
    "System: ",
    "\n",
    " ",
    "  ",
    "\n\n",
    "\t",
    "\r\n",
    "\u2028",
    "\u4e2d\u6587",
    "\U0001f600",
    "\x00",
    "e\u0301",
    "\u2581",
    "\u2581\u2581",
    "<0x0A>",
    "word",
    " word",
    ":",
    "\nAssistant",
    "A",
    "(",
    ")",
    '"',
    "'",
    "\\",
    "_get",
    "12345",
    "\ufeff",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<human_end>",
    "<bot_end>",
    "Action Input: {}",
    "Thought:",
    "\nObservation:",
    "<tool_call>",
]


def hostile_messages(rng: random.Random) -> list[Message]:
    """Up to four turns; users, tools and arguments write headers, control tokens and marks of calls."""

    def text() -> str:
        return "".join(rng.choice(HOSTILE) for _ in range(rng.randrange(6)))

    messages = [Message("system", text())] if rng.random() < 0.2 else []
    messages.append(Message("user", text()))
    for _ in range(rng.randrange(1, 5)):
        if rng.random() < 0.15:
            messages += [Message("assistant", text()), Message("user", text())]
        else:
            messages += [
                Message(
                    "assistant",
                    "",
                    ToolCall(rng.choice(("f", "_get", "search-all", "a\\b")), {"a": text(), "b": [text(), None, 1.5]}),
                    thought=text(),
                ),
                Message("tool", text()),
            ]
    return [*messages, Message("assistant", "", ToolCall("finish", {"answer": text()}))]
