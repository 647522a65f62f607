"""train/export_metrics.py and train/tensorboard.py: the figures of a run in other programs, and their absence."""

import csv
import json
import sys
import types

import pytest

from command_line import ConfigError
from tests.support.tiny_run import metrics_of, run_here
from train.export_metrics import main
from train.tensorboard import TensorBoard, check_tensorboard

ROWS = [{"step": 1, "sft/loss": 2.5, "sft/tokens": 7}, {"step": 2, "sft/loss": 1.25, "sft/new": 0.5}]


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "my_run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 3, "sft/')
    (folder / "config.json").write_text('{"seed": 4}')
    return folder


def test_csv_has_a_row_per_step_and_a_column_per_key(run_folder, tmp_path, capsys):
    assert main([str(run_folder), "--csv", str(tmp_path / "out.csv")]) == 0
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["step", "sft/loss", "sft/tokens", "sft/new"],
            ["1", "2.5", "7", ""],
            ["2", "1.25", "", "0.5"],
        ]
    assert capsys.readouterr().out == "exported 2 steps\n"


@pytest.mark.parametrize("content", [None, "", '{"no": 1}\n'])
def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path), "--csv", str(tmp_path / "out.csv")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "metrics.jsonl: found" in err
    assert not (tmp_path / "out.csv").exists()


def test_wandb_gets_settings_and_all_rows(run_folder, monkeypatch):
    calls = []

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            calls.append("end")

        def log(self, values, step):
            calls.append((step, values))

    def init(**settings):
        calls.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    assert main([str(run_folder), "--wandb", "offline"]) == 0
    assert calls == [
        {"project": "tl_training", "name": "my_run", "config": {"seed": 4}, "mode": "offline"},
        (1, {"sft/loss": 2.5, "sft/tokens": 7}),
        (2, {"sft/loss": 1.25, "sft/new": 0.5}),
        "end",
    ]


def test_absent_packages_are_named_before_anything_is_done(run_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main([str(run_folder), "--wandb", "offline"]) == 2
    assert capsys.readouterr().err == "--wandb: found no package wandb, expected it installed: pip install wandb\n"
    with pytest.raises(ConfigError, match=r"^--tensorboard: found on, expected off, because .* is not installed"):
        check_tensorboard("on")
    check_tensorboard("off")
    code, _, err = run_here(tmp_path / "run", tensorboard="on")
    assert code == 2 and err.startswith("--tensorboard: ") and not (tmp_path / "run").exists()


def scalars_of(folder):
    """{key: [(step, value)]} of what TensorBoard shows."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs requirements-optional.txt"
    )
    events = reader.EventAccumulator(str(folder), size_guidance={reader.SCALARS: 0})
    events.Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard", reason="needs requirements-optional.txt")
    first = TensorBoard(tmp_path, 0)
    for step in (1, 2, 3):
        first.write({"step": step, "sft/loss": float(step), "name": "text", "held_out/loss_text": None})
    first.close()
    second = TensorBoard(tmp_path, 1)  # resumed from the checkpoint of step 1
    second.write({"step": 2, "sft/loss": 20.0})
    second.close()
    assert scalars_of(tmp_path / "tensorboard") == {"sft/loss": [(1, 1.0), (2, 20.0)]}


@pytest.mark.slow
def test_a_run_in_tensorboard_has_the_keys_of_metrics(tmp_path):
    pytest.importorskip("tensorboard", reason="needs requirements-optional.txt")
    assert run_here(tmp_path / "run", tensorboard="on", max_steps=2)[0] == 0
    shown, rows = scalars_of(tmp_path / "run" / "tensorboard"), metrics_of(tmp_path / "run")
    assert shown.keys() == rows[0].keys() - {"step"}
    assert [step for step, _ in shown["sft/loss"]] == [1, 2]
    assert shown["sft/loss"][1][1] == pytest.approx(rows[1]["sft/loss"], rel=1e-6)
