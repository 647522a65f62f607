"""Settings: defaults, file, flags, and every way to get them wrong.

An unknown flag in a process of its own: tests/model/test_hostile_folders.py.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import command_line
import run_eval
import run_ppo
import run_sft
from command_line import ConfigError, fail, parse_arguments, read_config, run_command
from eval.eval_config import EvalConfig
from rl.ppo_config import PPOConfig
from tests.support.tiny_run import tiny_files
from train.sft_config import SFTConfig

ROOT = Path(__file__).parent.parent


def read(*arguments: str) -> SFTConfig:
    return read_config(SFTConfig, "test", list(arguments))


def write(tmp_path, text: str):
    path = tmp_path / "settings.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_flags_give_the_dataclass_defaults():
    assert read() == SFTConfig()


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = write(tmp_path, '{"learning_rate": 1, "seed": 7, "dtype": "bfloat16"}')
    config = read("--config", str(path), "--seed", "9")
    assert (config.learning_rate, config.seed, config.dtype, config.epochs) == (1.0, 9, "bfloat16", 1)
    assert isinstance(config.learning_rate, float)


def test_a_written_config_reads_back_equal(tmp_path):
    config = read("--learning_rate", "3e-7", "--schedule", "linear", "--output", "x y")
    path = write(tmp_path, json.dumps(dataclasses.asdict(config)))
    assert read("--config", str(path)) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "--epoch: found an unknown flag"),  # no abbreviations either
        (["--nonsense=3"], "--nonsense: found an unknown flag"),
        (["stray"], "stray: found an unknown flag"),
        (["--epochs", "two"], "--epochs: found 'two', expected a whole number"),
        (["--epochs", "1.5"], "--epochs: found '1.5', expected a whole number"),
        (["--epochs", "0"], "--epochs: found 0, expected at least 1"),
        (["--learning_rate", "nan"], "--learning_rate: found nan, expected a finite number"),
        (["--learning_rate", "-1"], "expected at least 0.0"),
        (["--dtype", "float16"], "--dtype: found 'float16', expected one of float32, bfloat16"),
        (["--warmup_ratio", "1.5"], "expected at most 1.0"),
        (["--adam_beta2", "1"], "--adam_beta2: found 1.0, expected a value below 1"),
        (["--config", "no/such/file.json"], "no/such/file.json: found no readable file"),
        (["--epochs"], "expected one argument"),
    ],
)
def test_wrong_flags(arguments, message):
    with pytest.raises(ConfigError) as caught:
        read(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('{\n "seed": 1,\n "sede": 2\n}', 3, "found unknown key 'sede', expected one of activation_checkpointing"),
        ('{\n "seed": 1\n "epochs": 2\n}', 3, "found malformed JSON"),
        ('{\n "seed": true}', 2, "found seed = True, expected a whole number"),
        ('{"seed": "1"}', 1, "found seed = '1', expected a whole number"),
        ('{"seed": 1.0}', 1, "found seed = 1.0, expected a whole number"),
        ('{"model": null}', 1, "found model = None, expected text"),
        ('{\n\n"resume": "yes"}', 3, "found resume = 'yes', expected one of auto, never"),
        ('{"seed": 1,\n "seed": 2}', 1, "found key 'seed' 2 times"),
        ('{"learning_rate": NaN}', 1, "expected a finite number"),
        ("[1]", 1, "found a JSON list, expected an object"),
        ("", 1, "found malformed JSON"),
        ('{"seed": -1}', 1, "found seed = -1, expected at least 0"),
        ('{\n"adam_beta1": 1}', 2, "found 1.0, expected a value below 1"),
    ],
)
def test_wrong_files_name_file_and_line(tmp_path, text, line, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read("--config", str(path))
    assert str(caught.value).startswith(f"{path}:{line}: ") and message in str(caught.value)


def test_a_trailing_comma_is_an_error_at_the_comma_or_after_it(tmp_path):
    """Python 3.13 points at the comma, earlier versions at the brace that follows it."""
    path = write(tmp_path, '{\n "seed": 1,\n}')
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}:[23]: found malformed JSON "):
        read("--config", str(path))


LONG_NUMBER, SURROGATE = "9" * 5000, "\udce9"
HOSTILE_FLAGS = [
    ("--seed", LONG_NUMBER),
    ("--seed", "-" + LONG_NUMBER),
    ("--seed", str(2**64)),
    ("--seed", str(2**63)),
    ("--seed", "-1"),
    ("--seed", "x" * 5000),
    ("--seed", "1\0"),
    ("--seed", SURROGATE),
    ("--seed", "1e3"),
    ("--seed", ""),
    ("--epochs", str(10**100)),
    ("--max_steps", str(10**4000)),
    ("--learning_rate", "inf"),
    ("--learning_rate", "-inf"),
    ("--learning_rate", "nan"),
    ("--learning_rate", LONG_NUMBER),
    ("--learning_rate", "1e999"),
    ("--learning_rate", "\0"),
    ("--warmup_ratio", "nan"),
    ("--model", "a\0b"),
    ("--model", SURROGATE),
    ("--model", "a\nb"),
    ("--model", "\x1b[31mred"),
    ("--model", "x" * 5000),
    ("--data", "\x9b31m"),
    ("--output", "y" * 10**6),
    ("--dtype", "z" * 5000),
    ("--dtype", "\x1b]0;title\x07"),
    ("--" + "q" * 5000, "1"),
    ("--\x1b[2J", "1"),
    ("--config", "x" * 5000),
    ("--config", "a\0b"),
    ("--config", SURROGATE),
    ("--config", "."),
    ("--config", "/dev/zero"),
]
HOSTILE_FILES = [
    '{"seed": %s}' % LONG_NUMBER,
    '{"seed": %d}' % 2**64,
    '{"seed": -1}',
    '{"learning_rate": 1e999}',
    '{"learning_rate": -Infinity}',
    '{"learning_rate": NaN}',
    '{"learning_rate": %s}' % ("1" + "0" * 400),
    '{"seed": 1e3}',
    '{"model": "a\\u0000b"}',
    '{"model": "\\udce9"}',
    '{"model": "\\u001b[31m"}',
    '{"model": "%s"}' % ("x" * 5000),
    '{"model": ["x"]}',
    '{"model": {"a": 1}}',
    '{"model": null, "seed": 1}',
    '{"%s": 1}' % ("k" * 5000),
    '{"\\u001b[2J": 1}',
    '{"\\ud800": 1}',
    '{"%s": {}}' % ("k" * 5000),
    '{"a": {"b": 1}}',
    "{" + ", ".join(f'"k{i}": 1' for i in range(70000)) + ', "k69999": 1}',
    '{"model": ' + "[" * 100000,
    '{"a":' * 100000,
    '{"seed": 1, "seed": 1}',
    "[" * 500 + "]" * 500,
    '"text"',
    "1",
    "\ufeff{}",
    "{}" + " " * (1 << 20),
    "{\0}",
]


def check_line(text: str) -> None:
    """One line, printable ASCII, of bounded length, that says what was expected."""
    assert text.count("\n") == 1 and text.endswith("\n"), text[:300]
    assert all(" " <= each <= "~" for each in text[:-1]) and len(text) <= 2020, text[:300]
    assert "expected" in text, text


@pytest.mark.parametrize("config_class", [SFTConfig, PPOConfig, EvalConfig])
def test_hostile_settings_are_one_printable_line(config_class, tmp_path, capsys):
    """Every flag and every file of the tables, against the settings of all three commands; 2 seconds each at most."""
    cases = [[name, value] for name, value in HOSTILE_FLAGS]
    for index, content in enumerate(HOSTILE_FILES):
        (tmp_path / f"{index}.json").write_text(content, encoding="utf-8")
        cases.append(["--config", str(tmp_path / f"{index}.json")])
    (tmp_path / "bytes.json").write_bytes(b'{"model": "\xff"}')
    os.mkfifo(tmp_path / "pipe.json")
    cases += [["--config", str(tmp_path / "bytes.json")], ["--config", str(tmp_path / "pipe.json")]]
    for arguments in cases:
        start = time.monotonic()
        with pytest.raises(ConfigError) as caught:
            read_config(config_class, "test", arguments, section="sft")
        with pytest.raises(SystemExit) as stop:
            fail(caught.value)
        assert stop.value.code == 2 and time.monotonic() - start < 2.0, arguments[0][:80]
        check_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--number", LONG_NUMBER],
        ["--number", str(2**64)],
        ["--number", str(-(2**64))],
        ["--share", "nan"],
        ["--share", "-inf"],
        ["--file", "a\0b"],
        ["--file", SURROGATE],
        ["--file", "x" * 5000],
        ["--names", "good", "\x1b[31m"],
        ["--choice", "\x1b[31m" + "x" * 5000],
        ["--what", "y" * 5000],
        ["\0" * 5000],
    ],
    ids=lambda arguments: ascii(arguments)[:30],
)
def test_hostile_flags_of_small_programs_are_one_printable_line(arguments, capsys):
    parser = argparse.ArgumentParser(prog="program")
    parser.add_argument("--number", type=int)
    parser.add_argument("--share", type=float)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--choice", choices=("a", "b"))
    with pytest.raises(SystemExit) as stop:
        parse_arguments(parser, arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("program: ") and error.count("\n") == 1
    assert all(" " <= each <= "~" for each in error[:-1]) and len(error) <= 2020


def test_small_programs_take_no_beginning_of_a_flag_for_the_flag(capsys):
    parser = argparse.ArgumentParser(prog="program")
    parser.add_argument("--predictions")
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(parser, ["--prediction", "x"])
    assert capsys.readouterr().err == "program: unrecognized arguments: --prediction x (see --help)\n"


def test_the_largest_seed_is_taken():
    assert read("--seed", str(2**63 - 1)).seed == 2**63 - 1


def test_bytes_that_are_not_utf8_as_a_value():
    """Only a process of its own can be given such an argument; the other hostile values are tried in this one."""
    line = [sys.executable, "run_ppo.py", "--model", b"\xe9"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    check_line(done.stderr)


def test_deeply_nested_json_is_an_error_not_a_crash(tmp_path):
    with pytest.raises(ConfigError):
        read("--config", str(write(tmp_path, "[" * 100000)))


def test_help_has_one_line_per_field(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for field in dataclasses.fields(SFTConfig):
        found = [line for line in lines if re.match(rf"\s+--{field.name} ", line)]
        assert len(found) == 1, field.name
        assert len(found[0].split(None, 2)[2]) > 20, f"{field.name} has no explanation"


def test_a_misspelt_attribute_cannot_be_set():
    with pytest.raises(AttributeError):
        SFTConfig().learning_rte = 1.0


def test_shipped_configs_are_readable():
    for path in sorted((ROOT / "configs").glob("*.json")):
        read_config(SFTConfig, "test", ["--config", str(path)], section="sft")
        read_config(PPOConfig, "test", ["--config", str(path)], section="ppo")


def test_a_file_for_several_stages(tmp_path):
    path = write(tmp_path, '{\n "sft": {\n  "seed": 3\n },\n "ppo": {\n  "seed": 4,\n  "sede": 5\n }\n}\n')
    assert read_config(SFTConfig, "test", ["--config", str(path)], section="sft").seed == 3
    with pytest.raises(ConfigError) as caught:
        read_config(PPOConfig, "test", ["--config", str(path)], section="ppo")
    assert str(caught.value).startswith(f"{path}:7: found unknown key 'sede'")  # the line in the section of its own
    with pytest.raises(ConfigError, match="found the sections sft, ppo, expected one named eval"):
        read_config(SFTConfig, "test", ["--config", str(path)], section="eval")


def test_a_switch_may_stand_alone():
    alone = read_config(PPOConfig, "test", ["--print_ledger", "--seed", "1"])
    assert (alone.print_ledger, alone.seed) == ("on", 1)
    assert read_config(PPOConfig, "test", ["--print_ledger", "off"]).print_ledger == "off"


# ---------------------------------------------------------------------------------------------------------------------
# How programs end


@pytest.mark.parametrize("script", [run_sft, run_ppo, run_eval], ids=lambda script: script.__name__)
def test_a_device_that_is_not_there_is_named_once(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        data = [] if script is run_eval else ["--data", str(tiny_files()[1])]
        script.main(["--device", "cuda", "--model", str(tiny_files()[0]), "--output", str(tmp_path), *data])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("--device: found cuda, expected cpu or auto")
    assert error.count("\n") == 1


@pytest.mark.parametrize("rank, line", [("0", "x: found a, expected b\n"), ("3", "rank 3: x: found a, expected b\n")])
def test_every_rank_says_why_it_ends(rank, line, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(command_line, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(SystemExit) as ended:
        fail(ConfigError("x: found a,\n  expected b"))
    assert ended.value.code == 2 and capsys.readouterr().err == line


def test_a_rank_that_is_ended_with_rank_0_says_nothing():
    """torchrun ends the other ranks once rank 0 has failed; they do not repeat its line before."""
    program = "from command_line import fail; print('ready', flush=True); fail(ValueError('x'))"
    environment = {**os.environ, "RANK": "1"}
    rank1 = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True
    )
    assert rank1.stdout.readline() == "ready\n"
    time.sleep(0.1)
    rank1.terminate()
    assert rank1.communicate(timeout=60)[1] == ""


def test_a_small_program_ends_in_one_line(capsys):
    parser = argparse.ArgumentParser(prog="tool")
    parser.add_argument("--n", type=int)
    assert parse_arguments(parser, ["--n", "3"]).n == 3
    with pytest.raises(SystemExit) as ended:
        parse_arguments(parser, ["--n", "three"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "tool: --n: found 'three', expected a whole number (see --help)\n"
    parser.add_argument("--share", type=float)
    parser.add_argument("--kind", choices=("a", "b"))
    for arguments, words in (
        (["--share", "x\x1b"], r"--share: found 'x\x1b', expected a number"),
        (["--kind", "c (choose from d)"], "--kind: found 'c (choose from d)', expected 'a', 'b'"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments(parser, arguments)
        assert capsys.readouterr().err == f"tool: {words} (see --help)\n"

    def missing():
        raise FileNotFoundError("f: found\nno such file")

    assert run_command(lambda: None, (OSError,)) == 0
    assert run_command(missing, (OSError,)) == 2 and capsys.readouterr().err == "f: found no such file\n"

    def forbidden():
        raise PermissionError(13, "Permission denied", "runs/\x1bsft")

    line = "runs/\\x1bsft: found Permission denied, expected a file or folder that can be used\n"
    assert run_command(forbidden, (OSError,)) == 2 and capsys.readouterr().err == line

    def interrupted():
        raise KeyboardInterrupt

    assert run_command(interrupted, (OSError,)) == 130 and capsys.readouterr().err == "stopped by Ctrl-C\n"
    with pytest.raises(FileNotFoundError):  # a fault of the program keeps its traceback
        run_command(missing, (ConfigError,))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PermissionError(13, "Permission denied", "runs/sft"), 2, "runs/sft: found Permission denied, expected "),
        (OSError(28, "No space left on device"), 2, "the file system: found No space left on device, expected "),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
@pytest.mark.parametrize("script", ["run_sft", "run_ppo", "run_eval"])
def test_the_scripts_end_in_one_line(script, error, code, line, monkeypatch, capsys):
    def fail_at_once(*arguments, **settings):
        raise error

    module = {"run_sft": run_sft, "run_ppo": run_ppo, "run_eval": run_eval}[script]
    monkeypatch.setattr(module, "read_config", fail_at_once)
    with pytest.raises(SystemExit) as ended:
        module.main([])
    err = capsys.readouterr().err
    assert ended.value.code == code and err.startswith(line) and err.count("\n") == 1
