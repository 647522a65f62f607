"""The paper's Figure 4 on the bundled world: `python -m eval.robustness --ablation DIR --output DIR2`.

Models that `python -m eval.ablation` has trained, scored by run_eval.py on the ablation's prompts with five levels of
noise (toolbox/noise.py). A cell is one model on all levels. DIR2/cells.jsonl lists the finished cells: a run that was
stopped or killed continues with the same command. It ends with DIR2/robustness.md, robustness.json and robustness.svg.
Exit codes: 0 all cells finished; 2 bad input, or a program that failed (one line on stderr); 130 or 143 stopped by
SIGINT or SIGTERM.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from command_line import parse_arguments, polite_stop, run_command
from data.json_records import DataError, check_regular_file, read_json_lines
from eval.ablation import MOST
from eval.benchmarks import BENCHMARKS
from eval.cells import EVAL_FLAGS, finish_cells, opened, score_command, write_once
from eval.reports.ablation_tables import METHODS, SPLITS, STANDARD, Cell, Results, read_cells
from eval.reports.compare import read_run
from eval.reports.robustness_tables import write_tables
from printable import shown, terminal_text
from toolbox.noise import LEVELS, add_noise

NOISE_SEED = 950
NOISY_SPLITS = SPLITS[:2]  # of tools that the training data have, and of others


def models_of(ablation: Path, methods: Sequence[str], n_seeds: int) -> dict[Cell, Path]:
    """Cell -> its model folder: the first `n_seeds` seeds with which the ablation has finished all the methods.

    Raises DataError if there is none.
    """
    path = ablation / "cells.jsonl"
    finished = {str(row.get("cell")) for _, row in read_json_lines(path, drop_partial_last_line=True)[0]}
    seeds = [seed for seed in range(MOST["seeds"]) if all(str(Cell(method, seed)) in finished for method in methods)]
    if not seeds:
        raise DataError(f"{path}: found no seed with which {', '.join(methods)} are finished, expected at least one")
    cells = [Cell(method, seed) for seed in seeds[:n_seeds] for method in methods]
    return {cell: cell.folder(ablation) / ("ppo" if cell.has_irm else "sft") / "final" for cell in cells}


def check_prompts(ablation: Path, cell: Cell) -> None:
    """Raise DataError unless the ablation's prompts are those on which it has scored the cell. Raises OSError."""
    scored = read_run(cell.folder(ablation) / "eval")["benchmarks"]
    for split in NOISY_SPLITS:
        path = ablation / "data" / BENCHMARKS[split].path
        check_regular_file(path)
        if hashlib.sha256(path.read_bytes()).hexdigest() != scored.get(split, {}).get("answers_sha256"):
            raise DataError(f"{path}: found other prompts than those of the ablation's {cell}, expected the same")


def write_levels(ablation: Path, folder: Path, n_prompts: int) -> None:
    """Write the file of each split, unless it is there: its first prompts, clean, then again with each level of noise.

    Raises DataError, also if a file there is another one.
    """
    for split in NOISY_SPLITS:
        name = BENCHMARKS[split].path
        records = [record for _, record in read_json_lines(ablation / "data" / name, drop_partial_last_line=False)[0]]
        if len(records) < n_prompts:
            raise DataError(f"{ablation / 'data' / name}: found {len(records)} prompts, expected at least {n_prompts}")
        levels = [add_noise(records[:n_prompts], level, NOISE_SEED) for level in LEVELS]
        write_once(folder / name, "".join(json.dumps(record) + "\n" for record in chain(*levels)))


def split_levels(results: Results, n_prompts: int) -> dict[str, Results]:
    """Level -> its results, indices from 0, of results on a file of write_levels."""
    return {
        level: {
            method: {
                seed: {index: rows[number * n_prompts + index] for index in range(n_prompts)}
                for seed, rows in by_seed.items()
            }
            for method, by_seed in results.items()
        }
        for number, level in enumerate(LEVELS)
    }


def score_levels(ablation: Path, output: Path, settings: dict, n_jobs: int) -> None:
    """Score the cells that are missing, then write the tables. Raises DataError, OSError."""
    n_prompts, models = settings["prompts"], models_of(ablation, settings["methods"], settings["seeds"])
    for cell, model in models.items():
        check_regular_file(model / "model.safetensors")
        check_prompts(ablation, cell)
    settings["model_sha256"] = {
        str(cell): hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
        for cell, model in models.items()
    }
    folders = {cell: cell.folder(output) / "eval" for cell in models}
    with opened(output, settings):
        write_levels(ablation, output / "data", n_prompts)
        commands = {
            cell: [score_command(model, NOISY_SPLITS, output / "data", folders[cell])] for cell, model in models.items()
        }
        for line in finish_cells(output, commands, n_jobs):
            print(line, flush=True)
        splits, dtype = read_cells(folders, NOISY_SPLITS, len(LEVELS) * n_prompts)
        results = {split: split_levels(found, n_prompts) for split, found in splits.items()}
        print(terminal_text(f"tables: {write_tables(output, settings, dtype, results)}"))


@polite_stop("finished cells are kept; the same command continues")
def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m eval.robustness", description="Figure 4 of the paper, with seeds.")
    add = parser.add_argument
    add("--ablation", type=Path, required=True, metavar="DIR", help="folder of eval.ablation that has the models")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the cells and tables")
    add("--methods", default=f"{STANDARD},MAE+PKT", metavar="LIST", help="the first is what others are compared to")
    add("--seeds", type=int, default=MOST["seeds"], metavar="N", help="at most the first N of the ablation's seeds")
    add("--prompts", type=int, default=400, metavar="N", help="the first N of each split (%(default)s)")
    add("--jobs", type=int, default=2, metavar="N", help="cells at a time, one core each (%(default)s)")
    flags = parse_arguments(parser, arguments)
    methods = flags.methods.split(",")
    for name in ("seeds", "prompts", "jobs"):
        if not 1 <= getattr(flags, name) <= MOST[name]:
            parser.error(f"--{name}: found {getattr(flags, name)}, expected 1 to {MOST[name]}")
    if not set(methods) <= set(METHODS) or len(set(methods)) < len(methods):
        parser.error(f"--methods: found {shown(flags.methods)}, expected different ones of {', '.join(METHODS)}")
    settings = {"methods": methods, "seeds": flags.seeds, "prompts": flags.prompts, "eval_flags": EVAL_FLAGS}
    folders = flags.ablation.absolute(), flags.output.absolute()
    return run_command(lambda: score_levels(*folders, settings, flags.jobs), (DataError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
