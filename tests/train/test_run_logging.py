"""train/run_logging.py: what environment.json says about a run, and what it must not say about the machine."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from data.json_records import DataError
from train.run_logging import cut_metrics, describe_environment, file_sha256, read_metrics, without_absolute_path


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


def test_what_never_ends_is_not_read(tmp_path):
    """A pipe without a writer, and a device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        for read in (read_metrics, lambda path: cut_metrics(path, 0)):
            with pytest.raises(DataError, match=f"{name}: found no regular file, expected one that a run wrote"):
                read(tmp_path / name)
    with pytest.raises(DataError, match="/dev/zero: found a device, expected a file"):
        file_sha256(Path("/dev/zero"))
