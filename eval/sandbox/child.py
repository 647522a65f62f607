"""The inside of the sandbox: a process that eval/sandbox/run.py starts. It limits itself, then runs the program.

The job comes as JSON on stdin: {"mode", "program", "entry_point", "seconds", ...} as run.py:_start writes it.

    script   run the program as `__main__`
    serve    load the program, then answer calls of its function `entry_point` until the other side closes the pipe
    check    load the program, call its `check` with a proxy for the function of a `serve` process, report the outcome

`serve` and `check` talk over two pipes, in frames of four bytes length and JSON. Only values cross, never code. So the
process that runs foreign code can send only results, and the other alone judges them. Which of the values are one
object, and what a call changes in its arguments, crosses with them (eval/sandbox/values.py).
Steps: 1 namespaces and an own folder, 2 the program's file, 3 limits, 4 the report of what took effect, 5 the program.
"""

import importlib.util
import json
import math
import os
import runpy
import signal
import struct
import sys
from collections.abc import Callable
from types import ModuleType

from eval.sandbox.limits import (
    die_with_parent,
    drop_privileges,
    enter_namespaces,
    filter_system_calls,
    mount_memory_folder,
    restrict_files,
    set_resource_limits,
)
from eval.sandbox.values import SharedValues

MAX_FRAME_BYTES = 16 << 20  # longest arguments or result of one call
MAX_REASON_CHARACTERS = 300
MAX_PROCESSES = 64  # threads included, in the process namespace; without one the user's others would count too
MEBIBYTE = 1 << 20


class CandidateError(BaseException):
    """The function under test ended its process, or gave something that is not a plain value."""


# ---------------------------------------------------------------------------------------------------------------------
# Frames


def write_frame(pipe: int, message: object) -> None:
    """Send one message. Raises ValueError if it is longer than MAX_FRAME_BYTES."""
    body = json.dumps(message).encode("ascii")
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"found {len(body)} bytes of arguments or result, expected at most {MAX_FRAME_BYTES}")
    data = memoryview(struct.pack("<I", len(body)) + body)
    while data:
        data = data[os.write(pipe, data) :]


def read_frame(pipe: int) -> object:
    """Receive one message. Raises EOFError if the other side closed the pipe, ValueError if it sends anything else."""
    (length,) = struct.unpack("<I", _read_exactly(pipe, 4))
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"found a frame of {length} bytes, expected at most {MAX_FRAME_BYTES}")
    return json.loads(_read_exactly(pipe, length).decode("ascii"))


def _read_exactly(pipe: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = os.read(pipe, count - len(data))
        if not piece:
            raise EOFError("the other side hung up")
        data += piece
    return bytes(data)


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def serve_calls(function: Callable, requests: int, responses: int) -> None:
    """Answer [positional, by name], until the pipe closes, with what remote_function describes."""
    while True:
        try:
            request = read_frame(requests)
        except EOFError:
            return
        try:
            write_frame(responses, answer_call(function, request))
        except BaseException as error:  # noqa: BLE001 - SystemExit of the program is also an outcome of the call
            write_frame(responses, ["fault", f"bad result: {describe_error(error)}"])


def answer_call(function: Callable, request: object) -> list:
    """The call's answer, with the changes that it made to its arguments. Raises what has no plain value."""
    shared = SharedValues()
    positional, named = shared.decode(request)
    before = shared.snapshot()
    try:
        result = function(*positional, **named)
    except Exception as error:  # noqa: BLE001 - the test decides what it makes of it
        names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
        changes = shared.changes(before)
        try:
            parts = [str(part) if isinstance(part, str) else part for part in error.args]
            coded = shared.encode(tuple(parts))
        except (TypeError, RecursionError):
            coded = None
        return ["raised", names, coded, changes, describe_error(error)]
    except BaseException as error:  # noqa: BLE001
        return ["fault", f"exception: {describe_error(error)}"]
    changes = shared.changes(before)
    return ["value", shared.encode(result), changes]


class RemoteFunction:
    """The function that the `serve` process at the other end of the pipes computes. State: what went wrong so far.

    An answer is one of
        ["value", result, changes of the arguments]
        ["raised", names of the exception's built-in types, its arguments or null, changes, description]
        ["fault", reason]
    An Exception that the function raised is raised here as the built-in type nearest to it. Everything else that is not
    a result ends the test: CandidateError is no Exception, and its reason stays in `fault` if the test catches it.
    """

    def __init__(self, requests: int, responses: int) -> None:
        self._requests, self._responses = requests, responses
        self.fault = ""  # the first reason why this is no function that a test can go on with
        self.raised: tuple[BaseException, str] | None = None  # the last exception of the function and its description

    def __call__(self, *positional: object, **named: object) -> object:
        """The result. Raises CandidateError, and what the function raised."""
        if not self.fault:
            try:
                outcome = self._ask(positional, named)
            except (EOFError, BrokenPipeError):
                self.fault = "process ended: before it gave a result"
            except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
                self.fault = f"bad result: {describe_error(error)}"
        if self.fault:
            raise CandidateError(self.fault)
        if self.raised is not None and outcome is self.raised[0]:
            raise outcome
        return outcome

    def _ask(self, positional: tuple, named: dict) -> object:
        """The result, or the exception that the function raised, which is then `raised` too."""
        shared = SharedValues()
        write_frame(self._requests, shared.encode((positional, named)))
        count = len(shared)
        match read_frame(self._responses):
            case ["value", coded, list(changes)]:
                # In the order in which the other side numbered them: the changes, then the result.
                shared.apply_changes(changes, count)
                return shared.decode(coded)
            case ["raised", list(names), coded, list(changes), str(text)]:
                shared.apply_changes(changes, count)
                error = _exception(names, None if coded is None else shared.decode(coded), text)
                self.raised = error, f"exception: {text}"[:MAX_REASON_CHARACTERS]
                return error
            case ["fault", str(text)]:
                self.fault = text[:MAX_REASON_CHARACTERS]
                return None
        raise ValueError("found no answer, expected value, raised or fault")


def _exception(names: list, arguments: object, text: str) -> Exception:
    """An instance of the first of the built-in types `names` that is an Exception, and takes these arguments."""
    known = {kind.__name__: kind for kind in _builtin_exceptions(Exception)}
    for name in names:
        kind = known.get(name) if isinstance(name, str) else None
        if kind is not None:
            try:
                return kind(*arguments) if isinstance(arguments, tuple) else kind(text)
            except Exception:  # noqa: BLE001 - as UnicodeDecodeError, which wants five of certain types
                continue
    return Exception(text)


def _builtin_exceptions(base: type[Exception]) -> list[type[Exception]]:
    """`base` and all types that derive from it and are Python's own."""
    kinds = [kind for kind in base.__subclasses__() if kind.__module__ == "builtins"]
    return [base, *(found for kind in kinds for found in _builtin_exceptions(kind))]


def run_check(program: str, job: dict) -> None:
    """Load the checker, call `check(candidate)`, write the outcome as one JSON line to the verdict pipe.

    The line is only written after `check` has returned: if this process ends in any other way, whatever its exit code,
    that is not "passed". The line carries the job's token, so that nothing else in the pipe can be mistaken for it.
    """
    checker = load_module(program, "checker")
    candidate = RemoteFunction(job["requests"], job["responses"])
    setattr(checker, job["entry_point"], candidate)  # a test may also call the function by its own name
    reason = ""
    try:
        checker.check(candidate)
    except CandidateError:
        pass
    except Exception as error:  # noqa: BLE001 - a test may raise anything when it handles a result of a wrong type
        if candidate.raised is not None and error is candidate.raised[0]:
            reason = candidate.raised[1]
        elif isinstance(error, AssertionError):
            reason = f"wrong result: {describe_error(error)}"
        else:
            reason = f"wrong result: the test raised {describe_error(error)}"
    reason = candidate.fault or reason
    os.write(job["verdict"], json.dumps({"token": job["token"], "reason": reason}).encode() + b"\n")


def load_module(path: str, name: str) -> ModuleType:
    """Run the file as a module called `name`, so that its `if __name__ == "__main__":` part does not run."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def describe_error(error: BaseException) -> str:
    """`TypeName: message`, on one line and short; never raises, though the message may be the program's own code."""
    try:
        text = " ".join(str(error).split())
    except BaseException:  # noqa: BLE001 - a hostile __str__
        text = ""
    return f"{type(error).__name__}: {text}"[:MAX_REASON_CHARACTERS] if text else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def separate(job: dict, *, ends_with_parent: bool = True, second_user: int | None = None) -> dict[str, bool]:
    """Step 1: namespaces where permitted; returns only in the process that will run the program.

    The kernel treats the end of the thread that started this process as the parent's end. A process that must outlive
    that thread sets `ends_with_parent` False and must watch its pipes.
    """
    if ends_with_parent:
        die_with_parent()
    is_separate = "namespaces" in job["layers"] and enter_namespaces(second_user=second_user)
    has_memory_folder = False
    if is_separate:
        has_memory_folder = mount_memory_folder(job["folder"], job["folder_bytes"])
        # Number 1 of the new process namespace only waits: the kernel kills whatever is left when it ends, and it
        # ignores signals that a program relies on. The program is number 2.
        for _ in range(2):
            child = os.fork()
            if child:
                os._exit(wait_for(child, with_orphans=ends_with_parent))
            die_with_parent()
    return {"namespaces": is_separate, "memory_folder": has_memory_folder}


def wait_for(child: int, *, with_orphans: bool) -> int:
    """Exit code of `child`, as shells count: 137 for one killed by signal 9. SIGTERM to this process kills the child.

    So the process that the parent started ends last: the end of a process namespace's number 1 becomes visible only
    when all others in it are gone. with_orphans: wait for those too that `child` leaves; a program that goes on in
    another process then runs into its time limit instead of being taken for one that has ended.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child, signal.SIGKILL))
    code = 0
    while True:
        try:
            ended, status = os.wait()
        except ChildProcessError:
            return code
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            code = code if code >= 0 else 128 - code
            if not with_orphans:
                return code


def restrict(job: dict, is_in: dict[str, bool]) -> dict[str, bool]:
    """Step 3: forbid everything that foreign code must not do. Returns `is_in` and what took effect now."""
    set_resource_limits(
        cpu_seconds=math.ceil(job["seconds"]) + 1,
        memory_bytes=job["memory_bytes"],
        file_bytes=job["file_bytes"],
        open_files=64,
        processes=MAX_PROCESSES if is_in["namespaces"] else 0,
    )
    is_unprivileged = drop_privileges()
    has_landlock = (
        is_unprivileged
        and "landlock" in job["layers"]
        and restrict_files(job["readable"] + [job["folder"]], [job["folder"]] if is_in["memory_folder"] else [])
    )
    # Without rules for places, or without its own folder of bounded size, the program may write nowhere.
    may_write = is_in["memory_folder"] and has_landlock
    has_seccomp = is_unprivileged and "seccomp" in job["layers"] and filter_system_calls(deny_writes=not may_write)
    return is_in | {"landlock": has_landlock, "seccomp": has_seccomp, "may_write": may_write}


def describe_limits(job: dict, is_in: dict[str, bool]) -> dict[str, str]:
    """One line per kind of limit that says how it is enforced, for people and for the results of an evaluation."""
    without_network = [name for name, key in (("namespace", "namespaces"), ("seccomp", "seccomp")) if is_in[key]]
    if is_in["may_write"]:
        files = f"written in its own folder only (tmpfs of {job['folder_bytes'] // MEBIBYTE} MiB, Landlock)"
    elif is_in["seccomp"]:
        files = "none written (seccomp)"
    elif is_in["landlock"]:
        files = "none written (Landlock)"
    else:
        files = f"NOT CONFINED, each at most {job['file_bytes'] // MEBIBYTE} MiB"
    return {
        "wall_clock": f"{job['seconds']:g} s, then the whole process group is killed",
        "cpu": f"{math.ceil(job['seconds']) + 1} s (rlimit)",
        "memory": f"{job['memory_bytes'] // MEBIBYTE} MiB of addresses (rlimit)",
        "network": f"none ({', '.join(without_network)})" if without_network else "NOT CONFINED",
        "files": files,
        "reading": "Python and system libraries only (Landlock)" if is_in["landlock"] else "NOT CONFINED",
        "processes": "none (seccomp)"
        if is_in["seccomp"]
        else f"at most {MAX_PROCESSES}, all killed at the end (namespace)"
        if is_in["namespaces"]
        else "none (rlimit)",
        "signals": "to itself only" if is_in["seccomp"] or is_in["namespaces"] else "NOT CONFINED",
    }


def report(pipe: int, message: dict) -> None:
    """Step 4: one JSON line. From here on the parent's clock runs; the end of the pipe shows that the process ended."""
    os.write(pipe, json.dumps(message).encode() + b"\n")


def main() -> None:
    """Steps 1 to 5 for the job on stdin."""
    job = json.loads(sys.stdin.buffer.read())
    sys.path[:] = [entry for entry in sys.path if entry not in ("", job["root"])] + job["site_packages"]
    sys.dont_write_bytecode = True
    is_in = separate(job)
    os.chdir(job["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    program = os.path.join(job["folder"], "program.py")
    with open(program, "w", encoding="utf-8", errors="surrogatepass") as file:  # step 2
        file.write(job["program"])
    is_in = restrict(job, is_in)
    if os.getuid() == 0 and not is_in["seccomp"]:
        report(
            job["control"],
            {
                "error": "found root without seccomp, expected either another user or seccomp, since "
                "no other limit holds the number of root's processes"
            },
        )
        return
    report(job["control"], {"limits": describe_limits(job, is_in), "has_launcher": is_in["namespaces"]})
    run_program(job, program)


def run_program(job: dict, program: str) -> None:
    """Step 5. What the program raises goes to stderr as a traceback; the exit code is then 1."""
    if job["mode"] == "script":
        sys.argv[:] = [program]
        runpy.run_path(program, run_name="__main__")
    elif job["mode"] == "serve":
        module = load_module(program, "solution")
        serve_calls(getattr(module, job["entry_point"]), job["requests"], job["responses"])
    else:
        run_check(program, job)


if __name__ == "__main__":
    main()
