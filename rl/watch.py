"""Watching a PPO run: metrics of a rollout, the journals of the run folder, the progress bar, held-out evaluation.

Nothing in here changes what is learned. Journals are appended and flushed line by line, each line with its optimizer
step, so that a resumed run can cut them back to its checkpoint:
    metrics.jsonl      one line per optimizer step (docs/metrics.md)
    samples.jsonl      one line per response: prompt, response, reward, branch of the reward
    evaluations.jsonl  one line per held-out evaluation
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from tqdm import tqdm

from model.tokenizer import Tokenizer
from rl.advantages import explained_variance_from_sums, explained_variance_sums, kl_estimates, masked_sums
from rl.evaluate_reward import evaluate_reward, summarize
from rl.index_ledger import format_ledger
from rl.ppo_config import PPOConfig
from rl.prompts import PPOPrompt
from rl.reward import CATEGORIES
from rl.rollout import Rollout, response_text
from train.distributed import World, gather_objects, gathered_model, global_sum
from train.run_logging import MetricsFile, log_line

JOURNALS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# Figures of a rollout


def describe_rollout(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """What a rollout's lines of metrics.jsonl say about it, over all ranks (docs/metrics.md); a collective."""
    mask_BR = rollout.response_mask_BR
    estimates = kl_estimates(rollout.logprobs_BR, rollout.ref_logprobs_BR, mask_BR)
    grids = {
        "ppo/kl_k1": estimates["k1"],
        "ppo/kl_k2": estimates["k2"],
        "ppo/kl_k3": estimates["k3"],
        "ppo/entropy": rollout.entropies_BR,
        "ppo/advantage_mean": rollout.advantages_BR,
        "ppo/return_mean": rollout.returns_BR,
        "ppo/value_mean": rollout.values_BR,
        "advantage_square": rollout.advantages_BR.double().square(),
    }
    scores_B = rollout.scores_B.double()
    counts = Counter(result.category for result in rollout.results)
    n, tokens, score_sum, square_sum, cut, *sums = global_sum(
        [
            float(len(rollout.results)),
            float(mask_BR.sum()),
            scores_B.sum().item(),
            scores_B.square().sum().item(),
            float(rollout.ended.count(False)),
            *(masked_sums(grid_BR, mask_BR)[1] for grid_BR in grids.values()),
            *(float(counts[category]) for category in CATEGORIES),
            *explained_variance_sums(rollout.values_BR, rollout.returns_BR, mask_BR),
        ]
    )
    means = {name: total / tokens for name, total in zip(grids, sums, strict=False)}
    shares = {f"ppo/share_{name}": count / n for name, count in zip(CATEGORIES, sums[len(grids) :], strict=False)}
    variance = max(0.0, means.pop("advantage_square") - means["ppo/advantage_mean"] ** 2)
    difference_BR = torch.where(mask_BR, rollout.sampler_logprobs_BR - rollout.logprobs_BR, 0.0).abs()
    return {
        "ppo/score": score_sum / n,
        "ppo/score_std": max(0.0, square_sum / n - (score_sum / n) ** 2) ** 0.5,
        "ppo/response_tokens": tokens / n,
        "ppo/truncated_share": cut / n,
        **shares,
        "ppo/kl_sequence": means["ppo/kl_k1"] * tokens / n,
        "ppo/kl_coef": kl_coef,
        **means,
        "ppo/advantage_std": variance**0.5,
        "ppo/explained_variance": explained_variance_from_sums(sums[-5:]),
        "ppo/sampler_logprob_difference": max(gather_objects(_maximum(difference_BR))),
    }


def _maximum(grid_BR: Tensor) -> float:
    return grid_BR.max().item() if grid_BR.numel() else 0.0


def add_times(line: dict[str, float], seconds: dict[str, float], *, n_steps: int, n_responses: int) -> dict[str, float]:
    """A line of metrics with its times, s on rank 0: the phases before the update are spread over its n_steps lines."""
    shares = {name: value / n_steps for name, value in seconds.items()}
    return {
        **line,
        "time/rollout_seconds": shares["rollout"],
        "time/reward_seconds": shares["reward"],
        "time/policy_logprobs_seconds": shares["policy_logprobs"],
        "time/reference_seconds": shares["reference"],
        "time/critic_seconds": shares["critic"],
        "time/step_seconds": sum(shares.values()) + line["time/update_seconds"],
        "time/generated_tokens_per_second": line["ppo/response_tokens"] * n_responses / seconds["rollout"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Journals, bar, evaluation


class Watch:
    """The run's journals and its progress bar, on rank 0; on other ranks it only joins the collectives."""

    def __init__(self, output: Path, config: PPOConfig, world: World, *, step: int, last_step: int) -> None:
        self.config, self.world = config, world
        self.files = {name: MetricsFile(output / name) for name in JOURNALS} if world.is_main else {}
        self.must_print_ledger = config.print_ledger == "on" and world.is_main
        self.has_warned_of_cuts = False
        # disable=None: no bar when stderr is not a terminal, so that logs and error lines stay clean
        self.bar = tqdm(total=last_step, initial=step, unit="step", disable=None if world.is_main else True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for file in self.files.values():
            file.close()

    def sync(self) -> None:
        """Force the journals to disk: called before a checkpoint claims their steps."""
        for file in self.files.values():
            file.sync()

    def record(self, rollout: Rollout, lines: Sequence[dict[str, float]], tokenizer: Tokenizer) -> None:
        """Write one iteration's lines and samples, move the bar; a collective."""
        rows = [row for part in gather_objects(_sample_rows(rollout, tokenizer)) for row in part]
        if not self.world.is_main:
            return
        for line in lines:
            self.files["metrics.jsonl"].write(line)
        stamp = {"step": lines[-1]["step"], "iteration": lines[-1]["iteration"]}
        for row in rows:
            self.files["samples.jsonl"].write({**stamp, **row})
        first = lines[0]
        self.bar.set_postfix(
            reward=f"{first['ppo/score']:+.3f}",
            KL=f"{first['ppo/kl_sequence']:.3f}",
            tokens=f"{first['ppo/response_tokens']:.1f}",
            refresh=False,
        )
        self.bar.update(len(lines))
        if first["ppo/truncated_share"] == 1.0 and not self.has_warned_of_cuts:
            self.has_warned_of_cuts = True
            log_line(
                f"warning: iteration {first['iteration']}: all {len(rows)} responses (share 1.00) were cut at "
                f"max_response_tokens = {self.config.max_response_tokens}; expected most to end with EOS"
            )
        if self.must_print_ledger and rollout.results:
            self.must_print_ledger = False
            log_line(ledger_of(rollout, 0, tokenizer, first["ppo/kl_coef"]))

    def evaluate(
        self, policy: torch.nn.Module, tokenizer: Tokenizer, held_out: Sequence[PPOPrompt], *, step: int
    ) -> None:
        """Score the held-out prompts, greedy and at the training temperature, all ranks together; a collective."""
        if not held_out:
            return
        gathered = gathered_model(policy, self.world, dtype=self.config.dtype)
        mine = list(range(self.world.rank, len(held_out), self.world.size))
        line: dict[str, object] = {"step": step}
        for name, temperature in (("greedy", 0.0), ("sampled", self.config.temperature)):
            rows = evaluate_reward(
                gathered,
                tokenizer,
                [held_out[index] for index in mine],
                temperature=temperature,
                max_response_tokens=self.config.max_response_tokens,
                samples_per_prompt=1,
                seed=self.config.seed,
                progress=f"evaluation, {name}" if self.world.is_main else None,
            )
            rows = [{**row, "index": mine[row["index"]]} for row in rows]
            line[name] = summarize([row for part in gather_objects(rows) for row in part])
        if self.world.is_main:
            self.files["evaluations.jsonl"].write(line)
            log_line(
                f"step {step}: held-out reward {line['greedy']['mean_reward']:+.3f} greedy, "
                f"{line['sampled']['mean_reward']:+.3f} at temperature {self.config.temperature:g}; greedy CF "
                f"{line['greedy']['CF']} of {line['greedy']['n']}"
            )


def _sample_rows(rollout: Rollout, tokenizer: Tokenizer) -> list[dict]:
    """What samples.jsonl holds of each response of this rank."""
    kl_B = torch.where(rollout.response_mask_BR, rollout.logprobs_BR - rollout.ref_logprobs_BR, 0.0).sum(dim=1).tolist()
    return [
        {
            "id": prompt.id,
            "turn": prompt.turn,
            "prompt": tokenizer.decode(prompt.prompt_ids),
            "response": response_text(ids, tokenizer),
            "tokens": len(ids),
            "ended": ended,
            "reward": result.reward,
            "category": result.category,
            "explanation": result.explanation,
            "kl": kl,
        }
        for prompt, ids, ended, result, kl in zip(
            rollout.prompts, rollout.response_ids, rollout.ended, rollout.results, kl_B, strict=True
        )
    ]


def ledger_of(rollout: Rollout, row: int, tokenizer: Tokenizer, kl_coef: float) -> str:
    """The index ledger of one response of this rank."""
    prompt, ids = rollout.prompts[row], rollout.response_ids[row]

    def entries(grid_BR: Tensor) -> list:
        return grid_BR[row, : len(ids)].tolist()

    table = format_ledger(
        prompt.prompt_ids,
        ids,
        tokenizer,
        entries(rollout.logprobs_BR),
        entries(rollout.ref_logprobs_BR),
        entries(rollout.rewards_BR),
        entries(rollout.values_BR),
        entries(rollout.advantages_BR),
        entries(rollout.returns_BR),
        rollout.scores_B[row].item(),
        entries(rollout.response_mask_BR),
        kl_coef,
    )
    return f"{prompt.id} turn {prompt.turn}: {rollout.results[row].explanation}\n{table}"
