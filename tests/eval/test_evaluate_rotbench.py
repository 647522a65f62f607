"""RoTBench's rules on hand-made records, files in and out, hostile predictions, ceilings of the published sets."""

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from data.json_records import DataError
from data.tool_calls import ToolCall
from eval.benchmarks import BENCHMARKS
from eval.evaluate_rotbench import RULES, load_rotbench, main, score_rotbench_call, summarize_rotbench
from eval.predict.prediction_files import Prediction
from eval.predict.react_output import REACT, read_call
from tests.support.rotbench_records import react, rotbench_record

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared/data/benchmarks/rotbench"
WEATHER = react("get_weather", {"city": "Oslo", "unit": "None"})
NEWS = react("get_news", {})
RIGHT, VALUES, TOOL, WRONG = (1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0)


def write(path, records):
    path.write_text(json.dumps(records, indent=1))
    return path


def load(tmp_path, *records):
    path = tmp_path / "clean.json"
    path.write_text(json.dumps(records))
    return load_rotbench(path)


def predict(texts, output_format=REACT):
    return [Prediction(index=i, output=text, format=output_format, stop="", line=i) for i, text in enumerate(texts)]


def score(tmp_path, answers, text, output_format=REACT, **record):
    """{rules: (TS, PI, CF)} of one text for one record."""
    examples = load(tmp_path, rotbench_record(answers, **record))
    summaries = summarize_rotbench(examples, predict([text], output_format), "fair")[1]["variants"]
    return {name: (summary["TS"], summary["PI"], summary["CF"]) for name, summary in summaries.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Records


def test_rotbench_record(tmp_path):
    answers = [react("get_weather", {"city": "Oslo", "unit": "None"}), react("ask_to_user", {"question": "Where?"})]
    (example,) = load_rotbench(write(tmp_path / "clean.json", [rotbench_record(answers)]))
    assert (example.index, example.id) == (0, "Turn 1: Weather in Oslo?")
    assert [tool["function"]["name"] for tool in example.tools] == ["get_weather", "get_news", "ask_to_user", "finish"]
    assert example.tools[0]["function"]["parameters"]["required"] == ["city"]
    assert [(message.role, message.content) for message in example.messages] == [("user", "Weather in Oslo?")]
    first, second = (answer.calls[0] for answer in example.gold)
    assert (first.name, first.arguments, first.wildcards) == ("get_weather", {"city": "Oslo", "unit": "None"}, {"unit"})
    assert (second.name, second.wildcards) == ("ask_to_user", {"question"})  # any question is right
    assert example.meta == {"scenario": "RS", "finish": "finish", "ask_to_user": "ask_to_user", "noise": ""}


def test_special_tools_are_found_by_position_and_duplicate_names_stay(tmp_path):
    record = rotbench_record([react("xq", {"answer": "None"})], names=("same", "same", "finish", "xq"))
    (example,) = load_rotbench(write(tmp_path / "union.json", [record]))
    assert [tool["function"]["name"] for tool in example.tools] == ["same", "same", "finish", "xq"]
    assert (example.meta["finish"], example.meta["ask_to_user"]) == ("xq", "finish")
    assert example.gold[0].calls[0].wildcards == {"answer"}


def test_halves_of_the_noise_files(tmp_path):
    records = [rotbench_record([react("get_news", {})]) for _ in range(4)]
    halves = [example.meta["noise"] for example in load_rotbench(write(tmp_path / "heavy.json", records))]
    assert halves == ["tool", "tool", "parameter", "parameter"]
    assert {example.meta["noise"] for example in load_rotbench(write(tmp_path / "union.json", records))} == {""}


def test_later_turn_keeps_calls_feedback_and_what_is_no_call(tmp_path):
    turns = [
        ("assistant", react("get_weather", {"city": "Oslo"})),
        ("function", "missing 1 required argument"),
        ("assistant", "I do not know."),
        ("function", "?"),
        ("assistant", "Thought:\nAction: get_news\nAction Input: [1]"),
        ("function", "??"),
    ]
    path = write(tmp_path / "clean.json", [rotbench_record([react("finish", {"answer": "Rain."})], turns=turns)])
    (example,) = load_rotbench(path)
    assert [message.role for message in example.messages] == ["user", *["assistant", "tool"] * 3]
    assert example.messages[1].call == ToolCall("get_weather", {"city": "Oslo"}) and example.messages[1].fault is None
    assert example.messages[2].content == "missing 1 required argument"
    assert example.messages[3].call is None and "Action Input" in example.messages[3].fault
    assert example.messages[5].call is None and "list" in example.messages[5].fault


def without(record, *keys):
    return {key: value for key, value in record.items() if key not in keys}


GOOD = rotbench_record([react("get_news", {})])


@pytest.mark.parametrize(
    "record, expected",
    [
        (7, "found int, expected an object"),
        (without(GOOD, "conversations"), "found nothing as 'conversations'"),
        ({**GOOD, "conversations": []}, "found 0 conversations"),
        (without(GOOD, "scenario"), "nothing as 'scenario'"),
        ({**GOOD, "id": 5}, "found int as 'id'"),
        (rotbench_record([]), "found no accepted answer"),
        (rotbench_record([{}]), "found dict as accepted answer"),
        (rotbench_record(["finish"]), "accepted answer: "),
        (rotbench_record([react("other", {})]), "expected a call of one of the record's tools"),
        (rotbench_record([react("get_news", [])]), "expected a call of one of the record's tools"),
        (
            {**GOOD, "conversations": [{"from": "system", "value": "-"}, *GOOD["conversations"][1:]]},
            "found no JSON list",
        ),
        (
            {**GOOD, "conversations": [{"from": "system", "value": "[1]"}, *GOOD["conversations"][1:]]},
            "tools[0]: found",
        ),
        (rotbench_record([react("get_news", {})], turns=[("robot", "x")]), "found role 'robot'"),
    ],
)
def test_malformed_rotbench_records_name_file_and_line(tmp_path, record, expected):
    path = tmp_path / "clean.json"
    path.write_text(f"[{json.dumps(GOOD)},\n{json.dumps(record)}]")
    with pytest.raises(DataError) as caught:
        load_rotbench(path)
    assert str(caught.value).startswith(f"{path}:2: ") and expected in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The scorer's own rules


def weather(**arguments):
    return react("get_weather", arguments)


def with_input(source):
    return f"Thought:\nAction: get_weather\nAction Input: {source}"


@pytest.mark.parametrize(
    "text, official, fair",
    [
        (WEATHER, RIGHT, RIGHT),
        (weather(unit="C", city="Oslo"), RIGHT, RIGHT),  # gold "None": named, value free; order free
        (weather(city="oslo", unit="C"), VALUES, VALUES),  # letter case counts
        (weather(city="Oslo "), TOOL, TOOL),
        (weather(city="Oslo", unit="C", days="3"), TOOL, TOOL),
        (react("get_news", {"city": "Oslo", "unit": "C"}), WRONG, WRONG),
        (react("Get_weather", {"city": "Oslo", "unit": "C"}), WRONG, WRONG),
        (react("no_such_tool", {"city": "Oslo", "unit": "C"}), WRONG, WRONG),
        (WEATHER.replace("get_weather", "get_weather "), WRONG, WRONG),  # the blank is part of the name
        (WEATHER.replace("Action: get", "Action:  get"), WRONG, WRONG),
        (WEATHER.replace("Action: ", "Action:\n"), RIGHT, RIGHT),  # the character behind "Action:" is not looked at
        (WEATHER.replace("get_weather\n", "get_weather"), RIGHT, RIGHT),
        (WEATHER.replace("get_weather\n", "get_weather\n\n"), WRONG, WRONG),
        (WEATHER + " ", RIGHT, RIGHT),
        (WEATHER + "\nThought: done", WRONG, WRONG),
        (WEATHER.replace('"', "'"), WRONG, WRONG),
        (WEATHER.replace("Thought:", "Thought: rain?\n  I look. "), RIGHT, RIGHT),
        (WEATHER.replace("Thought:", "Thought: Action: look"), WRONG, WRONG),  # the first "Action:" counts
        (with_input('{\n  "city": "Oslo",\n  "unit": "C"\n}'), RIGHT, RIGHT),
        (
            with_input('{"city": "Bergen", "unit": "C", "city": "Oslo"}'),
            RIGHT,
            RIGHT,
        ),  # JSON keeps the last of equal keys
        (with_input("{}"), WRONG, TOOL),  # the rule that `fair` drops
        (with_input("[]"), WRONG, WRONG),
        (with_input("null"), WRONG, WRONG),
        (with_input("0"), WRONG, WRONG),
        (with_input('"Oslo"'), WRONG, WRONG),
        (with_input(""), WRONG, WRONG),
        (with_input("{city: 1}"), WRONG, WRONG),
        (with_input("[1]"), TOOL, TOOL),
        (with_input("7"), TOOL, TOOL),
        (with_input("true"), TOOL, TOOL),  # stops at PI
        (with_input("[" * 100_000), WRONG, WRONG),
        (with_input("9" * 5000), WRONG, WRONG),
        ('Tool:  get_weather\nAction Input: {"city": "Oslo", "unit": "C"}', RIGHT, RIGHT),  # 7 characters, no "Action:"
        ("", WRONG, WRONG),
        ("Action:", WRONG, WRONG),
        ("Action Input:", WRONG, WRONG),
        ("Oslo", WRONG, WRONG),
    ],
)
def test_one_accepted_answer(tmp_path, text, official, fair):
    assert score(tmp_path, [WEATHER], text) == {"official": official, "fair": fair}


def test_empty_gold_cannot_be_met_by_the_official_rule(tmp_path):
    assert score(tmp_path, [NEWS], NEWS) == {"official": WRONG, "fair": RIGHT}
    assert score(tmp_path, [NEWS], react("get_news", {"a": 1})) == {"official": TOOL, "fair": TOOL}
    assert score(tmp_path, [NEWS, WEATHER], WEATHER)["official"] == RIGHT


@pytest.mark.parametrize(
    "value, expected",
    [(1, RIGHT), (1.0, RIGHT), (True, RIGHT), ("1", VALUES), ([1], VALUES), (None, VALUES), (2, VALUES)],
)
def test_values_are_equal_as_python_has_it(tmp_path, value, expected):
    assert score(tmp_path, [weather(city=1)], weather(city=value))["official"] == expected


def test_special_tools_by_position_not_by_name(tmp_path):
    names = ("finish", "get_news", "tool3", "tool4")  # noise permutes names: the tool that ends the dialogue is `tool4`

    def scored(answers, text, rules="official"):
        return score(tmp_path, answers, text, names=names)[rules]

    assert scored([react("tool4", {"answer": "Rain."})], react("tool4", {"answer": "Sun?"})) == RIGHT  # value free
    assert scored([react("tool4", {"answer": "Rain."})], react("finish", {"answer": "Sun?"})) == RIGHT  # also known so
    assert scored([react("tool4", {"answer": "Rain."})], react("finish", {"text": "Sun?"})) == TOOL
    assert scored([react("tool3", {"question": "Where?"})], react("tool3", {"question": "?"})) == RIGHT
    assert scored([react("tool3", {"question": "Where?"})], react("ask_to_user", {"question": "?"})) == WRONG
    # A quirk: a tool that noise has *named* finish has free values too, though it ends nothing.
    assert scored([react("finish", {"city": "Oslo"})], react("finish", {"city": "Bergen"})) == RIGHT
    # After `finish` has stood for tool4 it is tool4 for the later answers too, so the second one is missed at PI.
    both = [react("tool4", {"answer": "Rain."}), react("finish", {"city": "Oslo"})]
    assert scored(both, react("finish", {"city": "Oslo"})) == TOOL
    assert scored(both[::-1], react("finish", {"city": "Oslo"})) == RIGHT
    assert scored(both, react("finish", {"city": "Oslo"}), "fair") == RIGHT


def test_a_free_value_is_gone_for_the_answers_that_follow(tmp_path):
    """The official scorer deletes the "None" arguments of the first answer from the prediction itself."""
    bergen, free = weather(city="Bergen", unit="C"), weather(city="Bergen", unit="None")
    assert score(tmp_path, [WEATHER, free], bergen) == {"official": VALUES, "fair": RIGHT}
    assert score(tmp_path, [free, WEATHER], bergen) == {"official": RIGHT, "fair": RIGHT}
    assert score(tmp_path, [WEATHER, weather(city="Bergen")], bergen) == {"official": RIGHT, "fair": VALUES}


def test_reasons_name_category_and_difference(tmp_path):
    (example,) = load(tmp_path, rotbench_record([WEATHER]))

    def reason(name, arguments, rules="official"):
        return score_rotbench_call(name, arguments, example, rules).reason

    assert reason("get_news", {"a": 1}) == "wrong tool: 'get_news', expected 'get_weather'"
    assert reason("get_weather", {"city": "Oslo"}) == "wrong parameters: missing 'unit'"
    assert reason("get_weather", {"city": "Rom", "unit": 1}) == "wrong value: 'city' is 'Rom', expected 'Oslo'"
    assert reason("get_weather", {}).startswith("empty arguments:")
    assert reason("get_weather", {}, "fair") == "wrong parameters: missing 'city', 'unit'"
    assert reason("get_weather", [1]).startswith("unparsable: found list")
    assert reason("get_weather", {"city": "Oslo", "unit": 5}) == ""
    (example,) = load(tmp_path, rotbench_record([WEATHER, weather(city="Bergen", unit="None")]))
    assert reason("get_weather", {"city": "Bergen", "unit": "C"}).startswith("scorer's order:")
    with pytest.raises(ValueError, match="found rules 'other'"):
        reason("get_weather", {}, "other")


def test_other_formats_are_read_into_calls_first(tmp_path):
    assert score(tmp_path, [WEATHER], 'get_weather(city="Oslo", unit=3)', "tl")["official"] == RIGHT
    assert score(tmp_path, [NEWS], "get_news()", "tl") == {"official": WRONG, "fair": RIGHT}
    assert score(tmp_path, [WEATHER], 'finish(answer="x"', "tl")["fair"] == WRONG
    two = 'Call: get_weather(city="Oslo", unit="C"); get_news()'
    assert score(tmp_path, [WEATHER], two, "nexusraven")["official"] == RIGHT  # of several calls the first


# ---------------------------------------------------------------------------------------------------------------------
# Files and flags

TEXTS = [
    (WEATHER, RIGHT),
    (weather(city="Rom", unit="C"), VALUES),
    (weather(city="Oslo"), TOOL),
    ("Oslo!", WRONG),
    (with_input("{}"), WRONG),
]


@pytest.fixture
def files(tmp_path):
    """(answers, predictions in the official form): five records with the texts of TEXTS."""
    (tmp_path / "First_Turn").mkdir()
    answers, predictions = tmp_path / "First_Turn/clean.json", tmp_path / "predictions.json"
    scenarios = ("TG", "TG", "FT", "FT", "FT")
    answers.write_text(json.dumps([rotbench_record([WEATHER], scenario=scenario) for scenario in scenarios]))
    predictions.write_text(json.dumps([rotbench_record(text) for text, _ in TEXTS], indent=1))
    return answers, predictions


def evaluate(capsys, answers, predictions, *flags):
    code = main(["--answers", str(answers), "--predictions", str(predictions), *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_official_file_rows_and_summary(files, tmp_path, capsys):
    code, out, err = evaluate(capsys, *files, "--output", str(tmp_path / "out"))
    assert (code, err) == (0, f"{files[0]}: found 5 records, the published set has 105\n")
    summary = json.loads(out.splitlines()[-1])
    assert [summary[key] for key in ("n", "TS", "PI", "CF", "TS_percent", "rules", "primary")] == [
        5,
        3,
        2,
        1,
        60.0,
        "official",
        "official",
    ]
    assert [summary["variants"][rules]["TS"] for rules in RULES] == [3, 4]  # {} has the right tool under `fair`
    assert {name: (rates["n"], rates["TS"], rates["CF"]) for name, rates in summary["by_scenario"].items()} == {
        "TG": (2, 2, 1),
        "FT": (3, 1, 0),
    }
    assert summary["by_scenario"]["TG"]["CF_interval_95"] == [9.45, 90.55] and summary["by_noise"] == {}
    assert summary["errors"] == {"empty arguments": 1, "unparsable": 1, "wrong parameters": 1, "wrong value": 1}
    rows = [json.loads(line) for line in (tmp_path / "out/results/rotbench-clean.jsonl").read_text().splitlines()]
    assert [(row["index"], row["TS"], row["PI"], row["CF"]) for row in rows] == [
        (index, *expected) for index, (_, expected) in enumerate(TEXTS)
    ]
    assert json.loads(evaluate(capsys, *files, "--rules", "fair")[1])["TS"] == 4


def test_jsonl_predictions_in_any_order_with_a_torn_last_line(files, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    lines = [json.dumps({"index": index, "output": 'get_weather(city="Oslo", unit="C")'}) for index in range(5)]
    path.write_text("\n".join(lines[::-1]) + '\n{"index": 3, "out')
    code, out, err = evaluate(capsys, files[0], path)
    assert code == 0 and json.loads(out)["CF"] == 5 and f"{path}: dropped a partial last line\n" in err
    path.write_text("\n".join(lines[:4:2]))  # 2 of 5, evenly spread: 0 and 2
    assert json.loads(evaluate(capsys, files[0], path, "--limit", "2")[1])["n"] == 2


@pytest.mark.parametrize(
    "content, expected",
    [
        ([rotbench_record("x")] * 4, "found 4 predictions, expected 5"),
        ([rotbench_record("x")] * 6, "found 6 predict"),
        ([rotbench_record(["x"])] * 5, ":1: found list, expected the model's text"),
        ([7] * 5, ":1: found no conversation"),
        ([{"conversations": []}] * 5, ":1: found no conversations"),
        ("[1", ":1: found '', expected ','"),
        ("[", ":1: "),
        ('{"index": 0, "output": ""}', "found 1 of 5 predictions"),
        ('{"index": 5, "output": ""}', ":1: found index 5"),
        ('{"index": 0, "output": ""}\n{"index": 0, "output": ""}', ":2: found index 0 again"),
        ('{"index": 0, "out\n{"index": 0, "output": ""}', ":1: found '\"out' at column 14, expected JSON"),
        ("7", ":1: found a number"),
        ('{"index": 0, "output": []}', ":1: found list"),
        ("", "found 0 of 5"),
        ('{"index": 0, "output": "", "format": "xml"}', ":1: found format 'xml'"),
    ],
)
def test_bad_predictions_are_one_line_and_code_2(files, tmp_path, capsys, content, expected):
    path = tmp_path / "bad"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    code, out, err = evaluate(capsys, files[0], path)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"{path}") and expected in err


def test_missing_files_and_wrong_flags_are_one_line_and_code_2(files, tmp_path, capsys):
    for answers, predictions in ((tmp_path / "none", files[1]), (files[0], tmp_path / "none"), (files[0], tmp_path)):
        code, _, err = evaluate(capsys, answers, predictions)
        assert code == 2 and err.count("\n") == 1
    for flags in (["--limit", "0"], ["--rules", "mine"], ["--nonsense"]):
        with pytest.raises(SystemExit) as caught:
            evaluate(capsys, *files, *flags)
        assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Hostile predictions

HOSTILE = [
    "",
    " ",
    "\n",
    "Action:",
    "Action: \nAction Input: {}",
    "[" * 100_000,
    "{" * 100_000,
    "x" * 1_000_000,
    WEATHER + "}" * 1_000_000,
    "\x00\x1b[31m\x7f",
    "\ud800",
    'Action: \ud800\nAction Input: {"\ud800": 1}',
    with_input("[" * 990 + "]" * 990),
    with_input('{"city": ' + "[" * 900 + "]" * 900 + ', "unit": 1}'),
    with_input('{"city": NaN, "unit": -Infinity}'),
    with_input('{"city": 1e999, "unit": 1}'),
    with_input("NaN"),
    "__import__('os').abort()",
    'get_weather(city=__import__("os").abort())',
    "0",
    "[]",
    "{}",
    "null",
    "-1",
]


@pytest.mark.parametrize("output_format", [REACT, "tl"])
def test_hostile_predictions_are_wrong_not_a_crash(tmp_path, output_format):
    examples = load(tmp_path, *[rotbench_record([WEATHER, NEWS]) for _ in HOSTILE])
    for rules in RULES:
        rows, summary = summarize_rotbench(examples, predict(HOSTILE, output_format), rules)
        assert summary["CF"] == 0
        assert all(row["reason"] and row["reason"].isascii() and len(json.dumps(row)) < 1000 for row in rows)


ARGUMENTS = ("{}", "[]", "[1]", "0", "7", "true", "null", '"x"', "NaN", '{"a": {}}')


def mutated(text, draw):
    """A ReAct text with one to three random changes; some leave it right."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        place, other = draw.randrange(len(text) + 1), draw.randrange(len(text) + 1)
        change = draw.randrange(8)
        if change == 0:
            text = text[:place] + chr(draw.choice((draw.randrange(128), draw.randrange(0x110000)))) + text[place:]
        elif change == 1:
            text = text[: min(place, other)] + text[max(place, other) :]
        elif change == 2:
            text = text[:place] + text[min(place, other) : max(place, other)] * draw.choice((1, 50)) + text[place:]
        elif change == 3:
            head, _, _ = text.partition("Action Input:")
            text = head + "Action Input: " + draw.choice(ARGUMENTS)
        elif change == 4:
            words = text.split(" ")
            mark = draw.choice(("Thought:", "Action:", "Action Input:", '"', "{", "\n"))
            text = mark.join(draw.sample(words, len(words)))
        elif change == 5:
            text = text.replace(draw.choice(("Action:", "Action Input:", "\n", '"', "get_weather", " ")), "", 1)
        elif change == 6:
            text = text[::-1]
        text = text[:5000]
    return text


def check_mutations(tmp_path, count):
    """No crash; CF <= PI <= TS; with one accepted answer the rules differ only on {}. Returns the pairs seen."""
    draw = random.Random(11)
    answers = [[WEATHER], [NEWS], [weather(city="Bergen"), NEWS], [react("ask_to_user", {"question": "?"})]]
    examples = load(tmp_path, *(rotbench_record(answer) for answer in answers))
    seen = set()
    for number in range(count):
        example = examples[number % len(examples)]
        text = mutated(draw.choice(answers[number % len(examples)]), draw)
        call = read_call(predict([text])[0])
        results = []
        for rules in RULES if not call.fault else ():
            result = score_rotbench_call(call.name, call.arguments, example, rules)
            assert result.CF <= result.PI <= result.TS and bool(result.reason) != result.CF, text
            results.append((result.TS, result.PI, result.CF))
        if call.fault:
            assert call.fault.startswith("unparsable:") and call.fault.isascii() and len(call.fault) < 1000
        elif call.arguments == {}:
            assert results[0] == (False, False, False)
        else:
            assert results[0] == results[1], text
        seen.add(tuple(results))
    return seen


def test_some_random_mutations(tmp_path):
    seen = check_mutations(tmp_path, 3000)
    assert {(), ((True, True, True),) * 2, ((True, False, False),) * 2, ((False,) * 3, (True,) * 3)} <= seen


@pytest.mark.very_slow
def test_100_000_random_mutations(tmp_path):
    assert len(check_mutations(tmp_path, 100_000)) >= 5


def test_10_000_predictions_in_less_than_3_seconds_of_processor_time(tmp_path):
    examples = load(tmp_path, *(rotbench_record([WEATHER]) for _ in range(100))) * 100
    predictions = predict([text for text, _ in TEXTS] * 1000) + predict(['get_weather(city="x", unit=1)'] * 5000, "tl")
    start = time.process_time()
    summarize_rotbench(examples, predictions, "official")
    assert time.process_time() - start < 3


# ---------------------------------------------------------------------------------------------------------------------
# Published records


@pytest.mark.skipif(not REAL.is_dir(), reason="the benchmark files are not beside this checkout")
@pytest.mark.parametrize(
    "file, official, n",
    [
        ("First_Turn/clean", 97, 105),
        ("First_Turn/slight", 194, 210),
        ("First_Turn/medium", 194, 210),
        ("First_Turn/heavy", 200, 210),
        ("First_Turn/union", 97, 105),
        ("Third_Turn/clean", 67, 70),
        ("Third_Turn/slight", 134, 140),
        ("Third_Turn/medium", 134, 140),
        ("Third_Turn/heavy", 137, 140),
        ("Third_Turn/union", 69, 70),
    ],
)
def test_ceilings_reached_by_the_gold_answers(file, official, n):
    path = REAL / f"{file}.json"
    examples = load_rotbench(path)
    texts = [record["conversations"][-1]["value"][0] for record in json.loads(path.read_text())]
    rows, summary = summarize_rotbench(examples, predict(texts), "official")
    assert {rules: [rates[key] for key in ("n", "TS", "PI", "CF")] for rules, rates in summary["variants"].items()} == {
        "official": [n, *[official] * 3],
        "fair": [n] * 4,
    }
    if file == "First_Turn/clean":
        assert summary["CF_percent"] == 92.38
        assert [row["index"] for row in rows if not row["TS"]] == [61, 63, 72, 75, 85, 98, 99, 102]


@pytest.mark.skipif(not REAL.is_dir(), reason="the benchmark files are not beside this checkout")
def test_every_accepted_answer_is_right_under_fair():
    """Each alternative, not only the first. `official` deletes arguments on the way to three answers of record 1."""
    path = REAL / "First_Turn/clean.json"
    wrong = {rules: [] for rules in RULES}
    for example, record in zip(load_rotbench(path), json.loads(path.read_text()), strict=True):
        for text in record["conversations"][-1]["value"]:
            call = read_call(predict([text])[0])
            for rules in RULES:
                if not score_rotbench_call(call.name, call.arguments, example, rules).CF:
                    wrong[rules].append(example.index)
    assert wrong["fair"] == []
    assert wrong["official"] == [1, 1, 1, 2, 61, 63, 72, 75, 85, 98, 99, 102]  # in 2 the fifth answer is {}


@pytest.mark.skipif(not REAL.is_dir(), reason="the benchmark files are not beside this checkout")
def test_published_rotbench_files():
    for split in ("clean", "slight", "medium", "heavy", "union"):
        examples = load_rotbench(REAL / f"First_Turn/{split}.json")
        assert len(examples) == BENCHMARKS[f"rotbench-{split}"].published
        assert len(set(Counter(example.meta["scenario"] for example in examples).values())) == 1
        assert len(load_rotbench(REAL / f"Third_Turn/{split}.json")) == len(examples) * 2 // 3
    clean = load_rotbench(REAL / "First_Turn/clean.json")
    assert Counter(min(len(example.gold), 5) for example in clean) == {1: 79, 2: 10, 3: 11, 5: 5}
    calls = [answer.calls[0] for example in clean for answer in example.gold]
    assert sum(not call.arguments for call in calls) == 9
    assert sum("None" in call.arguments.values() for call in calls) == 13
    assert sum(len(example.tools) for example in clean) == 892
    names = [[tool["function"]["name"] for tool in example.tools] for example in clean]
    assert sum(len(set(each)) < len(each) for each in names) == 3
    assert all(each[-2:] == ["ask_to_user", "finish"] for each in names)
