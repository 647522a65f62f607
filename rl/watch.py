"""Watching a PPO run: metrics of a rollout, journals, progress bar, held-out evaluation, the index ledger.

Nothing here changes what is learned. Journals are appended and flushed line by line, each line with its optimizer step,
so that a resumed run can cut them back to its checkpoint:
    metrics.jsonl      one line per optimizer step (docs/metrics.md)
    samples.jsonl      one line per response: prompt, response, reward, category of the reward
    evaluations.jsonl  one line per held-out evaluation

Shape suffixes: B responses of this rank, R longest response among them, C columns of the ledger.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from data.tool_calls import render_tool_call
from model.decode import DecodeWeights
from model.tokenizer import Tokenizer
from printable import cut, message_line, one_line
from rl.advantages import explained_variance_from_sums, explained_variance_sums, kl_estimates, masked_sums
from rl.evaluate_reward import Sampling, evaluate_reward, summarize
from rl.models import Models
from rl.ppo_config import PPOConfig
from rl.prompts import PPOPrompt
from rl.reward import CATEGORIES
from rl.rollout import Credited, has_ended, response_text
from train.distributed import World, gather_objects, gathered_model, global_sum
from train.progress import is_due, mean_of, time_left, window_of
from train.run_logging import log_line
from train.run_watch import RunWatch

JOURNALS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")
SAMPLE_CHARACTERS = 100  # of each text of a response on stdout
LEDGER_COLUMNS = ("logprob", "KL", "reward", "value", "advantage", "return")
LEDGER_TOKEN_WIDTH = 18
LEDGER_PROMPT_TOKENS = 2  # rows shown of the end of the prompt
# Rewards and their sum over some hundred tokens are fp32; a wrong coefficient or index is off by far more.
LEDGER_TOLERANCE = 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Figures of a rollout


def describe_rollout(credited: Credited) -> dict[str, float]:
    """What a rollout's lines of metrics.jsonl say about it, over all ranks (docs/metrics.md); a collective."""
    measured, sampled = credited.measured, credited.measured.sampled
    mask_BR = sampled.response_mask_BR
    estimates = kl_estimates(measured.logprobs_BR, measured.ref_logprobs_BR, mask_BR)
    grids = {
        "ppo/kl_k1": estimates["k1"],
        "ppo/kl_k2": estimates["k2"],
        "ppo/kl_k3": estimates["k3"],
        "ppo/entropy": measured.entropies_BR,
        "ppo/advantage_mean": credited.advantages_BR,
        "ppo/return_mean": credited.returns_BR,
        "ppo/value_mean": measured.values_BR,
        "advantage_square": credited.advantages_BR.double().square(),
    }
    scores_B = sampled.scores_B.double()
    counts = Counter(result.category for result in sampled.results)
    n, tokens, score_sum, square_sum, cut, *sums = global_sum(
        [
            float(len(sampled.results)),
            float(mask_BR.sum()),
            scores_B.sum().item(),
            scores_B.square().sum().item(),
            float(sampled.ended.count(False)),
            *(masked_sums(grid_BR, mask_BR)[1] for grid_BR in grids.values()),
            *(float(counts[category]) for category in CATEGORIES),
            *explained_variance_sums(measured.values_BR, credited.returns_BR, mask_BR),
        ]
    )
    means = {name: total / tokens for name, total in zip(grids, sums, strict=False)}
    shares = {f"ppo/share_{name}": count / n for name, count in zip(CATEGORIES, sums[len(grids) :], strict=False)}
    variance = max(0.0, means.pop("advantage_square") - means["ppo/advantage_mean"] ** 2)
    difference_BR = torch.where(mask_BR, sampled.sampler_logprobs_BR - measured.logprobs_BR, 0.0).abs()
    return {
        "ppo/score": score_sum / n,
        "ppo/score_std": max(0.0, square_sum / n - (score_sum / n) ** 2) ** 0.5,
        "ppo/response_tokens": tokens / n,
        "ppo/truncated_share": cut / n,
        **shares,
        "ppo/kl_sequence": means["ppo/kl_k1"] * tokens / n,
        "ppo/kl_coef": credited.kl_coef,
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


class Watch(RunWatch):
    """The run's journals and its progress bar, on rank 0; on other ranks it only joins the collectives."""

    def __init__(self, config: PPOConfig, world: World, *, step: int, iteration: int, last_step: int) -> None:
        """step, iteration: those done before; last_step: where the run ends."""
        super().__init__(config, world, JOURNALS, step=step, last_step=last_step)
        self.config = config
        if world.is_main and iteration < config.critic_only_iterations and step < last_step:
            log_line(
                f"iterations {iteration} to {config.critic_only_iterations - 1} train the critic alone: the policy "
                "does not change until the values mean something (ppo/explained_variance)"
            )
        self.must_print_ledger = config.print_ledger == "on" and world.is_main
        self.has_warned_of_cuts = False

    def record(self, credited: Credited, lines: Sequence[dict[str, float]], tokenizer: Tokenizer) -> None:
        """Write one iteration's lines and samples, move the bar; a collective."""
        rows = [row for part in gather_objects(_sample_rows(credited, tokenizer)) for row in part]
        if not self.world.is_main:
            return
        first = lines[0]
        self.bar.set_postfix(
            reward=f"{first['ppo/score']:+.3f}",
            KL=f"{first['ppo/kl_sequence']:.3f}",
            tokens=f"{first['ppo/response_tokens']:.1f}",
            refresh=False,
        )
        self.write_steps(lines)
        stamp = {"step": lines[-1]["step"], "iteration": lines[-1]["iteration"]}
        for row in rows:
            self.files["samples.jsonl"].write({**stamp, **row})
        self._tell(lines, rows[0] if rows else None)
        if first["ppo/truncated_share"] == 1.0 and not self.has_warned_of_cuts:
            self.has_warned_of_cuts = True
            log_line(
                f"warning: iteration {first['iteration']}: all {len(rows)} responses (share 1.00) were cut at "
                f"max_response_tokens = {self.config.max_response_tokens}; expected most to end with EOS"
            )
        if self.must_print_ledger and credited.measured.sampled.results:
            self.must_print_ledger = False
            log_line(format_ledger(credited, 0, tokenizer))

    def _tell(self, lines: Sequence[dict], sample: dict | None) -> None:
        """Lines of figures, a sample response and the end of the critic-only stretch, each when it is due."""
        config, number, step = self.config, lines[0]["iteration"], lines[-1]["step"]
        if is_due(step, lines[0]["step"] - 1, config.log_every) or config.log_every and step >= self.last_step:
            log_line(ppo_line(self.recent, self.last_step))
            self.recent.clear()
        if sample is not None and config.sample_every and number % config.sample_every == 0:
            log_line(format_sample(number, sample))
        if number + 1 == config.critic_only_iterations:
            log_line(
                f"iteration {number} was the last one for the critic alone (explained variance "
                f"{lines[0]['ppo/explained_variance']:+.2f}); from now on the policy learns too"
            )

    def evaluate(self, models: Models, held_out: Sequence[PPOPrompt], *, step: int) -> None:
        """Score the held-out prompts, greedy and at the training temperature, all ranks together; a collective."""
        if not held_out:
            return
        gathered = gathered_model(models.policy, self.world, dtype=self.config.dtype)
        weights = DecodeWeights(gathered, cuda_graphs=self.config.cuda_graphs == "on")
        mine = list(range(self.world.rank, len(held_out), self.world.size))
        line: dict[str, object] = {"step": step}
        for name, temperature in (("greedy", 0.0), ("sampled", self.config.temperature)):
            rows = evaluate_reward(
                weights,
                models.tokenizer,
                [held_out[index] for index in mine],
                Sampling(temperature, self.config.max_response_tokens, samples_per_prompt=1, seed=self.config.seed),
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


def ppo_line(rows: Sequence[dict], last_step: int) -> str:
    """The line about the newest steps of a PPO run; rows: their lines of metrics.jsonl, at least one.

    Figures of a rollout count once per iteration, those of the update once per step.
    """
    rollouts = list({row["iteration"]: row for row in rows}.values())
    shares = {name: mean_of(rollouts, f"ppo/share_{name}") for name in reversed(CATEGORIES)}
    listing = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in shares.items() if share > 0)
    return (
        f"step {rows[-1]['step']}/{last_step}  reward {mean_of(rollouts, 'ppo/score'):+.3f} ({window_of(rows)})  "
        f"KL {mean_of(rollouts, 'ppo/kl_sequence'):.3f}  clipped {mean_of(rows, 'ppo/clip_fraction'):.1%}  {listing}  "
        f"{time_left(rows, last_step)}"
    )


def format_sample(iteration: int, row: dict) -> str:
    """A response with what was asked and the gold call; row: a line of samples.jsonl and the user's last words."""
    texts = [
        (name, one_line(text.strip(), SAMPLE_CHARACTERS))
        for name, text in (("user", row["request"]), ("gold", row["gold"]), ("model", row["response"]))
    ]
    texts.append(("reward", cut(message_line(row["explanation"]), SAMPLE_CHARACTERS)))  # its values are escaped already
    title = f"iteration {iteration}, {one_line(row['id'])} turn {row['turn']}:"
    return "\n".join([title, *(f"    {name:<6}  {text}" for name, text in texts)])


def _sample_rows(credited: Credited, tokenizer: Tokenizer) -> list[dict]:
    """One row of samples.jsonl per response of this rank."""
    measured, sampled = credited.measured, credited.measured.sampled
    kl_BR = torch.where(sampled.response_mask_BR, measured.logprobs_BR - measured.ref_logprobs_BR, 0.0)
    return [
        {
            "id": prompt.id,
            "turn": prompt.turn,
            "request": prompt.request,
            "prompt": tokenizer.decode(prompt.prompt_ids),
            "response": response_text(ids, tokenizer),
            "tokens": len(ids),
            "ended": ended,
            "reward": result.reward,
            "category": result.category,
            "explanation": result.explanation,
            "gold": render_tool_call(result.gold),
            "kl": kl,
        }
        for prompt, ids, ended, result, kl in zip(
            sampled.prompts,
            sampled.response_ids,
            sampled.ended,
            sampled.results,
            kl_BR.sum(dim=1).tolist(),
            strict=True,
        )
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The index ledger: which number of a response belongs to which token (`--print_ledger`)


def format_ledger(credited: Credited, row: int, tokenizer: Tokenizer) -> str:
    """An ASCII table of one response of this rank, one line per token, and two lines that check it.

    Everything on a line belongs to the token of that line: its log-probability, the reward for choosing it, and the
    value V(state before it), which the model computes one position further left. KL is k1 = logprob - ref_logprob.
    The checks: the score is at the last token, and the rewards add up to score - kl_coef * KL (E24).
    """
    measured, sampled = credited.measured, credited.measured.sampled
    prompt, response_ids = sampled.prompts[row], sampled.response_ids[row]
    lines = [
        f"{one_line(prompt.id)} turn {prompt.turn}: {sampled.results[row].explanation}",
        f"{'position':>8}  {'token':<{LEDGER_TOKEN_WIDTH}}{'mask':>4}" + "".join(f"{n:>11}" for n in LEDGER_COLUMNS),
    ]
    n_prompt = len(prompt.prompt_ids)
    for position in range(max(0, n_prompt - LEDGER_PROMPT_TOKENS), n_prompt):
        lines.append(_ledger_row(position, prompt.prompt_ids[position], tokenizer, ()))
    numbers_RC = torch.stack(
        [
            measured.logprobs_BR[row],
            measured.logprobs_BR[row] - measured.ref_logprobs_BR[row],
            credited.rewards_BR[row],
            measured.values_BR[row],
            credited.advantages_BR[row],
            credited.returns_BR[row],
        ],
        dim=1,
    )
    is_valid = sampled.response_mask_BR[row].tolist()
    for index, token_id in enumerate(response_ids):
        numbers = numbers_RC[index].tolist() if is_valid[index] else ()
        lines.append(_ledger_row(n_prompt + index, token_id, tokenizer, numbers))
    last = max((index for index in range(len(response_ids)) if is_valid[index]), default=None)
    if last is None:
        return "\n".join([*lines, "no response token: no score, no reward"])
    mask_R, score, kl_coef = sampled.response_mask_BR[row], sampled.scores_B[row].item(), credited.kl_coef
    kl, total = (numbers_RC[mask_R, column].double().sum().item() for column in (1, 2))
    score_there = numbers_RC[last, 2].item() + kl_coef * numbers_RC[last, 1].item()
    is_closed = has_ended(response_ids[: last + 1], tokenizer, sampled.prompts[row].prompt_format)
    kind = "EOS" if is_closed else "the last generated token, no EOS"
    return "\n".join(
        [
            *lines,
            f"score {score:+.4f} is at position {n_prompt + last} ({kind}): {_verdict(score_there - score)}",
            f"sum of rewards {total:+.4f} = score {score:+.4f} - kl_coef {kl_coef:g} * KL {kl:+.4f}: "
            + _verdict(total - (score - kl_coef * kl)),
        ]
    )


def _ledger_row(position: int, token_id: int, tokenizer: Tokenizer, numbers: Sequence[float]) -> str:
    """One token's line; without numbers, one of a token outside the response mask."""
    cells = "".join(f"{number:>11.4f}" for number in numbers) or f"{'-':>11}" * len(LEDGER_COLUMNS)
    token = _ledger_piece(token_id, tokenizer)
    return f"{position:>8}  {token:<{LEDGER_TOKEN_WIDTH}}{int(bool(numbers)):>4}{cells}"


def _ledger_piece(token_id: int, tokenizer: Tokenizer) -> str:
    """The token's text, quoted, in ASCII, cut to the width of its column."""
    piece = tokenizer.piece(token_id)
    for length in range(len(piece), -1, -1):
        text = ascii(piece[:length] + ("" if length == len(piece) else "..."))
        if len(text) < LEDGER_TOKEN_WIDTH:
            return text
    raise AssertionError("an empty piece fits")


def _verdict(difference: float) -> str:
    return "checked" if abs(difference) <= LEDGER_TOLERANCE else f"WRONG, off by {difference:+.4f}"
