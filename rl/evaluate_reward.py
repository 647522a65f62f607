"""The reward that a model earns on a file of prompts, greedy or sampled; several models side by side.

    python -m rl.evaluate_reward --model DIR [DIR ...] --data FILE [--temperature 1.0] [--samples_per_prompt 1]

Every response draws from a random generator of its own, seeded by (seed, prompt id, turn, sample). So a row depends
neither on batching nor on --limit, and two models see the same random numbers: their paired difference is narrower.

Shape suffix: B responses of a call.
"""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from command_line import parse_arguments, run_command
from data.error_filter import ERROR_FILTERS
from data.formats.table import TRAINING_FORMATS
from data.json_records import DataError, write_json_lines
from data.trained_format import AUTO_FORMAT, choose_format
from model.decode import DecodeWeights
from model.pretrained_weights import load_pretrained, read_config
from model.sampling import generate
from model.tokenizer import Tokenizer, check_vocabulary_fits, load_tokenizer
from model.transformer import Transformer
from printable import json_line, terminal_text
from rl.prompts import PROMPT_TURNS, UNPARSABLE_CALLS, PPOPrompt, read_prompts
from rl.reward import CATEGORIES, RewardResult, judge_response
from rl.rollout import has_ended, stop_ids_of
from train.distributed import DTYPES

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution: two-sided 95 %


# ---------------------------------------------------------------------------------------------------------------------
# Responses


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn. Raises ValueError unless samples_per_prompt is 1 or, above temperature 0, more."""

    temperature: float  # 0 is greedy; above 0 the distribution is that of the rollouts
    max_response_tokens: int
    samples_per_prompt: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples_per_prompt < 1 or self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError(
                f"samples_per_prompt: found {self.samples_per_prompt}, expected 1 or, above temperature 0, more"
            )


def response_seed(seed: int, prompt: PPOPrompt, sample: int) -> int:
    """Seed of one response's generator, below 2^63: a hash, because seeds like `seed + index` overlap between runs."""
    digest = hashlib.sha256(json.dumps([seed, prompt.id, prompt.turn, sample]).encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def evaluate_reward(
    model: Transformer | DecodeWeights,
    tokenizer: Tokenizer,
    prompts: Sequence[PPOPrompt],
    sampling: Sampling,
    progress: str | None = None,
) -> list[dict]:
    """One row per response, prompt by prompt: index (of the prompt), id, turn, sample, output, reward, category,
    TS, PI, CF (0 or 1), tokens (EOS included), ended (False: cut at max_response_tokens).

    progress: title of a progress bar on a terminal; None shows none.
    """
    jobs = [(index, sample) for index in range(len(prompts)) for sample in range(sampling.samples_per_prompt)]
    generators = None
    if sampling.temperature > 0:
        seeds = [response_seed(sampling.seed, prompts[index], sample) for index, sample in jobs]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with tqdm(total=len(jobs), desc=progress, unit="response", disable=True if progress is None else None) as bar:

        def should_continue(finished_B: torch.Tensor) -> bool:
            bar.update(int(finished_B.sum()) - bar.n)
            return True

        responses = generate(
            model,
            [prompts[index].prompt_ids for index, _ in jobs],
            max_new_tokens=sampling.max_response_tokens,
            temperature=sampling.temperature,
            eos_id=stop_ids_of(prompts, tokenizer),
            generator=generators,
            should_continue=should_continue,
        )
    return [
        _row(index, sample, prompts[index], response_ids, tokenizer)
        for (index, sample), (response_ids, _) in zip(jobs, responses, strict=True)
    ]


def _row(index: int, sample: int, prompt: PPOPrompt, response_ids: Sequence[int], tokenizer: Tokenizer) -> dict:
    is_closed = has_ended(response_ids, tokenizer, prompt.prompt_format)
    output = tokenizer.decode(list(response_ids[:-1] if is_closed else response_ids))
    result = judge_response(output, is_closed, prompt.gold_calls, prompt.tools, prompt.prompt_format)
    return {
        "index": index,
        "id": prompt.id,
        "turn": prompt.turn,
        "sample": sample,
        "output": output,
        "reward": result.reward,
        "category": result.category,
        **_accuracies(result, prompt),
        "tokens": len(response_ids),
        "ended": is_closed,
    }


def _accuracies(result: RewardResult, prompt: PPOPrompt) -> dict[str, int]:
    """TS, PI and CF of one response against any of its gold calls.

    Not read off the category: with several gold calls, a wrong tool (-1.5) for one of them beats the right tool with
    three parameter faults (-1.8) for another, and the category then names the wrong tool although TS holds.
    """
    if result.call is None:
        return {"TS": 0, "PI": 0, "CF": 0}
    same_tool = [gold for gold in prompt.gold_calls if gold.name == result.call.name]
    has_same_parameters = any(gold.arguments.keys() == result.call.arguments.keys() for gold in same_tool)
    return {"TS": int(bool(same_tool)), "PI": int(has_same_parameters), "CF": int(result.category == "correct")}


# ---------------------------------------------------------------------------------------------------------------------
# Summary


def mean_and_interval(values: Sequence[float]) -> tuple[float, list[float] | None]:
    """Mean of independent values and its normal 95 % interval [low, high], mean +- 1.96 * s / sqrt(n).

    s has n - 1 in its denominator; the interval is None for a single value. Raises ValueError for none.
    """
    n = len(values)
    if not n:
        raise ValueError("found no value, expected at least one")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    half_width = Z_95 * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, [mean - half_width, mean + half_width]


def prompt_means(rows: Sequence[dict]) -> dict[int, float]:
    """Mean reward per prompt index. Responses to one prompt are not independent; prompts are what was sampled."""
    rewards: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        rewards[row["index"]].append(row["reward"])
    return {index: math.fsum(values) / len(values) for index, values in rewards.items()}


def summarize(rows: Sequence[dict]) -> dict:
    """n (responses), n_prompts, mean_reward with interval_95 over prompt means, counts per category (all eight), TS,
    PI, CF, truncated as counts, mean_tokens. Raises ValueError without rows."""
    mean, interval = mean_and_interval(list(prompt_means(rows).values()))
    categories = Counter(row["category"] for row in rows)
    return {
        "n": len(rows),
        "n_prompts": len({row["index"] for row in rows}),
        "mean_reward": mean,
        "interval_95": interval,
        "categories": {category: categories[category] for category in CATEGORIES},
        "TS": sum(row["TS"] for row in rows),
        "PI": sum(row["PI"] for row in rows),
        "CF": sum(row["CF"] for row in rows),
        "truncated": sum(not row["ended"] for row in rows),
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
    }


def paired_difference(rows: Sequence[dict], first_rows: Sequence[dict]) -> dict:
    """mean_reward and interval_95 of (prompt mean of `rows` - prompt mean of `first_rows`), prompt by prompt.

    Raises ValueError unless both answer the same prompts.
    """
    means, first_means = prompt_means(rows), prompt_means(first_rows)
    if means.keys() != first_means.keys():
        raise ValueError(f"found {len(means)} and {len(first_means)} prompts, expected the same ones")
    mean, interval = mean_and_interval([means[index] - first_means[index] for index in means])
    return {"mean_reward": mean, "interval_95": interval}


def format_table(summaries: Sequence[dict]) -> str:
    """Summaries of main() as two tables of fixed width, one row per model: figures, then shares of the categories."""
    summaries = [{**summary, "model": terminal_text(summary["model"])} for summary in summaries]
    width = max(5, *(len(summary["model"]) for summary in summaries))
    lines = [f"{'model':<{width}}  responses  mean reward  {'95 % interval':<17}   TS %   PI %   CF %  cut %  tokens"]
    for row in summaries:
        shares = "".join(f"{100 * row[key] / row['n']:>7.1f}" for key in ("TS", "PI", "CF", "truncated"))
        lines.append(
            f"{row['model']:<{width}}  {row['n']:>9}  {row['mean_reward']:>+11.4f}  "
            f"{_interval(row['interval_95']):<17}{shares}{row['mean_tokens']:>8.1f}"
        )
    lines += [
        "",
        f"{'category, % of responses':<{max(width, 24)}}"
        + "".join(f"  {category.replace('_parameter', '_param')}" for category in CATEGORIES),
    ]
    widths = {category: 2 + len(category.replace("_parameter", "_param")) for category in CATEGORIES}
    for row in summaries:
        cells = (
            f"{100 * row['categories'][category] / row['n']:>{columns}.1f}" for category, columns in widths.items()
        )
        lines.append(f"{row['model']:<{max(width, 24)}}{''.join(cells)}")
    for row in summaries:
        if "difference" in row:
            lines.append(
                f"{row['model']} minus {summaries[0]['model']}: {row['difference']['mean_reward']:+.4f} "
                f"{_interval(row['difference']['interval_95'])}, paired by prompt"
            )
    return "\n".join(lines)


def _interval(interval: Sequence[float] | None) -> str:
    return "(one prompt)" if interval is None else f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def read_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; a wrong one ends the process with one line and code 2."""
    parser = argparse.ArgumentParser(prog="python -m rl.evaluate_reward", description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", required=True, metavar="DIR", help="model folders, Hugging Face layout")
    parser.add_argument("--data", required=True, help="trajectories, or a held-out file with gold calls")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 = greedy")
    parser.add_argument("--samples_per_prompt", type=int, default=1, help="responses per prompt")
    parser.add_argument("--max_response_tokens", type=int, default=64, help="longest response, tokens")
    parser.add_argument("--limit", type=int, default=0, help="only the first N prompts; 0 = all")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write one JSON line per response")
    parser.add_argument("--error_filter", choices=ERROR_FILTERS, default="structured", help="turns that are no prompts")
    parser.add_argument("--prompt_turns", choices=PROMPT_TURNS, default="all", help="which turns are prompts")
    parser.add_argument("--unparsable_calls", choices=UNPARSABLE_CALLS, default="error", help="as in SFT")
    parser.add_argument(
        "--prompt_format",
        choices=(AUTO_FORMAT, *TRAINING_FORMATS),
        default=AUTO_FORMAT,
        help="form of prompts and calls; auto = for each model the one it was trained in, else tl",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="compute type")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA if present")
    flags = parse_arguments(parser, arguments)
    for name, low in (("samples_per_prompt", 1), ("max_response_tokens", 1), ("limit", 0), ("seed", 0)):
        if getattr(flags, name) < low:
            parser.error(f"--{name}: found {getattr(flags, name)}, expected at least {low}")
    if not 0 <= flags.temperature < math.inf:
        parser.error(f"--temperature: found {flags.temperature}, expected 0 or a positive number")
    if flags.temperature == 0 and flags.samples_per_prompt > 1:
        parser.error(f"--samples_per_prompt: found {flags.samples_per_prompt}, expected 1 with --temperature 0")
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: found cuda, expected auto or cpu (this machine has no usable CUDA device)")
    return flags


def load_prompts(flags: argparse.Namespace) -> tuple[list[list[PPOPrompt]], list[str]]:
    """The prompts for each model in its own tokens, and the reader's notes for the first.

    All models answer the same turns: the length limit is that of the model with the fewest positions. Raises DataError
    where their tokenizers leave different turns within it.
    """
    room = min(read_config(folder).max_positions for folder in flags.model) - flags.max_response_tokens
    if room < 1:
        raise DataError(
            f"--max_response_tokens: found {flags.max_response_tokens}, expected fewer than the model's "
            f"{room + flags.max_response_tokens} positions"
        )
    prompts_of_model = []
    notes = [line for folder in flags.model if (line := choose_format(flags.prompt_format, folder)[1])]
    for folder in flags.model:
        prompts, new_notes = read_prompts(
            flags.data,
            load_tokenizer(folder),
            error_filter=flags.error_filter,
            prompt_turns=flags.prompt_turns,
            max_prompt_tokens=room,
            unparsable_calls=flags.unparsable_calls,
            prompt_format=choose_format(flags.prompt_format, folder)[0],
        )
        prompts_of_model.append(prompts[: flags.limit or None])
        notes += new_notes if len(prompts_of_model) == 1 else []
        if [(prompt.id, prompt.turn) for prompt in prompts_of_model[-1]] != [
            (prompt.id, prompt.turn) for prompt in prompts_of_model[0]
        ]:
            raise DataError(
                f"{folder}: found {len(prompts)} prompts of at most {room} tokens, expected the same turns "
                f"as with the tokenizer of {flags.model[0]}; compare these models one by one"
            )
    return prompts_of_model, notes


def run(flags: argparse.Namespace) -> None:
    """Evaluate, print, write. Raises DataError, ModelFolderError and OSError."""
    if flags.output is not None and flags.output.is_dir():  # now, not after the last model
        raise DataError(f"--output: found the folder {flags.output}, expected a file to write")
    prompts_of_model, notes = load_prompts(flags)
    print("\n".join(map(terminal_text, notes)))
    device = "cuda" if flags.device == "auto" and torch.cuda.is_available() else flags.device.replace("auto", "cpu")
    summaries: list[dict] = []
    all_rows: list[dict] = []
    for folder, prompts in zip(flags.model, prompts_of_model, strict=True):
        tokenizer = load_tokenizer(folder)
        model = load_pretrained(folder, dtype=DTYPES[flags.dtype], device=device)
        check_vocabulary_fits(tokenizer, model.config.vocab_size)
        rows = evaluate_reward(
            model,
            tokenizer,
            prompts,
            Sampling(flags.temperature, flags.max_response_tokens, flags.samples_per_prompt, flags.seed),
            progress=terminal_text(folder),
        )
        summaries.append({"model": folder, **summarize(rows)})
        first_rows = all_rows[: len(rows)]
        if first_rows:
            summaries[-1]["difference"] = paired_difference(rows, first_rows)
        all_rows += [{"model": folder, **row} for row in rows]
        del model
    print(format_table(summaries))
    if flags.output is not None:
        write_json_lines(flags.output, all_rows)
    names = ("data", "temperature", "samples_per_prompt", "max_response_tokens", "limit", "seed", "prompt_turns")
    settings = {name: getattr(flags, name) for name in names}
    print(json_line({**settings, "models": summaries}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr for bad input. The last line of stdout is one JSON object."""
    flags = read_flags(arguments)
    return run_command(lambda: run(flags), (ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
