"""PPO killed, stopped or moved to other ranks: the run goes on, and where it must, to the same bits.

pytest tests/rl/test_ppo_resume.py; the long proof: pytest -m very_slow tests/rl/test_ppo_resume.py
"""

import json
import os
import random
import signal
import subprocess
import time

import pytest

from tests.rl.test_ppo_loop import assert_same_run, run
from tests.support.processes import run as run_script
from tests.support.processes import start
from tests.support.tiny_ppo import journal_of, ppo_arguments, ppo_command, ppo_data, run_ppo_here
from tests.support.tiny_run import ROOT, wait_for_step

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

# 3 epochs of 3 iterations, each of 2 or (the third, of 3 responses) 1 minibatches twice, an adaptive kl_coef
LONG = {
    "epochs": 3,
    "ppo_epochs": 2,
    "minibatch_size": 3,
    "kl_controller": "adaptive",
    "kl_target": 0.1,
    "kl_horizon": 8,
    "checkpoint_every": 4,
    "eval_limit": 2,
    "eval_every": 2,
}
STEPS = 30  # an epoch: 2 minibatches, 2 minibatches, 1 minibatch, each twice


def settings(**changes):
    return {**LONG, "eval_data": ppo_data(), **changes}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run to compare with."""
    output = tmp_path_factory.mktemp("straight") / "run"
    rows = run(output, **settings())
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return output


def kill_and_resume(output, seed, kills):
    """SIGKILL `kills` times at random steps and random moments within them, then run to the end in this process."""
    generator, done = random.Random(seed), 0
    for _ in range(kills):
        step, seconds = done + generator.randrange(0, 7), generator.random() * 0.3
        print(f"seed {seed}: SIGKILL {seconds:.3f} s after step {step}")
        process = start("run_ppo", ppo_arguments(output, **settings()))
        if wait_for_step(process, output, step):
            time.sleep(seconds)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        done = max([int(path.name[5:]) for path in (output / "checkpoints").glob("step_*")], default=0)
    run(output, **settings())
    assert not list((output / "checkpoints").glob(".*"))


# ---------------------------------------------------------------------------------------------------------------------
# Stopping, checkpoints, ranks


def test_stopping_inside_an_epoch_changes_nothing(straight, tmp_path):
    """Epochs have 10 steps. max_steps ends with whole iterations: 1 -> 4 (iteration 0), 9 -> 10, 17 -> 18."""
    output, quiet = tmp_path / "run", {"eval_data": "", "eval_every": 0}
    for steps, done in ((1, 4), (9, 10), (17, 18)):
        code, out, err = run_ppo_here(output, **settings(max_steps=steps, **quiet))
        assert (code, err) == (0, "") and f"trained {done} step" in out
    code, out, err = run_ppo_here(output, **settings(**quiet))
    assert (code, err) == (0, "") and "(step 18, saved by 1 rank)" in out
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert journal_of(output, name) == journal_of(straight, name)
    assert (output / "final" / "model.safetensors").read_bytes() == (
        straight / "final" / "model.safetensors"
    ).read_bytes()


def test_kl_coef_of_the_adaptive_controller_is_in_the_checkpoint(straight):
    rows = journal_of(straight, "metrics.jsonl")
    coefficients = {row["iteration"]: row["ppo/kl_coef"] for row in rows}
    assert len(set(coefficients.values())) == 9
    newest = sorted((straight / "checkpoints").iterdir())
    assert [path.name for path in newest] == ["step_00000028", "step_00000030"]
    extra = json.loads((newest[0] / "trainer_state.json").read_text())["extra"]
    assert extra == {"iteration": 8, "kl_coef": coefficients[8]}


def test_a_killed_start_leaves_no_second_evaluation_of_step_0(straight, tmp_path):
    """The figures of step 0 are written before there is any checkpoint; the next start writes them again."""
    output = tmp_path / "run"
    output.mkdir()
    first = (straight / "evaluations.jsonl").read_text().splitlines()[0]
    (output / "run_identity.json").write_bytes((straight / "run_identity.json").read_bytes())
    (output / "evaluations.jsonl").write_text(first + "\n")
    (output / "samples.jsonl").write_text('{"step": 4, "iteration": 0, "torn')
    run(output, **settings(max_steps=1))
    assert [line["step"] for line in journal_of(output, "evaluations.jsonl")] == [0, 4]
    assert journal_of(output, "samples.jsonl") == journal_of(straight, "samples.jsonl")[:4]


def test_a_finished_run_is_not_trained_again(straight):
    journals = {path.name: path.read_bytes() for path in straight.glob("*.jsonl")}
    final = (straight / "final" / "model.safetensors").read_bytes()
    code, out, err = run_ppo_here(straight, **settings())
    assert (code, err) == (0, "") and f"already finished at step {STEPS}; model: " in out
    assert {path.name: path.read_bytes() for path in straight.glob("*.jsonl")} == journals
    assert (straight / "final" / "model.safetensors").read_bytes() == final


@pytest.mark.slow
def test_sigkill_at_a_random_moment_is_bit_exact(straight, tmp_path):
    kill_and_resume(tmp_path / "run", 0, kills=1)
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.very_slow
@pytest.mark.parametrize("number", range(3))
def test_runs_killed_five_times_are_bit_exact(straight, tmp_path, number):
    kill_and_resume(tmp_path / "run", number + 1, kills=5)
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.slow
def test_a_run_moves_between_rank_counts(straight, tmp_path):
    """1 rank -> 2 ranks -> 1 rank; each reads the other's shards. Sums in another order: equal to rounding."""
    output = tmp_path / "run"
    run(output, **settings(max_steps=4))
    code, out, err = run_script("run_ppo", ppo_arguments(output, **settings(max_steps=8)), ranks=2)
    assert code == 0, err
    assert "(step 4, saved by 1 rank)" in out
    code, out, err = run_ppo_here(output, **settings(max_steps=10))
    assert (code, err) == (0, "") and "(step 8, saved by 2 ranks)" in out
    rows, others = journal_of(output, "metrics.jsonl"), journal_of(straight, "metrics.jsonl")[:10]
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        for name in ("score", "kl_sequence", "kl_coef", "policy_loss", "value_loss", "policy_grad_norm"):
            assert row[f"ppo/{name}"] == pytest.approx(other[f"ppo/{name}"], rel=1e-3, abs=1e-4), (row["step"], name)


@pytest.mark.very_slow
def test_sigterm_at_one_of_two_ranks_stops_both(tmp_path):
    output = tmp_path / "run"
    line, pipe = ppo_command(output, ranks=2, **settings()), subprocess.PIPE
    process = subprocess.Popen(line, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert wait_for_step(process, output, 4)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode != 0
    done = journal_of(output, "metrics.jsonl")[-1]["step"]
    assert done < STEPS
    assert (output / "checkpoints" / f"step_{done:08d}" / "random_rank00001.json").exists()
