"""Rewards, GAE, whitening, KL estimates, controller: hand-worked numbers, the defining sums in plain Python, laws."""

import math
import random
import re
import sys
from pathlib import Path
from runpy import run_path

import pytest
import torch

from rl.advantages import (
    compute_gae,
    explained_variance_from_sums,
    explained_variance_sums,
    kl_estimates,
    kl_shaped_rewards,
    masked_sums,
    next_kl_coef,
    whiten,
)

ROOT = Path(__file__).resolve().parents[2]
JUNK = [float("nan"), float("inf"), -float("inf")]


def fp64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def bools(*rows):
    """bools("110", "011") -> mask (2, 3)."""
    return torch.tensor([[letter == "1" for letter in row] for row in rows])


def random_batch(seed, n_rows=6, width=9):
    """Generic fp64 tensors and a ragged mask with holes, left padding and one empty row."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n_rows, width, dtype=torch.float64, generator=generator) for _ in range(3)]
    mask_BR = torch.rand(n_rows, width, generator=generator) < 0.6
    mask_BR[0] = True
    mask_BR[1] = False
    return *tensors, mask_BR


def gae_from_the_definition(rewards, values, gamma, gae_lambda):
    """Lists of one response without holes: A_t = sum over l of (gamma lambda)^l delta_(t+l), V after the end is 0."""
    n = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# Worked by hand
# The response of docs/math.md: three tokens, the third is EOS, score +1.
LOGPROBS, REF_LOGPROBS, VALUES = [-0.5, -1.0, -0.2], [-0.7, -0.6, -0.2], [0.3, 0.5, 0.6]


def test_rewards_worked_by_hand():
    # k1: -0.5 + 0.7 = 0.2; -1.0 + 0.6 = -0.4; 0. Rewards -0.1 * 0.2, -0.1 * -0.4, 1 - 0.
    rewards_BR = kl_shaped_rewards(fp64([1.0]), fp64([LOGPROBS]), fp64([REF_LOGPROBS]), bools("111"), 0.1)
    torch.testing.assert_close(rewards_BR, fp64([[-0.02, 0.04, 1.0]]))


def test_gae_worked_by_hand():
    # deltas: -0.02 + 0.5 - 0.3 = 0.18; 0.04 + 0.6 - 0.5 = 0.14; 1 + 0 - 0.6 = 0.4
    # advantages from the end: 0.4; 0.14 + 0.95 * 0.4 = 0.52; 0.18 + 0.95 * 0.52 = 0.674
    advantages_BR, returns_BR = compute_gae(fp64([[-0.02, 0.04, 1.0]]), fp64([VALUES]), bools("111"), 1.0, 0.95)
    torch.testing.assert_close(advantages_BR, fp64([[0.674, 0.52, 0.4]]))
    torch.testing.assert_close(returns_BR, fp64([[0.974, 1.02, 1.0]]))


def test_gae_with_a_discount_worked_by_hand():
    # gamma 0.9: deltas -0.02 + 0.45 - 0.3 = 0.13; 0.04 + 0.54 - 0.5 = 0.08; 0.4; factor 0.9 * 0.95 = 0.855
    # advantages: 0.4; 0.08 + 0.342 = 0.422; 0.13 + 0.36081 = 0.49081
    advantages_BR, returns_BR = compute_gae(fp64([[-0.02, 0.04, 1.0]]), fp64([VALUES]), bools("111"), 0.9, 0.95)
    torch.testing.assert_close(advantages_BR, fp64([[0.49081, 0.422, 0.4]]))
    torch.testing.assert_close(returns_BR, fp64([[0.79081, 0.922, 1.0]]))


def test_gae_of_one_token_is_its_reward_minus_its_value():
    advantages_BR, returns_BR = compute_gae(fp64([[-2.0, 9.0]]), fp64([[0.25, 9.0]]), bools("10"), 0.9, 0.95)
    assert advantages_BR.tolist() == [[-2.25, 0.0]] and returns_BR.tolist() == [[-2.0, 0.0]]


@pytest.mark.parametrize(
    ("mask", "position"),
    [
        ("1000", 0),  # one token: EOS at once, or a limit of one token
        ("1110", 2),  # ended: slot 2 holds EOS
        ("1111", 3),  # cut off at the limit: the last generated token
        ("0111", 3),
        ("0100", 1),  # left padding
        ("1010", 2),
        ("1001", 3),  # holes
    ],
)
def test_score_sits_on_the_last_token(mask, position):
    logprobs_BR, ref_logprobs_BR = fp64([[-1.0] * 4]), fp64([[-3.0] * 4])  # k1 = 2 on every token
    rewards = kl_shaped_rewards(fp64([5.0]), logprobs_BR, ref_logprobs_BR, bools(mask), 0.25).tolist()[0]
    expected = [-0.5 if letter == "1" else 0.0 for letter in mask]
    expected[position] += 5.0
    assert rewards == expected


def test_rows_do_not_mix_and_an_empty_row_gets_nothing():
    logprobs_BR = fp64([[-1.0, -1.0], [-2.0, -2.0], [-3.0, -3.0]])
    mask_BR = bools("11", "00", "10")
    rewards_BR = kl_shaped_rewards(fp64([1.0, 7.0, -2.0]), logprobs_BR, torch.zeros_like(logprobs_BR), mask_BR, 0.5)
    assert rewards_BR.tolist() == [[0.5, 1.5], [0.0, 0.0], [-0.5, 0.0]]
    advantages_BR, returns_BR = compute_gae(rewards_BR, logprobs_BR, mask_BR, 1.0, 0.95)
    assert advantages_BR[1].tolist() == returns_BR[1].tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# Against the defining sums


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.95, 0.0])
@pytest.mark.parametrize("seed", range(4))
def test_gae_equals_the_double_sum_over_the_tokens(gamma, gae_lambda, seed):
    rewards_BR, values_BR, _, mask_BR = random_batch(seed)
    advantages_BR, returns_BR = compute_gae(rewards_BR, values_BR, mask_BR, gamma, gae_lambda)
    expected_BR = torch.zeros_like(rewards_BR)
    for row, mask_R in enumerate(mask_BR):
        slots = [slot for slot, is_token in enumerate(mask_R.tolist()) if is_token]
        advantages = gae_from_the_definition(
            [rewards_BR[row, t].item() for t in slots], [values_BR[row, t].item() for t in slots], gamma, gae_lambda
        )
        for slot, advantage in zip(slots, advantages, strict=True):
            expected_BR[row, slot] = advantage
    torch.testing.assert_close(advantages_BR, expected_BR, rtol=1e-12, atol=1e-12)
    expected_returns_BR = torch.where(mask_BR, expected_BR + values_BR, 0.0)
    torch.testing.assert_close(returns_BR, expected_returns_BR, rtol=1e-12, atol=1e-12)


def test_rewards_equal_a_plain_loop():
    logprobs_BR, ref_logprobs_BR, _, mask_BR = random_batch(5)
    scores = [1.0, -2.0, -1.5, -0.8, -0.25, 1.0]
    rewards_BR = kl_shaped_rewards(fp64(scores), logprobs_BR, ref_logprobs_BR, mask_BR, 0.3)
    for row, score in enumerate(scores):
        slots = mask_BR[row].nonzero().flatten().tolist()
        for slot in range(mask_BR.shape[1]):
            expected = 0.0
            if slot in slots:
                expected = -0.3 * (logprobs_BR[row, slot] - ref_logprobs_BR[row, slot]).item()
                expected += score if slot == slots[-1] else 0.0
            assert rewards_BR[row, slot].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_rewards_sum_to_score_minus_the_price_of_the_kl():
    logprobs_BR, ref_logprobs_BR, _, mask_BR = random_batch(6)
    scores_B = fp64([1.0, 0.0, -2.0, -1.5, 1.0, -0.25])  # row 1 has no token
    rewards_BR = kl_shaped_rewards(scores_B, logprobs_BR, ref_logprobs_BR, mask_BR, 0.4)
    kl_B = kl_estimates(logprobs_BR, ref_logprobs_BR, mask_BR)["k1"].sum(1)
    torch.testing.assert_close(rewards_BR.sum(1), scores_B - 0.4 * kl_B, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Laws


def test_lambda_1_gives_the_rewards_to_go_whatever_the_critic_says():
    rewards_BR, values_BR, other_values_BR, mask_BR = random_batch(7)
    _, returns_BR = compute_gae(rewards_BR, values_BR, mask_BR, 1.0, 1.0)
    _, other_returns_BR = compute_gae(rewards_BR, other_values_BR, mask_BR, 1.0, 1.0)
    torch.testing.assert_close(returns_BR, other_returns_BR, rtol=1e-12, atol=1e-12)
    to_go_BR = torch.where(mask_BR, rewards_BR, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns_BR, torch.where(mask_BR, to_go_BR, 0.0), rtol=1e-12, atol=1e-12)


def test_a_perfect_critic_leaves_no_advantage():
    rewards_BR, _, _, mask_BR = random_batch(8)
    values_BR = torch.where(mask_BR, rewards_BR, 0.0).flip(1).cumsum(1).flip(1)  # gamma 1: V_t = rewards to go
    advantages_BR, returns_BR = compute_gae(rewards_BR, values_BR, mask_BR, 1.0, 0.95)
    torch.testing.assert_close(advantages_BR, torch.zeros_like(advantages_BR), rtol=0, atol=1e-12)
    assert explained_variance_from_sums(explained_variance_sums(values_BR, returns_BR, mask_BR)) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(10))
def test_as_many_nonzero_advantages_as_action_tokens(seed):
    rewards_BR, values_BR, _, mask_BR = random_batch(seed, n_rows=8, width=17)
    advantages_BR, _ = compute_gae(rewards_BR, values_BR, mask_BR, 1.0, 0.95)
    assert torch.equal(advantages_BR != 0, mask_BR)


def test_padding_and_holes_change_nothing():
    rewards_BR, values_BR, _, _ = random_batch(9)
    dense = compute_gae(rewards_BR, values_BR, torch.ones(6, 9, dtype=torch.bool), 0.9, 0.95)
    slots = torch.tensor(sorted(random.Random(0).sample(range(20), 9)))
    wide_rewards_BR, wide_values_BR = fp64([[99.0] * 20] * 6), fp64([[99.0] * 20] * 6)
    wide_rewards_BR[:, slots], wide_values_BR[:, slots] = rewards_BR, values_BR
    mask_BR = torch.zeros(6, 20, dtype=torch.bool)
    mask_BR[:, slots] = True
    for wide_BR, dense_BR in zip(compute_gae(wide_rewards_BR, wide_values_BR, mask_BR, 0.9, 0.95), dense, strict=True):
        assert torch.equal(wide_BR[:, slots], dense_BR)


# ---------------------------------------------------------------------------------------------------------------------
# Masked slots, dtypes


@pytest.mark.parametrize("junk", JUNK)
def test_slots_outside_the_mask_may_hold_anything(junk):
    first_BR, second_BR, _, mask_BR = random_batch(10)
    scores_B = fp64([1.0, junk, -2.0, -1.5, 1.0, -0.25])  # row 1 has no token: its score is outside the mask as well
    clean = [torch.where(mask_BR, x_BR, 0.0) for x_BR in (first_BR, second_BR)]
    dirty = [torch.where(mask_BR, x_BR, junk) for x_BR in (first_BR, second_BR)]

    def everything(x_BR, y_BR):
        return [
            kl_shaped_rewards(scores_B, x_BR, y_BR, mask_BR, 0.1),
            *compute_gae(x_BR, y_BR, mask_BR, 0.9, 0.95),
            *kl_estimates(x_BR, y_BR, mask_BR).values(),
            whiten(x_BR, mask_BR, 0.5, 2.0),
            fp64(masked_sums(x_BR, mask_BR)),
            fp64(explained_variance_sums(x_BR, y_BR, mask_BR)),
        ]

    for expected, found in zip(everything(*clean), everything(*dirty), strict=True):
        assert found.isfinite().all() and torch.equal(found, expected)
        if found.shape == mask_BR.shape:
            assert torch.equal(found[~mask_BR], torch.zeros_like(found[~mask_BR]))


def test_nan_inside_the_mask_is_not_hidden():
    mask_BR = bools("11")
    advantages_BR, _ = compute_gae(torch.zeros(1, 2), torch.tensor([[0.0, math.nan]]), mask_BR, 1.0, 0.95)
    assert advantages_BR.isnan().all()
    assert math.isnan(masked_sums(torch.tensor([[0.0, math.nan]]), mask_BR)[1])


def test_results_are_constants():
    logprobs_BR, values_BR, _, mask_BR = random_batch(11)
    logprobs_BR.requires_grad_()
    values_BR.requires_grad_()
    for result in (
        kl_shaped_rewards(torch.zeros(6), logprobs_BR, values_BR, mask_BR, 0.1),
        *compute_gae(logprobs_BR, values_BR, mask_BR, 1.0, 0.95),
        whiten(values_BR, mask_BR, 0.0, 1.0),
        *kl_estimates(logprobs_BR, values_BR, mask_BR).values(),
    ):
        assert not result.requires_grad


def test_bf16_log_probabilities_give_fp32_rewards():
    zeros_BR = torch.zeros(1, 2, dtype=torch.bfloat16)
    rewards_BR = kl_shaped_rewards(torch.tensor([-1.8]), zeros_BR, zeros_BR, bools("11"), 0.1)
    assert rewards_BR.dtype == torch.float32 and rewards_BR[0, 1] == torch.tensor(-1.8)
    assert all(x.dtype == torch.float32 for x in compute_gae(rewards_BR, zeros_BR, bools("11"), 1.0, 0.95))


def test_inputs_are_not_written_to():
    first_BR, second_BR, _, mask_BR = random_batch(12)
    copies = first_BR.clone(), second_BR.clone(), mask_BR.clone()
    compute_gae(first_BR, second_BR, mask_BR, 0.9, 0.95)
    kl_shaped_rewards(torch.ones(6), first_BR, second_BR, mask_BR, 0.1)
    kl_estimates(first_BR, second_BR, mask_BR)
    whiten(first_BR, mask_BR, 0.1, 2.0)
    for tensor, copy in zip((first_BR, second_BR, mask_BR), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_no_response_and_no_slot():
    for shape in ((0, 4), (3, 0)):
        empty_BR, mask_BR = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        assert kl_shaped_rewards(torch.zeros(shape[0]), empty_BR, empty_BR, mask_BR, 0.1).shape == shape
        assert compute_gae(empty_BR, empty_BR, mask_BR, 1.0, 0.95)[0].shape == shape
        assert masked_sums(empty_BR, mask_BR) == (0.0, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Whitening


def test_whiten_worked_by_hand():
    # 1, 3, 5 (the 100 is masked): mean 3, variance (4 + 0 + 4) / 3 = 8/3; 2 / sqrt(8/3) = 1.224744871
    whitened_BR = whiten(fp64([[1.0, 3.0], [5.0, 100.0]]), bools("11", "10"), 3.0, 8 / 3)
    torch.testing.assert_close(whitened_BR, fp64([[-1.224744871, 0.0], [1.224744871, 0.0]]))


def test_whitening_over_two_ranks_is_that_of_the_whole_batch():
    advantages_BR, _, _, mask_BR = random_batch(13)
    parts = [(advantages_BR[:2], mask_BR[:2]), (advantages_BR[2:], mask_BR[2:])]
    n, total = map(sum, zip(*(masked_sums(*part) for part in parts), strict=True))
    mean = total / n
    variance = sum(masked_sums((part_BR - mean).square(), part_mask_BR)[1] for part_BR, part_mask_BR in parts) / n
    whitened_BR = torch.cat([whiten(*part, mean, variance) for part in parts])
    inside = advantages_BR[mask_BR]
    assert n == mask_BR.sum().item() and mean == pytest.approx(inside.mean().item(), rel=1e-12)
    torch.testing.assert_close(whitened_BR[mask_BR], (inside - inside.mean()) / inside.std(correction=0))
    assert whitened_BR[mask_BR].mean().item() == pytest.approx(0, abs=1e-12)
    assert whitened_BR[mask_BR].std(correction=0).item() == pytest.approx(1, rel=1e-7)


def test_equal_advantages_whiten_to_zero():
    advantages_BR = torch.full((2, 3), 0.75)
    assert whiten(advantages_BR, bools("111", "100"), 0.75, 0.0).tolist() == [[0.0] * 3] * 2


def test_masked_sums_count_in_fp64():
    x_BR = torch.full((1, 3), 2.0**24)
    x_BR[0, 1] = 1.0  # 2^24 + 1 is no fp32 number
    assert masked_sums(x_BR, bools("110")) == (2.0, 2.0**24 + 1)


# ---------------------------------------------------------------------------------------------------------------------
# KL estimates


def test_kl_estimates_worked_by_hand():
    # d = ln 2: k1 0.693147181, k2 0.693147181^2 / 2 = 0.240226507, k3 1/2 - 1 + 0.693147181 = 0.193147181
    # d = -ln 2: k1 -0.693147181, k2 the same, k3 2 - 1 - 0.693147181 = 0.306852819
    logprobs_BR, ref_logprobs_BR = fp64([[0.5, 0.25]]).log(), fp64([[0.25, 0.5]]).log()
    estimates = kl_estimates(logprobs_BR, ref_logprobs_BR, bools("11"))
    torch.testing.assert_close(estimates["k1"], fp64([[0.693147181, -0.693147181]]))
    torch.testing.assert_close(estimates["k2"], fp64([[0.240226507, 0.240226507]]))
    torch.testing.assert_close(estimates["k3"], fp64([[0.193147181, 0.306852819]]))


def test_k1_and_k3_are_unbiased_for_the_kl_of_the_policy_from_the_reference():
    # The expectation over the policy, summed exactly over a vocabulary of 50: no sampling noise. The KL the other way
    # round is another number, so this fixes the sign and the direction.
    generator = torch.Generator().manual_seed(0)
    policy_V, reference_V = (torch.randn(50, dtype=torch.float64, generator=generator).log_softmax(0) for _ in range(2))
    expected = torch.nn.functional.kl_div(reference_V, policy_V, log_target=True, reduction="sum")
    other_way = torch.nn.functional.kl_div(policy_V, reference_V, log_target=True, reduction="sum")
    estimates = kl_estimates(policy_V[None], reference_V[None], torch.ones(1, 50, dtype=torch.bool))
    for name in ("k1", "k3"):
        torch.testing.assert_close((policy_V.exp() * estimates[name][0]).sum(), expected, rtol=1e-12, atol=0)
    assert abs(expected - other_way) > 0.01
    assert (estimates["k1"] < 0).any() and (estimates["k3"] >= 0).all()


def test_k2_and_k3_agree_close_to_the_reference():
    # d = 1e-4: k3 = d^2 / 2 - d^3 / 6 = 5e-9 - 1.67e-13. In fp32 the sum exp(-d) - 1 + d is off by more than 100 %.
    logprobs_BR = torch.tensor([[-1.0]]).double() + 1e-4
    estimates = kl_estimates(logprobs_BR, torch.tensor([[-1.0]]).double(), bools("1"))
    assert estimates["k3"].item() == pytest.approx(5e-9 - 1e-12 / 6, rel=1e-6)
    estimates = kl_estimates(torch.tensor([[-0.0001]]), torch.tensor([[0.0]]), bools("1"))
    assert estimates["k3"].dtype == torch.float32 and estimates["k3"].item() == pytest.approx(5e-9, rel=1e-3)


def test_kl_is_zero_for_the_reference_itself():
    logprobs_BR, _, _, mask_BR = random_batch(14)
    assert all((estimate_BR == 0).all() for estimate_BR in kl_estimates(logprobs_BR, logprobs_BR, mask_BR).values())


# ---------------------------------------------------------------------------------------------------------------------
# KL controller


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.6, 0.1 * (1 + 0.1 * 64 / 640)),  # 10 % above the target, a tenth of the horizon: +1 %
        (5.4, 0.1 * (1 - 0.1 * 64 / 640)),
        (6.0, 0.1),
        (600.0, 0.1 * (1 + 0.2 * 64 / 640)),
        (0.0, 0.1 * (1 - 0.2 * 64 / 640)),
        (-3.0, 0.1 * (1 - 0.2 * 64 / 640)),
    ],
)
def test_controller_worked_by_hand(kl, expected):
    assert next_kl_coef(0.1, kl, kl_target=6.0, kl_horizon=640, n_responses=64) == pytest.approx(expected, rel=1e-12)


def test_controller_settles_where_the_kl_is_on_target():
    kl_coef = 0.01
    for _ in range(2000):  # a policy whose KL falls as the coefficient rises: 1 / (10 coef), on target 2 at 0.05
        kl_coef = next_kl_coef(kl_coef, 1 / (10 * kl_coef), kl_target=2.0, kl_horizon=1000, n_responses=64)
    assert kl_coef == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"mean_sequence_kl": math.nan},
        {"mean_sequence_kl": math.inf},
        {"kl_target": 0.0},
        {"kl_target": -1.0},
        {"kl_horizon": 63},
        {"kl_horizon": 0},
        {"n_responses": -1},
    ],
)
def test_controller_refuses(change):
    arguments = {"kl_coef": 0.1, "mean_sequence_kl": 1.0, "kl_target": 6.0, "kl_horizon": 640, "n_responses": 64}
    with pytest.raises(ValueError, match="expected"):
        next_kl_coef(**(arguments | change))


# ---------------------------------------------------------------------------------------------------------------------
# Explained variance


def test_explained_variance_worked_by_hand():
    # returns 1, 2, 3: variance 2/3; values 1, 2, 2.5: errors 0, 0, 0.5, variance 0.25/3 - (0.5/3)^2 = 1/18
    # 1 - (1/18) / (2/3) = 11/12. A constant shift of the values changes nothing.
    for shift in (0.0, 10.0):
        values_BR = fp64([[1.0, 2.0, 2.5, 9.0]]) + shift
        sums = explained_variance_sums(values_BR, fp64([[1.0, 2.0, 3.0, 9.0]]), bools("1110"))
        assert sums[0] == 3 and explained_variance_from_sums(sums) == pytest.approx(11 / 12, rel=1e-12)


def test_explained_variance_from_the_sums_of_two_ranks():
    values_BR, returns_BR, _, mask_BR = random_batch(15)
    values_BR = returns_BR + 0.3 * values_BR
    parts = [
        explained_variance_sums(values_BR[rows], returns_BR[rows], mask_BR[rows]) for rows in (slice(0, 3), slice(3, 6))
    ]
    found = explained_variance_from_sums([sum(pair) for pair in zip(*parts, strict=True)])
    expected = 1 - (returns_BR - values_BR)[mask_BR].var() / returns_BR[mask_BR].var()
    assert found == pytest.approx(expected.item(), rel=1e-12)


def test_explained_variance_without_anything_to_explain():
    assert explained_variance_from_sums([0.0] * 5) == 0.0
    sums = explained_variance_sums(fp64([[0.3, 0.1, 0.7]]), fp64([[0.7, 0.7, 0.7]]), bools("111"))
    assert sums[2] / 3 - (sums[1] / 3) ** 2 > 0  # rounding alone
    assert explained_variance_from_sums(sums) == 0.0
    constant = explained_variance_sums(fp64([[5.0, 5.0, 5.0]]), fp64([[0.1, 0.2, 0.7]]), bools("111"))
    assert explained_variance_from_sums(constant) == pytest.approx(0.0, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_wrong_shapes_and_masks_are_refused():
    x_BR, mask_BR = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    calls = [
        lambda: compute_gae(x_BR, torch.zeros(2, 1), mask_BR, 1.0, 0.95),
        lambda: compute_gae(torch.zeros(3), x_BR, mask_BR, 1.0, 0.95),
        lambda: compute_gae(x_BR, x_BR, mask_BR.float(), 1.0, 0.95),
        lambda: compute_gae(x_BR, x_BR, mask_BR[0], 1.0, 0.95),
        lambda: kl_shaped_rewards(torch.zeros(3), x_BR, x_BR, mask_BR, 0.1),
        lambda: kl_shaped_rewards(torch.zeros(2, 3), x_BR, x_BR, mask_BR, 0.1),
        lambda: kl_estimates(x_BR, x_BR[:, :2], mask_BR),
        lambda: masked_sums(x_BR[0], mask_BR),
        lambda: whiten(x_BR, mask_BR, 0.0, -1.0),
        lambda: whiten(x_BR, mask_BR, 0.0, math.nan),
        lambda: explained_variance_sums(x_BR, x_BR[:1], mask_BR),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="expected"):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# The page, the example


def test_the_table_of_the_page_is_what_the_code_computes():
    page = (ROOT / "docs/math.md").read_text(encoding="ascii").partition("### Which number belongs to which token")[2]
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\| \d+ \|.*$", page, re.MULTILINE)
    ]
    assert [row[:3] for row in rows[:2]] == [["10", "`Assistant`", "0"], ["11", "`:`", "0"]]
    assert all(int(row[3]) == int(row[0]) - 1 for row in rows[2:]) and len(rows) == 5
    logprobs, ref_logprobs, kls, rewards, values, advantages, returns = fp64(
        [[float(cell) for cell in row[4:]] for row in rows[2:]]
    ).T
    mask_BR = bools("111")
    found = kl_shaped_rewards(fp64([1.0]), logprobs[None], ref_logprobs[None], mask_BR, 0.1)
    torch.testing.assert_close(found[0], rewards)
    torch.testing.assert_close(kl_estimates(logprobs[None], ref_logprobs[None], mask_BR)["k1"][0], kls)
    found_advantages, found_returns = compute_gae(found, values[None], mask_BR, 1.0, 0.95)
    torch.testing.assert_close(found_advantages[0], advantages)
    torch.testing.assert_close(found_returns[0], returns)


def test_the_example_prints_what_its_header_says(monkeypatch, capsys):
    path = ROOT / "examples/gae_by_hand.py"
    monkeypatch.setattr(sys, "path", list(sys.path))  # the example puts the root there
    run_path(str(path), run_name="__main__")
    header = path.read_text(encoding="ascii").partition("Output:\n\n")[2].partition('"""')[0]
    assert capsys.readouterr().out == re.sub("^    ", "", header, flags=re.MULTILINE)
