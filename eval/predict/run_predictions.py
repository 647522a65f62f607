"""The predictions of a run: one file per benchmark, made by a model of ours or by an endpoint, kept and resumed."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from command_line import ConfigError
from data.formats.table import DEFAULT_FORMAT, FORMATS, encode_prompt
from data.json_records import DataError
from eval.benchmarks import BENCHMARKS, LONGEST_OUTPUT, Benchmark
from eval.dialogues.journal import DialogueJournal
from eval.dialogues.play import (
    DialogueSettings,
    complete_dialogues,
    run_dialogues_with_endpoint,
    run_dialogues_with_model,
)
from eval.dialogues.tools import ExecutorSettings, ToolExecutor
from eval.eval_config import EvalConfig
from eval.fetch_benchmarks import check_benchmark
from eval.predict.endpoint import Endpoint, ask_records, make_endpoint
from eval.predict.generate import (
    LocalModel,
    answers_sha256,
    check_settings,
    complete_predictions,
    folder_sha256,
    generated_rows,
)
from eval.predict.letter_logprobs import letter_rows
from eval.records import Record, limited
from model.pretrained_weights import ModelFolderError, check_folder, load_pretrained
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer

TINY_DATA = Path("assets/tiny_data")  # of the bundled benchmarks where --benchmark_dir does not have them


@dataclass(frozen=True, slots=True)
class BenchmarkRun:
    """One benchmark of a run, read once."""

    benchmark: Benchmark
    answers: Path  # its file or folder
    answers_sha256: str
    records: list[Record]  # all of them, whatever --limit
    predictions: Path


def open_benchmarks(config: EvalConfig) -> list[BenchmarkRun]:
    """The benchmarks of the settings with their records. Raises DataError with `file:line`, before any prediction."""
    runs = []
    for name in config.benchmarks.split(","):
        benchmark = BENCHMARKS[name]
        answers = find_answers(benchmark, config)
        records = benchmark.load(answers)
        predictions = Path(config.predictions or Path(config.output) / "predictions" / f"{name}.jsonl")
        runs.append(BenchmarkRun(benchmark, answers, answers_sha256(answers), records, predictions))
    return runs


def find_answers(benchmark: Benchmark, config: EvalConfig) -> Path:
    """The benchmark's file or folder. Raises DataError if a published one is not as it was published."""
    if not benchmark.path:
        return Path(config.data)
    folder = Path(config.benchmark_dir)
    path = folder / benchmark.path
    if not benchmark.published:
        return path if path.exists() or not folder.is_dir() else TINY_DATA / benchmark.path
    if config.check_files == "on":
        try:
            check_benchmark(benchmark, folder)
        except DataError as error:
            raise DataError(f"{error}; --check_files off takes files of your own") from None
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Who answers


def make_source(
    config: EvalConfig, *, rank: int, world_size: int, device: torch.device
) -> tuple[LocalModel | Endpoint, dict]:
    """The model or endpoint of the settings, and what identifies it in the settings file of the predictions."""
    if not config.endpoint:
        model, tokenizer = load_model(config, device)
        identity = {"model_sha256": folder_sha256(Path(config.model)), "dtype": config.dtype, "device": device.type}
        return LocalModel(model, tokenizer, rank, world_size, config.cuda_graphs == "on"), identity
    if world_size > 1:
        raise ConfigError(
            f"--endpoint: found {world_size} processes, expected one; --endpoint_concurrency asks side by side"
        )
    endpoint = make_endpoint(
        config.endpoint,
        config.model,
        key_variable=config.endpoint_key,
        timeout=config.endpoint_timeout,
        attempts=config.endpoint_attempts,
        concurrency=config.endpoint_concurrency,
    )
    return endpoint, {"endpoint": config.endpoint, "model": config.model}


def load_model(config: EvalConfig, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """A whole copy of the model on `device`, ready for inference, and its tokenizer."""
    if not Path(config.model).is_dir():
        raise ModelFolderError(
            f"{config.model}: found no such folder, expected a model; python run_sft.py makes "
            "runs/sft/final, or give --model DIR"
        )
    tokenizer = load_tokenizer(config.model)
    check_folder(config.model, tokenizer)
    model = load_pretrained(config.model, dtype=getattr(torch, config.dtype), device=device)
    for name in config.benchmarks.split(","):
        longest = longest_output(BENCHMARKS[name], config)
        if longest >= model.config.max_positions:
            raise ConfigError(
                f"--{LONGEST_OUTPUT[BENCHMARKS[name].asked]}: found {longest}, expected less than the model's "
                f"{model.config.max_positions} positions"
            )
    return model.eval(), tokenizer


def longest_output(benchmark: Benchmark, config: EvalConfig) -> int:
    """Tokens that an answer to one of the benchmark's records may have."""
    name = LONGEST_OUTPUT[benchmark.asked]
    return getattr(config, name) if name else 1


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def predict(
    config: EvalConfig, runs: Sequence[BenchmarkRun], *, rank: int, world_size: int, device: torch.device
) -> Iterator[str]:
    """Write the prediction file of every benchmark, or what is left of it; gives lines for the log as it goes.

    A collective: all ranks go through it. Raises DataError, ConfigError, ModelFolderError, PromptError, OSError.
    """
    source, identity = make_source(config, rank=rank, world_size=world_size, device=device)
    for run in runs:
        if run.benchmark.asked == "dialogue" and isinstance(source, LocalModel):  # a wrong tokenizer shows now
            first = run.records[0]
            encode_prompt(first.tools, first.messages, source.tokenizer, config.prompt_format)
    for run in runs:
        settings = identity | deciding_settings(run, config)
        check_settings(run.predictions, settings, resume=config.resume, is_writer=rank == 0)
    for run in runs:
        start = time.perf_counter()
        asked = limited(run.records, config.limit or None)
        if run.benchmark.asked == "dialogue":
            notices: list[str] = []
            play = partial(play_dialogues, config, source, notices)
            notices += complete_dialogues(run.predictions, asked, play, prompt_format=config.prompt_format, rank=rank)
        else:
            has_format = run.benchmark.asked == "call" and config.prompt_format != DEFAULT_FORMAT
            notices = complete_predictions(
                run.predictions,
                asked,
                partial(answer_records, config, source, run.benchmark),
                rank=rank,
                label={"format": config.prompt_format} if has_format else {},
            )
        yield from notices
        yield f"{run.benchmark.name}: predictions in {run.predictions} ({time.perf_counter() - start:.1f} s)"


def deciding_settings(run: BenchmarkRun, config: EvalConfig) -> dict[str, str | int | float]:
    """What decides the predictions of a benchmark, with the model: a run continues only where these are the same."""
    settings = {
        "prompt_format": config.prompt_format,
        "max_new_tokens": longest_output(run.benchmark, config),
        "answers_sha256": run.answers_sha256,
    }
    if run.benchmark.asked == "choice" and not config.endpoint:
        return settings | {"max_prompt_tokens": config.mmlu_max_prompt_tokens}
    if run.benchmark.asked != "dialogue":
        return settings
    return settings | {
        "max_turns": config.max_turns,
        "max_dialogue_tokens": config.max_dialogue_tokens,
        "tool_executor": config.tool_executor,
        "tool_seed": config.seed,
        "instability_rate": config.instability_rate,
        "call_failure_rate": config.call_failure_rate,
        "execute_code": config.execute_code,
    }


def answer_records(
    config: EvalConfig, source: LocalModel | Endpoint, benchmark: Benchmark, records: list[Record]
) -> Iterator[dict]:
    """Prediction rows of this process's share of some records."""
    stop_texts = benchmark.stop_texts() or FORMATS[config.prompt_format].stop_strings
    settings = {
        "prompt_format": config.prompt_format,
        "stop_texts": stop_texts,
        "max_new_tokens": longest_output(benchmark, config),
    }
    if isinstance(source, Endpoint):
        return ask_records(source, records, **settings)
    if benchmark.asked == "choice":  # neighbours share a prefix: whole stretches, not every second one
        first, last = (len(records) * part // source.world_size for part in (source.rank, source.rank + 1))
        limit = config.mmlu_max_prompt_tokens
        return letter_rows(source.model, source.tokenizer, records[first:last], max_prompt_tokens=limit)
    return generated_rows(source, records, **settings, batch_size=config.batch_size)


def play_dialogues(
    config: EvalConfig,
    source: LocalModel | Endpoint,
    notices: list[str],
    records: list[Record],
    journal: DialogueJournal,
) -> None:
    """Play this process's share of some dialogues; what the tools have to say is added to `notices`."""
    settings = DialogueSettings(
        prompt_format=config.prompt_format,
        max_new_tokens=config.max_turn_tokens,
        max_turns=config.max_turns,
        batch_size=config.batch_size,
        max_dialogue_tokens=config.max_dialogue_tokens,
    )
    tools = ExecutorSettings(
        config.tool_executor,
        seed=config.seed,
        instability_rate=config.instability_rate,
        failure_rate=config.call_failure_rate,
        execute_code=config.execute_code == "on",
    )
    run = run_dialogues_with_endpoint if isinstance(source, Endpoint) else run_dialogues_with_model
    with ToolExecutor(tools) as execute:
        run(records, source, settings, execute=execute, journal=journal)
        notices += execute.notices
