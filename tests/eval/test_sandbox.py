"""The sandbox: what a program may do, what hostile ones cannot, and that none of them is called right.

Every hostile program stands for a function `f` whose test wants `f(3) == 9`. Harm is looked for from outside: files,
connections, surviving processes, the life of this process. Bombs run inside tight limits only.
"""

import io
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eval.sandbox import limits
from eval.sandbox.limits import ALLOW, FAIL, KILL, filter_rows
from eval.sandbox.run import SandboxError, read_verdict, run_check, run_python
from eval.sandbox.values import SharedValues

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

ROOT = Path(__file__).resolve().parents[2]
MEMORY_BYTES = 256 << 20
CHECKER = "def check(candidate):\n    assert candidate(3) == 9\n"
SECRET = "SANDBOX_TEST_SECRET"
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and seccomp are Linux's")


def judge(solution, *, seconds=1.0, checker=CHECKER, **flags):
    return run_check(solution, entry_point="f", checker=checker, seconds=seconds, memory_bytes=MEMORY_BYTES, **flags)


def run(program, *, seconds=3.0, **flags):
    return run_python(program, seconds=seconds, memory_bytes=MEMORY_BYTES, **flags)


# ---------------------------------------------------------------------------------------------------------------------
# The verdict


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (b'{"token": "right", "reason": ""}\n', ""),
        (b'{"token": "right", "reason": "AssertionError"}\n', "AssertionError"),
        # forged: another token, none at all, of another type, not JSON; the line with the token decides
        (b'{"token": "wrong", "reason": ""}\n', "no verdict"),
        (b'{"reason": ""}\n', "no verdict"),
        (b'{"token": 5, "reason": ""}\n', "no verdict"),
        (b'{"token": "", "reason": ""}\n{"token": "right", "reason": "it failed"}\n', "it failed"),
        (b"passed\n", "no verdict"),
        (b"", "no verdict"),
    ],
)
def test_only_a_line_with_the_token_is_a_verdict(lines, reason, monkeypatch):
    monkeypatch.setattr("eval.sandbox.run._last_line", lambda judge: "")
    found = read_verdict(io.BytesIO(lines), None, "right")
    assert found == reason if reason != "no verdict" else found.startswith("no verdict")


# ---------------------------------------------------------------------------------------------------------------------
# Honest programs


def test_output_exit_code_and_folder():
    result = run("import os, sys\nprint('out', os.listdir())\nprint('err', file=sys.stderr)\nsys.exit(3)")
    assert (result.exit_code, result.stdout, result.stderr) == (3, "out ['program.py']\n", "err\n")
    assert not result.timed_out and not result.is_output_cut and not result.passed
    assert {"wall_clock", "cpu", "memory", "network", "files", "processes", "signals"} <= result.limits_applied.keys()


def test_passed_is_the_exit_code_and_nothing_is_on_stdin():
    assert run("import sys\nassert sys.stdin.read() == '' and __name__ == '__main__'").passed
    failed = run("raise ValueError('text')")
    assert failed.exit_code == 1 and failed.stderr.endswith("ValueError: text\n")


def test_standard_library_works_and_threads_too():
    result = run(
        "import re, json, random, collections, threading, hashlib, decimal, datetime, itertools\n"
        "done = []\n"
        "threads = [threading.Thread(target=done.append, args=(i,)) for i in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(sorted(done), hashlib.md5(b'x').hexdigest()[:4])"
    )
    assert result.stdout == "[0, 1, 2, 3] 9dd4\n", result.stderr


def test_environment_of_this_process_is_not_passed_on(monkeypatch):
    monkeypatch.setenv(SECRET, "key")
    assert SECRET not in run("import os\nprint(dict(os.environ))").stdout


def test_output_is_cut_without_harm_to_the_program():
    result = run("print('x' * 300000)\nprint('end')", output_bytes=1000)
    assert result.exit_code == 0 and result.stdout == "x" * 1000 and result.is_output_cut


def test_odd_texts_are_programs_or_errors_not_crashes():
    for text in ("\x00", "\ud800", "print('\u00e4')  # \u20ac", "", "(" * 5000):
        assert not run(text).timed_out


def test_wall_clock_kills():
    began = time.monotonic()
    result = run("import time\ntime.sleep(60)", seconds=0.3)
    assert result.timed_out and result.exit_code == 137 and time.monotonic() - began < 20


def test_a_right_function_passes_and_a_wrong_one_does_not():
    assert judge("def f(x):\n    print('noise')\n    return x * x").passed
    wrong = judge("def f(x):\n    return x * x + 1")
    assert (wrong.passed, wrong.reason) == (False, "wrong result: AssertionError")
    assert judge("def f(x) return 9").reason == "process ended: exit code 1: SyntaxError: expected ':'"
    assert judge("def g(x):\n    return 9").reason.startswith("process ended: exit code 1: AttributeError")
    assert judge("def f(x):\n    return 1 // 0").reason.startswith("exception: ZeroDivisionError")
    assert judge("def f(x):\n    return judge").reason.startswith("exception: NameError: ")
    assert judge("def f(x):\n    return f").reason == "bad result: TypeError: a function is not a plain value"


def test_test_with_an_early_end_is_no_pass():
    for checker in (
        "import sys\ndef check(candidate):\n    sys.exit(0)",
        "def check(candidate) pass",
        "import os\ndef check(candidate):\n    os._exit(0)",
    ):
        assert judge("def f(x):\n    return 9", checker=checker).reason.startswith("no verdict:")


# ---------------------------------------------------------------------------------------------------------------------
# Values


VALUES = [
    None,
    True,
    0,
    -3,
    10**40,
    0.1,
    -0.0,
    math.inf,
    "",
    "\u00e4\x00\ud800",
    b"\xff",
    [],
    (),
    [1, (2, [3.5])],
    set(),
    {(1, "a")},
    {"a": [1], (1, 2): {"b": None}, 3: ()},
    1 + 2j,
    ["list", [1]],
    ["tuple"],
    [[]],
]


def crossed(value):
    return SharedValues().decode(json.loads(json.dumps(SharedValues().encode(value))))


@pytest.mark.parametrize("value", VALUES, ids=ascii)
def test_values_cross_unchanged(value):
    other = crossed(value)
    assert other == value and type(other) is type(value) and repr(other) == repr(value)


def test_values_of_subclasses_become_plain_ones():
    class Yes(str):
        def __eq__(self, other):
            return True

        __hash__ = str.__hash__

    assert crossed(Yes("no")) != "yes" and type(crossed(Yes("no"))) is str
    assert math.isnan(crossed(math.nan)) and list(crossed(iter([1, 2]))) == [1, 2]
    for value in (object(), len, type, ..., [lambda: 1]):
        with pytest.raises(TypeError):
            crossed(value)


def test_objects_are_shared_and_changes_are_done_to_the_callers_own():
    here, there = SharedValues(), SharedValues()
    inner, whole = [1], {"k": 1.5}
    asked = (inner, [inner, inner], whole, "text", 7)
    got = there.decode(json.loads(json.dumps(here.encode(asked))))
    assert got == asked and got[0] is got[1][0] is got[1][1]
    count, before = len(here), there.snapshot()
    assert there.changes(before) == []
    got[0].append(got[2])
    got[2].clear()
    changes = json.loads(json.dumps(there.changes(before)))
    answer = json.loads(json.dumps(there.encode([got[0], got[3], got[1], [1]])))
    here.apply_changes(changes, count)
    result = here.decode(answer)
    assert inner == [1, {}] and inner[1] is whole and asked[1] == [[1, {}], [1, {}]]
    assert result[0] is inner and result[1] is asked[3] and result[2] is asked[1] and result[3] == [1]


@pytest.mark.parametrize("changes", [[[0, []]], [[1, [1]], [9, []]], [[-1, []]], [["1", []]], [[2, []]], [[1, 3]], [3]])
def test_changes_of_what_cannot_change_are_refused(changes):
    here = SharedValues()
    here.encode(([1],))  # number 0 is the list, 1 the tuple
    with pytest.raises((ValueError, TypeError)):
        here.apply_changes([[0, 3]] if changes == [[0, []]] else changes, len(here))


@pytest.mark.parametrize(
    "coded",
    [
        {},
        ["list"],
        ["list", 3],
        ["set", [["list", []]]],
        ["dict", [[1]]],
        [],
        [1, 2],
        ["bytes", "zz"],
        ["complex", 1, "2"],
        ["ref", 0],
        ["ref", -1],
        ["list", [["ref", 7]]],
        ["fraction", "1", "x"],
        ["fraction", "1", "0x0"],
        ["decimal", "x"],
        ["range", "0", "0", "0"],
        ["interned", 3],
        ["int", "0xx"],
    ],
)
def test_malformed_values_are_refused(coded):
    with pytest.raises((ValueError, TypeError, ArithmeticError)):
        SharedValues().decode(coded)


# ---------------------------------------------------------------------------------------------------------------------
# Hostile


FORGED = """
import json, os, sys, builtins, gc
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def f(x):
    for name in list(sys.modules):
        for key in ("check", "run_check", "candidate", "describe_error"):
            try: setattr(sys.modules[name], key, lambda *a: None)
            except Exception: pass
    builtins.AssertionError = type("Never", (BaseException,), {})
    tokens = [o for o in gc.get_objects() if isinstance(o, dict) and "token" in o]
    for pipe in range(3, 64):
        for token in [""] + [o["token"] for o in tokens]:
            try: os.write(pipe, json.dumps({"token": token, "reason": "", "passed": True}).encode() + b"\\n")
            except OSError: pass
    print("passed"); return Yes()
"""

HOSTILE = {  # name -> program; {outside}, {port} and {parent} are filled in
    "fork bomb": "import os\ndef f(x):\n    while True:\n        os.fork()",
    "fork bomb that catches": "import os\ndef f(x):\n    while True:\n"
    "        try: os.fork()\n        except OSError: pass",
    "memory bomb": "def f(x):\n    kept = []\n    while True: kept.append(bytearray(1 << 24))",
    "endless loop": "def f(x):\n    while True: pass",
    "endless loop at import": "while True: pass",
    "endless output": "def f(x):\n    while True: print('x' * 10000)",
    "file outside": "def f(x):\n    open({outside!r}, 'w').write('x')\n    return 8",
    "removes and renames outside": "import os\ndef f(x):\n    os.rename({kept!r}, {outside!r})",
    "changes rights outside": "import os\ndef f(x):\n    os.chmod({kept!r}, 0)\n    return 8",
    "socket": "import socket\ndef f(x):\n    socket.create_connection(('127.0.0.1', {port}), 1).send(b'x')",
    "os._exit": "import os\ndef f(x):\n    os._exit(0)",
    "os._exit at import": "import os\nos._exit(0)\ndef f(x): return 9",
    "SystemExit": "def f(x):\n    raise SystemExit(0)",
    "kills its parent": "import os, signal\ndef f(x):\n    for pid in (os.getppid(), {parent}, -1, 0):\n"
    "        try: os.kill(pid, signal.SIGKILL)\n        except OSError: pass\n    return 8",
    "signals by other calls": "import os, signal, fcntl\ndef f(x):\n    r, w = os.pipe()\n"
    "    fcntl.fcntl(r, fcntl.F_SETOWN, {parent})\n    return 8",
    "overwrites the checker": FORGED,
    "threads that outlive": "import threading, time\ndef f(x):\n"
    "    threading.Thread(target=time.sleep, args=(600,)).start()\n    return 9",
    "process that outlives": "import os, time\ndef f(x):\n    if os.fork() == 0:\n        os.setsid()\n"
    "        if os.fork() == 0: time.sleep(600)\n        os._exit(0)\n    return 8",
    "signals blocked": "import signal, time\ndef f(x):\n    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
    "    for s in (signal.SIGTERM, signal.SIGXCPU): signal.signal(s, signal.SIG_IGN)\n"
    "    while True: time.sleep(1)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return f(x) + 1",
    "raises its limits": "import resource\ndef f(x):\n"
    "    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)\n    return 8",
    "limits of its parent": "import resource\ndef f(x):\n    resource.prlimit({parent}, resource.RLIMIT_CPU, (1, 1))",
    "shell": "import os, subprocess\ndef f(x):\n    try: subprocess.run(['touch', {outside!r}])\n"
    "    except OSError: os.execv('/bin/sh', ['sh', '-c', 'touch ' + {outside!r}])",
    "disk bomb": "def f(x):\n    while True:\n        x += 1\n        open(str(x), 'wb').write(bytes(1 << 20))",
    "large file": "def f(x):\n    with open('large', 'wb') as file:\n        while True: file.write(bytes(1 << 20))",
    "result within itself": "def f(x):\n    x = []\n    x.append(x)\n    return x",
    "large result": "def f(x):\n    return 'x' * (1 << 26)",
    "closes everything": "import os\ndef f(x):\n    os.closerange(0, 64)\n    return 9",
}
ENDLESS = {
    "endless loop",
    "endless loop at import",
    "endless output",
    "fork bomb that catches",
    "threads that outlive",
    "signals blocked",
}  # these end by the clock; the others may, on a slow machine


@pytest.fixture(scope="module")
def listener():
    """A server of which the sandbox must know nothing: (port, connections so far)."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            while True:
                try:
                    connections.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1], connections
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def sessions(monkeypatch):
    """Ids of the sessions that the sandbox opened in this test; every process it started, and theirs, is in one."""
    started, popen = set(), subprocess.Popen

    def recording(*arguments, **flags):
        process = popen(*arguments, **flags)
        if flags.get("start_new_session"):
            started.add(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", recording)
    return started


def processes_left(sessions):
    listing = subprocess.run(["ps", "-A", "-o", "sid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listing.splitlines()]
    return [row for row in rows if int(row[0]) in sessions and not row[1].startswith("Z")]


@needs_linux
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_harms_nothing_and_does_not_pass(name, tmp_path, listener, sessions):
    outside, kept = tmp_path / "outside", tmp_path / "kept"
    kept.write_text("kept")
    rights = kept.stat().st_mode
    port, connections = listener
    solution = HOSTILE[name]
    if solution is not FORGED:
        solution = solution.format(outside=str(outside), kept=str(kept), port=port, parent=os.getpid())
    began = time.monotonic()
    result = judge(solution, seconds=0.5 if name in ENDLESS or name == "deep recursion" else 3.0)
    assert not result.passed and result.reason
    assert result.reason.startswith("timed out") or name not in ENDLESS, result.reason
    assert not outside.exists() and kept.read_text() == "kept" and kept.stat().st_mode == rights
    assert not connections and sessions and not processes_left(sessions) and time.monotonic() - began < 30


@needs_linux
@pytest.mark.parametrize("layers", [("seccomp",), ("landlock", "seccomp"), ("namespaces", "seccomp")], ids="+".join)
def test_what_remains_where_a_machine_permits_less(layers, tmp_path, listener, sessions):
    port, connections = listener
    for name in ("file outside", "socket", "kills its parent", "process that outlives"):
        solution = HOSTILE[name].format(outside=str(tmp_path / "x"), kept="", port=port, parent=os.getpid())
        result = judge(solution, seconds=3.0, layers=layers)
        assert not result.passed and result.reason, name
    assert not (tmp_path / "x").exists() and not connections and not processes_left(sessions)
    assert judge("def f(x):\n    return x * x", layers=layers).passed
    assert result.limits_applied["network"] == f"none ({'namespace, ' * ('namespaces' in layers)}seccomp)"
    assert result.limits_applied["files"] == "none written (seccomp)"


LAYER_SETS = [("seccomp",), ("landlock", "seccomp"), ("namespaces", "seccomp"), ("namespaces", "landlock", "seccomp")]
GO_ON = """import atexit, os, threading, time
def go_on():
    time.sleep(0.3)
    os.closerange({first}, 64)
    time.sleep(60)
def f(x):
    return x * x
"""
THREAD, AT_EXIT = "threading.Thread(target=go_on).start()\n", "atexit.register(go_on)\n"


@needs_linux
@pytest.mark.parametrize(
    ("layers", "first", "starts"),
    [(layers, 3, THREAD) for layers in LAYER_SETS] + [(("seccomp",), 0, THREAD), (("seccomp",), 3, AT_EXIT)],
)
def test_what_goes_on_after_its_pipes_are_closed_has_not_passed(layers, first, starts, sessions):
    solution = GO_ON.format(first=first) + starts
    result = judge(solution, seconds=1.0, layers=layers)
    assert not result.passed and result.reason == "timed out: after the test, at its end or in threads"
    result = run(solution, seconds=0.8, layers=layers)
    assert result.timed_out and not result.passed
    assert not processes_left(sessions)


@needs_linux
@pytest.mark.parametrize("layers", LAYER_SETS, ids="+".join)
def test_a_daemon_thread_ends_with_its_program(layers):
    solution = GO_ON.format(first=3) + "threading.Thread(target=go_on, daemon=True).start()\n"
    assert judge(solution, seconds=5.0, layers=layers).passed


ORPHANS = """
import ctypes, os, sys, time
from eval.sandbox.child import wait_for
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans become this process's children, as those of a namespace's number 1
child = os.fork()
if child == 0:
    if os.fork() == 0:
        time.sleep(1.0)
        os._exit(4)
    os._exit(3)
begun = time.monotonic()
print(wait_for(child, with_orphans=sys.argv[1] == "True"), time.monotonic() - begun > 0.7)
"""


@needs_linux
@pytest.mark.parametrize("with_orphans", [True, False])
def test_a_process_that_a_program_leaves_is_waited_for(with_orphans):
    command = [sys.executable, "-c", ORPHANS, str(with_orphans)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["3", str(with_orphans)], done.stderr


@needs_linux
def test_reading_is_confined_where_landlock_is():
    result = run(f"print(open({str(ROOT / 'README.md')!r}).read())")
    if "Landlock" not in result.limits_applied["reading"]:
        pytest.skip("the kernel has no Landlock")
    assert result.exit_code == 1 and result.stdout == "" and "PermissionError" in result.stderr


@needs_linux
@pytest.mark.skipif(os.getuid() != 0, reason="root's processes are not bounded by rlimits; others' are")
def test_root_is_refused_without_a_bound_on_processes():
    with pytest.raises(SandboxError, match="root without seccomp"):
        run("print(1)", layers=())


class RefusingLibrary:
    """A C library in whose kernel some calls are refused; it writes down all of them."""

    def __init__(self, refuses):
        self.refuses, self.calls = refuses, []

    def mount(self, source, target, kind, flags, options):
        what = "private" if flags.value & limits.MS_PRIVATE else "tmpfs"
        self.calls.append(what)
        return -1 if what in self.refuses else 0

    def prctl(self, option, *values):
        self.calls.append(option)
        return -1 if option in self.refuses else 0

    def capset(self, header, data):
        return 0


@pytest.mark.parametrize(
    ("refuses", "is_mounted", "calls"),
    [((), True, ["private", "tmpfs"]), (("tmpfs",), False, ["private", "tmpfs"]), (("private",), False, ["private"])],
)
def test_no_folder_is_mounted_that_could_show_outside(monkeypatch, refuses, is_mounted, calls):
    library = RefusingLibrary(refuses)
    monkeypatch.setattr(limits, "_LIBC", library)
    assert limits.mount_memory_folder("/nowhere", 4096) is is_mounted and library.calls == calls


@pytest.mark.parametrize("refused", [limits.PR_SET_NO_NEW_PRIVS, limits.PR_SET_DUMPABLE])
def test_privileges_are_not_dropped_where_one_step_is_refused(monkeypatch, refused):
    monkeypatch.setattr(limits, "_LIBC", RefusingLibrary(()))
    assert limits.drop_privileges()
    monkeypatch.setattr(limits, "_LIBC", RefusingLibrary((refused,)))
    assert not limits.drop_privileges()


@needs_linux
def test_a_mount_of_the_sandbox_does_not_show_outside():
    before = Path("/proc/self/mountinfo").read_text()
    result = run("print(open('/proc/self/mountinfo').read())", layers=("namespaces", "seccomp"))
    assert Path("/proc/self/mountinfo").read_text() == before
    if "tmpfs" in result.limits_applied["files"]:
        assert "shared:" not in result.stdout and "master:" not in result.stdout


@needs_linux
def test_nothing_survives_the_evaluator_itself_being_killed(tmp_path):
    program = (
        "from eval.sandbox import run as sandbox\nwait = sandbox._wait_until_ready\n"
        "sandbox._wait_until_ready = lambda children: (wait(children), print('ready', flush=True))[0]\n"
        "sandbox.run_python('import time\\nwhile True: time.sleep(0.1)', seconds=600, memory_bytes=1 << 28)"
    )
    evaluator = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE
    )

    def descendants():
        listing = subprocess.run(["ps", "-A", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
        found = [row.split(maxsplit=1)[0] for row in listing.splitlines() if "eval.sandbox.child" in row]
        return [pid for pid in found if str(tmp_path) in environment_of(pid)]

    def environment_of(pid):
        try:
            return Path(f"/proc/{pid}/environ").read_text(errors="replace")
        except OSError:  # gone, or not ours to look at
            return ""

    assert evaluator.stdout.readline() == b"ready\n" and descendants()
    evaluator.kill()
    evaluator.communicate()
    wait_until(lambda: not descendants())


def wait_until(is_true):
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_many_at_once_do_not_disturb_each_other():
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: judge(f"def f(x):\n    return {n}", seconds=20)}))
        for n in (8, 9, 10, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: result.passed for n, result in results.items()} == {8: False, 9: True, 10: False}


# ---------------------------------------------------------------------------------------------------------------------
# Filter oracle


def interpret(rows, number, arguments=(), architecture=0xC000003E):
    """What the filter's program answers: an interpreter of its five instructions, written for this test."""
    words = {0: number, 4: architecture, **{16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate(arguments)}}
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, operand = rows[at]
        if code == 0x06:
            return operand
        if code == 0x20:
            accumulator, jump = words.get(operand, 0), 0
        else:
            is_true = {0x15: accumulator == operand, 0x25: accumulator > operand, 0x45: accumulator & operand != 0}[
                code
            ]
            jump = if_true if is_true else if_false
        at += 1 + jump


@pytest.mark.parametrize(
    ("number", "arguments", "is_allowed"),
    [
        (0, (), True),
        (1, (), True),
        (9, (), True),  # read, write, mmap
        (41, (), False),
        (57, (), False),
        (59, (), False),
        (101, (), False),  # socket, fork, execve, ptrace
        (56, (0x01200011,), False),
        (56, (0x003D0F00,), True),
        (435, (), False),  # clone of a process, of a thread, clone3
        (62, (77, 9), True),
        (62, (78, 9), False),
        (62, (0xFFFFFFFF, 9), False),
        (234, (78, 1, 9), False),  # kill, tgkill
        (302, (0, 9), True),
        (302, (78, 9), False),
        (72, (3, 8, 78), False),
        (72, (3, 1), True),  # prlimit64, fcntl
        (157, (1, 0), False),
        (157, (15, 0), True),
        (16, (0, 0x40086602), False),
        (16, (0, 0x5401), True),  # prctl, ioctl
        (463, (), False),
        (1 << 30, (), False),
        (90, (), False),
        (231, (), True),  # unknown, x32, chmod, exit_group
        (257, (0, 0, 0), True),
        (257, (0, 0, 0o101), True),
        (82, (), True),  # openat to read, to write; rename
    ],
)
def test_filter_rows_decide_as_meant(number, arguments, is_allowed):
    answer = interpret(filter_rows(0, 0xC000003E, 77, deny_writes=False), number, arguments)
    assert (answer == ALLOW) == is_allowed and (is_allowed or answer & 0xFFFF0000 == FAIL)


def test_filter_without_writes_and_for_another_architecture():
    rows = filter_rows(0, 0xC000003E, 77, deny_writes=True)
    assert interpret(rows, 257, (0, 0, 0)) == interpret(rows, 2, (0, 0o2000000)) == ALLOW  # to read, close-on-exec
    for number, arguments in (
        (257, (0, 0, 1)),
        (2, (0, 0o1002)),
        (2, (0, 0o100)),
        (82, ()),
        (87, ()),
        (83, ()),
        (76, ()),
    ):
        assert interpret(rows, number, arguments) & 0xFFFF0000 == FAIL
    assert interpret(rows, 0, architecture=0x40000003) == KILL  # 32-bit calls on a 64-bit kernel
