"""Evaluate a tool-calling model: `python run_eval.py`, or `torchrun --nproc_per_node N run_eval.py`.

Greedy predictions, then scores with 95 % intervals per benchmark. Without flags: the model of run_sft.py on the bundled
tiny benchmarks. On multi-turn benchmarks (tooleyes, tiny-multi) every call is executed and its feedback goes back to
the model. `--endpoint URL` asks an OpenAI-compatible server instead of a model folder; `--predictions FILE` scores an
existing file. A killed run goes on with the same command, under any number of ranks. Exit codes: 0 everything scored; 2
bad input (one line on stderr).
"""

import fcntl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from command_line import ConfigError, fail, read_config, setting
from data.formats.prompt_format import PromptError
from data.formats.table import COMPLETION_FORMATS, DEFAULT_FORMAT, PROMPT_FORMATS, encode_prompt
from data.json_records import DataError, write_json_lines, write_text
from eval.benchmark_data import BENCHMARK_COUNTS, BENCHMARK_FILES, DIALOGUE_BENCHMARKS, benchmark_file
from eval.benchmarks import score_predictions
from eval.dialogues.journal import DialogueJournal, DialogueTask
from eval.dialogues.metrics import MAX_TURNS
from eval.dialogues.play import complete_dialogues, run_dialogues_with_endpoint, run_dialogues_with_model
from eval.dialogues.tools import EXECUTOR_KINDS, ToolExecutor, make_executor
from eval.fetch_benchmarks import check_benchmark
from eval.predict.endpoint import Endpoint, ask_records, check_url, make_endpoint
from eval.predict.generate import answers_sha256, check_settings, complete_predictions, folder_sha256, generated_rows
from eval.predict.letter_logprobs import letter_rows
from eval.queries import CHOICE_BENCHMARKS, TEXT_BENCHMARKS, ChoiceQuery, Query, load_queries, stop_texts_of
from eval.reports.plots import write_plots
from eval.reports.report import format_report
from model.pretrained_weights import ModelFolderError, load_pretrained
from model.tokenizer import Tokenizer, check_vocabulary_fits, load_tokenizer
from model.transformer import Transformer
from train.distributed import DTYPES, World, any_rank, close_world, init_world
from train.run_logging import describe_environment, log_line, write_json_atomically
from train.seeding import seed_everything

USER_ERRORS = (ConfigError, DataError, ModelFolderError, PromptError, OSError)
TINY_DATA = Path("assets/tiny_data")  # of the bundled benchmarks where --benchmark_dir does not have them


@dataclass(slots=True)
class EvalConfig:
    """All settings of one evaluation."""

    model: str = setting("runs/sft/final", "folder of the model, Hugging Face layout; with --endpoint its name there")
    benchmarks: str = setting("tiny-seen,tiny-unseen", f"comma-separated, of {', '.join(BENCHMARK_FILES)}")
    benchmark_dir: str = setting("assets/tiny_data", "folder of the benchmark files (docs/evaluation.md)")
    check_files: str = setting(
        "on", "compare published benchmark files with their sha256; off for files of your own", choices=("on", "off")
    )
    prompt_format: str = setting(
        "tl",
        "form of prompt and calls, by model: docs/evaluation.md; plain is that of the bundled base model",
        choices=PROMPT_FORMATS,
    )
    endpoint: str = setting("", "base URL of an OpenAI-compatible server, http://HOST:PORT/v1; empty = model folder")
    endpoint_key: str = setting("OPENAI_API_KEY", "environment variable that holds the endpoint's key")
    endpoint_timeout: float = setting(120.0, "seconds that the endpoint may take for one answer", low=0.1)
    endpoint_attempts: int = setting(6, "requests per record before the run ends, with growing pauses between", low=1)
    endpoint_concurrency: int = setting(8, "requests at the endpoint at a time", low=1)
    predictions: str = setting("", "score this file of predictions (one benchmark), no model; empty = predict")
    rules: str = setting(
        "default",
        "official = the benchmark's own scorer, fair = empty arguments may be right; "
        "default is official for RoTBench, fair for the others",
        choices=("default", "official", "fair"),
    )
    execute_code: str = setting(
        "off",
        "run code that the model wrote, in the sandbox (docs/sandbox.md); HumanEval needs it",
        choices=("on", "off"),
    )
    tool_executor: str = setting(
        "auto",
        "who answers the calls of a dialogue: tools of this project, or a simulation by the documents; "
        "auto = local where there is a tool, else simulated (docs/multi_turn.md)",
        choices=EXECUTOR_KINDS,
    )
    instability_rate: float = setting(
        0.0, "share of simulated calls that fail as if the service were down", low=0.0, high=1.0
    )
    call_failure_rate: float = setting(0.0, "share of simulated calls that the tool itself fails on", low=0.0, high=1.0)
    max_turns: int = setting(MAX_TURNS, "model outputs of a dialogue (ToolEyes and paper: 9)", low=1, high=MAX_TURNS)
    max_dialogue_tokens: int = setting(
        8192,
        "prompt and output together, at most the model's positions; a dialogue "
        "that grows beyond ends. The key/value cache holds batch_size times as many",
        low=2,
    )
    limit: int = setting(0, "only the first N records of each benchmark; 0 = all", low=0)
    max_new_tokens: int = setting(
        128, "longest output of a call, tokens; longer ones are cut and count as they are", low=1
    )
    max_answer_tokens: int = setting(384, "the same for gsm8k and humaneval", low=1)
    max_turn_tokens: int = setting(512, "the same for a turn of a dialogue, whose answer may be long", low=1)
    batch_size: int = setting(32, "prompts generated together on one rank; memory and speed only", low=1)
    output: str = setting("runs/eval", "folder of predictions, results, summary.json, report.md, plots")
    resume: str = setting(
        "auto",
        "auto keeps predictions that output already holds for this model and settings; "
        "never refuses a folder that has some",
        choices=("auto", "never"),
    )
    seed: int = setting(0, "seed of every random generator and of the tools; greedy calls do not depend on it", low=0)
    dtype: str = setting("float32", "compute type", choices=("float32", "bfloat16"))
    device: str = setting("auto", "auto takes CUDA where present", choices=("auto", "cpu", "cuda"))

    def validate(self) -> None:
        """Checks that need more than one field's bounds; raises ValueError naming the field."""
        names = self.benchmarks.split(",")
        for name in names:
            if name not in BENCHMARK_FILES:
                raise ValueError(f"benchmarks: found {name!a}, expected some of {', '.join(BENCHMARK_FILES)}")
        if len(set(names)) != len(names):
            raise ValueError(f"benchmarks: found {self.benchmarks}, expected each benchmark once")
        if self.predictions and len(names) != 1:
            raise ValueError(f"benchmarks: found {len(names)} benchmarks, expected one, that of --predictions")
        if self.predictions and self.prompt_format != DEFAULT_FORMAT:
            raise ValueError('prompt_format: found it beside --predictions, expected "format" in that file\'s lines')
        if self.predictions and self.endpoint:
            raise ValueError("endpoint: found it beside --predictions, expected one of the two")
        if self.prompt_format not in COMPLETION_FORMATS and not self.endpoint:
            raise ValueError(
                f"prompt_format: found {self.prompt_format} without --endpoint, expected the chat API of a server"
            )
        if self.instability_rate + self.call_failure_rate > 1.0:
            raise ValueError(
                f"instability_rate: found {self.instability_rate + self.call_failure_rate:g} together "
                "with --call_failure_rate, expected at most 1"
            )
        if "humaneval" in names and self.execute_code == "off":
            raise ValueError(
                "execute_code: found off, expected on for humaneval, whose scoring runs code that a model wrote"
            )
        if self.endpoint:
            try:
                check_url(self.endpoint)
            except ValueError as error:
                raise ValueError(f"endpoint: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one evaluation; returns the exit code."""
    try:
        config = read_config(
            EvalConfig, "Predict and score tool calls (TS, PI, CF) and dialogues (DE, CE, VA).", arguments
        )
        try:
            world = init_world(config.device)
        except ValueError as error:
            raise ConfigError(f"--{error}") from None
        run(config, world)
        return 0
    except USER_ERRORS as error:
        fail(error)
    finally:
        close_world()


def run(config: EvalConfig, world: World) -> None:
    """Predict (unless there are predictions), score, report. Rank 0 writes and scores, all ranks predict."""
    seed_everything(config.seed, world.rank)
    output = Path(config.output)
    answers = {name: answers_of(name, config) for name in config.benchmarks.split(",")}
    # A fault in the last benchmark shows now, not after the first one's predictions.
    queries = {name: load_queries(name, path) for name, path in answers.items()}
    predictions = {name: Path(config.predictions or output / "predictions" / f"{name}.jsonl") for name in answers}
    if not config.predictions:
        predict(config, world, answers, queries, predictions)
    if world.is_main:
        output.mkdir(parents=True, exist_ok=True)
        write_json_atomically(output / "config.json", asdict(config))
        write_json_atomically(output / "environment.json", describe_environment(world.size, world.device))
        log_line(score(config, answers, predictions))


def answers_of(name: str, config: EvalConfig) -> Path:
    """The file or folder of benchmark `name`. Raises DataError if a published one is not as it was published."""
    folder = Path(config.benchmark_dir)
    path = benchmark_file(name, folder)
    if name not in BENCHMARK_COUNTS:
        return path if path.exists() or not folder.is_dir() else benchmark_file(name, TINY_DATA)
    if config.check_files == "on":
        try:
            check_benchmark(name, folder)
        except DataError as error:
            raise DataError(f"{error}; --check_files off takes files of your own") from None
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Predictions


def predict(
    config: EvalConfig, world: World, answers: dict[str, Path], queries: dict[str, list], predictions: dict[str, Path]
) -> None:
    """Write the prediction file of every benchmark, or what is left of it; a collective over all ranks."""
    if config.endpoint:
        endpoint = endpoint_of(config, world)
        source = {"endpoint": config.endpoint, "model": config.model}
    else:
        model, tokenizer = load_model(config, world)
        for task in (queries[name][0] for name in predictions if name in DIALOGUE_BENCHMARKS):  # before any bar
            encode_prompt(task.tools, task.messages, tokenizer, config.prompt_format)
        source = {"model_sha256": folder_sha256(Path(config.model)), "dtype": config.dtype, "device": world.device.type}
    with lock_folder(Path(config.output) / "predictions", world):
        for name, path in predictions.items():
            settings = {
                **source,
                "prompt_format": config.prompt_format,
                "max_new_tokens": longest_output(name, config),
                "answers_sha256": answers_sha256(answers[name]),
                **dialogue_settings(name, config),
            }
            check_settings(path, settings, resume=config.resume, is_writer=world.is_main)
        for name, path in predictions.items():
            start = time.perf_counter()
            asked = queries[name][: config.limit or None]
            if name in DIALOGUE_BENCHMARKS:
                play = play_dialogues(config, world, endpoint if config.endpoint else (model, tokenizer))
                notices = complete_dialogues(path, asked, play, prompt_format=config.prompt_format, rank=world.rank)
            else:
                predict_missing = (
                    ask_missing(name, config, endpoint)
                    if config.endpoint
                    else generate_missing(name, config, world, model, tokenizer)
                )
                has_format = (
                    name not in (*TEXT_BENCHMARKS, *CHOICE_BENCHMARKS) and config.prompt_format != DEFAULT_FORMAT
                )
                notices = complete_predictions(
                    path,
                    asked,
                    predict_missing,
                    rank=world.rank,
                    label={"format": config.prompt_format} if has_format else {},
                )
            if world.is_main:
                for notice in notices:
                    log_line(notice)
                log_line(f"{name}: predictions in {path} ({time.perf_counter() - start:.1f} s)")


def longest_output(name: str, config: EvalConfig) -> int:
    """Tokens that an answer to a record of benchmark `name` may have."""
    if name in CHOICE_BENCHMARKS:
        return 1
    if name in DIALOGUE_BENCHMARKS:
        return config.max_turn_tokens
    return config.max_answer_tokens if name in TEXT_BENCHMARKS else config.max_new_tokens


def generate_missing(
    name: str, config: EvalConfig, world: World, model: Transformer, tokenizer: Tokenizer
) -> Callable[[list], Iterator[dict]]:
    """The function that predicts this rank's share of some queries of benchmark `name` with the model."""

    def predict_share(missing: list[Query] | list[ChoiceQuery]) -> Iterator[dict]:
        if name in CHOICE_BENCHMARKS:  # neighbours share a prefix: whole stretches, not every second one
            first, last = (len(missing) * part // world.size for part in (world.rank, world.rank + 1))
            return letter_rows(model, tokenizer, missing[first:last])
        return generated_rows(
            model,
            tokenizer,
            missing,
            prompt_format=config.prompt_format,
            stop_texts=stop_texts_of(name, config.prompt_format),
            max_new_tokens=longest_output(name, config),
            batch_size=config.batch_size,
            rank=world.rank,
            world_size=world.size,
        )

    return predict_share


def ask_missing(name: str, config: EvalConfig, endpoint: Endpoint) -> Callable[[list], Iterator[dict]]:
    """The function that predicts some queries of benchmark `name` with the endpoint."""
    return lambda missing: ask_records(
        endpoint,
        missing,
        prompt_format=config.prompt_format,
        max_new_tokens=longest_output(name, config),
        stop_texts=stop_texts_of(name, config.prompt_format),
    )


def dialogue_settings(name: str, config: EvalConfig) -> dict[str, str | int | float]:
    """What else decides the dialogues of a benchmark; nothing for other benchmarks."""
    if name not in DIALOGUE_BENCHMARKS:
        return {}
    return {
        "max_turns": config.max_turns,
        "max_dialogue_tokens": config.max_dialogue_tokens,
        "tool_executor": config.tool_executor,
        "tool_seed": config.seed,
        "instability_rate": config.instability_rate,
        "call_failure_rate": config.call_failure_rate,
        "execute_code": config.execute_code,
    }


def make_tools(config: EvalConfig) -> ToolExecutor:
    """Who answers the calls of the dialogues; to be closed."""
    return make_executor(
        config.tool_executor,
        seed=config.seed,
        instability_rate=config.instability_rate,
        failure_rate=config.call_failure_rate,
        execute_code=config.execute_code == "on",
    )


def play_dialogues(
    config: EvalConfig, world: World, player: tuple[Transformer, Tokenizer] | Endpoint
) -> Callable[[list[DialogueTask], DialogueJournal], None]:
    """The function that plays this rank's share of some dialogues with a model and its tokenizer, or the endpoint."""
    settings = {
        "prompt_format": config.prompt_format,
        "max_turns": config.max_turns,
        "max_new_tokens": config.max_turn_tokens,
    }

    def play(missing: list[DialogueTask], journal: DialogueJournal) -> None:
        with make_tools(config) as execute:
            if isinstance(player, Endpoint):
                run_dialogues_with_endpoint(missing, player, execute=execute, journal=journal, **settings)
            else:
                run_dialogues_with_model(
                    missing,
                    *player,
                    execute=execute,
                    journal=journal,
                    **settings,
                    batch_size=config.batch_size,
                    rank=world.rank,
                    world_size=world.size,
                    max_dialogue_tokens=config.max_dialogue_tokens,
                )
            for notice in execute.notices if world.is_main else ():
                log_line(notice)

    return play


def endpoint_of(config: EvalConfig, world: World) -> Endpoint:
    """The endpoint of the settings, with its key. Raises ConfigError for several ranks, EndpointError for the key."""
    if world.size > 1:
        raise ConfigError(
            f"--endpoint: found {world.size} processes, expected one; --endpoint_concurrency asks side by side"
        )
    return make_endpoint(
        config.endpoint,
        config.model,
        key_variable=config.endpoint_key,
        timeout=config.endpoint_timeout,
        attempts=config.endpoint_attempts,
        concurrency=config.endpoint_concurrency,
    )


def lock_folder(folder: Path, world: World) -> TextIO:
    """Keep other runs out of `folder` until the file returned is closed, by this process's end at the latest.

    Each rank holds a shared lock: a torchrun that is killed outright leaves its workers alive, and they go on writing.
    Raises DataError, on all ranks, while any process of another run holds one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")  # noqa: SIM115, held until the process ends
    is_taken = False
    if world.is_main:  # alone in the folder? The other ranks ask for their lock only after this answer.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_taken = True
    if any_rank(is_taken):
        raise DataError(
            f"{folder}: found another process at work on it, expected none; end it or wait for its end "
            "(killing torchrun itself leaves its workers running)"
        )
    fcntl.flock(lock, fcntl.LOCK_SH)  # rank 0 passes from exclusive to shared, which lets the others in
    return lock


def load_model(config: EvalConfig, world: World) -> tuple[Transformer, Tokenizer]:
    """A whole copy of the model on this rank's device, ready for inference, and its tokenizer."""
    if not Path(config.model).is_dir():
        raise ModelFolderError(
            f"{config.model}: found no such folder, expected a model; python run_sft.py makes "
            "runs/sft/final, or give --model DIR"
        )
    tokenizer = load_tokenizer(config.model)
    model = load_pretrained(config.model, dtype=DTYPES[config.dtype], device=world.device)
    check_vocabulary_fits(tokenizer, model.config.vocab_size)
    for name in config.benchmarks.split(","):
        if (longest := longest_output(name, config)) >= model.config.max_positions:
            flag = (
                "max_answer_tokens"
                if name in TEXT_BENCHMARKS
                else "max_turn_tokens"
                if name in DIALOGUE_BENCHMARKS
                else "max_new_tokens"
            )
            raise ConfigError(
                f"--{flag}: found {longest}, expected less than the model's {model.config.max_positions} positions"
            )
    return model.eval(), tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def score(config: EvalConfig, answers: dict[str, Path], predictions: dict[str, Path]) -> str:
    """Write results/<benchmark>.jsonl, summary.json, plots/ and report.md; returns the report."""
    output = Path(config.output)
    run_summary = {
        "model": None if config.predictions else config.model,
        "predictions": config.predictions or None,
        "prompt_format": None if config.predictions else config.prompt_format,
        "benchmarks": {},
    }
    for name, path in answers.items():
        rows, summary, notices = score_predictions(
            name,
            path,
            predictions[name],
            limit=config.limit or None,
            rules=config.rules,
            execute_code=config.execute_code == "on",
            max_turns=config.max_turns,
        )
        for notice in notices:
            log_line(notice)
        write_json_lines(output / "results" / f"{name}.jsonl", rows)
        run_summary["benchmarks"][name] = {**summary, "answers_sha256": answers_sha256(path)}
    write_json_atomically(output / "summary.json", run_summary)
    for notice in write_plots(["this run"], [run_summary], output / "plots")[1]:
        log_line(notice)
    report = format_report(run_summary)
    write_text(output / "report.md", report)
    return report


if __name__ == "__main__":
    sys.exit(main())
