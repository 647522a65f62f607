"""Write the bundled toolbox data: `python -m toolbox.make --output assets`.

It writes tiny_model/tokenizer.model, tiny_data/train.json (authors' raw format), tiny_data/test_seen.jsonl,
test_unseen.jsonl and test_multi.jsonl. With --trajectories N --seed S --only_trajectories FILE it writes any number of
other trajectories; with --tests N --seed S --only_tests FILE any number of other single-turn prompts, half of them for
tools that no model was trained on.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import parse_arguments
from toolbox.tokenizer import train_tokenizer
from toolbox.world import draw_multi_tasks, draw_test_examples, draw_trajectories

TRAIN_SEED, SEEN_SEED, UNSEEN_SEED, MULTI_SEED = 11, 12, 13, 14
TRAIN_COUNT, TEST_COUNT = 1217, 300
# Multi-turn tasks: (unseen tools, requests in the query, tasks), 200 in all. A training query holds 1, 2 or 3 requests
# in 70, 22 and 8 of 100 cases; here long ones are more frequent, since they need more turns.
MULTI_MIX = ((False, 1, 60), (False, 2, 60), (False, 3, 30), (True, 1, 20), (True, 2, 20), (True, 3, 10))


def write_trajectories(path: Path, seed: int, count: int) -> None:
    """A JSON list, one record per line, so that diffs and error lines point at a record."""
    records = ",\n".join(json.dumps(record) for record in draw_trajectories(seed, count))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{records}\n]\n", encoding="utf-8")


def write_tests(path: Path, seed: int, count: int) -> None:
    """`count` held-out prompts, one per line: the first half for seen tools, the rest for unseen ones (seed + 1)."""
    examples = [
        *draw_test_examples(seed, count - count // 2, unseen=False),
        *draw_test_examples(seed + 1, count // 2, unseen=True),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")


def multi_lines() -> list[str]:
    """The lines of test_multi.jsonl: MULTI_MIX in this order, without queries of training or the single-turn tests."""
    known = {record["conversations"][1]["content"] for record in draw_trajectories(TRAIN_SEED, TRAIN_COUNT)}
    for seed, unseen in ((SEEN_SEED, False), (UNSEEN_SEED, True)):
        known |= {example["messages"][0]["content"] for example in draw_test_examples(seed, TEST_COUNT, unseen)}
    lines = []
    for number, (unseen, requests, count) in enumerate(MULTI_MIX):
        for task in draw_multi_tasks(100 * MULTI_SEED + number, count, unseen, requests, known):
            known.add(task["messages"][0]["content"])
            lines.append(json.dumps(task))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the bundled toolbox tokenizer, trajectories and tests.")
    parser.add_argument(
        "--output", type=Path, default=Path("assets"), help="folder that gets tiny_model/ and tiny_data/"
    )
    parser.add_argument("--trajectories", type=int, default=TRAIN_COUNT, help="number of trajectories")
    parser.add_argument("--seed", type=int, default=TRAIN_SEED, help="seed of the trajectories or tests")
    parser.add_argument("--only_trajectories", type=Path, help="write just the trajectories to this file")
    parser.add_argument("--only_tests", type=Path, help="write just --tests single-turn prompts to this file")
    parser.add_argument("--tests", type=int, default=2 * TEST_COUNT, help="number of prompts of --only_tests")
    settings = parse_arguments(parser, arguments)
    if settings.only_trajectories:
        write_trajectories(settings.only_trajectories, settings.seed, settings.trajectories)
        return 0
    if settings.only_tests:
        write_tests(settings.only_tests, settings.seed, settings.tests)
        return 0
    model, tests = settings.output / "tiny_model", settings.output / "tiny_data"
    model.mkdir(parents=True, exist_ok=True)
    (model / "tokenizer.model").write_bytes(train_tokenizer())
    write_trajectories(tests / "train.json", settings.seed, settings.trajectories)
    for name, seed, unseen in (("test_seen", SEEN_SEED, False), ("test_unseen", UNSEEN_SEED, True)):
        lines = [json.dumps(example) for example in draw_test_examples(seed, TEST_COUNT, unseen)]
        (tests / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tests / "test_multi.jsonl").write_text("\n".join(multi_lines()) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
