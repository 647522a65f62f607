"""The figures of a run for other programs: a CSV table, or a run of Weights & Biases.

    python -m train.export_metrics runs/sft --csv sft.csv
    python -m train.export_metrics runs/ppo --wandb offline

Both read metrics.jsonl, of SFT or PPO, under its own keys. `offline` needs no account and no network: it writes into
./wandb, and `wandb sync` uploads that later.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import parse_arguments, run_command
from data.json_records import DataError, read_json_lines, read_json_object, write_text


def read_rows(run: Path) -> list[dict]:
    """The lines of the run's metrics.jsonl, at least one; a torn last line is left out. Raises DataError."""
    path = run / "metrics.jsonl"
    rows = [row for _, row in read_json_lines(path, drop_partial_last_line=True)[0]]
    if not rows or "step" not in rows[0]:
        raise DataError(f"{path}: found no step, expected the lines of a run")
    return rows


def to_csv(rows: Sequence[dict]) -> str:
    """One line per row after a line of names; a key that a row lacks is an empty cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_wandb(run: Path, rows: Sequence[dict], mode: str) -> None:
    """A run with the settings and all rows. Raises DataError if the package is not installed."""
    try:
        import wandb
    except ImportError:
        raise DataError("--wandb: found no package wandb, expected it installed: pip install wandb") from None
    settings = read_json_object(run / "config.json")
    with wandb.init(project="tl_training", name=run.resolve().name, config=settings, mode=mode) as target:
        for row in rows:
            target.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.export_metrics", description="Figures of a run for other programs."
    )
    parser.add_argument("run", type=Path, help="folder of an SFT or PPO run")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--csv", type=Path, help="file to write")
    target.add_argument("--wandb", choices=("offline", "online"), help="log to Weights & Biases in this mode")
    given = parse_arguments(parser, arguments)

    def export() -> None:
        rows = read_rows(given.run)
        if given.csv is not None:
            write_text(given.csv, to_csv(rows))
        else:
            to_wandb(given.run, rows, given.wandb)
        print(f"exported {len(rows)} steps")

    return run_command(export, (DataError, OSError))


if __name__ == "__main__":
    sys.exit(main())
