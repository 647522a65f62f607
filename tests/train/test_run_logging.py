"""train/run_logging.py: what environment.json says about a run, and what it must not say about the machine."""

import json
import sys

import pytest
import torch

from train.run_logging import describe_environment, without_absolute_path


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("--epochs", "--epochs"),
        ("3", "3"),
        ("runs/sft", "runs/sft"),
        ("{here}/runs/sft", "runs/sft"),
        ("--output={here}/runs/sft", "--output=runs/sft"),
        ("/home/somebody/models/7b", "7b"),
        ("--model=/home/somebody/models/7b/", "--model=7b"),
        ("~/models/7b", "7b"),
        ("learning_rate=/x/y", "learning_rate=/x/y"),  # no flag and no absolute path
    ],
)
def test_arguments_lose_absolute_paths(argument, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert without_absolute_path(argument.format(here=tmp_path)) == shown


def test_the_environment_names_no_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["/opt/code/run_sft.py", "--output", str(tmp_path / "out"), "--data", "/data/private/train.json"]
    monkeypatch.setattr(sys, "argv", arguments)
    environment = describe_environment(1, torch.device("cpu"))
    assert environment["command"] == ["run_sft.py", "--output", "out", "--data", "train.json"]
    assert not [each for each in json.dumps(environment).split('"') if each.startswith("/")]
