"""Training rows in the formats of other models: ids, ends of turns and weights, by hand and as properties.

pytest tests/data/test_training_formats.py
"""

import random
from functools import cache

import pytest

from data.data_report import describe_data
from data.formats.call_text import json_text
from data.formats.prompt_format import PromptError
from data.formats.table import TRAINING_FORMATS, dialogue_segments, encode_prompt, end_of_turn_ids, parse_output
from data.loss_weights import KEY, count_tokens_before, encode_names, encode_trajectory, name_place
from data.tool_calls import ToolCall
from data.trajectories import Message, Trajectory
from tests.support.format_tokenizers import CONTROLS, bundled_with_controls, byte_level_bpe
from tests.support.hostile_dialogues import HOSTILE, hostile_messages
from tests.support.piece_tokenizer import PieceTokenizer
from tests.support.tiny_run import make_records

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

SETTINGS = {"error_filter": "none", "key_tokens": True, "max_key_token_weight": 20.0, "loss_normalization": "sum"}
KINDS = ("bundled", "qwen25", "llama31")
# What a tokenizer of the kind does not give back as it was: the mark for blanks, and what NFC composes.
CHANGED = {"bundled": ("\u2581",), "qwen25": ("e\u0301",), "llama31": ()}


def tool(name):
    parameters = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


class ControlTokenizer(PieceTokenizer):
    """PieceTokenizer with control tokens: 1900 and up, in the order of CONTROLS."""

    def control_id(self, text):
        return 1900 + CONTROLS.index(text) if text in CONTROLS else None


PAPERS = Trajectory(
    "t0",
    [tool("get_paper"), tool("get_paper_details")],
    [
        Message("user", "Find it"),
        Message("assistant", "", ToolCall("get_paper_details", {"id": "7"}), thought="I look"),
        Message("tool", "A title"),
        Message("assistant", "Done"),
    ],
    "papers.json:1",
)
EARLIER_TURN = Message("assistant", "", ToolCall("get_paper", {"id": "1"}))


def pieces_and_weights(row, tokenizer, message_index):
    """What is trained of a message: (text, weight) of its targets."""
    names = {1900 + number: text for number, text in enumerate(CONTROLS)} | dict(enumerate(tokenizer.pieces))
    return [
        (names[target], weight)
        for target, weight, index in zip(row.target_ids, row.loss_weights, row.message_indices, strict=True)
        if weight and index == message_index
    ]


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def test_qwen25_by_hand():
    """The call begins at `get`: 33 pieces, of which `get` and the second `_` are key (`get_paper"` shares three), so
    w = 31 / 2 = 15.5. The 16 pieces before it weigh 1, and so does the end of the turn."""
    tokenizer = ControlTokenizer()
    row = encode_trajectory(PAPERS, tokenizer, **SETTINGS, prompt_format="qwen25")
    before = ["I", " look", "\n", "<", "tool", "_", "call", ">", "\n", "{", '"', "name", '"', ":", " ", '"']
    call = ["get", "_", "paper", "_", "detai", "ls", '"', ",", " ", '"', "argum", "ents", '"', ":", " ", "{"]
    call += ['"', "id", '"', ":", " ", '"', "7", '"', "}", "}", "\n", "<", "/", "tool", "_", "call", ">"]
    assert (len(before), len(call)) == (16, 33)
    weights = [1.0] * 16 + [15.5, 1.0, 1.0, 15.5] + [1.0] * 29 + [1.0]
    assert pieces_and_weights(row, tokenizer, 1) == list(zip([*before, *call, "<|im_end|>"], weights, strict=True))
    assert pieces_and_weights(row, tokenizer, 3) == [("Done", 1.0), ("<|im_end|>", 1.0)]
    assert (row.trained_turns, row.trained_tokens, row.left_out_thoughts) == (2, 52, 0)
    # every target is the next input: the end of the turn is a token of the template
    assert list(row.target_ids[:-1]) == list(row.input_ids[1:])
    # what the format itself writes belongs to the message before it
    assert row.message_indices[0] == -1 and set(row.message_indices) == {-1, 0, 1, 2, 3}


def test_toolllama_by_hand():
    """` get` begins the call of 22 pieces, K = {` get`, the second `_`}: w = 20 / 2 = 10. EOS is not in the context."""
    tokenizer = ControlTokenizer()
    row = encode_trajectory(PAPERS, tokenizer, **SETTINGS, prompt_format="toolllama")
    before = ["Thoug", "ht", ":", " I", " look", "\n", "Actio", "n", ":"]
    call = [" get", "_", "paper", "_", "detai", "ls", "\n", "Actio", "n", " Input", ":", " "]
    call += ["{", '"', "id", '"', ":", " ", '"', "7", '"', "}"]
    weights = [1.0] * 9 + [10.0, 1.0, 1.0, 10.0] + [1.0] * 18 + [1.0]
    assert pieces_and_weights(row, tokenizer, 1) == list(zip([*before, *call, "</s>"], weights, strict=True))
    assert tokenizer.eos_id not in row.input_ids and list(row.target_ids).count(tokenizer.eos_id) == 2


def test_the_other_formats_of_one_call():
    """Key pieces and the end of the turn. `_details` is the first difference from `get_paper`; nothing else shares."""
    expected = {
        "tl": ([" get", "_"], "</s>"),
        "nexusraven": ([" get", "_"], "<bot_end>"),
        "chatglm4": (["get", "_"], "<|observation|>"),
        "qwen2": ([" get", "_"], "<|im_end|>"),
        "llama31": (["get", "_"], "<|eot_id|>"),
    }
    for prompt_format, (keys, end) in expected.items():
        tokenizer = ControlTokenizer()
        row = encode_trajectory(PAPERS, tokenizer, **SETTINGS, prompt_format=prompt_format)
        trained = pieces_and_weights(row, tokenizer, 1)
        assert [piece for piece, weight in trained if weight > 1] == keys and trained[-1] == (end, 1.0)
        assert row.left_out_thoughts == (prompt_format != "qwen2")
    assert set(expected) | {"qwen25", "toolllama"} == set(TRAINING_FORMATS)


def test_names_in_json_are_written_as_in_the_call():
    tokenizer = ControlTokenizer()
    target = dialogue_segments([], PAPERS.messages[:2], "llama31")[-2]
    place = name_place(target)
    assert place == ('{"name": "', '"')
    names = encode_names(['say"hi', "a\\b", "get"], tokenizer, place)
    assert ["".join(map(tokenizer.piece, ids)) for ids in names.values()] == ['say\\"hi"', 'a\\\\b"', 'get"']


def test_masked_turns_keep_their_place_and_train_no_end():
    messages = [
        Message("user", "q"),
        EARLIER_TURN,
        Message("tool", '{"error": "Invalid API key"}'),
        *PAPERS.messages[1:],
    ]
    tokenizer = ControlTokenizer()
    trajectory = Trajectory("t", PAPERS.tools, messages, "x.json:1")
    row = encode_trajectory(trajectory, tokenizer, **SETTINGS | {"error_filter": "structured"}, prompt_format="qwen25")
    assert row.token_classes.count("masked") > 20 and row.trained_turns == 2
    ends = [
        kind for target, kind in zip(row.target_ids, row.token_classes) if target == tokenizer.control_id("<|im_end|>")
    ]
    assert ends.count("eos") == 2 and ends.count("context") == len(ends) - 2


def test_text_without_a_place_is_counted():
    tokenizer = ControlTokenizer()
    for prompt_format, n_left_out in (("llama31", 1), ("qwen25", 0)):
        row = encode_trajectory(PAPERS, tokenizer, **SETTINGS, prompt_format=prompt_format)
        lines = describe_data([PAPERS], [row], [row], "none")
        assert sum("next to the call" in line for line in lines) == n_left_out


def test_a_tokenizer_without_the_tokens_is_refused_with_their_names():
    with pytest.raises(
        PromptError, match=r"--prompt_format qwen25: found no token <\|im_start\|>, <\|im_end\|> in the"
    ):
        encode_trajectory(PAPERS, PieceTokenizer(), **SETTINGS, prompt_format="qwen25")
    with pytest.raises(
        PromptError, match=r"--prompt_format chatglm4: found no token \[gMASK\], <sop>, .*<\|observation\|>"
    ):
        end_of_turn_ids(PieceTokenizer(), "chatglm4")
    assert end_of_turn_ids(PieceTokenizer(), "nexusraven") == [2]  # spelled in characters: EOS ends the turn
    assert end_of_turn_ids(ControlTokenizer(), "chatglm4") == [
        1900 + CONTROLS.index(text) for text in ("<|observation|>", "<|user|>")
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Properties, with three real tokenizers


def training_texts():
    rng = random.Random(5)
    texts = [turn["content"] for record in make_records(60, seed=1) for turn in record["conversations"]]
    texts += ['{"name": "get_weather", "arguments": {"city": "Oslo"}}', "Thought: \nAction: get\nAction Input: {}"] * 9
    return texts + ["".join(rng.choices(HOSTILE, k=8)) for _ in range(200)]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    pytest.importorskip("tokenizers", reason="needs requirements-optional.txt")

    @cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        return (
            bundled_with_controls(folder)
            if kind == "bundled"
            else byte_level_bpe(folder, training_texts(), family=kind)
        )

    return make


TOOLS = [tool("f"), tool("_get"), tool("search-all")]


@pytest.mark.parametrize("count", [80, pytest.param(400, marks=pytest.mark.very_slow)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt_format", TRAINING_FORMATS)
def test_prompts_are_prefixes_of_rows_and_turns_are_read_back(tokenizer_of, prompt_format, kind, count):
    tokenizer, rng = tokenizer_of(kind), random.Random(KINDS.index(kind))
    ends = end_of_turn_ids(tokenizer, prompt_format)
    for number in range(count):
        messages = hostile_messages(rng)
        trajectory = Trajectory(f"h{number}", TOOLS[: rng.randrange(4)], messages, "hostile")
        row = encode_trajectory(trajectory, tokenizer, **SETTINGS, prompt_format=prompt_format)
        ids = list(row.input_ids)
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        index = rng.choice(turns)  # one prompt each: so many trajectories see every turn often enough
        prompt = encode_prompt(trajectory.tools, messages[:index], tokenizer, prompt_format)
        assert ids[: len(prompt)] == prompt
        turn = [t for t, w, m in zip(row.target_ids, row.loss_weights, row.message_indices) if w and m == index]
        assert row.target_ids[len(prompt) - 1 : len(prompt) - 1 + len(turn)].tolist() == turn
        assert ids[len(prompt) : len(prompt) + len(turn) - 1] == turn[:-1] and turn[-1] in ends
        if messages[index].call is not None:
            assert turn[-1] == ends[0]
            if any(text in json_text(messages[index].call.arguments) for text in CHANGED[kind]):
                continue
            assert parse_output(tokenizer.decode(turn[:-1]).strip(), prompt_format) == [messages[index].call]


@pytest.mark.parametrize("count", [40, pytest.param(150, marks=pytest.mark.very_slow)])
@pytest.mark.parametrize("kind", ("qwen25", "llama31"))
@pytest.mark.parametrize("prompt_format", TRAINING_FORMATS)
def test_the_first_key_token_has_the_first_character_of_the_name(tokenizer_of, prompt_format, kind, count):
    """The package's own offsets are the oracle: they say which characters a token covers."""
    import tokenizers

    tokenizer, rng = tokenizer_of(kind), random.Random(3)
    oracle = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    oracle.encode_special_tokens = True
    for _ in range(count):
        thought = "".join(rng.choices([text for text in HOSTILE if text != "e\u0301"], k=rng.randrange(5)))
        call = ToolCall(rng.choice(("get_weather", "f", "search-all", "_get")), {"a": thought})
        messages = [Message("user", "q"), Message("assistant", "", call, thought=thought)]
        (target,) = [part for part in dialogue_segments([], messages, prompt_format) if part.is_target]
        encoding = oracle.encode(target.text, add_special_tokens=False)
        start = target.name_span[0]
        n_before = count_tokens_before(encoding.ids, target.text[:start], tokenizer)
        assert all(end <= start for _, end in encoding.offsets[:n_before])
        first, last = encoding.offsets[n_before]
        assert first <= start < last
        trajectory = Trajectory("t", [tool(call.name), tool("get")], messages, "x")
        row = encode_trajectory(trajectory, tokenizer, **SETTINGS, prompt_format=prompt_format)
        keys = [i for i, code in enumerate(row.class_codes) if code == KEY]
        prompt = encode_prompt(trajectory.tools, messages[:1], tokenizer, prompt_format)
        assert keys[0] == len(prompt) - 1 + n_before


def test_key_tokens_inside_json_decide_between_tools(tokenizer_of):
    """`get_weather` against `get`, `get_web` and `set`: key are its first token and where each of them leaves it."""
    tokenizer = tokenizer_of("qwen25")
    names = ("get_weather", "get", "get_web", "set")
    messages = [Message("user", "q"), Message("assistant", "", ToolCall("get_weather", {"a": "x"}))]
    trajectory = Trajectory("t", [tool(name) for name in names], messages, "x")
    row = encode_trajectory(trajectory, tokenizer, **SETTINGS, prompt_format="llama31")
    call = [t for t, w in zip(row.target_ids, row.loss_weights) if w][:-1]
    texts = [tokenizer.decode([token]) for token in call]
    first = "".join(texts).index("get_weather")
    keys = [tokenizer.decode([t]) for t, code in zip(row.target_ids, row.class_codes) if code == KEY]
    starts = [len("".join(texts[:i])) for i in range(len(texts))]
    expected = {first}
    for other in names[1:]:
        other_ids = tokenizer.encode_continuation('{"name": "' + other + '"')
        shared = next(i for i, (a, b) in enumerate(zip(call, other_ids, strict=False)) if a != b)
        expected.add(starts[shared])
    assert keys == [texts[starts.index(start)] for start in sorted(expected)] and len(keys) >= 2
