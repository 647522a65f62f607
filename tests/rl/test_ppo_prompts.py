"""rl/prompts.py: prompts are prefixes of the SFT samples, every rule counted by hand, both kinds of file, bad input."""

import json
import re
from pathlib import Path

import pytest

from data.error_filter import decide_masked_turns
from data.formats.table import encode_prompt
from data.json_records import DataError
from data.tool_calls import ToolCall
from data.trajectories import Message, read_trajectories
from model.tokenizer import load_tokenizer
from rl.check_rewards import check_rewards
from rl.prompts import PPOPrompt, read_prompts
from tests.support.per_turn_rows import expand_per_turn
from tests.support.piece_tokenizer import PieceTokenizer

ASSETS = Path(__file__).resolve().parents[2] / "assets"
SETTINGS = {"error_filter": "structured", "prompt_turns": "all", "max_prompt_tokens": 8192, "unparsable_calls": "error"}


def function(name: str, required: list[str], optional: list[str]) -> dict:
    properties = {parameter: {"type": "string", "description": "d"} for parameter in [*required, *optional]}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


TOOLS = [function("f", ["a"], ["b"]), function("g", [], []), function("finish", ["answer"], [])]


def call(name: str, **arguments) -> dict:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def feedback(content: str) -> dict:
    return {"role": "tool", "content": content}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


# Turns:     0 good f, 1 failing g, 2 plain text, 3 unknown tool, 4 unknown parameter, 5 good g, 6 finish
MIXED = {
    "id": "m",
    "tools": TOOLS,
    "messages": [
        user("do"),
        call("f", a="x"),
        feedback("fine"),
        call("g"),
        feedback('{"error": "no"}'),
        {"role": "assistant", "content": "Which one?"},
        user("that"),
        call("h"),
        feedback("fine"),
        call("f", a="x", z=1),
        feedback("fine"),
        call("g"),
        feedback("fine"),
        call("finish", answer="done"),
    ],
}
ERRONEOUS = {"id": "e", "tools": TOOLS, "messages": [user("do"), call("f"), feedback("fine")]}
TALK = {"id": "t", "tools": TOOLS, "messages": [user("hello"), {"role": "assistant", "content": "Hello!"}]}
GOOD = {"id": "g", "tools": TOOLS, "messages": [user("do it"), call("f", a="y", b="z"), feedback("fine"), call("g")]}


def write_lines(tmp_path: Path, *records: dict | str) -> Path:
    path = tmp_path / "records.jsonl"
    path.write_text(
        "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records),
        encoding="utf-8",
    )
    return path


def read(path: Path, **settings) -> tuple[list[PPOPrompt], list[str]]:
    return read_prompts(path, PieceTokenizer(), **{**SETTINGS, **settings})


def places(prompts: list[PPOPrompt]) -> list[tuple[str, int]]:
    return [(prompt.id, prompt.turn) for prompt in prompts]


class NoTokens:
    """For counts of the bundled data: encoding its text would take most of the test's time."""

    bos_id, eos_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return []

    encode_continuation = encode


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories


def test_rules_and_counts_by_hand(tmp_path):
    prompts, notes = read(write_lines(tmp_path, MIXED, ERRONEOUS, TALK, GOOD))
    assert places(prompts) == [("m", 0), ("m", 5), ("m", 6), ("g", 0), ("g", 1)]
    assert [prompt.where.rpartition(":")[2] for prompt in prompts] == ["1", "1", "1", "4", "4"]
    assert prompts[0].gold_calls == (ToolCall("f", {"a": "x"}),) and prompts[0].tools == TOOLS
    assert prompts[2].gold_calls == (ToolCall("finish", {"answer": "done"}),)
    assert notes == [
        "5 prompts from 11 assistant turns of 4 records (error_filter structured, prompt_turns all)",
        "2 turns dropped: plain text",
        "1 turns dropped: erroneous, tool_hallucination",
        "1 turns dropped: erroneous, parameter_hallucination",
        "1 turns dropped: erroneous, parameter_missing",
        "1 turns dropped: erroneous, tool_call_failure",
    ]


@pytest.mark.parametrize(
    ("settings", "expected", "note"),
    [
        ({"prompt_turns": "tools"}, [("m", 0), ("m", 5), ("g", 0), ("g", 1)], "1 turns dropped: not chosen by"),
        ({"prompt_turns": "first"}, [("m", 0), ("g", 0)], "3 turns dropped: not chosen by prompt_turns first"),
        ({"prompt_turns": "last"}, [("m", 6), ("g", 1)], "3 turns dropped: not chosen by prompt_turns last"),
        # substring: keeps what only the documents condemn; h is not offered, so it is no prompt either
        (
            {"error_filter": "substring"},
            [("m", 0), ("m", 4), ("m", 5), ("m", 6), ("e", 0), ("g", 0), ("g", 1)],
            "1 turns dropped: tool not offered",
        ),
        (
            {"error_filter": "none"},
            [("m", 0), ("m", 1), ("m", 4), ("m", 5), ("m", 6), ("e", 0), ("g", 0), ("g", 1)],
            "1 turns dropped: tool not offered",
        ),
    ],
)
def test_settings_choose_turns(tmp_path, settings, expected, note):
    prompts, notes = read(write_lines(tmp_path, MIXED, ERRONEOUS, TALK, GOOD), **settings)
    assert places(prompts) == expected
    assert any(line.startswith(note) for line in notes), notes
    dropped = sum(int(line.split()[0]) for line in notes[1:])
    assert (
        notes[0].startswith(f"{len(prompts)} prompts from {len(prompts) + dropped} assistant turns")
        and len(prompts) + dropped == 11
    )


def test_ask_to_user_is_no_prompt_of_tools(tmp_path):
    talk = {
        "id": "q",
        "tools": TOOLS,
        "messages": [user("do"), call("ask_to_user", question="Which?"), user("f"), call("g")],
    }
    path = write_lines(tmp_path, talk)
    assert places(read(path)[0]) == [("q", 0), ("q", 1)]  # offered although not listed
    assert places(read(path, prompt_turns="tools")[0]) == [("q", 1)]


def test_a_prompt_too_long_is_dropped_whole(tmp_path):
    path = write_lines(tmp_path, MIXED, GOOD)
    lengths = [len(prompt.prompt_ids) for prompt in read(path)[0]]
    assert lengths == sorted(lengths[:3]) + lengths[3:]
    for limit in (lengths[1] - 1, lengths[1], lengths[2]):
        prompts, notes = read(path, max_prompt_tokens=limit)
        assert [len(prompt.prompt_ids) for prompt in prompts] == [length for length in lengths if length <= limit]
        n_long = sum(length > limit for length in lengths)
        assert (f"{n_long} turns dropped: longer than {limit} prompt tokens" in notes) == (n_long > 0)
    prompts, notes = read(path, prompt_turns="last", max_prompt_tokens=lengths[2] - 1)  # no earlier turn steps in
    assert places(prompts) == [("g", 1)] and len(notes) == 6 + 1


def test_unparsable_calls_stop_or_are_counted(tmp_path):
    broken = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    path = write_lines(
        tmp_path, GOOD, {"id": "b", "tools": TOOLS, "messages": [user("do"), broken, feedback("fine"), call("g")]}
    )
    with pytest.raises(
        DataError, match=r"records\.jsonl:2: messages\[1\].*arguments: found the end at column 2, expected JSON"
    ):
        read(path)
    prompts, notes = read(path, unparsable_calls="mask")
    assert places(prompts) == [("g", 0), ("g", 1), ("b", 1)]
    assert "1 turns dropped: unparsable" in notes


def first_records(tmp_path: Path, n: int) -> Path:
    """The first records of the bundled training file, one per line in a list."""
    with open(ASSETS / "tiny_data" / "train.json", encoding="utf-8") as file:
        assert next(file) == "[\n"
        return write_lines(tmp_path, *(next(file).rstrip(",\n") for _ in range(n)))


def test_prompt_ids_are_the_prefix_of_the_sft_sample(tmp_path):
    """Against the per-turn expansion of SFT: the first trained target comes right after the prompt."""
    tokenizer = load_tokenizer(ASSETS / "tiny_model")
    path = first_records(tmp_path, 80)
    by_place = {(prompt.id, prompt.turn): prompt for prompt in read_prompts(path, tokenizer, **SETTINGS)[0]}
    n_checked = 0
    for trajectory in read_trajectories(path):
        turns = {decision.message_index: turn for turn, decision in enumerate(decide_masked_turns(trajectory, "none"))}
        for row in expand_per_turn(
            trajectory,
            tokenizer,
            error_filter="structured",
            key_tokens=True,
            max_key_token_weight=9.0,
            loss_normalization="sum",
        ):
            index = int(row.id.rpartition("#")[2])
            prompt = by_place[trajectory.id, turns[index]]
            length = len(prompt.prompt_ids)
            assert prompt.prompt_ids == list(row.input_ids[:length]) and prompt.prompt_ids[0] == tokenizer.bos_id
            assert [weight > 0 for weight in row.loss_weights] == [place >= length - 1 for place in range(len(row))]
            assert prompt.prompt_ids == encode_prompt(trajectory.tools, trajectory.messages[:index], tokenizer)
            assert prompt.gold_calls == (trajectory.messages[index].call,)
            n_checked += 1
    assert n_checked == len(by_place) > 150


@pytest.mark.parametrize(
    ("prompt_turns", "n_prompts"), [("all", 2884), ("tools", 1667), ("first", 1217), ("last", 1217)]
)
def test_counts_of_the_bundled_data(prompt_turns, n_prompts):
    prompts, notes = read_prompts(
        ASSETS / "tiny_data" / "train.json", NoTokens(), **{**SETTINGS, "prompt_turns": prompt_turns}
    )
    assert len(prompts) == n_prompts and notes[0].startswith(f"{n_prompts} prompts from 3109 assistant turns of 1217 ")
    assert sum(int(note.split()[0]) for note in notes if "erroneous" in note) == 225
    assert check_rewards(prompts[::7]) == []


def test_authors_form_gives_the_same_prompts(tmp_path):
    system = json.dumps([tool["function"] for tool in TOOLS])
    authors = {
        "id": "g",
        "conversations": [
            {"role": "system", "content": system},
            {"role": "user", "content": "do it"},
            {"role": "assistant", "content": 'f\n{"a": "y", "b": "z"}'},
            {"role": "function", "content": "fine"},
            {"role": "assistant", "content": "g\n{}"},
        ],
    }
    openai = read(write_lines(tmp_path, GOOD))[0]
    path = tmp_path / "authors.json"
    path.write_text(json.dumps([authors]), encoding="utf-8")
    for ours, theirs in zip(openai, read(path)[0], strict=True):
        assert (ours.prompt_ids, ours.gold_calls, ours.turn) == (theirs.prompt_ids, theirs.gold_calls, theirs.turn)


# ---------------------------------------------------------------------------------------------------------------------
# Held-out records


def held_out(*gold: list | dict, **changes) -> dict:
    answers = [{"calls": calls if isinstance(calls, list) else [calls], "order_free": False} for calls in gold]
    return {"id": "h", "tools": TOOLS, "messages": [user("do")], "gold": answers, **changes}


def gold(name: str, **arguments) -> dict:
    return {"name": name, "arguments": arguments}


def test_held_out_answers_of_one_call_are_gold(tmp_path):
    several = held_out(
        gold("f", a="x"),
        [gold("f", a="x"), gold("g")],
        gold("g"),
        {**gold("f", a="any"), "wildcards": ["a"]},
        {**gold("f", a="y"), "wildcards": []},
    )
    path = write_lines(
        tmp_path,
        several,
        "",
        held_out([gold("g"), gold("g")], id=7),
        held_out(gold("f"), id="e"),
        held_out(gold("finish", answer="x"), id="end"),
    )
    prompts, notes = read(path)
    assert places(prompts) == [("h", 0), ("end", 0)]
    assert prompts[0].gold_calls == (ToolCall("f", {"a": "x"}), ToolCall("g", {}), ToolCall("f", {"a": "y"}))
    assert prompts[0].prompt_ids == encode_prompt(TOOLS, [Message("user", "do")], PieceTokenizer())
    assert [prompt.where for prompt in prompts] == [f"{path}:1", f"{path}:5"]
    assert notes == [
        "2 prompts from 4 assistant turns of 4 records (error_filter structured, prompt_turns all)",
        "1 turns dropped: no gold answer of exactly one call without wildcards",
        "1 turns dropped: erroneous, parameter_missing",
    ]
    assert places(read(path, prompt_turns="tools")[0]) == [("h", 0)]
    assert places(read(path, prompt_turns="last")[0]) == [("h", 0), ("end", 0)]
    assert places(read(path, error_filter="none")[0]) == [("h", 0), ("e", 0), ("end", 0)]


def test_bundled_held_out_files_are_prompts():
    tokenizer = load_tokenizer(ASSETS / "tiny_model")
    for name in ("test_seen.jsonl", "test_unseen.jsonl"):
        prompts, notes = read_prompts(ASSETS / "tiny_data" / name, tokenizer, **SETTINGS)
        assert len(prompts) == 300 and len(notes) == 1 and check_rewards(prompts[::10]) == []


def test_held_out_gold_that_cannot_be_written(tmp_path):
    path = write_lines(tmp_path, held_out(gold("g")), held_out(gold("f f")))
    with pytest.raises(DataError, match=r"records\.jsonl:2: gold: found 'f f', expected a name"):
        read(path)
    prompts, notes = read(path, unparsable_calls="mask")
    assert len(prompts) == 1 and notes[1] == "1 turns dropped: unparsable"


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ("{", "found the end at column"),
        ("[1]", "found a list, expected one JSON object"),
        ('{"id": 1, "id": 2}', "found the key 'id' twice"),
        ('{"a": NaN}', "found NaN"),
        ("[" * 100_000, "nested too deeply"),
        (held_out(gold("g"), tools={}), "found dict as 'tools', expected list"),
        (held_out(gold("g"), tools=[{"name": 1}]), r"tools\[0\]: found 1, expected a tool with a name"),
        (held_out(gold("g"), messages=[]), "found no message"),
        (held_out(gold("g"), messages=["do"]), "messages: found str, expected an object with 'role'"),
        (held_out(gold("g"), messages=[{"role": "assistant", "content": "x"}]), "role 'assistant', expected user"),
        (
            held_out(gold("g"), messages=[{"role": "user", "content": None}]),
            "found NoneType as 'content', expected str",
        ),
        (held_out(gold("g"), id=[]), "id: found list, expected a string or an integer"),
        (held_out(gold("g"), id=True), "id: found bool"),
        (held_out(gold("g"), gold=None), "found NoneType as 'gold', expected list"),
        (held_out(gold("g"), gold=[gold("g")]), "gold: found nothing as 'calls', expected list"),
        (held_out(["g"]), "gold: found str, expected an object with 'name'"),
        (held_out({"name": "g"}), "gold: found nothing as 'arguments', expected dict"),
    ],
)
def test_malformed_held_out_lines_name_their_place(tmp_path, line, pattern):
    path = write_lines(tmp_path, held_out(gold("g")), "", line)
    with pytest.raises(DataError, match=rf"\A{re.escape(str(path))}:3: .*{pattern}") as error:
        read(path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_an_empty_set_is_refused_with_the_counts(tmp_path):
    path = write_lines(tmp_path, ERRONEOUS, TALK)
    with pytest.raises(
        DataError,
        match=r"records\.jsonl: found no prompt, expected at least one \(0 prompts from 2 .*"
        "1 turns dropped: plain text; 1 turns dropped: erroneous, parameter_missing",
    ):
        read(path)
    with pytest.raises(DataError, match="2 turns dropped: longer than 3 prompt tokens"):
        read(write_lines(tmp_path, GOOD), max_prompt_tokens=3)
    with pytest.raises(DataError, match="1 turns dropped: no gold answer of exactly one call"):
        read(write_lines(tmp_path, held_out()))


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "found an empty file"),
        (b"\n \n", "found an empty file"),
        (b"{", ":1: found the end"),
        (b"[]", "found an empty list"),
        (b'{"id": 1}', 'expected an object with "conversations"'),
        (b'"gold"', "expected '\\['"),
        (b'[{"gold": []}]', 'expected an object with "conversations"'),
        (b'{"gold": [], "tools": [], "messages": [{"role": "user", "content": "x"}]}\n\n\xff', ":3: found byte 0xff"),
        (b"\xff", ":1: found byte 0xff"),
        (b'{"gold": NaN}', "found NaN"),
    ],
)
def test_files_that_hold_no_records(tmp_path, content, pattern):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=pattern):
        read(path)
    with pytest.raises(DataError, match="expected a readable file"):
        read(tmp_path / "none.jsonl")


def test_a_held_out_file_may_begin_with_a_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_text("\ufeff\n \n" + json.dumps(held_out(gold("g"))), encoding="utf-8")
    assert read(path)[0][0].where == f"{path}:3"


@pytest.mark.parametrize("setting", ["error_filter", "prompt_turns", "unparsable_calls"])
def test_unknown_settings_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match=f"{setting} is 'bogus', expected one of "):
        read(write_lines(tmp_path, GOOD), **{setting: "bogus"})
