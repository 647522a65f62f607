"""What docs/metrics.md and docs/ppo_details.md say about PPO, against a real run and the real settings; the plot.

pytest tests/rl/test_ppo_docs.py
"""

import contextlib
import io
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from charts import PPO_QUANTITIES, SHARE, write_run_plot
from rl.ppo_config import PPOConfig
from rl.reward import CATEGORIES
from svg import TEXTURES
from tests.support.tiny_run import tiny_files

ROOT = Path(__file__).resolve().parents[2]
METRICS = (ROOT / "docs/metrics.md").read_text(encoding="ascii").partition("\n## PPO\n")[2].partition("\n## ")[0]
DETAILS = (ROOT / "docs/ppo_details.md").read_text(encoding="ascii")
LINES, _, JOURNALS = METRICS.partition("### Other journals")


def keys_of(section: str) -> set[str]:
    """Names in backquotes in the first column of a section's tables."""
    rows = re.findall(r"^\| (`[^|]+`) \|", section, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """A PPO run of two optimizer steps, one iteration, with evaluations and a ledger."""
    from run_ppo import main

    folder = tmp_path_factory.mktemp("ppo")
    model_dir, data_file = tiny_files()
    flags = {
        "model": model_dir,
        "data": data_file,
        "output": folder,
        "device": "cpu",
        "max_steps": 2,
        "rollout_batch_size": 4,
        "minibatch_size": 2,
        "max_response_tokens": 24,
        "eval_data": data_file,
        "eval_limit": 2,
        "print_ledger": "on",
        "plot": "off",
        "critic_only_iterations": 0,
    }
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([part for name, value in flags.items() for part in (f"--{name}", str(value))]) == 0
    (folder / "stdout.txt").write_text(out.getvalue())
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_every_metric_is_documented_and_every_documented_metric_written(output):
    rows = rows_of(output / "metrics.jsonl")
    assert len(rows) == 2 and rows[0].keys() == rows[1].keys()
    assert rows[0].keys() == keys_of(LINES)


def test_journals_have_the_documented_keys(output):
    samples, _, evaluations = JOURNALS.partition("`evaluations.jsonl`")
    assert all(row.keys() == keys_of(samples) for row in rows_of(output / "samples.jsonl"))
    rows = rows_of(output / "evaluations.jsonl")
    assert [row["step"] for row in rows] == [0, 2] and rows[0].keys() == {"step", "greedy", "sampled"}
    assert all(row[name].keys() == keys_of(evaluations) for row in rows for name in ("greedy", "sampled"))


def test_relations_between_metrics_that_the_page_states(output):
    first, second = rows_of(output / "metrics.jsonl")
    assert sum(first[f"ppo/share_{category}"] for category in CATEGORIES) == pytest.approx(1)
    assert first["ppo/kl_sequence"] == first["ppo/kl_k3"] == 0, "same weights in the first rollout"
    assert first["ppo/value_mean"] == first["ppo/explained_variance"] == 0, "zero head"
    assert first["ppo/clip_fraction"] == first["ppo/max_ratio_deviation"] == first["ppo/approx_kl"] == 0
    assert second["ppo/max_ratio_deviation"] > 0 and second["ppo/approx_kl"] >= 0
    times = [value for key, value in first.items() if key.endswith("_seconds") and key != "time/step_seconds"]
    assert first["time/step_seconds"] == pytest.approx(sum(times))
    samples = rows_of(output / "samples.jsonl")
    assert all(row["response"] == row["gold"] for row in samples if row["category"] == "correct")
    assert json.loads((output / "data_report.json").read_text()).keys() == {"prompts", "notes"}
    rewards = [row["reward"] for row in samples]
    assert first["ppo/score"] == pytest.approx(sum(rewards) / len(rewards))


def test_ledger_of_a_real_response_passes_its_own_checks(output):
    text = (output / "stdout.txt").read_text()
    assert re.search(r"^score .*: checked$", text, re.MULTILINE) and "WRONG" not in text
    assert re.search(r"^sum of rewards .*: checked$", text, re.MULTILINE)


def test_charts_need_documented_metrics_only():
    assert {key for quantity in PPO_QUANTITIES for key in quantity.keys} <= keys_of(LINES)
    assert {f"{SHARE}{category}" for category in CATEGORIES} <= keys_of(LINES)
    assert len(CATEGORIES) == len(TEXTURES), "each category has its own area in the chart"


def test_plot_of_a_run(output, tmp_path):
    assert write_run_plot(output) == f"plot: {output / 'plots' / 'ppo.svg'}"
    drawn = (output / "plots" / "ppo.svg").read_text("ascii")
    assert all(quantity.title in drawn for quantity in PPO_QUANTITIES) and "held-out, greedy" in drawn
    assert "no step" in write_run_plot(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Details


def details() -> list[tuple[int, str]]:
    """(number, text) of every numbered row of the page."""
    return [(int(number), row) for number, row in re.findall(r"^\| (\d+) \|(.*)\|$", DETAILS, re.MULTILINE)]


def test_details_are_numbered_from_1_without_gaps():
    assert [number for number, _ in details()] == list(range(1, len(details()) + 1)) and len(details()) > 30


def test_every_detail_names_a_place_in_the_code():
    for number, row in details():
        assert re.search(r"`[\w/]+\.py:\w+`", row), f"detail {number} names no `file.py:function`"


def test_every_setting_of_ppo_is_a_detail_and_its_default_is_right():
    """`name` = `value` in the column "here" is the default of PPOConfig; every field is somewhere on the page."""
    defaults = {each.name: each.default for each in fields(PPOConfig)}
    stated = [pair for _, row in details() for pair in re.findall(r"`(\w+)` = `([^`]*)`", row)]
    assert not {name for name, _ in stated} - defaults.keys()
    for name, value in stated:
        assert str(defaults[name]) == value.replace("(empty)", ""), f"{name}: page {value}, PPOConfig {defaults[name]}"
    assert not defaults.keys() - {name for name, _ in stated}
