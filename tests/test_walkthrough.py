"""docs/walkthrough.md is what examples/make_walkthrough.py makes, and its numbers are those of the product.

Shape suffixes: B responses, R response tokens.
"""

import json
import math
import re
from pathlib import Path

import pytest

from examples import make_walkthrough
from model.tokenizer import load_tokenizer
from rl.prompts import read_prompts
from rl.reward import tool_call_reward

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/walkthrough.md").read_text(encoding="ascii")
NUMBERS = json.loads((ROOT / "docs/figures/walkthrough.json").read_text(encoding="ascii"))
RESPONSES = NUMBERS["ppo"]["responses"]


def table_after(heading: str, header: str) -> list[list[str]]:
    """Cells of the first table below a heading of the page whose header begins like that."""
    block = PAGE.partition(heading)[2].partition(f"| {header}")[2]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.split("\n\n")[0].splitlines()[2:]]


# ---------------------------------------------------------------------------------------------------------------------
# What needs no training: exact


def test_page_and_pictures_are_those_of_the_program():
    assert make_walkthrough.make_page(NUMBERS) == PAGE
    for name, drawn in make_walkthrough.make_pictures(NUMBERS).items():
        assert (ROOT / "docs/figures" / f"{name}.svg").read_text(encoding="ascii") == drawn, name


def test_masked_turn_and_key_tokens_by_hand():
    """Feedback of message 1 is an error. compare_cabin_remote( and compare_cabin_cheap( share compare _ cabin _, so
    the fifth token, remote, is key next to the first; 13 tokens of the call without EOS: w = 11 / 2."""
    decisions = {row[0].strip("| "): row[2:4] for row in table_after("## 4.", "message |")}
    assert decisions == {
        "1": ["masked", "tool_call_failure"],
        "3": ["trained", "all_right"],
        "5": ["trained", "all_right"],
    }
    key_tokens = {row[0].strip("|` "): row[2].strip("`| ") for row in table_after("## 5.", "offered name")}
    assert key_tokens == {
        "cancel_bus_remote": "compare",
        "compare_cabin_remote": "the call",
        "compare_cabin_cheap": "remote",
        "ask_to_user": "compare",
        "finish": "compare",
    }
    assert "w = clip(11 / 2, 1, 9) = 5.5" in PAGE


def test_targets_of_the_corrected_call():
    targets = [row[2].strip("`| ") for row in table_after("## 3.", "position |")]
    assert targets == [
        *["' '", "compare", "_", "cabin", "_", "remote", "(", "day", '="', "August", "' '", "1", "6", '")', "</s>"]
    ]


def test_rewards_are_those_of_the_texts():
    """The reward of each stored text, judged again; the gold call is the corrected one."""
    prompts, _ = read_prompts(
        make_walkthrough.TRAIN_DATA,
        load_tokenizer(make_walkthrough.TINY_MODEL),
        error_filter="structured",
        prompt_turns="first",
        max_prompt_tokens=512,
        unparsable_calls="error",
    )
    prompt = next(each for each in prompts if each.id == "toolbox-00015")
    assert [(call.name, call.arguments) for call in prompt.gold_calls] == [
        ("compare_cabin_remote", {"day": "August 16"})
    ]
    for response in RESPONSES:
        result = tool_call_reward(response["text"], prompt.gold_calls, prompt.tools)
        assert (result.reward, result.category) == (response["score"], response["category"])
    assert {response["category"] for response in RESPONSES} > {"correct"}  # the page needs a right and a wrong one


# ---------------------------------------------------------------------------------------------------------------------
# The stored numbers agree with each other: E24, E25, E29 as plain loops


def test_rewards_advantages_and_returns_of_every_token():
    kl_coef = NUMBERS["ppo"]["kl_coef"]
    for response in RESPONSES:
        n, next_value, next_advantage = len(response["ids"]), 0.0, 0.0
        for t in reversed(range(n)):
            kl = response["logprob"][t] - response["ref_logprob"][t]
            reward = -kl_coef * kl + (response["score"] if t == n - 1 else 0.0)
            advantage = reward + next_value - response["value"][t] + 0.95 * next_advantage
            assert response["kl"][t] == pytest.approx(kl, abs=3e-5)
            assert response["reward"][t] == pytest.approx(reward, abs=3e-5)
            assert response["advantage"][t] == pytest.approx(advantage, abs=1e-4)
            assert response["return"][t] == pytest.approx(advantage + response["value"][t], abs=1e-4)
            next_value, next_advantage = response["value"][t], response["advantage"][t]


def test_clipped_tokens_are_counted_by_hand():
    """A token is clipped if its ratio is beyond 1.2 with A > 0, or below 0.8 with A < 0."""
    n_clipped = n_tokens = 0
    for response in RESPONSES:
        for old, new, advantage in zip(
            response["logprob"], response["logprob_before_last_update"], response["advantage"], strict=True
        ):
            ratio = math.exp(new - old)
            n_clipped += ratio > 1.2 if advantage > 0 else ratio < 0.8
            n_tokens += 1
    assert f"{n_clipped} of {n_tokens} tokens are clipped" in re.sub(r"\s+", " ", PAGE)
    assert NUMBERS["ppo"]["clip_fraction_last_update"] == pytest.approx(n_clipped / n_tokens, abs=1e-5)


def test_what_the_page_says_of_the_losses():
    row = make_walkthrough.encode_example(
        make_walkthrough.example_trajectory(), load_tokenizer(make_walkthrough.TINY_MODEL), "turn_mean"
    )
    before, after = (
        make_walkthrough.corrected_turn(NUMBERS[name], row) for name in ("token_loss_base", "token_loss_sft")
    )
    assert len(before) == 15 and sum(after) < sum(before) / 10
    assert before[1] < 0.01 and before[5] < 0.01  # compare and remote: "cost little even before SFT"
    assert sorted(before)[-2:] == sorted([before[8], before[14]])  # =" and </s>


def test_losses_of_the_base_model():
    """No training in these: the bundled weights."""
    assert make_walkthrough.token_losses(make_walkthrough.TINY_MODEL) == pytest.approx(
        NUMBERS["token_loss_base"], abs=2e-4
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run


@pytest.mark.very_slow
def test_the_run_gives_the_stored_numbers():
    """With a tolerance: other CPUs round differently, and 45 optimizer steps amplify that."""
    found = make_walkthrough.run()
    for name in ("sft_loss_first_step", "sft_loss_last_step", "token_loss_base", "token_loss_sft"):
        assert found[name] == pytest.approx(NUMBERS[name], abs=0.02), name
    assert [each["ids"] for each in found["ppo"]["responses"]] == [each["ids"] for each in RESPONSES]
    for each, stored in zip(found["ppo"]["responses"], RESPONSES, strict=True):
        for name in ("logprob", "ref_logprob", "value", "advantage", "logprob_before_last_update", "logprob_at_end"):
            assert each[name] == pytest.approx(stored[name], abs=0.02), name
