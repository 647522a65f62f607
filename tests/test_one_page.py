"""examples/tl_training_on_one_page.py against the product: the same ids, weights, logits, rewards, advantages, losses.

Shape legend: B rows, R response slots, T positions, V vocabulary.
"""

import json
import random
import subprocess
from pathlib import Path

import pytest
import torch

from data.loss_weights import encode_trajectory
from data.tool_calls import ToolCall, render_tool_call
from data.trajectories import read_trajectories
from examples import tl_training_on_one_page as page
from model.pretrained_weights import load_pretrained
from model.tokenizer import load_tokenizer
from rl.advantages import compute_gae
from rl.ppo_loss import policy_loss, value_loss
from rl.reward import tool_call_reward

ROOT = Path(__file__).resolve().parents[1]
TRAIN, MODEL = ROOT / "assets/tiny_data/train.json", ROOT / "assets/tiny_model"


@pytest.fixture(scope="module")
def trajectories():
    """(record of the page, trajectory of the product), 300 of them."""
    records = json.loads(TRAIN.read_text(encoding="utf-8"))
    pairs = list(zip(map(page.read_trajectory, records), read_trajectories(TRAIN), strict=True))
    return random.Random(0).sample(pairs, 300)


def test_at_most_300_lines_that_import_nothing_of_ours():
    text = (ROOT / "examples/tl_training_on_one_page.py").read_text(encoding="utf-8")
    assert text.count("\n") <= 300
    for package in ("data", "model", "train", "rl", "eval", "toolbox", "command_line"):
        assert f"from {package}" not in text and f"import {package}" not in text


def test_ids_targets_and_weights_of_300_trajectories(trajectories):
    tokenizer, n_masked = load_tokenizer(MODEL), 0
    for (tools, messages), trajectory in trajectories:
        ids, targets, weights = page.encode_trajectory(tools, messages)
        encoded = encode_trajectory(
            trajectory,
            tokenizer,
            error_filter="structured",
            key_tokens=True,
            max_key_token_weight=9.0,
            loss_normalization="turn_mean",
        )
        assert (ids, targets) == (list(encoded.input_ids), list(encoded.target_ids))
        assert weights == pytest.approx(list(encoded.loss_weights), rel=1e-12)
        n_masked += sum(decision.masked for decision in encoded.turn_decisions)
    assert n_masked > 30  # masking is seen at work


def test_logits():
    ids = torch.randint(3, 922, (3, 90), generator=torch.Generator().manual_seed(0))
    ours, theirs = load_pretrained(MODEL), page.LLaMA(MODEL)
    with torch.no_grad():
        expected_BTV = ours(ids)
        assert (theirs(ids, ids > 0)[0] - expected_BTV).abs().max() < 3e-5
        # left padding changes nothing for the rows that are padded
        padded = torch.nn.functional.pad(ids, (7, 0))
        assert (theirs(padded, padded > 0)[0][:, 7:] - expected_BTV).abs().max() < 3e-5


def mutated(call: ToolCall, tools: list[dict], draw: random.Random) -> str:
    """An output near the gold call: another name, parameter, value, type or bracket."""
    name, arguments = call.name, dict(call.arguments)
    kind = draw.randrange(8)
    if kind == 0:
        name = draw.choice([tool["function"]["name"] for tool in tools] + ["no_such_tool"])
    elif kind == 1 and arguments:
        arguments.pop(draw.choice(list(arguments)))
    elif kind == 2:
        properties = [p for tool in tools for p in tool["function"]["parameters"]["properties"]]
        arguments[draw.choice([*properties, "extra"])] = draw.choice([1, 1.0, True, None, "x", [1], {"a": 1}])
    elif kind == 3 and arguments:
        arguments[draw.choice(list(arguments))] = draw.choice([0, "other", False, None])
    text = render_tool_call(ToolCall(name, arguments))
    cut = draw.randrange(1, len(text))
    return {5: text[:cut], 6: text + draw.choice([" ", ")", " f()", "\n"]), 7: text[:cut] + text[cut + 1 :]}.get(
        kind, text
    )


def test_rewards_of_2000_outputs(trajectories):
    draw, seen = random.Random(1), set()
    turns = [
        (trajectory.tools, message.call)
        for _, trajectory in trajectories
        for message in trajectory.messages
        if message.call is not None and any(t["function"]["name"] == message.call.name for t in trajectory.tools)
    ]
    for _ in range(2000):
        tools, gold = draw.choice(turns)
        text = mutated(gold, tools, draw)
        expected = tool_call_reward(text, [gold], tools).reward
        functions = [tool["function"] for tool in tools]
        assert page.tool_call_reward(text, (gold.name, gold.arguments), functions) == pytest.approx(expected), text
        seen.add(round(expected, 2))
    assert seen >= {-2.0, -1.5, -0.8, -0.5, -0.25, 1.0}


def test_advantages_and_losses():
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(6, 9, generator=generator) for _ in range(5)]
    lengths_B = torch.tensor([9, 1, 4, 6, 9, 2])
    mask_BR = torch.arange(9) < lengths_B[:, None]
    advantages_BR, returns_BR = page.compute_gae(x[0] * mask_BR, x[1], mask_BR)
    expected = compute_gae(x[0], x[1], mask_BR, 1.0, 0.95)
    assert torch.allclose(advantages_BR, expected[0], atol=1e-6) and torch.allclose(returns_BR, expected[1], atol=1e-6)
    policy = page.policy_loss(x[2] / 3, x[3] / 3, advantages_BR, mask_BR)
    assert policy.item() == pytest.approx(policy_loss(x[2] / 3, x[3] / 3, advantages_BR, mask_BR, 0.2)[0].item(), 1e-5)
    value = page.value_loss(x[4], x[1], returns_BR, mask_BR)
    assert value.item() == pytest.approx(value_loss(x[4], x[1], returns_BR, mask_BR, 0.2)[0].item(), 1e-5)


@pytest.mark.very_slow
def test_the_page_as_printed():
    """The page runs and ends with more right calls than it began with."""
    run = subprocess.run(
        [".venv/bin/python", "examples/tl_training_on_one_page.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    base, sft, ppo = (int(line.split()[1].rstrip(":")) for line in run.stdout.splitlines())
    assert base < sft <= ppo
