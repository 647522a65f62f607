"""eval.robustness: which models, which prompts, the tables; one run with programs that only write results."""

import hashlib
import json
import os

import pytest

from data.json_records import DataError
from eval import robustness
from eval.reports.ablation_tables import Cell
from eval.reports.robustness_tables import fall_rows, half_rows, level_rows, method_rows
from eval.robustness import main, models_of, split_levels, write_levels
from toolbox.make import draw_split


def rows(bits: str) -> dict[int, dict]:
    """One row per prompt: "1" has all three right, "0" nothing."""
    return {index: dict.fromkeys(("TS", "PI", "CF"), int(bit)) for index, bit in enumerate(bits)}


BY_LEVEL = {
    "clean": {"none": {0: rows("1111"), 1: rows("1110")}, "MAE": {0: rows("1111"), 1: rows("1111")}},
    "heavy": {"none": {0: rows("1000"), 1: rows("1000")}, "MAE": {0: rows("1010"), 1: rows("1110")}},
}


def test_rates_falls_and_differences_by_hand():
    rates = {(row["method"], row["level"]): row for row in level_rows("s", BY_LEVEL) if row["metric"] == "CF"}
    assert rates["none", "clean"]["mean"] == 87.5 and rates["none", "clean"]["percents"] == [100, 75]
    # Wilson for 3.5 of 4, z^2 = 3.8415: (0.875 + 0.48018 +- 1.96 * sqrt(0.02734 + 0.06002)) / 1.96036
    low, high = rates["none", "clean"]["prompts_95"]
    assert (low, high) == (pytest.approx(39.58, abs=0.01), pytest.approx(98.68, abs=0.01))
    falls = {row["method"]: row for row in fall_rows("s", BY_LEVEL, "none") if row["metric"] == "CF"}
    assert falls["none"]["level"] == "heavy" and "minus_standard" not in falls["none"]
    assert (falls["none"]["lost"], falls["none"]["won"], falls["none"]["mean"]) == (5, 0, -62.5)  # -75 and -50
    assert falls["none"]["p_over_prompts"] == 2 / 32 and falls["none"]["p_over_seeds"] == 0.5
    assert falls["MAE"]["mean"] == -37.5  # -50 and -25
    more = falls["MAE"]["minus_standard"]
    assert more["mean"] == 25 and more["p_over_seeds"] == 0.5  # +25 for both seeds
    assert more["interval_95"] == (25, 25)
    differences = [(row["level"], row["mean"]) for row in method_rows("s", BY_LEVEL, "none") if row["metric"] == "TS"]
    assert differences == [("clean", 12.5), ("heavy", 37.5)]
    halves = {
        (row["method"], row["level"], row["half"]): row["mean"]
        for row in half_rows("s", BY_LEVEL)
        if row["metric"] == "PI"
    }
    assert halves["MAE", "heavy", "tool"] == 100 and halves["MAE", "heavy", "parameter"] == 25


def make_ablation(path) -> None:
    """A folder like that of eval.ablation: 3 seeds of none, 2 of MAE, 1 of IRM; models of one byte."""
    cells = [Cell("none", seed) for seed in range(3)] + [Cell("MAE", 0), Cell("MAE", 2), Cell("IRM", 2)]
    for cell in cells:
        final = cell.folder(path) / ("ppo" if cell.has_irm else "sft") / "final"
        final.mkdir(parents=True)
        (final / "model.safetensors").write_bytes(b"x")
    (path / "cells.jsonl").write_text("".join(json.dumps({"cell": str(cell), "seconds": 1.0}) + "\n" for cell in cells))
    (path / "data").mkdir()
    counts = {"n": 1, "TS": 1, "TS_percent": 100, "TS_interval_95": [0, 100]}
    summary = {"dtype": "float32", "benchmarks": {}}
    for split in ("seen", "unseen"):
        lines = "".join(json.dumps(example) + "\n" for example in draw_split(split, 5, 6))
        (path / f"data/test_{split}.jsonl").write_text(lines)
        sha256 = hashlib.sha256(lines.encode()).hexdigest()
        summary["benchmarks"][f"tiny-{split}"] = {**counts, "answers_sha256": sha256}
    for cell in cells:
        (cell.folder(path) / "eval").mkdir()
        (cell.folder(path) / "eval/summary.json").write_text(json.dumps(summary))


def test_models_and_prompts_are_those_of_the_ablation(tmp_path):
    ablation, output = tmp_path / "ablation", tmp_path / "out"
    make_ablation(ablation)
    cells = [Cell("none", 0), Cell("MAE", 0), Cell("none", 2), Cell("MAE", 2)]
    assert [*models_of(ablation, ["none", "MAE"], 20)] == cells
    assert [*models_of(ablation, ["none", "MAE"], 1)] == cells[:2]
    assert models_of(ablation, ["IRM"], 20) == {Cell("IRM", 2): ablation / "seed2/IRM/ppo/final"}
    with pytest.raises(DataError, match="found no seed with which PKT are finished"):
        models_of(ablation, ["PKT"], 20)
    write_levels(ablation, output, 6)
    for split in ("seen", "unseen"):
        lines = (output / f"test_{split}.jsonl").read_text().splitlines()
        assert lines[:6] == (ablation / f"data/test_{split}.jsonl").read_text().splitlines() and len({*lines}) == 30
        noises = [json.loads(line)["meta"].get("noise") for line in lines]
        assert noises == [None] * 6 + ["tool", "parameter"] * 9 + ["both"] * 6
    with pytest.raises(DataError, match="found 6 prompts, expected at least 7"):
        write_levels(ablation, output, 7)
    (output / "test_seen.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"test_seen\.jsonl: found another text"):
        write_levels(ablation, output, 6)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("data/test_seen.jsonl", "{}\n" * 6, "found other prompts than those of the ablation's none, seed 0"),
        ("data/test_unseen.jsonl", None, "found no regular file"),
        ("seed0/none/sft/final/model.safetensors", None, "found no regular file"),
        ("seed0/none/eval/summary.json", "{}", "expected the summary of a run_eval.py run"),
        ("cells.jsonl", '{"cell": ["none, seed 0"]}\n', "found no seed with which none are finished"),
    ],
)
def test_a_damaged_ablation_is_one_line(tmp_path, capsys, name, text, words):
    """text: what is in the file, None for a pipe."""
    make_ablation(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).write_text(text) if text else os.mkfifo(tmp_path / name)
    flags = ["--ablation", str(tmp_path), "--output", str(tmp_path / "out"), "--methods", "none", "--prompts", "6"]
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err and not (tmp_path / "out").exists()


def test_levels_are_parts_of_a_file():
    found = split_levels({"none": {3: rows("1100101010")}}, 2)
    assert {level: [row["CF"] for row in each["none"][3].values()] for level, each in found.items()} == {
        "clean": [1, 1],
        "slight": [0, 0],
        "medium": [1, 0],
        "heavy": [1, 0],
        "union": [1, 0],
    }
    assert [*found["union"]["none"][3]] == [0, 1]


def test_a_run_and_its_repetition(tmp_path, capsys, monkeypatch):
    ablation, output, order = tmp_path / "ablation", tmp_path / "out", tmp_path / "order"
    make_ablation(ablation)

    def score_command(model, splits, benchmark_dir, folder):
        """All clean prompts right, and two of six at each other level."""
        bits = [*"111111", *"110000" * 4]
        counts = dict.fromkeys(("TS", "PI", "CF"), 14)
        shares = {f"{name}_percent": 1400 / 30 for name in counts} | {
            f"{name}_interval_95": [0, 100] for name in counts
        }
        summary = {"dtype": "float32", "benchmarks": {}}
        code = "from pathlib import Path; from data.json_records import write_text as write; "
        code += f"open({str(order)!r}, 'a').write('cell '); "
        for split in splits:
            summary["benchmarks"][split] = {"n": 30, **counts, **shares, "answers_sha256": ""}
            lines = [{"index": index, **dict.fromkeys(counts, int(bit))} for index, bit in enumerate(bits)]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            code += f"write(Path({str(folder / 'results' / f'{split}.jsonl')!r}), {text!r}); "
        return ["-c", code + f"write(Path({str(folder / 'summary.json')!r}), {json.dumps(summary)!r})"]

    monkeypatch.setattr(robustness, "score_command", score_command)
    arguments = ["--ablation", str(ablation), "--output", str(output), "--methods", "none,MAE", "--prompts", "6"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("finished: 0 of 4 cells\n1/4  none, seed 0: ") and "tables: " in out
    assert order.read_text() == 4 * "cell "
    text = (output / "robustness.md").read_text()
    assert "## tiny-unseen, 6 prompts" in text and "Greedy predictions in fp32" in text
    content = json.loads((output / "robustness.json").read_text())
    assert {row["mean"] for row in content["falls"]} == {-400 / 6} and len(content["falls"]) == 2 * 2 * 4 * 3
    assert "heavy" in (output / "robustness.svg").read_text()
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("already finished: 4 of 4 cells\n")
    assert order.read_text() == 4 * "cell "
    (ablation / "seed2/MAE/sft/final/model.safetensors").write_bytes(b"y")  # another model
    assert main(arguments) == 2
    assert "found model_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--methods", "none,none"], ["--methods", "NONE"], ["--prompts", "0"], ["--jobs", "65"]]
)
def test_wrong_flags(capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        main(["--ablation", "a", "--output", "b", *flags])
    assert capsys.readouterr().err.count("\n") == 1


def test_no_ablation(tmp_path, capsys):
    assert main(["--ablation", str(tmp_path / "none"), "--output", str(tmp_path / "b")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cells.jsonl" in err and not (tmp_path / "b").exists()
