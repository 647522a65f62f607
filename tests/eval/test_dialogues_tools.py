"""Tool runtime: our own tools by hand-worked values, the words of every fault, and that the error filter reads each
feedback as what it was meant to be - over all 95 tool sets of ToolEyes where they are there."""

import inspect
import json
import math
import re
import select
import socket
import threading
import uuid
from collections import Counter
from pathlib import Path

import pytest

from data.error_filter import classify_feedback
from data.tool_calls import ToolCall, parse_tool_call
from data.tool_documents import IMPLICIT_TOOLS
from eval.dialogues.local_tools import (
    INDICATORS,
    LOCAL_TOOLS,
    PLAIN_TOOLS,
    RANDOM_TOOLS,
    ToolError,
    add_date,
    calculator,
    city_photo,
    shell_result,
)
from eval.dialogues.simulated_tools import check_types, draw_result
from eval.dialogues.tools import (
    CALL_FAILURE,
    FILES_LOST,
    MAX_FEEDBACK_CHARACTERS,
    REASON,
    TODAY,
    ExecutorSettings,
    ToolExecutor,
    ToolRequest,
    settle_feedback,
)
from eval.sandbox.run import ToolServer
from toolbox.world import draw_trajectories, execute

TOOLEYES = Path(__file__).resolve().parents[3] / "shared" / "data" / "benchmarks" / "tooleyes"
needs_tooleyes = pytest.mark.skipif(not TOOLEYES.is_dir(), reason="the benchmark files are not beside this checkout")


def document(name, required=(), optional=(), kind="string", description="A tool."):
    properties = {parameter: {"type": kind, "description": parameter} for parameter in (*required, *optional)}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(required)},
        },
    }


# The documents of the local tools, their names, parameters and required ones as in ToolEyes; the texts are ours.
DOCUMENTS = {
    "Random/Random": [
        document("get_random_number", optional=("min", "max", "cnt")),
        document("get_uuid", optional=("cnt",)),
        document("generate_string", optional=("len", "cnt")),
        document("generate_password", optional=("len", "cnt")),
        document("generate_placeholder_text", optional=("cnt",)),
    ],
    "File/file_operation": [document("write_file", ("text",), ("file_path",)), document("read_file", ("file_path",))],
    "Execute/Execute": [
        document("execute_pycode", ("code:",)),
        document(
            "execute_bash_code", ("commands",), ("strip_newlines", "return_err_outputpersistent=False", "persistent")
        ),
    ],
    "Calculator/Calculator": [
        document("calculator", ("input_query",)),
        document("newton_calculator", ("operation", "expression")),
    ],
    "Finance/Technical_Indicators": [
        document("get_all_technical_indicators_available"),
        document("get_technical_indicator_description", ("indicator_symbol",)),
    ],
    "Stock/Stock": [
        document("get_today_date"),
        document("add_date", ("date", "days")),
        document("get_daily_prices", ("symbol", "date"), ("key",)),
    ],
    "Calendar/Calendar": [document("current_date")],
    "Travel/Hotels_Statistical_Data": [document("city_photo", ("city_iata",), ("photo_size",))],
}


def request(tool_set, name, arguments=None, *, dialogue=0, attempt=0, tools=None):
    return ToolRequest(
        dialogue=dialogue,
        tool_set=tool_set,
        tools=tools or DOCUMENTS[tool_set],
        call=ToolCall(name, arguments or {}),
        attempt=attempt,
    )


def read_as(asked, feedback):
    return classify_feedback(feedback, asked.call, asked.tools)


@pytest.fixture(scope="module")
def tools():
    """One executor for all tests that do not break it; each takes dialogue numbers of its own where it has files."""
    with ToolExecutor(ExecutorSettings("auto", execute_code=True, seconds=20.0)) as executor:
        yield executor


@pytest.fixture(scope="module")
def can(tools):
    """What this machine's sandbox gives to calls."""
    tools._local.has(request("Execute/Execute", "execute_pycode"))
    return tools._local._abilities


# ---------------------------------------------------------------------------------------------------------------------
# Tools by hand values


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("37 * 65 / 24", 2405 / 24),
        ("400/1400", 2 / 7),
        ("107-20", 87),
        ("250 + 75 / 3", 275),
        ("2^3^2", 512),
        ("-2^2", -4),
        ("2*-3", -6),
        ("2^-1", 0.5),
        ("(1+2)*(3+4)", 21),
        ("10-4-3", 3),
        ("24/4/3", 2),
        ("1.5e3 + .5", 1500.5),
        ("2**10 =", 1024),
        ("9^30", 9**30),
        ("0.1+0.2", 0.1 + 0.2),
        ("+3--4", 7),
        ("6/3", 2),
        ("((((5))))", 5),
        ("8 \u00f7 4 \u00d7 3", 6),
        ("-(2+3)^2", -25),
    ],
)
def test_calculator(expression, value):
    assert calculator(expression) == value and type(calculator(expression)) is type(value)


@pytest.mark.parametrize(
    "expression",
    [
        "abc",
        "",
        "2 +",
        "(1",
        "1)",
        "2 3",
        "sin(1)",
        "9^9^9^9",
        "(-8)^0.5",
        "1e999",
        "(" * 5000,
        "-" * 5000,
        "__import__('os')",
        "1" * 5000,
        "2^^3",
    ],
)
def test_calculator_refuses(expression):
    with pytest.raises((ToolError, OverflowError)):
        calculator(expression)


def test_calculator_divides_by_zero_in_pythons_words():
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        calculator("1/(2-2)")


@pytest.mark.parametrize(
    ("start", "days", "end"),
    [
        ("2024-02-28", "2", "2024-03-01"),
        ("2023-02-28", 1, "2023-03-01"),
        ("2024-01-01", "-1", "2023-12-31"),
        ("2024-12-20", 12.0, "2025-01-01"),
        (" 2024-12-31 ", "366", "2026-01-01"),
    ],
)
def test_add_date(start, days, end):
    assert add_date(start, days) == end


@pytest.mark.parametrize(
    ("start", "days", "words"),
    [
        ("2024-02-30", "1", "does not match format '%Y-%m-%d'"),
        ("20240230", "1", "does not match"),
        ("2024-01-01", "two", "unsupported type for timedelta days component: str"),
        ("2024-01-01", None, "unsupported type for timedelta days component: NoneType"),
        ("9999-12-31", 1, "date value out of range"),
        ("2024-01-01", 10**9, "days must be between"),
    ],
)
def test_add_date_refuses(start, days, words):
    with pytest.raises(ToolError, match=re.escape(words)):
        add_date(start, days)


def test_city_photo():
    assert city_photo("lon") == "https://photo.hotellook.com/static/cities/960x720/LON.jpg"
    assert city_photo("SFO", "(100, 50)") == city_photo("SFO", [100, 50]) == city_photo("SFO", "100x50")
    assert city_photo("../x?").endswith("/960x720/..%2FX%3F.jpg")
    with pytest.raises(ToolError, match="not supported"):
        city_photo("SFO", "large")


def result_of(executor, *arguments, **flags):
    """A random tool's list: JSON within a JSON string, as ToolEyes has it."""
    asked = request("Random/Random", *arguments, **flags)
    answer = executor(asked)
    assert answer.executor == "local" and read_as(asked, answer.feedback) == "all_right"
    return json.loads(json.loads(answer.feedback))


def test_random_tools_keep_what_was_asked(tools):
    numbers = result_of(tools, "get_random_number", {"min": "10", "max": "12", "cnt": "200"})
    assert set(numbers) == {10, 11, 12} and len(numbers) == 200
    assert 0 <= result_of(tools, "get_random_number")[0] <= 100
    assert [uuid.UUID(text).version for text in result_of(tools, "get_uuid", {"cnt": 3.0})] == [4, 4, 4]
    assert [len(text) for text in result_of(tools, "generate_string", {"len": "8", "cnt": "3"})] == [8, 8, 8]
    for password in result_of(tools, "generate_password", {"len": "6", "cnt": "20"}):
        assert len(password) == 6 and re.search("[A-Za-z]", password) and re.search("[0-9]", password)
        assert re.search("[^A-Za-z0-9]", password)
    sentences = result_of(tools, "generate_placeholder_text", {"cnt": "2"})
    assert len(sentences) == 2 and all(re.fullmatch(r"[A-Z][a-z ]+\.", sentence) for sentence in sentences)


def test_random_tools_are_seeded_by_tool_arguments_and_attempt(tools):
    asked = {"min": 1, "max": 10**9}
    first = result_of(tools, "get_random_number", asked)
    assert first == result_of(tools, "get_random_number", dict(reversed(asked.items())), dialogue=7)
    assert first != result_of(tools, "get_random_number", asked, attempt=1)
    assert first != result_of(tools, "get_random_number", asked | {"max": 10**9 + 1})


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("generate_password", {"len": "5"}, "len must be between 6 and 65535"),
        ("generate_string", {"len": 70000}, "len must be between 1 and 65535"),
        ("generate_string", {"len": 60000, "cnt": 2}, "len times cnt"),
        ("get_uuid", {"cnt": 0}, "cnt must be between 1 and 1000"),
        ("get_uuid", {"cnt": "x"}, "invalid literal for int()"),
        ("get_uuid", {"cnt": True}, "invalid literal for int()"),
        ("get_uuid", {"cnt": "1e400"}, "invalid literal"),
        ("get_random_number", {"min": 5, "max": 1}, "min must not be greater than max"),
    ],
)
def test_random_tools_refuse(tools, name, arguments, words):
    asked = request("Random/Random", name, arguments)
    feedback = tools(asked).feedback
    assert words in feedback and read_as(asked, feedback) == "tool_call_failure"


@pytest.mark.parametrize(
    ("tool_set", "name", "arguments", "feedback"),
    [
        ("Stock/Stock", "get_today_date", {}, f'"{TODAY}"'),
        ("Calendar/Calendar", "current_date", {}, f'"{TODAY}"'),
        ("Stock/Stock", "add_date", {"date": TODAY, "days": "12"}, '"2025-01-01"'),
        ("Stock/Stock", "add_date", {"date": TODAY, "days": "x"}, "unsupported type for timedelta days component: str"),
        ("Calculator/Calculator", "calculator", {"input_query": "107 - 20"}, "87"),
        ("Calculator/Calculator", "calculator", {"input_query": "1/0"}, "division by zero"),
        ("Finance/Technical_Indicators", "get_technical_indicator_description", {"indicator_symbol": "nope"}, "'NOPE'"),
        ("Finance/Technical_Indicators", "get_technical_indicator_description", {"indicator_symbol": ""}, "''"),
        (
            "Finance/Technical_Indicators",
            "get_technical_indicator_description",
            {"indicator_symbol": "sma"},
            json.dumps(INDICATORS["SMA"]),
        ),
        ("Finance/Technical_Indicators", "get_all_technical_indicators_available", {}, json.dumps(list(INDICATORS))),
    ],
)
def test_feedback_of_local_tools(tools, tool_set, name, arguments, feedback):
    answer = tools(request(tool_set, name, arguments))
    assert (answer.feedback, answer.executor) == (feedback, "local")


def test_today_can_be_given():
    with ToolExecutor(ExecutorSettings("local", today="2030-01-02")) as executor:
        assert executor(request("Calendar/Calendar", "current_date")).feedback == '"2030-01-02"'


# ---------------------------------------------------------------------------------------------------------------------
# Files, code, shell


def run_file(executor, name, dialogue, **arguments):
    asked = request("File/file_operation", name, arguments, dialogue=dialogue)
    answer = executor(asked)
    assert answer.executor == "local"
    return answer.feedback, read_as(asked, answer.feedback)


def test_files_persist_within_a_dialogue_and_nowhere_else(tools, can):
    if not can["folder"]:
        pytest.skip("the sandbox of this machine gives no folder")
    assert run_file(tools, "write_file", 10, text="hello", file_path="a.txt") == (
        '"File written successfully to a.txt."',
        "all_right",
    )
    assert run_file(tools, "read_file", 10, file_path="a.txt") == ('"hello"', "all_right")
    assert run_file(tools, "read_file", 10, file_path="./x/../a.txt") == ('"hello"', "all_right")
    missing = "\"Error: [Errno 2] No such file or directory: 'a.txt'\""
    for other in (11, 12):  # on the other server and on the same one
        assert run_file(tools, "read_file", other, file_path="a.txt") == (missing, "tool_call_failure")
    tools.forget(10)
    assert run_file(tools, "read_file", 10, file_path="a.txt") == (missing, "tool_call_failure")
    assert run_file(tools, "write_file", 10, text=5)[0] == '"File written successfully to output.txt."'
    assert run_file(tools, "read_file", 10, file_path="output.txt")[0] == '"5"'
    tools.forget(10)
    tools.forget(10)


@pytest.mark.parametrize(
    ("code", "feedback"),
    [
        ("(123 + 234) / 23 * 19", '"294.9130434782609\\n"'),
        ("for i in range(3):\n    print(i)", '"0\\n1\\n2\\n"'),
        ("x = 2\nx + 1", '"3\\n"'),
        ("print('a')\n'b'", "\"a\\n'b'\\n\""),
        ("x = 1", '""'),
        ("", '""'),
        ("import math\ndef f(n):\n    return n * f(n - 1) if n else 1\nf(5), math.factorial(5)", '"(120, 120)\\n"'),
        ("1/0", "division by zero"),
        ("undefined", "name 'undefined' is not defined"),
        ("exit()", '""'),
        ("print(1)\nexit(3)", '"1\\n"'),
        ("raise KeyError('x')", "'x'"),
        ("raise ValueError", "ValueError"),
        ("f(", "'(' was never closed (<unknown>, line 1)"),
        ("def f(a): pass\nf()", CALL_FAILURE),  # Python's words would read as a missing parameter of the tool
        ("execute_pycode", CALL_FAILURE),
        ("raise OSError('connection error')", CALL_FAILURE),
        ("print('{\"error\": 1}')", json.dumps({"result": '"{\\"error\\": 1}\\n"'})),
        ("'Max retries exceeded'", "\"'Max retries exceeded'\\n\""),
    ],
)
def test_python_code(tools, can, code, feedback):
    if not can["folder"]:
        pytest.skip("the sandbox of this machine gives no folder")
    asked = request("Execute/Execute", "execute_pycode", {"code:": code})
    answer = tools(asked)
    assert (answer.feedback, answer.executor) == (feedback, "local")
    is_right = feedback.startswith(('"', '{"result'))
    assert read_as(asked, feedback) == ("all_right" if is_right else "tool_call_failure")


def run_shell(executor, commands, dialogue, **flags):
    return executor(request("Execute/Execute", "execute_bash_code", {"commands": commands, **flags}, dialogue=dialogue))


def test_shell(tools, can):
    if not can["programs"]:
        pytest.skip("the sandbox of this machine runs no programs")
    made = "mkdir testdir && cd testdir && touch testfile.txt"  # a query of ToolEyes
    assert run_shell(tools, made, 20).feedback == '""'
    assert run_shell(tools, "ls -R; pwd | wc -l", 20).feedback == '".:\\ntestdir\\n\\n./testdir:\\ntestfile.txt\\n1\\n"'
    assert run_shell(tools, "echo a > b; cp b c; mv c d; cat d; rm b d; ls", 20).feedback == '"a\\ntestdir\\n"'
    assert run_shell(tools, "echo ' a '", 20, strip_newlines="True").feedback == '"a"'
    assert run_shell(tools, "sleep 60 & echo ok", 20).feedback == '"ok\\n"'
    failed = run_shell(tools, "ls nowhere", 20)
    assert failed.feedback == f"{REASON}Command 'ls nowhere' returned non-zero exit status 2."
    told = run_shell(tools, "LC_ALL=C ls nowhere", 20, **{"return_err_outputpersistent=False": "true"}).feedback
    assert "cannot access" in told and json.loads(told)["result"].startswith('"ls:')  # asked for: no error
    assert run_shell(tools, "ls", 21).feedback == '""'
    tools.forget(20)


def test_shell_result_by_exit_code():
    arguments = {"commands": "x"}
    assert shell_result(arguments, 0, " out ") == (True, " out ")
    assert shell_result(arguments, 3, "out") == (False, "Command 'x' returned non-zero exit status 3.")
    assert shell_result(arguments | {"return_err_outputpersistent=False": 1}, 3, "out") == (True, "out")
    assert shell_result(arguments | {"strip_newlines": "false"}, 0, " out ") == (True, " out ")


def test_code_runs_only_if_that_was_asked_for():
    with ToolExecutor(ExecutorSettings("auto")) as executor:
        for name, arguments in (("execute_pycode", {"code:": "1"}), ("execute_bash_code", {"commands": "true"})):
            assert executor(request("Execute/Execute", name, arguments)).executor == "simulated"
        assert executor._local._servers == [None, None]  # no process was started for that


# ---------------------------------------------------------------------------------------------------------------------
# Document faults


MANY = [document("f", ("a", "b", "c"), ("d",)), document("g", ("a",))]


@pytest.mark.parametrize(
    ("name", "arguments", "category", "feedback"),
    [
        ("h", {}, "tool_hallucination", "cannot import name 'h' from 'Set.Name.tool' (Set/Name/tool.py)"),
        ("g", {"a": 1, "q": 2}, "parameter_hallucination", "g() got an unexpected keyword argument 'q'"),
        ("g", {"q": 2}, "parameter_hallucination", "g() got an unexpected keyword argument 'q'"),  # Python's order
        ("g", {}, "parameter_missing", "g() missing 1 required positional argument: 'a'"),
        ("f", {"a": 1}, "parameter_missing", "f() missing 2 required positional arguments: 'b' and 'c'"),
        ("f", {"d": 1}, "parameter_missing", "f() missing 3 required positional arguments: 'a', 'b', and 'c'"),
        ("g", {"a": ["x"]}, "tool_call_failure", "Parameter type error: a must be string, not list"),
    ],
)
@pytest.mark.parametrize("kind", ["auto", "local", "simulated"])
def test_words_of_the_document_check(kind, name, arguments, category, feedback):
    asked = request("Set/Name", name, arguments, tools=MANY)
    with ToolExecutor(ExecutorSettings(kind)) as executor:
        assert executor(asked).feedback == feedback and read_as(asked, feedback) == category


def test_tools_of_no_library_are_unknown_in_the_words_of_the_authors_data():
    asked = request("", "h", {}, tools=MANY)
    with ToolExecutor(ExecutorSettings("auto")) as executor:
        assert executor(asked).feedback == "name 'h' is not defined"


def test_missing_arguments_are_told_in_pythons_own_words():
    def f(a, b, c, d=None):
        return a, b, c, d

    with ToolExecutor(ExecutorSettings("simulated")) as executor:
        for arguments in ({}, {"a": 1}, {"a": 1, "b": 2}, {"a": 1, "q": 2}):
            with pytest.raises(TypeError) as raised:
                f(**arguments)
            words = str(raised.value).split(".")[-1].replace("<locals>", "")
            assert executor(request("Set/Name", "f", arguments, tools=MANY)).feedback == words


@pytest.mark.parametrize(
    ("kind", "value", "is_right"),
    [
        ("string", "x", True),
        ("string", 5, True),
        ("string", None, True),
        ("string", {}, False),
        ("integer", 5, True),
        ("integer", 5.0, True),
        ("integer", 5.5, False),
        ("integer", True, False),
        ("integer", "5", False),
        ("number", 5, True),
        ("number", 5.5, True),
        ("number", False, False),
        ("boolean", True, True),
        ("boolean", 1, False),
        ("array", [1], True),
        ("array", "1", False),
        ("object", {}, True),
        ("object", [], False),
        ("any", [], True),
        (["string", "null"], [], True),
        (None, 5, True),
    ],
)
def test_documented_types(kind, value, is_right):
    assert (check_types({"p": {"type": kind}}, {"p": value}) == "") == is_right


def test_documented_choices():
    assert check_types({"p": {"type": "string", "enum": ["a", "b"]}}, {"p": "a"}) == ""
    assert check_types({"p": {"enum": ["a", "b"]}}, {"p": "c"}) == 'p must be one of ["a", "b"]'


def test_what_is_not_local_has_no_network_with_local_alone():
    asked = request("Calculator/Calculator", "newton_calculator", {"operation": "factor", "expression": "x^2"})
    with ToolExecutor(ExecutorSettings("local")) as executor:
        answer = executor(asked)
    assert answer.executor == "local" and read_as(asked, answer.feedback) == "tool_instability"


# ---------------------------------------------------------------------------------------------------------------------
# Round trip


def situations(tool, arguments=None):
    """(category meant, arguments, settings, name) of everything that can become of a call of a tool."""
    function = tool["function"]
    properties, required = function["parameters"]["properties"], function["parameters"]["required"]
    full = arguments or dict.fromkeys(properties, "5")
    name = function["name"]
    yield "all_right", full, {}, name
    yield "all_right", {key: full[key] for key in required if key in full}, {}, name
    yield "tool_hallucination", full, {}, name + "_x"
    yield "parameter_hallucination", full | {"no_such": "1"}, {}, name
    for key in required:
        yield "parameter_missing", {other: value for other, value in full.items() if other != key}, {}, name
    yield "tool_instability", full, {"instability_rate": 1.0}, name
    yield "tool_call_failure", full, {"failure_rate": 1.0}, name
    for key in properties:
        yield "tool_call_failure", full | {key: ["x"]}, {}, name


def simulate(settings):
    executor = ToolExecutor(ExecutorSettings("simulated", seed=3, **settings))
    return lambda asked: executor(asked)


def check_round_trip(tool_set, tools, executors):
    for tool in tools:
        for meant, arguments, settings, name in situations(tool):
            if name in IMPLICIT_TOOLS and meant in ("tool_instability", "tool_call_failure"):
                continue  # what follows these is the user's word
            asked = request(tool_set, name, arguments, tools=tools)
            key = tuple(settings)
            executors.setdefault(key, simulate(settings))
            answer = executors[key](asked)
            assert read_as(asked, answer.feedback) == meant, (tool_set, name, meant, answer.feedback)
            assert answer.executor == "simulated" and len(answer.feedback) <= MAX_FEEDBACK_CHARACTERS
            if meant == "all_right":
                assert json.loads(answer.feedback)


def test_feedback_reads_as_it_was_meant_for_our_documents():
    executors = {}
    for tool_set, tools in {**DOCUMENTS, "Set/Name": MANY}.items():
        check_round_trip(tool_set, tools, executors)


def tooleyes_sets():
    library = TOOLEYES / "Tool_Library"
    for path in sorted(library.rglob("config_gpt4.json")):
        yield (
            path.parent.relative_to(library).as_posix(),
            [{"type": "function", "function": function} for function in json.loads(path.read_text(encoding="utf-8"))],
        )


@needs_tooleyes
def test_feedback_reads_as_it_was_meant_for_all_tool_sets_of_tooleyes():
    executors, count = {}, 0
    for tool_set, tools in tooleyes_sets():
        # Where two documents have one name a call may agree with either: they are tried one at a time.
        twice = {name for name, times in Counter(tool["function"]["name"] for tool in tools).items() if times > 1}
        check_round_trip(tool_set, [tool for tool in tools if tool["function"]["name"] not in twice], executors)
        for tool in tools:
            if tool["function"]["name"] in twice:
                check_round_trip(tool_set, [tool], executors)
        count += len(tools)
    assert count == 758


@pytest.mark.skipif(
    not (TOOLEYES / "tool_scan.json").exists(), reason="no scan of ToolEyes' tools beside the repository"
)
def test_local_tools_are_those_that_run_without_network_and_take_the_documented_parameters():
    scan = json.loads((TOOLEYES / "tool_scan.json").read_text(encoding="utf-8"))
    assert set(LOCAL_TOOLS) == {
        (tool_set, name)
        for tool_set, functions in scan.items()
        for name, facts in functions.items()
        if facts.get("offline")
    }
    documents = dict(tooleyes_sets())
    functions = PLAIN_TOOLS | RANDOM_TOOLS
    for tool_set, name in LOCAL_TOOLS:
        theirs = next(
            tool["function"]["parameters"] for tool in documents[tool_set] if tool["function"]["name"] == name
        )
        ours = next(tool["function"]["parameters"] for tool in DOCUMENTS[tool_set] if tool["function"]["name"] == name)
        assert (list(theirs["properties"]), theirs["required"]) == (list(ours["properties"]), ours["required"])
        if name in functions:
            parameters = {
                key: value for key, value in inspect.signature(functions[name]).parameters.items() if key != "rng"
            }
            assert list(parameters) == list(theirs["properties"])
            assert [key for key, value in parameters.items() if value.default is value.empty] == theirs["required"]


RIGHT_ARGUMENTS = {
    "calculator": {"input_query": "1+1"},
    "add_date": {"date": "2024-01-01", "days": "1"},
    "get_technical_indicator_description": {"indicator_symbol": "RSI"},
    "city_photo": {"city_iata": "LON", "photo_size": "(100, 100)"},
    "read_file": {"file_path": "a"},
    "write_file": {"text": "Error: connection error", "file_path": "a"},
    "generate_password": {"len": "10", "cnt": "2"},
    "execute_bash_code": {"commands": 'echo \'{"error": "connection error"}\''},
    "execute_pycode": {"code:": "'Error: timed out'"},
}


def test_feedback_of_local_tools_reads_as_it_was_meant(tools, can):
    for tool_set, name in sorted(LOCAL_TOOLS, key=lambda pair: pair[1], reverse=True):  # write_file before read_file
        if LOCAL_TOOLS[tool_set, name] != "nothing" and not can["programs"]:
            continue
        tool = next(tool for tool in DOCUMENTS[tool_set] if tool["function"]["name"] == name)
        for meant, arguments, settings, called in situations(tool, RIGHT_ARGUMENTS.get(name)):
            if settings or meant == "tool_call_failure":
                continue
            asked = request(tool_set, called, arguments, dialogue=30)
            answer = tools(asked)
            assert read_as(asked, answer.feedback) == meant, (name, meant, answer.feedback)
            assert answer.executor == ("simulated" if meant == "tool_hallucination" else "local")
    tools.forget(30)


HOSTILE_TEXTS = [
    "",
    "x" * 10000,
    '"' * 5000,
    "\\" * 9000,
    '{"error": "x"}',
    "Error",
    "[" * 3000,
    "\ud800",
    "\x00",
    "Traceback (most recent call last)",
    "name 'g' is not defined",
    "'x'",
    '{"error": {"a": ' + "1" * 9000,
    '"' + '\\"' * 4000,
    "timed out",
    '{"message": "Invalid API call"}',
    "null",
    "Response error",
    "g() missing 1 required positional argument: 'a'",
    "\u00e4" * 9000,
    "output format does not match the specified format",
    "not supported" * 1000,
]


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=lambda text: ascii(text[:20]))
def test_any_text_is_told_as_what_it_is_meant_to_be(text):
    asked = request("Set/Name", "g", {"a": "1"}, tools=MANY)
    for meant in ("all_right", "tool_call_failure"):
        feedback = settle_feedback(meant, text, asked)
        assert read_as(asked, feedback) == meant and len(feedback) <= MAX_FEEDBACK_CHARACTERS
        feedback.encode("utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Toolbox


def test_toolbox_world_answers_as_in_this_process(tools):
    """The sandboxed server and the world's own function agree on every call of 30 dialogues, errors included, also
    with the first argument left out."""
    categories = set()
    for record in draw_trajectories(5, 30):
        documents = [
            {"type": "function", "function": function} for function in json.loads(record["conversations"][0]["content"])
        ]
        attempts: Counter = Counter()
        for message in record["conversations"][2:]:
            if message["role"] != "assistant":
                continue
            name, _, text = message["content"].partition("\n")
            if name == "finish":
                continue
            arguments, attempt = json.loads(text), attempts[message["content"]]
            attempts[message["content"]] += 1
            for given in (arguments, dict(list(arguments.items())[1:])):
                asked = request("toolbox", name, given, attempt=attempt, tools=documents)
                answer = tools(asked)
                assert answer.executor == "local"
                assert answer.feedback == execute(documents, name, given, attempt)
                categories.add(read_as(asked, answer.feedback))
    assert categories == {
        "all_right",
        "tool_hallucination",
        "parameter_hallucination",
        "parameter_missing",
        "tool_call_failure",
        "tool_instability",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Simulated


def test_a_result_depends_on_tool_and_arguments_alone():
    asked = [request("Set/Name", "f", {"a": str(n), "b": 1, "c": 2}, tools=MANY, dialogue=n) for n in range(50)]
    with ToolExecutor(ExecutorSettings("simulated", seed=1, instability_rate=0.3, failure_rate=0.3)) as executor:
        forward = [executor(one).feedback for one in asked]
        backward = [executor(one).feedback for one in reversed(asked)][::-1]
        reordered = executor(request("Set/Name", "f", {"c": 2, "b": 1, "a": "3"}, tools=MANY, dialogue=99)).feedback
    assert forward == backward and reordered == forward[3] and len(set(forward)) > 20
    with ToolExecutor(ExecutorSettings("simulated", seed=2)) as executor:
        right = [executor(one).feedback for one in asked]
    assert all(feedback == right[n] for n, feedback in enumerate(forward) if '"result"' in feedback)


def test_failures_come_at_their_rates_and_only_instability_passes():
    n, instability, failure = 1500, 0.4, 0.4
    found, second = Counter(), Counter()
    with ToolExecutor(
        ExecutorSettings("simulated", seed=4, instability_rate=instability, failure_rate=failure)
    ) as executor:
        for number in range(n):
            asked = request("Set/Name", "g", {"a": str(number)}, tools=MANY)
            category = read_as(asked, executor(asked).feedback)
            found[category] += 1
            repeated = request("Set/Name", "g", {"a": str(number)}, tools=MANY, attempt=1)
            second[category, read_as(repeated, executor(repeated).feedback)] += 1
    for category, rate in (("tool_instability", instability), ("tool_call_failure", failure)):
        assert abs(found[category] - n * rate) < 4 * math.sqrt(n * rate * (1 - rate)), found
    assert second["tool_call_failure", "tool_call_failure"] == found["tool_call_failure"]
    # Another attempt of a call that was unstable fails again in 0.4 / 0.6 of the cases: it is none that never works.
    again, tried = second["tool_instability", "tool_instability"], found["tool_instability"]
    assert abs(again - tried * 2 / 3) < 4 * math.sqrt(tried * 2 / 9)


def test_result_has_the_shape_that_the_document_suggests():
    def drawn(name, description="", optional=(), **arguments):
        function = document(name, optional=optional, description=description)["function"]
        return draw_result("Set/Name", function, arguments)

    assert drawn("check_block_ip", ip="1.2.3.4")["block_ip"] in (True, False)
    assert [type(row) for row in drawn("search_users", optional=("city",), limit="3")["users"]] == [dict] * 3
    assert set(drawn("search_users", optional=("city", "api_key"))["users"][0]) == {"id", "name", "city"}
    assert isinstance(drawn("get_exchange_rate", from_currency="EUR")["exchange_rate"], float)
    assert drawn("get_exchange_rate", from_currency="EUR", api_key="s")["from_currency"] == "EUR"
    assert "api_key" not in drawn("get_exchange_rate", from_currency="EUR", api_key="s")
    assert isinstance(drawn("random_cold_joke")["cold_joke"], str)
    assert drawn("get_team", team="x" * 500)["team"] == "x" * 80
    assert drawn("get_team", team="a") == drawn("get_team", team="a")
    assert len({drawn("get_team", team=str(n))["id"] for n in range(20)}) > 15


# ---------------------------------------------------------------------------------------------------------------------
# Settings, threads, repair


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("recorded", {}, "expected one of auto, local, simulated"),
        ("auto", {"failure_rate": 1.5}, "from 0 to 1"),
        ("auto", {"instability_rate": -0.1}, "from 0 to 1"),
        ("auto", {"instability_rate": math.nan}, "from 0 to 1"),
        ("auto", {"instability_rate": 0.6, "failure_rate": 0.5}, "at most 1"),
    ],
)
def test_settings_that_cannot_be(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        ToolExecutor(ExecutorSettings(kind, **settings))


def test_many_threads_get_what_one_gets(tools, can):
    asked = [request("Random/Random", "get_uuid", {"cnt": n}, dialogue=n % 6) for n in range(1, 25)]
    asked += [request("Set/Name", "g", {"a": n}, tools=MANY) for n in range(20)]
    if can["folder"]:
        asked += [request("File/file_operation", "write_file", {"text": str(n)}, dialogue=40 + n) for n in range(6)]
    alone, together = [tools(one).feedback for one in asked], [None] * len(asked)

    def work(first):
        for index in range(first, len(asked), 8):
            together[index] = tools(asked[index]).feedback

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and not tools.notices
    if can["folder"]:  # whichever thread wrote it
        assert [run_file(tools, "read_file", 40 + n, file_path="output.txt")[0] for n in range(6)] == [
            json.dumps(str(n)) for n in range(6)
        ]


def test_a_server_outlives_the_thread_that_started_it_and_serves_every_call():
    with ToolExecutor(ExecutorSettings("auto", servers=1)) as executor:
        starter = threading.Thread(target=lambda: executor(request("Random/Random", "get_uuid")))
        starter.start()
        starter.join()
        server = executor._local._servers[0]
        for _ in range(20):
            executor(request("Random/Random", "get_uuid"))
        assert executor._local._servers[0] is server and not executor.notices


def kill_server(executor):
    """Kill the server and wait for its end. The process inside its namespace lives a little longer than the outer one:
    until its end of the pipe is closed it would still answer."""
    server = executor._local._servers[0]
    server._child.process.kill()
    server._child.process.wait()
    closed = select.poll()
    closed.register(server._responses, 0)  # a hang-up is reported without being asked for
    assert closed.poll(10_000)


def test_a_server_that_is_killed_is_replaced_and_lost_files_are_told(can):
    if not can["folder"]:
        pytest.skip("the sandbox of this machine gives no folder")
    with ToolExecutor(ExecutorSettings("auto", servers=1)) as executor:
        before = result_of(executor, "get_uuid")
        run_file(executor, "write_file", 3, text="x")
        kill_server(executor)
        assert result_of(executor, "get_uuid") == before  # a pure call needs nothing that was lost
        assert len(executor.notices) == 1 and "started again; files lost of dialogues 3" in executor.notices[0]
        run_file(executor, "write_file", 3, text="x")
        kill_server(executor)
        asked = request("File/file_operation", "read_file", {"file_path": "output.txt"}, dialogue=3)
        told = executor(asked).feedback
        assert told == FILES_LOST and read_as(asked, told) == "tool_instability" and len(executor.notices) == 2
        assert "No such file" in executor(asked).feedback  # told once; from then on the folder is empty


@pytest.mark.parametrize(
    "layers",
    [(), ("seccomp",), ("landlock", "seccomp"), ("namespaces", "seccomp")],
    ids=lambda layers: "+".join(layers) or "none",
)
def test_where_a_machine_permits_less_only_pure_tools_are_local(layers):
    machine = socket.gethostname()
    with ToolExecutor(ExecutorSettings("auto", execute_code=True, servers=1, layers=layers)) as executor:
        assert result_of(executor, "get_uuid") and executor.limits_applied
        for tool_set, name, arguments in (
            ("File/file_operation", "read_file", {"file_path": "/etc/passwd"}),
            ("Execute/Execute", "execute_pycode", {"code:": "1"}),
            ("Execute/Execute", "execute_bash_code", {"commands": "true"}),
        ):
            assert executor(request(tool_set, name, arguments)).executor == "simulated"
        assert any("can give no folder" in notice for notice in executor.notices)
    assert socket.gethostname() == machine  # a server without namespaces of its own once renamed the machine


def test_server_refuses_a_request_that_is_too_long():
    server = ToolServer(seconds=5.0, memory_bytes=1 << 29)
    try:
        with pytest.raises(ValueError, match="expected at most"):
            server.call({"needs": "nothing", "arguments": "x" * (17 << 20)})
    finally:
        server.close()


def test_calls_of_the_call_grammar_reach_the_tools(tools, can):
    if not can["folder"]:
        pytest.skip("the sandbox of this machine gives no folder")
    call = parse_tool_call('execute_pycode(**{"code:": "print(1)"})')
    assert tools(ToolRequest(0, "Execute/Execute", DOCUMENTS["Execute/Execute"], call, 0)).feedback == '"1\\n"'
