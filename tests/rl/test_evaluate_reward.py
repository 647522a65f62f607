"""Evaluation of a model's reward: intervals by hand, independence of batching, the judgement of each row, the command.

pytest tests/rl/test_evaluate_reward.py
"""

import json
import math
import random
import statistics
from dataclasses import replace

import pytest
import torch

from data.tool_calls import ToolCall
from model.pretrained_weights import load_pretrained, save_pretrained
from model.sampling import generate
from model.tokenizer import load_tokenizer
from rl.evaluate_reward import (
    Sampling,
    evaluate_reward,
    format_table,
    main,
    mean_and_interval,
    paired_difference,
    response_seed,
    summarize,
)
from rl.prompts import PPOPrompt, read_prompts
from rl.reward import CATEGORIES, tool_call_reward
from tests.support.piece_tokenizer import PieceTokenizer
from tests.support.tiny_run import tiny_files, tiny_model

Z = 1.959963984540054
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {"type": "object", "properties": {key: {"type": "string"} for key in "abcd"}, "required": []},
        },
    }
    for name in ("get", "put")
]


def a_prompt(*gold_calls: ToolCall, prompt_ids=(1, 5, 6), turn=0) -> PPOPrompt:
    return PPOPrompt("p", turn, "f:1", list(prompt_ids), gold_calls, TOOLS)


def a_row(index: int, reward: float, category: str = "wrong_value", *, TS=1, PI=1, CF=0, tokens=4, ended=True) -> dict:
    return {
        "index": index,
        "reward": reward,
        "category": category,
        "TS": TS,
        "PI": PI,
        "CF": CF,
        "tokens": tokens,
        "ended": ended,
    }


def tiny_prompts(n: int) -> list[PPOPrompt]:
    model_dir, data_file = tiny_files()
    prompts, _ = read_prompts(
        data_file,
        load_tokenizer(model_dir),
        error_filter="structured",
        prompt_turns="all",
        max_prompt_tokens=2000,
        unparsable_calls="error",
    )
    return prompts[:n]


# ---------------------------------------------------------------------------------------------------------------------
# Summary


def test_interval_by_hand():
    # mean 0, deviations +-1: s = sqrt(2 / (2 - 1)), standard error s / sqrt(2) = 1
    mean, (low, high) = mean_and_interval([1.0, -1.0])
    assert mean == 0 and math.isclose(low, -Z) and math.isclose(high, Z)
    # 1, 2, 3, 4: variance 5/3, standard error sqrt(5/12)
    mean, (low, high) = mean_and_interval([4.0, 1.0, 3.0, 2.0])
    assert mean == 2.5 and math.isclose(high - mean, Z * math.sqrt(5 / 12)) and math.isclose(mean - low, high - mean)


def test_interval_covers_the_truth_about_95_times_of_100():
    source = random.Random(0)
    n_covered = 0
    for _ in range(2000):
        _, (low, high) = mean_and_interval([source.choice([-2.0, -0.5, 1.0]) for _ in range(60)])
        n_covered += low <= -0.5 <= high
    assert 0.93 < n_covered / 2000 < 0.965


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert mean_and_interval([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="found no value"):
        mean_and_interval([])


def test_summary_by_hand():
    rows = [
        a_row(0, 1.0, "correct", CF=1, tokens=6),
        a_row(0, -2.0, "unparsable", TS=0, PI=0, ended=False, tokens=8),
        a_row(1, -0.25),
        a_row(1, -0.25),
    ]
    summary = summarize(rows)
    assert (summary["n"], summary["n_prompts"], summary["truncated"], summary["mean_tokens"]) == (4, 2, 1, 5.5)
    assert (summary["TS"], summary["PI"], summary["CF"]) == (3, 3, 1)
    assert tuple(summary["categories"]) == CATEGORIES and sum(summary["categories"].values()) == 4
    assert summary["categories"]["wrong_value"] == 2
    # prompt means -0.5 and -0.25, mean -0.375, s / sqrt(2) = 0.125
    assert math.isclose(summary["mean_reward"], -0.375)
    assert math.isclose(summary["interval_95"][1], -0.375 + Z * 0.125)


def test_equal_answers_to_one_prompt_do_not_narrow_the_interval():
    """Ten copies of each response are no more evidence than one: prompts are the units."""
    rows = [a_row(index, reward) for index, reward in enumerate((1.0, -2.0, -0.5))]
    assert summarize(rows * 10)["interval_95"] == pytest.approx(summarize(rows)["interval_95"], rel=1e-12)


def test_paired_difference_removes_what_the_prompts_share():
    source = random.Random(1)
    easiness = [source.uniform(-2, 1) for _ in range(30)]
    first = [a_row(index, reward) for index, reward in enumerate(easiness)]
    second = [a_row(index, reward + 0.1 + 0.01 * source.random()) for index, reward in enumerate(easiness)]
    difference = paired_difference(second, first)
    gains = [b["reward"] - a["reward"] for a, b in zip(first, second, strict=True)]
    half_width = Z * statistics.stdev(gains) / math.sqrt(30)
    assert difference["mean_reward"] == pytest.approx(statistics.mean(gains))
    assert difference["interval_95"] == pytest.approx(
        [statistics.mean(gains) - half_width, statistics.mean(gains) + half_width]
    )
    with pytest.raises(ValueError, match="30 and 29 prompts"):
        paired_difference(second, first[:29])


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.fixture(scope="module")
def tiny():
    model_dir, _ = tiny_files()
    return load_pretrained(model_dir).eval(), load_tokenizer(model_dir)


SAMPLING = Sampling(temperature=1.0, max_response_tokens=12, samples_per_prompt=2, seed=3)
GREEDY = replace(SAMPLING, temperature=0.0, samples_per_prompt=1)


def test_sampled_rows_do_not_depend_on_the_other_prompts(tiny):
    prompts = tiny_prompts(7)
    rows = evaluate_reward(*tiny, prompts, SAMPLING)
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(7) for s in range(2)]
    alone = evaluate_reward(*tiny, prompts[4:6][::-1], SAMPLING)
    assert [{**row, "index": 5 - row["index"]} for row in alone] == rows[10:12] + rows[8:10]
    assert len({row["output"] for row in rows[8:10]}) == 2, "two samples of one prompt are two draws"
    other_seed = evaluate_reward(*tiny, prompts, replace(SAMPLING, seed=4))
    assert [row["output"] for row in other_seed] != [row["output"] for row in rows]


def test_greedy_rows_are_what_generate_gives(tiny):
    model, tokenizer = tiny
    prompts = tiny_prompts(3)
    rows = evaluate_reward(*tiny, prompts, GREEDY)
    for prompt, row in zip(prompts, rows, strict=True):
        [(ids, _)] = generate(model, [prompt.prompt_ids], max_new_tokens=12, eos_id=tokenizer.eos_id)
        assert row["tokens"] == len(ids) and row["ended"] == (ids[-1] == tokenizer.eos_id)
        assert row["output"] == tokenizer.decode(ids[:-1] if row["ended"] else ids)
        expected = tool_call_reward(row["output"], prompt.gold_calls, prompt.tools).reward if row["ended"] else -2.0
        assert row["reward"] == expected


def test_several_samples_without_randomness_are_refused():
    for samples_per_prompt, temperature in ((2, 0.0), (0, 1.0)):
        with pytest.raises(ValueError, match="samples_per_prompt"):
            Sampling(temperature, max_response_tokens=2, samples_per_prompt=samples_per_prompt, seed=0)


def rows_of_texts(monkeypatch, texts: list[str], prompts: list[PPOPrompt], *, with_eos: bool = True) -> list[dict]:
    """evaluate_reward of a model that answers `texts`."""
    tokenizer = PieceTokenizer()
    answers = [tokenizer.encode(text) + [tokenizer.eos_id] * with_eos for text in texts]
    monkeypatch.setattr("rl.evaluate_reward.generate", lambda *_, **__: [(ids, [0.0] * len(ids)) for ids in answers])
    return evaluate_reward(tiny_model(), tokenizer, prompts, GREEDY)


@pytest.mark.parametrize(
    ("text", "category", "reward", "accuracies"),
    [
        ('get(a="x", b="y")', "correct", 1.0, (1, 1, 1)),
        ('get(a="x", b="z")', "wrong_value", -0.25, (1, 1, 0)),
        ('get(a="x")', "missing_parameter", -0.5, (1, 0, 0)),
        ('get(a="x", b="y", q=1)', "hallucinated_parameter", -0.8, (1, 0, 0)),
        ('put(a="x", b="y")', "wrong_tool", -1.5, (0, 0, 0)),
        ('fly(a="x", b="y")', "hallucinated_tool", -2.0, (0, 0, 0)),
        ('get(a="x", b="y") then', "unparsable", -2.0, (0, 0, 0)),
    ],
)
def test_judgement_of_a_row(monkeypatch, text, category, reward, accuracies):
    [row] = rows_of_texts(monkeypatch, [text], [a_prompt(ToolCall("get", {"a": "x", "b": "y"}))])
    assert (row["category"], row["reward"], row["output"]) == (category, reward, text)
    assert (row["TS"], row["PI"], row["CF"]) == accuracies and row["ended"] is True


def test_tool_counts_as_found_although_another_gold_call_gives_the_better_reward(monkeypatch):
    """Three parameter faults of the right tool (-1.8) lose against a wrong tool (-1.5): TS must not."""
    prompt = a_prompt(ToolCall("put", {}), ToolCall("get", {"a": "x"}))
    [row] = rows_of_texts(monkeypatch, ['get(b="x", q="y")'], [prompt])
    assert (row["category"], row["reward"], row["TS"], row["PI"]) == ("wrong_tool", -1.5, 1, 0)


def test_a_response_cut_at_the_limit_keeps_its_last_token(monkeypatch):
    prompt = a_prompt(ToolCall("get", {"a": "x"}))
    [row] = rows_of_texts(monkeypatch, ['get(a="x")'], [prompt], with_eos=False)
    assert (row["category"], row["ended"], row["output"]) == ("unparsable", False, 'get(a="x")')
    assert (row["reward"], row["TS"], row["PI"], row["CF"]) == (-2.0, 0, 0, 0)  # the turn never ends
    assert summarize([row])["truncated"] == 1


def test_seeds_of_neighbours_differ():
    seeds = {
        response_seed(seed, a_prompt(turn=turn), sample)
        for seed in range(20)
        for turn in range(20)
        for sample in range(20)
    }
    assert len(seeds) == 8000 and all(0 <= seed < 2**63 for seed in seeds)


# ---------------------------------------------------------------------------------------------------------------------
# Command


def run_main(capsys, *flags: object) -> tuple[int, str, str]:
    try:
        code = main([str(flag) for flag in flags])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_command_compares_models_side_by_side(capsys, tmp_path):
    model_dir, data_file = tiny_files()
    other = tmp_path / "other"
    save_pretrained(tiny_model(seed=1), other)
    (other / "tokenizer.model").write_bytes((model_dir / "tokenizer.model").read_bytes())
    rows_file = tmp_path / "new" / "rows.jsonl"
    code, out, err = run_main(
        capsys,
        "--model",
        model_dir,
        other,
        model_dir,
        "--data",
        data_file,
        "--limit",
        4,
        "--max_response_tokens",
        5,
        "--samples_per_prompt",
        2,
        "--output",
        rows_file,
    )
    assert code == 0 and err == "" and out.isascii()
    result = json.loads(out.splitlines()[-1])
    first, second, again = result["models"]
    assert (result["temperature"], result["limit"], first["n"], first["n_prompts"]) == (1.0, 4, 8, 4)
    assert first["model"] == str(model_dir) and second["model"] == str(other)
    assert "difference" not in first and "interval_95" in second["difference"]
    assert again["difference"] == {"mean_reward": 0.0, "interval_95": [0.0, 0.0]}, "equal models get equal numbers"
    assert {key: again[key] for key in first} == first
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert len(rows) == 24 and {row["model"] for row in rows} == {str(model_dir), str(other)}
    assert summarize(rows[:8])["mean_reward"] == first["mean_reward"]
    assert str(other) in out and "wrong_tool" in out and "paired by prompt" in out


def test_table_columns_stand_under_their_titles():
    rows = [a_row(index, 1.0, "correct", CF=1) for index in range(4)]
    summary = {"model": "m", **summarize(rows)}
    lines = format_table([summary, {**summary, "model": "a/longer/name"}]).splitlines()
    assert len({len(line) for line in lines[:3]}) == 1 and len({len(line) for line in lines[4:7]}) == 1
    assert lines[5].endswith("100.0") and lines[4].endswith("correct")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "nowhere", "--data", "DATA"), "nowhere"),
        (("--model", "MODEL", "--data", "missing.json"), "missing"),
        (("--model", "MODEL", "--data", "DATA", "--temperature", "-1"), "--temperature: found -1.0"),
        (("--model", "MODEL", "--data", "DATA", "--temperature", "nan"), "--temperature: found nan"),
        (
            ("--model", "MODEL", "--data", "DATA", "--temperature", "0", "--samples_per_prompt", "2"),
            "--samples_per_prompt",
        ),
        (
            ("--model", "MODEL", "--data", "DATA", "--max_response_tokens", "2048"),
            "fewer than the model's 2048 positions",
        ),
        (("--model", "MODEL", "--data", "DATA", "--max_response_tokens", "2030"), "44 turns dropped: longer than 18"),
        (("--model", "MODEL", "--data", "DATA", "--output", "."), "found the folder"),
        (("--model", "MODEL", "--data", "DATA", "--limit", "-1"), "--limit: found -1"),
        (("--model", "MODEL", "--data", "DATA", "--colour", "red"), "unrecognized arguments"),
        (("--data", "DATA"), "--model"),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, flags, message):
    model_dir, data_file = tiny_files()
    names = {"MODEL": model_dir, "DATA": data_file}
    code, _, err = run_main(capsys, *(names.get(flag, flag) for flag in flags))
    assert code == 2 and err.count("\n") == 1 and message in err and "Traceback" not in err


def test_models_whose_tokenizers_leave_other_turns_are_not_compared(capsys, monkeypatch):
    """A turn that is too long for one model only would be scored for the other only."""
    model_dir, data_file = tiny_files()
    seen = []

    def shrinking(path, tokenizer, **settings):
        prompts, notes = read_prompts(path, tokenizer, **settings)
        seen.append(path)
        return prompts[len(seen) - 1 :], notes

    monkeypatch.setattr("rl.evaluate_reward.read_prompts", shrinking)
    code, _, err = run_main(capsys, "--model", model_dir, model_dir, "--data", data_file)
    assert code == 2 and "expected the same turns" in err


def test_a_rank_without_prompts_has_no_rows(tiny):
    assert evaluate_reward(*tiny, [], SAMPLING) == []
    assert evaluate_reward(*tiny, [], GREEDY) == []


def test_no_gradient_is_kept(tiny):
    model, tokenizer = tiny
    evaluate_reward(model, tokenizer, tiny_prompts(1), SAMPLING)
    assert torch.is_grad_enabled() and all(parameter.grad is None for parameter in model.parameters())
