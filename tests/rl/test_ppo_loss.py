"""Clipped losses and entropy: hand-worked numbers, plain loops in fp64, finite differences, promises about the mask."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from rl import ppo_loss as module_file
from rl.ppo_loss import masked_mean, policy_loss, token_entropies, value_loss

JUNK = [float("nan"), float("inf"), -float("inf")]


def fp64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_batch(seed, n_rows=6, width=9):
    """Three generic fp64 tensors (B, R) and a ragged mask with holes and one empty row."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n_rows, width, dtype=torch.float64, generator=generator) for _ in range(3)]
    mask_BR = torch.rand(n_rows, width, generator=generator) < 0.6
    mask_BR[0] = True
    mask_BR[1] = False
    return *tensors, mask_BR


# ---------------------------------------------------------------------------------------------------------------------
# Worked by hand


def test_policy_loss_worked_by_hand():
    # clip range 0.2. ratio, advantage -> max(-A ratio, -A clipped ratio):
    #   1.5,  2: max(-3, -2.4) = -2.4, clipped      1.5, -2: max(3, 2.4) = 3      0.5,  2: max(-1, -1.6) = -1
    #   0.5, -2: max(1, 1.6) = 1.6, clipped         1.1,  1: -1.1                 the sixth slot is masked
    # Sum 0.1 over 5 tokens. Gradient for a log-probability: -A ratio / 5, and 0 where clipped.
    ratios, advantages = [1.5, 1.5, 0.5, 0.5, 1.1, 7.0], [2.0, -2.0, 2.0, -2.0, 1.0, 7.0]
    old_logprobs_BR = fp64([[-2.0] * 3, [-3.0] * 3])
    logprobs_BR = (old_logprobs_BR + fp64(ratios).log().view(2, 3)).requires_grad_()
    mask_BR = torch.tensor([[True, True, True], [True, True, False]])
    loss, stats = policy_loss(logprobs_BR, old_logprobs_BR, fp64(advantages).view(2, 3), mask_BR, 0.2)
    assert loss.item() == pytest.approx(0.02, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(logprobs_BR.grad, fp64([[0, 0.6, -0.2], [0, -0.22, 0]]))
    # k3: ratio - 1 - ln ratio: 0.5 - 0.405465 (twice), -0.5 + 0.693147 (twice), 0.1 - 0.095310
    expected = {
        "tokens": 5,
        "clipped": 2,
        "ratio_sum": 5.1,
        "max_ratio_deviation": 0.5,
        "approx_kl_sum": 2 * 0.094534892 + 2 * 0.193147181 + 0.004689820,
    }
    assert {name: stat.item() for name, stat in stats.items()} == pytest.approx(expected, rel=1e-8)


def test_value_loss_worked_by_hand():
    # value clip range 0.2, old value 1 everywhere. value, return -> 0.5 max((V - ret)^2, (clipped V - ret)^2):
    #   1.1, 2: V inside the range: 0.5 * 0.81 = 0.405, gradient V - ret = -0.9
    #   1.5, 2: clipped to 1.2: max(0.25, 0.64): 0.32, clipped, gradient 0
    #   1.5, 1: clipped to 1.2: max(0.25, 0.04): 0.125, gradient 0.5
    #   0.5, 0: clipped to 0.8: max(0.25, 0.64): 0.32, clipped, gradient 0
    #   0.5, 3: clipped to 0.8: max(6.25, 4.84): 3.125, gradient -2.5;  the sixth slot is masked
    values_BR = fp64([[1.1, 1.5, 1.5], [0.5, 0.5, 9.0]]).requires_grad_()
    returns_BR = fp64([[2.0, 2.0, 1.0], [0.0, 3.0, 9.0]])
    mask_BR = torch.tensor([[True, True, True], [True, True, False]])
    loss, stats = value_loss(values_BR, torch.ones(2, 3, dtype=torch.float64), returns_BR, mask_BR, 0.2)
    assert loss.item() == pytest.approx((0.405 + 0.32 + 0.125 + 0.32 + 3.125) / 5, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(values_BR.grad, fp64([[-0.18, 0, 0.1], [0, -0.5, 0]]))
    expected = {"tokens": 5, "clipped": 2, "error_square_sum": 0.81 + 0.25 + 0.25 + 0.25 + 6.25}
    assert {name: stat.item() for name, stat in stats.items()} == pytest.approx(expected, rel=1e-12)


def test_first_minibatch():
    # New and old policy are one: ratio exactly 1, loss -mean A, gradient -A / n as for plain policy gradient.
    logprobs_BR, _, advantages_BR, mask_BR = random_batch(0)
    for dtype in (torch.float32, torch.float64):
        logprobs = logprobs_BR.to(dtype).requires_grad_()
        loss, stats = policy_loss(logprobs, logprobs.detach().clone(), advantages_BR.to(dtype), mask_BR, 0.2)
        loss.backward()
        n = mask_BR.sum().item()
        assert loss.item() == pytest.approx(-advantages_BR[mask_BR].mean().item(), rel=1e-6)
        torch.testing.assert_close(logprobs.grad, torch.where(mask_BR, -advantages_BR / n, 0.0).to(dtype))
        assert {name: stat.item() for name, stat in stats.items()} == {
            "tokens": n,
            "clipped": 0,
            "approx_kl_sum": 0,
            "ratio_sum": n,
            "max_ratio_deviation": 0,
        }


def test_ratio_deviation_counts_both_ways():
    logprobs_BR = fp64([[0.25, 1.5, 1.0, 9.0]]).log()  # deviations -0.75, 0.5, 0; the fourth slot is masked
    zeros_BR, mask_BR = torch.zeros_like(logprobs_BR), torch.tensor([[True, True, True, False]])
    _, stats = policy_loss(logprobs_BR, zeros_BR, zeros_BR, mask_BR, 0.2)
    assert stats["max_ratio_deviation"].item() == pytest.approx(0.75, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Plain loops in fp64


@pytest.mark.parametrize("seed", range(5))
def test_policy_loss_equals_a_plain_loop(seed):
    logprobs_BR, noise_BR, advantages_BR, mask_BR = random_batch(seed)
    old_logprobs_BR = logprobs_BR + 0.3 * noise_BR
    loss, stats = policy_loss(logprobs_BR, old_logprobs_BR, advantages_BR, mask_BR, 0.2)
    objective, n, kl, ratios, clipped = 0.0, 0, 0.0, [], 0
    for row, slot in mask_BR.nonzero().tolist():
        new, old = logprobs_BR[row, slot].item(), old_logprobs_BR[row, slot].item()
        advantage = advantages_BR[row, slot].item()
        ratio = math.exp(new) / math.exp(old)
        bounded = min(max(ratio, 0.8), 1.2)
        objective += min(ratio * advantage, bounded * advantage)
        clipped += (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        kl += ratio - 1 - math.log(ratio)
        ratios.append(ratio)
        n += 1
    assert loss.item() == pytest.approx(-objective / n, rel=1e-12)
    expected = {
        "tokens": n,
        "clipped": clipped,
        "approx_kl_sum": kl,
        "ratio_sum": sum(ratios),
        "max_ratio_deviation": max(abs(ratio - 1) for ratio in ratios),
    }
    assert {name: stat.item() for name, stat in stats.items()} == pytest.approx(expected, rel=1e-12)
    assert 0 < clipped < n


@pytest.mark.parametrize("seed", range(5))
def test_value_loss_equals_a_plain_loop(seed):
    values_BR, noise_BR, returns_BR, mask_BR = random_batch(seed)
    old_values_BR = values_BR + 0.3 * noise_BR
    loss, stats = value_loss(values_BR, old_values_BR, returns_BR, mask_BR, 0.2)
    total, clipped = 0.0, 0
    for row, slot in mask_BR.nonzero().tolist():
        value, old, target = (x_BR[row, slot].item() for x_BR in (values_BR, old_values_BR, returns_BR))
        bounded = old + min(max(value - old, -0.2), 0.2)
        total += max((value - target) ** 2, (bounded - target) ** 2) / 2
        clipped += abs(bounded - target) > abs(value - target) + 1e-12
    assert loss.item() == pytest.approx(total / mask_BR.sum().item(), rel=1e-12)
    assert stats["clipped"].item() == clipped and 0 < clipped < mask_BR.sum()
    squares = (values_BR - returns_BR)[mask_BR].square().sum().item()
    assert stats["error_square_sum"].item() == pytest.approx(squares, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_equal_finite_differences(seed):
    now_BR, noise_BR, other_BR, mask_BR = random_batch(seed)
    old_BR = now_BR + 0.3 * noise_BR
    now_BR.requires_grad_()
    assert gradcheck(lambda now: policy_loss(now, old_BR, other_BR, mask_BR, 0.2)[0], (now_BR,))
    assert gradcheck(lambda now: value_loss(now, old_BR, other_BR, mask_BR, 0.2)[0], (now_BR,))


def test_without_clipping_it_is_importance_sampling_and_mean_square():
    now_BR, old_BR, other_BR, mask_BR = random_batch(3)
    loss, stats = policy_loss(now_BR, old_BR, other_BR, mask_BR, math.inf)
    torch.testing.assert_close(loss, -((now_BR - old_BR).exp() * other_BR)[mask_BR].mean())
    assert stats["clipped"] == 0
    loss, stats = value_loss(now_BR, old_BR, other_BR, mask_BR, math.inf)
    torch.testing.assert_close(loss, 0.5 * (now_BR - other_BR)[mask_BR].square().mean())
    assert stats["clipped"] == 0


def test_values_inside_the_range_never_count_as_clipped():
    # fp32 rounding of old + (V - old) is not V: a clip written that way reports clipped tokens that are not.
    generator = torch.Generator().manual_seed(0)
    old_BR, step_BR, returns_BR = (torch.randn(40, 50, generator=generator) for _ in range(3))
    values_BR = old_BR + 0.19 * step_BR.clamp(-1, 1)
    _, stats = value_loss(values_BR, old_BR, returns_BR, torch.ones(40, 50, dtype=torch.bool), 0.2)
    assert stats["clipped"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Sums over micro-batches


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
def test_micro_batches_add_up_to_the_batch(loss_of):
    now_BR, old_BR, other_BR, mask_BR = random_batch(4)
    now_BR.requires_grad_()
    whole, whole_stats = loss_of(now_BR, old_BR, other_BR, mask_BR, 0.2)
    (expected_BR,) = torch.autograd.grad(whole, now_BR)
    parts = []
    for rows in (slice(0, 1), slice(1, 2), slice(2, 6)):  # row 1 has no token at all
        loss, stats = loss_of(now_BR[rows], old_BR[rows], other_BR[rows], mask_BR[rows], 0.2)
        (loss * stats["tokens"] / whole_stats["tokens"]).backward()
        parts.append(stats)
    torch.testing.assert_close(now_BR.grad, expected_BR, rtol=1e-12, atol=1e-15)
    for name, stat in whole_stats.items():
        combine = max if name.startswith("max_") else sum
        torch.testing.assert_close(combine(part[name] for part in parts), stat, rtol=1e-12, atol=1e-12)


def test_every_token_counts_the_same():
    # A response of one token (loss -1) and one of three (loss -5 each): (1 + 15) / 4, not the mean of -1 and -5.
    zeros_BR, mask_BR = torch.zeros(2, 3), torch.tensor([[True, False, False], [True, True, True]])
    loss, _ = policy_loss(zeros_BR, zeros_BR, torch.tensor([[1.0] * 3, [5.0] * 3]), mask_BR, 0.2)
    assert loss.item() == -4.0
    loss, _ = value_loss(zeros_BR, zeros_BR, torch.tensor([[1.0] * 3, [5.0] * 3]), mask_BR, 0.2)
    assert loss.item() == 0.5 * (1 + 75) / 4


# ---------------------------------------------------------------------------------------------------------------------
# Masked slots


def test_masked_mean_by_hand():
    mask_BR = torch.tensor([[True, False], [True, True]])
    assert masked_mean(torch.tensor([[1.0, math.nan], [2.0, 6.0]]), mask_BR).item() == 3.0


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
@pytest.mark.parametrize("junk", JUNK)
def test_slots_outside_the_mask_reach_neither_value_nor_gradient(loss_of, junk):
    *tensors, mask_BR = random_batch(5)
    clean = [torch.where(mask_BR, x_BR, 0.0) for x_BR in tensors]
    dirty = [torch.where(mask_BR, x_BR, junk) for x_BR in tensors]
    results = []
    for now_BR, old_BR, other_BR in (clean, dirty):
        now_BR = now_BR.clone().requires_grad_()
        loss, stats = loss_of(now_BR, old_BR, other_BR, mask_BR, 0.2)
        loss.backward()
        results.append([loss.detach(), now_BR.grad, *stats.values()])
    for expected, found in zip(*results, strict=True):
        assert found.isfinite().all() and torch.equal(found, expected)
    assert torch.equal(results[1][1][~mask_BR], torch.zeros_like(results[1][1][~mask_BR]))


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_empty_mask_gives_a_connected_zero(loss_of, shape):
    now_BR = torch.full(shape, math.nan, requires_grad=True)
    other_BR, mask_BR = torch.full(shape, math.inf), torch.zeros(shape, dtype=torch.bool)
    loss, stats = loss_of(now_BR, other_BR, other_BR, mask_BR, 0.2)
    assert loss.item() == 0 and all(stat.item() == 0 for stat in stats.values())
    loss.backward()
    assert torch.equal(now_BR.grad, torch.zeros(shape))


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
def test_nan_inside_the_mask_is_not_hidden(loss_of):
    zeros_BR, mask_BR = torch.zeros(1, 2), torch.tensor([[True, True]])
    for place in range(3):
        tensors = [zeros_BR.clone() for _ in range(3)]
        tensors[place][0, 1] = math.nan
        assert loss_of(*tensors, mask_BR, 0.2)[0].isnan()


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
def test_constants_get_no_gradient_and_stats_hold_no_graph(loss_of):
    *tensors, mask_BR = random_batch(6)
    for tensor in tensors:
        tensor.requires_grad_()
    loss, stats = loss_of(*tensors, mask_BR, 0.2)
    loss.backward()
    assert tensors[0].grad is not None and tensors[1].grad is None and tensors[2].grad is None
    assert all(stat.dim() == 0 and stat.dtype == torch.float64 and not stat.requires_grad for stat in stats.values())


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
def test_bf16_inputs_are_computed_in_fp32(loss_of):
    *tensors, mask_BR = random_batch(7)
    low = [tensor.bfloat16() for tensor in tensors]
    low[0].requires_grad_()
    loss, _ = loss_of(*low, mask_BR, 0.2)
    exact, _ = loss_of(*(tensor.double() for tensor in low), mask_BR, 0.2)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)
    loss.backward()
    assert low[0].grad.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# Entropy


def make_rows(dtype=torch.float64, n_rows=7, dim=5, vocab_size=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_MD = torch.randn(n_rows, dim, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    head_weight_VD = torch.randn(vocab_size, dim, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    return hidden_MD, head_weight_VD


def test_entropy_worked_by_hand():
    # Head = identity, hidden = logits. (0, ln 2, ln 5): probabilities 1/8, 2/8, 5/8:
    # ln 8 / 8 + 2 ln 4 / 8 + 5 ln 1.6 / 8 = 0.259930 + 0.346574 + 0.293752 = 0.900256. Equal logits: ln 3.
    # At temperature 0.5 the logits double: probabilities 1/30, 4/30, 25/30:
    # ln 30 / 30 + 4 ln 7.5 / 30 + 25 ln 1.2 / 30 = 0.113373 + 0.268654 + 0.151935 = 0.533962
    logits_MV = torch.tensor([[0.0, math.log(2), math.log(5)], [4.0, 4.0, 4.0]])
    assert token_entropies(logits_MV, torch.eye(3), 1.0).tolist() == pytest.approx([0.900256, math.log(3)], abs=2e-6)
    assert token_entropies(logits_MV, torch.eye(3), 0.5).tolist() == pytest.approx([0.533962, math.log(3)], abs=2e-6)


def test_entropy_of_a_certain_token_is_zero():
    logits_MV = torch.tensor([[1e4, 0.0, -1e4], [1e4, 1e4, -1e4]], requires_grad=True)
    entropy_M = token_entropies(logits_MV, torch.eye(3), 1.0)
    assert entropy_M.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-7)
    entropy_M.sum().backward()
    assert torch.equal(logits_MV.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("chunk_rows", [None, 1, 2, 3, 100])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_entropy_equals_pytorch(chunk_rows, dtype, rtol):
    hidden_MD, head_weight_VD = make_rows(dtype, n_rows=23)
    entropy_M = token_entropies(hidden_MD, head_weight_VD, 0.7, chunk_rows)
    weights_M = torch.linspace(-1, 2, 23, dtype=torch.float64)
    (entropy_M * weights_M).sum().backward()
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden_MD, head_weight_VD))
    expected_M = torch.distributions.Categorical(logits=hidden @ head.T / 0.7).entropy()
    (expected_M * weights_M).sum().backward()
    assert entropy_M.dtype == dtype and hidden_MD.grad.dtype == head_weight_VD.grad.dtype == dtype
    torch.testing.assert_close(entropy_M.double(), expected_M, rtol=rtol, atol=rtol)
    torch.testing.assert_close(hidden_MD.grad.double(), hidden.grad, rtol=rtol, atol=rtol)
    torch.testing.assert_close(head_weight_VD.grad.double(), head.grad, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_entropy_gradient_equals_finite_differences(chunk_rows):
    assert gradcheck(lambda hidden, head: token_entropies(hidden, head, 0.7, chunk_rows), make_rows())


def test_entropy_in_bf16():
    hidden_MD, head_weight_VD = make_rows(torch.bfloat16, n_rows=28, dim=16, vocab_size=40)
    entropy_M = token_entropies(hidden_MD, head_weight_VD, 1.0, 5)
    entropy_M.sum().backward()
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden_MD, head_weight_VD))
    expected_M = torch.distributions.Categorical(logits=hidden @ head.T).entropy()
    expected_M.sum().backward()
    assert entropy_M.dtype == torch.float32 and hidden_MD.grad.dtype == head_weight_VD.grad.dtype == torch.bfloat16
    torch.testing.assert_close(entropy_M.double(), expected_M, rtol=2e-2, atol=2e-2)  # logits carry 8 bits
    for grad, exact in ((hidden_MD.grad, hidden.grad), (head_weight_VD.grad, head.grad)):
        assert (grad.double() - exact).norm() / exact.norm() < 2e-2


def test_entropy_never_holds_more_logits_than_the_bound(monkeypatch):
    monkeypatch.setitem(module_file.MAX_LOGITS_BYTES, "cpu", 3 * 11 * 4 + 5)  # 3 rows of 11 fp32 logits, not 4
    seen = []
    original = module_file._chunk_probabilities

    def recording(hidden_CD, *rest):
        seen.append(hidden_CD.shape[0])
        return original(hidden_CD, *rest)

    monkeypatch.setattr(module_file, "_chunk_probabilities", recording)
    token_entropies(*make_rows(torch.float32), 1.0).sum().backward()
    assert seen == [3, 3, 1, 3, 3, 1]  # forward, then again in the backward pass


def test_entropy_of_no_row():
    hidden_MD, head_weight_VD = make_rows(n_rows=0)
    token_entropies(hidden_MD, head_weight_VD, 1.0).sum().backward()
    assert torch.equal(head_weight_VD.grad, torch.zeros(11, 5, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("loss_of", [policy_loss, value_loss])
def test_wrong_shapes_masks_and_ranges_are_refused(loss_of):
    x_BR, mask_BR = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for arguments in (
        (x_BR, x_BR, torch.zeros(2), mask_BR, 0.2),
        (x_BR, torch.zeros(2, 1), x_BR, mask_BR, 0.2),
        (x_BR[:1], x_BR, x_BR, mask_BR, 0.2),
        (x_BR, x_BR, x_BR, mask_BR.long(), 0.2),
        (x_BR, x_BR, x_BR, mask_BR[0], 0.2),
        (x_BR, x_BR, x_BR, mask_BR, 0.0),
        (x_BR, x_BR, x_BR, mask_BR, -0.2),
        (x_BR, x_BR, x_BR, mask_BR, math.nan),
    ):
        with pytest.raises(ValueError, match="expected"):
            loss_of(*arguments)


def test_entropy_refuses():
    hidden_MD, head_weight_VD = make_rows()
    for arguments in (
        (hidden_MD, head_weight_VD[:, :3], 1.0),
        (hidden_MD[0], head_weight_VD, 1.0),
        (hidden_MD.float(), head_weight_VD, 1.0),
        (hidden_MD, head_weight_VD, 0.0),
        (hidden_MD, head_weight_VD, math.nan),
        (hidden_MD, head_weight_VD, 1.0, 0),
    ):
        with pytest.raises(ValueError, match="expected"):
            token_entropies(*arguments)
