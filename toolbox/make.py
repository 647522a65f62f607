"""Write the bundled toolbox data: `python -m toolbox.make --output assets`.

It writes tiny_model/tokenizer.model, tiny_data/train.json (authors' raw format), and the files of tiny-seen,
tiny-unseen, tiny-hard, tiny-alike and tiny-multi. With --trajectories N --seed S --only_trajectories FILE it writes any
number of other trajectories, with --alike about tools that look alike (toolbox/alike.py). With --tests N --seed S
--only_tests FILE it writes any number of other single-turn prompts: of one --split, or half for tools of the training
data and half for tools that no model was trained on.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from command_line import MAX_WHOLE_NUMBER, parse_arguments, run_command
from data.json_records import write_bytes, write_json_lines, write_text
from toolbox.alike import draw_alike_examples, draw_alike_trajectories
from toolbox.tokenizer import train_tokenizer
from toolbox.world import draw_multi_tasks, draw_test_examples, draw_trajectories

TRAIN_SEED, SEEN_SEED, UNSEEN_SEED, MULTI_SEED = 11, 12, 13, 14
TEST_SEEDS = {"seen": SEEN_SEED, "unseen": UNSEEN_SEED, "hard": 15, "alike": 16}  # of the bundled single-turn tests
TRAIN_COUNT, TEST_COUNT = 1217, 300
MOST = 1_000_000  # records of one file, which is made in memory
# Multi-turn tasks: (unseen tools, requests in the query, tasks), 200 in all. A training query holds 1, 2 or 3 requests
# in 70, 22 and 8 of 100 cases; here long ones are more frequent, since they need more turns.
MULTI_MIX = ((False, 1, 60), (False, 2, 60), (False, 3, 30), (True, 1, 20), (True, 2, 20), (True, 3, 10))


def trajectories_text(records: Iterable[dict]) -> str:
    """A JSON list, one record per line, so that diffs and error lines point at a record."""
    lines = ",\n".join(json.dumps(record) for record in records)
    return f"[\n{lines}\n]\n"


def draw_split(split: str, seed: int, count: int) -> Iterator[dict]:
    """`count` prompts of tiny-seen, tiny-unseen, tiny-hard or tiny-alike, named by `split` without "tiny-"."""
    if split == "alike":
        return draw_alike_examples(seed, count)
    return draw_test_examples(seed, count, unseen=split == "unseen", hard=split == "hard")


def draw_multi_split() -> list[dict]:
    """The tasks of tiny-multi: MULTI_MIX in this order, without queries of training or the single-turn tests."""
    known = {record["conversations"][1]["content"] for record in draw_trajectories(TRAIN_SEED, TRAIN_COUNT)}
    for seed, unseen in ((SEEN_SEED, False), (UNSEEN_SEED, True)):
        known |= {example["messages"][0]["content"] for example in draw_test_examples(seed, TEST_COUNT, unseen)}
    tasks = []
    for number, (unseen, requests, count) in enumerate(MULTI_MIX):
        for task in draw_multi_tasks(100 * MULTI_SEED + number, count, unseen, requests, known):
            known.add(task["messages"][0]["content"])
            tasks.append(task)
    return tasks


def make(settings: argparse.Namespace) -> None:
    """Write what the flags ask for. Raises OSError."""
    seed, count = settings.seed, settings.tests
    if settings.only_trajectories:
        draw = draw_alike_trajectories if settings.alike else draw_trajectories
        write_text(settings.only_trajectories, trajectories_text(draw(seed, settings.trajectories)))
    elif settings.only_tests and settings.split == "both":
        halves = draw_split("seen", seed, count - count // 2), draw_split("unseen", seed + 1, count // 2)
        write_json_lines(settings.only_tests, chain(*halves))
    elif settings.only_tests:
        write_json_lines(settings.only_tests, draw_split(settings.split, seed, count))
    else:
        model, tests = settings.output / "tiny_model", settings.output / "tiny_data"
        model.mkdir(parents=True, exist_ok=True)
        write_bytes(model / "tokenizer.model", train_tokenizer())
        write_text(tests / "train.json", trajectories_text(draw_trajectories(seed, settings.trajectories)))
        for split, test_seed in TEST_SEEDS.items():
            write_json_lines(tests / f"test_{split}.jsonl", draw_split(split, test_seed, TEST_COUNT))
        write_json_lines(tests / "test_multi.jsonl", draw_multi_split())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m toolbox.make", description="Write the bundled toolbox tokenizer, trajectories and tests."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("assets"), help="folder that gets tiny_model/ and tiny_data/"
    )
    parser.add_argument("--trajectories", type=int, default=TRAIN_COUNT, help="number of trajectories")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED, help="seed of the trajectories or tests")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only_trajectories", type=Path, help="write just the trajectories to this file")
    only.add_argument("--only_tests", type=Path, help="write just --tests single-turn prompts to this file")
    parser.add_argument("--tests", type=int, default=2 * TEST_COUNT, help="number of prompts of --only_tests")
    parser.add_argument(
        "--split", choices=(*TEST_SEEDS, "both"), default="both", help="of --only_tests; both: half seen, half unseen"
    )
    parser.add_argument("--alike", action="store_true", help="--only_trajectories about tools that look alike")
    settings = parse_arguments(parser, arguments)
    for name, low, most in (("trajectories", 1, MOST), ("tests", 1, MOST), ("seed", 0, MAX_WHOLE_NUMBER)):
        if not low <= getattr(settings, name) <= most:
            parser.error(f"--{name}: found {getattr(settings, name)}, expected {low} to {most}")
    for name, needed in (("alike", "only_trajectories"), ("split", "only_tests"), ("tests", "only_tests")):
        if getattr(settings, name) != parser.get_default(name) and getattr(settings, needed) is None:
            parser.error(f"--{name}: found it without --{needed}, expected both")
    return run_command(lambda: make(settings), (OSError,))


if __name__ == "__main__":
    sys.exit(main())
