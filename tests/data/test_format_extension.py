"""A new prompt format is one new file and its name in the table, as CONTRIBUTING.md says; tried on a copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

ROOT = Path(__file__).resolve().parents[2]
# Calls as `@name {json}`, one per turn; the end of a turn is the tokenizer's EOS.
TOY = '''"""A toy format: "Q:" and "A:" lines, calls as `@name {json}`."""

from data.formats.call_text import checked_call, fault, json_text, whole_json
from data.formats.prompt_format import PromptFormat, Segment, call_target, join_context, split_system


def dialogue_segments(tools, messages):
    system, turns = split_system(messages)
    segments = [Segment(f"{system}{json_text(tools)}")]
    for index, message in turns:
        if message.role != "assistant":
            segments.append(Segment(f"\\nQ: {message.content}", index))
            continue
        segments.append(Segment("\\nA:", index))
        if message.call is None:
            segments.append(Segment(f" {message.content}", index, True))
        else:
            segments.append(call_target(index, (" @", *call_pieces(message.call))))
    return join_context(segments)


def call_pieces(call):
    return call.name, f" {json_text(call.arguments)}"


def parse_calls(text):
    at, name, arguments = text.strip().partition("@")[1:] + ("",)
    name, _, arguments = name.partition(" ")
    if not at:
        raise fault(text, 0, "'@' before the tool's name")
    return [checked_call(name, whole_json(arguments))]


FORMAT = PromptFormat(
    name="toy",
    parse_calls=parse_calls,
    render_calls=lambda calls: "@" + "".join(call_pieces(calls[0])),
    dialogue_segments=dialogue_segments,
    has_one_call=True,
)
'''

# The settings offer it, outputs are read, and its prompts are prefixes of the dialogues that training would see.
CHECK = """
import dataclasses
import sys

import pytest

from data.formats.table import parse_output, render_output
from data.tool_calls import ToolCall
from run_eval import EvalConfig

call = ToolCall("get", {"city": "Oslo"})
assert parse_output(render_output([call], "toy"), "toy") == [call]
(setting,) = [field for field in dataclasses.fields(EvalConfig) if field.name == "prompt_format"]
assert "toy" in setting.metadata["choices"]
sys.exit(pytest.main(["-p", "no:cacheprovider", "tests/data/test_format_segments.py", "-k", "toy"]))
"""


def test_a_new_format_is_one_file_and_its_name_in_the_table(tmp_path):
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("data", "eval", "model", "rl", "toolbox", "train"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, copy / path.name)
    (copy / "tests/data").mkdir(parents=True)
    for name in ("__init__.py", "conftest.py", "data/__init__.py", "data/test_format_segments.py"):
        shutil.copy(ROOT / "tests" / name, copy / "tests" / name)
    shutil.copytree(ROOT / "tests/support", copy / "tests/support", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "data/formats/toy.py").write_text(TOY)
    table = copy / "data/formats/table.py"
    text = table.read_text()
    for before in (", toolllama\n", ", react)\n"):  # the import, the list
        assert text.count(before) == 1
        text = text.replace(before, before.replace("react", "react, toy").replace("llama\n", "llama, toy\n"))
    table.write_text(text)

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=copy, capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
