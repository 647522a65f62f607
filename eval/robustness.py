"""The paper's Figure 4 on the bundled world: `python -m eval.robustness --ablation DIR --output DIR2`.

Models that `python -m eval.ablation` has trained, scored by run_eval.py on the ablation's prompts with five levels of
noise (toolbox/noise.py). A cell is one model on all levels. DIR2/cells.jsonl lists the finished cells: a run that was
stopped or killed continues with the same command. It ends with DIR2/robustness.md, robustness.json and robustness.svg.
Exit codes: 0 all cells finished; 2 bad input, or a program that failed (one line on stderr); 130 or 143 stopped by
SIGINT or SIGTERM.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import parse_arguments, polite_stop, run_command
from data.json_records import DataError, read_json_lines, write_json_lines
from eval.ablation import MOST
from eval.benchmarks import BENCHMARKS
from eval.cells import EVAL_FLAGS, finish_cells, opened, score_command
from eval.reports.ablation_tables import METHODS, SPLITS, STANDARD, Cell, read_cells
from eval.reports.robustness_tables import write_tables
from printable import shown, terminal_text
from toolbox.noise import LEVELS, add_noise

NOISE_SEED = 950
NOISY_SPLITS = SPLITS[:2]  # of tools that the training data have, and of others


def models_of(ablation: Path, methods: Sequence[str]) -> dict[Cell, Path]:
    """Cell -> its model folder, for every seed with which the ablation has finished all the methods.

    Raises DataError if there is none.
    """
    path = ablation / "cells.jsonl"
    finished = {row.get("cell") for _, row in read_json_lines(path, drop_partial_last_line=True)[0]}
    seeds = [seed for seed in range(MOST["seeds"]) if all(str(Cell(method, seed)) in finished for method in methods)]
    if not seeds:
        raise DataError(f"{path}: found no seed with which {', '.join(methods)} are finished, expected at least one")
    cells = [Cell(method, seed) for method in methods for seed in seeds]
    return {cell: cell.folder(ablation) / ("ppo" if cell.has_irm else "sft") / "final" for cell in cells}


def write_levels(ablation: Path, output: Path, n_prompts: int) -> None:
    """Write DIR2/data/<level>/ with the first prompts of each split, unless they are there. Raises DataError."""
    for split in NOISY_SPLITS:
        name = BENCHMARKS[split].path
        records = [record for _, record in read_json_lines(ablation / "data" / name, drop_partial_last_line=False)[0]]
        if len(records) < n_prompts:
            raise DataError(f"{ablation / 'data' / name}: found {len(records)} prompts, expected at least {n_prompts}")
        for level in LEVELS:
            path = output / "data" / level / name
            if not path.exists():
                write_json_lines(path, add_noise(records[:n_prompts], level, NOISE_SEED))


def score_levels(ablation: Path, output: Path, methods: Sequence[str], n_prompts: int, n_jobs: int) -> None:
    """Score the cells that are missing, then write the tables. Raises DataError, OSError."""
    models = models_of(ablation, methods)
    settings = {"methods": [*methods], "prompts": n_prompts, "eval_flags": EVAL_FLAGS}
    settings["model_sha256"] = {
        str(cell): hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
        for cell, model in models.items()
    }
    with opened(output, settings):
        write_levels(ablation, output, n_prompts)
        commands = {
            cell: [
                score_command(model, NOISY_SPLITS, output / "data" / level, cell.folder(output) / level)
                for level in LEVELS
            ]
            for cell, model in models.items()
        }
        for line in finish_cells(output, commands, n_jobs):
            print(line, flush=True)
        found = {
            level: read_cells({cell: cell.folder(output) / level for cell in models}, NOISY_SPLITS, n_prompts)
            for level in LEVELS
        }
        results = {split: {level: each[split] for level, (each, _) in found.items()} for split in NOISY_SPLITS}
        path = write_tables(output, settings, found[LEVELS[0]][1], results, methods[0])
        print(terminal_text(f"tables: {path}"))


@polite_stop("finished cells are kept; the same command continues")
def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m eval.robustness", description="Figure 4 of the paper, with seeds.")
    add = parser.add_argument
    add("--ablation", type=Path, required=True, metavar="DIR", help="folder of eval.ablation that has the models")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the cells and tables")
    add("--methods", default=f"{STANDARD},MAE+PKT", metavar="LIST", help="the first is what others are compared to")
    add("--prompts", type=int, default=400, metavar="N", help="the first N of each split (%(default)s)")
    add("--jobs", type=int, default=2, metavar="N", help="cells at a time, one core each (%(default)s)")
    flags = parse_arguments(parser, arguments)
    methods = flags.methods.split(",")
    for name, value, most in (("prompts", flags.prompts, 10_000), ("jobs", flags.jobs, 64)):
        if not 1 <= value <= most:
            parser.error(f"--{name}: found {value}, expected 1 to {most}")
    if not set(methods) <= set(METHODS) or len(set(methods)) < len(methods):
        parser.error(f"--methods: found {shown(flags.methods)}, expected different ones of {', '.join(METHODS)}")
    folders = flags.ablation.absolute(), flags.output.absolute()
    return run_command(lambda: score_levels(*folders, methods, flags.prompts, flags.jobs), (DataError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
