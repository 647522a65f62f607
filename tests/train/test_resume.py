"""Killed, stopped, damaged or moved to other ranks: the run goes on, and where it must, to the same bits."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.support.processes import run, start
from tests.support.tiny_run import ROOT, arguments, command, digest_of_final, metrics_of, run_here, wait_for_step

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

# 4 epochs of 11 steps: long enough to be killed inside twice, a few seconds in all
LONG = {"epochs": 4, "checkpoint_every": 4}
STEPS = 44


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nobody disturbed."""
    output = tmp_path_factory.mktemp("straight") / "run"
    code, _, err = run_here(output, **LONG)
    assert code == 0, err
    return output


def kill_and_resume(output, seed, kills):
    """SIGKILL `kills` times at random steps and random moments within them, then run to the end in this process."""
    generator, done = random.Random(seed), 0
    for _ in range(kills):
        step, seconds = done + generator.randrange(1, 14), generator.random() * 0.2
        print(f"seed {seed}: SIGKILL {seconds:.3f} s after step {step}")
        process = start("run_sft", arguments(output, **LONG))
        if wait_for_step(process, output, step):
            time.sleep(seconds)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        done = max([int(path.name[5:]) for path in (output / "checkpoints").glob("step_*")], default=0)
    code, _, err = run_here(output, **LONG)
    assert code == 0, err


def assert_same_run(output, straight):
    assert digest_of_final(output) == digest_of_final(straight)
    rows, others = metrics_of(output), metrics_of(straight)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, other in zip(rows, others, strict=True):
        assert {key: value for key, value in row.items() if not key.startswith("time/")} == {
            key: value for key, value in other.items() if not key.startswith("time/")
        }
    assert not list((output / "checkpoints").glob(".*"))


def test_stopping_at_any_step_changes_nothing(straight, tmp_path):
    for steps in (1, 2, 9, 29):
        code, out, err = run_here(tmp_path / "run", **LONG, max_steps=steps)
        assert code == 0, err
        assert f"trained {steps} step" in out
    code, out, err = run_here(tmp_path / "run", **LONG)
    assert code == 0, err
    assert "resuming from" in out and "step_00000029 (step 29, saved by 1 rank)" in out
    assert_same_run(tmp_path / "run", straight)


def times_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_finished_run_says_so_and_writes_nothing(straight):
    before = times_of(straight)
    for flags in ({}, {"max_steps": 3}, {"log_every": 1}):
        code, out, err = run_here(straight, **LONG, **flags)
        assert (code, err) == (0, "")
        assert out.startswith(f"already finished at step {STEPS}; model: {straight / 'final'}\nscore it:")
        assert "trajectories" not in out  # nothing was read
    assert times_of(straight) == before
    code, _, err = run_here(straight, **LONG, resume="never")
    assert code == 2 and "found checkpoint step_00000044" in err


def test_without_its_export_a_finished_run_exports_again(straight, tmp_path):
    output = tmp_path / "run"
    assert run_here(output, **LONG, max_steps=2)[0] == 0
    digest = digest_of_final(output)
    shutil.rmtree(output / "final")
    code, out, err = run_here(output, **LONG, max_steps=2)
    assert code == 0, err
    assert "(step 2, saved by 1 rank)" in out and digest_of_final(output) == digest
    code, out, _ = run_here(output, **LONG, max_steps=3)  # not finished: one more step was asked for
    assert code == 0 and "already" not in out and metrics_of(output)[-1]["step"] == 3


@pytest.mark.parametrize("damage", ["truncated", "no manifest"])
def test_a_damaged_newest_checkpoint_is_passed_over(straight, tmp_path, damage):
    output = tmp_path / "run"
    run_here(output, **LONG, max_steps=19)
    newest = output / "checkpoints" / "step_00000019"
    if damage == "truncated":
        file = sorted(newest.glob("state/*.safetensors"))[0]
        file.write_bytes(file.read_bytes()[:1000])
    else:
        (newest / "manifest.json").unlink()
    code, out, err = run_here(output, **LONG)
    assert code == 0, err
    assert f"{newest}: refused: " in out and "step_00000016 (step 16" in out
    assert_same_run(output, straight)


def test_without_any_good_checkpoint_the_run_refuses_to_start_anew(tmp_path):
    output = tmp_path / "run"
    run_here(output, **LONG, max_steps=2)
    (output / "checkpoints" / "step_00000002" / "manifest.json").unlink()
    code, _, err = run_here(output, **LONG)
    assert code == 2 and err.count("\n") == 1 and "found no good checkpoint among 1" in err
    assert (output / "checkpoints" / "step_00000002").is_dir()


@pytest.mark.slow
def test_sigkill_at_random_moments_is_bit_exact(straight, tmp_path):
    kill_and_resume(tmp_path / "run", 0, kills=2)
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.very_slow
@pytest.mark.parametrize("number", range(10))
def test_ten_runs_killed_and_resumed(straight, tmp_path, number):
    """The proof of the closing note: `pytest -m very_slow tests/train/test_resume.py`."""
    kill_and_resume(tmp_path / "run", number + 1, kills=2)
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_saves_at_once_and_says_how_to_go_on(straight, tmp_path, number, code):
    output = tmp_path / "run"
    process = start("run_sft", arguments(output, **LONG | {"checkpoint_every": 0}))
    assert wait_for_step(process, output, 5)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (code, "")
    done = metrics_of(output)[-1]["step"]
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step_{done:08d}"]
    assert f"stopped by {signal.Signals(number).name} after step {done} of {STEPS}" in out
    assert not (output / "final").exists()
    finished, _, err = run_here(output, **LONG)
    assert finished == 0, err
    assert_same_run(output, straight)


@pytest.mark.slow
def test_a_run_moves_between_rank_counts(straight, tmp_path):
    """1 rank -> 2 ranks -> 1 rank; each reads the other's shards. Sums in another order: equal to rounding."""
    output = tmp_path / "run"
    run_here(output, **LONG, max_steps=5)
    code, out, err = run("run_sft", arguments(output, **LONG, max_steps=9), ranks=2)
    assert code == 0, err
    assert "(step 5, saved by 1 rank)" in out
    code, out, err = run_here(output, **LONG, max_steps=12)
    assert code == 0, err
    assert "(step 9, saved by 2 ranks)" in out
    for row, other in zip(metrics_of(output), metrics_of(straight)[:12], strict=True):
        assert row["step"] == other["step"]
        assert row["sft/loss"] == pytest.approx(other["sft/loss"], rel=1e-4)
        assert row["sft/grad_norm"] == pytest.approx(other["sft/grad_norm"], rel=1e-3)


@pytest.mark.very_slow
def test_sigterm_reaches_all_ranks(tmp_path):
    """Under torchrun only one of two ranks gets the signal; both save and leave."""
    output = tmp_path / "run"
    line, pipe = command(output, ranks=2, **LONG | {"checkpoint_every": 0}), subprocess.PIPE
    process = subprocess.Popen(line, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert wait_for_step(process, output, 3)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode != 0
    done = metrics_of(output)[-1]["step"]
    assert done < STEPS
    assert (output / "checkpoints" / f"step_{done:08d}" / "random_rank00001.json").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_finished_run_exports_a_damaged_model_again(tmp_path, name):
    output = tmp_path / "run"
    assert run_here(output, max_steps=2)[0] == 0
    before = digest_of_final(output)
    path = output / "final" / name
    path.write_bytes(path.read_bytes()[:100])
    code, out, err = run_here(output, max_steps=2)
    assert (code, err) == (0, "") and "(step 2, saved by 1 rank)" in out and digest_of_final(output) == before
    assert run_here(output, max_steps=2)[1].startswith("already finished at step 2; ")
