"""SIGINT and SIGTERM in every phase of run_eval.py and while the three programs start: a polite end within seconds."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from eval.evaluate_tiny_multi import load_tiny_multi
from tests.eval.test_endpoint import completion
from tests.eval.test_evaluate_humaneval import problem
from tests.eval.test_run_eval_dialogues import gold_script
from tests.support.endpoint_server import Server
from tests.support.eval_runs import flags_of
from tests.support.processes import free_port, lines_in, start
from tests.support.tiny_run import ROOT, tiny_files

pytestmark = pytest.mark.slow  # processes

SECONDS = 5.0  # from the signal to the end
ASSETS = ROOT / "assets/tiny_data"
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def wait_until(is_so, seconds=60):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "the phase did not come"
        time.sleep(0.01)


def stop(running, number, code, what_next="what was answered is kept; the same command continues"):
    """Send the signal twice, as a shell and torchrun do; the end must be polite. Returns the lines of stderr."""
    asked = time.monotonic()
    running.send_signal(number)
    time.sleep(0.05)
    running.send_signal(number)
    out, err = running.communicate(timeout=30)
    took = time.monotonic() - asked
    assert running.returncode == code, err
    assert took < SECONDS, f"{took:.1f} s"
    assert "Traceback" not in out + err and "Error" not in out + err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("stopped")]
    assert lines == [f"stopped by {signal.Signals(number).name}; {what_next}"], err
    for pid in running.pids:
        assert not list(Path(tempfile.gettempdir()).glob(f"sandbox_{pid}_*"))
    return err


@pytest.fixture
def hanging():
    """A server that answers by `script` below n requests and no more from then on, until the test is over."""
    release, servers = threading.Event(), []

    def make(script, n):
        def answer(number, path, body):
            if number >= n:
                release.wait(60)
            return script(number, path, body)

        servers.append(Server(answer))
        return servers[-1]

    yield make
    release.set()
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("n_answers", [0, 10])
def test_while_an_endpoint_is_asked(hanging, tmp_path, number, code, n_answers):
    server = hanging(lambda *_: completion("ok"), n_answers)
    flags = flags_of(ASSETS, tmp_path, endpoint=server.url, endpoint_concurrency=3, limit=20)
    running = start("run_eval", flags)
    wait_until(lambda: len(server.requests) == n_answers + 3)
    wait_until(lambda: lines_in(tmp_path / "predictions", "*.jsonl") == n_answers)
    stop(running, number, code)
    assert lines_in(tmp_path / "predictions", "*.jsonl") == n_answers

    running = start("run_eval", flags)  # the same command asks for the others only
    wait_until(lambda: len(server.requests) == n_answers + 6)
    stop(running, number, code)
    asked = [body["prompt"] for _, body, _ in server.requests]
    assert not set(asked[:n_answers]) & set(asked[n_answers:])
    assert lines_in(tmp_path / "predictions", "*.jsonl") == n_answers


def test_while_dialogues_wait_for_an_endpoint_with_their_tools_open(hanging, tmp_path):
    server = hanging(gold_script(load_tiny_multi(ASSETS / "test_multi.jsonl"), "tl"), 6)
    flags = flags_of(
        ASSETS,
        tmp_path,
        endpoint=server.url,
        benchmarks="tiny-multi",
        endpoint_concurrency=2,
        max_turn_tokens=24,
        limit=9,
    )
    running = start("run_eval", flags)
    wait_until(lambda: len(server.requests) == 8)
    wait_until(lambda: lines_in(tmp_path / "predictions", "*.jsonl") >= 6)
    assert list(Path(tempfile.gettempdir()).glob(f"sandbox_{running.pids[0]}_*"))
    stop(running, signal.SIGTERM, 143)
    assert lines_in(tmp_path / "predictions", "*.jsonl") >= 6


@pytest.mark.parametrize("ranks", [1, 2])
def test_while_a_model_predicts(tmp_path, ranks):
    running = start("run_eval", flags_of(ASSETS, tmp_path, batch_size=1), ranks)
    wait_until(lambda: lines_in(tmp_path / "predictions", "*.jsonl") >= 5)
    stop(running, signal.SIGINT, 130)
    assert lines_in(tmp_path / "predictions", "*.jsonl") >= 5


def test_a_rank_that_waits_in_a_collective_is_ended_too(tmp_path):
    """Rank 0 is frozen, so that rank 1 waits for it in C++, where no signal handler of Python runs."""
    running = start("run_eval", flags_of(ASSETS, tmp_path, limit=6, batch_size=1), ranks=2)
    wait_until(lambda: lines_in(tmp_path / "predictions", "*.jsonl") >= 1)
    os.kill(running.pids[0], signal.SIGSTOP)
    wait_until(lambda: lines_in(tmp_path / "predictions", "*rank0001.jsonl") == 3)
    time.sleep(0.5)
    os.kill(running.pids[1], signal.SIGTERM)
    begun = time.monotonic()
    running.workers[1].join(30)
    assert time.monotonic() - begun < SECONDS and running.workers[1].exitcode == 143
    os.kill(running.pids[0], signal.SIGTERM)
    os.kill(running.pids[0], signal.SIGCONT)
    assert "Traceback" not in running.communicate()[1]


def test_while_code_of_a_model_is_scored(tmp_path):
    answers, predictions = tmp_path / "humaneval/HumanEval.jsonl", tmp_path / "p.jsonl"
    answers.parent.mkdir()
    answers.with_suffix(".jsonl").write_text("".join(json.dumps(problem(i)) + "\n" for i in range(20)))
    subprocess.run(["gzip", answers], check=True)
    endless = {"output": "    while True: pass\n"}
    predictions.write_text("".join(json.dumps({"index": i, **endless}) + "\n" for i in range(20)))
    changes = {"benchmarks": "humaneval", "check_files": "off", "execute_code": "on", "predictions": predictions}
    running = start("run_eval", flags_of(tmp_path, tmp_path / "run", **changes))
    wait_until(lambda: list(Path(tempfile.gettempdir()).glob(f"sandbox_{running.pids[0]}_*")))
    time.sleep(0.3)
    stop(running, signal.SIGTERM, 143)


@pytest.mark.parametrize("script", ["run_sft", "run_ppo", "run_eval"])
def test_while_data_are_read(tmp_path, script):
    """The data file is a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "test_seen.jsonl")
    flags = ["--model", tiny_files()[0], "--data", tmp_path / "test_seen.jsonl", "--output", tmp_path / "run"]
    running = start(script, flags_of(tmp_path, tmp_path / "run") if script == "run_eval" else flags)
    writers = []

    def is_reading():
        try:  # opens once there is a reader, who then waits as long as this end stays open
            writers.append(os.open(tmp_path / "test_seen.jsonl", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    wait_until(is_reading)
    what_next = () if script == "run_eval" else ("checkpoints are kept; the same command continues",)
    stop(running, signal.SIGTERM, 143, *what_next)
    os.close(writers[0])


def is_listening(port: int) -> bool:
    """Whether a process accepts connections at the port; read from Linux, since a connection would be one of a rank."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return any(int(row[1].rpartition(":")[2], 16) == port and row[3] == "0A" for row in rows)


@pytest.mark.parametrize("script", ["run_sft", "run_eval"])
def test_while_the_group_opens(tmp_path, script):
    """Rank 1 never comes."""
    flags = ["--model", tiny_files()[0], "--data", tiny_files()[1], "--output", tmp_path / "run"]
    running = start(script, flags_of(ASSETS, tmp_path / "run") if script == "run_eval" else flags, ranks=2)
    os.kill(running.pids[1], signal.SIGKILL)
    wait_until(lambda: is_listening(running.port))  # rank 0 has the store of the group, in which it waits
    os.kill(running.pids[0], signal.SIGINT)
    begun = time.monotonic()
    running.workers[0].join(30)
    assert time.monotonic() - begun < SECONDS and running.workers[0].exitcode == 130
    err = running.communicate()[1]
    assert "Traceback" not in err and err.startswith("stopped by SIGINT; ")


@pytest.mark.very_slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_under_torchrun(tmp_path, number):
    """torchrun adds a traceback of its own; the workers add one line, and end before it loses its patience."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    command += ["run_eval.py", *flags_of(ASSETS, tmp_path / "run", batch_size=1)]
    running = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: lines_in(tmp_path / "run/predictions", "*.jsonl") >= 5, seconds=120)
    asked = time.monotonic()
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert time.monotonic() - asked < SECONDS + 3
    assert err.count("stopped by") == 1 and 'run_eval.py", line' not in err
    assert lines_in(tmp_path / "run/predictions", "*.jsonl") >= 5
