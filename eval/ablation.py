"""The paper's Table 5 on the bundled world: `python -m eval.ablation [--quick] [--seeds N] --output DIR`.

Eight methods: none, MAE, PKT, IRM and what they combine to, each with several seeds. A cell is one method with one
seed: trained by run_sft.py or run_ppo.py and scored by run_eval.py, in folders of its own. A cell with IRM starts from
the SFT model of the cell without. DIR/cells.jsonl lists the finished cells: a run that was stopped or killed continues
with the same command. It ends with DIR/ablation.md, ablation.json and ablation.svg. Exit codes: 0 all cells finished; 2
bad input, or a program that failed (one line on stderr); 130 or 143 stopped by SIGINT or SIGTERM.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from command_line import parse_arguments, polite_stop, run_command
from data.json_records import DataError
from eval.benchmarks import BENCHMARKS
from eval.cells import EVAL_FLAGS, ROOT, finish_cells, opened, score_command, write_once
from eval.reports.ablation_tables import METHODS, SPLITS, Cell, write_tables
from printable import terminal_text
from toolbox.alike import draw_alike_trajectories
from toolbox.make import TRAIN_SEED, draw_split, trajectories_text
from toolbox.world import draw_trajectories

BASE = ROOT / "assets/tiny_model/model.safetensors"
FULL = {"seeds": 10, "ppo_seeds": 3, "prompts": 3000, "trajectories": 1217}
QUICK = {"seeds": 2, "ppo_seeds": 1, "prompts": 200, "trajectories": 140}
MOST = {"seeds": 20, "ppo_seeds": 20, "prompts": 10_000, "trajectories": 100_000, "jobs": 64}
PROMPT_SEED = 900  # of the generator, one more for each further split; the bundled data have 11 to 16
MAX_DRAWN = 50  # for each prompt kept: queries of the training data and repeated ones are left out

# What each program gets besides its files, seed and method. Other settings have the program's defaults.
SFT_FLAGS = "--device cpu --checkpoint_every 50 --keep_checkpoints 1"
PPO_FLAGS = (
    "--epochs 1 --rollout_batch_size 32 --minibatch_size 32 --micro_batch_size 16 --policy_learning_rate 2e-4 "
    "--value_learning_rate 5e-4 --kl_coef 0.2 --critic_only_iterations 4 --device cpu --checkpoint_every 10 "
    "--keep_checkpoints 1"
)
QUICK_PPO_FLAGS = f"{PPO_FLAGS} --max_steps 24"  # of 38


def cells_of(n_seeds: int, n_ppo_seeds: int) -> list[Cell]:
    """All cells, seed by seed, those with IRM after the others."""
    methods = sorted(METHODS, key=lambda method: "IRM" in method)
    cells = [Cell(method, seed) for seed in range(n_seeds) for method in methods]
    return [cell for cell in cells if not cell.has_irm or cell.seed < n_ppo_seeds]


def commands_of(output: Path, cell: Cell, ppo_flags: str) -> list[list[str]]:
    """The arguments of Python for the two programs of a cell: training and evaluation."""
    sft, run = cell.start().folder(output) / "sft", cell.folder(output) / ("ppo" if cell.has_irm else "sft")
    if cell.has_irm:
        train = ["run_ppo.py", "--model", f"{sft / 'final'}", *ppo_flags.split()]
        train += ["--data", f"{output / 'data' / 'ppo.json'}"]
    else:
        train = ["run_sft.py", "--data", f"{output / 'data' / 'train.json'}", *SFT_FLAGS.split()]
        train += ["--error_filter", "structured" if "MAE" in cell.method else "none"]
        train += ["--key_tokens", "on" if "PKT" in cell.method else "off"]
    return [
        [*train, "--output", f"{run}", "--seed", f"{cell.seed}"],
        score_command(run / "final", SPLITS, output / "data", cell.folder(output) / "eval"),
    ]


def write_data(output: Path, n_prompts: int, n_trajectories: int, alike: bool) -> None:
    """Write DIR/data, unless it is there: ppo.json, train.json, which is its start, and prompts of each split.

    All prompts are different, and none is a query of ppo.json. Raises DataError if a file there is another one.
    """
    folder, n_all = output / "data", max(n_trajectories, FULL["trajectories"])
    records = [*(draw_alike_trajectories if alike else draw_trajectories)(TRAIN_SEED, n_all)]
    for name, n_records in (("ppo.json", n_all), ("train.json", n_trajectories)):
        write_once(folder / name, trajectories_text(records[:n_records]))
    write_prompts(folder, records, n_prompts)


def write_prompts(folder: Path, records: Iterable[Mapping], n_prompts: int) -> None:
    """Write the files of the four splits, unless they are there. All prompts differ; none is a query of `records`.

    Raises DataError where the world has not that many, and if a file there is another one.
    """
    met = {turn["content"] for record in records for turn in record["conversations"] if turn["role"] == "user"}
    for number, split in enumerate(SPLITS):
        path = folder / BENCHMARKS[split].path
        drawn = draw_split(split.removeprefix("tiny-"), PROMPT_SEED + number, MAX_DRAWN * n_prompts)
        new = (each for each in drawn if (query := each["messages"][0]["content"]) not in met and not met.add(query))
        prompts = [*islice(new, n_prompts)]
        if len(prompts) < n_prompts:
            raise DataError(f"--prompts: found {n_prompts}, expected at most {len(prompts)}, all that {split} has")
        write_once(path, "".join(json.dumps(prompt) + "\n" for prompt in prompts))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def ablate(output: Path, settings: Mapping, n_jobs: int) -> None:
    """Run the cells that are missing, then write the tables. Raises DataError, OSError."""
    settings = {**settings, "model_sha256": hashlib.sha256(BASE.read_bytes()).hexdigest()}
    cells = cells_of(settings["seeds"], settings["ppo_seeds"])
    with opened(output, settings, may_grow=("seeds", "ppo_seeds")):
        write_data(output, settings["prompts"], settings["trajectories"], settings["alike"])
        commands = {cell: commands_of(output, cell, settings["ppo_flags"]) for cell in cells}
        for line in finish_cells(output, commands, n_jobs):
            print(line, flush=True)
        print(terminal_text(f"tables: {write_tables(output, settings, cells)}"))


def read_flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict]:
    """The flags, and the settings that make two ablations the same; wrong flags end the program with code 2."""
    parser = argparse.ArgumentParser(prog="python -m eval.ablation", description="Table 5 of the paper, with seeds.")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the cells and tables")
    add("--quick", action="store_true", help="a first look in minutes: other defaults, and PPO of 24 iterations")
    for flag, meaning in (
        ("--seeds", "seeds of the methods without IRM"),
        ("--ppo_seeds", "the first N of them also with IRM"),
        ("--prompts", "held-out prompts per split, drawn by the toolbox"),
        ("--trajectories", "SFT on the first N; PPO takes the queries of 1,217"),
    ):
        name = flag.removeprefix("--")
        default = (QUICK if "--quick" in arguments else FULL)[name]
        words = f"{meaning} ({FULL[name]}, with --quick {QUICK[name]})"
        add(flag, type=int, default=default, metavar="N", help=words)
    add(
        "--alike",
        action="store_true",
        help="train on tools that look alike (toolbox/alike.py), not as the bundled data",
    )
    add("--jobs", type=int, default=2, metavar="N", help="cells at a time, one core each (%(default)s)")
    flags = parse_arguments(parser, arguments)
    for name, most in MOST.items():
        low = int(name != "ppo_seeds")
        if not low <= getattr(flags, name) <= most:
            parser.error(f"--{name}: found {getattr(flags, name)}, expected {low} to {most}")
    settings = {name: getattr(flags, name) for name in (*FULL, "alike")}
    settings |= {"sft_flags": SFT_FLAGS, "ppo_flags": QUICK_PPO_FLAGS if flags.quick else PPO_FLAGS}
    return flags, {**settings, "eval_flags": EVAL_FLAGS}


@polite_stop("finished cells and checkpoints are kept; the same command continues")
def main(arguments: Sequence[str]) -> int:
    """Command line; exit code 0, or 2 after one line on stderr."""
    flags, settings = read_flags(arguments)
    return run_command(lambda: ablate(flags.output.absolute(), settings, flags.jobs), (DataError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
