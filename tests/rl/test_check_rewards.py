"""rl/check_rewards.py: which prompts pass the check before training, broken rules that do not, the command line.

pytest tests/rl/test_check_rewards.py
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece

from data.formats.table import TRAINING_FORMATS
from data.json_records import DataError
from data.tool_calls import ToolCall, ToolCallError, parse_tool_call
from model.tokenizer import SentencePieceTokenizer, load_tokenizer
from rl import check_rewards as check_rewards_module
from rl import reward as reward_module
from rl.check_rewards import check_rewards, drop_unspellable, main
from rl.prompts import PPOPrompt
from rl.reward import CATEGORIES, tool_call_reward
from tests.rl.test_reward import GOLD, TOOLS, tool

ROOT = Path(__file__).resolve().parents[2]


def prompt(gold: ToolCall, *more: ToolCall, tools: list[dict] = TOOLS) -> PPOPrompt:
    return PPOPrompt("t", 2, "train.json:7", [1, 2], (gold, *more), tools)


# ---------------------------------------------------------------------------------------------------------------------
# Check before training


def test_good_prompts_pass_the_check():
    golds = [
        GOLD,
        ToolCall("g", {}),
        ToolCall("finish", {"answer": "it's"}),
        ToolCall("ask_to_user", {}),
        ToolCall("search", {"query": "a(b)", "n": [1, {"k": None}]}),
        ToolCall("f", {"a": 10**4000}),
        *(ToolCall("f", {"a": value}) for value in (0, 1, 0.0, 2.5, True, False, None, "", "\ud800", [], {})),
    ]
    for prompt_format in TRAINING_FORMATS:
        assert check_rewards([replace(prompt(gold), prompt_format=prompt_format) for gold in golds]) == []
    assert check_rewards([prompt(*golds)]) == []
    unwritable = tool("get weather", [], [])  # no call can name it, so it is not the other tool of the mutation
    assert check_rewards([prompt(GOLD, tools=[unwritable, *TOOLS])]) == []
    nested: object = 1
    for _ in range(199):
        nested = [nested]
    assert check_rewards([prompt(ToolCall("f", {"a": nested}))]) == []


@pytest.mark.parametrize(
    ("gold", "pattern"),
    [
        (ToolCall("f", {"zz": 1}), r"'f\(zz=1\)' scores -0.8 hallucinated_parameter: .*, expected 1 correct"),
        (ToolCall("h", {}), r"'h\(\)' scores -2 hallucinated_tool: 'h' is not offered, expected 1 correct"),
        (ToolCall("f", {"a": float("nan")}), r"gold call of 'f': found nan, expected a finite number"),
        (ToolCall("f f", {}), r"gold call of 'f f': found 'f f', expected a name without whitespace"),
        (ToolCall("f", {"a": (1, 2)}), r"gold call of 'f': found a value of type tuple, expected a JSON value"),
    ],
)
def test_offenders_are_listed_with_their_place(gold, pattern):
    faults = check_rewards([prompt(GOLD), prompt(gold), prompt(GOLD, gold)])
    assert len(faults) == 2  # a gold call is checked alone: another that scores +1 does not cover for it
    for fault in faults:
        assert re.fullmatch(rf"train\.json:7 turn 2: {pattern}.*", fault), fault


@pytest.mark.parametrize("prompt_format", TRAINING_FORMATS)
def test_one_mutation_of_every_kind_is_checked(prompt_format):
    categories = [category for _, category in check_rewards_module._mutations(GOLD, TOOLS, prompt_format)]
    assert set(categories) == set(CATEGORIES) and categories[0] == "correct"
    assert check_rewards([replace(prompt(GOLD, ToolCall("g", {})), prompt_format=prompt_format)]) == []
    categories = {category for _, category in check_rewards_module._mutations(ToolCall("g", {}), TOOLS, prompt_format)}
    assert set(CATEGORIES) - categories == {"redundant_parameter", "missing_parameter", "wrong_value"}


def released_parser(text: str, prompt_format: str) -> list[ToolCall]:
    """Reads as the released reward does: up to the first closing bracket, single-quoted strings only."""
    found = re.search(r"(.*?)\(([\s\S]*?)\)", text)
    if not found:
        raise ToolCallError("no call")
    return [ToolCall(found[1], dict(re.findall(r"(\w+)\s*=\s*'([^']*)'", found[2])))]


def first_line_is_enough(text: str, prompt_format: str) -> list[ToolCall]:
    return [parse_tool_call(text.split("\n")[0])]


def cut_calls_are_mended(text: str, prompt_format: str) -> list[ToolCall]:
    return [parse_tool_call(text if text.endswith(")") else f"{text})")]


def every_tool_is_offered(text: str, gold_calls, tools: list[dict], prompt_format: str):
    names = re.findall(r"\A\w+", text)
    return tool_call_reward(text, gold_calls, [*tools, *(tool(name, [], []) for name in names)])


def every_parameter_is_documented(text: str, gold_calls, tools: list[dict], prompt_format: str):
    return tool_call_reward(text, gold_calls, [*tools, tool(GOLD.name, [], re.findall(r"(\w+)=", text))])


@pytest.mark.parametrize(
    ("module", "name", "replacement"),
    [
        (reward_module, "parse_output", released_parser),
        (reward_module, "parse_output", first_line_is_enough),
        (reward_module, "parse_output", cut_calls_are_mended),
        (reward_module, "is_equal_value", lambda value, gold, documents: True),
        (reward_module, "is_equal_value", lambda value, gold, documents: False),
        (reward_module, "parameter_reward", lambda hallucinated, redundant, missing: -0.8),
        (check_rewards_module, "tool_call_reward", every_tool_is_offered),
        (check_rewards_module, "tool_call_reward", every_parameter_is_documented),
    ],
)
def test_a_broken_judge_does_not_pass_the_check(monkeypatch, module, name, replacement):
    monkeypatch.setattr(module, name, replacement)
    assert len(check_rewards([prompt(GOLD)])) == 1


def test_a_thousand_prompts_are_checked_in_a_second():
    tools = [tool(f"tool_number_{index}", ["a", "b"], ["c"]) for index in range(8)]
    prompts = [
        prompt(ToolCall("tool_number_3", {"a": f"text {index}", "b": index}), tools=tools) for index in range(1000)
    ]
    started = time.process_time()
    assert check_rewards(prompts) == []
    assert time.process_time() - started < 1


# ---------------------------------------------------------------------------------------------------------------------
# Gold calls through the tokenizer


@pytest.fixture(scope="module")
def lossy_tokenizer(tmp_path_factory) -> SentencePieceTokenizer:
    """NFKC, blanks merged, no bytes for characters without a piece: what a stranger's tokenizer may do."""
    prefix = tmp_path_factory.mktemp("lossy") / "tokenizer"
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(['f(a="x", b=1) g() search(query="Oslo") =,.-!?23456789'] * 50),
        model_prefix=str(prefix),
        vocab_size=60,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    return SentencePieceTokenizer(Path(f"{prefix}.model"))


@pytest.mark.parametrize(
    ("value", "survives"),
    [
        ("Oslo", True),
        (2.5, True),
        ("a  b", False),  # two blanks become one
        ("a\u00a0b", False),  # NFKC: a plain blank
        ("\ufb01", False),  # NFKC: f and i
        ("\u65e5", False),  # no piece
    ],
)
def test_a_gold_call_that_the_tokenizer_cannot_write_is_dropped(lossy_tokenizer, value, survives):
    good, other = prompt(GOLD), prompt(ToolCall("f", {"a": value, "b": 1}))
    kept, notes = drop_unspellable([other, good, other], lossy_tokenizer, 64)
    assert kept == ([other, good, other] if survives else [good]) and len(notes) == (not survives)
    for note in notes:
        assert note.startswith("2 prompts dropped: the tokenizer cannot write their gold call; the first is train.json")
        assert "train.json:7 turn 2: found the gold call 'f(a=" in note and "-0.25 wrong_value" in note
        assert note.isascii() and note.isprintable()
    # one gold call that can be written is enough
    assert drop_unspellable([prompt(ToolCall("f", {"a": value}), GOLD)], lossy_tokenizer, 64)[1] == []


def test_call_and_eos_must_fit_the_response(lossy_tokenizer):
    length = len(lossy_tokenizer.encode_continuation(" g()"))
    small = prompt(ToolCall("g", {}))
    assert drop_unspellable([small], lossy_tokenizer, length + 1) == ([small], [])
    with pytest.raises(DataError) as caught:
        drop_unspellable([small, small], lossy_tokenizer, length)
    assert str(caught.value) == (
        f"train.json:7 turn 2: found a gold call of {length + 1} tokens with EOS ('g'), expected at most {length} "
        "(--max_response_tokens); all 2 prompts have such a gold call, expected at least one without"
    )


def test_the_bundled_tokenizer_writes_every_character():
    tokenizer = load_tokenizer(ROOT / "assets/tiny_model")
    golds = [
        ToolCall("f", {"a": value, "b": 1}) for value in ("a  b", " \ufb01\u2163 ", "\u65e5\x1f\n", "</s>", "", 1e300)
    ]
    assert drop_unspellable([prompt(gold) for gold in golds], tokenizer, 64)[1] == []


# ---------------------------------------------------------------------------------------------------------------------
# Command line

LINE = {"tools": TOOLS, "gold": [{"name": "f", "arguments": {"a": "x", "b": 1}}], "output": 'f(a="\u00e9\x7f", q=1)'}


def test_explain_from_standard_input():
    done = subprocess.run(
        [sys.executable, "-m", "rl.check_rewards", "--explain"],
        input=json.dumps(LINE) + "\nnext line",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={"PATH": "", "LC_ALL": "C"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "reward        -1.3",
        "category      hallucinated_parameter",
        'parsed call   f(a="\u00e9\\x7f", q=1)',
        'gold call     f(a="x", b=1)',
        "hallucinated  'q'",
        "redundant     -",
        "missing       'b'",
        "wrong values  'a'",
        "explanation   -1.3 hallucinated_parameter: hallucinated 'q'; missing 'b'; 'a' is '\\xe9\\x7f', expected 'x'",
    ]


def test_explain_one_line_of_a_file(tmp_path, capsys):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("\ufeffnot json\n" + json.dumps({**LINE, "output": "f("}) + "\n", encoding="utf-8")
    assert main(["--explain", "--data", str(path), "--line", "2"]) == 0
    printed = capsys.readouterr().out
    assert "reward        -2\n" in printed and "parsed call   none\n" in printed
    assert "expected parameter=value" in printed


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("", "found the end at column 1, expected JSON"),
        ("{", "found the end"),
        ("[1]", "found list, expected an object"),
        ("not json", "found 'not json'"),
        ('{"a": 1, "a": 2}', "found the key 'a' twice in one object"),
        ("NaN", "found NaN"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "found an integer of too many digits"),
        (json.dumps({**LINE, "tools": None}), "found NoneType as 'tools', expected list"),
        (json.dumps({**LINE, "tools": [{"name": ""}]}), "expected a tool with a name"),
        (json.dumps({**LINE, "tools": [1]}), "expected a function object"),
        (json.dumps({**LINE, "gold": []}), "found no gold call"),
        (json.dumps({**LINE, "gold": [1]}), "gold: found int, expected an object with 'name'"),
        (json.dumps({**LINE, "gold": [{"name": "f"}]}), "gold: found nothing as 'arguments', expected dict"),
        (json.dumps({**LINE, "gold": [{"name": "f g", "arguments": {}}]}), "gold: found 'f g', expected a name"),
        (json.dumps({**LINE, "output": None}), "found NoneType as 'output', expected str"),
        (json.dumps({"tools": [], "gold": LINE["gold"]}), "found nothing as 'output'"),
    ],
)
def test_bad_lines_end_with_one_line_and_code_2(tmp_path, capsys, content, pattern):
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    assert main(["--explain", "--data", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"{path}:1: ") and pattern in err, err


def test_bad_flags_and_files_end_with_one_line_and_code_2(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff')
    for arguments, pattern in (
        (["--data", str(path)], "--explain"),
        (["--explain", "--bogus"], "--bogus"),
        (["--explain", "--line", "x"], "--line"),
        (["--explain", "--data", str(path)], f"{path}:2: found byte 0xff, expected UTF-8 text"),
        (["--explain", "--data", str(tmp_path)], "directory"),
        (["--explain", "--data", str(tmp_path / "none")], "No such file"),
    ):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        assert code == 2 and out == "" and err.count("\n") == 1 and pattern in err, err
    path.write_text("{}\n")
    for line in (0, -1, 3):
        assert main(["--explain", "--data", str(path), "--line", str(line)]) == 2
        assert f"{path}:{line}: found 2 lines, expected --line 1 to 2" in capsys.readouterr().err
