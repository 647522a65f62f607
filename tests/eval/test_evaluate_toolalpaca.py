"""ToolAlpaca as single calls: each variant on hand-made records, hostile text, shares of the published set."""

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from data.json_records import DataError
from data.tool_calls import ToolCall, render_tool_call
from eval.benchmarks import BENCHMARKS
from eval.evaluate_toolalpaca import (
    PRIMARY,
    VARIANTS,
    load_toolalpaca,
    main,
    score_toolalpaca_call,
    summarize_toolalpaca,
)
from eval.metrics import equal_json, equal_lenient, equal_python
from eval.predict.prediction_files import Prediction
from eval.predict.react_output import read_call
from tests.support.rotbench_records import react, toolalpaca_record

REAL = Path(__file__).resolve().parents[3] / "shared/data/benchmarks/toolalpaca/eval_real.masked.json"
RIGHT, VALUES, TOOL, WRONG = (1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0)
ALL_VARIANTS = ("first_call", "rotbench_rules", "any_call", "authentication_ignored", "lenient_values")


def write(path, records):
    path.write_text(json.dumps(records, indent=1))
    return path


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "eval_real.masked.json"
    path.write_text(json.dumps([toolalpaca_record()]))
    return path


def predict(texts, output_format="tl"):
    return [Prediction(index=i, output=text, format=output_format, stop="", line=i) for i, text in enumerate(texts)]


# ---------------------------------------------------------------------------------------------------------------------
# Records


def test_toolalpaca_record(tmp_path):
    path = write(tmp_path / "eval_real.json", [toolalpaca_record(), toolalpaca_record(name="Second")])
    examples = load_toolalpaca(path)
    assert [(example.index, example.id) for example in examples] == [
        (0, "Rates/0"),
        (1, "Rates/1"),
        (2, "Rates/2"),
        (3, "Second/0"),
        (4, "Second/1"),
        (5, "Second/2"),
    ]
    tools = {tool["function"]["name"]: tool["function"] for tool in examples[0].tools}
    assert list(tools) == ["latest_get", "list_get", "ask_to_user", "finish"]  # `components` is prose, no tool
    assert tools["latest_get"]["description"] == "Get rates." and tools["list_get"]["description"] == ""
    assert tools["latest_get"]["parameters"] == {
        "type": "object",
        "required": ["key", "base"],
        "properties": {
            "key": {"type": "string", "description": "Your key."},
            "base": {"type": "string", "description": ""},
            "days": {"type": "integer", "description": "How many. At most 5."},
        },
    }
    assert examples[0].messages[0].content == "Rates of the euro?"
    (gold,) = examples[0].gold[0].calls
    assert (gold.name, gold.arguments) == ("latest_get", {"key": "MASKED_API_KEY", "base": "EUR", "days": 2})
    assert [call.name for call in examples[0].meta["gold_calls"]] == ["latest_get", "list_get"]
    assert examples[0].meta["authentication"] == ["key"] and examples[0].meta["is_documented"]
    assert examples[1].gold[0].calls[0].arguments == {"base": "USD", "symbols": ["EUR"]}  # the doubled key is repaired
    assert examples[2].gold[0].calls[0].name == "secret_get" and not examples[2].meta["is_documented"]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"Golden_Answers": []}, "found 0 Golden_Answers for 3 Instructions"),
        ({"Name": 3}, "found int as 'Name'"),
        ({"Instructions": [1, 2, 3]}, "instruction 0: found int"),
        ({"Authentication": None}, "found NoneType"),
        ({"Golden_Answers": [[], [], []]}, "instruction 0: found no gold call"),
        ({"Golden_Answers": [[{"Action": "x", "Action_Input": "{"}]] * 3}, "found Action_Input '{', expected a JSON"),
        ({"Function_Description": {"f": "no such part"}}, "'f': found no 'Parameters: '"),
        ({"Function_Description": {"f": 'Parameters: {"a": "whatever"}'}}, "found 'whatever' for 'a'"),
        ({"Function_Description": {"f": "Parameters: [1]"}}, "found no 'Parameters: ' with a JSON object"),
    ],
)
def test_malformed_toolalpaca_records_name_file_and_line(tmp_path, change, expected):
    path = tmp_path / "eval.json"
    path.write_text(f"[{json.dumps(toolalpaca_record())},\n{json.dumps({**toolalpaca_record(), **change})}]")
    with pytest.raises(DataError) as caught:
        load_toolalpaca(path)
    assert str(caught.value).startswith(f"{path}:2: ") and expected in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


# The first gold call: latest_get(key=MASKED_API_KEY, base="EUR", days=2); the second: list_get(). Expected results in
# the order of ALL_VARIANTS.
@pytest.mark.parametrize(
    "call, expected",
    [
        ('latest_get(key="MASKED_API_KEY", base="EUR", days=2)', [RIGHT] * 5),
        ('latest_get(key="mine", base="EUR", days=2)', [VALUES, VALUES, VALUES, RIGHT, VALUES]),
        ('latest_get(base="EUR", days=2)', [TOOL] * 5),  # the key must be named in every variant
        ('latest_get(key="MASKED_API_KEY", base="EUR", days="2")', [VALUES, VALUES, VALUES, VALUES, RIGHT]),
        ('latest_get(key="MASKED_API_KEY", base=" eur", days=2)', [VALUES, VALUES, VALUES, VALUES, RIGHT]),
        ('latest_get(key="MASKED_API_KEY", base="EUR", days=2.0)', [RIGHT] * 5),  # one number in JSON
        ('latest_get(key="MASKED_API_KEY", base="EUR", days=3)', [VALUES] * 5),
        ("latest_get()", [TOOL, WRONG, TOOL, TOOL, TOOL]),
        ("list_get()", [WRONG, WRONG, RIGHT, WRONG, WRONG]),  # right as the second call of the task
        ("list_get(a=1)", [WRONG, WRONG, TOOL, WRONG, WRONG]),
        ("other_get()", [WRONG] * 5),
        ("latest_get(", [WRONG] * 5),
        ("", [WRONG] * 5),
        ("latest_get() list_get()", [WRONG] * 5),
    ],
)
def test_variants_of_one_instruction(answers, call, expected):
    assert tuple(VARIANTS) == ALL_VARIANTS
    example = load_toolalpaca(answers)[:1]
    summary = summarize_toolalpaca(example, predict([call]), "fair")[1]
    variants = summary["variants"]
    assert [tuple(variants[name][metric] for metric in ("TS", "PI", "CF")) for name in ALL_VARIANTS] == expected
    assert summary["primary"] == "first_call" and summary["TS"] == expected[0][0]
    rows, official = summarize_toolalpaca(example, predict([call]), "official")
    assert (official["primary"], official["TS"], official["CF"]) == ("rotbench_rules", expected[1][0], expected[1][2])
    assert (rows[0]["TS"], rows[0]["PI"], rows[0]["CF"]) == expected[1] and bool(rows[0]["reason"]) != expected[1][2]


def rotbench_scorer(name, text, gold_name, gold_arguments):
    """(TS, PI, CF) by the steps of RoTBench's published scorer on one text: an exception keeps what was counted."""
    counted = [0, 0, 0]
    try:
        arguments = json.loads(text)
        arguments = 0 if isinstance(arguments, str) else arguments
    except ValueError:
        arguments = 0
    if arguments and name == gold_name:
        counted[0] = 1
        if getattr(arguments, "keys", None) is not None and set(arguments.keys()) == set(gold_arguments):
            counted[1] = 1
            counted[2] = int(arguments == gold_arguments)
    return tuple(counted)


def test_arguments_that_are_no_object_count_for_the_tool_as_rotbench_does(answers):
    (example,) = load_toolalpaca(answers)[:1]
    gold = example.gold[0].calls[0]
    texts = [json.dumps(gold.arguments), '["EUR"]', "[[]]", "7", "0.5", "true", "[]", "0", "false", "null", "{}"]
    texts += ['"EUR"', '"{}"', "", "EUR", '{"base": "EUR"}', json.dumps({**gold.arguments, "days": 3})]
    by_hand = [RIGHT, *[TOOL] * 5, *[WRONG] * 9, TOOL, VALUES]
    for name in (gold.name, "list_get"):
        for text, expected in zip(texts, by_hand, strict=True):
            output = f"Thought: x\nAction: {name}\nAction Input: {text}"
            (row,), _ = summarize_toolalpaca([example], predict([output], "react"), "official")
            found = (row["TS"], row["PI"], row["CF"])
            assert found == rotbench_scorer(name, text, gold.name, gold.arguments), text
            assert found == (expected if name == gold.name else WRONG) and bool(row["reason"]) == (found != RIGHT), text
            (row,), _ = summarize_toolalpaca([example], predict([output], "react"), "fair")
            assert text.startswith("{") or (row["TS"], row["PI"], row["CF"]) == WRONG, text


def test_python_equality_only_under_rotbench_rules(answers):
    example = load_toolalpaca(answers)[0]
    example.gold[0].calls[0].arguments["days"] = 1
    arguments = {"key": "MASKED_API_KEY", "base": "EUR", "days": True}
    assert score_toolalpaca_call("latest_get", arguments, example, "rotbench_rules").CF
    assert not score_toolalpaca_call("latest_get", arguments, example, "first_call").CF
    with pytest.raises(ValueError, match="found variant 'mine'"):
        score_toolalpaca_call("latest_get", arguments, example, "mine")


@pytest.mark.parametrize(
    "left, right, python, as_json, lenient",
    [
        (1, 1, 1, 1, 1),
        (1, 1.0, 1, 1, 1),
        (1, True, 1, 0, 0),
        (0, False, 1, 0, 0),
        (True, True, 1, 1, 1),
        ("a", "a", 1, 1, 1),
        (str(2**140), 2**140, 0, 0, 0),
        ([1], 1, 0, 0, 0),
        (1, [1], 0, 0, 0),
        ("1", 1, 0, 0, 1),
        ("1.0", 1, 0, 0, 1),
        ("+1", "1", 0, 0, 1),
        ("true", True, 0, 0, 1),
        ("True", "true", 0, 0, 1),
        ("A ", "a", 0, 0, 1),
        ("1e3", 1000, 0, 0, 0),
        ("1,000", 1000, 0, 0, 0),
        ("nan", float("nan"), 0, 0, 0),
        (None, None, 1, 1, 1),
        (None, "null", 0, 0, 0),
        (None, 0, 0, 0, 0),
        ("", None, 0, 0, 0),
        ([1, "2"], [1.0, "2"], 1, 1, 1),
        ([1, 2], [2, 1], 0, 0, 0),
        ([1], [1, 2], 0, 0, 0),
        ([True], [1], 1, 0, 0),
        ({"a": 1, "b": 2}, {"b": 2.0, "a": 1}, 1, 1, 1),
        ({"a": "1"}, {"a": 1}, 0, 0, 1),
        ({"a": 1}, {"b": 1}, 0, 0, 0),
        ({}, [], 0, 0, 0),
        ({"a": []}, {"a": {}}, 0, 0, 0),
    ],
)
def test_equality_of_values(left, right, python, as_json, lenient):
    assert equal_python(left, right) == python
    for pair in ((left, right), (right, left)):
        assert (equal_json(*pair), equal_lenient(*pair)) == (as_json, lenient)


# ---------------------------------------------------------------------------------------------------------------------
# Files and flags


def evaluate(capsys, answers, predictions, *flags):
    code = main(["--answers", str(answers), "--predictions", str(predictions), *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_files_in_rows_and_summary_out(answers, tmp_path, capsys):
    predictions = tmp_path / "p.jsonl"
    outputs = ['latest_get(base="USD")', 'latest_get(base="USD", symbols=["EUR"])', "secret_get()"]
    lines = [json.dumps({"index": index, "output": text}) for index, text in enumerate(outputs)]
    predictions.write_text("\n".join(lines) + "\n")
    code, out, err = evaluate(capsys, answers, predictions, "--output", str(tmp_path / "out"))
    summary = json.loads(out.splitlines()[-1])
    assert err == f"{answers}: found 3 records, the published set has 114\n" and code == 0
    assert [summary[key] for key in ("n", "TS", "PI", "CF")] == [3, 3, 2, 2]
    assert summary["rules"] == "fair" and summary["by_api"]["Rates"]["n"] == 3
    assert set(PRIMARY.values()) <= set(VARIANTS)
    rows = [json.loads(line) for line in (tmp_path / "out/results/toolalpaca.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["index", "id", "api", "TS", "PI", "CF", "reason"]] * 3
    assert rows[0]["reason"] == "wrong parameters: missing 'key', 'days'"
    code, out, _ = evaluate(capsys, answers, predictions, "--rules", "official")
    assert [json.loads(out)[key] for key in ("TS", "PI", "CF")] == [2, 1, 1]
    predictions.write_text(json.dumps([{"conversations": [{"value": react("secret_get", {})}]}] * 3))
    assert json.loads(evaluate(capsys, answers, predictions)[1])["CF"] == 1  # the ReAct file form is read too


def test_bad_input_is_one_line_and_code_2(answers, tmp_path, capsys):
    predictions = tmp_path / "p.jsonl"
    for text, expected in (
        ("", "found 0 of 3"),
        ('{"index": 3, "output": ""}', "found index 3"),
        ("[]", "found 0 predictions"),
    ):
        predictions.write_text(text)
        code, out, err = evaluate(capsys, answers, predictions)
        assert (code, out, err.count("\n")) == (2, "", 1) and expected in err
    answers.write_text("{}")
    code, _, err = evaluate(capsys, answers, predictions)
    assert code == 2 and err == f"{answers}:1: found '{{}}', expected a JSON list\n"


# ---------------------------------------------------------------------------------------------------------------------
# Hostile predictions


def check_mutations(answers, count):
    """No crash; CF <= PI <= TS; what first_call accepts, the wider variants accept; rotbench_rules accepts no more."""
    draw = random.Random(5)
    examples = load_toolalpaca(answers)
    golds = [
        render_tool_call(ToolCall(example.gold[0].calls[0].name, example.gold[0].calls[0].arguments))
        for example in examples
    ]
    reached = set()
    for number in range(count):
        text = golds[number % len(golds)]
        for _ in range(draw.choice((1, 1, 2))):
            place, other = sorted((draw.randrange(len(text) + 1), draw.randrange(len(text) + 1)))
            insert = draw.choice(("", chr(draw.randrange(0x110000)), '"', "[", "(", "1", ", ", text[place:other] * 3))
            text = text[:place] + insert + text[draw.choice((place, min(place + 1, other), other)) :]
        call = read_call(predict([text])[0])
        if call.fault:
            continue
        results = {}
        for variant in VARIANTS:
            score = score_toolalpaca_call(call.name, call.arguments, examples[number % len(golds)], variant)
            results[variant] = (score.TS, score.PI, score.CF)
            assert score.CF <= score.PI <= score.TS and bool(score.reason) != score.CF, text
        for wider in ("any_call", "authentication_ignored", "lenient_values"):
            assert all(first <= second for first, second in zip(results["first_call"], results[wider])), text
        if "true" not in text.lower() and "false" not in text.lower():
            assert results["rotbench_rules"] in (WRONG, results["first_call"]), text
        reached.add(results["first_call"])
    return reached


def test_some_random_mutations(answers):
    assert check_mutations(answers, 2000) == {RIGHT, VALUES, TOOL, WRONG}


@pytest.mark.very_slow
def test_100_000_random_mutations(answers):
    assert check_mutations(answers, 100_000) == {RIGHT, VALUES, TOOL, WRONG}


def test_hostile_texts_are_wrong_not_a_crash(answers):
    hostile = [
        "[" * 100_000,
        "latest_get(base=" + "[" * 50_000,
        "x" * 1_000_000,
        "\x00\x1b[31m",
        "\ud800()",
        "{}",
        "[]",
        "null",
        "7",
        'latest_get(base="' + "x" * 1_000_000 + '")',
        "latest_get(days=" + "9" * 5000 + ")",
        "latest_get(days=1e999)",
        'latest_get(base=__import__("os").abort())',
        'latest_get(base={"a": ' * 150,
    ]
    examples = load_toolalpaca(answers)[:1] * len(hostile)
    rows, _ = summarize_toolalpaca(examples, predict(hostile), "fair")
    assert not any(row["CF"] for row in rows)
    assert all(row["reason"] and len(json.dumps(row)) < 1000 for row in rows)


def test_10_000_predictions_in_less_than_3_seconds_of_processor_time(answers):
    examples = (load_toolalpaca(answers) * 3334)[:10_000]
    predictions = predict(['latest_get(key="mine", base="EUR", days=2)'] * 10_000)
    start = time.process_time()
    summarize_toolalpaca(examples, predictions, "fair")
    assert time.process_time() - start < 3


# ---------------------------------------------------------------------------------------------------------------------
# Published records


@pytest.mark.skipif(not REAL.is_file(), reason="the benchmark files are not beside this checkout")
def test_ceilings_of_the_published_set():
    """Gold calls as predictions; a model that calls only documented tools; one that does not know the API keys."""
    examples = load_toolalpaca(REAL)
    golds = [example.gold[0].calls[0] for example in examples]

    def counts(calls):
        texts = [render_tool_call(ToolCall(name, arguments)) for name, arguments in calls]
        variants = summarize_toolalpaca(examples, predict(texts), "fair")[1]["variants"]
        return {name: tuple(rates[metric] for metric in ("TS", "PI", "CF")) for name, rates in variants.items()}

    gold = counts((call.name, call.arguments) for call in golds)
    assert gold == {**dict.fromkeys(VARIANTS, (114,) * 3), "rotbench_rules": (97,) * 3}
    documented = counts(
        (call.name, call.arguments) if example.meta["is_documented"] else ("finish", {"answer": ""})
        for call, example in zip(golds, examples)
    )
    assert documented["first_call"] == (108,) * 3
    without_keys = counts(
        (call.name, {key: "KEY" if value == "MASKED_API_KEY" else value for key, value in call.arguments.items()})
        for call in golds
    )
    assert without_keys["first_call"] == (114, 114, 80) and without_keys["authentication_ignored"] == (114,) * 3
    assert without_keys["rotbench_rules"] == (97, 97, 63)


@pytest.mark.skipif(not REAL.is_file(), reason="the benchmark files are not beside this checkout")
def test_published_toolalpaca_file():
    examples = load_toolalpaca(REAL)
    assert len(examples) == BENCHMARKS["toolalpaca"].published
    assert Counter(len(example.meta["gold_calls"]) for example in examples) == {1: 94, 2: 13, 3: 6, 5: 1}
    golds = [example.gold[0].calls[0] for example in examples]
    assert sum(not example.meta["is_documented"] for example in examples) == 6
    assert sum(not gold.arguments for gold in golds) == 17
    assert sum("MASKED_API_KEY" in gold.arguments.values() for gold in golds) == 34
    assert len({example.meta["api"] for example in examples}) == 11
