"""The pictures of docs/math.md: one SVG file per group of equations, every number computed by the product.

    python examples/draw_figures.py            # writes docs/figures/e*.svg
    python examples/draw_figures.py FOLDER     # writes them elsewhere

It is a program of examples/ because it needs data, model, train, rl and eval, which no package may all import.
tests/test_figures.py draws the pictures again, compares them byte for byte, and checks their numbers by hand.

Shape suffixes: M rows, D hidden size, V vocabulary, B responses, R response tokens.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder
from data.loss_weights import LOSS_NORMALIZATIONS, EncodedTrajectory, encode_trajectory, scale_turn
from data.tool_calls import ToolCall
from data.trajectories import Trajectory, read_trajectories
from eval.confidence import Z_95, wilson_interval
from model.config import ModelConfig, RopeScaling
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import rope_inverse_frequencies
from rl.advantages import compute_gae, kl_estimates, kl_shaped_rewards
from rl.ppo_loss import policy_loss, value_loss
from rl.reward import tool_call_reward
from svg import Panel, arrow, axes, bars, curve, dot, line, names_below, picture, rectangle, text
from train.optimizer import SCHEDULES, schedule_factor
from train.weighted_cross_entropy import linear_weighted_cross_entropy, weighted_cross_entropy

ROOT = Path(__file__).resolve().parent.parent
TRAIN_DATA, TINY_MODEL = ROOT / "assets/tiny_data/train.json", ROOT / "assets/tiny_model"
EXAMPLE_INDEX = 15  # a failed call, and two tools with a common prefix; README shows the same trajectory


def number(value: float, digits: int = 3) -> str:
    """At most `digits` decimals, without closing zeros."""
    shown = f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"
    return "0" if shown == "-0" else shown


def ticks(*values: float) -> dict[float, str]:
    return {value: number(value) for value in values}


def shown_piece(piece: str) -> str:
    """A token as text; one that is blank is quoted, so that it can be seen."""
    return piece.replace("\n", "\\n") if piece.strip() else f"'{piece}'"


# ---------------------------------------------------------------------------------------------------------------------
# Data


def example_trajectory() -> Trajectory:
    """The bundled trajectory that README and docs/walkthrough.md follow."""
    return read_trajectories(TRAIN_DATA)[EXAMPLE_INDEX]


def encode_example(trajectory: Trajectory, tokenizer: Tokenizer, loss_normalization: str) -> EncodedTrajectory:
    """The trajectory as a row, with the settings of `python run_sft.py`."""
    return encode_trajectory(
        trajectory,
        tokenizer,
        error_filter="structured",
        key_tokens=True,
        max_key_token_weight=9.0,
        loss_normalization=loss_normalization,
    )


def turn_positions(row: EncodedTrajectory, message_index: int) -> list[int]:
    """Positions that predict a token of the model's own text in one message: its call, and EOS if it is trained."""
    return [
        position
        for position, (index, name) in enumerate(zip(row.message_indices, row.token_classes, strict=True))
        if index == message_index and name != "context"
    ]


def turn_bars(
    row: EncodedTrajectory, message_index: int, tokenizer: Tokenizer, top: float, title: str, unit: float
) -> list[str]:
    """The weights of one turn over its tokens; key tokens in full colour, masked ones as a dash on the axis."""
    positions = turn_positions(row, message_index)
    weights = [row.loss_weights[position] for position in positions]
    panel = Panel(60, top, unit * len(positions), 70, (0, len(positions)), (0, 9))
    parts = [text(16, top - 18, title)]
    for value in (0, 3, 6, 9):
        parts.append(line(panel.left, panel.y(value), panel.left + panel.width, panel.y(value), "rule"))
        parts.append(text(panel.left - 6, panel.y(value) + 4, number(value), "small faint", "end"))
    labels = [number(weight) for weight in weights]
    for series, wanted in (("a", ("key",)), ("b", ("normal", "eos")), ("c", ("masked",))):
        chosen = [i for i, position in enumerate(positions) if row.token_classes[position] in wanted]
        for i in chosen:
            one = Panel(panel.x(i), top, unit, 70, (0, 1), (0, 9))
            parts += bars(one, [weights[i]], series, [labels[i]])
    for i, position in enumerate(positions):
        name = shown_piece(tokenizer.piece(row.target_ids[position]))
        parts += names_below(Panel(panel.x(i), top, unit, 70, (0, 1), (0, 9)), [name], top + (86 if i % 2 else 100))
    return parts


def draw_key_token_weights() -> str:
    """E2-E4 (E5): the failed and the corrected call of the example trajectory."""
    tokenizer = load_tokenizer(TINY_MODEL)
    row = encode_example(example_trajectory(), tokenizer, "sum")
    return picture(
        "E2-E5: what each token of two turns weighs",
        "Bars of the loss weight over the tokens of two calls. The first call failed, so all its tokens weigh 0. In "
        "the second call the key tokens compare and remote weigh 5.5 each and the other tokens weigh 1.",
        760,
        340,
        [
            *turn_bars(row, 1, tokenizer, 78, "failed call: every token weighs 0 (E2), but stays in the context", 44),
            *turn_bars(
                row, 3, tokenizer, 226, "corrected call: 2 key tokens, 11 others: w = clip(11 / 2, 1, 9) (E3, E4)", 44
            ),
        ],
    )


def draw_normalisations() -> str:
    """E6-E8: the part of each token in the loss of a batch of a short and a long turn."""
    turns = ([3.0, 1.0, 1.0, 1.0], [5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    names = ["K", "", "", "EOS", "K", "", "", "", "", "", "", "EOS"]
    parts: list[str] = []
    for number_of_row, normalization in enumerate(LOSS_NORMALIZATIONS):
        scaled = [scale_turn(weights, normalization) for weights in turns]
        denominator = sum(share for _, share in scaled) or 1.0
        factors = [weight / denominator for weights, _ in scaled for weight in weights]
        top = 76 + 120 * number_of_row
        highest = 5.0 if normalization == "sum" else 0.3
        panel = Panel(60, top, 624, 56, (0, len(factors)), (0, highest))
        equation = f"E{6 + number_of_row} {normalization}"
        sums = [sum(factors[: len(turns[0])]), sum(factors[len(turns[0]) :])]
        parts.append(text(16, top - 20, f"{equation}: the turns count {number(sums[0])} and {number(sums[1])}"))
        parts += bars(
            panel, factors, "a" if number_of_row == 0 else "bc"[number_of_row - 1], list(map(number, factors))
        )
        parts += names_below(panel, names, top + 70)
        parts.append(line(panel.x(len(turns[0])), top - 4, panel.x(len(turns[0])), top + 74))
    return picture(
        "E6-E8: factor of each token's cross-entropy",
        "Bars for a turn of 4 tokens with weights 3, 1, 1, 1 and one of 8 tokens with weights 5, 1, 1 and so on, under "
        "the three normalisations. turn_mean gives both turns the same total, token_mean and sum give the long turn "
        "twice that of the short one; sum does not divide.",
        710,
        410,
        parts,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Loss, schedule, rotary positions


def logits_and_gradients() -> tuple[list[float], list[float], list[float], list[float]]:
    """(logits, softmax, gradient for the logits, gradient for the hidden state) of one row; target 1, weight 2."""
    head_weight_VD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.5, -1.0]], dtype=torch.float64)
    hidden_MD = torch.tensor([[2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    target_ids_M, loss_weights_M = torch.tensor([1]), torch.tensor([2.0], dtype=torch.float64)
    logits_MV = (hidden_MD @ head_weight_VD.T).detach().requires_grad_()
    weighted_cross_entropy(logits_MV, target_ids_M, loss_weights_M).backward()
    linear_weighted_cross_entropy(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M).backward()
    rows = (logits_MV, logits_MV.softmax(dim=1), logits_MV.grad, hidden_MD.grad)
    return tuple(row_MV.detach()[0].tolist() for row_MV in rows)


def draw_logits_gradient() -> str:
    """E9-E11: one row of four logits, its softmax and its gradients."""
    titles = ("logits z", "softmax(z)", "E10: d loss / dz", "E11: d loss / dh")
    ranges = ((-2.0, 3.0), (0.0, 1.0), (-2.0, 2.0), (-2.0, 2.0))
    parts, left = [], 20.0
    for values, title, y_range, series in zip(logits_and_gradients(), titles, ranges, "cbaa", strict=True):
        panel = Panel(left, 84, 44 * len(values), 144, (0, len(values)), y_range)
        parts.append(text(left, 62, title))
        parts += bars(panel, values, series, [number(value, 2) for value in values])
        names = [f"h{i}" for i in range(2)] if len(values) == 2 else [f"v{i}" for i in range(4)]
        parts += names_below(panel, names, 250)
        left += 44 * len(values) + 18
    parts.append(
        text(20, 274, "target y = v1, weight w = 2; d loss / dz = 2 * (softmax(z) - [v = y]), which adds up to 0")
    )
    return picture(
        "E9-E11: a row of logits and its gradients",
        "Four groups of bars: the logits of four tokens, their softmax, the gradient for the logits, which is negative "
        "at the target only, and the gradient for the two numbers of the hidden state.",
        760,
        290,
        parts,
    )


def draw_schedules() -> str:
    """E12: the three schedules over 100 steps with 10 of warm-up."""
    panel = Panel(56, 70, 560, 200, (0, 100), (0, 1))
    steps = list(range(1, 101))
    parts = axes(panel, ticks(1, 20, 40, 60, 80, 100), ticks(0, 0.25, 0.5, 0.75, 1), "optimizer step s", "factor")
    for name, series, step in zip(SCHEDULES, "abc", (50, 35, 80), strict=True):
        factors = [schedule_factor(each, 100, 10, name) for each in steps]
        parts.append(curve(panel.points(steps, factors), series))
        end = panel.y(factors[-1]) + (-10 if name == "linear" else 6 if name == "cosine" else 4)
        parts.append(text(622, end, f"{name} {number(factors[-1], 4)}", series))
    first = schedule_factor(1, 100, 10, "cosine")
    parts.append(text(panel.x(10) + 8, panel.y(0) - 12, f"warm-up W = 10: step 1 has {number(first)}", "small"))
    return picture(
        "E12: factor of the learning rate, S = 100 steps",
        "Three curves that rise together for 10 steps. Then constant stays at 1, cosine and linear fall and end just "
        "above 0 in step 100.",
        760,
        320,
        parts,
    )


def rope_frequencies() -> dict[str, list[float]]:
    """Radians per token of each pair of a Llama-3.1 head, plain and stretched."""
    found = {}
    for name, scaling in (("plain", None), ("llama3", RopeScaling(8.0, 1.0, 4.0, 8192))):
        config = ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, 1e-5, 5e5, scaling, False, False, 131072)
        found[name] = rope_inverse_frequencies(config).tolist()
    return found


def draw_rope() -> str:
    """E16: how far one token turns each pair of a head of 128, plain and with Llama-3.1's stretching."""
    panel = Panel(70, 70, 520, 240, (0, 63), (1e-7, 1), log_y=True)
    powers = {10.0**power: f"1e{power}" if power else "1" for power in range(-7, 1)}
    parts = axes(panel, ticks(0, 16, 32, 48, 63), powers, "pair j of a head", "radians per token (log scale)")
    frequencies = rope_frequencies()
    for name, series in (("plain", "a"), ("llama3", "b")):
        parts.append(curve(panel.points(range(64), frequencies[name]), series))
    for name, series, shift in (("plain", "a", -2), ("llama3", "b", 10)):
        last = frequencies[name][-1]
        parts.append(text(598, panel.y(last) + shift, f"{name} {last:.2e}", series))
    ratios = [plain / stretched for plain, stretched in zip(*frequencies.values(), strict=True)]
    kept, divided = sum(ratio < 1.0001 for ratio in ratios), sum(ratio > 7.9999 for ratio in ratios)
    note = f"pairs 0-{kept - 1} kept, {kept}-{63 - divided} blended, {64 - divided}-63 divided by 8"
    parts.append(text(panel.left + 12, panel.y(1e-7) - 12, note, "small"))
    return picture(
        "E16: rotary positions, theta = 500,000, H = 128",
        f"Two falling lines on a log scale. They agree for the fast pairs; the slow pairs of llama3 are 8 times "
        f"slower. {note}.",
        760,
        360,
        parts,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and reward


def interval(x: float, low: float, high: float, series: str) -> list[str]:
    """A vertical line from low to high with a bar at both ends."""
    ends = [line(x - 3, y, x + 3, y, f"mark {series}") for y in (low, high)]
    return [line(x, low, x, high, f"mark {series}"), *ends]


def draw_wilson() -> str:
    """E20: the interval around k of n for n = 10 and n = 100."""
    panel = Panel(56, 70, 560, 240, (-5, 105), (0, 100))
    parts = axes(
        panel, ticks(*range(0, 101, 20)), ticks(0, 20, 40, 60, 80, 100), "k / n, %", "95 % interval of Wilson, %"
    )
    for n, series, shift in ((10, "a", -1.2), (100, "b", 1.2)):
        for k in range(0, n + 1, n // 10):
            low, high = wilson_interval(k, n, Z_95)
            x = panel.x(100 * k / n + shift)
            parts += interval(x, panel.y(100 * low), panel.y(100 * high), series)
            parts.append(dot(x, panel.y(100 * k / n), f"{series} full" if n == 10 else f"{series} hollow", 3))
    for row, (n, series) in enumerate(((10, "a"), (100, "b"))):
        low, high = wilson_interval(0, n, Z_95)
        top = 100 + 40 * row
        parts += interval(628, top + 10, top - 10, series)
        parts.append(text(638, top, f"n = {n}", series))
        parts.append(text(638, top + 14, f"0: {number(100 * low, 1)}-{number(100 * high, 1)} %", "small"))
    return picture(
        "E20: an interval never leaves 0-100 % and is never empty",
        "Vertical bars from the lower to the upper bound, for shares of 0 to 100 percent. Those of n = 10, full marks, "
        "are about three times as long as those of n = 100, hollow marks.",
        760,
        360,
        parts,
    )


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": ""} for key in keys},
                "required": list(keys[:1]),
            },
        },
    }
    for name, keys in (("book", ("city", "day", "room")), ("cancel", ("city",)))
]
GOLD = ToolCall("book", {"city": "Bern", "day": "Monday"})
PARAMETER_FAULTS = {  # what is wrong -> a response with just that
    "hallucinated": 'book(city="Bern", day="Monday", price="9")',
    "redundant": 'book(city="Bern", day="Monday", room="2")',
    "missing": 'book(city="Bern")',
    "hallucinated + redundant": 'book(city="Bern", day="Monday", price="9", room="2")',
    "hallucinated + missing": 'book(city="Bern", price="9")',
    "redundant + missing": 'book(city="Bern", room="2")',
    "all three": 'book(city="Bern", price="9", room="2")',
}
QUESTIONS = (  # question, answer that ends here, a response that ends here
    ("exactly one call?", "no", "book it"),
    ("tool offered?", "no", 'fly(city="Bern")'),
    ("tool of the gold call?", "no", 'cancel(city="Bern")'),
    ("parameters of the gold call?", "no", ""),
    ("all values equal?", "no", 'book(city="Bern", day="Friday")'),
)


def reward_of(response: str) -> float:
    return tool_call_reward(response, [GOLD], TOOLS).reward


def draw_reward_tree() -> str:
    """E22, E23: the questions of the reward in order, with a response that ends at each answer."""
    parts, y = [text(16, 48, 'gold call: book(city="Bern", day="Monday"); book may also have a room', "small")], 64.0
    for question, answer, response in QUESTIONS:
        parts += [rectangle(16, y, 222, 26, "box"), text(127, y + 17, question, "", "middle")]
        parts += [arrow(238, y + 13, 284, y + 13), text(258, y + 8, answer, "small", "middle")]
        if response:
            parts.append(text(336, y + 17, f"{reward_of(response):+.2f}", "bold", "end"))
            parts.append(text(350, y + 17, response, "small"))
            bottom = y + 26
        else:
            for row, (fault, each) in enumerate(PARAMETER_FAULTS.items()):
                parts.append(text(336, y + 17 + 20 * row, f"{reward_of(each):+.2f}", "bold", "end"))
                parts.append(text(350, y + 17 + 20 * row, fault, "small"))
                parts.append(text(510, y + 17 + 20 * row, each, "small"))
            bottom = y + 26
            y += 20 * (len(PARAMETER_FAULTS) - 1)
        parts += [arrow(60, bottom, 60, y + 52), text(68, y + 44, "yes", "small")]
        y += 54
    correct = 'book(day="Monday", city="Bern")'
    parts += [text(60, y + 14, f"{reward_of(correct):+.2f}", "bold", "middle"), text(100, y + 14, correct, "small")]
    return picture(
        "E22, E23: the reward of a response",
        "A chain of five questions. Each no ends with a reward: not one call -2, tool not offered -2, wrong tool -1.5, "
        "wrong parameters between -0.5 and -1.8, a wrong value -0.25. Five times yes gives +1.",
        850,
        480,
        parts,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Advantages and clipped losses


def ledger_numbers() -> dict[str, list[float]]:
    """The response of docs/math.md ("Which number belongs to which token"): name -> one number per token."""
    logprobs_BR, ref_logprobs_BR, values_BR = (
        torch.tensor([numbers], dtype=torch.float64)
        for numbers in ([-0.5, -1.0, -0.2], [-0.7, -0.6, -0.2], [0.3, 0.5, 0.6])
    )
    mask_BR = torch.ones(1, 3, dtype=torch.bool)
    scores_B = torch.tensor([1.0], dtype=torch.float64)
    rewards_BR = kl_shaped_rewards(scores_B, logprobs_BR, ref_logprobs_BR, mask_BR, 0.1)
    advantages_BR, returns_BR = compute_gae(rewards_BR, values_BR, mask_BR, 1.0, 0.95)
    grids = {
        "KL (k1)": kl_estimates(logprobs_BR, ref_logprobs_BR, mask_BR)["k1"],
        "reward": rewards_BR,
        "value": values_BR,
        "advantage": advantages_BR,
        "return": returns_BR,
    }
    return {name: grid_BR[0].tolist() for name, grid_BR in grids.items()}


def draw_ledger() -> str:
    """E24, E25: KL, reward, value, advantage and return over the three tokens of a response."""
    formulas = {
        "KL (k1)": "ln pi_old - ln pi_ref",
        "reward": "-kl_coef * KL, and R = +1 on the last token (E24)",
        "value": "V of the state before the token",
        "advantage": "delta_t + gamma * lambda * A_(t+1) (E25)",
        "return": "A_t + V_t",
    }
    parts = []
    for row, (name, values) in enumerate(ledger_numbers().items()):
        panel = Panel(140, 60 + 76 * row, 240, 46, (0, 3), (-0.4, 1.05))
        parts += [text(16, panel.y(0) + 4, name), text(400, panel.y(0) + 4, formulas[name], "small")]
        parts += bars(panel, values, "abcab"[row], list(map(number, values)))
    parts += names_below(Panel(140, 0, 240, 1, (0, 3), (0, 1)), ["get", "()", "</s>"], 448)
    parts.append(text(400, 448, "kl_coef 0.1, gamma 1, lambda 0.95", "small"))
    return picture(
        "E24, E25: which number belongs to which token",
        "Five rows of bars over the tokens get, (), </s>: the KL, the reward with +1 on the last token, the value, the "
        "advantage and the return. They are the numbers of the table below.",
        760,
        464,
        parts,
    )


def kl_curves() -> tuple[list[float], dict[str, list[float]]]:
    """(pi / pi_ref, name -> estimate at each of them)."""
    ratios = [0.2 + 0.05 * i for i in range(57)]
    logprobs_BR = torch.tensor([ratios], dtype=torch.float64).log()
    estimates = kl_estimates(logprobs_BR, torch.zeros_like(logprobs_BR), torch.ones(1, 57, dtype=torch.bool))
    return ratios, {name: grid_BR[0].tolist() for name, grid_BR in estimates.items()}


def draw_kl_estimates() -> str:
    """E27: the three estimates over the ratio of the two probabilities."""
    panel = Panel(56, 70, 560, 220, (0, 3), (-2, 3))
    parts = axes(panel, ticks(0, 0.5, 1, 1.5, 2, 2.5, 3), ticks(-2, -1, 0, 1, 2, 3), "pi / pi_ref", "nats")
    parts.append(line(panel.left, panel.y(0), panel.left + panel.width, panel.y(0)))
    ratios, estimates = kl_curves()
    for (name, values), series, shift in zip(estimates.items(), "abc", (0, 0, 8), strict=True):
        parts.append(curve(panel.points(ratios, values), series))
        parts.append(text(622, panel.y(values[-1]) + shift, f"{name} {number(values[-1])}", series))
    first = ", ".join(f"{name} {number(values[0])}" for name, values in estimates.items())
    parts.append(text(panel.x(0.4), panel.y(2.5), f"left ends, at ratio 0.2: {first}", "small"))
    return picture(
        "E27: three estimates of KL(pi || pi_ref) from one token",
        "Curves over the ratio of the probabilities. All are 0 at ratio 1. k1 is negative below 1; k2 and k3 are never "
        "negative, and k3 grows fastest below 1.",
        760,
        340,
        parts,
    )


def one_token(function: Callable, values: Sequence[float], clip_range: float) -> float:
    """policy_loss or value_loss of a batch of one token; values: what it compares."""
    grids_BR = [torch.tensor([[value]], dtype=torch.float64) for value in values]
    return function(*grids_BR, torch.ones(1, 1, dtype=torch.bool), clip_range)[0].item()


def policy_loss_curve(advantage: float, ratios: Sequence[float]) -> list[float]:
    """E29 at each ratio, clip_range 0.2."""
    return [one_token(policy_loss, (math.log(ratio), 0.0, advantage), 0.2) for ratio in ratios]


def draw_clipped_losses() -> str:
    """E29 over the ratio for a good and a bad token; E30 over the value."""
    ratios = [0.5 + 0.02 * i for i in range(51)]
    left = Panel(50, 96, 300, 220, (0.5, 1.5), (-1.5, 1.5))
    parts = axes(left, ticks(0.6, 0.8, 1, 1.2, 1.4), ticks(-1.5, -1, -0.5, 0, 0.5, 1, 1.5), "ratio pi / pi_old", "loss")
    parts.append(text(50, 60, "E29: policy loss, clip_range 0.2"))
    for advantage, series in ((1.0, "a"), (-1.0, "b")):
        losses = policy_loss_curve(advantage, ratios)
        parts.append(curve(left.points(ratios, losses), series))
    (flat_good,), (flat_bad,) = policy_loss_curve(1.0, [1.5]), policy_loss_curve(-1.0, [0.5])
    parts.append(text(left.x(0.55), left.y(-1.35), f"A = +1: flat at {number(flat_good)} above 1.2", "small a"))
    parts.append(text(left.x(0.55), left.y(1.3), f"A = -1: flat at {number(flat_bad)} below 0.8", "small b"))
    values = [-0.6 + 0.04 * i for i in range(51)]
    right = Panel(430, 96, 300, 220, (-0.6, 1.4), (0, 0.6))
    parts += axes(right, ticks(-0.5, 0, 0.5, 1), ticks(0, 0.2, 0.4, 0.6), "value V", "loss")
    parts.append(text(430, 60, "E30: value loss, V_old 0, return 0.5, c 0.2"))
    clipped = [one_token(value_loss, (value, 0.0, 0.5), 0.2) for value in values]
    unclipped = [one_token(value_loss, (value, 0.0, 0.5), math.inf) for value in values]
    for numbers, series in ((clipped, "a"), (unclipped, "c")):
        parts.append(curve(right.points(values, numbers), series))
    flat = one_token(value_loss, (0.5, 0.0, 0.5), 0.2)
    parts.append(text(right.x(0.24), right.y(flat) - 8, f"clipped: {number(flat)}", "small a"))
    parts.append(text(right.x(0.4), right.y(0.3), "dotted: not clipped", "small c", "middle"))
    return picture(
        "E29, E30: where a loss is flat, a token gives no gradient",
        "Left: the policy loss over the ratio. A good token is flat above 1.2, a bad one below 0.8. Right: the value "
        "loss over the value; clipping keeps it at 0.045 between 0.2 and 0.8, where the plain parabola goes to 0.",
        760,
        366,
        parts,
    )


FIGURES = {  # file name -> its drawing
    "e02_key_token_weights": draw_key_token_weights,
    "e06_normalisations": draw_normalisations,
    "e09_logits_gradient": draw_logits_gradient,
    "e12_schedules": draw_schedules,
    "e16_rope": draw_rope,
    "e20_wilson": draw_wilson,
    "e22_reward_tree": draw_reward_tree,
    "e24_ledger": draw_ledger,
    "e27_kl_estimates": draw_kl_estimates,
    "e29_clipped_losses": draw_clipped_losses,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/math.md.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs/figures", help="where to (docs/figures)")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="ascii", newline="\n")
        print(folder / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
