"""The inside of the tool server: a sandboxed process that forks once per tool call (eval/sandbox/run.py:ToolServer).

The server itself runs no foreign code. It keeps one folder in memory per dialogue. For each request it forks a process
that confines itself (more tightly than the server, which needs rights to make folders) and runs one local tool with
arguments that came as JSON. The server passes on unread what that process writes. When the process ends, or its time is
over, everything it started is killed.

A request is {"dialogue", "needs", ...} or {"forget": dialogue}. `needs` decides how it is answered:

    nothing    by a local tool that is a pure function (local_tools.py:answer_request, for the rest of the keys)
    folder     by one that also reads and writes in the dialogue's folder
    python     by running "code", in that folder (answer_code below)
    programs   by the program with arguments "program", in that folder

The answer is [status, exit code, text]; status is "ended", "timed out" or "no folder". The first three should write
JSON, but "code" can write what it likes.
"""

import ast
import io
import json
import math
import os
import select
import signal
import sys
import time
from code import InteractiveInterpreter
from contextlib import suppress

from eval.dialogues.local_tools import answer_request
from eval.sandbox.child import describe_limits, read_frame, report, separate, write_frame
from eval.sandbox.limits import (
    become_user,
    drop_privileges,
    filter_system_calls,
    mount_memory_folder,
    name_machine,
    restrict_files,
    set_resource_limits,
    show_folder_at,
    unmount_folder,
)

NOBODY = 65534  # runs programs instead of root, whose processes no limit counts
MAX_TEXT_BYTES = 65536  # longest text kept from a call
MAX_PROCESSES = 16  # per call that may start programs
PROGRAM_MEMORY_BYTES = 128 << 20  # for each process
CALL_FOLDERS = ("/srv", "/mnt", "/media")  # where a call sees its dialogue's folder: the first that can be used
PROGRAM_FOLDERS = ("/usr", "/bin", "/lib", "/lib64")
GONE_SECONDS = 5.0  # for killed processes to be gone; on a busy machine that takes a while
MACHINE_NAME = "sandbox"
MAX_CODE_CHARACTERS = 16384  # kept of what the code of a model writes


class Server:
    """State: what this machine permits, and the dialogues that have a folder."""

    def __init__(self, job: dict, is_in: dict[str, bool]) -> None:
        self.job, self.is_in = job, is_in
        self.folders: set[int] = set()
        used = [os.path.realpath(path) for path in (*job["readable"], job["folder"])]
        self.place = next(
            (
                place
                for place in CALL_FOLDERS
                if os.path.isdir(place) and not any(path == place or path.startswith(place + os.sep) for path in used)
            ),
            "",
        )

    def folder_of(self, dialogue: int) -> str | None:
        """The folder of a dialogue, made at its first call; None if the machine does not permit it."""
        folder = os.path.join(self.job["folder"], str(dialogue))
        if dialogue not in self.folders:
            os.mkdir(folder)
            if not mount_memory_folder(folder, self.job["folder_bytes"], mode=0o777):
                os.rmdir(folder)
                return None
            self.folders.add(dialogue)
        return folder

    def forget(self, dialogue: int) -> None:
        """Remove a dialogue's folder and what is in it."""
        if dialogue in self.folders:
            folder = os.path.join(self.job["folder"], str(dialogue))
            unmount_folder(folder)
            os.rmdir(folder)
            self.folders.remove(dialogue)

    def answer(self, request: dict) -> list:
        """[status, exit code, text] of one call."""
        folder = None
        if request["needs"] != "nothing":
            folder = self.folder_of(request["dialogue"])
            if folder is None:
                return ["no folder", 0, ""]
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            self._become_call(request, folder, write_end)
        os.close(write_end)
        try:
            text, has_ended = self._collect(child, read_end, time.monotonic() + self.job["seconds"])
        finally:
            os.close(read_end)
            code = kill_call(child)
        return ["ended" if has_ended else "timed out", code, text.decode("utf-8", errors="replace")]

    def _collect(self, child: int, pipe: int, deadline: float) -> tuple[bytes, bool]:
        """What the call writes, at most MAX_TEXT_BYTES of it, and whether it ended before the deadline.

        It has ended when its first process is gone, even if a child of it still holds the pipe open. Where the kernel
        cannot report that, the end of the pipe counts instead: there no call may start processes anyway.
        """
        os.set_blocking(pipe, False)
        watched = select.poll()
        watched.register(pipe, select.POLLIN)
        watched.register(self.job["requests"], 0)  # only to see whether the other side closes the pipe
        process = _open_process(child)
        if process is not None:
            watched.register(process, select.POLLIN)
        text, is_open, has_ended = bytearray(), True, False
        try:
            while not has_ended:
                seconds_left = deadline - time.monotonic()
                if seconds_left <= 0:
                    return bytes(text), False
                ready = dict(watched.poll(1000 * seconds_left))
                if self.job["requests"] in ready:
                    kill_call(child)
                    os._exit(0)
                if pipe in ready and _take(pipe, text) == "end":
                    watched.unregister(pipe)
                    is_open = False
                has_ended = process in ready if process is not None else not is_open
            while is_open and len(text) < MAX_TEXT_BYTES and _take(pipe, text) == "more":
                pass
        finally:
            if process is not None:
                os.close(process)
        return bytes(text), True

    def _become_call(self, request: dict, folder: str | None, pipe: int) -> None:
        """Be the process of one call: confine it, run it, end. Never returns."""
        code = 70
        try:
            os.setsid()
            runs_programs = request["needs"] == "programs"
            place = self.job["folder"]
            if folder is not None:
                if not show_folder_at(folder, self.place):
                    os._exit(71)
                place = self.place
            os.chdir(place)
            os.umask(0)
            self._connect(pipe)
            self._restrict(place, runs_programs=runs_programs, may_write=folder is not None)
            if runs_programs:
                os.execve(
                    request["program"][0],
                    request["program"],
                    {"PATH": "/usr/bin:/bin", "HOME": place, "TMPDIR": place, "LC_ALL": "C.UTF-8"},
                )
            answer = answer_code(request["code"]) if request["needs"] == "python" else answer_request(request)
            body = json.dumps(answer).encode("ascii")
            while body:
                body = body[os.write(1, body) :]
            code = 0
        except BaseException:  # noqa: BLE001 - the exit code reports it; this process must never continue as the server
            code = 72
        finally:
            os._exit(code)

    def _connect(self, pipe: int) -> None:
        """Leave only an empty input and the call's pipe as output open: the others are the server's."""
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(pipe, 1)
        os.dup2(pipe, 2)
        os.closerange(3, 1024)

    def _restrict(self, place: str, *, runs_programs: bool, may_write: bool) -> None:
        """Apply the limits of one call. Exits with 71 if a limit that the call needs is refused."""
        job = self.job
        memory_bytes = PROGRAM_MEMORY_BYTES if runs_programs else job["memory_bytes"]
        set_resource_limits(
            cpu_seconds=math.ceil(job["seconds"]) + 1,
            memory_bytes=memory_bytes,
            file_bytes=job["file_bytes"],
            open_files=64,
            processes=MAX_PROCESSES,
        )
        if runs_programs and os.getuid() == 0 and not become_user(NOBODY):
            os._exit(71)
        is_unprivileged = drop_privileges()
        has_landlock = (
            is_unprivileged
            and "landlock" in job["layers"]
            and restrict_files(
                ([] if runs_programs else job["readable"]) + [place] * may_write,
                [place] * may_write,
                PROGRAM_FOLDERS if runs_programs else (),
            )
        )
        has_seccomp = (
            is_unprivileged
            and "seccomp" in job["layers"]
            and filter_system_calls(deny_writes=not may_write, allow_processes=runs_programs)
        )
        if may_write and not (has_landlock and has_seccomp):
            os._exit(71)
        self.is_in |= {"landlock": has_landlock, "seccomp": has_seccomp}


def kill_call(child: int) -> int:
    """End all processes of a call and wait for them; the exit code of its first one, as shells count."""
    for kill in (os.killpg, os.kill):  # it may have ended before it made its own session
        with suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(ChildProcessError):
        while True:  # processes that made this one their parent
            os.waitpid(-child, 0)
    deadline = time.monotonic() + GONE_SECONDS
    with suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:  # others die a little later, and would count against the next call's limit
            os.killpg(child, 0)
            time.sleep(0.001)
    return code if code >= 0 else 128 - code


def _open_process(child: int) -> int | None:
    try:
        return os.pidfd_open(child)
    except (AttributeError, OSError):
        return None


def _take(pipe: int, text: bytearray) -> str:
    """Read the bytes available, up to the room left; return "more", "nothing" (yet) or "end"."""
    try:
        piece = os.read(pipe, MAX_TEXT_BYTES)
    except BlockingIOError:
        return "nothing"
    text += piece[: MAX_TEXT_BYTES - len(text)]
    return "more" if piece else "end"


class _Output(io.TextIOBase):
    """Keeps the first characters that are written."""

    def __init__(self) -> None:
        self.text, self.room = "", MAX_CODE_CHARACTERS

    def write(self, piece: str) -> int:
        """As for any text file; what does not fit is discarded."""
        kept = piece[: self.room]
        self.text += kept
        self.room -= len(kept)
        return len(piece)


class _Interpreter(InteractiveInterpreter):
    """Raises what the code raises, instead of writing a traceback."""

    def showtraceback(self) -> None:
        raise sys.exc_info()[1]

    def showsyntaxerror(self, filename: str | None = None) -> None:
        raise sys.exc_info()[1]


def answer_code(source: str) -> list:
    """Run Python code that a model wrote, as ToolEyes' `execute_pycode` does; only in the process of one call.

    Returns ["value", what the code wrote] or ["raised", the text of what it raised], at most MAX_CODE_CHARACTERS of it.
    Python's own interactive interpreter runs the code. What it prints is followed by the value of its last line if that
    is an expression, as at Python's prompt.
    """
    output = _Output()
    kept, sys.stdout, sys.stderr = sys.stdout, output, output
    try:
        tree = ast.parse(source.strip("\n"))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        interpreter = _Interpreter({"__name__": "__main__", "exit": sys.exit, "quit": sys.exit})
        interpreter.runsource(ast.unparse(tree) + "\n", "code", "exec")
        if last is not None:
            interpreter.runsource(ast.unparse(last) + "\n", "code", "single")
    except SystemExit:
        pass  # the code ended itself
    except BaseException as error:  # noqa: BLE001 - of any class, including one that the code defines
        return ["raised", _text_of(error)]
    finally:
        sys.stdout = kept
    return ["value", output.text]


def _text_of(error: BaseException) -> str:
    try:
        return (str(error) or type(error).__name__)[:MAX_CODE_CHARACTERS]
    except BaseException:  # noqa: BLE001 - its __str__ may be the code's own
        return "an error without text"


def find_abilities(server: Server) -> dict[str, bool]:
    """What calls can do on this machine, found out by trying: "folder" (files, Python code), "programs" (a shell)."""
    request = {"dialogue": -1}
    can_have_folder = bool(server.is_in["memory_folder"] and server.place) and server.answer(
        request | {"needs": "folder"}
    )[:2] == ["ended", 0]
    can_run = can_have_folder and server.answer(
        request | {"needs": "programs", "program": ["/bin/bash", "-c", "exit 33"]}
    )[:2] == ["ended", 33]
    server.forget(-1)
    return {"folder": can_have_folder, "programs": can_run}


def main() -> None:
    """Read the job on stdin, report the limits in force and what calls can do, then answer requests until the pipe
    closes.
    """
    job = json.loads(sys.stdin.buffer.read())
    sys.path[:] = [entry for entry in sys.path if entry not in ("", job["root"])] + job["site_packages"]
    sys.dont_write_bytecode = True
    is_in = separate(job, ends_with_parent=False, second_user=NOBODY)
    os.chdir(job["folder"])
    if is_in["namespaces"]:  # otherwise the whole machine would be renamed
        name_machine(MACHINE_NAME)
    server = Server(job, is_in)
    abilities = find_abilities(server)
    limits = describe_limits(job, is_in | _tried_limits(server) | {"may_write": abilities["folder"]})
    limits["wall_clock"] = f"{job['seconds']:g} s per call, then all its processes are killed"
    if abilities["programs"]:
        limits["processes"] = f"none (seccomp), or of a shell command {MAX_PROCESSES} (rlimit), killed with the call"
    report(job["control"], {"limits": limits, "has_launcher": is_in["namespaces"], "abilities": abilities})
    while True:
        try:
            request = read_frame(job["requests"])
        except EOFError:
            return
        if "forget" in request:
            server.forget(request["forget"])
        else:
            write_frame(job["responses"], server.answer(request))


def _tried_limits(server: Server) -> dict[str, bool]:
    """Whether Landlock and seccomp take effect, tried in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            server._restrict(server.job["folder"], runs_programs=False, may_write=False)
            os._exit(1 * server.is_in["landlock"] + 2 * server.is_in["seccomp"])
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (
        {"landlock": bool(code & 1), "seccomp": bool(code & 2)} if code > 0 else {"landlock": False, "seccomp": False}
    )


if __name__ == "__main__":
    main()
