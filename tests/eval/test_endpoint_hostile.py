"""eval/predict/endpoint.py against servers that drip, never end or quote the key: time is bounded, the key hidden."""

import socket
import subprocess
import threading
import time
from contextlib import suppress
from urllib.parse import quote

import pytest

from eval.predict import endpoint as endpoint_module
from eval.predict.endpoint import EndpointError, ask, ask_records, check_key_variable, check_url, hide_key
from eval.records import Record
from tests.eval.test_endpoint import completion, serve  # noqa: F401, a fixture
from tests.support.endpoint_server import KEY, Server
from tests.support.eval_runs import flags_of, run_here

SECONDS = 0.4  # of one request
HEAD = b"HTTP/1.1 200 OK\r\n"


class RawServer:
    """Sends each connection the bytes of `script()`, piece by piece, until the other side hangs up."""

    def __init__(self, script, pause=0.02):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"

        def talk(connection):
            with suppress(OSError), connection:
                for piece in script():
                    connection.sendall(piece)
                    time.sleep(pause)

        def accept():
            with suppress(OSError):
                while True:
                    threading.Thread(target=talk, args=(self.listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()


def forever(*pieces):
    def script():
        yield pieces[0]
        while True:
            yield from pieces[1:]

    return script


DRIPS = {
    "silence": forever(b"", b""),
    "status line": forever(b"HTTP/1.1 2", b"0"),
    "one endless header": forever(HEAD + b"X: ", b"y"),
    "endless headers": forever(HEAD, b"X: y\r\n"),
    "endless 100 Continue": forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunk sizes": forever(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "chunks": forever(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "trailers": forever(HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n"),
    "a body without length": forever(HEAD + b'\r\n{"choices": [{"text": "ok"}]}', b" "),
    "a body of its length": forever(HEAD + b"Content-Length: 99999\r\n\r\n", b" "),
    "an error's body": forever(b"HTTP/1.1 500 Oops\r\n\r\n", b" "),
}


@pytest.mark.parametrize("drip", DRIPS)
def test_one_deadline_holds_for_the_whole_request(drip):
    server = RawServer(DRIPS[drip])
    endpoint = Server(None).endpoint(url=server.url, timeout_seconds=SECONDS, attempts=1)
    start = time.monotonic()
    with pytest.raises(EndpointError, match=r"found (no answer within 0.4 s|a broken connection|status 500)"):
        ask(endpoint, "/completions", {})
    assert time.monotonic() - start < SECONDS + 3  # the machine may be busy; without the deadline it never ends
    assert not endpoint.in_flight


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ((HEAD + b"X: " + b"y" * 70_000,), "broken connection"),
        ((HEAD, b"X: y\r\n" * 200), "broken connection"),
        ((HEAD + b"\r\n", b" " * 100_000), "more than 1000000 bytes"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\nXYZ\r\n",), "broken connection"),
        ((b"HTTP/1.1 302 Found\r\nLocation: http://[::bad\r\nContent-Length: 0\r\n\r\n",), "found status 302"),
    ],
)
def test_what_a_server_sends_at_full_speed_is_bounded_too(pieces, reason, monkeypatch):
    monkeypatch.setattr(endpoint_module, "MAX_ANSWER_BYTES", 1_000_000)
    server = RawServer(forever(*pieces, *(pieces[1:] or (b"",))), pause=0.0)
    endpoint = Server(None).endpoint(url=server.url, timeout_seconds=20.0, attempts=1)
    with pytest.raises(EndpointError, match=reason):
        ask(endpoint, "/completions", {})


def test_a_tls_handshake_that_never_ends():
    """The server speaks the first bytes of a TLS record and drips the rest."""
    server = RawServer(forever(b"\x16\x03\x03\x3f\xff", b"\x02"))
    url = server.url.replace("http:", "https:")
    endpoint = Server(None).endpoint(url=url, timeout_seconds=SECONDS, attempts=1)
    start = time.monotonic()
    with pytest.raises(EndpointError, match="found (no answer|no connection|a broken connection)"):
        ask(endpoint, "/completions", {})
    assert time.monotonic() - start < SECONDS + 3


def test_stop_ends_requests_in_flight():
    server = RawServer(DRIPS["silence"])
    endpoint = Server(None).endpoint(url=server.url, timeout_seconds=60.0)
    rows = ask_records(endpoint, [Record(0, "0", text="Q?")], prompt_format="tl", max_new_tokens=9, stop_texts=())
    timer = threading.Timer(0.3, endpoint.stop)
    timer.start()
    start = time.monotonic()
    with pytest.raises(EndpointError):
        next(rows)
    assert time.monotonic() - start < 10


# ---------------------------------------------------------------------------------------------------------------------
# The key


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"bad key {KEY}!", "bad key *************!"),
        ("begins sk-s.., ends ..-123", "begins ****.., ends ..****"),
        (KEY.upper(), "*" * 13),
        ("sk- and 123 are too short to say anything", "sk- and 123 are too short to say anything"),
        ("", ""),
    ],
)
def test_pieces_of_the_key_are_hidden(text, expected):
    assert hide_key(text, KEY) == expected  # of sk-secret-123
    assert hide_key("an ab", "ab") == "an **"


@pytest.mark.parametrize(
    "quoted",
    [
        KEY,
        KEY[:8] + "****",
        "x" * 196 + KEY,  # a cut at 200 characters leaves sk-s
        "x" * 296 + KEY,
        quote(KEY, safe=""),
        "".join(f"%{ord(each):02X}" for each in KEY),
        quote("".join(f"%{ord(each):02x}" for each in KEY)),
        "".join(f"&#{ord(each)};" for each in KEY),
        "".join(f"&#x{ord(each):x};" for each in KEY),
        "".join(f"\\u{ord(each):04x}" for each in KEY),
        "".join(f"\\x{ord(each):02X}" for each in KEY),
    ],
)
@pytest.mark.parametrize("shape", ["message", "text", "no choices"])
def test_no_piece_of_the_key_is_shown(serve, quoted, shape):  # noqa: F811
    answers = {
        "message": (401, {"error": {"message": f"wrong: {quoted}"}}, {}),
        "text": (500, f"<p>{quoted}".encode(), {}),
        "no choices": (200, f"{quoted}".encode(), {}),
    }
    server = serve(lambda *_: answers[shape])
    with pytest.raises(EndpointError) as caught:
        ask(server.endpoint(attempts=1), "/completions", {})
    message = str(caught.value).partition("/completions")[2]
    assert not any(KEY[start : start + 4] in message for start in range(len(KEY) - 3))
    assert not any(each in message for each in ("%73", "&#115;", "&#x73;", "u0073", "x73"))  # an s


@pytest.mark.parametrize(
    "url", ["http://me:pass-word@h/v1", "http:/me:pass-word@h", "http://h/v1?key=pass-word", "http://h/#pass-word"]
)
def test_passwords_in_a_url_are_refused_and_not_shown(url, tmp_path):
    with pytest.raises(ValueError, match="expected") as caught:
        check_url(url)
    assert "pass-word" not in str(caught.value)
    code, out, err = run_here([*flags_of(tmp_path, tmp_path / "run", endpoint=url)])
    assert code == 2 and "pass-word" not in out + err and err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "value",
    [
        "sk-proj-abc123",
        "sk_live_4eC39HqLyjW",
        "hf_AbCdEfGhIjKlMnOpQrStUvWx",
        "0123456789ABCDEF0123456789ABCDEF",
        "A123456789ABCDEF0123456789ABCDEF",
        "gsk4u7n2k9q8w3e5r6t1y0zab",
        "$OPENAI_API_KEY",
        "Bearer abc",
        "abc\x07def",
        "",
    ],
)
def test_a_key_instead_of_its_variable_is_refused_and_not_shown(value, tmp_path):
    with pytest.raises(ValueError, match="expected the name of the environment variable") as caught:
        check_key_variable(value)
    assert not value or value not in str(caught.value)
    code, out, err = run_here([*flags_of(tmp_path, tmp_path / "run", endpoint_key=value)])
    assert code == 2 and err.count("\n") == 1 and err.startswith("--endpoint_key: found")
    assert not value or value.rstrip("def") not in out + err


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "my_key", "_K2", "AZURE_OPENAI_KEY_FOR_GPT4_TESTS"])
def test_names_of_variables_are_taken(name):
    check_key_variable(name)


def test_a_variable_that_looks_like_a_key_is_taken_where_it_exists(monkeypatch):
    monkeypatch.setenv("sk_of_the_lab", "x")
    check_key_variable("sk_of_the_lab")


def test_no_file_of_a_run_holds_the_key(serve, tmp_path, monkeypatch):  # noqa: F811
    """A refusal that quotes the key becomes a row, a notice and a line of the report."""

    def script(number, path, body):
        return completion("ok") if number % 2 else (400, {"error": {"message": f"no {KEY} {KEY[:9]}"}}, {})

    monkeypatch.setenv("SOME_KEY", KEY)
    server = serve(script)
    flags = flags_of("assets/tiny_data", tmp_path / "run", endpoint=server.url, endpoint_key="SOME_KEY", limit=6)
    monkeypatch.setattr("sys.argv", ["run_eval.py", *flags])  # environment.json holds the command
    code, out, err = run_here(flags)
    assert code == 0, err
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, _, headers in server.requests)
    texts = [out, err, *(path.read_bytes().decode("latin-1") for path in (tmp_path / "run").rglob("*.json*"))]
    texts += [(tmp_path / "run/report.md").read_text()]
    assert len(texts) >= 8 and not any(KEY[:6] in text or KEY[-6:] in text for text in texts)
    assert "status 400 (no *************" in out
    assert subprocess.run(["grep", "-rl", KEY, tmp_path / "run"], capture_output=True).stdout == b""
