"""The scripts in processes of their own, one per rank, without four seconds of imports for each.

    running = start("run_sft", arguments, ranks=2)        # what torchrun would start
    running.kill(); out, err = running.communicate()

A server that has imported everything (multiprocessing's forkserver) forks each rank; the rank has its own environment,
standard output and signal handlers, and can be killed like any process. What torchrun itself adds is proved by the
tests that use it: tests/train/test_lost_ranks.py and test_resume.py (very_slow).
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ["run_sft", "run_ppo", "run_eval", "eval.collect_trajectories", "torch._dynamo", "torch.distributed.fsdp"]
SECONDS_FOR_THE_OTHERS = 15  # to end by themselves when one rank has failed


def server_context():
    """Python has one fork server per process; `spawn` uses the same."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    os.environ["PYTHONPATH"] = str(ROOT)  # else the server finds the modules only if pytest started in the root
    return context


def spawn(function: Callable, arguments: tuple, ranks: int) -> None:
    """function(rank, *arguments) in `ranks` processes; an exception in one of them is raised here."""
    server_context()
    torch.multiprocessing.start_processes(function, arguments, ranks, start_method="forkserver")


def lines_in(folder: Path, pattern: str) -> int:
    """Lines of all files of that name, while another process writes, renames and deletes them."""
    count = 0
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            count += path.read_bytes().count(b"\n")
    return count


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rank(script: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    os.chdir(ROOT)
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = [f"{script}.py", *arguments]
    sys.exit(importlib.import_module(script).main(arguments))


class Running:
    """A started script, with the part of subprocess.Popen that tests use; `pids` are those of the ranks,
    `port` is where several of them meet."""

    def __init__(self, script: str, arguments: Sequence[str], ranks: int):
        self.folder = Path(tempfile.mkdtemp(prefix="running_"))
        self.port = free_port()
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "WORLD_SIZE": str(ranks)}
        context, self.workers = server_context(), []
        for rank in range(ranks):
            environment = {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            output = str(self.folder / str(rank))
            worker = context.Process(target=_rank, args=(script, list(map(str, arguments)), environment, output))
            worker.start()
            self.workers.append(worker)

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self.workers]

    @property
    def returncode(self) -> int | None:
        """None while a rank runs, else the first code that is not 0; -9 after SIGKILL."""
        codes = [worker.exitcode for worker in self.workers]
        return None if None in codes else next(filter(None, codes), 0)

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        for worker in self.workers:
            if worker.exitcode is None:
                os.kill(worker.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end of all ranks: (standard output, standard error), each of the ranks in their order."""
        end = time.monotonic() + timeout
        while self.returncode is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"ranks {self.pids} did not end within {timeout} s")
            if any(worker.exitcode for worker in self.workers):
                end = min(end, time.monotonic() + SECONDS_FOR_THE_OTHERS)
            time.sleep(0.005)
        texts = []
        for name in ("out", "err"):
            files = [self.folder / f"{rank}.{name}" for rank in range(len(self.workers))]
            texts.append("".join(file.read_text(encoding="utf-8") for file in files if file.exists()))
        shutil.rmtree(self.folder, ignore_errors=True)
        return texts[0], texts[1]


def start(script: str, arguments: Sequence[str], ranks: int = 1) -> Running:
    return Running(script, arguments, ranks)


def run(script: str, arguments: Sequence[str], ranks: int = 1) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    running = start(script, arguments, ranks)
    out, err = running.communicate()
    return running.returncode, out, err
