"""Download of the benchmarks from a local server: hashes, resuming, faults of the network, masked keys."""

import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

import pytest

from data.json_records import DataError
from eval.benchmarks import BENCHMARKS
from eval.fetch_benchmarks import (
    ORIGINS,
    OriginFile,
    check_benchmark,
    fetch_files,
    files_of_benchmark,
    find_faults,
    main,
    mask_api_keys,
    read_origins,
)

REAL = Path(__file__).resolve().parents[3] / "shared/data/benchmarks"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def origin(path: str, content: bytes, url_path: str = "") -> OriginFile:
    return OriginFile(
        path=path,
        url_path=url_path or f"/owner/repo/commit/{path}",
        size=len(content),
        sha256=sha256(content),
        source_sha256=sha256(content),
    )


class Server(http.server.ThreadingHTTPServer):
    """Answers with `answers[path]`: a body, a status, or a list of them, one per request; counts requests."""

    answers: dict
    requests: list


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        answer = self.server.answers.get(self.path, 404)
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        self.send_response(answer if isinstance(answer, int) else 200)
        self.end_headers()
        if isinstance(answer, bytes):
            self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("eval.fetch_benchmarks.BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr("eval.fetch_benchmarks.TIMEOUT_SECONDS", 0.5)
    running = Server(("127.0.0.1", 0), Handler)
    running.answers, running.requests = {}, []
    running.host = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def fetch(files, folder, server):
    return sorted(fetch_files(files, folder, server.host))


def test_files_arrive_whole_and_are_not_asked_for_again(server, tmp_path):
    files = [origin("a/one.json", b"[1]"), origin("a/b/two.txt", b"two\n", "/o/r/c/with blank/two#.txt")]
    server.answers = {"/owner/repo/commit/a/one.json": b"[1]", "/o/r/c/with%20blank/two%23.txt": b"two\n"}
    assert fetch(files, tmp_path, server) == ["a/b/two.txt", "a/one.json"]
    assert (tmp_path / "a/one.json").read_bytes() == b"[1]" and (tmp_path / "a/b/two.txt").read_bytes() == b"two\n"
    server.requests.clear()
    (tmp_path / "a/one.json").unlink()  # what an interruption leaves: some files there, some not, one unfinished
    (tmp_path / "a/one.json.unfinished").write_bytes(b"[")
    assert len(fetch(files, tmp_path, server)) == 2
    assert server.requests == ["/owner/repo/commit/a/one.json"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b", "one.json"]


@pytest.mark.parametrize("body", [b"[2]", b"", b"[1]\n", b"x" * 10_000])
def test_other_contents_are_refused_and_not_written(server, tmp_path, body):
    server.answers = {"/owner/repo/commit/one.json": body}
    with pytest.raises(DataError, match=r"one\.json: found \d+ bytes with sha256 .*, expected sha256 [0-9a-f]{16}"):
        fetch([origin("one.json", b"[1]")], tmp_path, server)
    assert not list(tmp_path.iterdir())


def test_an_altered_file_on_disk_is_kept_and_named(server, tmp_path):
    (tmp_path / "one.json").write_bytes(b"mine")
    with pytest.raises(DataError, match="found 4 bytes with sha256 .* delete it to download it again"):
        fetch([origin("one.json", b"[1]")], tmp_path, server)
    assert (tmp_path / "one.json").read_bytes() == b"mine" and not server.requests


def test_passing_faults_are_tried_again_lasting_ones_are_not(server, tmp_path):
    path = "/owner/repo/commit/one.json"
    server.answers = {path: [503, 429, b"[1]"]}
    assert fetch([origin("one.json", b"[1]")], tmp_path / "a", server) == ["one.json"]
    assert len(server.requests) == 3
    server.answers = {path: [500]}
    with pytest.raises(DataError, match=r"HTTP status 500 \(attempt 4\)"):
        fetch([origin("one.json", b"[1]")], tmp_path / "b", server)
    server.requests.clear()
    server.answers = {}
    with pytest.raises(DataError, match=r"HTTP status 404 \(attempt 1\)"):
        fetch([origin("one.json", b"[1]")], tmp_path / "b", server)
    assert len(server.requests) == 1 and not (tmp_path / "b").exists()


def test_no_network_is_one_line_and_code_2(server, tmp_path, capsys):
    server.shutdown()
    server.server_close()  # nobody listens on the port now
    code = main(["--benchmark_dir", str(tmp_path), "--only", "gsm8k", "--host", server.host])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert re.search(r"gsm8k|grade-school-math", err) and "expected the file" in err


def test_a_server_that_says_nothing_does_not_hang(server, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.fetch_benchmarks.ATTEMPTS", 1)
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.server.released.wait(5))
    server.released = threading.Event()
    with pytest.raises(DataError, match="timed out"):
        fetch([origin("one.json", b"[1]")], tmp_path, server)
    server.released.set()


def test_api_keys_are_masked_before_anything_is_written(server, tmp_path):
    gold = r'"Action_Input": "{\"api_key\": \"%s\", \"base\": \"USD\"}"'
    other = r'"Function_Description": "{\"api_key\": \"Required. string. A key.\"}"'
    source = f"[{{{gold % '0123abcd'}, {other}}}]".encode()
    masked = f"[{{{gold % 'MASKED_API_KEY'}, {other}}}]".encode()
    assert mask_api_keys(source) == masked and json.loads(masked)
    file = OriginFile("t.json", "/t.json", len(masked), sha256(masked), sha256(source))
    server.answers = {"/t.json": source}
    assert fetch([file], tmp_path, server) == ["t.json"]
    assert (tmp_path / "t.json").read_bytes() == masked
    with pytest.raises(DataError, match="after masking"):
        fetch([OriginFile("u.json", "/t.json", len(masked), "0" * 64, sha256(source))], tmp_path, server)


def test_check_needs_no_network_and_names_the_first_fault(tmp_path, capsys, monkeypatch):
    files = [origin("gsm8k/test.jsonl", b"{}\n"), origin("gsm8k/LICENSE", b"MIT\n")]
    monkeypatch.setattr("eval.fetch_benchmarks.read_origins", lambda path: files)
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_bytes(b"{}\n")
    assert len(find_faults(files, tmp_path)) == 1
    assert main(["--benchmark_dir", str(tmp_path), "--check"]) == 2
    err = capsys.readouterr().err
    assert "LICENSE: found no such file" in err and "(1 of 2 files missing or altered)" in err
    check_benchmark(BENCHMARKS["gsm8k"], tmp_path)  # the licence is not read by the evaluator
    (tmp_path / "gsm8k/test.jsonl").write_bytes(b"{}")
    with pytest.raises(DataError, match="found 2 bytes"):
        check_benchmark(BENCHMARKS["gsm8k"], tmp_path)
    (tmp_path / "gsm8k/test.jsonl").write_bytes(b"{}\n")
    (tmp_path / "gsm8k/LICENSE").write_bytes(b"MIT\n")
    assert main(["--benchmark_dir", str(tmp_path), "--check"]) == 0
    assert "all 2 files as published" in capsys.readouterr().out


def test_wrong_flags_are_one_line_and_code_2(tmp_path, capsys):
    for flags in (["--only", "nonsense"], ["--check", "--nonsense"]):
        with pytest.raises(SystemExit) as caught:
            main(["--benchmark_dir", str(tmp_path), *flags])
        assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_list_covers_every_benchmark_and_is_well_formed():
    files = read_origins(ORIGINS)
    assert len({file.path for file in files}) == len(files) == 247
    for file in files:
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256) and re.fullmatch(r"[0-9a-f]{64}", file.source_sha256)
        assert re.fullmatch(r"/[\w-]+/[\w-]+/[0-9a-f]{40}/.+", file.url_path) and file.size > 0
        assert not Path(file.path).is_absolute() and ".." not in file.path.split("/")
    assert [file.path for file in files if file.sha256 != file.source_sha256] == [BENCHMARKS["toolalpaca"].path]
    counts = {name: len(files_of_benchmark(each, files)) for name, each in BENCHMARKS.items() if each.published}
    assert counts == {**dict.fromkeys(counts, 1), "bfcl-exec": 4, "mmlu": 115, "tooleyes": 101}


def test_real_files_have_the_listed_hashes():
    if not REAL.is_dir():
        pytest.skip("the benchmark files are not beside this checkout")
    assert not find_faults(read_origins(ORIGINS), REAL)
