"""Doubles for tests of dialogues: a policy that is a function of the dialogue, its tokenizer, decoder and tasks."""

import json
import random
from types import SimpleNamespace

from data.formats.table import render_output
from data.tool_calls import ToolCall
from data.trajectories import Message
from eval.dialogues.journal import read_dialogues
from eval.dialogues.play import DialogueSettings, complete_dialogues, run_dialogues_with_model
from eval.dialogues.tools import ToolResult
from eval.predict.generate import LocalModel
from eval.records import Record


def document(name, required=(), optional=()):
    properties = {key: {"type": "string", "description": key} for key in (*required, *optional)}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}.",
            "parameters": {"type": "object", "properties": properties, "required": list(required)},
        },
    }


TOOLS = [
    document("get_weather", ["city"], ["unit"]),
    document("get_news"),
    document("ask_to_user", ["question"]),
    document("finish", ["answer"]),
]


def task(index=0, query="Weather in Oslo?", tool_set="toolbox", **meta):
    return Record(index, f"t{index}", TOOLS, [Message("user", query)], tool_set, meta=meta)


def call(name, prompt_format="tl", /, **arguments):
    return render_output([ToolCall(name, arguments)], prompt_format)


WEATHER = call("get_weather", city="Oslo")
FINISH = call("finish", answer="It rains.")


def answer_right(request):
    """An executor that finds nothing wrong."""
    return ToolResult(json.dumps({"result": f"{request.call.name} {request.attempt}"}), "simulated")


class CharacterTokenizer:
    """One id per character, EOS is 0, control tokens lie behind. Decoded prompts are texts that a policy can read."""

    bos_id, eos_id, vocab_size = None, 0, 0x110000 + 100

    def __init__(self):
        self.controls = []

    def encode(self, text):
        return [ord(character) for character in text]

    encode_continuation = encode

    def decode(self, ids):
        return "".join(chr(token) if token < 0x110000 else self.controls[token - 0x110000] for token in ids)

    def control_id(self, text):
        if text not in self.controls:
            self.controls.append(text)
        return 0x110000 + self.controls.index(text)


class ScriptedDecoder:
    """Stands in for DialogueDecoder: policy(dialogue, turn from 1, prompt) -> text; responses end in random order.

    `n_asked` counts responses; it raises `stop_after` of them, as a kill between two turns would.
    """

    def __init__(self, policy, tokenizer, *, n_rows, seed=0, stop_after=None, max_new_tokens=10_000):
        self.tokenizer = tokenizer
        self.policy, self.n_rows, self.stop_after, self.max_new_tokens = policy, n_rows, stop_after, max_new_tokens
        self.rng, self.turns, self.prompts, self.running, self.held = random.Random(seed), {}, [], {}, set()
        self.n_asked, self.generators = 0, []

    def ask(self, dialogue, prompt_ids, generator=None):
        assert dialogue not in self.running
        self.generators.append(generator)
        self.held.add(dialogue)
        assert len(self.held) <= self.n_rows
        prompt = self.tokenizer.decode(prompt_ids)
        self.turns[dialogue] = self.turns.get(dialogue, 0) + 1
        self.prompts.append((dialogue, self.turns[dialogue], prompt))
        text = self.policy(dialogue, self.turns[dialogue], prompt)
        ids = [ord(character) for character in text] + [0]
        self.running[dialogue] = ids[: self.max_new_tokens]

    def step(self):
        assert self.running, "step() with nothing to decode"
        chosen = self.rng.sample(sorted(self.running), self.rng.randint(1, len(self.running)))
        if self.stop_after is not None and self.n_asked + len(chosen) > self.stop_after:
            raise KeyboardInterrupt
        self.n_asked += len(chosen)
        return [(dialogue, self.running.pop(dialogue), []) for dialogue in chosen]

    def drop(self, dialogue):
        self.held.discard(dialogue)
        self.running.pop(dialogue, None)


def play(
    path,
    tasks,
    policy,
    *,
    execute=answer_right,
    prompt_format="tl",
    max_turns=9,
    batch_size=4,
    seed=0,
    positions=1_000_000,
    stop_after=None,
    rank=0,
    world_size=1,
    max_new_tokens=10_000,
):
    """Complete the prediction file `path` with a policy; (dialogues, notices, the decoder)."""
    tokenizer = CharacterTokenizer()
    decoder = ScriptedDecoder(
        policy, tokenizer, n_rows=batch_size, seed=seed, stop_after=stop_after, max_new_tokens=max_new_tokens
    )
    model = SimpleNamespace(config=SimpleNamespace(max_positions=positions))

    def run(missing, journal):
        settings = DialogueSettings(
            prompt_format, max_new_tokens if positions < 1_000_000 else 10, max_turns=max_turns, batch_size=batch_size
        )
        local = LocalModel(model, tokenizer, rank, world_size)
        run_dialogues_with_model(missing, local, settings, execute=execute, journal=journal, decoder=decoder)

    notices = complete_dialogues(path, tasks, run, prompt_format=prompt_format, rank=rank)
    return read_dialogues(path)[0], notices, decoder


def follow(*outputs):
    """A policy that writes these, turn by turn, in every dialogue."""
    return lambda dialogue, turn, prompt: outputs[turn - 1]
