"""train/progress.py: lines of figures by hand, folders that do not collide, commands that a shell reads back."""

import shlex
from pathlib import Path

import pytest

from tests.support.tiny_run import run_here
from train.progress import command, is_due, sft_line, time_left, unused_folder


def row(step, loss, norm, tokens, seconds):
    return {
        "step": step,
        "sft/loss": loss,
        "sft/learning_rate": step * 1e-4,
        "sft/grad_norm": norm,
        "sft/input_tokens": tokens,
        "time/step_seconds": seconds,
    }


def test_the_sft_line_by_hand():
    """Loss (1 + 2) / 2, norm (3 + 5) / 2; 400 tokens in 2 s, not the mean of 100/0.5 and 300/1.5; 100 steps of 1 s."""
    rows = [row(19, 1.0, 3.0, 100, 0.5), row(20, 2.0, 5.0, 300, 1.5)]
    assert sft_line(rows, 120) == (
        "step 20/120  loss 1.5000 (mean of 2 steps)  learning rate 2.00e-03  gradient norm 4.00  200 tokens/s  "
        "1 min 40 s left"
    )
    assert "(mean of 1 step)" in sft_line(rows[:1], 120)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s left"), (59, "59 s left"), (61, "1 min 1 s left"), (7265, "2 h 1 min left")]
)
def test_time_left(seconds, text):
    assert time_left([{"step": 1, "time/step_seconds": seconds}], 2) == text


def test_multiples_that_a_step_or_several_reach():
    assert [step for step in range(1, 10) if is_due(step, step - 1, 3)] == [3, 6, 9]
    assert is_due(7, 5, 3) and not is_due(8, 6, 3) and is_due(6, 5, 3)
    assert not is_due(5, 4, 0)


def test_a_run_prints_its_lines_off_a_terminal(tmp_path):
    code, out, _ = run_here(tmp_path / "run", max_steps=5, log_every=2)
    assert code == 0
    starts = [line.split("  ")[0] for line in out.splitlines() if line.startswith("step ")]
    assert starts == ["step 2/5", "step 4/5", "step 5/5"]
    code, out, _ = run_here(tmp_path / "silent", max_steps=2, log_every=0)
    assert code == 0 and "loss 0" not in out and "step 2/2" not in out


def test_folders_of_the_next_stage(tmp_path):
    runs = tmp_path / "runs"
    for name, stage, expected in (
        ("sft", "eval", "eval_sft"),
        ("sft", "ppo", "ppo"),
        ("my_sft_2", "ppo", "my_ppo_2"),
        ("first", "ppo", "first_ppo"),
    ):
        assert unused_folder(runs / name, stage) == runs / expected
    (runs / "ppo").mkdir(parents=True)
    (runs / "ppo_2").mkdir()
    assert unused_folder(runs / "sft", "ppo") == runs / "ppo_3"
    assert unused_folder(Path("sft"), "eval") == Path("eval_sft")


def test_a_command_survives_the_shell():
    line = command("run_eval.py", model="a folder/it's", output="b")
    assert shlex.split(line) == ["python", "run_eval.py", "--model", "a folder/it's", "--output", "b"]
