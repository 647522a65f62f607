"""Run foreign Python code in a child process that can neither harm the machine nor declare itself right.

    run_python   a whole program: its output and exit code, which the program itself controls
    run_check    a function against a test: the verdict of a second process, which the function's process cannot reach
    ToolServer   one process that forks a child for each of many tool calls

eval/sandbox/limits.py confines the child, eval/sandbox/child.py gives the order, docs/sandbox.md the reasons. This file
is the side that starts the processes, keeps the clock, collects output and kills.
"""

import json
import os
import secrets
import select
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from eval.sandbox.child import MAX_FRAME_BYTES
from eval.sandbox.limits import LAYERS

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 30.0  # a child that has not reported its limits by then never will; reached only on a starved machine
ANSWER_SECONDS = 20.0  # in addition to a call's own time, for the tool server to end it and to answer
LAUNCHER_SECONDS = 5.0  # for the launcher to kill its namespace and end; then it is killed too
POLL_SECONDS = 0.005
READ_BYTES = 65536
FILE_BYTES = 1 << 20  # each file that a sandboxed program may write
FOLDER_BYTES = 16 << 20  # all its files; in a tool server those of one dialogue
REASON_CHARACTERS = 300
_process_of_folder: dict[str, subprocess.Popen | None] = {}  # of the sandboxes that this process has open
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime")


class SandboxError(OSError):
    """The sandbox itself could not start; this says nothing about the program."""


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """What a program did; the program controls all of it, except `timed_out` and `limits_applied`."""

    exit_code: int  # 128 + signal number if a signal ended it, as shells count; 137 when killed
    stdout: str  # at most `output_bytes` of it, undecodable bytes replaced
    stderr: str  # likewise
    timed_out: bool  # True: killed after `seconds`
    is_output_cut: bool  # True: stdout or stderr was longer than `output_bytes`; the rest was discarded
    limits_applied: dict[str, str]  # limit -> what took effect on this machine, e.g. "network": "none (seccomp)"

    @property
    def passed(self) -> bool:
        """True if the program ended by itself with code 0: no verdict on tests, since os._exit(0) does that too."""
        return self.exit_code == 0 and not self.timed_out


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Verdict on a function."""

    passed: bool
    reason: str  # "" if passed, else `<kind>: <detail>`, one line; kinds in docs/sandbox.md
    limits_applied: dict[str, str]


@dataclass(slots=True)
class _Child:
    """A running child: its pipes and what has been read from them so far."""

    process: subprocess.Popen
    control: BinaryIO  # one line when ready, end of file when every process of the child has ended or closed it
    output_bytes: int
    has_launcher: bool = False  # `process` only waits for the program, which is in a namespace of its own
    has_ended: bool = False  # `control` is at its end: the program may have closed it
    is_cut: bool = False
    report: dict = field(default_factory=dict)  # what it said when it was ready
    received: dict[str, bytearray] = field(
        default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray(), "control": bytearray()}
    )

    def is_gone(self) -> bool:
        """Whether its process has ended, which no program can feign; with a launcher that is the last of all."""
        return self.has_ended and self.process.poll() is not None

    def streams(self) -> dict[str, BinaryIO]:
        """The read ends, by the names in `received`."""
        return {"stdout": self.process.stdout, "stderr": self.process.stderr, "control": self.control}


# ---------------------------------------------------------------------------------------------------------------------
# Public


def run_python(
    program: str, *, seconds: float, memory_bytes: int, output_bytes: int = 65536, layers: Sequence[str] = LAYERS
) -> SandboxResult:
    """Run the text of a Python program as `__main__`, in its own empty folder, with nothing on stdin.

    It gets `seconds` of wall time from its first line, one second more of CPU time, `memory_bytes` of address space,
    and, where it may write at all, FILE_BYTES per file and FOLDER_BYTES in all. `layers` can leave some out, as on
    a machine without them. Raises SandboxError if the child cannot start, or as root where there is no seccomp.
    """
    job = {
        "mode": "script",
        "program": program,
        "seconds": seconds,
        "memory_bytes": memory_bytes,
        "output_bytes": output_bytes,
        "file_bytes": FILE_BYTES,
        "folder_bytes": FOLDER_BYTES,
        "layers": list(layers),
    }
    with _started(job, pipes=()) as child:
        limits = _wait_until_ready([child])
        timed_out = not _follow([child], time.monotonic() + seconds, child.is_gone)
        exit_code = _kill(child)
        # Read what is left in the pipes: their other ends are closed, so this ends as soon as all is read.
        _follow([child], time.monotonic() + 1.0, lambda: all(stream.closed for stream in child.streams().values()))
    return SandboxResult(
        exit_code=exit_code,
        stdout=_text(child, "stdout"),
        stderr=_text(child, "stderr"),
        timed_out=timed_out,
        is_output_cut=child.is_cut,
        limits_applied=limits,
    )


def run_check(
    solution: str, *, entry_point: str, checker: str, seconds: float, memory_bytes: int, layers: Sequence[str] = LAYERS
) -> CheckResult:
    """Judge the function `entry_point` of the Python text `solution` with `check(candidate)` of the text `checker`.

    Two sandboxed processes: one loads the solution and answers calls, the other runs the test, whose `candidate` sends
    arguments and receives results as plain values (eval/sandbox/child.py). The solution passes if `check` returns
    and its own process then ends by itself, all within `seconds`. Raises SandboxError like run_python.
    """
    token = secrets.token_hex(16)
    shared = {
        "entry_point": entry_point,
        "seconds": seconds,
        "memory_bytes": memory_bytes,
        "output_bytes": 4096,
        "file_bytes": FILE_BYTES,
        "folder_bytes": FOLDER_BYTES,
        "layers": list(layers),
    }
    with ExitStack() as stack:
        (request_out, request_in), (response_out, response_in), (verdict_out, verdict_in) = (
            _pipe(stack) for _ in range(3)
        )
        serving = shared | {
            "mode": "serve",
            "program": solution,
            "requests": request_out.fileno(),
            "responses": response_in.fileno(),
        }
        checking = shared | {
            "mode": "check",
            "program": checker,
            "requests": request_in.fileno(),
            "responses": response_out.fileno(),
            "verdict": verdict_in.fileno(),
            "token": token,
        }
        candidate = stack.enter_context(_started(serving, (request_out, response_in)))
        judge = stack.enter_context(_started(checking, (request_in, response_out, verdict_in)))
        for end in (request_out, request_in, response_out, response_in, verdict_in):
            end.close()  # otherwise no process would ever see that another one closed the pipe
        limits = _wait_until_ready([candidate, judge])
        deadline = time.monotonic() + seconds
        is_judged = _follow([candidate, judge], deadline, judge.is_gone)
        reason = read_verdict(verdict_out, judge, token) if is_judged else "timed out"
        if not reason and not _follow([candidate], deadline, candidate.is_gone):
            reason = "timed out: after the test, at its end or in threads"
        if reason.startswith("process ended"):
            _follow([candidate], time.monotonic() + 1.0, lambda: candidate.has_ended)
            reason = _reason_of_end(candidate, reason)
    return CheckResult(passed=not reason, reason=reason, limits_applied=limits)


class ToolServerEnded(SandboxError):
    """The tool server ended or does not answer: the files of its dialogues are gone."""


class ToolServer:
    """A sandboxed process that answers tool calls, one at a time (eval/sandbox/tool_server.py), until it is closed.

    State: the process with its pipes. A call has `seconds` of wall time and `memory_bytes` of address space; a dialogue
    has FOLDER_BYTES for its files. Only one thread at a time may use it. Raises SandboxError if it cannot start.
    """

    def __init__(self, *, seconds: float, memory_bytes: int, layers: Sequence[str] = LAYERS) -> None:
        self._seconds, self._stack = seconds, ExitStack()
        # Even if it is never closed: otherwise its empty folder would remain.
        self.close = weakref.finalize(self, self._stack.close)
        try:
            requests_out, self._requests = _pipe(self._stack)
            self._responses, responses_in = _pipe(self._stack)
            job = {
                "seconds": seconds,
                "memory_bytes": memory_bytes,
                "file_bytes": FILE_BYTES,
                "folder_bytes": FOLDER_BYTES,
                "output_bytes": 4096,
                "layers": list(layers),
                "requests": requests_out.fileno(),
                "responses": responses_in.fileno(),
            }
            self._child = self._stack.enter_context(
                _started(job, (requests_out, responses_in), "eval.sandbox.tool_server")
            )
            requests_out.close()
            responses_in.close()
            self.limits_applied = _wait_until_ready([self._child])
            self.abilities: dict[str, bool] = self._child.report["abilities"]  # "folder", "programs"
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process that ends last."""
        return self._child.process.pid

    def call(self, request: dict) -> tuple[str, int, str]:
        """(status, exit code, text) of a request as eval/sandbox/tool_server.py describes it.

        Raises ToolServerEnded if the server is gone or does not answer, ValueError for a request that is too long.
        """
        body = json.dumps(request).encode("ascii")
        if len(body) > MAX_FRAME_BYTES:
            raise ValueError(f"found a request of {len(body)} bytes, expected at most {MAX_FRAME_BYTES}")
        deadline = time.monotonic() + self._seconds + ANSWER_SECONDS
        self._send(body)
        (length,) = struct.unpack("<I", self._receive(4, deadline))
        status, code, text = json.loads(self._receive(length, deadline))
        return status, code, text

    def forget(self, dialogue: int) -> None:
        """Remove a dialogue's files. Raises ToolServerEnded."""
        self._send(json.dumps({"forget": dialogue}).encode("ascii"))

    def _send(self, body: bytes) -> None:
        message = memoryview(struct.pack("<I", len(body)) + body)
        try:
            while message:
                message = message[self._requests.write(message) :]
        except (BrokenPipeError, ValueError):  # ValueError: closed
            raise ToolServerEnded(f"the tool server ended{_with_colon(self._end())}") from None

    def _receive(self, count: int, deadline: float) -> bytes:
        received, watched = bytearray(), select.poll()
        watched.register(self._responses, select.POLLIN)
        while len(received) < count:
            ready = watched.poll(1000 * max(0.0, deadline - time.monotonic()))
            piece = self._responses.read(count - len(received)) if ready else b""
            if not piece:
                reason = self._end() if ready else "it does not answer"
                raise ToolServerEnded(f"the tool server ended{_with_colon(reason)}")
            received += piece
        return bytes(received)

    def _end(self) -> str:
        return f"exit code {_kill(self._child)}"


# ---------------------------------------------------------------------------------------------------------------------
# Start


def _pipe(stack: ExitStack) -> tuple[BinaryIO, BinaryIO]:
    read_end, write_end = os.pipe()
    return (
        stack.enter_context(os.fdopen(read_end, "rb", buffering=0)),
        stack.enter_context(os.fdopen(write_end, "wb", buffering=0)),
    )


@contextmanager
def _started(job: dict, pipes: Sequence[BinaryIO], module: str = "eval.sandbox.child") -> Iterator[_Child]:
    """A child that works on `job`, with `pipes` open in it too; afterwards it and its folder are always gone."""
    folder = os.path.join(tempfile.gettempdir(), f"sandbox_{os.getpid()}_{secrets.token_hex(8)}")
    with ExitStack() as stack:
        stack.callback(_remove, folder)
        _process_of_folder[folder] = None
        os.mkdir(folder, 0o700)
        control_out, control_in = _pipe(stack)
        job = job | {
            "root": str(ROOT),
            "folder": folder,
            "control": control_in.fileno(),
            "readable": _readable(),
            "site_packages": sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}),
        }
        # An empty environment: this process's may hold keys. -s -S: no startup files of the user or of packages.
        environment = {
            "PATH": os.defpath,
            "HOME": folder,
            "TMPDIR": folder,
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-m", module],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=[control_in.fileno(), *(pipe.fileno() for pipe in pipes)],
        )
        _process_of_folder[folder] = process
        child = _Child(process=process, control=control_out, output_bytes=job["output_bytes"])
        stack.callback(_close, child)
        control_in.close()
        try:
            process.stdin.write(json.dumps(job).encode("ascii"))
            process.stdin.close()
        except BrokenPipeError:
            pass  # _wait_until_ready reports what is wrong
        yield child


def _remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _process_of_folder.pop(folder, None)


def end_sandboxes() -> None:
    """End the sandboxes of this process and remove their folders, at its own end, from any thread."""
    while _process_of_folder:
        folder, process = _process_of_folder.popitem()
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # those in its namespace end with it
        shutil.rmtree(folder, ignore_errors=True)


def _readable() -> list[str]:
    """Folders without which Python cannot import its library; never "/" itself."""
    found = {
        sys.prefix,
        sys.base_prefix,
        sys.base_exec_prefix,
        os.path.dirname(os.path.realpath(sys.executable)),
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
    }
    return sorted(path for path in found if path not in ("", "/")) + list(SYSTEM_FOLDERS)


def _wait_until_ready(children: Sequence[_Child]) -> dict[str, str]:
    """The limits in force, once all children have reported them. Raises SandboxError if one does not."""
    _follow(
        children,
        time.monotonic() + START_SECONDS,
        lambda: all(b"\n" in child.received["control"] or child.has_ended for child in children),
    )
    limits: dict[str, str] = {}
    for child in children:
        line = bytes(child.received["control"]).partition(b"\n")[0]
        message = json.loads(line) if line else {}
        if "limits" not in message:
            reason = message.get("error") or _last_line(child) or "no report from the child"
            raise SandboxError(f"the sandbox did not start: {reason}")
        child.report, child.has_launcher, limits = message, message["has_launcher"], message["limits"]
    return limits


# ---------------------------------------------------------------------------------------------------------------------
# Follow


def _follow(children: Sequence[_Child], deadline: float, is_done: Callable[[], bool]) -> bool:
    """Collect what the children write until `is_done()` or the deadline (of time.monotonic); True if done.

    Output beyond `output_bytes` per stream is read and discarded: a program that prints much does not suffer, and the
    clock stops one that prints without end.
    """
    with selectors.DefaultSelector() as selector:
        for child in children:
            for name, stream in child.streams().items():
                if not stream.closed:
                    selector.register(stream, selectors.EVENT_READ, (child, name))
        while not is_done():
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                return False
            if any(child.has_ended for child in children):  # the end of a process itself is no event of a pipe
                seconds_left = min(seconds_left, POLL_SECONDS)
            for key, _ in selector.select(seconds_left):
                child, name = key.data
                if not _receive(child, name, key.fd):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
    return True


def _receive(child: _Child, name: str, pipe: int) -> bool:
    """Read the bytes available, up to the room left; False at the end of the pipe."""
    piece = os.read(pipe, READ_BYTES)
    room = child.output_bytes - len(child.received[name])
    child.received[name] += piece[:room]
    child.is_cut |= len(piece) > room
    child.has_ended |= name == "control" and not piece
    return bool(piece)


def _kill(child: _Child) -> int:
    """End all processes of the child at once and wait until they are gone; the exit code as shells count."""
    if child.has_launcher:
        # The launcher kills the namespace and ends after it. If it were killed itself, some processes would still be
        # dying.
        child.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(LAUNCHER_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)
    code = child.process.wait()
    return code if code >= 0 else 128 - code


def _close(child: _Child) -> None:
    _kill(child)
    for stream in (child.process.stdin, *child.streams().values()):
        with suppress(BrokenPipeError):
            stream.close()


def _text(child: _Child, name: str) -> str:
    return child.received[name].decode("utf-8", errors="replace")


def _last_line(child: _Child) -> str:
    lines = _text(child, "stderr").strip().splitlines()
    return lines[-1][:REASON_CHARACTERS] if lines else ""


# ---------------------------------------------------------------------------------------------------------------------
# Verdict


def read_verdict(pipe: BinaryIO, judge: _Child, token: str) -> str:
    """The judge's reason, "" for passed. Without a line that carries the token the test did not finish."""
    for line in (pipe.read(READ_BYTES) or b"").splitlines():
        with suppress(ValueError, TypeError, KeyError):
            message = json.loads(line)
            if secrets.compare_digest(message["token"], token):
                return str(message["reason"])
    return f"no verdict: the test ended early{_with_colon(_last_line(judge))}"


def _reason_of_end(candidate: _Child, otherwise: str) -> str:
    if not candidate.has_ended:
        return otherwise
    return f"process ended: exit code {_kill(candidate)}{_with_colon(_last_line(candidate))}"


def _with_colon(text: str) -> str:
    return f": {text}" if text else ""
