"""One step against an independent fp64 loss, the guards, the run folder, and metrics that are all documented."""

import dataclasses
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from command_line import run_identity
from data.batches import pack
from data.json_records import DataError, JsonLinesFile
from data.loss_weights import encode_trajectory
from data.trajectories import read_trajectories
from model.tokenizer import load_tokenizer
from tests.support.tiny_run import ROOT, metrics_of, random_batch, run_here, tiny_files, tiny_model
from train.distributed import init_world, local_part, shard_model
from train.run_control import StopSignal, TrainingError
from train.run_logging import RunFolderError, cut_metrics, open_run_folder
from train.sft_config import SFTConfig
from train.sft_loop import SFTData, train_sft, train_step


@pytest.fixture
def world():
    return init_world("cpu")


def sharded(world, **changes):
    model = tiny_model(**changes)
    shard_model(model, world, dtype="float32")
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def one_step(model, optimizer, batches, world, *, normalization="token_mean", step=1):
    config = SFTConfig(loss_normalization=normalization, max_grad_norm=0.0)
    return train_step(config, model, optimizer, batches, world, step=step)


def encoded_rows(normalization):
    model_dir, data = tiny_files()
    tokenizer = load_tokenizer(model_dir)
    return [
        encode_trajectory(
            trajectory,
            tokenizer,
            error_filter="structured",
            key_tokens=True,
            max_key_token_weight=9.0,
            loss_normalization=normalization,
        )
        for trajectory in read_trajectories(data)[:5]
    ]


def oracle_loss(normalization):
    """The three definitions in fp64, turn by turn, from the unscaled weights ("sum" leaves weights as they are)."""
    model = tiny_model().double()
    per_turn = []
    for row in encoded_rows("sum"):
        logits_TV = model(torch.tensor([list(row.input_ids)]))[0]
        losses_T = -torch.log_softmax(logits_TV, -1)[torch.arange(len(row)), torch.tensor(list(row.target_ids))]
        weights_T, turns_T = torch.tensor(list(row.loss_weights)), torch.tensor(list(row.message_indices))
        trained_T = torch.tensor([name in ("normal", "key", "eos") for name in row.token_classes])
        for turn in turns_T[trained_T].unique():
            chosen = trained_T & (turns_T == turn)
            per_turn.append(((weights_T * losses_T)[chosen].sum().item(), weights_T[chosen].sum().item()))
    if normalization == "turn_mean":
        return sum(loss / weight for loss, weight in per_turn) / len(per_turn)
    total = sum(loss for loss, _ in per_turn)
    return total / sum(weight for _, weight in per_turn) if normalization == "token_mean" else total


# ---------------------------------------------------------------------------------------------------------------------
# One step


@pytest.mark.parametrize("normalization", ["turn_mean", "token_mean", "sum"])
@pytest.mark.parametrize("sizes", [[5], [1, 3, 1]])
def test_loss_equals_its_definition_however_the_batch_is_split(world, normalization, sizes):
    rows, batches = encoded_rows(normalization), []
    for size in sizes:
        batches.append(pack(rows[:size]))
        rows = rows[size:]
    model, optimizer = sharded(world)
    result = one_step(model, optimizer, batches, world, normalization=normalization)
    assert result.loss == pytest.approx(oracle_loss(normalization), rel=1e-5)


def test_micro_batches_with_different_counts_are_not_a_mean_of_means(world):
    few, many = random_batch(1, n_tokens=12, trained_share=0.2), random_batch(2, n_tokens=90, trained_share=0.9)
    figures = []
    for batches in ([few], [many], [few, many]):
        model, optimizer = sharded(world)
        figures.append(one_step(model, optimizer, batches, world))
    loss_sum = figures[0].loss * few.denominator + figures[1].loss * many.denominator
    expected = loss_sum / (few.denominator + many.denominator)
    assert figures[2].loss == pytest.approx(expected, rel=1e-6)
    assert abs(figures[2].loss - (figures[0].loss + figures[1].loss) / 2) > 1e-3  # what a mean of means would give
    assert (figures[2].trained_tokens, figures[2].trained_turns) == (few.trained_tokens + many.trained_tokens, 4)
    assert figures[2].input_tokens == 102


def test_a_global_batch_without_trained_tokens_is_an_error(world):
    model, optimizer = sharded(world)
    with pytest.raises(TrainingError, match=r"step 7: found 0 trained tokens.*ids on this rank: 1a, 1b"):
        one_step(model, optimizer, [random_batch(1, trained_share=0.0)], world, step=7)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_values_stop_before_the_update(world, poison):
    model, optimizer = sharded(world)
    with torch.no_grad():
        local_part(model.layers[1].feed_forward.w2.weight).data[0, 0] = poison
    before = {name: local_part(parameter).detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(TrainingError) as caught:
        one_step(model, optimizer, [random_batch(3)], world, step=12)
    pattern = r"step 12: found loss \S+ and gradient norm \S+, expected finite.*ids on this rank: 3a, 3b$"
    assert re.match(pattern, str(caught.value))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(local_part(parameter).detach(), before[name], rtol=0, atol=0, equal_nan=True)
        assert parameter.grad is None


def test_gradient_overflow_with_a_finite_loss_stops_too(world):
    model, optimizer = sharded(world)
    model.norm.register_full_backward_hook(lambda module, gradient_in, _: tuple(g * math.inf for g in gradient_in))
    with pytest.raises(TrainingError, match=r"found loss \d+\.\d+ and gradient norm (inf|nan)"):
        one_step(model, optimizer, [random_batch(3)], world)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def run_loop(world, output, *, optimizer=None, total_steps=6, **settings):
    model = tiny_model()
    shard_model(model, world, dtype="float32")
    optimizer = optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), lr=0.1)
    config = SFTConfig(output=str(output), loss_normalization="token_mean", plot="off", **settings)
    data = SFTData(lambda step: [random_batch(step)], total_steps, {"data": "random"})
    result = train_sft(config, data, model, optimizer, world)
    return result, model, optimizer


def test_groups_of_a_foreign_optimizer_keep_their_own_rates(world, tmp_path):
    def two_groups(model):
        parameters = list(model.parameters())
        groups = [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:], "lr": 0.1}]
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9)

    result, _, optimizer = run_loop(world, tmp_path / "run", optimizer=two_groups, schedule="linear", warmup_ratio=0.0)
    assert (result.step, result.last_step, result.stopped_by) == (6, 6, 0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5 / 6, 0.1 / 6])
    assert [row["sft/learning_rate"] for row in metrics_of(tmp_path / "run")] == pytest.approx(
        [0.5 * part / 6 for part in (6, 5, 4, 3, 2, 1)]
    )


def test_max_steps_ends_the_run_and_not_the_schedule(world, tmp_path):
    _, straight, _ = run_loop(world, tmp_path / "a")
    result, _, _ = run_loop(world, tmp_path / "b", max_steps=2)
    assert (result.step, result.last_step) == (2, 2)
    _, resumed, _ = run_loop(world, tmp_path / "b")
    for (name, first), second in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(local_part(first), local_part(second)), name
    assert [row["step"] for row in metrics_of(tmp_path / "b")] == [1, 2, 3, 4, 5, 6]


def test_a_signal_finishes_the_step_saves_and_says_so(world, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def batches(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return [random_batch(step)]

    model = tiny_model()
    shard_model(model, world, dtype="float32")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = SFTConfig(output=str(tmp_path), loss_normalization="token_mean", checkpoint_every=0)
    result = train_sft(config, SFTData(batches, 6, {}), model, optimizer, world)
    assert (result.step, result.stopped_by) == (3, signal.SIGTERM)
    assert (tmp_path / "checkpoints" / "step_00000003").is_dir()
    assert "stopped by SIGTERM after step 3 of 6" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_is_named_and_a_third_acts_as_usual(capfd):
    # A shell starts background jobs with SIGINT ignored, and "as usual" would then be to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert (stop.number, capfd.readouterr().err) == (signal.SIGINT, "")
            os.kill(os.getpid(), signal.SIGINT)
            assert (
                capfd.readouterr().err == "a second SIGINT: still saving a checkpoint; a third ends the run at once\n"
            )
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_non_finite_stop_keeps_the_last_checkpoint(world, tmp_path):
    def batches(step):
        batch = random_batch(step)
        if step == 3:
            batch.loss_weights_T[batch.trained_index_K[0]] = math.nan
        return [batch]

    model = tiny_model()
    shard_model(model, world, dtype="float32")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = SFTConfig(output=str(tmp_path), loss_normalization="token_mean", checkpoint_every=1)
    with pytest.raises(TrainingError, match="step 4: found loss nan"):
        train_sft(config, SFTData(batches, 6, {}), model, optimizer, world)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def test_a_whole_run_leaves_the_promised_files(tmp_path):
    code, out, err = run_here(tmp_path / "run", max_steps=3, plot="on", checkpoint_every=2)
    assert (code, err) == (0, "")
    output = tmp_path / "run"
    assert json.loads((output / "config.json").read_text())["learning_rate"] == 1e-2
    environment = json.loads((output / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["world_size"] == 1
    assert environment["changed_from"]["max_steps"] == 0 and "seed" not in environment["changed_from"]
    report = json.loads((output / "data_report.json").read_text())
    assert [(each["category"], each["turns"]) for each in report["masked"]] == [("parameter_hallucination", 8)]
    assert [row["step"] for row in metrics_of(output)] == [1, 2, 3]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
    names = {path.name for path in (output / "final").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= names
    lines = out.splitlines()
    assert "turns masked by error_filter=structured: parameter_hallucination 8" in lines
    asked = ["trained 3 steps; model: ", "score it:  ", "score its base:  ", "train it further:  "]
    assert all(line.startswith(start) for line, start in zip(lines[-4:], asked, strict=True))
    assert f"plot: {output / 'plots' / 'loss.svg'}" in lines and (output / "plots" / "loss.svg").exists()


def test_every_logged_key_is_documented(tmp_path):
    code, _, err = run_here(tmp_path / "run", max_steps=1)
    assert code == 0, err
    documented = set(re.findall(r"^\| `([a-z_/0-9]+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    assert set(metrics_of(tmp_path / "run")[0]) <= documented


def test_trajectories_that_are_dropped_are_named(tmp_path):
    code, out, _ = run_here(tmp_path / "run", max_steps=1, max_tokens=230)
    assert code == 0
    assert re.search(r"^dropped \d+ of 22 trajectories, longer than 230 tokens: t\d+ \(\d+\)", out, re.MULTILINE)
    dropped = json.loads((tmp_path / "run/data_report.json").read_text())["dropped"]
    assert len(dropped) == int(re.search(r"^dropped (\d+) of 22", out, re.MULTILINE)[1])
    assert all(row["reason"] == "too long" and row["tokens"] > 230 and row["id"][0] == "t" for row in dropped)


def test_metrics_are_cut_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert cut_metrics(path, 2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert cut_metrics(path, 2) == 0 and cut_metrics(tmp_path / "absent", 0) == 0


def test_metrics_on_a_full_disk_are_one_line_of_error():
    with pytest.raises(DataError, match="/dev/full: found no way to append .No space left on device"):
        JsonLinesFile(Path("/dev/full")).write({"step": 1})


def test_identity_ignores_where_and_counts_what():
    base = run_identity(SFTConfig(), {"data_sha256": "1"})
    same = SFTConfig(output="else", data="moved", micro_batch_size=1, device="cpu", checkpoint_every=1, max_steps=3)
    assert run_identity(same, {"data_sha256": "1"}) == base
    assert run_identity(SFTConfig(), {"data_sha256": "2"}) != base
    for field in ("learning_rate", "seed", "epochs", "global_batch_size", "max_key_token_weight", "warmup_ratio"):
        changed = dataclasses.replace(SFTConfig(), **{field: getattr(SFTConfig(), field) + 1})
        assert run_identity(changed, {"data_sha256": "1"}) != base, field


def test_run_folder_rules(tmp_path):
    open_run_folder(tmp_path / "new", {"seed": 1}, resume="never")
    open_run_folder(tmp_path / "new", {"seed": 3}, resume="auto")  # the first start did not reach a step
    open_run_folder(tmp_path / "new", {"seed": 1}, resume="auto")
    (tmp_path / "new" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RunFolderError, match=r"found seed = 1, expected 2: the folder belongs to another run"):
        open_run_folder(tmp_path / "new", {"seed": 2}, resume="auto")
    with pytest.raises(RunFolderError, match=r"found clip = nothing, expected 0.2: the folder belongs to another run"):
        open_run_folder(tmp_path / "new", {"seed": 1, "clip": 0.2}, resume="auto")
    with pytest.raises(RunFolderError, match=r"found seed = 1, expected nothing: the folder belongs to another run"):
        open_run_folder(tmp_path / "new", {}, resume="auto")
    (tmp_path / "new" / "checkpoints" / "step_00000004").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="found checkpoint step_00000004, expected a folder without checkpoints"):
        open_run_folder(tmp_path / "new", {"seed": 1}, resume="never")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match="found files but no run_identity.json"):
        open_run_folder(tmp_path / "model", {"seed": 1}, resume="auto")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="found a file, expected a folder"):
        open_run_folder(tmp_path / "file", {"seed": 1}, resume="auto")
    (tmp_path / "new" / "run_identity.json").write_text("{")
    with pytest.raises(DataError, match="run_identity.json: found the end at column 2, expected JSON"):
        open_run_folder(tmp_path / "new", {"seed": 1}, resume="auto")
