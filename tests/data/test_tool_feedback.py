"""data/tool_feedback.py and data/error_texts.py: labelled feedback, the kinds one by one, hostile input."""

import json
import random
import time
from pathlib import Path

import pytest

from data.error_filter import (
    CATEGORIES,
    classify_feedback,
    decide_masked_turns,
    find_error,
    main,
    matches_released_substrings,
    measure_cases,
)
from data.error_texts import match_error_text
from data.tool_calls import ToolCall
from data.tool_feedback import find_fault, read_structure
from data.trajectories import Message, Trajectory

ROOT = Path(__file__).resolve().parents[2]
OWN_CASES = ROOT / "tests/data/feedback_cases.jsonl"
SHARED_CASES = ROOT / "../shared/cases/feedback.jsonl"
ROTBENCH = ROOT / "../shared/data/benchmarks/rotbench/Third_Turn/clean.json"
CALL = ToolCall("search", {"q": "x"})
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"properties": {"q": {"type": "string"}}}}}]


def is_error(feedback: str) -> bool:
    return classify_feedback(feedback, CALL, TOOLS) != "all_right"


# ---------------------------------------------------------------------------------------------------------------------
# Labelled cases


@pytest.mark.parametrize("path", [OWN_CASES, SHARED_CASES], ids=["own", "shared"])
def test_labelled_cases(path):
    """Recall at least 95 %, false hits at most 2 %; the rules were improved on both files, so this holds them only."""
    if not path.exists():
        pytest.skip("the shared cases are not here")
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    errors = [case["feedback"] for case in cases if case["is_error"]]
    good = [case["feedback"] for case in cases if not case["is_error"]]
    missed, condemned = [text for text in errors if not is_error(text)], [text for text in good if is_error(text)]
    assert len(missed) <= 0.05 * len(errors), missed
    assert len(condemned) <= 0.02 * len(good), condemned
    # The released matcher on the same texts: far from both.
    assert sum(map(matches_released_substrings, errors)) < 0.5 * len(errors)
    assert sum(map(matches_released_substrings, good)) > 0.1 * len(good)


def test_categories_of_the_labelled_cases():
    for case in map(json.loads, OWN_CASES.read_text(encoding="utf-8").splitlines()):
        found = classify_feedback(case["feedback"], CALL, TOOLS)
        assert found in ("all_right", case.get("category", "all_right")), case


# Those of the 133 feedback turns of RoTBench's third turn that report an error, by place in the file; labelled by hand.
ROTBENCH_ERRORS = frozenset(
    "0 1 2 3 6 7 10 12 15 16 18 19 21 22 26 27 30 31 32 42 43 46 47 49 51 53 54 58 60 62 65 67 68 71 73 75 78 82 84 85 "
    "90 91 93 94 95 99 102 121 122 123 124 127 128 129 130 132".split()
)


def test_feedback_of_rotbench():
    if not ROTBENCH.exists():
        pytest.skip("the benchmark's files are not here")
    records = json.loads(ROTBENCH.read_text(encoding="utf-8"))
    texts = [turn["value"] for record in records for turn in record["conversations"] if turn["from"] == "function"]
    assert len(texts) == 133
    wrong = [text for index, text in enumerate(texts) if is_error(text) != (str(index) in ROTBENCH_ERRORS)]
    assert not wrong


def test_table_of_cases(tmp_path, capsys):
    path = tmp_path / "cases.jsonl"
    cases = [
        ("Too Many Requests", True, "tool_instability"),
        ("KeyError: 'x'", True, None),
        ("the lights are out", True, None),  # missed by both
        ("The Comedy of Errors", False, None),  # a false hit of the substrings
        ("fine", False, None),
    ]
    rows = [{"feedback": text, "is_error": label, "category": category} for text, label, category in cases]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    numbers = {line.split("  ")[0]: line.split()[-5:] for line in measure_cases(path).splitlines()[1:]}
    assert numbers["all_right"] == ["2", "0", "0.0%", "1", "50.0%"]
    assert numbers["tool_instability"] == ["1", "1", "100.0%", "0", "0.0%"]
    assert numbers["error"] == ["2", "1", "50.0%", "1", "50.0%"]
    assert numbers["all errors"] == ["3", "2", "66.7%", "1", "33.3%"]
    assert main(["--cases", str(path)]) == 0
    path.write_text('{"feedback": 3}\n', encoding="utf-8")
    assert main(["--cases", str(path)]) == 2 and "cases.jsonl:1: found" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Whose words feedback is


def test_replies_of_users_are_no_feedback():
    reply = "Error: I mistyped it, the connection timed out on my side."
    for name in ("ask_to_user", "finish"):
        assert classify_feedback(reply, ToolCall(name, {}), TOOLS) == "all_right"
    assert is_error(reply)
    messages = [
        Message("user", "q"),
        Message("assistant", "", ToolCall("ask_to_user", {"question": "Which?"})),
        Message("tool", "Not found"),
        Message("assistant", "", CALL),
        Message("tool", "Not found"),
    ]
    decisions = decide_masked_turns(Trajectory("t", TOOLS, messages, "f:1"), "structured")
    assert [decision.masked for decision in decisions] == [False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Structure


@pytest.mark.parametrize(
    ("feedback", "value"),
    [
        ('{"a": 1', {"a": 1}),
        ('{"a": [1, {"b": "tex', {"a": [1, {"b": "tex"}]}),
        ('{"a": 1, "b', {"a": 1}),
        ('{"a": 1, "b":', {"a": 1}),
        ('{"a": "x\\', '{"a": "x\\'),  # nothing is complete
        ("{'a': None, 'b': 'it", {"a": None, "b": "it"}),
        ('"{\\"a\\": 1}"', {"a": 1}),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ("{a: 1}", "{a: 1}"),
        ("[ERROR] x", "[ERROR] x"),
        ("]", "]"),
    ],
)
def test_reading_of_objects(feedback, value):
    assert read_structure(feedback) == value


@pytest.mark.parametrize(
    ("feedback", "rule"),
    [
        ({"success": False, "n": 3}, "success flag"),
        ({"isError": True}, "success flag"),
        ({"error": "x", "title": "y"}, "error key"),  # of the result itself, whatever else it holds
        ({"results": [{"title": "y", "error": "x"}]}, None),  # of something found
        ({"results": [{"status_code": 400, "error": "x", "site": "a"}]}, "error key"),  # every item failed
        ({"results": [{"status_code": 400, "error": "x"}, {"status_code": 200, "error": ""}]}, None),  # one did not
        ({"data": {"ship": None}, "errors": ["x"]}, "error key"),
        ({"data": {"ship": "A"}, "errors": ["x"]}, None),  # there is a result all the same
        ({"error": 404}, "error key"),
        ({"error": 2, "mean": 3}, None),  # a deviation
        ({"errors": 2}, None),  # a count
        ({"error": {"code": 0, "message": "OK"}}, None),
        ({"error": {"code": 0, "message": "Invalid key"}}, "error key"),
        ({"status": 404, "message": "x"}, "status"),
        ({"status": 404, "wood": "oak"}, None),
        ({"status": "failed"}, "status"),
        ({"status": "failed", "job": "nightly"}, None),  # the state of a thing
        ({"status": {"error_code": 1001, "error_message": "x"}}, "error key"),
        ({"finance": {"result": None, "error": {"code": "x"}}}, "error key"),
        ({"a": {"error": "x"}, "b": 1}, None),
        ({"message": "Not found"}, "refusal"),
        ({"message": "Not found", "from": "Bob"}, None),  # somebody's message
        ({"message": "Not found", "success": True}, None),
        ({"response": '{"message": "Not found"}', "error": ""}, "refusal"),
        ({"result": "Error: x"}, None),  # payload
        ({"isError": False, "content": [{"type": "text", "text": "Error: x"}]}, None),
        ([{"type": "text", "text": "Error: x"}], "error:"),
    ],
)
def test_envelope_and_payload(feedback, rule):
    for text in (json.dumps(feedback), repr(feedback), json.dumps(json.dumps(feedback))):
        found = find_fault(text)
        assert (found and found[0]) == rule or rule == "refusal" and found, text
    wrapped = find_fault("Status Code: 200. Response: " + json.dumps(feedback))
    assert (wrapped is None) == (rule is None)
    assert find_fault("Status Code: 404. Response: " + json.dumps(feedback))[0] == "status"


@pytest.mark.parametrize(
    "none", [None, False, 0, "", " ", [], {}, "none", "No errors found.", "OK", "null", "0", [None]]
)
def test_values_that_say_no_error(none):
    for key in ("error", "errors", "Error", "error_message", "errorMessage"):
        assert find_fault(json.dumps({key: none, "value": 3})) is None
        assert find_fault(json.dumps({key: none, "message": "Not found"})) is None


# ---------------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize(
    "text", ["Read timed out.", "KeyError: 'x'", "Movie not found!", "Invalid API key", "404 Not Found"]
)
def test_a_text_is_read_as_a_whole(text):
    assert match_error_text(text)
    for other in (
        f"A page about the message: {text}",
        f"{text}\n" + "This is what many users of the program see when they start it.\n" * 9,
        json.dumps({"answer": text, "votes": 3}),
        json.dumps([{"title": text, "link": "x"}, {"title": "y", "link": "z"}]),
    ):
        assert not is_error(other), other


def test_tracebacks_end_a_text_or_begin_it():
    frames = 'Traceback (most recent call last):\n  File "a.py", line 3, in f\n' + "    g()\n" * 200
    assert is_error(frames + "ValueError: x") and is_error("out\n" + frames + "ValueError: x")
    assert not is_error("How to read this?\n" + frames + "ValueError: x\n\nAnswer: the value is wrong.")


# ---------------------------------------------------------------------------------------------------------------------
# Hostile

_KEYS = [
    "error",
    "errors",
    "status",
    "code",
    "message",
    "data",
    "result",
    "response",
    "success",
    "isError",
    "title",
    "x",
]
_SCALARS = [
    None,
    True,
    False,
    0,
    404,
    -1,
    2.5,
    10**30,
    "",
    "none",
    "Not Found",
    '{"error": 1}',
    "\ud800",
    "404 x",
    "Timeout",
]


def random_value(rng: random.Random, depth: int = 0):
    kind = rng.random() if depth < 4 else 1.0
    if kind < 0.25:
        return {rng.choice(_KEYS): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    if kind < 0.4:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return rng.choice(_SCALARS)


def test_random_objects_whole_and_cut_never_raise():
    rng = random.Random(3)
    found = 0
    for _ in range(3000):
        value = random_value(rng)
        text = json.dumps(value) if rng.random() < 0.6 else repr(value)
        text = text[: rng.randrange(len(text) + 1)] if rng.random() < 0.4 else text
        finding = find_error(text, CALL, TOOLS)
        assert finding.category in CATEGORIES and len(finding.matched_text) <= 200
        found += finding.category != "all_right"
    assert 300 < found < 2000


@pytest.mark.parametrize("opening", ['{"error":', "[", '{"data":', '{"errors":[', '{"message":['])
def test_deep_nesting_never_raises(opening):
    closing = opening.translate(str.maketrans("{[", "}]"))
    closing = "".join(bracket for bracket in reversed(closing) if bracket in "}]")
    for depth in (5, 199, 200, 201, 900, 1500, 20_000):
        for text in (opening * depth + "1" + closing * depth, opening * depth):
            assert find_error(text, CALL, TOOLS).category in CATEGORIES


@pytest.mark.parametrize(
    "text",
    [
        "Traceback (most recent call last):\n" * 20_000,
        "<html " * 100_000,
        "Status Code: 200. Response: " * 20_000,
        '{"response":"' * 2000,
        '{"message": "' + "a. " * 200_000 + '"}',
        '{"a": "' + "x\\" * 300_000,
        "{'a': " + "'b' " * 100_000,
        '[{"error": "x"},' * 50_000,
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_long_hostile_text_takes_linear_time(text):
    start = time.process_time()
    find_error(text, CALL, TOOLS)
    assert time.process_time() - start < 3


def test_every_short_text_is_judged_quickly():
    """The rules see at most 600 characters; none of them backtracks without bound on what they are made of."""
    rng = random.Random(1)
    parts = [
        "a: ",
        "the ",
        "'",
        '"',
        "not ",
        "is ",
        "1 ",
        "key ",
        "(",
        "x_y ",
        "must be ",
        "error ",
        "invalid ",
        "was ",
        "\n",
    ]
    texts = [part * (600 // len(part)) for part in parts]
    texts += ["".join(rng.choices(parts, k=150))[:600] for _ in range(200)]
    for text in texts:
        start = time.process_time()
        find_fault(text)
        assert time.process_time() - start < 1, text


@pytest.mark.parametrize(
    ("feedback", "is_error"),
    [
        ("1 validation error for Search\nq\n  field required", True),
        ("MCP error -32602: Invalid arguments", True),
        ("<tool_use_error>File does not exist</tool_use_error>", True),
        ("net::ERR_NAME_NOT_RESOLVED at https://example.org", True),
        ("I'm sorry, the request failed.", True),
        ('{"code": "rate_limit_exceeded", "message": "slow down"}', True),
        ("TooManyRedirects: Exceeded 30 redirects.", True),
        ("type object 'A' has no attribute 'b'", True),
        ("descriptor 'lower' requires a 'str' object", True),
        ("expected str instance, int found", True),
        ("Type object diagrams by hand", False),
        ("Expected instances of rain: 3", False),
        ("<errors_found>0</errors_found>", False),
        ("Error bars -32 to 40 are drawn.", False),
        ('{"code": "US", "name": "United States"}', False),
        ("I'm sorry is a song by John Denver.", False),
        ("err_is_human.txt", False),
        ('{"code": "ok"}', False),
    ],
)
def test_errors_of_clients_and_browsers(feedback, is_error):
    assert (find_fault(feedback) is not None) == is_error


@pytest.mark.parametrize(
    ("feedback", "is_error"),
    [
        ('{"orders": [{"id": 1, "status": "failed"}]}', False),
        ('{"order": {"id": 1, "status": "failed"}}', False),
        ('[{"status": "failed", "id": 3}]', False),
        ('{"data": {"id": 3, "status": 404}}', True),  # a code is about the call
        ('{"id": 3, "status": "failed"}', True),  # the answer itself
        ('{"success": 0, "msg": "param error"}', True),
        ('{"success": 0, "msg": "3 rows tried", "rows": [1, 2, 3]}', False),
    ],
)
def test_a_thing_that_failed_is_no_failed_call(feedback, is_error):
    assert (find_fault(feedback) is not None) is is_error
