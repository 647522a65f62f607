"""Makes docs/walkthrough.md: one bundled trajectory from JSON to the gradient, with the numbers of a short run.

    python examples/make_walkthrough.py                # trains (about a minute of one CPU core), then writes everything
    python examples/make_walkthrough.py --draw_only    # writes page and pictures from the numbers of the last run

A run is 35 steps of SFT (140 trajectories), 8 PPO iterations of the critic alone and 2 of both models, and last the
iteration that the page shows: eight responses to the prompt of the trajectory, with four updates. Its numbers go to
docs/figures/walkthrough.json. What needs no training is computed again whenever the page is written.
tests/test_walkthrough.py holds page, pictures and numbers to the product.

Shape suffixes: B responses, R response tokens, T positions.
"""

import argparse
import json
import math
import re
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder
from data.batches import epoch_order, pack
from data.formats.table import dialogue_segments
from data.key_tokens import find_key_tokens, weigh_key_tokens
from data.loss_weights import EncodedTrajectory, encode_names
from data.tool_calls import render_tool_call
from data.tool_documents import offered_names
from data.trajectories import Trajectory, read_trajectories
from examples.draw_figures import (
    EXAMPLE_INDEX,
    ROOT,
    TINY_MODEL,
    TRAIN_DATA,
    encode_example,
    example_trajectory,
    number,
    shown_piece,
    ticks,
    turn_positions,
)
from model.pretrained_weights import load_pretrained
from model.tokenizer import Tokenizer, load_tokenizer
from rl.advantages import kl_estimates
from rl.models import Models, load_models
from rl.ppo_config import PPOConfig
from rl.ppo_loop import run_iteration, update_minibatch
from rl.ppo_loss import policy_loss
from rl.prompts import prompts_of_iteration, read_prompts
from rl.rollout import (
    Credited,
    Iteration,
    credit_responses,
    judge_responses,
    measure_responses,
    pack_minibatches,
    response_text,
    sample_responses,
)
from run_sft import main as run_sft
from svg import Panel, axes, bars, curve, dot, line, names_below, picture, text
from train.distributed import World, close_world, init_world
from train.held_out import trained_logprobs
from train.run_logging import read_metrics

NUMBERS, PAGE, PICTURES = ROOT / "docs/figures/walkthrough.json", ROOT / "docs/walkthrough.md", ROOT / "docs/figures"
SFT_STEPS, CRITIC_ITERATIONS, POLICY_ITERATIONS, UPDATES = 35, 8, 2, 4
FAILED_MESSAGE, CORRECTED_MESSAGE = 1, 3  # of the trajectory
DIGITS = 5  # of the numbers in walkthrough.json


# ---------------------------------------------------------------------------------------------------------------------
# The run


def run() -> dict:
    """Trains, and returns the numbers of the page as JSON values."""
    with tempfile.TemporaryDirectory() as folder:
        sft_dir = Path(folder) / "sft"
        arguments = [
            "--output",
            str(sft_dir),
            "--max_steps",
            str(SFT_STEPS),
            "--checkpoint_every",
            "0",
            "--plot",
            "off",
        ]
        if run_sft([*arguments, "--device", "cpu", "--model", str(TINY_MODEL), "--data", str(TRAIN_DATA)]) != 0:
            raise SystemExit("run_sft.py failed, see above")
        losses = [line["sft/loss"] for line in read_metrics(sft_dir / "metrics.jsonl")]
        return {
            "sft_loss_first_step": round(losses[0], DIGITS),
            "sft_loss_last_step": round(losses[-1], DIGITS),
            "token_loss_base": token_losses(TINY_MODEL),
            "token_loss_sft": token_losses(sft_dir / "final"),
            "ppo": run_ppo(sft_dir / "final"),
        }


def token_losses(model_dir: Path) -> list[float]:
    """-ln p (E9 with w = 1, nats) of each trained token of the trajectory, in the order of its row."""
    tokenizer = load_tokenizer(TINY_MODEL)
    batch = pack([encode_example(example_trajectory(), tokenizer, "turn_mean")])
    return [round(-each, DIGITS) for each in trained_logprobs(load_pretrained(model_dir), batch, torch.device("cpu"))]


def run_ppo(sft_dir: Path) -> dict:
    """The iterations before the shown one, then the shown one."""
    config = PPOConfig(
        model=str(sft_dir),
        data=str(TRAIN_DATA),
        temperature=1.2,  # a little above 1: eight samples of a sharp model would all be alike
        policy_learning_rate=5e-5,
        schedule="constant",
        warmup_ratio=0.0,
        critic_only_iterations=CRITIC_ITERATIONS,
    )
    tokenizer, world = load_tokenizer(config.model), init_world("cpu")
    try:
        models = load_models(config, tokenizer, world)
        prompts, _ = read_prompts(
            config.data,
            tokenizer,
            error_filter=config.error_filter,
            prompt_turns=config.prompt_turns,
            max_prompt_tokens=512 - config.max_response_tokens,
            unparsable_calls=config.unparsable_calls,
        )
        n_before = CRITIC_ITERATIONS + POLICY_ITERATIONS
        for each in range(n_before):
            chosen = prompts_of_iteration(prompts, each, config.seed, config.rollout_batch_size)
            iteration = Iteration(each, each, n_before + UPDATES, config.kl_coef, chosen)
            run_iteration(config, models, world, iteration, must_stop=lambda: False)
        ours = next(prompt for prompt in prompts if prompt.id == example_trajectory().id)
        chosen = [ours] * config.rollout_batch_size
        return show_iteration(
            config, models, world, Iteration(n_before, n_before, n_before + UPDATES, config.kl_coef, chosen)
        )
    finally:
        close_world()


def show_iteration(config: PPOConfig, models: Models, world: World, iteration: Iteration) -> dict:
    """The steps of rl/ppo_loop.py:run_iteration, with the log-probabilities measured before and after every update."""
    responses = sample_responses(config, models, world, iteration, lambda: False)
    sampled = judge_responses(iteration.prompts, responses, models.tokenizer, world.device)
    (minibatch,) = pack_minibatches(config, world, sampled, range(len(iteration.prompts)))
    measured = measure_responses(config, models, sampled, minibatch)
    credited = credit_responses(config, measured, iteration.kl_coef)
    logprobs_after, metrics = [], {}
    for update in range(UPDATES):
        logprobs_after.append(measure_responses(config, models, sampled, minibatch).logprobs_BR)
        step = iteration.step + update + 1
        metrics = update_minibatch(
            config, models, credited, minibatch, step=step, train_policy=True, is_first_of_rollout=update == 0
        )
    logprobs_after.append(measure_responses(config, models, sampled, minibatch).logprobs_BR)
    return {
        "kl_coef": credited.kl_coef,
        "clip_range": config.clip_range,
        "clip_fraction_last_update": round(metrics["ppo/clip_fraction"], DIGITS),
        "responses": responses_as_json(credited, logprobs_after[-2], logprobs_after[-1], models.tokenizer),
    }


def responses_as_json(
    credited: Credited, logprobs_before_last_BR: torch.Tensor, logprobs_at_end_BR: torch.Tensor, tokenizer: Tokenizer
) -> list[dict]:
    """One entry per response: text, reward, and one number per token in every list."""
    measured, sampled = credited.measured, credited.measured.sampled
    grids = {
        "logprob": measured.logprobs_BR,
        "ref_logprob": measured.ref_logprobs_BR,
        "kl": kl_estimates(measured.logprobs_BR, measured.ref_logprobs_BR, sampled.response_mask_BR)["k1"],
        "reward": credited.rewards_BR,
        "value": measured.values_BR,
        "advantage": credited.advantages_BR,
        "return": credited.returns_BR,
        "logprob_before_last_update": logprobs_before_last_BR,
        "logprob_at_end": logprobs_at_end_BR,
    }
    return [
        {
            "ids": ids,
            "text": response_text(ids, tokenizer),
            "score": result.reward,
            "category": result.category,
            "explanation": result.explanation,
            **{name: [round(x, DIGITS) for x in grid_BR[row, : len(ids)].tolist()] for name, grid_BR in grids.items()},
        }
        for row, (ids, result) in enumerate(zip(sampled.response_ids, sampled.results, strict=True))
    ]


def json_text(numbers: dict) -> str:
    """JSON with every list of numbers on one line."""
    indented = json.dumps(numbers, indent=1) + "\n"
    return re.sub(r"\[[-\d.,e\s]+\]", lambda match: " ".join(match[0].split()), indented)


def was_trained_on(n_trajectories: int) -> bool:
    """Whether the SFT steps saw the trajectory."""
    return EXAMPLE_INDEX in epoch_order(n_trajectories, 0, 0)[: 4 * SFT_STEPS]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The tokens as ASCII text."""
    return [ascii(shown_piece(tokenizer.piece(token_id)))[1:-1].replace("\\'", "'") for token_id in ids]


def staggered_names(panel: Panel, names: Sequence[str], y: float) -> list[str]:
    """Names of the tokens in two rows, so that neighbours do not touch."""
    even, odd = ([name if i % 2 == rest else "" for i, name in enumerate(names)] for rest in (0, 1))
    return [*names_below(panel, even, y), *names_below(panel, odd, y + 13)]


def corrected_turn(losses: Sequence[float], row: EncodedTrajectory) -> list[float]:
    """The losses of the corrected call, out of those of all trained tokens."""
    trained = [position for position, weight in enumerate(row.loss_weights) if weight]
    chosen = set(turn_positions(row, CORRECTED_MESSAGE))
    return [loss for position, loss in zip(trained, losses, strict=True) if position in chosen]


def draw_token_losses(numbers: dict, row: EncodedTrajectory, tokenizer: Tokenizer) -> str:
    """The loss of each token of the corrected call, before and after SFT, on one scale."""
    names = pieces([row.target_ids[position] for position in turn_positions(row, CORRECTED_MESSAGE)], tokenizer)
    parts = []
    for top, key, title, series in (
        (84, "token_loss_base", "before SFT", "b"),
        (270, "token_loss_sft", f"after {SFT_STEPS} steps of SFT", "a"),
    ):
        losses = corrected_turn(numbers[key], row)
        panel = Panel(50, top, 46 * len(losses), 100, (0, len(losses)), (0, 24))
        parts.append(text(16, top - 24, f"{title}: {sum(losses):.3f} nats in all"))
        for value in (0, 8, 16, 24):
            parts.append(line(panel.left, panel.y(value), panel.left + panel.width, panel.y(value), "rule"))
            parts.append(text(panel.left - 6, panel.y(value) + 4, number(value), "small faint", "end"))
        parts += bars(panel, losses, series, [f"{loss:.3f}" for loss in losses])
        parts += staggered_names(panel, names, top + 116)
    return picture(
        "-ln p of each token of the corrected call, nats",
        "Bars over the tokens of the corrected call. Before SFT few tokens carry nearly the whole loss, the end of the "
        "turn among them; after SFT all bars are small.",
        760,
        410,
        parts,
    )


LEDGER_ROWS = {  # name in the JSON -> what the picture says
    "kl": "KL (k1)",
    "reward": "reward",
    "value": "value",
    "advantage": "advantage",
    "return": "return",
}


def draw_response_ledger(response: dict, tokenizer: Tokenizer) -> str:
    """KL, reward, value, advantage and return of each token of a response, each on a scale of its own."""
    parts, n_tokens = [], len(response["ids"])
    for index, (key, name) in enumerate(LEDGER_ROWS.items()):
        values = response[key]
        low, high = min(0.0, *values), max(0.0, *values)
        panel = Panel(96, 66 + 86 * index, 46 * n_tokens, 40, (0, n_tokens), (low, high))
        parts.append(text(16, panel.y(0) + 4, name))
        parts += bars(panel, values, "abcab"[index], [number(value, 4 if index < 2 else 2) for value in values])
    width = 46 * n_tokens
    parts += staggered_names(
        Panel(96, 0, width, 1, (0, n_tokens), (0, 1)), pieces(response["ids"], tokenizer), 66 + 86 * len(LEDGER_ROWS)
    )
    return picture(
        f"one response, reward {response['score']:+.2f}, token by token",
        "Five rows of bars over the tokens of a response: KL, reward, value, advantage and return. The reward of the "
        "whole response is in the bar of the last token.",
        max(760, 96 + width + 16),
        66 + 86 * len(LEDGER_ROWS) + 26,
        parts,
    )


def token_policy_loss(logprob: float, old_logprob: float, advantage: float, clip_range: float) -> tuple[float, bool]:
    """(E29 of one token, whether it is clipped and gives no gradient)."""
    grids_BR = [torch.tensor([[each]], dtype=torch.float64) for each in (logprob, old_logprob, advantage)]
    loss, stats = policy_loss(*grids_BR, torch.ones(1, 1, dtype=torch.bool), clip_range)
    return loss.item(), bool(stats["clipped"])


def batch_tokens(ppo: dict) -> list[tuple[float, float, bool]]:
    """(ratio, sign of the advantage, clipped?) of every token of the batch before the last update, in order."""
    found = []
    for response in ppo["responses"]:
        columns = (response[name] for name in ("logprob_before_last_update", "logprob", "advantage"))
        for logprob, old_logprob, advantage in zip(*columns, strict=True):
            _, is_clipped = token_policy_loss(logprob, old_logprob, advantage, ppo["clip_range"])
            found.append((math.exp(logprob - old_logprob), math.copysign(1.0, advantage), is_clipped))
    return found


def draw_clip(ppo: dict) -> str:
    """E29 for advantages of +1 and -1 over the ratio, with the batch's tokens where the last update finds them."""
    tokens = batch_tokens(ppo)
    high = max(1.4, 0.1 * math.ceil(10 * max(ratio for ratio, _, _ in tokens)))
    panel = Panel(56, 76, 500, 280, (0, high), (-1.5, 1.5))
    parts = axes(
        panel,
        ticks(*(each / 5 for each in range(int(5 * high) + 1))),
        ticks(-1.5, -1, -0.5, 0, 0.5, 1, 1.5),
        "ratio pi / pi_old",
        "loss of a token / |A|",
    )
    ratios = [0.02 + (high - 0.02) * each / 80 for each in range(81)]
    for sign, series in ((1.0, "a"), (-1.0, "b")):
        losses = [token_policy_loss(math.log(ratio), 0.0, sign, ppo["clip_range"])[0] for ratio in ratios]
        parts.append(curve(panel.points(ratios, losses), series))
    for ratio, sign, is_clipped in tokens:
        loss, _ = token_policy_loss(math.log(ratio), 0.0, sign, ppo["clip_range"])
        classes = f"{'a' if sign > 0 else 'b'} {'hollow' if is_clipped else 'full'}"
        parts.append(dot(panel.x(ratio), panel.y(min(loss, 1.5)), classes, 4))
    for top, sign, series, name in ((120, 1.0, "a", "A > 0"), (220, -1.0, "b", "A < 0")):
        chosen = [is_clipped for _, each, is_clipped in tokens if each == sign]
        parts += [
            text(580, top, f"{name}: {len(chosen)} tokens", series),
            dot(586, top + 16, f"{series} full"),
            text(598, top + 20, f"{len(chosen) - sum(chosen)} with a gradient", "small"),
            dot(586, top + 34, f"{series} hollow"),
            text(598, top + 38, f"{sum(chosen)} clipped, none", "small"),
        ]
    return picture(
        f"E29 before update {UPDATES}: where the tokens of this batch are",
        "Two curves over the ratio. The one of positive advantages falls and is flat above 1.2, that of negative ones "
        "is flat below 0.8 and rises. Full dots are tokens with a gradient, hollow ones are clipped.",
        760,
        410,
        parts,
    )


def draw_probabilities(ppo: dict, tokenizer: Tokenizer) -> str:
    """Probability of each token of the right and of the shown wrong response, before and after the updates."""
    parts, width = [], 760
    for index, response in enumerate(chosen_responses(ppo)):
        n_tokens, top = len(response["ids"]), 84 + 190 * index
        unit, width = 46, max(width, 66 + 46 * n_tokens)
        parts.append(text(16, top - 26, f"reward {response['score']:+.2f}, {response['category']}"))
        for shift, key, series in ((0.0, "logprob", "b"), (0.5, "logprob_at_end", "a")):
            for i, logprob in enumerate(response[key]):
                half = Panel(50 + unit * (i + shift), top, unit / 2, 90, (0, 1), (0, 1))
                parts += bars(half, [math.exp(logprob)], series)
        panel = Panel(50, top, unit * n_tokens, 90, (0, n_tokens), (0, 1))
        changes = [
            math.exp(after) - math.exp(before)
            for before, after in zip(response["logprob"], response["logprob_at_end"], strict=True)
        ]
        parts += names_below(panel, [f"{round(change, 3) + 0.0:+.3f}" for change in changes], top - 6)
        parts += [text(44, panel.y(value) + 4, number(value), "small faint", "end") for value in (0, 0.5, 1)]
        parts += staggered_names(panel, pieces(response["ids"], tokenizer), top + 108)
    return picture(
        f"probability of each token: hatched before, full after {UPDATES} updates",
        "Pairs of bars over the tokens of a right and a wrong response. The change is written above each pair.",
        width,
        84 + 190 * 2 - 46,
        parts,
    )


def chosen_responses(ppo: dict) -> list[dict]:
    """The first right response and the last wrong one."""
    right = [each for each in ppo["responses"] if each["category"] == "correct"]
    wrong = [each for each in ppo["responses"] if each["category"] != "correct"]
    return [right[0], wrong[-1]]


# ---------------------------------------------------------------------------------------------------------------------
# The page


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in each) + " |\n" for each in lines)


def code(content: str) -> str:
    """A fenced block, ASCII, with no blanks at the ends of its lines."""
    lines = content.encode("ascii", "backslashreplace").decode("ascii").splitlines()
    return "```\n" + "".join(each.rstrip() + "\n" for each in lines) + "```\n"


def rewrapped(page: str) -> str:
    """The page with its paragraphs at 120 columns, whatever the length of the numbers in them."""
    parts = page.split("```")  # text and code in turns
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(
            r"^(?:[^#|!\n].*\n)+",
            lambda match: textwrap.fill(match[0], 120, break_long_words=False, break_on_hyphens=False) + "\n",
            parts[i],
            flags=re.MULTILINE,
        )
    return "```".join(parts)


def section_data(trajectory: Trajectory, row: EncodedTrajectory, tokenizer: Tokenizer) -> str:
    """File, prompt, ids."""
    record = json.loads(TRAIN_DATA.read_text(encoding="utf-8"))[EXAMPLE_INDEX]
    messages = "\n".join(json.dumps(message) for message in record["conversations"][1:])
    segments = dialogue_segments(trajectory.tools, trajectory.messages[: CORRECTED_MESSAGE + 1])
    positions = turn_positions(row, CORRECTED_MESSAGE)
    rows = [
        [str(position), tokenizer.piece(row.input_ids[position]), tokenizer.piece(row.target_ids[position])]
        for position in positions
    ]
    shown = [[position, *(f"`{shown_piece(piece)}`" for piece in both)] for position, *both in rows]
    return f"""## 1. The file

Record {EXAMPLE_INDEX} of `assets/tiny_data/train.json`, id `{trajectory.id}`. Its system message lists
{len(trajectory.tools)} tools; the other messages are

{code(messages)}
`data/trajectories.py:read_trajectories` reads it. The first call passes `cabin` as the day and fails. The second one is
right. The tools `compare_cabin_remote` and `compare_cabin_cheap` begin alike.

## 2. The text

`data/formats/table.py:dialogue_segments` writes the dialogue as the model reads it. Up to the corrected call:

{code("".join(segment.text for segment in segments))}
## 3. Ids and targets

`data/loss_weights.py:encode_trajectory` encodes each segment alone and joins them to one row of
{len(row)} positions. The target of a position is the next token. After a trained call the target is `</s>`, although
the row continues with the
tool's output. The positions that predict the corrected call:

{table(["position", "input", "target"], shown)}"""


def section_weights(trajectory: Trajectory, row: EncodedTrajectory, tokenizer: Tokenizer) -> str:
    """Masked turn, key tokens, weights."""
    decisions = [
        [
            str(each.message_index),
            f"`{render_tool_call(trajectory.messages[each.message_index].call)}`",
            "masked" if each.masked else "trained",
            each.category,
            f"`{each.matched_text}`" if each.matched_text else "",
        ]
        for each in row.turn_decisions
    ]
    called = trajectory.messages[CORRECTED_MESSAGE].call.name
    names = encode_names(offered_names(trajectory.tools), tokenizer)
    call_ids = names[called]
    rows = []
    for name, ids in names.items():
        key = find_key_tokens(call_ids, [ids])
        shown = " ".join(f"`{shown_piece(tokenizer.piece(token_id))}`" for token_id in ids)
        rows.append([f"`{name}`", shown, "the call" if name == called else f"`{tokenizer.piece(call_ids[key[-1]])}`"])
    call_length = len(turn_positions(row, CORRECTED_MESSAGE)) - 2  # without blank and EOS
    n_key = sum(row.token_classes[position] == "key" for position in turn_positions(row, CORRECTED_MESSAGE))
    weight = weigh_key_tokens(list(range(n_key)), call_length, 9.0)[0]
    return f"""## 4. Which turn is masked (MAE, E2)

`data/error_filter.py:decide_masked_turns` reads each call with the tool's output to it:

{table(["message", "call", "decision", "category", "matched in the output"], decisions)}
The masked call stays in the context, so the model still sees what went wrong. Its tokens have weight 0.

## 5. Key tokens and their weight (PKT, E3 and E4)

`data/key_tokens.py:find_key_tokens` compares the call with the names of the other tools, token by token. The first
token of the name is a key token, and so is the first token that differs from a name with the same beginning:

{table(["offered name", "its tokens", "key token of the call against it"], rows)}
The call has {n_key} key tokens and {call_length - n_key} others (EOS and the blank before the call do not count), so
`data/key_tokens.py:weigh_key_tokens` gives w = clip({call_length - n_key} / {n_key}, 1, 9) = {number(weight)}:

![Weights over the tokens of the failed and the corrected call](figures/e02_key_token_weights.svg)
"""


def section_sft(numbers: dict, row: EncodedTrajectory, n_trajectories: int) -> str:
    """Losses before and after."""
    before, after = (sum(corrected_turn(numbers[name], row)) for name in ("token_loss_base", "token_loss_sft"))
    seen = "was one of them" if was_trained_on(n_trajectories) else "was not one of them"
    return f"""## 6. The loss of each token, before and after SFT

`python run_sft.py --max_steps {SFT_STEPS}` trains on {4 * SFT_STEPS} of {n_trajectories} trajectories; this one
{seen}. The loss of a step went from {numbers["sft_loss_first_step"]:.3f} to {numbers["sft_loss_last_step"]:.3f}.
`train/sft_loop.py:train_step` multiplies the loss of each token by its weight and
divides once. Here is the loss without weights (E9, `train/held_out.py:trained_logprobs`); over the call it fell from
{before:.3f} to {after:.3f} nats:

![Loss of each token of the corrected call before and after SFT](figures/walkthrough_token_losses.svg)

The key tokens cost little even before SFT: the failed call in the context already has the right name.
"""


def section_reward(ppo: dict) -> str:
    """Responses and rewards."""
    counts: dict[tuple[str, ...], int] = {}
    for each in ppo["responses"]:
        explanation = ascii(each["explanation"].partition(": ")[2])[1:-1].replace("\\'", "'")
        content = ascii(each["text"])[1:-1].replace("\\\\", "\\").replace("\\'", "'")
        key = (f"`{content}`", f"{each['score']:+.2f}", each["category"], explanation)
        counts[key] = counts.get(key, 0) + 1
    rows = [[str(count), *key] for key, count in counts.items()]
    return f"""## 7. Sampled responses and their rewards (IRM, E22)

PPO starts from the model after SFT: {CRITIC_ITERATIONS} iterations that train the critic alone, then
{POLICY_ITERATIONS} that train both models, on prompts of the whole file. The next iteration is the one shown from here
on. A usual iteration takes eight prompts. This
one takes the prompt of our trajectory eight times: everything of section 2 before the corrected call.
`rl/rollout.py:sample_responses` draws the responses at temperature 1.2, `rl/reward.py:tool_call_reward` judges them:

{table(["responses", "text", "reward", "category", "why"], rows)}"""


def section_credit(ppo: dict, tokenizer: Tokenizer) -> str:
    """KL, reward, value, advantage, return of the wrong response."""
    wrong = chosen_responses(ppo)[1]
    columns = ("logprob", "ref_logprob", "kl", "reward", "value", "advantage", "return")
    rows = [
        [f"`{name}`", *(f"{round(wrong[column][i], 4) + 0.0:.4f}" for column in columns)]
        for i, name in enumerate(pieces(wrong["ids"], tokenizer))
    ]
    kl, reward, value, advantage = (wrong[name][-1] for name in ("kl", "reward", "value", "advantage"))
    return f"""## 8. From one reward to one number per token (E24, E25)

`rl/rollout.py:measure_responses` computes the log-probabilities of the policy and of the frozen SFT model, and the
critic's values; all log-probabilities are at the sampling temperature. `rl/rollout.py:credit_responses` turns them
into rewards, advantages and returns. For the last wrong
response:

![KL, reward, value, advantage and return of each token](figures/walkthrough_ledger.svg)

{table(["token", *columns], rows)}
The reward of the last token is -{ppo["kl_coef"]} * {kl:.4f} + {wrong["score"]} = {reward:.4f}. Its advantage is
{reward:.4f} -
({value:.4f}) = {advantage:.4f}, since no value follows it. Each earlier advantage is the token's own delta plus 0.95
times the next advantage.
A negative advantage says: this turned out worse than the critic expected, so make the token less likely.
"""


def section_clip(ppo: dict, tokenizer: Tokenizer) -> str:
    """E29 and the effect of the updates."""
    tokens = batch_tokens(ppo)
    names = pieces([token_id for each in ppo["responses"] for token_id in each["ids"]], tokenizer)
    clipped = [f"`{name}` at {token[0]:.2f}" for name, token in zip(names, tokens, strict=True) if token[2]]
    right, wrong = chosen_responses(ppo)
    changes = [math.exp(sum(each[name])) for each in (right, wrong) for name in ("logprob", "logprob_at_end")]
    return f"""## 9. What the clip does (E29)

The first update finds every ratio at 1 (`rl/ppo_loop.py:faults_of_update` stops the run otherwise). With each update
the ratios move away from it. This is what
`rl/ppo_loss.py:policy_loss` makes of the {len(tokens)} tokens before update {UPDATES}:

![Clipped loss over the ratio with the tokens of the batch](figures/walkthrough_clip.svg)

{len(clipped)} of {len(tokens)} tokens are clipped (the update's `ppo/clip_fraction` is
{ppo["clip_fraction_last_update"]:.3f}): their ratio has already moved in the direction that their advantage asks for,
by more than {ppo["clip_range"]}, so they give no gradient. A token on the same side whose advantage has the other sign
is not clipped. The clipped tokens and their ratios: {", ".join(clipped) or "none"}.

## 10. What the updates did

`rl/ppo_loop.py:update_minibatch` made {UPDATES} updates at a learning rate of 5e-5. A default run makes one per
rollout:

![Probability of each token before and after the updates](figures/walkthrough_probabilities.svg)

The product over all tokens is the probability of the response. The right one went from {changes[0]:.3f} to
{changes[1]:.3f}, the wrong one from {changes[2]:.5f} to {changes[3]:.5f}. A token that right and wrong
responses share is pushed by all of them; the sum decides.

Every equation is in [math.md](math.md); every number that a run logs is in [metrics.md](metrics.md).
"""


def make_page(numbers: dict) -> str:
    """The text of docs/walkthrough.md."""
    tokenizer, trajectory = load_tokenizer(TINY_MODEL), example_trajectory()
    row = encode_example(trajectory, tokenizer, "turn_mean")
    head = """# Walkthrough: one trajectory from JSON to the gradient

Read this page to follow one trajectory through every step of the method, on real numbers. It is for readers who know
what SFT and PPO are and want to see what this code does with a dialogue. Each step names the function that does it.
`python examples/make_walkthrough.py` trains the model and writes the page, the pictures and the numbers again, in about
a minute on one CPU core. With `--draw_only` it reuses the numbers of the last run, `docs/figures/walkthrough.json`.
This page is the output of a program: change the program, not the page. `examples/walkthrough.ipynb` is the same page as
a notebook, with code to change in each section (`python examples/make_notebook.py` makes it from the page).
"""
    parts = [
        head,
        section_data(trajectory, row, tokenizer),
        section_weights(trajectory, row, tokenizer),
        section_sft(numbers, row, len(read_trajectories(TRAIN_DATA))),
        section_reward(numbers["ppo"]),
        section_credit(numbers["ppo"], tokenizer),
        section_clip(numbers["ppo"], tokenizer),
    ]
    return rewrapped("\n".join(parts))


def make_pictures(numbers: dict) -> dict[str, str]:
    """File name -> picture."""
    tokenizer, ppo = load_tokenizer(TINY_MODEL), numbers["ppo"]
    row = encode_example(example_trajectory(), tokenizer, "turn_mean")
    return {
        "walkthrough_token_losses": draw_token_losses(numbers, row, tokenizer),
        "walkthrough_ledger": draw_response_ledger(chosen_responses(ppo)[1], tokenizer),
        "walkthrough_clip": draw_clip(ppo),
        "walkthrough_probabilities": draw_probabilities(ppo, tokenizer),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make docs/walkthrough.md, its pictures and its numbers.")
    parser.add_argument(
        "--draw_only", action="store_true", help="do not train: take the numbers from docs/figures/walkthrough.json"
    )
    if not parser.parse_args(arguments).draw_only:
        torch.set_num_threads(1)  # sums keep one order, so that the same machine gives the same numbers
        NUMBERS.write_text(json_text(run()), encoding="ascii", newline="\n")
    numbers = json.loads(NUMBERS.read_text(encoding="ascii"))
    for name, drawn in make_pictures(numbers).items():
        (PICTURES / f"{name}.svg").write_text(drawn, encoding="ascii", newline="\n")
    PAGE.write_text(make_page(numbers), encoding="ascii", newline="\n")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
