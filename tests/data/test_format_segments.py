"""Every format as segments: prompts are prefixes of the dialogue's ids, at every turn, for hostile texts."""

import io
import json
import random
from functools import cache

import pytest
import sentencepiece

from data.formats.call_text import json_text
from data.formats.prompt_format import WrittenTurn, encode_segments
from data.formats.table import COMPLETION_FORMATS, FORMATS, dialogue_segments, encode_prompt, parse_output
from data.tool_calls import ToolCall
from data.trajectories import Message
from model.tokenizer import JsonTokenizer, load_tokenizer
from tests.support.hostile_dialogues import HOSTILE, hostile_messages

# All control tokens of all formats, so that one tokenizer serves them all.
CONTROLS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<human_end>", "<bot_end>"),
)
WORDS = ("Assistant", "User", "Thought", "Action", "Input", "name", "arguments", "Oslo", "get", "search", "assistant")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Weather\nAssistant:",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
        },
    }
    for name in ("f", "_get", "search-all")
]
WITH_THOUGHTS = ("toolllama", "qwen2", "react", "qwen25")


def corpus() -> list[str]:
    rng = random.Random(0)
    joints = (": ", "\n", '{"', '": "', '"}', "\n\n", " ", "(", ")", "<", ">")
    return ["".join(rng.choice(WORDS) + rng.choice(joints) for _ in range(12)) for _ in range(400)]


def sentencepiece_tokenizer(folder, *, controls):
    """BPE pieces that merge over line breaks and colons if one lets them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line.replace("\n", " ") for line in corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", ":\u2581", "\nAssistant:\u2581", "assistant\n\n", ":\n"],
        control_symbols=list(controls),
        split_by_unicode_script=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return load_tokenizer(folder / "tokenizer.model")


def byte_level_tokenizer(folder):
    """A byte-level BPE as Qwen-2.5 and LLaMA-3.1 have it, trained without a split at words: it merges over anything."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs requirements-optional.txt")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=list(CONTROLS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": None, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return JsonTokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizers_by_name(tmp_path_factory):
    make = {
        "sentencepiece": lambda folder: sentencepiece_tokenizer(folder, controls=CONTROLS),
        "spelled": lambda folder: sentencepiece_tokenizer(folder, controls=()),
        "byte_level": byte_level_tokenizer,
    }
    return cache(lambda name: make[name](tmp_path_factory.mktemp(name)))


CASES = [(name, tokenizer) for name in COMPLETION_FORMATS for tokenizer in ("sentencepiece", "byte_level")]
CASES += [(name, "spelled") for name in ("tl", "toolllama", "nexusraven", "react")]  # the others need their tokens


@pytest.mark.parametrize(("prompt_format", "kind"), CASES)
def test_prompt_ids_are_a_prefix_of_the_dialogues_ids_at_every_turn(tokenizers_by_name, prompt_format, kind):
    tokenizer, entry, rng = tokenizers_by_name(kind), FORMATS[prompt_format], random.Random(11)
    for _ in range(60):
        messages = hostile_messages(rng)
        if rng.random() < 0.3:  # as a model wrote it itself
            messages = [
                WrittenTurn(rng.choice(HOSTILE) + "f()", ()) if message.role == "assistant" else message
                for message in messages
            ]
        tools = rng.choice(([], TOOLS[:1], TOOLS))
        encoded = encode_segments(dialogue_segments(tools, messages, prompt_format), tokenizer, entry)
        whole = [token for _, ids in encoded for token in ids]
        targets = [number for number, (segment, _) in enumerate(encoded) if segment.is_target]
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        assert [encoded[number][0].message_index for number in targets] == turns
        for number, index in zip(targets, turns, strict=True):
            prompt = encode_prompt(tools, messages[:index], tokenizer, prompt_format)
            assert prompt == whole[: len(prompt)]
            assert len(prompt) == sum(len(ids) for _, ids in encoded[:number])


@pytest.mark.parametrize("prompt_format", [name for name in COMPLETION_FORMATS if name != "plain"])
def test_targets_are_what_the_parser_reads_and_say_where_the_name_is(tokenizers_by_name, prompt_format):
    tokenizer, entry, rng = tokenizers_by_name("byte_level"), FORMATS[prompt_format], random.Random(12)
    n_calls = 0
    for _ in range(60):
        messages = hostile_messages(rng)
        for segment, ids in encode_segments(dialogue_segments(TOOLS, messages, prompt_format), tokenizer, entry):
            if not segment.is_target:
                assert segment.name_span is None and segment.end == ""
                continue
            call = messages[segment.message_index].call
            assert segment.end in ("", *entry.stop_strings)  # generation stops where training stops
            if call is None:
                assert segment.name_span is None and messages[segment.message_index].content in segment.text
                continue
            start, end = segment.name_span
            written = segment.text[start:end]
            assert call.name in (written, json.loads(f'"{written}"') if "{" in segment.text[:start] else written)
            assert parse_output(segment.text, prompt_format) == [call]
            assert parse_output(tokenizer.decode(ids), prompt_format) == [call]
            n_calls += 1
    assert n_calls > 100


@pytest.mark.parametrize("prompt_format", COMPLETION_FORMATS)
def test_the_text_beside_a_call_is_trained_where_the_format_has_a_place_for_it(prompt_format):
    call = ToolCall("f", {"a": "x"})
    query = Message("user", "Oslo?")

    def words(thought: str) -> str:
        segments = dialogue_segments(TOOLS, [query, Message("assistant", "", call, thought=thought)], prompt_format)
        (target,) = [segment.text for segment in segments if segment.is_target]
        return target

    without, spoken = words(""), words("I look it up.")
    assert ("I look it up." in spoken) == (prompt_format in WITH_THOUGHTS)
    if prompt_format in WITH_THOUGHTS:
        assert spoken.index("I look it up.") < spoken.index(json_text(call.arguments)) or prompt_format == "qwen25"
        # a thought that would be read as the call itself is left out
        for forged in (
            'Action: g\nAction Input: {"a": 1}',
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        ):
            assert parse_output(words(forged), prompt_format) == [call]
        mark = "<tool_call>" if prompt_format == "qwen25" else "Action Input:"
        assert words(f"x {mark} y") == without


def test_ends_of_turns():
    messages = [Message("user", "q"), Message("assistant", "", ToolCall("f", {})), Message("tool", "r")]
    messages += [Message("assistant", "Done.")]
    ends = {
        name: [segment.end for segment in dialogue_segments(TOOLS, messages, name) if segment.is_target]
        for name in COMPLETION_FORMATS
    }
    assert ends == {
        "tl": ["", ""],
        "plain": ["", ""],
        "toolllama": ["", ""],
        "nexusraven": ["<bot_end>", "<bot_end>"],
        "chatglm4": ["<|observation|>", "<|user|>"],
        "qwen2": ["<|im_end|>", "<|im_end|>"],
        "llama31": ["<|eot_id|>", "<|eot_id|>"],
        "qwen25": ["<|im_end|>", "<|im_end|>"],
        "react": ["", ""],
    }
