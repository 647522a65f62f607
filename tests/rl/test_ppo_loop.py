"""The loop on a tiny model: what must hold at the first update, over micro-batches, ranks, epochs, signals and faults.

pytest tests/rl/test_ppo_loop.py
"""

import inspect
import os
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import run_ppo
from model.pretrained_weights import load_pretrained, load_value_model
from rl import models as rl_models
from rl import ppo_loop, rollout
from rl.ppo_config import PPOConfig
from rl.rollout import response_logprobs
from tests.support.tiny_ppo import (
    journal_of,
    policy_folder,
    ppo_arguments,
    ppo_data,
    run_on_ranks,
    run_ppo_here,
    save_with_tokenizer,
)
from tests.support.tiny_run import digest_of_final
from train.checkpoint import CheckpointError, CheckpointSaver, TrainerState
from train.distributed import local_part, reshard_all
from train.optimizer import schedule_factor, warmup_steps_of

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds

# 2 epochs of 11 prompts in iterations of 4, 4 and 3
LONG = {"epochs": 2, "checkpoint_every": 1, "eval_data": ppo_data(), "eval_limit": 3, "eval_every": 2}
JOURNALS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")


def run(output, **flags):
    """The metrics of a run that has to succeed."""
    code, _, err = run_ppo_here(output, **flags)
    assert (code, err) == (0, ""), err
    return journal_of(output, "metrics.jsonl")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run to compare with."""
    output = tmp_path_factory.mktemp("straight") / "run"
    run(output, **LONG)
    return output


def assert_same_run(output, straight):
    for name in JOURNALS:
        assert journal_of(output, name) == journal_of(straight, name)
    assert digest_of_final(output) == digest_of_final(straight)


def assert_close(rows, others, *, rel, abs_):
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=rel, abs=abs_), (row["step"], name)


def weights_of(folder):
    return dict(load_pretrained(folder).named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# First update and journals


def test_the_first_update_starts_from_ratio_1_and_no_kl(straight):
    first = journal_of(straight, "metrics.jsonl")[0]
    for name in ("max_ratio_deviation", "clip_fraction", "approx_kl", "kl_k1", "kl_k2", "kl_k3", "kl_sequence"):
        assert first[f"ppo/{name}"] == 0.0, name
    assert first["ppo/policy_grad_norm"] > 0 and first["ppo/value_grad_norm"] > 0 and first["ppo/value_mean"] == 0.0


def test_one_pass_in_one_minibatch_is_on_policy_in_every_iteration(straight):
    rows = journal_of(straight, "metrics.jsonl")
    for row in rows:
        assert row["ppo/max_ratio_deviation"] == row["ppo/clip_fraction"] == row["ppo/approx_kl"] == 0.0
        assert row["ppo/sampler_logprob_difference"] < 1e-5
    assert rows[-1]["ppo/kl_k3"] > 0  # and yet it learns


def test_bfloat16_measures_and_updates_with_the_same_bits(tmp_path):
    """The tolerance of the first update is one of float32: another kernel in either place is off by a hundred times."""
    rows = run(tmp_path / "run", dtype="bfloat16", activation_checkpointing="on", max_steps=2)
    assert [row["ppo/max_ratio_deviation"] for row in rows] == [0.0, 0.0]
    assert rows[0]["ppo/kl_k3"] == 0.0 < rows[1]["ppo/kl_k3"]


def test_models_in_host_memory_make_the_same_run(straight, tmp_path):
    """All three; on one rank in float32 they are otherwise not sharded at all."""
    rows = run(tmp_path / "run", epochs=2, max_steps=2, offload="on", checkpoint_every=1)
    rows = run(tmp_path / "run", epochs=2, max_steps=4, offload="off", checkpoint_every=1)
    assert rows == journal_of(straight, "metrics.jsonl")[:4]


def test_gradients_of_one_model_at_a_time(tmp_path, monkeypatch, kept_models):
    """Policy first, then critic, with two micro-batches each."""
    seen = []

    def watched(backward, role):
        def call(config, models, *rest):
            held = [name for name in ("policy", "critic") if any(p.grad is not None for p in of(models, name))]
            seen.append((role, held))
            return backward(config, models, *rest)

        return call

    def of(models, name):
        return getattr(models, name).parameters()

    monkeypatch.setattr(ppo_loop, "backward_policy", watched(ppo_loop.backward_policy, "policy"))
    monkeypatch.setattr(ppo_loop, "backward_value", watched(ppo_loop.backward_value, "critic"))
    run(tmp_path / "run", max_steps=1)
    assert seen == [("policy", []), ("policy", ["policy"]), ("critic", []), ("critic", ["critic"])]
    assert not any(p.grad is not None for name in ("policy", "critic") for p in of(kept_models[0], name))


def test_a_fault_of_the_critic_is_said_to_be_its(tmp_path, monkeypatch):
    original = ppo_loop.value_loss
    monkeypatch.setattr(ppo_loop, "value_loss", lambda *a: (original(*a)[0] * float("nan"), original(*a)[1]))
    code, _, err = run_ppo_here(tmp_path / "run")
    assert code == 2 and err.count("\n") == 1
    assert "step 1: found ppo/value_loss nan, ppo/value_grad_norm nan" in err and "of the value model" in err
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_every_response_is_journaled_once(straight):
    rows, samples = journal_of(straight, "metrics.jsonl"), journal_of(straight, "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [sample["iteration"] for sample in samples] == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 4 + [4] * 4 + [5] * 3
    for epoch in (samples[:11], samples[11:]):
        assert sorted(sample["id"] for sample in epoch) == sorted(f"p{index}" for index in range(11))
    for row in rows:
        mine = [sample for sample in samples if sample["step"] == row["step"]]
        assert row["ppo/score"] == pytest.approx(sum(sample["reward"] for sample in mine) / len(mine))
        assert row["ppo/share_correct"] == sum(sample["category"] == "correct" for sample in mine) / len(mine)
        assert row["ppo/kl_sequence"] == pytest.approx(sum(sample["kl"] for sample in mine) / len(mine), abs=1e-6)
    assert [line["step"] for line in journal_of(straight, "evaluations.jsonl")] == [0, 2, 4, 6]


def test_the_docstring_numbers_the_steps_as_the_code_does():
    """And every step takes what the one before returned: nothing of the rollout is written twice."""
    stated = re.findall(r"^    (\d \w+)  ", ppo_loop.__doc__, re.MULTILINE)
    body = inspect.getsource(ppo_loop.run_iteration)
    assert re.findall(r"^    # (\d \w+)$", body, re.MULTILINE) == stated
    assert stated == ["1 sample", "2 judge", "3 measure", "4 credit", "5 update"]
    calls = re.findall(r"\b(sample_responses|judge_responses|measure_responses|credit_responses|update_models)\(", body)
    assert [call.split("_")[0] for call in calls] == [step[2:] for step in stated]


# ---------------------------------------------------------------------------------------------------------------------
# Micro-batches and ranks


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_micro_batches_change_rounding_only(straight, tmp_path, micro_batch_size):
    rows = run(tmp_path / "run", epochs=2, max_steps=3, micro_batch_size=micro_batch_size)
    assert_close(rows, journal_of(straight, "metrics.jsonl")[:3], rel=1e-5, abs_=2e-6)
    samples = journal_of(straight, "samples.jsonl")[:11]
    for sample, other in zip(journal_of(tmp_path / "run", "samples.jsonl"), samples, strict=True):
        assert {**sample, "kl": 0} == {**other, "kl": 0}


@pytest.mark.slow
def test_two_ranks_make_the_same_updates(tmp_path):
    """Iterations of 5, 3 and 3 responses in minibatches of 2: one rank is idle in the update on a single response.
    Iterations of 2 prompts and 1 with two responses each: rank 1 is idle in the whole last one."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(ppo_data().read_text().splitlines(keepends=True)[:3]))
    common = {
        "minibatch_size": 2,
        "ppo_epochs": 2,
        "whiten_advantages": "on",
        "entropy_coef": 0.01,
        "save_critic": "on",
        "checkpoint_every": 0,
    }
    cases = {
        "all": (common | {"rollout_batch_size": 5}, [0] * 6 + [1] * 4 + [2] * 4),
        "few": (common | {"rollout_batch_size": 4, "responses_per_prompt": 2, "data": few}, [0] * 4 + [1] * 2),
    }
    commands = [ppo_arguments(tmp_path / f"{name} on 2", **settings) for name, (settings, _) in cases.items()]
    results = run_on_ranks(tmp_path, 2, commands)
    assert all(code == 0 for rank in results for code, _, _ in rank), results
    assert [out for _, out, _ in results[1]] == ["", ""]  # rank 1 prints nothing
    for name, (settings, iterations) in cases.items():
        single = run(tmp_path / name, **settings)
        assert [row["iteration"] for row in single] == iterations
        assert_same_updates(tmp_path / f"{name} on 2", tmp_path / name)


def assert_same_updates(output, single):
    """A run on 2 ranks and one on a single rank: the same responses, and figures and weights up to rounding."""
    rows, expected = (journal_of(folder, "metrics.jsonl") for folder in (output, single))
    assert_close(rows, expected, rel=1e-4, abs_=1e-4)
    assert rows[0]["ppo/max_ratio_deviation"] == expected[0]["ppo/max_ratio_deviation"] == 0.0
    responses = [
        sorted((row["id"], row["response"]) for row in journal_of(folder, "samples.jsonl"))
        for folder in (output, single)
    ]
    assert responses[0] == responses[1]
    for load, name in ((load_pretrained, "final"), (load_value_model, "critic")):
        ours, others = (dict(load(folder / name).named_parameters()) for folder in (output, single))
        assert ours.keys() == others.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, others[key], rtol=0, atol=1e-4, msg=key)


@pytest.mark.very_slow
def test_groups_of_shards_make_the_same_updates(tmp_path):
    """4 ranks in 2 groups; minibatches of 4 and, in the last iteration, of 3: then one rank only holds shards."""
    settings = {"ppo_epochs": 2, "save_critic": "on", "checkpoint_every": 0}
    single = run(tmp_path / "single", **settings)
    results = run_on_ranks(tmp_path, 4, [ppo_arguments(tmp_path / "groups", **settings, shard_group_size=2)])
    assert all(code == 0 for rank in results for code, _, _ in rank), results
    assert_close(journal_of(tmp_path / "groups", "metrics.jsonl"), single, rel=1e-4, abs_=1e-4)
    for load, name in ((load_pretrained, "final"), (load_value_model, "critic")):
        ours, others = (dict(load(tmp_path / run / name).named_parameters()) for run in ("groups", "single"))
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, others[key], rtol=0, atol=1e-4, msg=key)


# ---------------------------------------------------------------------------------------------------------------------
# Steps, schedule, coefficients


def test_the_log_states_the_sizes_of_an_epoch_with_their_steps():
    config = PPOConfig(rollout_batch_size=8, minibatch_size=8)
    assert ppo_loop.describe_epoch(1217, config) == "each epoch: 153 iterations (151 of 8, 1 of 5, 1 of 4 responses)"
    assert ppo_loop.count_steps(1217, config) == [1] * 153
    assert ppo_loop.describe_epoch(5, config) == "each epoch: 1 iteration (1 of 5 responses)"
    config = PPOConfig(rollout_batch_size=32, minibatch_size=8, ppo_epochs=2)
    assert ppo_loop.count_steps(65, config) == [2 * 4, 2 * 3, 2 * 2]  # 32, then 17 by 8 and 16 by 8


def test_epochs_minibatches_and_the_schedule_count_optimizer_steps(tmp_path):
    settings = {"ppo_epochs": 2, "minibatch_size": 2, "warmup_ratio": 0.25, "checkpoint_every": 0}
    rows = run(tmp_path / "run", **settings)
    # 4 responses: 2 minibatches twice; 3 responses: 2 + 1, twice
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["iteration"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert warmup_steps_of(0.25, 12) == 3
    for row in rows:
        factor = schedule_factor(row["step"], 12, 3, "cosine")
        assert row["ppo/policy_learning_rate"] == pytest.approx(1e-3 * factor)
        assert row["ppo/value_learning_rate"] == pytest.approx(1e-2 * factor)
    deviations = [row["ppo/max_ratio_deviation"] for row in rows]
    assert deviations[0] == deviations[4] == deviations[8] == 0.0  # the first minibatch of each rollout
    assert min(deviations[1:4] + deviations[5:8] + deviations[9:]) > 0.0
    # max_steps ends with a whole iteration and keeps the schedule
    assert run(tmp_path / "short", **settings, max_steps=5) == rows[:8]
    assert run(tmp_path / "short", **settings) == rows


def test_several_responses_per_prompt_and_a_resumed_run(tmp_path):
    """11 prompts by 2: iterations of 2, 2, 2, 2, 2 and 1 prompts with two responses each, in one minibatch."""
    settings = {"responses_per_prompt": 2, "ppo_epochs": 2, "whiten_advantages": "on", "checkpoint_every": 0}
    rows = run(tmp_path / "run", **settings)
    assert [row["iteration"] for row in rows] == [number for number in range(6) for _ in range(2)]
    assert rows[0]["ppo/max_ratio_deviation"] == rows[0]["ppo/kl_k3"] == 0.0
    samples = journal_of(tmp_path / "run", "samples.jsonl")
    assert [one["id"] for one in samples[::2]] == [other["id"] for other in samples[1::2]]
    assert sorted(one["id"] for one in samples[::2]) == sorted(f"p{index}" for index in range(11))
    assert sum(one["response"] != other["response"] for one, other in zip(samples[::2], samples[1::2])) > 3
    run(tmp_path / "again", **settings, max_steps=5)
    assert run(tmp_path / "again", **settings) == rows
    assert journal_of(tmp_path / "again", "samples.jsonl") == samples
    assert digest_of_final(tmp_path / "again") == digest_of_final(tmp_path / "run")


def test_the_first_iterations_can_train_the_critic_alone(tmp_path):
    rows = run(tmp_path / "run", critic_only_iterations=2, max_steps=2, save_critic="on")
    before, after = weights_of(policy_folder()), weights_of(tmp_path / "run" / "final")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["ppo/policy_grad_norm"] for row in rows] == [0.0, 0.0]
    assert load_value_model(tmp_path / "run" / "critic").value_head.bias.item() != 0.0
    rows = run(tmp_path / "run", critic_only_iterations=2)  # goes on with the third iteration
    assert rows[2]["ppo/kl_k3"] == 0.0 and rows[2]["ppo/policy_grad_norm"] > 0
    after = weights_of(tmp_path / "run" / "final")
    assert not torch.equal(before["layers.0.attention.wq.weight"], after["layers.0.attention.wq.weight"])


def test_the_adaptive_controller_moves_kl_coef(straight, tmp_path):
    assert {row["ppo/kl_coef"] for row in journal_of(straight, "metrics.jsonl")} == {0.05}
    rows = run(tmp_path / "run", kl_controller="adaptive", kl_target=0.1, kl_horizon=8, epochs=2)
    expected, sizes = 0.05, [4, 4, 3, 4, 4, 3]
    for row, n in zip(rows, sizes, strict=True):
        assert row["ppo/kl_coef"] == pytest.approx(expected)
        expected *= 1 + min(max(row["ppo/kl_sequence"] / 0.1 - 1, -0.2), 0.2) * n / 8
    assert rows[1]["ppo/kl_coef"] == pytest.approx(0.05 * 0.9)  # KL 0 in the first rollout: down by 0.2 * 4 / 8
    assert max(row["ppo/kl_sequence"] for row in rows) > 0.1


def test_the_entropy_bonus_keeps_the_policy_undecided(straight, tmp_path):
    plain = journal_of(straight, "metrics.jsonl")
    rows = run(tmp_path / "run", epochs=2, entropy_coef=3.0)
    assert rows[0]["ppo/policy_loss"] == plain[0]["ppo/policy_loss"]  # the bonus is not counted as loss
    assert rows[0]["ppo/policy_grad_norm"] != plain[0]["ppo/policy_grad_norm"]
    assert rows[-1]["ppo/entropy"] > 2 * plain[-1]["ppo/entropy"]


# ---------------------------------------------------------------------------------------------------------------------
# Faults that stop a run before it learns nonsense


def expect_stop(output, pattern, **flags):
    """Code 2, one line that holds `pattern`, and no checkpoint of the faulty step."""
    code, _, err = run_ppo_here(output, **flags)
    assert code == 2 and err.count("\n") == 1, err
    assert pattern in err, err


@pytest.fixture
def kept_models(monkeypatch):
    """The Models of the next run, to look at after its failure."""
    kept, original = [], run_ppo.load_models

    def load_models(*arguments):
        kept.append(original(*arguments))
        return kept[-1]

    monkeypatch.setattr(run_ppo, "load_models", load_models)
    return kept


def assert_untouched(models):
    """Policy and critic hold the weights of their folder, without gradients waiting for a step."""
    stored = weights_of(policy_folder())
    for model, prefix in ((models.policy, ""), (models.critic, "backbone.")):
        reshard_all(model)
        parameters = dict(model.named_parameters())
        assert all(parameter.grad is None for parameter in parameters.values())
        for name, tensor in stored.items():
            if f"{prefix}{name}" in parameters:
                assert torch.equal(local_part(parameters[f"{prefix}{name}"]), tensor), name


def test_a_reference_with_other_weights_than_its_folder_stops_the_run(tmp_path, monkeypatch, kept_models):
    loaded, original = [], rl_models.load_sharded_model

    def load_sharded_model(*arguments, **settings):
        loaded.append(original(*arguments, **settings))
        if len(loaded) == 2:
            with torch.no_grad():
                loaded[1].layers[0].attention.wq.weight.mul_(1.5)
        return loaded[-1]

    monkeypatch.setattr(rl_models, "load_sharded_model", load_sharded_model)
    expect_stop(tmp_path / "run", "first rollout: found a KL of ")
    assert_untouched(kept_models[0])
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_reference_from_another_folder_may_differ(tmp_path):
    other = load_pretrained(policy_folder())
    with torch.no_grad():
        other.layers[0].attention.wq.weight.mul_(1.5)
    rows = run(tmp_path / "run", reference_model=save_with_tokenizer(other, tmp_path / "other"), max_steps=1)
    assert rows[0]["ppo/kl_k3"] > 1e-4 and rows[0]["ppo/max_ratio_deviation"] == 0.0


@pytest.mark.parametrize("critic_only_iterations", [0, 1])
def test_a_first_ratio_other_than_1_stops_the_run(tmp_path, monkeypatch, kept_models, critic_only_iterations):
    """Such as positions that are one off, or a temperature that training forgets."""
    original = ppo_loop.measure_responses

    def measure_responses(*arguments):
        measured = original(*arguments)
        return replace(
            measured, logprobs_BR=measured.logprobs_BR - 2e-4, ref_logprobs_BR=measured.ref_logprobs_BR - 2e-4
        )

    monkeypatch.setattr(ppo_loop, "measure_responses", measure_responses)
    expect_stop(
        tmp_path / "run",
        f"step {critic_only_iterations + 1}: found max |ratio - 1| 0.0002, clip fraction 0",
        critic_only_iterations=critic_only_iterations,
    )
    if critic_only_iterations == 0:
        assert_untouched(kept_models[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch, kept_models, value):
    original = rollout.judge_response
    monkeypatch.setattr(rollout, "judge_response", lambda *arguments: replace(original(*arguments), reward=value))
    expect_stop(tmp_path / "run", "step 1: found ppo/policy_loss ")
    assert_untouched(kept_models[0])


def test_a_late_fault_loses_nothing_before_it(straight, tmp_path, monkeypatch):
    """A log-probability of the reference turns nan in the fourth iteration; the run goes on from the third."""
    calls = []

    def failing(hidden_KD, model, batch, temperature, loss_backend):
        calls.append(None)
        logprobs_K = response_logprobs(hidden_KD, model, batch, temperature, loss_backend)
        # measured for 2 micro-batches per iteration: policy, policy, reference, reference
        return logprobs_K * float("nan") if len(calls) == 15 else logprobs_K

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "response_logprobs", failing)
        expect_stop(tmp_path / "run", "step 4: found ppo/policy_loss nan", **LONG)
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step_00000002",
        "step_00000003",
    ]
    run(tmp_path / "run", **LONG)
    assert_same_run(tmp_path / "run", straight)


def test_weights_that_are_not_finite_stop_the_run_in_one_line(tmp_path):
    """Nothing can be drawn from logits of nan: without the check the sampler fails with a traceback."""
    model = load_pretrained(policy_folder())
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    expect_stop(
        tmp_path / "run",
        "iteration 0: found 1 tensors of the policy with nan or inf (norm.weight",
        model=save_with_tokenizer(model, tmp_path / "model"),
    )


@pytest.mark.parametrize("extra", [{}, {"iteration": "1", "kl_coef": 0.1}, {"iteration": 1, "kl_coef": [0.1]}])
def test_a_state_without_its_scalars_is_one_line(monkeypatch, extra):
    state = TrainerState(step=2, saved_world_size=1, extra=extra)
    monkeypatch.setattr(ppo_loop, "resume_newest", lambda *_, **__: state)
    with pytest.raises(CheckpointError, match="found iteration .* in the state of step 2, expected numbers"):
        ppo_loop.resume_state(PPOConfig(), SimpleNamespace(trained=dict), None, {}, [])


# ---------------------------------------------------------------------------------------------------------------------
# Signals


def send_sigterm_in(monkeypatch, name, call):
    """SIGTERM at the beginning of the call number `call` (from 1) of a function of the loop."""
    owner = CheckpointSaver if name == "save" else ppo_loop
    original, calls = getattr(owner, name), []

    def function(*arguments, **settings):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize(
    ("name", "call", "done"),
    [
        ("sample_responses", 1, 0),
        ("sample_responses", 4, 3),
        ("measure_responses", 2, 2),
        ("update_minibatch", 3, 3),
        ("save", 2, 2),
    ],
)
def test_sigterm_in_any_phase_saves_and_the_run_goes_on(straight, tmp_path, monkeypatch, name, call, done):
    """During sampling the unfinished responses are dropped; later the iteration is finished first."""
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_sigterm_in(patch, name, call)
        code, out, err = run_ppo_here(output, **LONG)
    assert (code, err) == (143, "")
    assert len(journal_of(output, "metrics.jsonl")) == done
    names = [path.name for path in sorted((output / "checkpoints").iterdir())]
    assert names == [f"step_{step:08d}" for step in range(max(1, done - 1), done + 1)]  # keep_checkpoints 2
    assert f"stopped by SIGTERM after step {done} of 6" in out and ("checkpoint saved" in out) == (done > 0)
    assert not (output / "final").exists()
    run(output, **LONG)
    assert_same_run(output, straight)


def test_sigterm_in_the_last_iteration_ends_the_run_as_usual(straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        send_sigterm_in(patch, "update_minibatch", 6)
        run(tmp_path / "run", **LONG)
    assert_same_run(tmp_path / "run", straight)
