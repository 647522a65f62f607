"""Faults of folders: a full disk, no right to write, a folder that vanishes, two runs in one."""

import ctypes
import importlib
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

from tests.faults.runs import (
    LAST_LINES,
    PROGRAMS,
    Trial,
    arguments_of,
    compare,
    end_of,
    fault_of_end,
    finish,
    in_child,
    journal_lines,
    undisturbed,
)
from tests.support.processes import run, start
from tests.support.restart_trials import wait_until

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_REMOUNT = 1, 32


def run_here(program: str, arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """The program in this process, to be used in a forked child; standard output and error in files of `folder`."""
    module = importlib.import_module(program)
    texts = []
    for number, name in ((1, "out"), (2, "err")):
        path = folder / f"{time.monotonic_ns()}.{name}"
        texts.append(path)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    try:
        code = module.main(arguments)
    except SystemExit as stop:
        code = stop.code
    return code, *(path.read_text(encoding="utf-8") for path in texts)


# ---------------------------------------------------------------------------------------------------------------------
# A disk of our own


def mount_in_namespace(target: Path, size: str) -> str:
    """A tmpfs at `target`, seen by this process alone, in a user namespace of its own; "" or why it is not allowed."""
    library, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if library.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        return f"no namespace of users and mounts: {os.strerror(ctypes.get_errno())}"
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    except OSError as error:
        return f"no map of users: {error}"
    if library.mount(b"tmpfs", os.fsencode(target), b"tmpfs", 0, f"size={size}".encode()):
        return f"no tmpfs: {os.strerror(ctypes.get_errno())}"
    return ""


def remount(target: Path, flags: int, options: str) -> None:
    """Change the tmpfs of mount_in_namespace."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.mount(b"tmpfs", os.fsencode(target), b"tmpfs", MS_REMOUNT | flags, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def full_disk(number: int, rng: random.Random, folder: Path) -> Trial:
    """A disk that is too small; then it grows and the same command goes on. A limit of file sizes, where no mounts."""
    program = PROGRAMS[number % 3]
    true_end = undisturbed(program)
    disk = folder / "disk"
    disk.mkdir()
    small = {"run_sft": 700, "run_ppo": 1400, "run_eval": 20}[program]
    arguments = arguments_of(program, disk / "run")

    def fill() -> list:
        limit = rng.randrange(4, small) << 10
        problem = mount_in_namespace(disk, str(limit))
        if problem:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit // 10, resource.RLIM_INFINITY))
        first = run_here(program, arguments, folder)
        before = journal_lines(program, disk / "run")
        if problem:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        else:
            remount(disk, 0, "size=64m")
        second = run_here(program, arguments, folder)
        end = end_of(program, disk / "run") if second[0] == 0 else ""
        return [limit, before, first, second, end]

    limit, before, (code, _, err), (next_code, out, next_err), end = in_child(fill)
    if problem := fault_of_end(code, err, (0, 2)):
        return Trial(f"{program}, {limit >> 10} KiB: {problem}")
    if next_code != 0 or end != true_end:
        return Trial(f"{program}, {limit >> 10} KiB: the next start: code {next_code}, {next_err[-300:]!a}")
    return Trial()


def read_only_folder(number: int, rng: random.Random, folder: Path) -> Trial:
    """A folder on a disk that may only be read, empty or with a half-done run: one line and code 2."""
    program = PROGRAMS[number % 3]
    disk = folder / "disk"
    disk.mkdir()
    arguments = arguments_of(program, disk / "run")

    def refuse() -> list:
        if problem := mount_in_namespace(disk, "64m"):
            return [problem]
        if number % 2:
            part = {"limit": 4} if program == "run_eval" else {"max_steps": 4}
            run_here(program, arguments_of(program, disk / "run", **part), folder)
        remount(disk, MS_RDONLY, "")
        return ["", *run_here(program, arguments, folder)]

    problem, *end = in_child(refuse)
    if problem:
        return Trial(skipped=problem)
    code, _, err = end
    return Trial(f"{program}: {found}" if (found := fault_of_end(code, err, (2,))) else "")


# ---------------------------------------------------------------------------------------------------------------------
# Removed, doubled


def vanished_folder(number: int, rng: random.Random, folder: Path) -> Trial:
    """The output folder is moved away while the run works: code 2 and one line; what was moved goes on elsewhere."""
    program = PROGRAMS[number % 3]
    output, moved, line = folder / "run", folder / "moved", rng.randrange(1, LAST_LINES[program])
    running = start(program, arguments_of(program, output))
    wait_until(lambda: journal_lines(program, output) >= line or running.poll() is not None, 120)
    is_running = running.poll() is None
    before = journal_lines(program, output)
    os.rename(output, moved)
    _, err = running.communicate()
    if is_running and (problem := fault_of_end(running.returncode, err, (2,))):
        return Trial(f"{program}, after line {line}: {problem}")
    shutil.rmtree(output, ignore_errors=True)
    return finish(program, moved, before)


def double_start(number: int, rng: random.Random, folder: Path) -> Trial:
    """The same command while the first still works: the second ends with one line, the first is undisturbed."""
    program = PROGRAMS[number % 3]
    output, line = folder / "run", rng.randrange(1, LAST_LINES[program])
    flags = {"run_sft": {"epochs": 2}, "run_ppo": {}, "run_eval": {}}[program]
    first = start(program, arguments_of(program, output, **flags))
    wait_until(lambda: journal_lines(program, output) >= line or first.poll() is not None, 120)
    for pid in first.pids:
        os.kill(pid, signal.SIGSTOP)  # it works until the second has answered
    code, _, err = run(program, arguments_of(program, output, **flags))
    for pid in first.pids:
        os.kill(pid, signal.SIGCONT)
    _, first_err = first.communicate()
    if problem := fault_of_end(code, err, (2,)):
        return Trial(f"{program}: the second {problem}")
    if first.returncode != 0 or first_err:
        return Trial(f"{program}: the first ended with code {first.returncode}: {first_err[-300:]!a}")
    return compare(program, output, 0, "")
