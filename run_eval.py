"""Evaluate a tool-calling model: `python run_eval.py`, or `torchrun --nproc_per_node N run_eval.py`.

Greedy predictions, then TS/PI/CF with 95 % intervals per benchmark. Without flags: the model of run_sft.py on the
bundled tiny benchmarks. `--predictions FILE` scores an existing file, no model. A killed run goes on with the same
command, under any number of ranks. Exit codes: 0 everything scored; 2 bad input (one line on stderr).
"""

import fcntl
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from data.trajectories import DataError
from eval.benchmark_data import BENCHMARK_FILES, benchmark_file, load_tiny
from eval.evaluate_tiny import evaluate_tiny_files
from eval.generate_predictions import check_settings, folder_sha256, generate_predictions
from eval.json_lines import write_json_lines, write_text
from eval.output_formats import OUTPUT_FORMATS
from eval.report import format_report, summarize_results
from model.pretrained_weights import ModelFolderError, load_pretrained
from model.tokenizer import Tokenizer, check_vocabulary_fits, load_tokenizer
from model.transformer import Transformer
from run_config import ConfigError, fail, read_config
from train.distributed import DTYPES, World, any_rank, close_world, init_world
from train.run_logging import describe_environment, file_sha256, log_line, write_json_atomically
from train.seeding import seed_everything

USER_ERRORS = (ConfigError, DataError, ModelFolderError, OSError)


def _setting(default: object, meaning: str, *, choices: tuple = (), low: float | None = None):
    """A dataclass field with its help line, and the values it may have: one of `choices`, or at least `low`."""
    return field(default=default, metadata={"help": meaning, "choices": choices, "low": low, "high": None})


@dataclass(slots=True)
class EvalConfig:
    """All settings of one evaluation."""

    model: str = _setting("runs/sft/final", "folder of the model, Hugging Face layout")
    benchmarks: str = _setting("tiny-seen,tiny-unseen", f"comma-separated, of {', '.join(BENCHMARK_FILES)}")
    benchmark_dir: str = _setting("assets/tiny_data", "folder of the benchmark files")
    prompt_format: str = _setting("tl", "form of the calls: tl name(p=\"v\") (paper Table 13), plain name(p: \"v\"). "
                                  "of the bundled base model; the prompt is that of Table 13 in both",
                                  choices=OUTPUT_FORMATS)
    predictions: str = _setting("", "score this JSONL file of predictions (one benchmark), no model; empty = predict")
    limit: int = _setting(0, "only the first N records of each benchmark; 0 = all", low=0)
    max_new_tokens: int = _setting(128, "longest output, tokens; longer ones are cut and count as they are", low=1)
    batch_size: int = _setting(32, "prompts generated together on one rank; memory and speed only", low=1)
    output: str = _setting("runs/eval", "folder of predictions, results, summary.json, report.md")
    resume: str = _setting("auto", "auto keeps predictions that output already holds for this model and settings; "
                           "never refuses a folder that has some", choices=("auto", "never"))
    seed: int = _setting(0, "seed of every random generator; greedy predictions do not depend on it", low=0)
    dtype: str = _setting("float32", "compute type", choices=("float32", "bfloat16"))
    device: str = _setting("auto", "auto takes CUDA where present", choices=("auto", "cpu", "cuda"))

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
        if self.predictions and self.prompt_format != "tl":
            raise ValueError("prompt_format: found it beside --predictions, expected \"format\" in that file's lines")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one evaluation; returns the exit code."""
    try:
        config = read_config(EvalConfig, "Predict and score tool calls (TS, PI, CF).", arguments)
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
    answers = {name: benchmark_file(name, Path(config.benchmark_dir)) for name in config.benchmarks.split(",")}
    for path in answers.values():
        load_tiny(path)  # a fault in the last benchmark shows now, not after the first one's predictions
    predictions = {name: Path(config.predictions or output / "predictions" / f"{name}.jsonl") for name in answers}
    if not config.predictions:
        predict(config, world, answers, predictions)
    if world.is_main:
        output.mkdir(parents=True, exist_ok=True)
        write_json_atomically(output / "config.json", asdict(config))
        write_json_atomically(output / "environment.json", describe_environment(world.size, world.device))
        log_line(score(config, answers, predictions))


# ----------------------------------------------------------------------------------------------------------------------
# Predictions


def predict(config: EvalConfig, world: World, answers: dict[str, Path], predictions: dict[str, Path]) -> None:
    """Write the prediction file of every benchmark, or what is left of it; a collective over all ranks."""
    model, tokenizer = load_model(config, world)
    limit = config.limit or None
    settings = {"model_sha256": folder_sha256(Path(config.model)), "prompt_format": config.prompt_format,
                "max_new_tokens": config.max_new_tokens, "dtype": config.dtype, "device": world.device.type}
    with lock_folder(Path(config.output) / "predictions", world):
        for name, path in predictions.items():
            check_settings(path, {**settings, "answers_sha256": file_sha256(answers[name])}, resume=config.resume,
                           is_writer=world.is_main)
        for name, path in predictions.items():
            start = time.perf_counter()
            notices = generate_predictions(
                model, tokenizer, load_tiny(answers[name])[:limit], path, prompt_format=config.prompt_format,
                max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, rank=world.rank,
                world_size=world.size)
            if world.is_main:
                for notice in notices:
                    log_line(notice)
                log_line(f"{name}: predictions in {path} ({time.perf_counter() - start:.1f} s)")


def lock_folder(folder: Path, world: World) -> TextIO:
    """Keep other runs out of `folder` until the file returned is closed, by this process's end at the latest.

    Each rank holds a shared lock: a torchrun that is killed outright leaves its workers alive, and they go on writing.
    Raises DataError, on all ranks, while any process of another run holds one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    is_taken = False
    if world.is_main:  # alone in the folder? The other ranks ask for their lock only after this answer.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_taken = True
    if any_rank(is_taken):
        raise DataError(f"{folder}: found another process at work on it, expected none; end it or wait for its end "
                        "(killing torchrun itself leaves its workers running)")
    fcntl.flock(lock, fcntl.LOCK_SH)  # rank 0 passes from exclusive to shared, which lets the others in
    return lock


def load_model(config: EvalConfig, world: World) -> tuple[Transformer, Tokenizer]:
    """A whole copy of the model on this rank's device, ready for inference, and its tokenizer."""
    if not Path(config.model).is_dir():
        raise ModelFolderError(f"{config.model}: found no such folder, expected a model; python run_sft.py makes "
                               "runs/sft/final, or give --model DIR")
    tokenizer = load_tokenizer(config.model)
    model = load_pretrained(config.model, dtype=DTYPES[config.dtype], device=world.device)
    check_vocabulary_fits(tokenizer, model.config.vocab_size)
    if config.max_new_tokens >= model.config.max_positions:
        raise ConfigError(f"--max_new_tokens: found {config.max_new_tokens}, expected less than the model's "
                          f"{model.config.max_positions} positions")
    return model.eval(), tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def score(config: EvalConfig, answers: dict[str, Path], predictions: dict[str, Path]) -> str:
    """Write results/<benchmark>.jsonl, summary.json and report.md; returns the report."""
    output = Path(config.output)
    run_summary = {"model": None if config.predictions else config.model, "predictions": config.predictions or None,
                   "prompt_format": None if config.predictions else config.prompt_format, "benchmarks": {}}
    for name, path in answers.items():
        rows, notices = evaluate_tiny_files(path, predictions[name], config.limit or None)
        for notice in notices:
            log_line(notice)
        write_json_lines(output / "results" / f"{name}.jsonl", rows)
        run_summary["benchmarks"][name] = {**summarize_results(rows), "answers_sha256": file_sha256(path)}
    write_json_atomically(output / "summary.json", run_summary)
    report = format_report(run_summary)
    write_text(output / "report.md", report)
    return report


if __name__ == "__main__":
    sys.exit(main())
