"""PPO on a task with a known answer: one prompt, two possible calls. Without learning none of these can pass.

pytest tests/rl/test_ppo_toy.py
"""

import math

import pytest
import torch

from model.pretrained_weights import load_pretrained
from tests.support.tiny_ppo import ARMS, arm_logprobs, journal_of, run_ppo_here, toy_data, toy_folder

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

ITERATIONS, RESPONSES = 12, 8


def shares_of_arms(folder) -> list[float]:
    """Probability of each arm after the toy's prompt."""
    with torch.no_grad():
        return arm_logprobs(load_pretrained(folder)).exp().tolist()


def train(output, gold, **flags) -> tuple[list[float], list[dict]]:
    """(shares of the arms, metrics) after ITERATIONS rollouts of RESPONSES responses."""
    output.mkdir(exist_ok=True)
    data = toy_data(output / "toy.jsonl", gold, n=ITERATIONS * RESPONSES)
    settings = {
        "rollout_batch_size": RESPONSES,
        "minibatch_size": RESPONSES,
        "micro_batch_size": RESPONSES,
        "kl_coef": 0.0,
        "policy_learning_rate": 3e-3,
        "checkpoint_every": 0,
        **flags,
    }
    code, _, err = run_ppo_here(output / "run", model=toy_folder(), data=data, **settings)
    assert (code, err) == (0, "")
    rows = journal_of(output / "run", "metrics.jsonl")
    assert len(rows) == ITERATIONS
    return shares_of_arms(output / "run" / "final"), rows


def kl_of_arms(shares: list[float]) -> float:
    """KL from the model at the start, over the arms, in nats; exact, unlike the estimates from samples."""
    return sum(new * math.log(new / old) for new, old in zip(shares, shares_of_arms(toy_folder()), strict=True))


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory):
    """The first arm is right, and nothing ties the policy to the reference."""
    return train(tmp_path_factory.mktemp("rewarded"), ARMS[:1])


def test_the_toy_starts_undecided():
    first, second = shares_of_arms(toy_folder())
    assert 0.4 < first < 0.6 and 0.4 < second < 0.6 and first + second > 0.95


def test_the_first_arm_wins_where_it_is_rewarded(rewarded):
    shares, rows = rewarded
    assert shares[0] > 0.9 and kl_of_arms(shares) > 0.45  # ln 2 = 0.69 if it always wins
    scores = [row["ppo/score"] for row in rows]
    assert sum(scores[:3]) / 3 < 0.3 and sum(scores[-3:]) / 3 > 0.7


def test_the_second_arm_wins_where_it_is_rewarded(tmp_path):
    shares, _ = train(tmp_path, ARMS[1:])
    assert shares[1] > 0.9


def test_a_huge_kl_coefficient_keeps_the_policy_at_the_reference(rewarded, tmp_path):
    """On the way the policy is off by some Adam steps, whose size does not depend on kl_coef, and comes back."""
    shares, rows = train(tmp_path, ARMS[:1], kl_coef=1000.0)
    for new, old in zip(shares, shares_of_arms(toy_folder()), strict=True):
        assert new == pytest.approx(old, rel=0.1)
    assert kl_of_arms(shares) < 0.02 * kl_of_arms(rewarded[0])
    late = rows[ITERATIONS // 2 :]
    assert sum(row["ppo/kl_k3"] * row["ppo/response_tokens"] for row in late) / len(late) < 0.01


def test_a_constant_reward_moves_the_arms_by_no_more_than_noise(rewarded, tmp_path):
    """The critic learns the constant, advantages vanish, and with them the policy's gradient. Adam would blow up what
    noise is left to full steps; its epsilon keeps them small."""
    shares, rows = train(
        tmp_path, ARMS, policy_learning_rate=2e-3, adam_epsilon=1e-3, value_clip_range=10.0, critic_only_iterations=4
    )
    assert min(shares) > 0.25, shares

    def late_gradient(each):
        return sum(row["ppo/policy_grad_norm"] for row in each[-3:]) / 3

    assert kl_of_arms(shares) < 0.3 * kl_of_arms(rewarded[0])
    assert abs(rows[-1]["ppo/value_mean"] - 1.0) < 0.3 and late_gradient(rows) < 0.15
