"""Schedule values worked by hand, parameter groups, AdamW against its definition."""

import math

import pytest
import torch

from tests.support.tiny_run import tiny_model
from train.optimizer import decay_groups, make_adamw, schedule_factor, set_learning_rates, warmup_steps_of

# 10 steps, 2 of them warm-up: the ramp is 1/3, 2/3, then 8 steps decay from 1 by eighths
COSINE = [1 / 3, 2 / 3, 1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]
LINEAR = [1 / 3, 2 / 3, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
CONSTANT = [1 / 3, 2 / 3] + [1.0] * 8


@pytest.mark.parametrize(("schedule", "expected"), [("cosine", COSINE), ("linear", LINEAR), ("constant", CONSTANT)])
def test_schedule_by_hand(schedule, expected):
    found = [schedule_factor(step, 10, 2, schedule) for step in range(1, 11)]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 17, 305])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 1.0])
def test_every_step_moves_and_none_exceeds_the_peak(schedule, total, ratio):
    warmup = warmup_steps_of(ratio, total)
    factors = [schedule_factor(step, total, warmup, schedule) for step in range(1, total + 1)]
    assert all(0 < factor <= 1 for factor in factors) and max(factors) == 1.0
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_without_warmup_the_first_step_has_the_full_rate():
    assert schedule_factor(1, 305, 0, "cosine") == 1.0


@pytest.mark.parametrize(
    ("ratio", "total", "steps"), [(0.02, 50, 1), (0.01, 305, 4), (0.0, 9, 0), (1.0, 9, 8), (0.5, 1, 0)]
)
def test_warmup_steps(ratio, total, steps):
    assert warmup_steps_of(ratio, total) == steps


@pytest.mark.parametrize("step", [0, 11])
def test_a_step_outside_the_schedule_is_refused(step):
    with pytest.raises(ValueError, match="expected 1..10"):
        schedule_factor(step, 10, 2, "cosine")


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="expected one of cosine, linear, constant"):
        schedule_factor(5, 10, 0, "step")


def test_groups_with_different_rates_keep_their_ratio():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "lr": 0.02}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for factor in (0.5, 0.25, 1.0):
        assert set_learning_rates(optimizer, factor) == pytest.approx(0.1 * factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.02 * factor])


def test_matrices_decay_and_norms_and_biases_do_not():
    model = tiny_model(qkv_bias=True, tie_embeddings=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    kept_names = {names[id(parameter)] for parameter in kept["params"]}
    assert kept_names == {name for name in names.values() if name.endswith(("norm.weight", ".bias"))}
    assert len(kept_names) == 5 + 6  # two norms in each of two blocks and the last one; q, k, v in two blocks
    assert {"tok_embeddings.weight", "output.weight"} <= {names[id(parameter)] for parameter in decayed["params"]}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_tied_embedding_is_in_one_group_once():
    groups = decay_groups(tiny_model(tie_embeddings=True), 0.1)
    parameters = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(parameters) == len(set(parameters))


def test_adamw_two_steps_by_hand():
    # matrix entry 1, gradients 0.5 then -1, rate 0.1, betas 0.9/0.95, decay 0.2.
    # step 1: decay 1 * (1 - 0.02) = 0.98; mean/bias = 0.5, root = 0.5: 0.98 - 0.1 = 0.88
    # step 2: decay 0.88 * 0.98 = 0.8624; m = 0.9 * 0.05 - 0.1 = -0.055, / (1 - 0.81) = -0.2894737;
    #         v = 0.95 * 0.0125 + 0.05 = 0.061875, / (1 - 0.9025) = 0.6346154, root 0.7966275; 0.8624 + 0.0363374
    layer = torch.nn.Linear(1, 1, bias=True)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.ones_(layer.bias)
    optimizer = make_adamw(layer, learning_rate=0.1, beta1=0.9, beta2=0.95, epsilon=1e-12, weight_decay=0.2)
    expected_weight, expected_bias = [0.88, 0.8987374], [0.9, 0.9363374]
    for gradient, weight, bias in zip((0.5, -1.0), expected_weight, expected_bias, strict=True):
        layer.weight.grad = torch.full_like(layer.weight, gradient)
        layer.bias.grad = torch.full_like(layer.bias, gradient)
        optimizer.step()
        assert layer.weight.item() == pytest.approx(weight, abs=1e-6)
        assert layer.bias.item() == pytest.approx(bias, abs=1e-6)
    assert math.isfinite(layer.weight.item())
