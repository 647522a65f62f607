"""docs/critical_reading.md states what examples/critical_numbers.py computes; the small numbers are worked by hand.

Shape suffix: V vocabulary.
"""

import re
from pathlib import Path

import pytest
import torch

from data.trajectories import read_trajectories
from eval.confidence import Z_95, attainable_count, wilson_interval
from examples import critical_numbers
from examples.draw_figures import TINY_MODEL, TRAIN_DATA
from model.pretrained_weights import load_pretrained
from train.distributed import close_world, init_world
from train.sft_config import SFTConfig
from train.sft_loop import train_step

PAGE = re.sub(r"\s+", " ", (Path(__file__).parent.parent / "docs/critical_reading.md").read_text(encoding="ascii"))


def test_right_tool_that_times_out():
    """6 right calls, 3 of them masked, 4 wrong ones: 6 / 10 and 3 / 7."""
    shares = critical_numbers.choices_with_flaky_tool()
    assert shares == pytest.approx((0.6, 3 / 7), abs=1e-4)
    assert "is 0.600 without MAE and 0.429 with it" in PAGE


def test_choice_between_a_short_and_a_long_call():
    """4 tokens: w = 3 / 1; with EOS the turn's weights add up to 3 + 3 + 1 = 7, without PKT to 5. 30 tokens: w = 9, 39
    and 31. The first tokens compete with these weights, divided by the turn's sum under turn_mean."""
    shares = critical_numbers.choices_between_lengths(4, 30)
    by_hand = {
        ("sum", "plain"): 1 / 2,
        ("sum", "PKT"): 9 / 12,
        ("token_mean", "plain"): 1 / 2,
        ("token_mean", "PKT"): 9 / 12,
        ("turn_mean", "plain"): (1 / 31) / (1 / 31 + 1 / 5),
        ("turn_mean", "PKT"): (9 / 39) / (9 / 39 + 3 / 7),
    }
    assert shares == pytest.approx(by_hand, abs=1e-4)
    assert "| 0.500 | 0.750 |" in PAGE and "| 0.139 | 0.350 |" in PAGE


def test_corner_of_the_reward():
    """-0.8 - 0.5 - 0.5 = -1.8 is below -1.5; the next, -0.8 - 0.5 = -1.3, is not. Break-even of leaving out:
    q - 1.3 (1 - q) = -0.5 at q = 0.8 / 2.3; q - 2 (1 - q) = -0.5 at q = 1.5 / 3."""
    assert critical_numbers.below_wrong_tool() == [("hallucinated", "redundant", "missing")]
    assert round(0.8 / 2.3, 2) == 0.35 and "below 0.35 or 0.5" in PAGE


def test_gradient_of_the_kl_by_finite_differences():
    of_kl_V, constant_V, through_V = critical_numbers.kl_gradients()
    logits_V, reference_V = torch.tensor([0.5, -0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()

    def kl(logits_V):
        chances_V = torch.exp(logits_V) / torch.exp(logits_V).sum()
        return (chances_V * torch.log(chances_V / reference_V)).sum().item()

    for v in range(3):
        shift_V = torch.zeros(3).double()
        shift_V[v] = 1e-5
        slope = (kl(logits_V + shift_V) - kl(logits_V - shift_V)) / 2e-5
        assert of_kl_V[v].item() == pytest.approx(slope, abs=1e-8)
    assert torch.allclose(of_kl_V, constant_V) and through_V.abs().max() < 1e-12
    assert "(" + ", ".join(f"{value:+.4f}" for value in of_kl_V) + ")" in PAGE


def test_counts_of_table_5():
    """The paper's percentages are these counts of its n, and the page has their intervals."""
    percentages = {
        "RoTBench TS": {"standard SFT": 76.19, "PKT": 82.86, "all": 83.81},
        "RoTBench PI": {"standard SFT": 55.24, "PKT": 63.81, "all": 54.29},
        "ToolAlpaca PI": {"standard SFT": 70.18, "MAE": 64.91, "all": 78.07},
        "ToolAlpaca CF": {"standard SFT": 42.98, "IRM": 57.02, "all": 57.89},
    }
    for name, (n, counts) in critical_numbers.TABLE_5.items():
        assert counts == {row: attainable_count(percent, n, 2) for row, percent in percentages[name].items()}
        for count in counts.values():
            low, high = wilson_interval(count, n, Z_95)
            assert f"{count} [{100 * low:.1f}, {100 * high:.1f}]" in PAGE


def test_gradient_norm_is_that_of_a_training_step():
    trajectories = read_trajectories(TRAIN_DATA)[:3]
    rows, model = critical_numbers.encode(trajectories, "turn_mean", True), load_pretrained(TINY_MODEL)
    norm = critical_numbers.batch_gradient(model, rows).norm().item()
    world = init_world("cpu")
    try:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        batches = [critical_numbers.pack(rows)]
        result = train_step(SFTConfig(), model, optimizer, batches, world, step=1)
    finally:
        close_world()
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.slow
def test_counts_of_the_bundled_data():
    trajectories = read_trajectories(TRAIN_DATA)
    calls = critical_numbers.weights_of_calls(critical_numbers.encode(trajectories, "sum", True))
    assert f"of {calls['w = 9'] + calls['w = 1'] + calls['1 < w < 9']:,} trained calls {calls['w = 9']:,} have" in PAGE
    assert f"{calls['1 < w < 9']} lie between, and {calls['w = 1']} have" in PAGE
    agreement = critical_numbers.filter_agreement(trajectories)
    assert agreement[True, False] == agreement[False, True] == 0
    assert f"agree in {agreement.total():,} of {agreement.total():,} turns" in PAGE


@pytest.mark.very_slow
def test_gradients_of_the_base_model():
    """The rows of the tables that need no trained model."""
    model, trajectories = load_pretrained(TINY_MODEL), read_trajectories(TRAIN_DATA)
    lines = critical_numbers.report(model, trajectories)
    assert any(line.endswith("180 of 188") for line in lines)
    found = critical_numbers.gradient_figures(model, trajectories)
    for name, stated in (("sum", (327, 4810)), ("token_mean", (1.86, 16.4)), ("turn_mean", (1.88, 16.1))):
        norms = found["norm", name]
        assert (min(norms), max(norms)) == pytest.approx(stated, rel=0.01)
        assert f"| `{name}` | {stated[0]:,} to {stated[1]:,} |" in PAGE
