"""data/error_filter.py: categories of Table 14 and of the pattern table, false hits, released matcher, decisions."""

import random
import time

import pytest

from data.error_filter import (
    CATEGORIES,
    ERROR_FILTERS,
    TurnDecision,
    check_documents,
    classify_feedback,
    decide_masked_turns,
    find_error,
    find_released_substring,
    matches_released_substrings,
)
from data.tool_calls import ToolCall
from data.tool_documents import IMPLICIT_TOOLS
from data.trajectories import Message, Trajectory


def tool(name: str, required: list[str], optional: list[str]) -> dict:
    properties = {parameter: {"type": "string", "description": "d"} for parameter in [*required, *optional]}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


TOOLS = [tool("f", ["a"], ["b"]), tool("g", [], [])]
GOOD = ToolCall("f", {"a": "x"})
PREFIX = "The function cannot be executed successfully with the given parameters for the reason: "


# ---------------------------------------------------------------------------------------------------------------------
# Documents


@pytest.mark.parametrize(
    ("call", "category", "matched"),
    [
        (ToolCall("f", {"a": 1}), "all_right", ""),
        (ToolCall("f", {"b": 1, "a": 1}), "all_right", ""),
        (ToolCall("g", {}), "all_right", ""),
        (ToolCall("h", {}), "tool_hallucination", "h"),
        (ToolCall("F", {"a": 1}), "tool_hallucination", "F"),
        (ToolCall("f", {"a": 1, "c": 2, "d": 3}), "parameter_hallucination", "c, d"),
        (ToolCall("g", {"a": 1}), "parameter_hallucination", "a"),
        (ToolCall("f", {"c": 2}), "parameter_hallucination", "c"),
        (ToolCall("f", {"b": 1}), "parameter_missing", "a"),
        (ToolCall("finish", {"answer": "x"}), "all_right", ""),
        (ToolCall("ask_to_user", {"question": "x"}), "all_right", ""),
    ],
)
def test_documents_decide_first_and_without_feedback(call, category, matched):
    finding = check_documents(call, TOOLS)
    assert (finding.category, finding.matched_text) == (category, matched)
    assert classify_feedback(None, call, TOOLS) == category
    if category != "all_right":
        for feedback in ("all fine", '{"error": "Response error."}', "Max retries exceeded"):
            assert classify_feedback(feedback, call, TOOLS) == category


def test_listed_finish_is_checked_like_any_tool():
    tools = [tool("finish", ["answer"], [])]
    assert classify_feedback(None, ToolCall("finish", {}), tools) == "parameter_missing"
    assert set(IMPLICIT_TOOLS) == {"finish", "ask_to_user"}


def test_one_of_several_documents_of_the_same_name_is_enough():
    tools = [tool("f", ["a"], []), tool("f", ["b"], [])]
    assert classify_feedback(None, ToolCall("f", {"b": 1}), tools) == "all_right"
    assert classify_feedback(None, ToolCall("f", {"c": 1}), tools) == "parameter_hallucination"


def test_required_beside_parameters_counts():
    beside = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}}, "required": ["a"]}}
    assert classify_feedback(None, ToolCall("f", {}), [beside]) == "parameter_missing"
    assert classify_feedback(None, ToolCall("f", {}), [{"type": "function", "function": {"name": "f"}}]) == "all_right"


def test_a_call_that_does_not_parse():
    assert classify_feedback("anything", None, TOOLS) == "unparsable"


# ---------------------------------------------------------------------------------------------------------------------
# Feedback


@pytest.mark.parametrize(
    ("feedback", "category"),
    [
        # Table 14 of the paper, all of it that has a good call by the documents
        ('{"slip": {"id": 52, "advice": "Don\'t promise what you can\'t deliver."}}', "all_right"),
        ("HTTPSConnectionPool(host='x', port=443): Max retries exceeded with url: /y", "tool_instability"),
        ("Invalid API call. Currency codes might be invalid.", "tool_instability"),
        ('"Invalid API call. Currency codes might be invalid."', "tool_instability"),
        (PREFIX + "400 Client Error: Bad Request for url: http://x", "tool_instability"),
        ('{"error": "connection error."}', "tool_instability"),
        ('{"error": "Response error."}', "tool_call_failure"),
        (PREFIX + "f() got an unexpected keyword argument 'sortBy'", "parameter_hallucination"),
        ("forecast missing 1 required positional argument: aqi", "parameter_missing"),
        ('{"error": "recent-scan-not-found", "text": "Recently completed scan not found"}', "tool_call_failure"),
        # the other rows of the pattern table
        ("name 'f' is not defined", "tool_hallucination"),
        ("NAME 'F' IS NOT DEFINED", "tool_hallucination"),
        ("cannot import name 'f' from 'Random.Random.tool' (x.py)", "tool_hallucination"),
        ("f is not a valid action", "tool_hallucination"),
        ("module 'tools' has no attribute 'f'", "tool_hallucination"),
        ("f() takes 1 positional argument but 2 were given", "parameter_hallucination"),
        ("f() takes from 1 to 2 positional arguments but 3 were given", "parameter_hallucination"),
        ("f() missing 2 required positional arguments: 'a' and 'b'", "parameter_missing"),
        ("Missing required parameters: a", "parameter_missing"),
        ("x.tool.f() argument after ** must be a mapping, not list", "unparsable"),
        ("Your output format does not match the specified format, ...", "unparsable"),
        ("ConnectionError", "tool_instability"),
        ("HTTPSConnectionPool(host='x', port=443): Read timed out.", "tool_instability"),
        ("503 Server Error: x", "tool_instability"),
        ("Object of type SerpResults is not JSON serializable", "tool_call_failure"),
        ("'related_searches'", "tool_call_failure"),
        ("related_searches", "tool_call_failure"),
        ("slice indices must be integers or None or have an __index__ method", "tool_call_failure"),
        ("unsupported type for timedelta days component: str", "tool_call_failure"),
        ("this is not supported", "tool_call_failure"),
        ("unsupported operand type(s) for +: 'int' and 'str'", "tool_call_failure"),
        ("Parameter type error", "tool_call_failure"),
        ("Error: division by zero", "tool_call_failure"),
        ("error executing it", "tool_call_failure"),
        ("''", "tool_call_failure"),
        (PREFIX + "list index out of range", "tool_call_failure"),
        ("list index out of range", "tool_call_failure"),
        ("Traceback (most recent call last):\n  ...", "tool_call_failure"),
        ("KeyError: 'x'", "tool_call_failure"),
        ("ZeroDivisionError: division by zero", "tool_call_failure"),
        ("requests.exceptions.HTTPError: x", "tool_call_failure"),
        # an error key in other clothes
        ("{'error': 'Response error.'}", "tool_call_failure"),
        ('"{\\"error\\": \\"x\\"}"', "tool_call_failure"),
        ('{"Error": "x"}', "tool_call_failure"),
        ('{"error": true, "message": "Max retries exceeded"}', "tool_instability"),
        ('{"error": {"code": 404}}', "tool_call_failure"),
        ('{"error": 404}', "tool_call_failure"),
        ('{"errors": ["x"]}', "tool_call_failure"),
        ('{"error": "Respon', "tool_call_failure"),
        ('{"message": "the request timed out"}', "tool_instability"),
        # the first row that matches wins
        ("name 'f' is not defined, f() got an unexpected keyword argument 'b'", "tool_hallucination"),
        ("connection error: not supported", "tool_instability"),
        # no error at all
        ("", "all_right"),
        ("ok", "all_right"),
        ("The Comedy of Errors", "all_right"),
        ("Errors and omissions", "all_right"),
        ("Terror attack in 1999", "all_right"),
        ("no errors found", "all_right"),
        ("better Rory", "all_right"),
        ("null", "all_right"),
        ('{"error": null, "result": 3}', "all_right"),
        ('{"error": false}', "all_right"),
        ('{"error": ""}', "all_right"),
        ('{"error": [], "errors": []}', "all_right"),
        ('{"errors": []}', "all_right"),
        ('{"errors": 3, "tests": 9}', "all_right"),
        ('{"error": 0}', "all_right"),
        ('{"error": {}}', "all_right"),
        ("{'error': None, 'x': 1}", "all_right"),
        ('{"error": " "}', "all_right"),
        ('{"related_searches": ["a"], "results": ["b"]}', "all_right"),
        ('{"title": "The Comedy of Errors"}', "all_right"),
        ('{"results": [{"title": "How to fix a connection error", "error": "x"}]}', "all_right"),
        ('["ConnectionError explained", "Response error"]', "all_right"),
        ('{"error": null, "note": "not supported by tests"}', "all_right"),
        ("3.5", "all_right"),
        ("'two words'", "all_right"),
        ('"a string"', "all_right"),
    ],
)
def test_feedback_to_a_call_that_the_documents_allow(feedback, category):
    finding = find_error(feedback, GOOD, TOOLS)
    assert finding.category == classify_feedback(feedback, GOOD, TOOLS) == category
    assert bool(finding.rule) == bool(finding.matched_text) == (category != "all_right")


def test_undefined_names_inside_user_code_are_no_hallucinated_tool():
    assert classify_feedback("name 'pandas' is not defined", GOOD, TOOLS) == "tool_call_failure"
    assert classify_feedback("'list' object has no attribute 'foo'", GOOD, TOOLS) == "tool_call_failure"


def test_tool_names_are_taken_literally_in_patterns():
    odd = ToolCall("a.c(*", {})
    tools = [tool("a.c(*", [], [])]
    assert classify_feedback("name 'a.c(*' is not defined", odd, tools) == "tool_hallucination"
    assert classify_feedback("name 'abc(*' is not defined", odd, tools) == "tool_call_failure"


@pytest.mark.parametrize(
    "feedback",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        '"' * 200_000,
        "'" * 200_000,
        "a" * 1_000_000,
        "9" * 200_000,
        "a." * 300_000,
        "name '" * 200_000,
        '"' + "\\" * 200_000,
        "\x00\ud800",
        "{" + '"a": 1, ' * 100_000,
        " " * 1_000_000 + "x",
        '{"error": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_hostile_feedback_neither_crashes_nor_stalls(feedback):
    start = time.process_time()
    assert find_error(feedback, GOOD, TOOLS).category in CATEGORIES
    matches_released_substrings(feedback)
    assert time.process_time() - start < 3


# ---------------------------------------------------------------------------------------------------------------------
# Released matcher


@pytest.mark.parametrize(
    ("feedback", "matched"),
    [
        # flagged, rightly or not: measured on the released code by the project's notes
        ('{"error": null, "x": 1}', "error"),
        ('{"errors": []}', "error"),
        ("no errors found", "error"),
        ("The Terrorist", "error"),
        ("Comedy of Errors", "error"),
        ("better Rory", "error"),
        ("Error: division by zero", "error"),
        ("ConnectionError", "error"),
        ("Response error", "error"),
        ("400 Client Error", "error"),
        ("E.R.R.O.R", "error"),
        ("er\u00e9ror", "error"),
        ('{"related_searches": [1], "results": []}', "relatedsearches"),
        ("name 'x' is not defined", "isnotdefined"),
        ("missing 1 required positional argument: 'q'", "positionalargument"),
        ("got an unexpected keyword argument 'q'", "unexpectedkeyword"),
        ("This is NOT-Supported", "notsupported"),
        ("Invalid API call. Currency", "invalidapicall"),
        ("Object of type SerpResults is not JSON serializable", "objectoftypeserpresultsisnotjsonserializable"),
        (
            "slice indices must be integers or None or have an __index__ method",
            "sliceindicesmustbeintegersornoneorhaveanindexmethod",
        ),
        # not flagged although they report errors
        ("cannot import name 'x' from 'y'", None),
        ("Read timed out", None),
        ("len must be between 6 and 65535", None),
        ("", None),
        ("unsupported type for timedelta days component: str", None),
        ("must be a mapping, not list", None),
        ("''", None),
        ("list index out of range", None),
        ('{"message": "Invalid API key"}', None),
        ("Max retries exceeded", None),
        ('"status": 404', None),
        ("rate limit reached", None),
        ("not ^supported", None),
        ("err\u4e2dor", None),
        ("Object of type Foo is not JSON serializable", None),
    ],
)
def test_released_matcher(feedback, matched):
    assert matches_released_substrings(feedback) == (matched is not None)
    found = find_released_substring(feedback)
    assert (found and found[0]) == matched


def test_released_matcher_against_a_character_by_character_reading():
    """Oracle: the published patterns (a list of facts about the release), reduced one character at a time."""
    published = [
        "is not defined",
        "positional argument",
        "unexpected keyword",
        "'related_searches'",
        "ConnectionError",
        '"error":',
        "not supported",
        "Invalid API call",
        "Response error",
        "Object of type SerpResults is not JSON serializable",
        "400 Client Error",
        "'error'",
        "slice indices must be integers or None or have an __index__ method",
        "connection error",
    ]

    def reduced(text: str) -> str:
        return "".join(c for c in text if "\u4e00" <= c <= "\u9fa5" or c == "^" or c.isascii() and c.isalnum()).lower()

    rng = random.Random(5)
    separators = ["", " ", "-", "'", '"', "\n", "_", "^", "\u4e2d", "\u00e9", "x", "9", "\u212a", "\U00020000"]
    hits = 0
    for _ in range(5000):
        word = rng.choice(published)
        word = word if rng.random() < 0.8 else word[1:]
        text = "".join(c + rng.choice(separators) * (rng.random() < 0.15) for c in word)
        text = (
            rng.choice(["", "so ", "\u3042"])
            + (text.upper() if rng.random() < 0.3 else text)
            + rng.choice(["", ".", "s"])
        )
        expected = any(reduced(pattern) in reduced(text) for pattern in published)
        assert matches_released_substrings(text) == expected, text
        if expected:
            substring, stretch = find_released_substring(text)
            assert stretch in text and reduced(stretch) == substring
        hits += expected
    assert 500 < hits < 4500


# ---------------------------------------------------------------------------------------------------------------------
# Decisions


def trajectory(*messages: Message) -> Trajectory:
    return Trajectory("t", TOOLS, list(messages), "file:1")


def call(name: str = "f", **arguments: object) -> Message:
    return Message("assistant", "", ToolCall(name, arguments or {"a": "x"}))


ASK, OK = Message("user", "q"), Message("tool", "fine")
COMEDY, BROKEN = Message("tool", "The Comedy of Errors"), Message("tool", '{"error": "Response error."}')
TIMEOUT = Message("tool", "Read timed out")


def masked(record: Trajectory, error_filter: str) -> list[bool]:
    return [decision.masked for decision in decide_masked_turns(record, error_filter)]


@pytest.mark.parametrize(
    ("messages", "structured", "substring"),
    [
        ([ASK, call(), OK, call()], [False, False], [False, False]),
        ([ASK, call(), BROKEN, call(), OK, call()], [True, False, False], [True, False, False]),
        ([ASK, call(), COMEDY, call()], [False, False], [True, False]),  # false hit of the released matcher
        ([ASK, call(), TIMEOUT, call()], [True, False], [False, False]),  # missed by it
        ([ASK, call(), BROKEN], [True], [True]),  # feedback to the last turn counts where there is some
        ([ASK, call(), OK, call("nosuch")], [False, True], [False, False]),  # the last turn: documents may condemn it
        ([ASK, call("f", c=1), OK, call()], [True, False], [False, False]),
        ([ASK, Message("assistant", "Hello"), ASK, call()], [False, False], [True, False]),  # text before the last turn
        ([ASK, call("ask_to_user", question="?"), ASK, call()], [False, False], [True, False]),
        ([ASK, Message("assistant", "?", None, "no bracket"), BROKEN, call()], [True, False], [True, False]),
        ([ASK, Message("assistant", "?", None, "no bracket")], [True], [True]),
        ([ASK, Message("assistant", "The error is mine.")], [False], [False]),
    ],
)
def test_which_mode_masks_which_turn(messages, structured, substring):
    record = trajectory(*messages)
    assert masked(record, "structured") == structured
    assert masked(record, "substring") == substring
    faults = [message.fault is not None for message in messages if message.role == "assistant"]
    assert masked(record, "none") == faults


def test_decisions_name_message_rule_and_matched_text():
    record = trajectory(ASK, call(), COMEDY, call(), BROKEN, call("nosuch"))
    assert decide_masked_turns(record, "structured") == [
        TurnDecision(1, False, "all_right", "", ""),
        TurnDecision(3, True, "tool_call_failure", "error key", '"error": "Response error."'),
        TurnDecision(5, True, "tool_hallucination", "tool not offered", "nosuch"),
    ]
    assert decide_masked_turns(record, "substring") == [
        TurnDecision(1, True, "all_right", "released substring error", "Error"),
        TurnDecision(3, True, "tool_call_failure", "released substring error", "error"),
        TurnDecision(5, False, "tool_hallucination", "tool not offered", "nosuch"),
    ]


def test_matched_text_stays_short():
    record = trajectory(ASK, call(), Message("tool", '{"error": "' + "x" * 10_000 + '"}'), call())
    assert all(len(entry.matched_text) <= 200 for mode in ERROR_FILTERS for entry in decide_masked_turns(record, mode))


def test_unknown_filter_is_refused():
    with pytest.raises(ValueError, match="structured, substring, none"):
        decide_masked_turns(trajectory(ASK, call()), "released")
