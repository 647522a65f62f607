"""eval/predict/endpoint.py against a scripted server on 127.0.0.1: answers in all formats, faults."""

import threading
import time

import pytest

from data.formats.table import COMPLETION_FORMATS, FORMATS, parse_output, prompt_text, render_output
from data.tool_calls import ToolCall
from data.trajectories import Message
from eval.predict import endpoint as endpoint_module
from eval.predict.endpoint import Endpoint, EndpointError, ask, ask_record, ask_records, check_url
from eval.records import Record
from tests.support.endpoint_server import KEY, Server

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "finds",
            "parameters": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
        },
    }
]
CALL = ToolCall("search", {"q": "caf\u00e9"})


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(endpoint_module, "BACKOFF_SECONDS", 0.001)
    servers = []

    def start(script):
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def completion(text, reason="stop", **more):
    return 200, {"choices": [{"text": text, "finish_reason": reason, **more}]}, {}


def query(index=0, content="find \u00e9"):
    return Record(index, f"{index}", TOOLS, [Message(role="user", content=content)])


def ask_one(server, prompt_format, asked=None, stop_texts=None, **changes):
    return ask_record(
        server.endpoint(**changes),
        asked or query(),
        prompt_format=prompt_format,
        max_new_tokens=9,
        stop_texts=FORMATS[prompt_format].stop_strings if stop_texts is None else stop_texts,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize("prompt_format", [name for name in COMPLETION_FORMATS if name not in ("plain", "react")])
def test_completion_formats(serve, prompt_format):
    output = render_output([CALL], prompt_format)
    stops = FORMATS[prompt_format].stop_strings
    server = serve(lambda *_: completion(output + (stops[-1] + "more" if stops else "")))
    row = ask_one(server, prompt_format)
    assert row["stop"] == "end" and parse_output(row["output"], prompt_format) == [CALL]
    path, body, headers = server.requests[0]
    assert path == "/v1/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "m",
        "prompt": prompt_text(TOOLS, query().messages, prompt_format),
        "max_tokens": 9,
        "temperature": 0,
        **({"stop": list(stops)} if stops else {}),
    }


def test_openai_is_asked_by_chat_with_native_tool_calls(serve):
    message = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "search", "arguments": '{"q": "caf\\u00e9"}'}}
        ],
    }
    server = serve(lambda *_: (200, {"choices": [{"message": message, "finish_reason": "tool_calls"}]}, {}))
    row = ask_one(server, "openai")
    assert parse_output(row["output"], "openai") == [CALL] and row["stop"] == "end"
    path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions" and body["tools"] == TOOLS
    assert body["messages"] == [{"role": "user", "content": "find \u00e9"}] and "stop" not in body


def test_react_is_asked_by_chat_without_native_tools(serve):
    output = render_output([CALL], "react")
    server = serve(lambda *_: (200, {"choices": [{"message": {"content": output}, "finish_reason": "stop"}]}, {}))
    row = ask_one(server, "react")
    assert parse_output(row["output"], "react") == [CALL] and row["stop"] == "end"
    path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions" and "tools" not in body
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert '"search"' in body["messages"][0]["content"] and body["messages"][1]["content"] == "find \u00e9"


def test_text_queries_and_their_stops(serve):
    server = serve(lambda *_: completion("    return 1\nprint(2)", "length"))
    row = ask_one(server, "qwen25", Record(3, "3", text="def f():\n"), ("\nclass", "\ndef", "\n#", "\nif", "\nprint"))
    assert row == {"index": 3, "output": "    return 1", "stop": "end"}
    assert server.requests[0][1]["prompt"] == "def f():\n" and len(server.requests[0][1]["stop"]) == 4
    assert ask_one(server, "tl", Record(3, "3", text="def f():\n"), ())["stop"] == "max_new_tokens"
    chat = serve(lambda *_: (200, {"choices": [{"message": {"content": "12"}}]}, {}))
    assert ask_one(chat, "openai", Record(3, "3", text="6 + 6?"), ())["output"] == "12"
    assert "tools" not in chat.requests[0][1]


def test_choices_by_log_probability_with_fewer_shots_where_needed(serve):
    asked = Record(7, "7", instruction="law", shots=tuple(f"shot {i}" for i in range(5)), text="Q?", letters="ABCD")
    top = {" A": -2.0, "C": -0.5, " B": -1.0, "<0x0A>": -0.1, "AB": -0.2}

    def script(number, path, body):
        if body["prompt"].count("shot") > 3:
            return 400, {"error": {"message": "maximum context length is 9 tokens", "code": None}}, {}
        return completion("\n", "length", logprobs={"top_logprobs": [top]})

    server = serve(script)
    assert ask_one(server, "tl", asked) == {"index": 7, "output": " C", "stop": "end", "n_shots": 3}
    assert [body["prompt"].count("shot") for _, body, _ in server.requests] == [5, 4, 3]
    assert server.requests[0][1]["logprobs"] == 5 and server.requests[0][1]["max_tokens"] == 1
    chat = serve(lambda *_: (200, {"choices": [{"message": {"content": "B"}}]}, {}))
    assert ask_one(chat, "openai", asked)["output"] == "B"


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize(
    "faults",
    [
        [(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})],
        [(500, b"<html>oops", {}), (503, b"", {}), (408, b"", {})],
        [(200, b"<html>a proxy's page", {}), (200, b"[]", {}), (200, {"choices": []}, {})],
        [(200, b'{"choices": ', {}), (200, b"", {}), (200, b"[" * 100_000, {})],
        [(200, b"{}", {"Content-Length": "999"})],  # the connection ends before the body does
    ],
)
def test_faults_that_pass_are_tried_again(serve, faults):
    server = serve(lambda number, *_: faults[number] if number < len(faults) else completion("ok"))
    assert ask_one(server, "tl", timeout_seconds=0.5)["output"] == "ok"
    assert len(server.requests) == len(faults) + 1


def test_last_attempt_ends_with_one_line_without_the_key(serve):
    server = serve(lambda *_: (500, {"error": {"message": f"bad\nkey {KEY} \x1b[31m"}}, {}))
    with pytest.raises(EndpointError) as caught:
        ask(server.endpoint(), "/completions", {})
    message = str(caught.value)
    assert "found status 500 (bad\\nkey ************* \\x1b[31m) in attempt 4 of 4" in message and KEY not in message
    assert "\n" not in message and len(server.requests) == 4


@pytest.mark.parametrize("status", [301, 302, 307, 401, 403, 404])
def test_faults_that_stay_are_not_repeated(serve, status):
    other = serve(lambda *_: completion("stolen"))
    server = serve(lambda *_: (status, {"error": "no"}, {"Location": other.url}))
    with pytest.raises(EndpointError, match=rf"found status {status} \(no\), expected an answer"):
        ask(server.endpoint(), "/completions", {})
    assert len(server.requests) == 1 and not other.requests


def test_hanging_and_dripping_servers_time_out(serve):
    release = threading.Event()

    def hang(*_):
        release.wait(20)
        return completion("late")

    server = serve(hang)
    start = time.monotonic()
    with pytest.raises(EndpointError, match=r"found no answer within 0.2 s in attempt 2 of 2"):
        ask(server.endpoint(timeout_seconds=0.2, attempts=2), "/completions", {})
    release.set()
    assert time.monotonic() - start < 10


def test_no_server_at_all(serve):
    with pytest.raises(EndpointError, match=r"127.0.0.1:1/v1/completions: found no connection"):
        ask(Endpoint("http://127.0.0.1:1/v1", "m", "", 1.0, 2, 1), "/completions", {})


def test_too_long_answer_is_refused(serve, monkeypatch):
    monkeypatch.setattr(endpoint_module, "MAX_ANSWER_BYTES", 1000)
    server = serve(lambda *_: completion("x" * 2000))
    with pytest.raises(EndpointError, match="found an answer of more than 1000 bytes"):
        ask(server.endpoint(), "/completions", {})


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"text": None},
        {"text": 3},
        {"message": {}},
        {"message": []},
        {"message": {"content": ["x"], "tool_calls": 1}},
        {"message": {"tool_calls": [None, {"function": 3}]}},
        {"logprobs": [], "text": "x"},
    ],
)
def test_odd_choices_are_rows_not_crashes(serve, choice):
    server = serve(lambda *_: (200, {"choices": [choice]}, {}))
    asked = Record(0, "0", instruction="law", text="Q?", letters="ABCD")
    for prompt_format in ("tl", "openai"):
        assert isinstance(ask_one(server, prompt_format)["output"], str)
        assert isinstance(ask_one(server, prompt_format, asked)["output"], str)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def rows_of(server, count, **changes):
    queries = [query(index, f"find {index}.") for index in range(count)]
    return ask_records(server.endpoint(**changes), queries, prompt_format="tl", max_new_tokens=9, stop_texts=())


def test_refused_records_are_rows_others_go_on(serve):
    def script(number, path, body):
        if "find 3." in body["prompt"]:
            return 400, {"error": {"message": "invalid tool name", "code": "bad"}}, {}
        if "find 4." in body["prompt"]:
            return 400, {"error": {"message": "too long", "code": "context_length_exceeded"}}, {}
        return completion("ok")

    rows = {row["index"]: row for row in rows_of(serve(script), 30)}
    assert sorted(rows) == list(range(30))
    assert rows[3] == {"index": 3, "output": "", "stop": "refused", "error": "status 400 (invalid tool name, bad)"}
    assert rows[4]["stop"] == "prompt_too_long" and rows[5] == {"index": 5, "output": "ok", "stop": "end"}


def test_only_refusals_end_the_run(serve):
    server = serve(lambda *_: (400, {"error": {"message": "no tools here"}}, {}))
    with pytest.raises(EndpointError, match=r"found status 400 \(no tools here\) for each of the first"):
        list(rows_of(server, 30))
    assert len(server.requests) < 20
    assert [row["stop"] for row in rows_of(server, 3)] == ["refused"] * 3  # few: records, not the server


def test_answers_before_a_failure_are_given(serve):
    server = serve(lambda number, *_: completion("ok") if number < 10 else (401, b"", {}))
    rows = []
    with pytest.raises(EndpointError, match="status 401"):
        for row in rows_of(server, 30):
            rows.append(row)
    assert len(rows) == 10 and len(server.requests) <= 14


def test_requests_run_side_by_side(serve):
    barrier = threading.Barrier(4)

    def script(*_):
        barrier.wait(10)  # passes only with four requests at a time
        return completion("ok")

    assert len(list(rows_of(serve(script), 8, concurrency=4))) == 8


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "file:///etc/passwd",
        "ftp://h/v1",
        "http://",
        "http://h:x/v1",
        "http://h/v1?key=1",
        "http://h\n/v1",
        "http://[::1/v1",
    ],
)
def test_urls_that_are_none(url):
    with pytest.raises(ValueError, match="expected the base of an API"):
        check_url(url)
    check_url("https://api.example.org/v1")
