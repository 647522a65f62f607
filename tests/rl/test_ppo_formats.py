"""SFT, PPO and evaluation in the format of another model: a random one with a byte-level BPE tokenizer of its family.

pytest tests/rl/test_ppo_formats.py; the long proof: pytest -m very_slow tests/rl/test_ppo_formats.py
"""

import json
import shutil
from functools import cache
from statistics import fmean

import pytest

from data.formats.table import dialogue_segments
from data.tool_calls import ToolCall
from data.trajectories import read_trajectories
from model.pretrained_weights import save_pretrained
from rl.evaluate_reward import main as evaluate_reward
from tests.support.eval_runs import flags_of
from tests.support.eval_runs import run_here as run_eval_here
from tests.support.format_tokenizers import CONTROLS, byte_level_bpe
from tests.support.tiny_ppo import journal_of, make_record, run_ppo_here, write_records
from tests.support.tiny_run import CITIES, make_records, metrics_of, run_here, tiny_model

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

FORMATS = {"qwen25": "<|im_end|>", "llama31": "<|eot_id|>"}


@pytest.fixture(scope="module")
def world_of(tmp_path_factory):
    """Per format a folder: data.json, test_seen.jsonl (every tool for every city) and a random model."""
    pytest.importorskip("tokenizers", reason="needs requirements-optional.txt")

    @cache
    def make(prompt_format):
        folder = tmp_path_factory.mktemp(prompt_format)
        (folder / "data.json").write_text(json.dumps(make_records(120)), encoding="utf-8")
        trajectories = read_trajectories(folder / "data.json", unparsable_calls="error")
        tools = trajectories[0].tools
        records = [
            make_record(f"{name} {city}", f"{name} for {city}", [ToolCall(name, {"city": city})], tools)
            for name in (tool["function"]["name"] for tool in tools)
            for city in CITIES
        ]
        write_records(folder / "test_seen.jsonl", records)
        texts = [
            segment.text
            for each in trajectories
            for segment in dialogue_segments(each.tools, each.messages, prompt_format)
            if not segment.is_control
        ]
        model = tiny_model(vocab_size=800, dim=64, ffn_dim=128, head_dim=16)
        save_pretrained(model, folder / "model")
        byte_level_bpe(folder / "model", texts, family=prompt_format)
        return folder

    return make


def sft_here(world, output, prompt_format, **flags):
    defaults = {"model": world / "model", "data": world / "data.json", "global_batch_size": 4, "checkpoint_every": 0}
    return run_here(output, prompt_format=prompt_format, **{**defaults, **flags})


def ppo_here(world, output, model, **flags):
    defaults = {"max_response_tokens": 48, "prompt_turns": "all", "checkpoint_every": 0}
    return run_ppo_here(output, **{"model": model, "data": world / "test_seen.jsonl", **defaults, **flags})


@pytest.fixture(scope="module")
def sft_of(world_of, tmp_path_factory):
    """Per format a folder that two steps of SFT have left, and what they printed."""

    @cache
    def make(prompt_format):
        output = tmp_path_factory.mktemp("sft")
        code, out, err = sft_here(world_of(prompt_format), output, prompt_format, max_steps=2)
        assert (code, err) == (0, "")
        return output, out

    return make


@pytest.mark.parametrize("prompt_format", FORMATS)
def test_final_says_its_format_and_where_a_turn_ends(sft_of, prompt_format):
    output, out = sft_of(prompt_format)
    end = CONTROLS.index(FORMATS[prompt_format])  # the special tokens are the first of the vocabulary
    record = json.loads((output / "final/tl_training.json").read_text())
    assert record == {"prompt_format": prompt_format, "end_of_turn_id": end}
    assert json.loads((output / "final/config.json").read_text())["eos_token_id"] == end
    assert json.loads((output / "config.json").read_text())["prompt_format"] == prompt_format
    assert "end of turn of the exported model" in out


def test_one_iteration_in_the_format_of_the_folder(world_of, sft_of, tmp_path):
    world, (sft, _) = world_of("qwen25"), sft_of("qwen25")
    code, out, err = ppo_here(world, tmp_path, sft / "final", max_steps=1)
    assert (code, err) == (0, "")
    assert f"prompt format: qwen25, in which {sft / 'final'} was trained (tl_training.json)" in out
    assert json.loads((tmp_path / "final/tl_training.json").read_text())["prompt_format"] == "qwen25"
    assert json.loads((tmp_path / "config.json").read_text())["prompt_format"] == "qwen25"
    (first, *_) = journal_of(tmp_path, "samples.jsonl")
    assert "<tools>" in first["prompt"] and "for" in first["prompt"] and first["category"] == "unparsable"


def test_evaluation_takes_the_format_of_the_folder(world_of, sft_of, tmp_path, capsys):
    world, (sft, _) = world_of("llama31"), sft_of("llama31")
    settings = {"model": sft / "final", "max_new_tokens": 8, "limit": 3}
    code, out, err = run_eval_here(flags_of(world, tmp_path / "auto", **settings))
    assert code == 0 and "prompt format: llama31, in which" in out, err
    rows = [json.loads(line) for line in (tmp_path / "auto/predictions/tiny-seen.jsonl").read_text().splitlines()]
    assert [row["format"] for row in rows] == ["llama31"] * 3
    assert json.loads((tmp_path / "auto/summary.json").read_text())["prompt_format"] == "llama31"
    # another format is the user's choice, and said
    code, out, err = run_eval_here(flags_of(world, tmp_path / "tl", **settings, prompt_format="tl"))
    assert code == 0 and "notice: --prompt_format tl; " in out and "was trained in llama31" in out
    arguments = ["--model", str(sft / "final"), "--data", str(world / "test_seen.jsonl"), "--limit", "2"]
    assert evaluate_reward([*arguments, "--max_response_tokens", "48"]) == 0
    assert "prompt format: llama31, in which" in capsys.readouterr().out


def test_disagreements_and_bad_files_are_one_line_and_code_2(world_of, sft_of, tmp_path):
    world, (sft, _) = world_of("qwen25"), sft_of("qwen25")
    final, other = sft / "final", sft_of("llama31")[0] / "final"

    def fails(expected, code, _, err):
        assert code == 2 and err.count("\n") == 1 and expected in err, err

    fails(
        f"--prompt_format: found tl, expected qwen25, in which --model {final} was trained",
        *ppo_here(world, tmp_path / "a", final, prompt_format="tl"),
    )
    for name in ("reference_model", "critic_model"):
        fails(
            f"found qwen25, expected llama31, in which --{name} {other} was trained",
            *ppo_here(world, tmp_path / "b", final, **{name: other}),
        )
    fails("--prompt_format: found", *sft_here(world, tmp_path / "c", "xml"))
    tokens = "--prompt_format qwen25: found no token <|im_start|>, <|im_end|> in the tokenizer"
    fails(tokens, *run_here(tmp_path / "d", prompt_format="qwen25"))
    fails(tokens, *run_ppo_here(tmp_path / "e", prompt_format="qwen25"))
    for content, expected in (
        ('{"prompt_format": "openai"}', "tl_training.json: found prompt_format 'openai', expected one of tl"),
        ("[]", "tl_training.json"),
        ("{", "tl_training.json:1"),
        ("{}", "tl_training.json: found prompt_format"),
    ):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(final, folder)
        (folder / "tl_training.json").write_text(content)
        fails(expected, *run_eval_here(flags_of(world, tmp_path / "f", model=folder)))
        fails(expected, *ppo_here(world, tmp_path / "g", folder))


@pytest.mark.very_slow
@pytest.mark.parametrize("prompt_format", FORMATS)
def test_reward_rises_in_the_formats_of_qwen25_and_llama31(world_of, tmp_path, capsys, prompt_format):
    """SFT leaves a model that picks the city at random. All PPO prompts ask for one city, which PPO can learn.

    docs/reproduction.md has the figures.
    """
    world, folders = world_of(prompt_format), [tmp_path / "sft/final", tmp_path / "ppo/final"]
    code, _, err = sft_here(world, tmp_path / "sft", prompt_format, epochs=6, learning_rate=5e-3)
    assert (code, err) == (0, "")
    asked = [f"get_weather {CITIES[0]}", f"search {CITIES[0]}"]
    records = [json.loads(line) for line in (world / "test_seen.jsonl").read_text().splitlines()]
    records = [record for record in records if record["id"] in asked]
    (tmp_path / "asked").mkdir()
    write_records(tmp_path / "asked/test_seen.jsonl", records)
    repeated = [{**record, "id": f"{record['id']} {n}"} for n in range(384) for record in records]
    code, _, err = ppo_here(
        world,
        tmp_path / "ppo",
        folders[0],
        data=write_records(tmp_path / "prompts.jsonl", repeated),
        rollout_batch_size=16,
        minibatch_size=8,
        micro_batch_size=8,
        max_response_tokens=32,
        policy_learning_rate=7e-4,
        value_learning_rate=3e-3,
        kl_coef=0.03,
        critic_only_iterations=2,
        gae_lambda=1.0,
        whiten_advantages="on",
    )
    assert (code, err) == (0, "")
    rows = metrics_of(tmp_path / "ppo")
    first, last = rows[: len(rows) // 3], rows[-(len(rows) // 3) :]
    assert fmean(row["ppo/score"] for row in last) > fmean(row["ppo/score"] for row in first) + 0.3
    assert all(0 <= row["ppo/share_unparsable"] <= 1 for row in rows)

    for settings, expected_rise in ((["--temperature", "0"], 1.0), (["--samples_per_prompt", "64"], 0.3)):
        capsys.readouterr()
        options = ["--data", str(tmp_path / "asked/test_seen.jsonl"), "--max_response_tokens", "32", *settings]
        assert evaluate_reward(["--model", *map(str, folders), *options]) == 0
        after = json.loads(capsys.readouterr().out.splitlines()[-1])["models"][1]
        assert after["difference"]["mean_reward"] > expected_rise
    for folder, CF in zip(folders, (0, 2), strict=True):
        output = tmp_path / f"eval_{folder.parent.name}"
        flags = flags_of(tmp_path / "asked", output, model=folder, max_new_tokens=32)
        assert run_eval_here(flags)[0] == 0
        assert json.loads((output / "summary.json").read_text())["benchmarks"]["tiny-seen"]["CF"] == CF
