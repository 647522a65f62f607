"""data/run_journals.py: every good line of a damaged journal, and one line about the others."""

import json

import pytest

from charts import write_run_plot
from data.json_records import DataError
from data.run_journals import clean_evaluation, clean_metrics, clean_sample, read_journal

GOOD = {"step": 1, "sft/loss": 2.5}


def journal(tmp_path, *lines: str, end: str = "\n"):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(("\n".join(lines) + end).encode("utf-8", "surrogatepass"))
    return path


def test_a_killed_run_has_a_torn_last_line(tmp_path):
    path = journal(tmp_path, json.dumps(GOOD), '{"step": 2, "sft/lo', end="")
    rows, [problem] = read_journal(path, clean_metrics)
    assert (
        rows == [GOOD] and problem == "metrics.jsonl: the last line is torn, as a killed run leaves it, and is left out"
    )


def test_damaged_lines_are_counted_and_the_first_is_named(tmp_path):
    bad = ["[]", "7", '{"sft/loss": 1.0}', '{"step": NaN}', '{"step": 1, "step": 2}', "\udc80", "[" * 10_000]
    rows, [problem] = read_journal(journal(tmp_path, json.dumps(GOOD), *bad, json.dumps(GOOD)), clean_metrics)
    assert rows == [GOOD, GOOD]
    assert problem.startswith("metrics.jsonl: 7 damaged lines are left out; the first: metrics.jsonl:2: found ")


def test_what_is_no_number_is_left_out(tmp_path):
    row = {"step": 3, "a": "1", "b": True, "c": 10**400, "d": 1e300, "e": [], "f": 0.5}
    assert clean_metrics(row) == {"step": 3, "f": 0.5} and clean_metrics({"step": "3"}) is None
    sample = {"step": 1, "iteration": 0, "reward": 1.0, "response": "f()"}
    assert clean_sample(sample) == sample and clean_sample({**sample, "response": None}) is None
    summary = {"mean_reward": 0.5, "interval_95": [0.25, 0.75]}
    row = {"step": 2, "greedy": summary, "sampled": {"mean_reward": 0.5, "interval_95": None}}
    assert clean_evaluation(row) == {"step": 2, "greedy": summary} and clean_evaluation({}) is None


def test_missing_and_unreadable_files(tmp_path):
    assert read_journal(tmp_path / "none.jsonl", clean_metrics) == ([], [])
    with pytest.raises(DataError, match="found no regular file"):
        read_journal(tmp_path, clean_metrics)


def test_a_damaged_journal_still_has_its_plot(tmp_path):
    score = json.dumps({"step": 1, "iteration": [], "ppo/score": 0.5, "ppo/share_x": "a"})
    journal(tmp_path, "null", score, '{"step": 2, "ppo/score": 1e400, "ppo/value_loss": -1e14}', score)
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n')
    assert write_run_plot(tmp_path) == f"plot: {tmp_path / 'plots' / 'ppo.svg'}"
