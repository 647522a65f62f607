"""Every `python ...` and `torchrun ...` command of the pages is one that its program's command line accepts.

The program runs up to the point where its flags are parsed: flags, choices, types and required arguments are checked,
the files that it names need not exist.
"""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from command_line import ConfigError, read_config
from rl.ppo_config import PPOConfig
from run_eval import EvalConfig
from train.sft_config import SFTConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("assets/*.md"),
        *ROOT.glob("benchmarks/*/*.md"),
        ROOT / "train/cuda/csrc/README.md",
    ]
)
OTHERS = ("pytest", "json", "venv", "pip")  # modules that are not ours
STAGES = {"run_sft.py": (SFTConfig, "sft"), "run_ppo.py": (PPOConfig, "ppo"), "run_eval.py": (EvalConfig, "")}
PROGRAM = re.compile(r"(?:^|[;|(&]|\bdo) *(?:torchrun .*?|python)(?= (?:-m [a-z_]+[.\w]*|[\w/]+\.py))(.*?)(?=[;|>&]|$)")
# what a reader or a loop fills in
VARIABLES = {"URL": "http://127.0.0.1:8000/v1", "$seed": "0", "${filter}": "none", "$filter": "none"}
NO_FLAGS = ("examples/tl_training_on_one_page.py", "examples/gae_by_hand.py")  # these parse nothing


def block_lines(text: str) -> list[str]:
    """The lines of fenced and indented blocks, those that end in a backslash joined with the next."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^ {4}.*$", text, re.MULTILINE) + [line for block in blocks for line in block.splitlines()]


def commands(text: str) -> list[list[str]]:
    """Words after `python` of each command: a file or `-m` and a module, then the arguments."""
    found = []
    for line in block_lines(text):
        for match in PROGRAM.finditer(line):
            words = [word.strip("[]") for word in shlex.split(match[1], comments=True)]  # [--flag X]: may be left out
            for name, value in VARIABLES.items():
                words = [word.replace(name, value) for word in words]
            if words[0] not in NO_FLAGS and (words[0] != "-m" or words[1].partition(".")[0] not in OTHERS):
                found.append(words)
    return found


ALL = sorted({tuple(words) for page in PAGES for words in commands(page.read_text(encoding="ascii"))})


class Parsed(BaseException):
    """Raised in place of the program's work. A BaseException, so that no program catches it."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **keywords):
        parse_args(self, *args, **keywords)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.chdir(ROOT)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # run_module of what a test imported
@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_command_line_is_accepted(words, stop_after_parsing, monkeypatch):
    if words[0] in STAGES:
        config_class, section = STAGES[words[0]]
        if "--help" not in words:
            read_config(config_class, "", list(words[1:]), section=section)
        return
    is_module = words[0] == "-m"
    assert is_module or (ROOT / words[0]).is_file()
    monkeypatch.setattr(sys, "argv", list(words[1:] if is_module else words))
    with pytest.raises(Parsed):  # a wrong flag is SystemExit
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")


@pytest.mark.parametrize("line", ["    python run_sft.py --epoch 1", "    python -m rl.evaluate_reward --models x"])
def test_a_wrong_flag_is_seen(line, stop_after_parsing, monkeypatch):
    [words] = commands(line)
    with pytest.raises((SystemExit, ConfigError)):
        test_command_line_is_accepted(words, stop_after_parsing, monkeypatch)


def test_commands_are_found():
    shown = [" ".join(words) for words in ALL]
    assert len(shown) > 60
    for needle in ("run_sft.py --config configs/released.json", "-m toolbox.pretrain", "-m train.audit_loss --run"):
        assert any(needle in each for each in shown), needle
