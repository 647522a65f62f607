"""eval.sensitivity: which cells, their training data, the table."""

import json

import pytest

from command_line import read_config
from data.error_filter import decide_masked_turns
from data.json_records import DataError
from data.key_tokens import weigh_key_tokens
from data.trajectories import read_trajectories
from eval import sensitivity
from eval.reports.ablation_tables import Cell
from eval.sensitivity import ERROR_RATES, VARIANTS, commands_of, main, table_rows, write_data, write_tables
from tests.eval.test_robustness import rows
from tests.support.tiny_run import ROOT
from train.sft_config import SFTConfig


def test_each_cell_changes_one_thing(tmp_path):
    configs = {}
    for name in VARIANTS:
        train, score = commands_of(tmp_path, Cell(name, 4))
        configs[name] = read_config(SFTConfig, "", train[1:])
        assert train[0] == "run_sft.py" and score[0] == "run_eval.py"
        assert score[score.index("--model") + 1] == f"{configs[name].output}/final"
        configs[name].output = ""
    full = configs["full"]
    chosen = (full.error_filter, full.key_tokens, full.max_key_token_weight, full.loss_normalization, full.seed)
    assert chosen == ("structured", "on", 9.0, "turn_mean", 4)
    changed = {
        name: {
            field: getattr(config, field)
            for field in SFTConfig.__dataclass_fields__
            if getattr(config, field) != getattr(full, field)
        }
        for name, config in configs.items()
    }
    folder = f"{tmp_path / 'data'}"
    assert changed == {
        "full": {},
        "w_max_1": {"max_key_token_weight": 1.0},
        "failing_0": {"data": f"{folder}/train_0.json"},
        "failing_31": {"data": f"{folder}/train_31.json"},
        "failing_17_unfiltered": {"error_filter": "none"},
        "failing_31_unfiltered": {"error_filter": "none", "data": f"{folder}/train_31.json"},
        "sum": {"loss_normalization": "sum"},
        "substring": {"error_filter": "substring"},
    }


def test_shares_of_failing_trajectories(tmp_path):
    write_data(tmp_path, 20)
    queries = set()
    for share in ERROR_RATES:
        records = json.loads((tmp_path / f"data/train_{share}.json").read_text())
        turns = [turn for record in records for turn in record["conversations"]]
        queries |= {turn["content"] for turn in turns if turn["role"] == "user"}
        failing = sum(
            any(
                turn["role"] == "function" and not turn["content"].startswith('{"result"')
                for turn in record["conversations"]
            )
            for record in records
        )
        assert len(records) == 1217 and round(100 * failing / 1217) == share
    bundled = (ROOT / "assets/tiny_data/train.json").read_bytes()
    assert (tmp_path / "data/train_17.json").read_bytes() == bundled
    for split in ("seen", "unseen", "hard", "alike"):
        asked = [json.loads(line) for line in (tmp_path / f"data/test_{split}.jsonl").read_text().splitlines()]
        assert len(asked) == 20 and not queries & {each["messages"][0]["content"] for each in asked}


def test_two_cells_train_on_the_same_loss_as_others():
    """What docs/reproduction.md says beforehand: `substring` equals `full`, and `w_max_1` is MAE alone."""
    trajectories = read_trajectories(ROOT / "assets/tiny_data/train.json")
    masked = [
        [[turn.masked for turn in decide_masked_turns(each, error_filter)] for each in trajectories]
        for error_filter in ("structured", "substring")
    ]
    assert masked[0] == masked[1] and sum(map(sum, masked[0])) == 225
    assert weigh_key_tokens([0, 3], 30, 1.0) == [1.0] * 30


def test_table_by_hand(tmp_path):
    results = {"full": {4: rows("1110")}, "sum": {4: rows("1001")}}
    found = {(row["cell"], row["metric"]): row for row in table_rows("s", results)}
    assert found["full", "CF"] == {
        **{"split": "s", "cell": "full", "metric": "CF", "n": 4, "CF": 3, "percent": 75.0},
        "interval_95": [30.06, 95.44],  # Wilson, 3 of 4
    }
    row = found["sum", "TS"]  # two lost, one won: p = min(1, 2 * (1 + 3) / 8)
    assert (row["points"], row["lost"], row["won"], row["p"]) == (-25, 2, 1, 1)
    settings = {"seed": 4, "prompts": 4, "sft_flags": "", "eval_flags": ""}
    text = write_tables(tmp_path, settings, "float32", {"s": results}).read_text()
    assert "| sum  | TS     | 50.0 [15.0, 85.0] | -25.0  | 2    | 1   | 1 |" in text
    assert json.loads((tmp_path / "sensitivity.json").read_text())["dtype"] == "float32"


def test_a_run_of_other_settings_is_refused(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise DataError("started")

    monkeypatch.setattr(sensitivity, "write_data", fail)
    assert main(["--output", str(tmp_path)]) == 2 and "started" in capsys.readouterr().err
    assert main(["--output", str(tmp_path), "--seed", "1"]) == 2
    assert "found seed 0, expected 1 as in this command" in capsys.readouterr().err
    for flags in (["--seed", "-1"], ["--prompts", "0"], ["--jobs", "0"]):
        with pytest.raises(SystemExit, match="2"):
            main(["--output", "x", *flags])
        assert capsys.readouterr().err.count("\n") == 1
