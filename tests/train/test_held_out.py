"""train/held_out.py: parts of a turn and losses by hand, right calls as the reward sees them, a run left untouched."""

import json
import re

import pytest
import torch

from data.tool_calls import ToolCall
from data.trajectories import read_trajectories
from model.pretrained_weights import load_pretrained
from model.tokenizer import load_tokenizer
from rl.evaluate_reward import Sampling, evaluate_reward
from rl.prompts import read_prompts
from tests.support.format_tokenizers import bundled_with_controls
from tests.support.processes import run
from tests.support.tiny_ppo import policy_folder, ppo_data
from tests.support.tiny_run import ROOT, arguments, digest_of_final, metrics_of, run_here, tiny_files, tiny_model
from train.distributed import init_world
from train.held_out import PARTS, best_line, evaluate_held_out, is_right_call, read_held_out
from train.sft_config import SFTConfig


@pytest.fixture
def world():
    return init_world("cpu")


def held_out_rows(output):
    rows = [json.loads(line) for line in (output / "held_out.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def metrics_without_times(output):
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in metrics_of(output)]


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def test_parts_of_a_turn_by_hand(tmp_path):
    """The turn that README shows: | |[compare]|_|cabin|_|[remote]|(|day|="|August| |1|6|")|</s>|, [] are key tokens."""
    record = json.loads((ROOT / "assets/tiny_data/train.json").read_text())[15]
    (tmp_path / "one.json").write_text(json.dumps([record]))
    tokenizer = load_tokenizer(ROOT / "assets/tiny_model")
    for key_tokens in ("on", "off"):  # the part does not depend on what training weighs
        config = SFTConfig(eval_data=str(tmp_path / "one.json"), key_tokens=key_tokens)
        held_out, notes = read_held_out(config, tokenizer)
        name = ["text", "key", "name", "name", "name", "key"]
        assert list(held_out.rows[0].parts[:15]) == [*name, *["arguments"] * 8, "eos"]
        assert len(held_out.rows[0].parts) == held_out.rows[0].encoded.trained_tokens
        counts = "28 trained tokens (key 3, name 3, arguments 18, text 2, eos 2)"  # with finish(answer="...")
        assert notes == [
            "held-out data: turns masked by error_filter=structured: tool_call_failure 1",
            f"held-out data: 1 trajectories, {counts}, 2 calls",
        ]


def test_what_is_masked_or_not_used_is_counted(tmp_path):
    """Every third of the 22 trajectories has a call with a parameter that its tool lacks; one more is all masked."""
    records = json.loads(tiny_files()[1].read_text())
    turns = [{"role": "assistant", "content": "nope\n{}"}, {"role": "function", "content": "x"}]
    records.append({"id": "all masked", "conversations": [*records[0]["conversations"][:2], *turns]})
    (tmp_path / "data.json").write_text(json.dumps(records))
    notes = read_held_out(SFTConfig(eval_data=str(tmp_path / "data.json")), load_tokenizer(tiny_files()[0]))[1]
    assert notes[:2] == [
        "held-out data: dropped 1 of 23 trajectories, without a trained turn: all masked",
        "held-out data: turns masked by error_filter=structured: parameter_hallucination 8, tool_hallucination 1",
    ]


def test_parts_in_a_format_with_text_before_the_name(tmp_path):
    """qwen25 writes `<tool_call>\\n{"name": "get_weather", "arguments": ...`: only the name is name or key."""
    tokenizer = bundled_with_controls(tmp_path)
    config = SFTConfig(eval_data=str(tiny_files()[1]), prompt_format="qwen25")
    row = read_held_out(config, tokenizer)[0].rows[1]  # without a failed call
    ids = [row.encoded.target_ids[i] for i, weight in enumerate(row.encoded.loss_weights) if weight > 0]
    of_call = list(zip(ids, row.parts, strict=True))[: row.parts.index("eos") + 1]
    texts = {
        part: tokenizer.decode([token for token, name in of_call if {"key": "name"}.get(name, name) == part])
        for part in ("text", "name", "arguments")
    }
    name = next(message.call.name for message in read_trajectories(tiny_files()[1])[1].messages if message.call)
    assert texts["text"].strip() == '<tool_call>\n{"name": "'
    assert texts["name"].strip() == name
    assert texts["arguments"].startswith('", "arguments": {"city": ') and of_call[-1][1] == "eos"


# ---------------------------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_losses_are_plain_means_of_the_tokens_of_each_part(world, micro_batch_size):
    """Against log_softmax in fp64, row by row, without packing."""
    config = SFTConfig(eval_data=str(tiny_files()[1]), eval_limit=2, micro_batch_size=micro_batch_size)
    held_out, _ = read_held_out(config, load_tokenizer(tiny_files()[0]))
    model = tiny_model()
    line = evaluate_held_out(config, model, held_out, world)
    losses = {name: [] for name in PARTS}
    double = tiny_model().double()
    for row in held_out.rows:
        logits_TV = double(torch.tensor([list(row.encoded.input_ids)]))[0]
        losses_T = -torch.log_softmax(logits_TV, -1)[range(len(row.encoded)), list(row.encoded.target_ids)]
        trained = [position for position, weight in enumerate(row.encoded.loss_weights) if weight > 0]
        for position, part in zip(trained, row.parts, strict=True):
            losses[part].append(losses_T[position].item())
    for name, values in losses.items():
        expected = pytest.approx(sum(values) / len(values), rel=1e-5) if values else None
        assert line[f"held_out/loss_{name}"] == expected
    everything = sum(losses.values(), [])
    assert line["held_out/loss"] == pytest.approx(sum(everything) / len(everything), rel=1e-5)
    assert (line["held_out/tokens"], line["held_out/calls"]) == (len(everything), 2)


def test_right_calls_are_those_that_the_reward_calls_correct(world):
    """Another reader of the same file, and another judge: rl/evaluate_reward.py, greedy."""
    model_dir = policy_folder()
    tokenizer, model = load_tokenizer(model_dir), load_pretrained(model_dir)
    held_out, _ = read_held_out(SFTConfig(eval_data=str(ppo_data())), tokenizer)
    n_right = evaluate_held_out(SFTConfig(), model, held_out, world)["held_out/right_calls"]
    prompts, _ = read_prompts(
        ppo_data(),
        tokenizer,
        error_filter="structured",
        prompt_turns="all",
        max_prompt_tokens=2000,
        unparsable_calls="error",
    )
    assert [prompt.prompt_ids for prompt in prompts] == [prompt.prompt_ids for prompt in held_out.prompts]
    rows = evaluate_reward(model, tokenizer, prompts, Sampling(0.0, 24, samples_per_prompt=1, seed=0))
    assert n_right == sum(row["CF"] for row in rows)
    assert 0 < n_right  # the comparison is not about nothing


@pytest.mark.parametrize(
    ("output", "is_right"),
    [
        (' f(a=1, b="x")', True),
        (' f(b="x", a=1)', True),
        (' g(a=1, b="x")', False),
        (" f(a=1)", False),
        (' f(a=1, b="x", c=2)', False),
        (' f(a=1.0, b="x")', False),
        (' f(a=true, b="x")', False),
        (' f(a="1", b="x")', False),
        (' f(a=1, b="x") and more', False),
        (" h()", True),  # the second gold call
        ("", False),
    ],
)
def test_right_calls_by_hand(output, is_right):
    golds = (ToolCall("f", {"a": 1, "b": "x"}), ToolCall("h", {}))
    assert is_right_call(output, golds, "tl") == is_right


def line_of(step, right, loss, tokens=10):
    return {"step": step, "held_out/right_calls": right, "held_out/loss": loss, "held_out/tokens": tokens} | {
        "held_out/calls": 5
    }


def test_the_best_line():
    lines = [line_of(0, 0, 0.1), line_of(10, 3, 0.5), line_of(20, 3, 0.4), line_of(30, 3, 0.4)]
    assert best_line(lines)["step"] == 20
    assert best_line([*lines, line_of(40, 4, 9.0)])["step"] == 40
    assert best_line([*lines, line_of(40, 1, 9.0, tokens=11)])["step"] == 40  # about other data


# ---------------------------------------------------------------------------------------------------------------------
# In a run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without held-out data."""
    output = tmp_path_factory.mktemp("plain") / "run"
    assert run_here(output, max_steps=6)[0] == 0
    return output


def test_a_run_learns_the_same_with_and_without(plain, tmp_path):
    output, flags = tmp_path / "run", {"eval_data": ppo_data(), "eval_every": 2, "eval_limit": 3}
    code, out, err = run_here(output, max_steps=6, **flags)
    assert (code, err) == (0, "")
    assert digest_of_final(output) == digest_of_final(plain)
    assert metrics_without_times(output) == metrics_without_times(plain)
    rows = held_out_rows(output)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert json.loads((output / "held_out_best.json").read_text())["step"] == best_line(rows)["step"]
    assert len(re.findall(r"^step \d: held-out loss \d+\.\d{4}, \d of 3 calls right; the best ", out, re.M)) == 4
    documented = set(re.findall(r"^\| `([a-z_/0-9]+)` \|", (ROOT / "docs/metrics.md").read_text(), re.M))
    assert {*rows[0], "time/held_out_seconds"} <= documented
    # stopped and resumed, with a line too many in between: each step once, the same figures
    stopped = tmp_path / "stopped"
    assert run_here(stopped, max_steps=3, **flags)[0] == 0
    with open(stopped / "held_out.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "held_out/loss": 0.0}\n{"step":')
    (stopped / "finished.json").unlink()
    assert run_here(stopped, max_steps=6, **flags)[0] == 0
    assert [row["step"] for row in held_out_rows(stopped)] == [0, 2, 3, 4, 6]
    assert [row for row in held_out_rows(stopped) if row["step"] != 3] == rows
    assert digest_of_final(stopped) == digest_of_final(plain)


@pytest.mark.slow
def test_two_ranks_share_the_data(plain, tmp_path):
    flags = {"max_steps": 3, "eval_data": ppo_data(), "eval_limit": 5}
    assert run_here(tmp_path / "one", **flags)[0] == 0
    for name, more in (("two", flags), ("two_without", {"max_steps": 3})):
        code, _, err = run("run_sft", arguments(tmp_path / name, **more), ranks=2)
        assert code == 0, err
    assert digest_of_final(tmp_path / "two") == digest_of_final(tmp_path / "two_without")
    for row, other in zip(held_out_rows(tmp_path / "two"), held_out_rows(tmp_path / "one"), strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            assert value == (None if other[key] is None else pytest.approx(other[key], rel=1e-3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found No such file or directory, expected"),
        ('{"id": "a", "tools": [], "messages": [], "gold": []}', ":1: found no message"),
        (
            '{"id": "a", "tools": [], "messages": [{"role": "user", "content": "x"}], "gold": []}',
            "found 0 trajectories",
        ),
    ],
)
def test_bad_held_out_data_ends_the_run_before_it_begins(tmp_path, content, message):
    path = tmp_path / "held_out.jsonl"
    if content is not None:
        path.write_text(content)
    code, out, err = run_here(tmp_path / "run", eval_data=path)
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"{path}:") and message in err, err
    assert not (tmp_path / "run").exists()
