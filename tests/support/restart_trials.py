"""torchrun with one rank killed at a random moment: the run must go on by itself (docs/cluster.md)."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.processes import free_port, lines_in
from tests.support.tiny_run import ROOT


def torchrun(script: str, arguments: list[str], *, agents: int = 1, restarts: int = 2) -> list[list[str]]:
    """The command line of each of `agents` torchruns, which hold two ranks together."""
    line = [sys.executable, "-m", "torch.distributed.run", "--max_restarts", str(restarts), "--monitor_interval", "0.2"]
    if agents == 1:
        return [[*line, "--standalone", "--nproc_per_node", "2", f"{script}.py", *arguments]]
    port = free_port()
    line += ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "trial"]
    line += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1"]
    # one agent holds the meeting point; asked to find that out itself, both may think so on one machine
    return [[*line, "--rdzv_conf", f"is_host={int(n == 0)}", f"{script}.py", *arguments] for n in range(agents)]


def workers_of(agent: int) -> dict[int, int]:
    """Rank -> pid of the processes that a torchrun has started and that have got so far as to run Python."""
    found = {}
    try:
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        for pid in children:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(each[5:]): int(pid) for each in variables if each.startswith(b"RANK=")}
    except OSError:  # it has just ended
        pass
    return found


def start_agents(lines: list[list[str]], folder: Path) -> list[subprocess.Popen]:
    """Start the torchruns; what they and their workers say goes to folder/agent<N>.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = []
    for number, line in enumerate(lines):
        with open(folder / f"agent{number}.txt", "wb") as log:
            agents.append(subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return agents


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Until it holds; False after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def kill_a_rank(
    lines: list[list[str]], journal: Path, log_folder: Path, *, seed: int, last_line: int, seconds: float = 240
) -> dict[str, object]:
    """Start the torchruns, SIGKILL rank 0 or 1 when `journal` has a random number of lines, wait for the end.

    journal: a file that grows by one line per step or answer, or a pattern of such files; last_line: the latest moment
    of the kill. Returns what happened: the exit code of each torchrun, the rank and the lines at the kill.
    """
    generator = random.Random(seed)
    rank, line = generator.randrange(2), generator.randrange(1, last_line + 1)
    agents = start_agents(lines, log_folder)
    try:

        def ended() -> bool:
            return all(agent.poll() is not None for agent in agents)

        reached = wait_until(lambda: ended() or lines_in(journal.parent, journal.name) >= line, seconds)
        workers = {number: pid for agent in agents for number, pid in workers_of(agent.pid).items()}
        was_killed = reached and not ended() and rank in workers
        if was_killed:
            os.kill(workers[rank], signal.SIGKILL)
        wait_until(ended, seconds)
        return {"seed": seed, "rank": rank, "line": line, "killed": was_killed, "codes": [a.poll() for a in agents]}
    finally:
        for agent in agents:
            if agent.poll() is None:
                for pid in (*workers_of(agent.pid).values(), agent.pid):
                    os.kill(pid, signal.SIGKILL)
            agent.wait()
