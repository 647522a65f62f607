"""What single choices of the full method (MAE and PKT) are worth: `python -m eval.sensitivity --output DIR`.

Each cell is SFT on the bundled world with one thing changed, and one seed for all; its results are compared with those
of the cell `full` on the same prompts of the four splits. DIR/cells.jsonl lists the finished cells: a run that was
stopped or killed continues with the same command. It ends with DIR/sensitivity.md and sensitivity.json. Exit codes: 0
all cells finished; 2 bad input, or a program that failed (one line on stderr); 130 or 143 stopped by SIGINT or SIGTERM.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from command_line import parse_arguments, polite_stop, run_command
from data.json_records import DataError, write_text
from eval.ablation import BASE, SFT_FLAGS, write_prompts
from eval.cells import EVAL_FLAGS, finish_cells, opened, score_command, write_once
from eval.predict.prediction_files import DTYPE_NAMES
from eval.rates import METRICS, rates
from eval.reports.ablation_tables import SPLITS, Cell, Results, difference_rows, read_cells
from eval.reports.report import format_table
from printable import terminal_text
from toolbox.make import TRAIN_COUNT, TRAIN_SEED, trajectories_text
from toolbox.world import draw_trajectories

FULL = "full"  # run_sft.py with its defaults: w_max 9, turn_mean, structured; 17 % of trajectories have failing calls
# Share of trajectories with a failing call, in percent -> the chance that the first call of a hard tool fails. At 1
# each one does, so this world has no more than 31 %.
ERROR_RATES = {0: 0.0, 17: 0.5, 31: 1.0}
VARIANTS = {  # cell -> (share of trajectories with a failing call, flags of run_sft.py)
    FULL: (17, ""),
    "w_max_1": (17, "--max_key_token_weight 1"),
    "failing_0": (0, ""),
    "failing_31": (31, ""),
    "failing_17_unfiltered": (17, "--error_filter none"),
    "failing_31_unfiltered": (31, "--error_filter none"),
    "sum": (17, "--loss_normalization sum"),
    "substring": (17, "--error_filter substring"),
}


def commands_of(output: Path, cell: Cell) -> list[list[str]]:
    """The arguments of Python for the two programs of a cell: training and evaluation."""
    (share, flags), run = VARIANTS[cell.method], cell.folder(output) / "sft"
    train = ["run_sft.py", "--data", f"{output / 'data' / f'train_{share}.json'}", *SFT_FLAGS.split(), *flags.split()]
    return [
        [*train, "--output", f"{run}", "--seed", f"{cell.seed}"],
        score_command(run / "final", SPLITS, output / "data", cell.folder(output) / "eval"),
    ]


def write_data(output: Path, n_prompts: int) -> None:
    """Write DIR/data, unless it is there: train_<share>.json, and prompts that none of them has. Raises DataError."""
    drawn = {share: [*draw_trajectories(TRAIN_SEED, TRAIN_COUNT, rate)] for share, rate in ERROR_RATES.items()}
    for share, records in drawn.items():
        write_once(output / "data" / f"train_{share}.json", trajectories_text(records))
    write_prompts(output / "data", chain(*drawn.values()), n_prompts)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def table_rows(split: str, results: Results) -> list[dict]:
    """Per cell and metric: prompts right, percentage, Wilson interval; against FULL: points, lost, won, McNemar's p."""
    rows, differences = [], {(row["method"], row["metric"]): row for row in difference_rows(split, results, FULL)}
    for name, by_seed in results.items():
        (by_index,) = by_seed.values()
        summary = rates([*by_index.values()])
        for metric in METRICS:
            found = {"percent": summary[f"{metric}_percent"], "interval_95": summary[f"{metric}_interval_95"]}
            row = {"split": split, "cell": name, "metric": metric, "n": summary["n"], metric: summary[metric], **found}
            difference = differences.get((name, metric))
            if difference:
                row |= {"points": difference["mean"], "p": difference["p_over_prompts"]}
                row |= {"lost": difference["lost"], "won": difference["won"]}
            rows.append(row)
    return rows


def write_tables(output: Path, settings: Mapping, dtype: str, results: Mapping[str, Results]) -> Path:
    """Write sensitivity.json and sensitivity.md; returns the latter. results: split -> its results."""
    rows = [row for split, found in results.items() for row in table_rows(split, found)]
    content = {"settings": dict(settings), "dtype": dtype, "rows": rows}
    write_text(output / "sensitivity.json", json.dumps(content, indent=1) + "\n")
    parts = [
        "# Sensitivity",
        f"SFT with seed {settings['seed']} on {TRAIN_COUNT:,} trajectories: `run_sft.py {settings['sft_flags']}` and "
        f"the flags below. `{FULL}` has MAE and PKT with the defaults. *failing*: share of the trajectories that have "
        "a failing call, in percent. Greedy predictions in "
        f"{DTYPE_NAMES.get(dtype, 'an unknown type')}: `run_eval.py {settings['eval_flags']}`.",
        format_table(
            [["cell", "failing", "flags"]]
            + [[name, str(share), f"`{flags}`" if flags else ""] for name, (share, flags) in VARIANTS.items()]
        ),
        f"Percentages [Wilson's 95 % interval]; points, lost and won against `{FULL}` on the same prompts; *p*: "
        "McNemar's exact test. It speaks of these trained models only: another seed moves a rate by one or two "
        "points. No p is corrected for the number of tests.",
    ]
    for split in results:
        table = [["cell", "metric", "% [95 %]", "points", "lost", "won", "p"]]
        for row in rows:
            if row["split"] == split:
                low, high = row["interval_95"]
                table.append([row["cell"], row["metric"], f"{row['percent']:.1f} [{low:.1f}, {high:.1f}]"])
                table[-1] += _compared(row) if "p" in row else [""] * 4
        parts += [f"## {split}, {settings['prompts']} prompts", format_table(table)]
    write_text(output / "sensitivity.md", "\n\n".join(parts) + "\n")
    return output / "sensitivity.md"


def _compared(row: Mapping) -> list[str]:
    return [f"{row['points']:+.1f}", str(row["lost"]), str(row["won"]), f"{row['p']:.2g}"]


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def vary(output: Path, settings: Mapping, n_jobs: int) -> None:
    """Run the cells that are missing, then write the tables. Raises DataError, OSError."""
    cells = [Cell(name, settings["seed"]) for name in VARIANTS]
    with opened(output, settings):
        write_data(output, settings["prompts"])
        for line in finish_cells(output, {cell: commands_of(output, cell) for cell in cells}, n_jobs):
            print(line, flush=True)
        folders = {cell: cell.folder(output) / "eval" for cell in cells}
        results, dtype = read_cells(folders, SPLITS, settings["prompts"])
        print(terminal_text(f"tables: {write_tables(output, settings, dtype, results)}"))


@polite_stop("finished cells and checkpoints are kept; the same command continues")
def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m eval.sensitivity", description="The full method, one change each.")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the cells and tables")
    add("--seed", type=int, default=0, metavar="N", help="of every training (%(default)s)")
    add("--prompts", type=int, default=400, metavar="N", help="held-out prompts per split (%(default)s)")
    add("--jobs", type=int, default=2, metavar="N", help="cells at a time, one core each (%(default)s)")
    flags = parse_arguments(parser, arguments)
    for name, low, most in (("seed", 0, 2**31), ("prompts", 1, 10_000), ("jobs", 1, 64)):
        if not low <= getattr(flags, name) <= most:
            parser.error(f"--{name}: found {getattr(flags, name)}, expected {low} to {most}")
    settings = {"seed": flags.seed, "prompts": flags.prompts, "sft_flags": SFT_FLAGS, "eval_flags": EVAL_FLAGS}
    settings["model_sha256"] = hashlib.sha256(BASE.read_bytes()).hexdigest()
    settings["variants"] = {name: [*variant] for name, variant in VARIANTS.items()}
    return run_command(lambda: vary(flags.output.absolute(), settings, flags.jobs), (DataError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
