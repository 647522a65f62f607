"""The toolbox world: what the bundled data promises about itself."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from data.error_filter import decide_masked_turns
from data.formats.plain import parse_plain_call
from data.formats.table import encode_prompt
from data.trajectories import Message, read_trajectories
from model.tokenizer import load_tokenizer
from toolbox.corpus import draw_document, encode_document, render_plain_call
from toolbox.make import main as make_toolbox
from toolbox.tokenizer import train_tokenizer, vocabulary_strings
from toolbox.words import VALUE_KINDS
from toolbox.world import (
    HARD_QUALIFIERS,
    build_toolbox,
    draw_multi_tasks,
    draw_request,
    draw_test_examples,
    execute,
    held_out_pairs,
    name_parts,
    tool_name,
)

ASSETS = Path(__file__).parents[2] / "assets"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "tiny_model" / "tokenizer.model")


@pytest.fixture(scope="module")
def trajectories():
    return read_trajectories(str(ASSETS / "tiny_data" / "train.json"))


def test_committed_files_are_what_the_command_writes(tmp_path):
    make_toolbox(["--output", str(tmp_path)])
    for name in (
        "tiny_model/tokenizer.model",
        "tiny_data/train.json",
        "tiny_data/test_seen.jsonl",
        "tiny_data/test_unseen.jsonl",
        "tiny_data/test_hard.jsonl",
        "tiny_data/test_alike.jsonl",
        "tiny_data/test_multi.jsonl",
    ):
        assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes(), name


def test_any_number_of_further_trajectories(tmp_path):
    make_toolbox(["--only_trajectories", str(tmp_path / "more.json"), "--trajectories", "25", "--seed", "3"])
    assert len(read_trajectories(str(tmp_path / "more.json"))) == 25


def test_further_prompts_are_half_for_seen_half_for_unseen_tools(tmp_path):
    make_toolbox(["--only_tests", str(tmp_path / "more.jsonl"), "--tests", "9", "--seed", "40"])
    rows = [json.loads(line) for line in (tmp_path / "more.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"].rsplit("-", 1)[0] for row in rows] == ["tiny-seen"] * 5 + ["tiny-unseen"] * 4
    assert len({row["id"] for row in rows}) == 9


def test_prompts_of_one_split(tmp_path):
    make_toolbox(["--only_tests", str(tmp_path / "a.jsonl"), "--tests", "30", "--seed", "40", "--split", "hard"])
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 30 and {row["id"].rsplit("-", 1)[0] for row in rows} == {"tiny-hard"}
    categories = {HARD_QUALIFIERS[row["gold"][0]["calls"][0]["name"].split("_")[2]] for row in rows}
    assert len(categories) > 2 and "tool_instability" not in categories


def test_an_output_that_cannot_be_and_a_wrong_count_are_one_line(tmp_path, capsys):
    for flag in ("--only_tests", "--only_trajectories"):
        assert make_toolbox([flag, str(tmp_path), "--trajectories", "1"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path) in error
    for flag in ("--tests", "--trajectories"):
        with pytest.raises(SystemExit, match="2"):
            make_toolbox(["--only_tests", str(tmp_path / "x"), flag, "0"])
        assert f"{flag}: found 0, expected 1 to 1000000" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "OUT", "--alike"], "--alike: found it without --only_trajectories"),
        (["--output", "OUT", "--split", "hard"], "--split: found it without --only_tests"),
        (["--only_trajectories", "OUT", "--tests", "5"], "--tests: found it without --only_tests"),
        (["--only_trajectories", "OUT", "--only_tests", "OUT"], "not allowed with argument"),
        (["--only_tests", "OUT", "--seed", "-1"], "--seed: found -1, expected 0 to"),  # Random(-1) is Random(1)
    ],
)
def test_flags_that_would_do_nothing_are_refused(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit, match="2"):
        make_toolbox([flag.replace("OUT", str(tmp_path / "x")) for flag in flags])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and not list(tmp_path.iterdir())


def test_no_held_out_pair_is_ever_trained_on(trajectories):
    held_out = held_out_pairs()
    assert len(held_out) == 60
    trained = {name_parts(tool)[1:] for row in trajectories for tool in row.tools[:-2]}
    assert not trained & held_out
    unseen = {name_parts(tool)[1:] for tool in build_toolbox(unseen=True)}
    assert unseen <= held_out
    seen_names = {tool_name(tool) for tool in build_toolbox(unseen=False)}
    for example in draw_test_examples(1, 50, unseen=True):
        assert not seen_names & {tool_name(tool) for tool in example["tools"]}
    rng = random.Random(0)
    for _ in range(200):  # the base corpus
        text = draw_document(rng, held_out, most_tools=5)[0][0]
        names = [line[4 : line.index("(")].split("_") for line in text.split("\n") if line.startswith("def ")]
        assert not {(parts[1], parts[2]) for parts in names if len(parts) == 3 and parts[0] != "ask"} & held_out


def test_seen_tests_are_new_requests_on_trained_tools(trajectories):
    queries = {message.content for row in trajectories for message in row.messages if message.role == "user"}
    examples = [json.loads(line) for line in (ASSETS / "tiny_data" / "test_seen.jsonl").read_text().splitlines()]
    names = {tool_name(tool) for tool in build_toolbox(unseen=False)}
    assert len(examples) == 300
    assert all(example["gold"][0]["calls"][0]["name"] in names for example in examples)
    repeated = sum(example["messages"][0]["content"] in queries for example in examples)
    assert repeated <= 15  # tools without parameters have few requests; everything else is new


def test_multi_turn_tasks_are_new_and_their_answers_are_what_the_tools_say(trajectories):
    """Each task is played through with its right calls by the executor: results, number of calls, the stated mix."""
    known = {message.content for row in trajectories for message in row.messages if message.role == "user"}
    folder = ASSETS / "tiny_data"
    for name in ("seen", "unseen"):
        lines = (folder / f"test_{name}.jsonl").read_text().splitlines()
        known |= {json.loads(line)["messages"][0]["content"] for line in lines}
    tasks = [json.loads(line) for line in (folder / "test_multi.jsonl").read_text().splitlines()]
    queries = {task["messages"][0]["content"] for task in tasks}
    assert len(tasks) == len(queries) == len({task["id"] for task in tasks}) == 200 and not queries & known
    mix = Counter((task["meta"]["scenario"], task["meta"]["requests"]) for task in tasks)
    assert mix == {
        ("seen", 1): 60,
        ("seen", 2): 60,
        ("seen", 3): 30,
        ("unseen", 1): 20,
        ("unseen", 2): 20,
        ("unseen", 3): 10,
    }
    trained = {tool_name(tool) for tool in build_toolbox(unseen=False)}
    for task in tasks:
        meta, calls, results = task["meta"], 0, []
        for call in meta["calls"]:
            assert (call["name"] in trained) == (meta["scenario"] == "seen")
            for attempt in (0, 1):
                feedback = json.loads(execute(task["tools"], call["name"], call["arguments"], attempt))
                calls += 1
                if "result" in feedback:
                    results.append(feedback["result"])
                    break
        assert results == meta["results"] and calls == meta["attempts"] and len(set(results)) == meta["requests"]
        assert all(result in meta["answer"] for result in results)
    assert sum(task["meta"]["attempts"] > task["meta"]["requests"] for task in tasks) == 12


def test_known_queries_are_not_drawn():
    tasks = list(draw_multi_tasks(5, 6, unseen=True, request_count=1, known_queries=()))
    known = {tasks[0]["messages"][0]["content"], tasks[3]["messages"][0]["content"]}
    others = list(draw_multi_tasks(5, 6, unseen=True, request_count=1, known_queries=known))
    assert not known & {task["messages"][0]["content"] for task in others}
    assert [task["id"] for task in others] == [task["id"] for task in tasks]
    assert [task["meta"] for task in others[:2]] == [task["meta"] for task in tasks[1:3]]


def test_share_of_failing_trajectories_is_figure_1(trajectories):
    failing = sum(any(turn.masked for turn in decide_masked_turns(row, "structured")) for row in trajectories)
    assert len(trajectories) == 1217
    assert 0.15 < failing / len(trajectories) < 0.19
    categories = Counter(turn.category for row in trajectories for turn in decide_masked_turns(row, "structured"))
    assert set(HARD_QUALIFIERS.values()) <= set(categories)


def test_gold_calls_execute_and_errors_are_classified(trajectories):
    rng = random.Random(5)
    for tool in build_toolbox(unseen=False) + build_toolbox(unseen=True):
        _, arguments = draw_request(rng, tool)
        feedback = execute([tool], tool_name(tool), arguments, attempt=1)
        assert set(json.loads(feedback)) == {"result"}
        assert feedback == execute([tool], tool_name(tool), arguments, attempt=1)
    tool = next(tool for tool in build_toolbox(unseen=False) if tool["function"]["parameters"]["required"])
    _, arguments = draw_request(rng, tool)
    name, first = tool_name(tool), tool["function"]["parameters"]["required"][0]
    assert execute([tool], "get_nothing", {}) == "name 'get_nothing' is not defined"
    assert "unexpected keyword argument 'bogus'" in execute([tool], name, {**arguments, "bogus": 1})
    assert f"missing 1 required positional argument: '{first}'" in execute([tool], name, {})
    assert json.loads(execute([tool], name, {**arguments, first: "nothing of its kind"})) == {
        "error": "Response error."
    }


def test_every_masked_turn_of_the_training_data_really_failed(trajectories):
    """The filter against the generator: a masked turn's feedback is no result, a kept one's is (or it is `finish`)."""
    for row in trajectories:
        for turn in decide_masked_turns(row, "structured"):
            following = row.messages[turn.message_index + 1 : turn.message_index + 2]
            succeeded = not following or following[0].content.startswith('{"result"')
            assert turn.masked != succeeded, (row.id, turn)


def test_request_mentions_every_argument():
    rng = random.Random(7)
    for tool in build_toolbox(unseen=False):
        text, arguments = draw_request(rng, tool)
        assert all(str(value) in text for value in arguments.values())
        assert set(tool["function"]["parameters"]["required"]) <= set(arguments)


def test_parameter_names_belong_to_one_kind():
    names = [name for kind in VALUE_KINDS.values() for name in kind.names]
    assert len(names) == len(set(names)) == 2 * len(VALUE_KINDS)


def test_tokenizer_is_reproducible_and_values_copy(tokenizer):
    assert train_tokenizer() == (ASSETS / "tiny_model" / "tokenizer.model").read_bytes()
    for text in ("Oslo", "May 12", "Silent River", "37"):
        asked, called = tokenizer.encode_continuation(f" in {text} : "), tokenizer.encode_continuation(f'="{text}")')
        alone = tokenizer.encode_continuation(text)
        assert asked[1 : 1 + len(alone)] == called[1 : 1 + len(alone)] == alone


def test_prompts_are_short(tokenizer):
    lengths = [
        len(encode_prompt(example["tools"], [Message("user", example["messages"][0]["content"], None)], tokenizer))
        for example in draw_test_examples(1, 100, unseen=False)
    ]
    assert max(lengths) < 260


@pytest.mark.slow
def test_every_vocabulary_entry_occurs_in_the_base_corpus(tokenizer):
    """Whole-word and template pieces by the dialogues alone, all ids with the noise rows (both within 43,200)."""
    held_out, seen = held_out_pairs(), Counter()
    rng = random.Random(1)
    for _ in range(2500):
        for text, _ in draw_document(rng, held_out, most_tools=5):
            seen.update(tokenizer.encode_continuation(text))
    wanted = {tokenizer.encode_continuation(text)[0] for text in vocabulary_strings() if len(text) > 1}
    assert wanted <= set(seen), [tokenizer.piece(i) for i in wanted - set(seen)]


def test_documents_align_targets_with_inputs(tokenizer):
    for seed in range(30):
        ids, targets, weights = encode_document(random.Random(seed), held_out_pairs(), tokenizer, most_tools=5)
        assert len(ids) == len(targets) == len(weights) and ids[1:] == targets[:-1] and min(weights) > 0


def test_plain_calls_parse_back():
    arguments = {"city": "Oslo", "limit": 12}
    call = parse_plain_call(" " + render_plain_call("get_weather_today", arguments))
    assert (call.name, call.arguments) == ("get_weather_today", arguments)
