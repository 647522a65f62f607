"""Hostile tool calls: whatever a model asks of a tool, nothing changes outside the dialogue's folder, nothing of this
machine is read that should not be, and the next call is answered as if nothing had happened.

Harm is looked for from outside: a secret file and a secret in the environment, a listener, folders, processes.
"""

import ast
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from data.error_filter import CATEGORIES, classify_feedback
from data.tool_calls import ToolCall
from eval.dialogues.tools import MAX_FEEDBACK_CHARACTERS, ExecutorSettings, ToolExecutor, ToolRequest
from eval.sandbox import run as sandbox
from eval.sandbox.limits import ALLOW, FAIL, filter_rows
from tests.eval.test_dialogues_tools import DOCUMENTS, MANY
from tests.eval.test_sandbox import interpret

ROOT = Path(__file__).resolve().parents[2]
SECRET = "HOSTILE_TOOLS_SECRET"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="namespaces, Landlock and seccomp are Linux's"),
]


@pytest.fixture(scope="module")
def tools():
    """Two servers whose calls have little time; they must survive this whole file."""
    os.environ[SECRET] = "in-the-environment"
    try:
        with ToolExecutor(ExecutorSettings("auto", execute_code=True, seconds=0.7)) as executor:
            executor._local.has(request("Execute/Execute", "execute_pycode", {"code:": ""}))
            if not all(executor._local._abilities.values()):
                pytest.skip("the sandbox of this machine gives neither folder nor programs: such calls are simulated")
            yield executor
            assert not executor.notices
    finally:
        del os.environ[SECRET]


def request(tool_set, name, arguments, *, dialogue=0, attempt=0, tools=None):
    return ToolRequest(
        dialogue=dialogue,
        tool_set=tool_set,
        tools=tools or DOCUMENTS.get(tool_set, MANY),
        call=ToolCall(name, arguments),
        attempt=attempt,
    )


@pytest.fixture(scope="module")
def listener():
    """A server of which no tool may know: (port, connections so far)."""
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


@pytest.fixture
def outside(tools, listener):
    """A folder that no call may see or change, given away in the calls; checked when the test is over.

    It is open to every user of the machine, so that nothing but the sandbox protects it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, secret = Path(name), Path(name) / "secret"
        secret.write_text("in-the-file")
        secret.chmod(0o666)
        folder.chmod(0o777)
        yield from check_outside(folder, secret, tools, listener)


def check_outside(folder, secret, tools, listener):
    before = folder.stat().st_mtime_ns, secret.stat()
    yield folder
    assert [path.name for path in folder.iterdir()] == ["secret"] and secret.read_text() == "in-the-file"
    after = folder.stat().st_mtime_ns, secret.stat()
    assert before[0] == after[0] and before[1].st_mode == after[1].st_mode
    assert before[1].st_mtime_ns == after[1].st_mtime_ns
    assert not listener[1]
    # The next call, in this dialogue and in others, is answered as ever; no process of the last one is left.
    for dialogue in (0, 1):
        asked = request("Random/Random", "get_uuid", {}, dialogue=dialogue)
        assert tools(asked).feedback == FIRST_UUID
    assert not processes_of_calls(tools) and not tools.notices  # at once: the server has waited for them


FIRST_UUID = json.dumps(json.dumps(["e9701e27-7fdb-4313-b98c-cc44f47c2699"]))


def all_processes():
    """pid -> parent of every process of the machine that has not ended."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, *_ = path.read_text(errors="replace").rpartition(")")[2].split()
            if state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found


def processes_of_calls(tools):
    """Pids below the servers' first processes, but for the two each that a server consists of. What loses its parent
    gets the namespace's first process for one, so it is found too."""
    known, found = all_processes(), []
    for server in tools._local._servers:
        level, below = [server.pid] if server is not None else [], []
        while level:
            level = [pid for pid, parent in known.items() if parent in level]
            below += level
        found += sorted(below)[2:]  # the first two were there before any call
    return found


def ask(tools, *arguments, **flags):
    """Call and check what holds for every answer: bounded, encodable, a category, no secret in it."""
    asked = request(*arguments, **flags)
    answer = tools(asked)
    assert len(answer.feedback) <= MAX_FEEDBACK_CHARACTERS and answer.feedback.encode("utf-8")
    assert classify_feedback(answer.feedback, asked.call, asked.tools) in CATEGORIES
    for secret in ("in-the-file", "in-the-environment", "root:x:", "root:*:", "daemon:"):
        assert secret not in answer.feedback
    return answer, classify_feedback(answer.feedback, asked.call, asked.tools)


# ---------------------------------------------------------------------------------------------------------------------
# Files


PATHS = [
    "/etc/passwd",
    "/etc/shadow",
    "../../../../../../etc/passwd",
    "{secret}",
    "../../../../../..{secret}",
    "./../srv/../{secret}",
    "x/../../{secret}",
    "/proc/self/environ",
    "/proc/self/cmdline",
    "/proc/1/root{secret}",
    "/proc/self/fd/3",
    "/proc/self/mem",
    "/dev/mem",
    "/dev/stdin",
    "~/.bashrc",
    "file://{secret}",
    "\x00{secret}",
    "{secret}\x00.txt",
    "/",
    ".",
    "",
    "..",
    "a" * 5000,
    "a/" * 3000,
    "\ud800",
    "/sys/kernel/notes",
    "C:\\x",
    "$(cat {secret})",
    "`id`",
    "a; cat {secret}",
    "%2e%2e/%2e%2e/etc/passwd",
    "\u2215etc\u2215passwd",
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path[:24]))
def test_paths_lead_nowhere_but_into_the_folder(tools, outside, path):
    path = path.format(secret=outside / "secret")
    answer, category = ask(tools, "File/file_operation", "read_file", {"file_path": path}, dialogue=2)
    assert answer.executor == "local" and category == "tool_call_failure"
    ask(tools, "File/file_operation", "write_file", {"file_path": path, "text": "x"}, dialogue=2)
    new = str(outside / "new")
    assert ask(tools, "File/file_operation", "write_file", {"file_path": new, "text": "x"})[1] == "tool_call_failure"
    tools.forget(2)


@pytest.mark.parametrize("maker", ["execute_pycode", "execute_bash_code"])
def test_links_lead_nowhere(tools, outside, maker):
    secret = str(outside / "secret")
    code = {"code:": f"import os\nos.symlink({secret!r}, 'link')\nos.symlink({str(outside)!r}, 'folder')"}
    commands = {"commands": f"ln -s '{secret}' link && ln -s '{outside}' folder"}
    assert (
        ask(tools, "Execute/Execute", maker, code if maker == "execute_pycode" else commands, dialogue=4)[1]
        == "all_right"
    )
    for path in ("link", "folder/secret", "folder/new"):
        assert ask(tools, "File/file_operation", "read_file", {"file_path": path}, dialogue=4)[1] == "tool_call_failure"
        assert (
            ask(tools, "File/file_operation", "write_file", {"file_path": path, "text": "x"}, dialogue=4)[1]
            == "tool_call_failure"
        )
    ask(
        tools,
        "Execute/Execute",
        "execute_bash_code",
        {"commands": "cat link folder/secret; echo x > folder/new"},
        dialogue=4,
    )
    tools.forget(4)


def test_files_of_another_dialogue_are_out_of_reach(tools, outside):
    """Also where the server keeps them: in a folder whose name code could guess."""
    text = {"text": "in-the-file", "file_path": "a"}
    assert ask(tools, "File/file_operation", "write_file", text, dialogue=22)[1] == "all_right"
    places = [f"{folder}/22/a" for folder in Path(tempfile.gettempdir()).glob("sandbox_*")]
    assert places
    code = (
        f"for place in {places!r}:\n    try: print(open(place).read())\n    except OSError as error: print(error.errno)"
    )
    answer, _ = ask(tools, "Execute/Execute", "execute_pycode", {"code:": code}, dialogue=24)  # on the same server
    assert set(json.loads(answer.feedback).split()) <= {"2", "13"} and "13" in answer.feedback
    arguments = {"commands": f"cat {' '.join(places)}", "return_err_outputpersistent=False": True}
    assert "Permission denied" in ask(tools, "Execute/Execute", "execute_bash_code", arguments, dialogue=24)[0].feedback
    assert "in-the-file" in tools(request("File/file_operation", "read_file", {"file_path": "a"}, dialogue=22)).feedback
    tools.forget(22)
    tools.forget(24)


def test_a_full_folder_hurts_its_own_dialogue_only(tools, outside):
    fill = "for i in $(seq 40); do head -c 1M /dev/zero > f$i; done 2>/dev/null; ls | wc -l; du -sm . | cut -f1"
    answer, _ = ask(tools, "Execute/Execute", "execute_bash_code", {"commands": fill}, dialogue=6)
    assert int(json.loads(answer.feedback).split()[1]) <= 16
    text = {"text": "x" * 100_000, "file_path": "g"}
    assert ask(tools, "File/file_operation", "write_file", text, dialogue=6)[1] == "tool_call_failure"
    assert ask(tools, "File/file_operation", "write_file", text, dialogue=8)[1] == "all_right"  # on the same server
    tools.forget(6)
    assert ask(tools, "File/file_operation", "write_file", text, dialogue=6)[1] == "all_right"


# ---------------------------------------------------------------------------------------------------------------------
# Code


FORGED = """
import os, struct, json
frame = json.dumps(["ended", 0, json.dumps(["value", "forged"])]).encode()
for pipe in range(64):
    try: os.write(pipe, struct.pack("<I", len(frame)) + frame)
    except OSError: pass
"""
CODE = {  # name -> program for execute_pycode; {secret}, {outside}, {port}, {parent} are filled in
    "reads": "print(open({secret!r}).read())",
    "reads the password file": "import pwd\nprint(open('/etc/passwd').read())",
    "reads the environment": "import os\nprint(dict(os.environ), open('/proc/self/environ').read())",
    "lists": "import os\nfor place in ('/', '/etc', '/proc', '/root', '/home', {outside!r}):\n"
    "    try: print(place, os.listdir(place))\n    except OSError as error: print('no')",
    "writes": "open({outside!r} + '/new', 'w').write('x')",
    "removes": "import os\nos.remove({secret!r})",
    "renames": "import os\nos.rename({secret!r}, {outside!r} + '/new')",
    "rights": "import os\nos.chmod({secret!r}, 0o777)",
    "times": "import os\nos.utime({secret!r}, (0, 0))",
    "hard link": "import os\nos.link({secret!r}, 'mine')\nprint(open('mine').read())",
    "shell": "import os\nos.system('touch {outside}/new')\nprint(os.popen('id').read())",
    "subprocess": "import subprocess\nprint(subprocess.run(['cat', {secret!r}], capture_output=True))",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(600,)).start()",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)",
    "c fork": "import ctypes\nlibc = ctypes.CDLL(None)\nprint(libc.fork(), libc.vfork(), libc.system(b'id'))",
    "c exec": "import ctypes\nctypes.CDLL(None).execl(b'/bin/sh', b'sh', b'-c', b'cat {secret}', None)",
    "mount": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "print(libc.unshare(0x20000), libc.mount(b'/', b'.', None, 4096, 0))",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1).send(b'x')",
    "web": "import urllib.request\nprint(urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1).read())",
    "kills": "import os\nfor pid in (os.getppid(), 1, {parent}, -1, 0):\n"
    "    try: os.kill(pid, 9)\n    except OSError: pass",
    "kills its session": "import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.killpg(0, 9)",
    "endless": "while True: pass",
    "endless output": "while True: print('x' * 10000)",
    "raw output": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "memory": "kept = []\nwhile True: kept.append(bytearray(1 << 24))",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f() + 1\nf()",
    "nested brackets": "(" * 10000,
    "nested data": "x = []\nfor _ in range(10**5): x = [x]\nprint(x)",
    "forged answer": FORGED,
    "forged and gone": FORGED + "os._exit(0)",
    "closes everything": "import os\nos.closerange(0, 100)",
    "hostile error": "class E(BaseException):\n    def __str__(self): raise SystemExit\nraise E",
    "patched json": "import json, sys\njson.dumps = lambda *a: open({secret!r}).read()\nprint(1)",
    "patched output": "import sys\nsys.stdout = None\nsys.stderr = None\nprint('x')",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "large file": "file = open('large', 'wb')\nwhile True: file.write(bytes(1 << 20))",
    "many files": "for n in range(10**6): open(str(n), 'w')",
    "what the server holds": "import gc, sys\nprint([o for o in gc.get_objects() if isinstance(o, dict) and 'folder' "
    "in o and 'requests' in o] and 'job', list(sys.modules)[:5])",
}


@pytest.mark.parametrize("name", CODE)
def test_hostile_code(tools, outside, listener, name):
    code = (
        CODE[name]
        if name.startswith("forged") or name == "nested brackets"
        else CODE[name].format(
            secret=str(outside / "secret"), outside=str(outside), port=listener[0], parent=os.getpid()
        )
    )
    answer, _ = ask(tools, "Execute/Execute", "execute_pycode", {"code:": code}, dialogue=12)
    assert answer.executor == "local" and "forged" not in answer.feedback.replace("'forged'", "")
    tools.forget(12)


# ---------------------------------------------------------------------------------------------------------------------
# Shell


SHELL = {
    "password file": "cat /etc/passwd; cat < /etc/passwd; grep root /etc/passwd",
    "reads": "cat {secret}",
    "redirects": "echo x > {outside}/new; echo x >> {secret}; : > {secret}",
    "removes": "rm -rf {outside} / /* ~",
    "copies": "cp {secret} .; cp /bin/true {outside}/new; mv {secret} .",
    "rights": "chmod 777 {secret} {outside}",
    "times": "touch {secret} {outside}/new",
    "links": "ln {secret} mine; cat mine",
    "fork bomb": ":(){{ :|:& }};:",
    "fork bomb that waits": "f(){{ f|f& wait; }}; f",
    "endless": "while :; do :; done",
    "endless output": "yes",
    "both outputs": "yes >&2",
    "background": "for i in $(seq 9); do sleep 600 & done; echo $(jobs -p | wc -l)",
    "leaves its session": "setsid sleep 600 & nohup sleep 600 & disown -a; (sleep 600 &) ; exit 0",
    "kills": "kill -9 -1; kill -9 1; kill -9 $PPID; kill -9 {parent}; killall -9 python; pkill -9 .",
    "network": "exec 3<>/dev/tcp/127.0.0.1/{port}; echo x >&3; curl -s http://127.0.0.1:{port}; "
    "wget -q http://127.0.0.1:{port}",
    "namespaces": "unshare -r id; unshare -m mount -t tmpfs x /; mount --bind / .; chroot /; "
    "nsenter -t 1 -m cat {secret}",
    "own program": "cp /bin/cat ./cat; chmod +x ./cat; ./cat {secret}; /lib64/ld-linux-x86-64.so.2 ./cat {secret}",
    "python": "python3 -c \"print(open('{secret}').read())\"; python3 -c 'import os\nwhile 1: os.fork()'",
    "process files": "cat /proc/1/environ /proc/self/environ /proc/$PPID/cmdline; ls /proc; ls -l /proc/1/root",
    "disk": "cat /dev/zero > big; for i in $(seq 3000); do : > f$i; done; ls | wc -l",
    "devices": "cat /dev/mem | head -c 9; mknod d c 1 1; cat d; head -c 9 /dev/sda /dev/vda",
    "set user": "sudo -n cat {secret}; su -c 'cat {secret}'; ping -c 1 127.0.0.1",
    "traps": "trap '' TERM INT; sleep 600",
    "memory": "x=x; while :; do x=$x$x; done",
    "environment": "env; set; printenv; export -p",
    "bytes": "printf '\\377\\000\\376' ; head -c 5000 /dev/urandom",
    "nothing": "",
    "unbalanced": "((((('\"",
    "exec": "exec sleep 600",
    "closes": "exec 0<&- 1>&- 2>&-; sleep 600",
    "limits": "ulimit -u 9999; ulimit -v unlimited",
}


@pytest.mark.parametrize("name", SHELL)
def test_hostile_commands(tools, outside, listener, name):
    commands = SHELL[name].format(secret=outside / "secret", outside=outside, port=listener[0], parent=os.getpid())
    arguments = {"commands": commands, "return_err_outputpersistent=False": "true"}  # all output, to search it
    answer, _ = ask(tools, "Execute/Execute", "execute_bash_code", arguments, dialogue=14)
    assert answer.executor == "local"
    tools.forget(14)


def test_processes_of_a_bomb_stay_few_while_it_burns(tools, outside):
    most, is_over = [], threading.Event()

    def count():
        while not is_over.wait(0.05):
            most.append(len(processes_of_calls(tools)))

    counter = threading.Thread(target=count)
    counter.start()
    for commands in (":(){ :|:& };: ; sleep 5", "f(){ f|f& wait; }; f"):
        ask(tools, "Execute/Execute", "execute_bash_code", {"commands": commands}, dialogue=16)
    is_over.set()
    counter.join()
    assert 0 < max(most) <= 17  # 16 and, for a moment, the one that becomes the shell


@pytest.mark.parametrize(
    ("number", "arguments", "answer"),
    [
        (57, (), ALLOW),
        (58, (), ALLOW),
        (59, (), ALLOW),
        (56, (0x01200011,), ALLOW),  # fork, vfork, execve, clone
        (56, (0x10000011,), FAIL | 1),
        (56, (0x20011,), FAIL | 1),
        (272, (), FAIL | 1),  # clone with namespaces, unshare
        (322, (), FAIL | 1),
        (112, (), FAIL | 1),
        (109, (), FAIL | 1),  # execveat, setsid, setpgid: out of its group
        (41, (), FAIL | 1),
        (101, (), FAIL | 1),
        (62, (78, 9), FAIL | 1),
        (62, (0xFFFFFFFF, 9), FAIL | 1),  # ptrace, kill
        (280, (), FAIL),
        (90, (), FAIL | 1),  # utimensat: told that it is done; chmod
    ],
)
def test_what_a_shell_may_ask_of_the_kernel(number, arguments, answer):
    rows = filter_rows(0, 0xC000003E, 77, deny_writes=False, allow_processes=True)
    assert interpret(rows, number, arguments) == answer


# ---------------------------------------------------------------------------------------------------------------------
# Names and arguments


def nested(depth, leaf="x"):
    value = leaf
    for _ in range(depth):
        value = [value]
    return value


def nested_dict(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


ARGUMENTS = {
    "10 MB of text": {"input_query": "1+" * (5 << 20)},
    "10 MB of escapes": {"input_query": "\ud800\x00" * (1 << 20)},
    "10 MB of keys": {f"{n:100}": n for n in range(100_000)},
    "10 MB key": {"k" * (10 << 20): 1},
    "deep list": {"input_query": nested(100_000)},
    "deep dict": {"input_query": nested_dict(100_000)},
    "as deep as Python allows": {"input_query": nested(990)},
    "not a number": {"input_query": math.nan},
    "no JSON": {"input_query": object()},
    "bytes": {"input_query": b"x"},
    "code": {"input_query": "__import__('os').system('touch {outside}/new')"},
    "code in a name": {"__import__('os')": "1"},
    "dunder": {"__class__": "x", "self": 1},
    "star": {"**": {}, "*": []},
    "huge integer": {"input_query": 10**5000},
    "digits": {"input_query": "9" * 100_000},
    "power": {"input_query": "9^9^9^9^9"},
    "brackets": {"input_query": "(" * 300_000},
    "signs": {"input_query": "-" * 300_000},
    "list of lists": {"input_query": [[1] * 1000] * 100},
}


def set_of(tool_set, arguments):
    return request(
        tool_set,
        "calculator" if tool_set != "toolbox" else "g",
        arguments,
        tools=MANY if tool_set == "toolbox" else None,
    )


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("tool_set", ["Calculator/Calculator", "toolbox"])
def test_hostile_arguments(tools, outside, name, tool_set):
    arguments = ARGUMENTS[name]
    if name == "code":
        arguments = {"input_query": arguments["input_query"].format(outside=outside)}
    for executor in (tools, ToolExecutor(ExecutorSettings("simulated"))):
        answer = executor(set_of(tool_set, arguments))
        assert len(answer.feedback) <= MAX_FEEDBACK_CHARACTERS and answer.feedback.encode("utf-8")
        if executor is tools:
            category = classify_feedback(
                answer.feedback, ToolCall("calculator", {"input_query": ""}), DOCUMENTS["Calculator/Calculator"]
            )
            assert category != "all_right"


@pytest.mark.parametrize("tool_set", ["Random/Random", "../../etc", "Execute/Execute", "", "toolbox", "\x00/\ud800"])
@pytest.mark.parametrize(
    "name",
    [
        "__class__",
        "os.system",
        "__import__",
        "execute",
        "eval",
        "../../etc/passwd",
        "",
        "rm -rf /",
        "get_uuid\n",
        "x" * (10 << 20),
        "\ud800",
        "\x00",
        "answer_request",
        "json",
    ],
)
def test_hostile_names_are_unknown_tools(tools, name, tool_set):
    asked = request(tool_set, name, {"code:": "1"})
    answer = tools(asked)
    assert classify_feedback(answer.feedback, asked.call, asked.tools) == "tool_hallucination"
    assert len(answer.feedback) <= MAX_FEEDBACK_CHARACTERS and answer.feedback.encode("utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Servers that are harmed


def inner_server(executor):
    """The process that serves: the last of those that each wait for the next."""
    known, pid = all_processes(), executor._local._servers[0].pid
    while below := [child for child, parent in known.items() if parent == pid]:
        pid = below[0]
    return pid


@pytest.mark.parametrize("how", ["killed", "stopped", "killed during a call"])
def test_a_server_that_is_harmed_is_replaced(tools, monkeypatch, how):
    monkeypatch.setattr(sandbox, "ANSWER_SECONDS", 0.5)
    with ToolExecutor(ExecutorSettings("auto", execute_code=True, seconds=1.5, servers=1)) as executor:
        assert executor(request("Random/Random", "get_uuid", {})).feedback == FIRST_UUID
        pid = inner_server(executor)
        if how == "killed during a call":
            threading.Timer(0.2, lambda: os.kill(pid, signal.SIGKILL)).start()
            asked = request("Execute/Execute", "execute_pycode", {"code:": "import time\ntime.sleep(0.5)\nprint(5)"})
            assert executor(asked).feedback == '"5\\n"'  # it had no files yet, so it may be asked again
        else:
            os.kill(pid, signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
        assert executor(request("Random/Random", "get_uuid", {})).feedback == FIRST_UUID
        assert len(executor.notices) == 1 and "started again" in executor.notices[0]
        old = pid
    deadline = time.monotonic() + 10
    while old in all_processes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nothing_survives_the_evaluator_itself_being_killed(tools, tmp_path):
    program = (
        "import sys\nfrom eval.dialogues.tools import *\nfrom tests.eval.test_dialogues_tools import DOCUMENTS\n"
        "executor = ToolExecutor(ExecutorSettings('auto', execute_code=True, seconds=600.0))\n"
        "call = lambda text: executor(ToolRequest(0, 'Execute/Execute', DOCUMENTS['Execute/Execute'], "
        "ToolCall('execute_bash_code', {'commands': text}), 0))\ncall('true')\nprint('ready', flush=True)\n"
        "call('sleep 600 & sleep 600')"
    )
    evaluator = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE
    )
    assert evaluator.stdout.readline() == b"ready\n"

    def below():
        known, level, found = all_processes(), [evaluator.pid], []
        while level:
            level = [pid for pid, parent in known.items() if parent in level]
            found += level
        return found

    deadline = time.monotonic() + 20
    while len(descendants := below()) < 6:  # three of the server, the shell, two that sleep
        assert time.monotonic() < deadline
        time.sleep(0.05)
    evaluator.kill()
    evaluator.communicate()
    while set(descendants) & all_processes().keys():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------------------
# What the product contains


MAY_RUN = {  # what can run text or programs -> the files that may use it, each inside the sandbox or to start it
    "code": {"eval/sandbox/tool_server.py"},
    "codeop": set(),
    "builtins": set(),
    "pty": set(),
    "multiprocessing": set(),
    "runpy": {"eval/sandbox/child.py"},
    "importlib": {"eval/sandbox/child.py", "eval/benchmarks.py"},  # the latter: names of our own table, by a prefix
    "subprocess": {"eval/sandbox/run.py", "train/run_logging.py", "eval/cells.py"},  # the last: our own programs
    "eval.sandbox.tool_server": set(),
    "fork": {"eval/sandbox/child.py", "eval/sandbox/limits.py", "eval/sandbox/tool_server.py"},
    "execve": {"eval/sandbox/tool_server.py"},
    "exec_module": {"eval/sandbox/child.py"},
}
OF_OS = {"system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "startfile", "exec_module"}


def uses():
    """(what, file) for each of MAY_RUN, and each of eval, exec, compile, __import__ named at all, in the product."""
    found = set()
    files = [
        *ROOT.glob("*.py"),
        *(path for package in ("data", "model", "train", "rl", "eval") for path in (ROOT / package).rglob("*.py")),
    ]
    for path in files:
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            found |= {(name if name in MAY_RUN else name.split(".")[0], where) for name in names}
            if isinstance(node, ast.Attribute) and (
                node.attr in OF_OS or node.attr.startswith(("execv", "execl", "spawn"))
            ):
                found.add((node.attr, where))
            is_read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)  # a setting may be called compile
            if is_read and node.id in ("eval", "exec", "compile", "__import__"):
                found.add((f"name {node.id}", where))
    return found


def test_nothing_but_the_sandbox_runs_text_or_programs():
    known = {(what, where) for what, files in MAY_RUN.items() for where in files}
    dangerous = {
        (what, where)
        for what, where in uses()
        if what in MAY_RUN or what in OF_OS or what.startswith(("name ", "execv", "execl", "spawn"))
    }
    assert dangerous == known


def test_the_evaluators_own_process_does_not_load_what_runs_code():
    program = (
        "import sys\nimport eval.dialogues.tools\nprint([name for name in ('code', 'eval.sandbox.tool_server') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
