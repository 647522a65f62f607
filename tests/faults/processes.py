"""Faults of processes: ranks and agents killed, signals in every phase, a rank that hangs, a gradient that is NaN."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.faults.runs import (
    LAST_LINES,
    PROGRAMS,
    Trial,
    arguments_of,
    compare,
    fault_of_end,
    finish,
    journal_lines,
    undisturbed,
)
from tests.support.processes import Running, free_port, spawn, start
from tests.support.restart_trials import kill_a_rank, start_agents, torchrun, wait_until, workers_of
from tests.support.small_training import digest_of_weights, make_parts
from tests.support.tiny_run import random_batch
from train.distributed import close_world, init_world, local_part
from train.run_control import TrainingError
from train.sft_config import SFTConfig
from train.sft_loop import train_step

SECONDS_OF_PATIENCE = 5  # --collective_timeout of the runs whose rank hangs

# ---------------------------------------------------------------------------------------------------------------------
# Killed


def rank_killed_under_restart(number: int, rng: random.Random, folder: Path) -> Trial:
    """torchrun --max_restarts with two ranks, one killed by SIGKILL: the same torchrun must end with all steps once."""
    program = ("run_sft", "run_sft", "run_ppo", "run_eval")[number % 4]
    output = folder / "run"
    journal = output / {"run_eval": "predictions/tiny-seen.*jsonl"}.get(program, "metrics.jsonl")
    lines = torchrun(program, arguments_of(program, output))
    found = kill_a_rank(lines, journal, folder / "log", seed=rng.randrange(10**6), last_line=LAST_LINES[program])
    if found["codes"] != [0]:
        return Trial(f"{program}: {found}: {_last_words(folder)}")
    out = (folder / "log/agent0.txt").read_text(encoding="utf-8", errors="replace")
    return compare(program, output, found["line"] if found["killed"] else 0, out, ranks=2)


def agent_of_two_killed(number: int, rng: random.Random, folder: Path) -> Trial:
    """Two agents on loopback; one is killed with its worker and started again, as a scheduler would."""
    output = folder / "run"
    lines = torchrun("run_sft", arguments_of("run_sft", output, checkpoint_every=3), agents=2, restarts=3)
    line = rng.randrange(2, LAST_LINES["run_sft"])
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # docs/cluster.md says so for several nodes
    agents = start_agents(lines, folder / "log")
    try:
        wait_until(lambda: journal_lines("run_sft", output) >= line or _have_ended(agents), 120)
        if _have_ended(agents):
            return Trial(f"ended before the fault: {_last_words(folder)}")
        for pid in (agents[1].pid, *workers_of(agents[1].pid).values()):
            os.kill(pid, signal.SIGKILL)
        agents[1].wait()
        before = journal_lines("run_sft", output)
        agents[1] = start_agents([lines[1]], folder / "again")[0]
        wait_until(lambda: _have_ended(agents), 240)
        codes = [agent.poll() for agent in agents]
        if codes != [0, 0]:
            return Trial(f"codes {codes}: {_last_words(folder)}")
        return compare("run_sft", output, before, (folder / "log/agent0.txt").read_text(), ranks=2)
    finally:
        _end(agents)


def agent_killed(number: int, rng: random.Random, folder: Path) -> Trial:
    """Only torchrun is killed: its workers must end within 10 seconds, and the same command must go on."""
    program = PROGRAMS[number % 3]
    output = folder / "run"
    agents = start_agents(torchrun(program, arguments_of(program, output)), folder / "log")
    workers: dict[int, int] = {}
    try:
        wait_until(lambda: journal_lines(program, output) >= 2 or _have_ended(agents), 120)
        workers = workers_of(agents[0].pid)
        agents[0].kill()
        agents[0].wait()
        if not wait_until(lambda: not any(map(_is_alive, workers.values())), 10):
            return Trial(f"{program}: workers alive 10 s after the end of their torchrun")
        return finish_on_two(program, output, journal_lines(program, output))
    finally:
        for pid in filter(_is_alive, workers.values()):
            os.kill(pid, signal.SIGKILL)
        _end(agents)


def finish_on_two(program: str, output: Path, lines_before: int) -> Trial:
    """As runs.finish, on two ranks."""
    running = start(program, arguments_of(program, output), ranks=2)
    out, err = running.communicate()
    if running.returncode != 0:
        return Trial(f"the next start ended with code {running.returncode}: {err[-300:]!a}")
    return compare(program, output, lines_before, out, ranks=2)


def _is_alive(pid: int) -> bool:
    """Whether the process runs; a dead one that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _have_ended(agents: list) -> bool:
    return all(agent.poll() is not None for agent in agents)


def _end(agents: list) -> None:
    for agent in agents:
        if agent.poll() is None:
            for pid in (*workers_of(agent.pid).values(), agent.pid):
                os.kill(pid, signal.SIGKILL)
        agent.wait()


def _last_words(folder: Path) -> str:
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*/agent*.txt"))]
    return " | ".join(text[-300:] for text in texts)


# ---------------------------------------------------------------------------------------------------------------------
# Signals

MOMENTS: dict[str, dict[str, Callable[[Path, int], bool]]] = {  # phase -> whether it has begun: output folder, a line
    "run_sft": {
        "reading": lambda output, line: True,
        "loading": lambda output, line: (output / "lock").exists(),
        "first step": lambda output, line: (output / "metrics.jsonl").exists(),
        "mid step": lambda output, line: journal_lines("run_sft", output) >= line,
        "saving": lambda output, line: any((output / "checkpoints").glob(".saving_*")),
        "last save": lambda output, line: journal_lines("run_sft", output) >= 22,
        "export": lambda output, line: (output / ".final.incomplete").exists() or (output / "final").exists(),
        "report": lambda output, line: (output / "final").exists(),
    },
    "run_ppo": {
        "reading": lambda output, line: True,
        "loading": lambda output, line: (output / "lock").exists(),
        "evaluation": lambda output, line: (output / "metrics.jsonl").exists(),
        "first step": lambda output, line: journal_lines("run_ppo", output) >= 1,
        "mid step": lambda output, line: journal_lines("run_ppo", output) >= line,
        "saving": lambda output, line: any((output / "checkpoints").glob(".saving_*")),
        "export": lambda output, line: (output / ".final.incomplete").exists() or (output / "final").exists(),
        "report": lambda output, line: (output / "final").exists(),
    },
    "run_eval": {
        "reading": lambda output, line: True,
        "loading": lambda output, line: (output / "predictions/lock").exists(),
        "first answer": lambda output, line: any((output / "predictions").glob("tiny-seen.rank*")),
        "mid answers": lambda output, line: journal_lines("run_eval", output) >= line,
        "scoring": lambda output, line: (output / "predictions/tiny-seen.jsonl").exists(),
        "report": lambda output, line: (output / "summary.json").exists(),
    },
}


def signal_in_a_phase(number: int, rng: random.Random, folder: Path) -> Trial:
    """SIGTERM or SIGINT in a phase of one of the programs: a polite end, and the same command goes on."""
    program = PROGRAMS[number % 3]
    phases = list(MOMENTS[program])
    phase = phases[number // 3 % len(phases)]
    sent = (signal.SIGTERM, signal.SIGINT)[number // 3 // len(phases) % 2 if number < 48 else rng.randrange(2)]
    output, line = folder / "run", rng.randrange(2, LAST_LINES[program])
    undisturbed(program)
    running = start(program, arguments_of(program, output))
    wait_until(lambda: _has_begun(running), 60)
    time.sleep(0.005)
    has_begun = MOMENTS[program][phase]
    end = time.monotonic() + 120
    while not has_begun(output, line) and running.poll() is None and time.monotonic() < end:
        time.sleep(0.0005)
    time.sleep(rng.random() * (0.3 if phase == "reading" else 0.02))
    before = journal_lines(program, output) if output.exists() else 0
    running.send_signal(sent)
    _, err = running.communicate(timeout=120)
    if problem := fault_of_end(running.returncode, err, (0, 128 + sent)):
        return Trial(f"{program}, {sent.name} in {phase}: {problem}")
    after = finish(program, output, before)
    return Trial(f"{program}, {sent.name} in {phase}: {after.problem}" if after.problem else "", after.steps_lost)


def _has_begun(running: Running) -> bool:
    """Whether the rank has its own standard error: the program's first line is next."""
    return (running.folder / "0.err").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks


def rank_that_hangs(number: int, rng: random.Random, folder: Path) -> Trial:
    """SIGSTOP of one of two ranks: the other must end with a line that says what it waited for."""
    output, stopped = folder / "run", rng.randrange(2)
    flags = arguments_of("run_sft", output, collective_timeout=SECONDS_OF_PATIENCE)
    agents = start_agents(torchrun("run_sft", flags, restarts=0), folder / "log")
    line = rng.randrange(1, LAST_LINES["run_sft"])
    wait_until(lambda: journal_lines("run_sft", output) >= line or _have_ended(agents), 120)
    workers = workers_of(agents[0].pid)
    try:
        os.kill(workers[stopped], signal.SIGSTOP)
        before, began = journal_lines("run_sft", output), time.monotonic()
        wait_until(lambda: not _is_alive(workers[1 - stopped]), SECONDS_OF_PATIENCE + 60)
        seconds, has_ended = time.monotonic() - began, not _is_alive(workers[1 - stopped])
        os.kill(workers[stopped], signal.SIGKILL)
        wait_until(lambda: _have_ended(agents), 60)
    finally:
        _end(agents)
    lines = (folder / "log/agent0.txt").read_text().splitlines()
    said = [
        each for each in lines if f"that rank {stopped} " in each and not each.startswith("  traceback")
    ]  # torchrun's
    if not has_ended or len(said) != 1:
        return Trial(f"{seconds:.0f} s after rank {stopped} was stopped: {said or _last_words(folder)}")
    return finish_on_two("run_sft", output, before)


def nan_in_one_gradient(number: int, rng: random.Random, folder: Path) -> Trial:
    """One rank's gradient becomes NaN or infinite: all ranks refuse the step alike, before any update."""
    step, rank, value = rng.randrange(1, 4), rng.randrange(2), rng.choice(("nan", "inf", "-inf"))
    spawn(_poisoned_steps, (free_port(), step, rank, value, str(folder)), ranks=2)
    ends = [(folder / f"rank{each}.txt").read_text().split("|") for each in range(2)]
    for stopped_at, before, after, message in ends:
        if stopped_at != str(step) or before != after or "stopped before the update" not in message:
            return Trial(f"{value} of rank {rank} in step {step}: {ends}")
    return Trial()


def _poisoned_steps(rank: int, port: int, step: int, poisoned_rank: int, value: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = init_world("cpu")
    model, optimizer = make_parts(world)
    config = SFTConfig(loss_normalization="token_mean", max_grad_norm=1.0)

    def digest() -> str:
        return digest_of_weights({name: local_part(each).detach() for name, each in model.named_parameters()})

    def poison(_module: object, _inputs: object, output_BTD: torch.Tensor) -> None:
        output_BTD.register_hook(lambda gradient_BTD: gradient_BTD * float(value))  # the loss stays finite

    end = "no step was refused"
    for number in range(1, 5):
        before = digest()
        if number == step and rank == poisoned_rank:
            model.layers[0].register_forward_hook(poison)
        try:
            train_step(config, model, optimizer, [random_batch(2 * number + rank)], world, step=number)
        except TrainingError as error:
            end = f"{number}|{before}|{digest()}|{error}"
            break
    (Path(folder) / f"rank{rank}.txt").write_text(end)
    close_world()
