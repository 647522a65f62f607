"""Seconds by phase of one PPO iteration: ours, and the released code's way of doing the same iteration.

    python -m benchmarks.benchmark_ppo_iteration
    python -m benchmarks.benchmark_ppo_iteration --quick
    python -m benchmarks.benchmark_ppo_iteration --pad_to 8192 --prompts 8 --random off --rounds 1

ours      rl.ppo_loop.run_iteration itself: prompts of any length decoded from one cache, a free row taking the next
          prompt; packed rows without padding; the head only where a response token was sampled. It also computes
          entropies and all checks and metrics of a real run.
padded N  the released code's way, rewritten: every prompt padded on the left to N tokens; per minibatch one padded
          generation that lasts as long as its longest response; then full passes over all N + R positions: policy,
          reference and critic, and in the update policy and critic again; of both language models all V logits at every
          position. Nothing of one pass is used in the next. N is the longest prompt of the run, and --pad_to (released:
          8192 whatever the data; here by default four times the longest).

Both sides hold the same weights and the padded side is made to produce our side's responses, so both do one task:
log-probabilities and losses are compared and a difference ends in exit code 1. Learning rates are 0, which costs as
much as any other and keeps every round alike. The padded side is a lower bound of the released code's time: it uses our
blocks, fused attention, optimizer, losses and reward, a preallocated cache and logits of the last position only while
generating. Rounds alternate the sides; printed are medians, and the medians of the rounds' ratios, padded over ours.

--clock cpu (default) counts seconds of processor time of this process, which waiting for a busy processor does not
lengthen; set OMP_NUM_THREADS=1 with it.

Shape suffixes: B rows, T positions of a padded row (prompt and response), R of its response, L keys, N query heads, K
key/value heads, H head dim, D model dim, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from command_line import ConfigError, fail
from data.json_records import DataError
from model.config import ModelConfig, ModelFolderError
from model.pretrained_weights import save_pretrained
from model.tokenizer import load_tokenizer
from model.transformer import Transformer, apply_rope, rope_cos_sin
from model.value_model import ValueModel
from rl.advantages import compute_gae, kl_shaped_rewards
from rl.models import Models, load_models
from rl.ppo_config import PPOConfig
from rl.ppo_loop import run_iteration
from rl.ppo_loss import policy_loss, value_loss
from rl.prompts import PPOPrompt, prompts_of_iteration
from rl.reward import judge_response
from rl.rollout import Credited, Iteration, response_text
from run_ppo import make_prompts
from train.distributed import World, clip_gradients, close_world, init_world, local_part, reshard_all
from train.optimizer import make_adamw

PHASES = ("rollout", "reward", "policy_logprobs", "reference", "critic", "update")
TOLERANCE = 1e-3  # of log-probabilities and losses: padded and packed rows differ in the order of sums
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


# ---------------------------------------------------------------------------------------------------------------------
# Models and prompts


def save_random_model(args, folder: Path) -> None:
    """A LLaMA of the given shape with random weights; only its shape matters here."""
    model = Transformer(
        ModelConfig(
            vocab_size=args.vocab_size,
            dim=args.dim,
            n_layers=args.layers,
            n_heads=args.dim // 64,
            n_kv_heads=args.dim // 64,
            head_dim=64,
            ffn_dim=args.dim * 8 // 3 // 32 * 32,
            norm_eps=1e-5,
            rope_theta=1e4,
            rope_scaling=None,
            tie_embeddings=True,
            qkv_bias=False,
            max_positions=4096,
        )
    )
    model.init_weights(torch.Generator().manual_seed(args.seed))
    save_pretrained(model, folder)


def make_config(args, model_dir: str, n_prompts: int) -> PPOConfig:
    return PPOConfig(
        model=model_dir,
        prompt_format="tl",
        data=args.data,
        device="cpu",
        rollout_batch_size=n_prompts,
        minibatch_size=min(n_prompts, 8),
        max_response_tokens=args.max_response_tokens,
        policy_learning_rate=0.0,
        value_learning_rate=0.0,
        seed=args.seed,
    )


@torch.no_grad()
def randomize_value_head(critic: ValueModel, seed: int) -> None:
    """A head of zeros would say 0 on both sides, whatever the passes under it computed."""
    weight_1D = local_part(critic.value_head.weight)
    weight_1D.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(seed))


def plain_copy(models: Models) -> Models:
    """The same weights without FSDP, with optimizers of their own; one rank only."""

    def copied(model: torch.nn.Module) -> torch.nn.Module:
        reshard_all(model)
        copy = (ValueModel if isinstance(model, ValueModel) else Transformer)(model.config)
        copy.load_state_dict({name: local_part(value).clone() for name, value in model.state_dict().items()})
        return copy

    policy, reference, critic = map(copied, (models.policy, models.reference, models.critic))
    optimizers = [
        make_adamw(model, learning_rate=0.0, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0)
        for model in (policy, critic)
    ]
    reference.requires_grad_(False)
    return Models(policy, reference, critic, *optimizers, models.tokenizer, starts_at_reference=True)


# ---------------------------------------------------------------------------------------------------------------------
# Padded forward


class PaddedCache:
    """Keys and values (B, K, L, H) of every layer; the same number of slots is filled in all rows."""

    def __init__(self, config: ModelConfig, n_rows: int, n_slots: int) -> None:
        shape = (n_rows, config.n_kv_heads, n_slots, config.head_dim)
        self.layers = [(torch.empty(shape), torch.empty(shape)) for _ in range(config.n_layers)]
        self.filled = 0


def padded_states(model: Transformer, ids_BT: Tensor, mask_BL: Tensor, cache: PaddedCache | None = None) -> Tensor:
    """Final normed states (B, T, D) of the last T of L positions; mask_BL is False on padding."""
    B, T = ids_BT.shape
    positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
    cos, sin = rope_cos_sin(positions_BL[:, -T:], model.inverse_frequencies, torch.float32)
    sees_TL = torch.ones(T, mask_BL.shape[1], dtype=torch.bool).tril(mask_BL.shape[1] - T)
    # a padded query that sees nothing would be nan, and 0 * nan reaches the others: it sees itself
    itself_TL = torch.eye(mask_BL.shape[1], dtype=torch.bool)[-T:]
    mask_B1TL = (sees_TL & mask_BL[:, None, None]) | itself_TL
    x_BTD = model.tok_embeddings(ids_BT)
    for number, block in enumerate(model.layers):
        attention, normed_BTD = block.attention, block.attention_norm(x_BTD)
        q_BTNH, k_BTKH, v_BTKH = (
            matrix(normed_BTD).view(B, T, -1, attention.head_dim)
            for matrix in (attention.wq, attention.wk, attention.wv)
        )
        q_BNTH = apply_rope(q_BTNH, cos, sin).transpose(1, 2)
        k_BKLH, v_BKLH = apply_rope(k_BTKH, cos, sin).transpose(1, 2), v_BTKH.transpose(1, 2)
        if cache is not None:
            slots = slice(cache.filled, cache.filled + T)
            keys, values = cache.layers[number]
            keys[:, :, slots], values[:, :, slots] = k_BKLH, v_BKLH
            k_BKLH, v_BKLH = keys[:, :, : slots.stop], values[:, :, : slots.stop]
        out_BNTH = F.scaled_dot_product_attention(
            q_BNTH, k_BKLH, v_BKLH, attn_mask=mask_B1TL, enable_gqa=attention.is_grouped
        )
        x_BTD = x_BTD + attention.wo(out_BNTH.transpose(1, 2).reshape(B, T, -1))
        x_BTD = x_BTD + block.feed_forward(block.ffn_norm(x_BTD))
    if cache is not None:
        cache.filled += T
    return model.norm(x_BTD)


def padded_logprobs(model: Transformer, ids_BT: Tensor, mask_BT: Tensor, n_response: int) -> Tensor:
    """(B, R) out of the log-softmax of all V logits at all positions."""
    logits_BTV = F.linear(padded_states(model, ids_BT, mask_BT), model.head_weight())
    logprobs_BT = logits_BTV[:, :-1].log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]
    return logprobs_BT[:, -n_response:]


def padded_values(critic: ValueModel, ids_BT: Tensor, mask_BT: Tensor, n_response: int) -> Tensor:
    """(B, R): the value before each response token, out of the values at all positions."""
    values_BT = critic.value_head(padded_states(critic.backbone, ids_BT, mask_BT))[..., 0]
    return values_BT[:, :-1][:, -n_response:]


# ---------------------------------------------------------------------------------------------------------------------
# Padded iteration


@torch.no_grad()
def padded_generation(
    policy: Transformer,
    prompts: Sequence[PPOPrompt],
    responses: Sequence[list[int]],
    pad_to: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """(ids_BT, mask_BT) of left-padded prompts and their responses, T = pad_to + the longest response.

    Every token is drawn from the model, and then replaced by the one that our side drew: equal work on equal texts.
    """
    B, longest = len(prompts), max(map(len, responses))
    ids_BT = torch.zeros((B, pad_to + longest), dtype=torch.int64)
    mask_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start = pad_to - len(prompt.prompt_ids)
        ids_BT[row, start : pad_to + len(response)] = torch.tensor(prompt.prompt_ids + response)
        mask_BT[row, start : pad_to + len(response)] = True
    cache = PaddedCache(policy.config, B, pad_to + longest)
    for end in range(pad_to, pad_to + longest):
        new_ids_BT = ids_BT[:, :end] if end == pad_to else ids_BT[:, end - 1 : end]
        hidden_BD = padded_states(policy, new_ids_BT, mask_BT[:, :end], cache)[:, -1]
        probabilities_BV = F.linear(hidden_BD, policy.head_weight()).softmax(-1)
        torch.multinomial(probabilities_BV, 1, generator=generator).tolist()  # ids_BT[:, end] is used instead
    return ids_BT, mask_BT


def padded_iteration(
    config: PPOConfig,
    models: Models,
    credited: Credited,
    *,
    pad_to: int,
    rows_per_pass: int,
    clock: Callable[[], float],
) -> tuple[dict[str, float], Tensor, list[dict[str, float]]]:
    """The iteration of `credited` on padded rows: (seconds, logprobs_BR, losses of each minibatch)."""
    seconds, sampled = dict.fromkeys(PHASES, 0.0), credited.measured.sampled
    logprobs_BR, losses = torch.zeros_like(credited.measured.logprobs_BR), []
    generator = torch.Generator().manual_seed(config.seed)
    for rows in cut_minibatches(len(sampled.prompts), config.minibatch_size):
        prompts, responses = [sampled.prompts[row] for row in rows], [sampled.response_ids[row] for row in rows]
        with timed(seconds, "rollout", clock):
            ids_BT, mask_BT = padded_generation(models.policy, prompts, responses, pad_to, generator)
        R = ids_BT.shape[1] - pad_to
        with timed(seconds, "reward", clock):
            scores_B = torch.tensor(
                [
                    judge_response(
                        response_text(response, models.tokenizer),
                        response[-1:] == [models.tokenizer.eos_id],
                        prompt.gold_calls,
                        prompt.tools,
                    ).reward
                    for prompt, response in zip(prompts, responses, strict=True)
                ]
            )
        pieces = [
            (ids_BT[start : start + rows_per_pass], mask_BT[start : start + rows_per_pass])
            for start in range(0, len(rows), rows_per_pass)
        ]
        grids = []
        for name, model, function in (
            ("policy_logprobs", models.policy, padded_logprobs),
            ("reference", models.reference, padded_logprobs),
            ("critic", models.critic, padded_values),
        ):
            with timed(seconds, name, clock), torch.no_grad():
                grids.append(torch.cat([function(model, ids, mask, R) for ids, mask in pieces]))
        logprobs_BR[rows, :R] = grids[0].where(mask_BT[:, -R:], 0.0)
        with timed(seconds, "update", clock):
            losses.append(padded_update(config, models, pieces, scores_B, *grids))
    return seconds, logprobs_BR, losses


def cut_minibatches(n_responses: int, minibatch_size: int) -> list[range]:
    """Rows of each minibatch; the last one may be smaller."""
    return [range(start, min(start + minibatch_size, n_responses)) for start in range(0, n_responses, minibatch_size)]


def padded_update(
    config: PPOConfig,
    models: Models,
    pieces: Sequence[tuple[Tensor, Tensor]],
    scores_B: Tensor,
    old_logprobs_BR: Tensor,
    ref_logprobs_BR: Tensor,
    old_values_BR: Tensor,
) -> dict[str, float]:
    """One optimizer step of policy and critic, each through new passes over all positions."""
    R = old_values_BR.shape[1]
    mask_BR = torch.cat([mask[:, -R:] for _, mask in pieces])
    rewards_BR = kl_shaped_rewards(scores_B, old_logprobs_BR, ref_logprobs_BR, mask_BR, config.kl_coef)
    advantages_BR, returns_BR = compute_gae(rewards_BR, old_values_BR, mask_BR, config.gamma, config.gae_lambda)
    losses = {"ppo/policy_loss": 0.0, "ppo/value_loss": 0.0}
    start = 0
    for ids, mask in pieces:
        rows = slice(start, start + len(ids))
        start, share = start + len(ids), mask[:, -R:].sum() / mask_BR.sum()
        loss = (
            share
            * policy_loss(
                padded_logprobs(models.policy, ids, mask, R),
                old_logprobs_BR[rows],
                advantages_BR[rows],
                mask_BR[rows],
                config.clip_range,
            )[0]
        )
        loss.backward()
        losses["ppo/policy_loss"] += loss.item()
        loss = (
            share
            * value_loss(
                padded_values(models.critic, ids, mask, R),
                old_values_BR[rows],
                returns_BR[rows],
                mask_BR[rows],
                config.value_clip_range,
            )[0]
        )
        loss.backward()
        losses["ppo/value_loss"] += loss.item()
    for model, optimizer in models.trained().values():
        clip_gradients(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


@contextmanager
def timed(seconds: dict[str, float], name: str, clock: Callable[[], float]) -> Iterator[None]:
    began = clock()
    yield
    seconds[name] += clock() - began


def one_round(
    config: PPOConfig,
    models: Models,
    padded: Models,
    iteration: Iteration,
    world: World,
    args,
    pad_lengths: Sequence[int],
) -> dict[str, dict[str, float]]:
    """Side -> seconds by phase, "total", "positions" of one pass over the iteration, "difference" from our side."""
    clock = CLOCKS[args.clock]
    began = clock()
    with patch("time.perf_counter", clock):  # by which the real iteration stamps its phases
        credited, lines = run_iteration(config, models, world, iteration, must_stop=lambda: False)
    total = clock() - began
    sampled = credited.measured.sampled
    sides = {"ours": {phase: sum(line[f"time/{phase}_seconds"] for line in lines) for phase in PHASES}}
    sides["ours"] |= {
        "total": total,
        "difference": 0.0,
        "positions": sum(
            len(prompt.prompt_ids) + len(response) - 1
            for prompt, response in zip(sampled.prompts, sampled.response_ids, strict=True)
        ),
    }
    for pad_to in pad_lengths:
        began = clock()
        seconds, logprobs_BR, losses = padded_iteration(
            config, padded, credited, pad_to=pad_to, rows_per_pass=args.rows_per_pass, clock=clock
        )
        total = clock() - began
        differences = [(logprobs_BR - credited.measured.logprobs_BR).abs().max().item()]
        differences += [
            abs(loss[key] - line[key]) / max(1.0, abs(line[key]))
            for loss, line in zip(losses, lines, strict=True)
            for key in loss
        ]
        positions = sum(
            len(rows) * (pad_to + max(len(sampled.response_ids[row]) for row in rows))
            for rows in cut_minibatches(len(sampled.prompts), config.minibatch_size)
        )
        sides[f"padded {pad_to}"] = {**seconds, "total": total, "difference": max(differences), "positions": positions}
    return sides


def measure(
    args, title: str, model_dir: str, tokenizer, prompts: Sequence[PPOPrompt], n_prompts: int, world: World
) -> dict:
    config = make_config(args, model_dir, n_prompts)
    models = load_models(config, tokenizer, world)
    randomize_value_head(models.critic, args.seed)
    padded = plain_copy(models)
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    pad_lengths = sorted({longest, args.pad_to or 4 * longest})
    # warm-up, small: the cost of the first calls, and the sampler's trials of row counts
    warm_up = Iteration(0, step=0, total_steps=2, kl_coef=config.kl_coef, prompts=prompts[:2])
    one_round(config, models, padded, warm_up, world, args, [longest])
    results = []
    for number in range(max(1, args.rounds * 8 // n_prompts)):
        chosen = prompts_of_iteration(prompts, number, args.seed, n_prompts)
        iteration = Iteration(number, step=0, total_steps=n_prompts, kl_coef=config.kl_coef, prompts=chosen)
        results.append(one_round(config, models, padded, iteration, world, args, pad_lengths))
    medians = {
        side: {key: statistics.median(result[side][key] for result in results) for key in results[0][side]}
        for side in results[0]
    }
    ratios = {
        side: {
            key: statistics.median(result[side][key] / result["ours"][key] for result in results)
            for key in (*PHASES, "total", "positions")
        }
        for side in medians
        if side != "ours"
    }
    return {
        "model": title,
        "prompts": n_prompts,
        "rounds": len(results),
        "longest_prompt": longest,
        "medians": medians,
        "ratio_over_ours": ratios,
        "max_difference": max(result[side]["difference"] for result in results for side in result),
    }


def print_case(case: dict) -> None:
    print(
        f"\n{case['model']}; {case['prompts']} prompts per iteration, longest of the run {case['longest_prompt']} "
        f"tokens; rounds: {case['rounds']}"
    )
    print(f"{'seconds':18s}" + "".join(f"{name:>16s}" for name in (*PHASES, "total", "positions")))
    for side, row in case["medians"].items():
        print(f"{side:18s}" + "".join(f"{row[key]:16.3f}" for key in (*PHASES, "total")) + f"{row['positions']:16.0f}")
    for side, row in case["ratio_over_ours"].items():
        print(f"{side + ' / ours':18s}" + "".join(f"{row[key]:16.2f}" for key in (*PHASES, "total", "positions")))
    print(f"largest difference of log-probabilities and losses: {case['max_difference']:.1e}", flush=True)


def sizes(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part]
    if any(number < 1 for number in numbers):
        raise ValueError(f"found {text}, expected numbers >= 1")
    return numbers


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/sft/final", help="SFT model; its tokenizer serves the random one too")
    parser.add_argument("--data", default="assets/tiny_data/train.json", help="trajectories or held-out prompts")
    parser.add_argument(
        "--prompts",
        type=sizes,
        default=[8, 64],
        help="comma-separated: responses per iteration of --model (default: 8,64; empty: only the random model)",
    )
    parser.add_argument("--max_response_tokens", type=int, default=64, help="a response is cut here")
    parser.add_argument(
        "--pad_to",
        type=int,
        default=0,
        help="prompt length of the second padded side; 0 = four times the longest prompt",
    )
    parser.add_argument(
        "--rows_per_pass",
        type=int,
        default=1,
        help="rows of a padded pass outside the generation (released: 1 on each device)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="timed rounds over the sides with 8 prompts; fewer, at least 1, with more prompts",
    )
    parser.add_argument(
        "--random", choices=["on", "off"], default="on", help="measure a larger random model too, with 8 prompts"
    )
    parser.add_argument("--dim", type=int, default=384, help="random model: dimension, a multiple of 64")
    parser.add_argument("--layers", type=int, default=6, help="random model: blocks")
    parser.add_argument("--vocab_size", type=int, default=8192, help="random model: vocabulary (CodeLLaMA: 32016)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu", help="processor time, or wall time")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, responses and random weights")
    parser.add_argument(
        "--quick", action="store_true", help="8 prompts, 1 round, short responses, a small random model"
    )
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.rounds, args.max_response_tokens = [8], 1, 32
        args.dim, args.layers, args.vocab_size = 128, 2, 4096
    return args


def run_cases(args) -> list[dict]:
    """Measure and print one case after the other. Raises the errors of bad input."""
    tokenizer = load_tokenizer(args.model)
    prompts, notes = make_prompts(make_config(args, args.model, 8), args.data, tokenizer)
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    if args.pad_to and args.pad_to < longest:
        raise ConfigError(f"--pad_to: found {args.pad_to}, expected 0 or at least {longest}, the longest prompt")
    world = init_world("cpu")
    print(f"{notes[0]}; {torch.get_num_threads()} threads, torch {torch.__version__}, {args.clock} time")
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        runs = [(f"model {args.model}", args.model, n_prompts) for n_prompts in args.prompts]
        if args.random == "on":
            random_dir = Path(folder) / "random"
            save_random_model(args, random_dir)
            title = f"random model, D {args.dim}, {args.layers} layers, V {args.vocab_size}, tied"
            runs.append((title, str(random_dir), 8))
        for title, model_dir, n_prompts in runs:
            cases.append(measure(args, title, model_dir, tokenizer, prompts, n_prompts, world))
            print_case(cases[-1])
    return cases


def main() -> int:
    args = read_arguments()
    try:
        cases = run_cases(args)
    except (ConfigError, DataError, ModelFolderError) as error:
        fail(error)
    finally:
        close_world()
    agreed = all(case["max_difference"] <= TOLERANCE for case in cases)
    print(json.dumps({"benchmark": "ppo_iteration", "clock": args.clock, "cases": cases, "sides_agree": agreed}))
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
