"""Ranks that die, hang, fail alone or see another folder: the others end at once, with a line that says which."""

import os
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import run_sft
from data.json_records import DataError
from start_up import end_with_torchrun
from tests.support.processes import free_port, lines_in, spawn, start
from tests.support.restart_trials import kill_a_rank, torchrun, wait_until
from tests.support.tiny_run import arguments, metrics_of, run_here
from train import run_control
from train.distributed import (
    EXIT_LOST_RANK,
    any_rank,
    gather_objects,
    init_world,
    leave_if_a_rank_is_lost,
    limit_waiting,
    ranks_that_hold_shards_only,
    wait_for_all,
)
from train.run_control import check_shared_folder

LONG = {"epochs": 6, "checkpoint_every": 4}


def join(rank: int, ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def wait_for_lines(output: Path, number: int) -> bool:
    return wait_until(lambda: lines_in(output, "metrics.jsonl") >= number, 200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGSTOP, "did not come in time"), (signal.SIGKILL, "ended or does not answer")]
)
def test_a_rank_that_hangs_or_dies_is_named(tmp_path, number, said):
    running = start("run_sft", arguments(tmp_path / "run", **LONG, collective_timeout=2), ranks=2)
    assert wait_for_lines(tmp_path / "run", 3)
    os.kill(running.pids[1], number)
    assert wait_until(lambda: running.workers[0].exitcode is not None, 60)
    assert running.workers[0].exitcode == EXIT_LOST_RANK
    if number == signal.SIGSTOP:
        os.kill(running.pids[1], signal.SIGKILL)
    _, err = running.communicate()
    assert err.count("\n") == 1 and err.startswith("step ") and " > " in err
    assert f"found that rank 1 {said}, expected all ranks; the same command continues" in err


def fail_alone(rank: int, port: int, folder: str) -> None:
    """Rank 1 raises in place of training; rank 0 waits for it in a sum over all ranks."""
    join(rank, 2, port)

    def train(config, data, model, optimizer, world, **_):
        if world.rank == 1:
            raise DataError("data.json:7: found a fault of rank 1, expected none")
        any_rank(False)

    run_sft.train_sft = train
    with open(Path(folder) / f"{rank}.err", "w") as stream:
        os.dup2(stream.fileno(), 2)
    code = None
    began = time.monotonic()
    try:
        run_sft.main(arguments(Path(folder) / "run"))
    except SystemExit as stop:
        code = stop.code
    (Path(folder) / f"{rank}.code").write_text(f"{code} {time.monotonic() - began:.1f}")
    os._exit(0)


@pytest.mark.slow
def test_an_error_of_one_rank_does_not_wait_for_the_others(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match=f"exit code {EXIT_LOST_RANK}"):
        spawn(fail_alone, (free_port(), str(tmp_path)), ranks=2)
    assert (tmp_path / "1.code").read_text().startswith("2 ")
    assert (tmp_path / "1.err").read_text() == "rank 1: data.json:7: found a fault of rank 1, expected none\n"
    line = (tmp_path / "0.err").read_text()
    assert line.startswith("train > any_rank > global_sum: found that rank 1 ended") and line.count("\n") == 1


def wait_twice(rank: int, port: int, folder: str) -> None:
    """Rank 1 comes to nothing; rank 0 waits in vain, as a save does, and then tells the others of it."""
    join(rank, 2, port)
    world = init_world("cpu")
    wait_for_all()
    if rank == 1:
        time.sleep(20)
        os._exit(0)
    with open(Path(folder) / "0.err", "w") as stream:
        os.dup2(stream.fileno(), 2)
    limit_waiting(1.0, world)
    with pytest.raises(RuntimeError, match="Timed out"):
        any_rank(False)
    try:
        gather_objects("it failed")  # over the connection that the first wait has closed
    except RuntimeError as error:
        leave_if_a_rank_is_lost(error)
        raise


@pytest.mark.slow
def test_a_second_wait_for_a_lost_rank_ends_as_the_first(tmp_path):
    """Without that a run whose rank hung during a save ended in a traceback, or not at all."""
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match=f"exit code {EXIT_LOST_RANK}"):
        spawn(wait_twice, (free_port(), str(tmp_path)), ranks=2)
    line = (tmp_path / "0.err").read_text()
    assert "gather_objects: found that rank 1 did not come in time" in line and line.count("\n") == 1


def folders_apart(rank: int, port: int, folder: str) -> None:
    join(rank, 2, port)
    run_control.SECONDS_TO_SEE_A_FILE = 0.3  # it never comes
    world = init_world("cpu")
    shared, own = Path(folder) / "shared", Path(folder) / f"own{rank}"
    own.mkdir()
    check_shared_folder(shared, world)
    wait_for_all()
    assert not list(shared.iterdir())
    with pytest.raises(DataError, match="found that rank 1 does not see what rank 0 writes"):
        check_shared_folder(own, world)
    wait_for_all()
    assert not list(own.iterdir())


@pytest.mark.slow
def test_a_folder_that_the_ranks_do_not_share_is_refused(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / ".shared_0123").touch()  # left by a start that was killed
    spawn(folders_apart, (free_port(), str(tmp_path)), ranks=2)


def test_ranks_without_work_are_counted():
    world = init_world("cpu")
    assert ranks_that_hold_shards_only(world.size, 1) == ""
    assert ranks_that_hold_shards_only(world.size, 0).startswith(
        "1 of 1 ranks will only hold shards: a step has work for 0"
    )


def test_a_checkpoint_whose_saving_was_cut_short_is_reported(tmp_path):
    run_here(tmp_path / "run", max_steps=1)
    (tmp_path / "run" / "checkpoints" / ".saving_step_00000002").mkdir()
    code, out, err = run_here(tmp_path / "run", max_steps=2)
    assert code == 0, err
    assert ".saving_step_00000002: removed; its saving was cut short, and nothing else is lost" in out


# ---------------------------------------------------------------------------------------------------------------------
# torchrun itself


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill(tmp_path):
    output = tmp_path / "run"
    lines = torchrun("run_sft", arguments(output, checkpoint_every=2))
    result = kill_a_rank(lines, output / "metrics.jsonl", tmp_path, seed=1, last_line=6)
    log = (tmp_path / "agent0.txt").read_text()
    assert result["killed"] and result["codes"] == [0], log
    assert "Traceback" not in log
    assert run_here(tmp_path / "one_rank")[0] == 0
    rows, others = metrics_of(output), metrics_of(tmp_path / "one_rank")
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(1, 12))
    for row, other in zip(rows, others, strict=True):
        assert row["sft/loss"] == pytest.approx(other["sft/loss"], rel=1e-4)
        assert row["sft/grad_norm"] == pytest.approx(other["sft/grad_norm"], rel=1e-4)
        assert row["sft/trained_tokens"] == other["sft/trained_tokens"]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_worker_ends_with_its_torchrun():
    """A process in torchrun's place forks a worker and is killed."""
    read_end, write_end = os.pipe()
    torchrun_pid = os.fork()
    if torchrun_pid == 0:
        if os.fork() == 0:
            os.environ["TORCHELASTIC_RUN_ID"] = "trial"
            end_with_torchrun()
            os.write(write_end, b"x")
        time.sleep(60)
        os._exit(0)
    os.close(write_end)
    assert os.read(read_end, 1) == b"x"
    os.kill(torchrun_pid, signal.SIGKILL)
    os.waitpid(torchrun_pid, 0)
    ready, _, _ = select.select([read_end], [], [], 10)  # readable: the worker, which held the other end, is gone
    assert ready and os.read(read_end, 1) == b""
    os.close(read_end)
