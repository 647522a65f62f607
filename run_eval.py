"""Evaluate a tool-calling model: `python run_eval.py`, or `torchrun --nproc_per_node N run_eval.py`.

Greedy predictions, then scores with 95 % intervals per benchmark. Without flags: the model of run_sft.py on the bundled
tiny benchmarks, into runs/eval/sft. On multi-turn benchmarks (tooleyes, tiny-multi) every call is executed and its
feedback goes back to the model. `--endpoint URL` asks an OpenAI-compatible server instead of a model folder;
`--predictions FILE` scores an existing file. A killed run continues with the same command, under any number of ranks.
Exit codes: 0 everything scored; 2 bad input (one line on stderr); 130 or 143 stopped by SIGINT or SIGTERM.
"""

import sys

if __name__ == "__main__":  # before the imports that take seconds
    from start_up import prepare

    prepare()

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from command_line import ConfigError, fail, polite_stop, read_config
from data.formats.prompt_format import PromptError
from data.json_records import DataError, write_json_lines, write_text
from data.trained_format import choose_format
from eval.benchmarks import count_notice
from eval.eval_config import EvalConfig, default_output
from eval.evaluate_own import left_out_notice
from eval.predict.prediction_files import read_dtype
from eval.predict.run_predictions import BenchmarkRun, open_benchmarks, predict
from eval.records import ScoreSettings
from eval.reports.plots import write_plots
from eval.reports.report import format_report
from eval.sandbox.run import end_sandboxes
from model.pretrained_weights import ModelFolderError
from train.distributed import DeviceError, World, close_world, init_world, leave_if_a_rank_is_lost
from train.run_control import lock_folder, write_settings
from train.run_logging import log_line, write_json_atomically
from train.seeding import seed_everything

USER_ERRORS = (ConfigError, DataError, DeviceError, ModelFolderError, PromptError, OSError)

PATIENCE = timedelta(days=1)  # of a rank that has answered its share and waits for the slowest


@polite_stop("what was answered is kept; the same command continues", end_sandboxes)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one evaluation; returns the exit code."""
    try:
        config = read_config(
            EvalConfig, "Predict and score tool calls (TS, PI, CF) and dialogues (DE, CE, VA).", arguments
        )
        config.output = config.output or default_output(config)
        run(config, init_world(config.device, patience=PATIENCE))
        close_world()
        return 0
    except USER_ERRORS as error:
        fail(error)
    except RuntimeError as error:
        leave_if_a_rank_is_lost(error)
        raise


def run(config: EvalConfig, world: World) -> None:
    """Predict (unless there are predictions), score, report. Rank 0 writes and scores, all ranks predict."""
    seed_everything(config.seed, world.rank)
    output = Path(config.output)
    if (output / "run_identity.json").exists():  # its config.json would be overwritten
        raise ConfigError(f"--output: found {config.output}, the folder of a training run, expected another folder")
    folder = None if config.predictions or config.endpoint else config.model
    prompt_format, format_line = choose_format(config.prompt_format, folder)
    config = replace(config, prompt_format=prompt_format)
    if world.is_main and format_line:
        log_line(format_line)
    if world.is_main and config.data:
        for line in left_out_notice(Path(config.data)):
            log_line(line)
    runs = open_benchmarks(config)  # a fault in the last benchmark shows now, not after the first one's predictions
    if not config.predictions:
        with lock_folder(output / "predictions", world):
            for line in predict(config, runs, rank=world.rank, world_size=world.size, device=world.device):
                if world.is_main:
                    log_line(line)
    if world.is_main:
        output.mkdir(parents=True, exist_ok=True)
        write_settings(output, config, world)
        log_line(score(config, runs))


def score(config: EvalConfig, runs: Sequence[BenchmarkRun]) -> str:
    """Write results/<benchmark>.jsonl, summary.json, plots/ and report.md; returns the report."""
    output = Path(config.output)
    run_summary = {
        "model": None if config.predictions else config.model,
        "predictions": config.predictions or None,
        "prompt_format": None if config.predictions else config.prompt_format,
        "dtype": read_dtype(runs[0].predictions),
        "benchmarks": {},
    }
    for each in runs:
        settings = ScoreSettings(
            limit=config.limit or None,
            rules=each.benchmark.resolve_rules(config.rules),
            execute_code=config.execute_code == "on",
            max_turns=config.max_turns,
        )
        rows, summary, notices = each.benchmark.score(each.records, each.predictions, settings)
        if len(rows) < (n_records := len(each.records)):
            notices.append(f"{each.benchmark.name}: {len(rows)} of {n_records} records, evenly spread (--limit)")
            summary["of_records"] = n_records
        for notice in [*notices, *count_notice(each.benchmark, each.answers, each.records)]:
            log_line(notice)
        write_json_lines(output / "results" / f"{each.benchmark.name}.jsonl", rows)
        run_summary["benchmarks"][each.benchmark.name] = {**summary, "answers_sha256": each.answers_sha256}
    write_json_atomically(output / "summary.json", run_summary)
    write_plots(["this run"], [run_summary], output / "plots")
    report = format_report(run_summary)
    write_text(output / "report.md", report)
    return report


if __name__ == "__main__":
    sys.exit(main())
