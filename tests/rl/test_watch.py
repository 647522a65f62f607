"""rl/watch.py: the index ledger (one response worked by hand, rewards that do not fit), and the lines on stdout.

pytest tests/rl/test_watch.py
"""

import pytest
import torch

from data.tool_calls import ToolCall
from rl.advantages import compute_gae, kl_shaped_rewards
from rl.prompts import PPOPrompt
from rl.reward import CATEGORIES, tool_call_reward
from rl.rollout import Credited, Measured, Sampled
from rl.watch import format_ledger, format_sample, ppo_line
from tests.support.piece_tokenizer import PieceTokenizer
from tests.support.tiny_ppo import run_ppo_here

GOLD = (ToolCall("get", {}),)


def ledger(prompt_ids, response_ids, tokenizer, *, score, mask, kl_coef, **columns) -> str:
    """The ledger of a rollout of this one response; columns: one number per token."""
    grids = {f"{name}_BR": torch.tensor([numbers]) for name, numbers in columns.items()}
    sampled = Sampled(
        prompts=[PPOPrompt("t", 2, "here:1", prompt_ids, GOLD, [])],
        response_ids=[response_ids],
        ended=[True],
        results=[tool_call_reward("", GOLD, [])],
        scores_B=torch.tensor([score]),
        response_mask_BR=torch.tensor([mask]),
        sampler_logprobs_BR=grids["logprobs_BR"],
    )
    measured = Measured(
        sampled, grids["logprobs_BR"], grids["ref_logprobs_BR"], grids["logprobs_BR"], grids["values_BR"], seconds={}
    )
    credited = Credited(measured, kl_coef, grids["rewards_BR"], grids["advantages_BR"], grids["returns_BR"])
    title, *lines = format_ledger(credited, 0, tokenizer).splitlines()
    assert title.startswith("t turn 2: -2 unparsable: ")
    return "\n".join(lines)


def by_hand(*, with_eos: bool = True, **changes: object) -> str:
    """Three tokens, score -0.25, kl_coef 0.5, gamma = lambda = 1, values 0.1, 0.2, 0.3; KL 0.2, -0.1, 0.

    rewards -0.1, 0.05, -0.25; returns are their sums to the end: -0.3, -0.2, -0.25; advantages = returns - values.
    """
    tokenizer = PieceTokenizer()
    prompt_ids = [1, *tokenizer.encode("User: go\nAssistant:")]
    response_ids = [*tokenizer.encode_continuation(" get()"), tokenizer.eos_id][:3]
    assert len(response_ids) == 3
    if not with_eos:
        response_ids[2] = response_ids[0]
    columns = {
        "logprobs": [-0.5, -1.0, -0.1],
        "ref_logprobs": [-0.7, -0.9, -0.1],
        "rewards": [-0.1, 0.05, -0.25],
        "values": [0.1, 0.2, 0.3],
        "advantages": [-0.4, -0.4, -0.55],
        "returns": [-0.3, -0.2, -0.25],
        "score": -0.25,
        "mask": [True, True, True],
        "kl_coef": 0.5,
        **changes,
    }
    return ledger(prompt_ids, response_ids, tokenizer, **columns)


def test_ledger_by_hand():
    lines = by_hand().splitlines()
    n_prompt = int(lines[3].split()[0])
    assert lines[0].split() == ["position", "token", "mask", "logprob", "KL", "reward", "value", "advantage", "return"]
    assert [line.split()[0] for line in lines[1:6]] == [str(n_prompt + offset) for offset in (-2, -1, 0, 1, 2)]
    assert all(line.endswith("-" + 5 * (10 * " " + "-")) and " 0 " in line for line in lines[1:3])
    numbers = [[float(cell) for cell in line[28:].split()] for line in lines[3:6]]
    assert numbers == [
        [1, -0.5, 0.2, -0.1, 0.1, -0.4, -0.3],
        [1, -1.0, -0.1, 0.05, 0.2, -0.4, -0.2],
        [1, -0.1, 0.0, -0.25, 0.3, -0.55, -0.25],
    ]
    assert "' get'" in lines[3] and "'()'" in lines[4] and "'</s>'" in lines[5]
    assert lines[6] == f"score -0.2500 is at position {n_prompt + 2} (EOS): checked"
    assert lines[7] == "sum of rewards -0.3000 = score -0.2500 - kl_coef 0.5 * KL +0.1000: checked"
    assert len({len(line) for line in lines[:6]}) == 1


def test_truncated_response_says_so():
    assert "(the last generated token, no EOS): checked" in by_hand(with_eos=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": [-0.1, -0.2, 0.0]},  # the score one token early: the sum is right, the place is not
        {"kl_coef": 0.4},
        {"score": 1.0},
        {"ref_logprobs": [-0.5, -1.0, -0.2]},
    ],
)
def test_rewards_that_do_not_fit_are_called_wrong(changes):
    assert "WRONG" in by_hand(**changes)


def test_agrees_with_the_functions_of_training():
    """What advantages.py computes passes the checks and is in the table."""
    generator = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs = (-torch.rand(1, 3, generator=generator) for _ in range(2))
    values = torch.randn(1, 3, generator=generator)
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = kl_shaped_rewards(torch.tensor([-1.3]), logprobs, ref_logprobs, mask, 0.3)
    advantages, returns = compute_gae(rewards, values, mask, 1.0, 0.95)
    text = by_hand(
        **{
            name: tensor[0].tolist()
            for name, tensor in (
                ("logprobs", logprobs),
                ("ref_logprobs", ref_logprobs),
                ("rewards", rewards),
                ("values", values),
                ("advantages", advantages),
                ("returns", returns),
                ("mask", mask),
            )
        },
        score=-1.3,
        kl_coef=0.3,
    )
    assert text.count("checked") == 2 and f"{returns[0, 1].item():.4f}" in text


def test_masked_rows_have_no_numbers():
    nan = float("nan")
    lines = by_hand(
        mask=[True, True, False],
        rewards=[-0.1, -0.2, nan],
        logprobs=[-0.5, -1.0, nan],
        values=[0.1, 0.2, nan],
        advantages=[0.0, 0.0, nan],
        returns=[0.0, 0.0, nan],
    ).splitlines()
    assert lines[5].split()[-7:] == ["0", *"------"] and "nan" not in "".join(lines)
    assert lines[6].endswith("(the last generated token, no EOS): checked") and lines[7].endswith("checked")
    assert "no response token" in by_hand(mask=[False] * 3)


def test_any_piece_fits_its_column_in_ascii():
    class Pieces(PieceTokenizer):
        def piece(self, token_id: int) -> str:
            return ["\u4f60\u597d" * 9, "a" * 60, "\n", "'\"", "\x00\ufffd"][token_id % 5]

    columns = dict.fromkeys(("logprobs", "ref_logprobs", "rewards", "values", "advantages", "returns"), [0.0] * 5)
    text = ledger([5, 6, 7], list(range(5, 10)), Pieces(), **columns, score=0.0, mask=[True] * 5, kl_coef=0.1)
    lines = text.splitlines()
    assert text.isascii() and text.isprintable() is False and len(lines) == 10  # only line breaks are not printable
    assert len({len(line) for line in lines[:8]}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Lines on stdout


def metrics_row(step, iteration, score, kl, clipped, **shares):
    return {
        "step": step,
        "iteration": iteration,
        "ppo/score": score,
        "ppo/kl_sequence": kl,
        "ppo/clip_fraction": clipped,
        "time/step_seconds": 2.0,
        **{f"ppo/share_{name}": shares.get(name, 0.0) for name in CATEGORIES},
    }


def test_the_ppo_line_counts_a_rollout_once_and_an_update_each_time():
    """Iteration 0 has two steps: reward (-1 + 0.5) / 2, KL (0.2 + 0.4) / 2, clipped (0 + 0.3 + 0) / 3 = 10 %."""
    rows = [
        metrics_row(1, 0, -1.0, 0.2, 0.0, unparsable=1.0),
        metrics_row(2, 0, -1.0, 0.2, 0.3, unparsable=1.0),
        metrics_row(3, 1, 0.5, 0.4, 0.0, correct=0.5, wrong_value=0.5),
    ]
    assert ppo_line(rows, 33) == (
        "step 3/33  reward -0.250 (mean of 3 steps)  KL 0.300  clipped 10.0%  correct 25%, wrong value 25%, "
        "unparsable 50%  1 min 0 s left"
    )


def test_a_sample_is_printable_and_cut():
    row = {
        "id": "a\x1b[31m",
        "turn": 1,
        "request": "line\nbreak " + "x" * 500,
        "gold": "f(a=1)",
        "response": " f(a=\u202e2)",
        "explanation": r"-2 unparsable: found 'x\n'",
    }
    lines = format_sample(50, row).split("\n")
    assert lines[0] == "iteration 50, a\\x1b[31m turn 1:"
    assert lines[1].startswith("    user    line\\nbreak xxx") and lines[1].endswith("xxx... (512 characters)")
    assert len(lines[1]) < 140
    assert lines[2:] == ["    gold    f(a=1)", "    model   f(a=\\u202e2)", r"    reward  -2 unparsable: found 'x\n'"]


def lines_of_run(tmp_path, **flags):
    code, out, err = run_ppo_here(tmp_path / "run", **flags)
    assert (code, err) == (0, "")
    kinds = ("step ", "iteration ", "iterations ")
    return [" ".join(line.split()[:2]) for line in out.splitlines() if line.startswith(kinds)]


@pytest.mark.slow
def test_a_run_says_when_the_critic_is_alone_and_shows_responses(tmp_path):
    flags = {"log_every": 2, "sample_every": 2, "critic_only_iterations": 2}
    assert lines_of_run(tmp_path, **flags, max_steps=1) == ["iterations 0", "step 1/1", "iteration 0,"]
    # resumed within the stretch: said again, for what is left of it
    assert lines_of_run(tmp_path, **flags, max_steps=2) == ["iterations 1", "step 2/2", "iteration 1"]
    assert lines_of_run(tmp_path, **flags, max_steps=3) == ["step 3/3", "iteration 2,"]
    assert lines_of_run(tmp_path / "silent", log_every=0, sample_every=0, max_steps=1) == []
