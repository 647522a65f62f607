"""What can be handed to run_ppo.py and is wrong: one line on stderr, exit code 2, nothing of an earlier run lost.

pytest tests/rl/test_ppo_bad_input.py
"""

import json
import re
import shutil

import pytest

from data.tool_calls import ToolCall
from model.pretrained_weights import save_pretrained
from tests.support.tiny_ppo import (
    ARMS,
    QUERY,
    TOOLS,
    fit,
    journal_of,
    make_record,
    policy_folder,
    ppo_data,
    prompt_ids_of,
    run_ppo_here,
    save_with_tokenizer,
    write_records,
)
from tests.support.tiny_run import make_records, tiny_model


def expect_refusal(tmp_path, pattern, **flags):
    """The run ends with code 2 and one line that matches, before any file of a run is made."""
    output = tmp_path / "refused"
    code, _, err = run_ppo_here(output, **flags)
    assert code == 2, err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert re.search(pattern, err), err
    assert not output.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def test_a_gold_call_that_does_not_parse_is_found_by_its_line(tmp_path):
    records = make_records(4)
    records[2]["conversations"][2]["content"] = 'get_weather\n{"city": '
    path = tmp_path / "train.json"
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n", encoding="utf-8")
    expect_refusal(tmp_path, rf"^{re.escape(str(path))}:4: .*found .*expected ", data=path)
    code, out, err = run_ppo_here(tmp_path / "run", data=path, unparsable_calls="mask", max_steps=1)
    assert (code, err) == (0, "") and "1 turns dropped: unparsable" in out


def test_a_held_out_record_without_gold_calls_is_found_by_its_line(tmp_path):
    records = [make_record(f"p{index}", QUERY, ARMS[:1], TOOLS) for index in range(3)]
    records[1]["gold"] = [{"calls": [{"name": "search", "arguments": "Oslo"}]}]
    path = write_records(tmp_path / "prompts.jsonl", records)
    expect_refusal(tmp_path, rf"^{re.escape(str(path))}:2: .*found .*expected ", data=path)


def test_an_empty_set_after_the_filter_comes_with_the_counts(tmp_path):
    records = [make_record("p0", QUERY, ARMS[:1], TOOLS[1:])]  # the gold tool is not offered
    path = write_records(tmp_path / "prompts.jsonl", records)
    words = r"found no prompt, expected at least one \(.*1 turns dropped: erroneous, tool_hallucination"
    expect_refusal(tmp_path, words, data=path)


def test_gold_calls_longer_than_a_response(tmp_path):
    records = [make_record(f"p{index}", QUERY, ARMS[:1], TOOLS) for index in range(3)]
    path = write_records(tmp_path / "prompts.jsonl", records)
    pattern = rf"^{re.escape(str(path))}:1 turn 0: found a gold call of \d+ tokens with EOS .*expected at most 3 "
    expect_refusal(tmp_path, pattern, data=path, max_response_tokens=3)
    gold = ToolCall("search", {"city": "Oslo " * 40})
    write_records(path, [*records, make_record("long", QUERY, [gold], TOOLS)])
    code, out, err = run_ppo_here(tmp_path / "run", data=path, max_steps=1)
    assert (code, err) == (0, "")
    assert re.search(rf"1 prompts dropped: .*the first is {re.escape(str(path))}:4 turn 0: found a gold call of", out)


def test_prompts_longer_than_the_context(tmp_path):
    folder = save_with_tokenizer(tiny_model(max_positions=80), tmp_path / "model")
    expect_refusal(tmp_path, "found no prompt.* turns dropped: longer than 56 prompt tokens", model=folder)
    expect_refusal(
        tmp_path,
        r"--max_prompt_tokens: found 60 with 24 response tokens, expected at most 80 together",
        model=folder,
        max_prompt_tokens=60,
    )
    expect_refusal(
        tmp_path,
        r"--max_response_tokens: found 124, expected fewer than 80, the context of",
        model=folder,
        max_response_tokens=124,
    )


def test_missing_and_malformed_files(tmp_path):
    expect_refusal(tmp_path, r"absent\.json", data=tmp_path / "absent.json")
    expect_refusal(tmp_path, r"absent\.json", eval_data=tmp_path / "absent.json")
    path = tmp_path / "prompts.jsonl"
    for text in ("", "{}", '{"gold": 1}\n', "[1]"):
        path.write_text(text, encoding="utf-8")
        expect_refusal(tmp_path, rf"^{re.escape(str(path))}(:\d+)?: .*found .*expected", data=path)


# ---------------------------------------------------------------------------------------------------------------------
# Models


def test_without_an_sft_model_the_line_says_how_to_make_one(tmp_path):
    expect_refusal(tmp_path, r"absent: found no such folder, expected .*python run_sft\.py", model=tmp_path / "absent")


def test_a_model_folder_without_tokenizer_or_weights(tmp_path):
    folder = tmp_path / "bare"
    save_pretrained(tiny_model(), folder)
    expect_refusal(tmp_path, "bare: found no tokenizer, expected tokenizer.model or tokenizer.json", model=folder)
    shutil.copytree(policy_folder(), tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    expect_refusal(tmp_path, "weightless.*expected", model=tmp_path / "weightless")


@pytest.mark.parametrize("role", ["critic", "reference"])
def test_a_critic_or_reference_of_another_shape(tmp_path, role):
    folder = save_with_tokenizer(tiny_model(ffn_dim=96), tmp_path / "wide")
    pattern = rf"wide: found a {role} of another shape than the policy .*ffn_dim 96 \(expected 64\)"
    expect_refusal(tmp_path, pattern, **{f"{role}_model": folder})
    expect_refusal(tmp_path, "absent", **{f"{role}_model": tmp_path / "absent"})


# ---------------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ({"minibatch_size": 5}, "--minibatch_size: found 5, expected at most rollout_batch_size = 4"),
        ({"eval_every": 2}, "--eval_every: found 2 without eval_data"),
        ({"temperature": 1e-4}, "--temperature: found 0.0001, expected 0"),
        ({"responses_per_prompt": 3}, "--responses_per_prompt: found 3, expected a divisor of rollout_batch_size = 4"),
        (
            {"responses_per_prompt": 2, "temperature": 0},
            "--responses_per_prompt: found 2 with temperature 0, expected 1: greedy responses to a prompt are the same",
        ),
        ({"cache_gib": 2e7}, "--cache_gib: found 20000000.0, expected at most 1048576"),
        ({"gpu_memory_gib": 2e7}, "--gpu_memory_gib: found 20000000.0, expected at most 1048576"),
        ({"plan_ranks": 10**12}, "--plan_ranks: found 1000000000000, expected at most 4096"),
        ({"kl_horizon": 3}, "--kl_horizon: found 3.0, expected at least rollout_batch_size = 4"),
        ({"clip_range": 0}, "--clip_range"),
        ({"gamma": 1.5}, "--gamma"),
        ({"prompt_turns": "some"}, "--prompt_turns"),
        ({"kl_beta": 1}, "--kl_beta"),
    ],
)
def test_settings_out_of_range(tmp_path, flags, pattern):
    expect_refusal(tmp_path, pattern, **flags)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is lost


def test_responses_that_are_all_truncated_are_named_and_the_run_goes_on(tmp_path):
    records = map(json.loads, ppo_data().read_text().splitlines())
    endless = fit([(prompt_ids_of(record), [50] * 24) for record in records], steps=12)
    model = save_with_tokenizer(endless, tmp_path / "model")
    code, out, err = run_ppo_here(tmp_path / "run", model=model, max_response_tokens=24)
    assert (code, err) == (0, "")
    assert out.count("warning:") == 1
    assert "warning: iteration 0: all 4 responses (share 1.00) were cut at max_response_tokens = 24" in out
    rows = journal_of(tmp_path / "run", "metrics.jsonl")
    assert [row["ppo/truncated_share"] for row in rows] == [1.0] * 3


def test_a_refused_start_leaves_an_earlier_run_as_it_was(tmp_path):
    output = tmp_path / "run"
    assert run_ppo_here(output, max_steps=1)[0] == 0
    kept = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    wide = save_with_tokenizer(tiny_model(ffn_dim=96), tmp_path / "wide")
    short = write_records(tmp_path / "short.jsonl", [make_record("p0", QUERY, ARMS[:1], TOOLS)])
    for flags, pattern in (
        ({"critic_model": wide}, "critic_sha256"),
        ({"kl_coef": 0.1}, "kl_coef = 0.05"),
        ({"data": short}, "data_sha256"),
        ({"resume": "never"}, "expected a folder without"),
        ({"data": tmp_path / "absent"}, "absent"),
        ({"minibatch_size": 9}, "minibatch_size"),
    ):
        code, _, err = run_ppo_here(output, **{"data": ppo_data(), "max_steps": 2, **flags})
        assert code == 2 and err.count("\n") == 1 and pattern in err, err
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == kept
    assert run_ppo_here(output, max_steps=2)[0] == 0
    assert [row["step"] for row in journal_of(output, "metrics.jsonl")] == [1, 2]
