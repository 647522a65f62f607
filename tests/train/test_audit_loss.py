"""The audit's token lines add up to the logged loss, for every normalisation; asking wrongly is one line."""

import contextlib
import io
import json
import shutil

import pytest
import torch

from model.pretrained_weights import load_pretrained
from tests.support.tiny_run import ROOT, metrics_of, run_here, tiny_files
from train.audit_loss import main


def audit(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("audited") / "run"
    code, _, err = run_here(output, max_steps=3, checkpoint_every=2)
    assert code == 0, err
    return output


def lines_of(run, step):
    return [json.loads(line) for line in (run / "audit" / f"step_{step:08d}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("step", [1, 3])
def test_contributions_sum_to_the_logged_loss(run, step):
    code, out, err = audit("--run", run, "--step", step)
    assert (code, err) == (0, "") and "agrees" in out
    logged = metrics_of(run)[step - 1]
    lines = lines_of(run, step)
    assert sum(line["contribution"] for line in lines) == pytest.approx(logged["sft/loss"], rel=1e-5)
    assert len(lines) == logged["sft/trained_tokens"]
    assert len({(line["id"], line["message_index"]) for line in lines}) == logged["sft/trained_turns"]


def test_lines_hold_the_key_token_weights_and_the_real_logprobs(run):
    audit("--run", run, "--step", 1)
    lines = lines_of(run, 1)
    assert {line["class"] for line in lines} == {"key", "normal", "eos"}
    assert all(line["weight"] == 1 for line in lines if line["class"] != "key")
    assert all(1 <= line["weight"] <= 9 for line in lines) and any(line["weight"] > 1 for line in lines)
    turns = {(line["id"], line["message_index"]) for line in lines}
    for turn in turns:  # turn_mean: the loss weights of a turn add up to 1
        weights = [line["loss_weight"] for line in lines if (line["id"], line["message_index"]) == turn]
        assert sum(weights) == pytest.approx(1)
    assert {line["token"] for line in lines if line["class"] == "eos"} == {"</s>"}
    first = lines[0]  # the first trained token of a row, scored through full logits
    model = load_pretrained(tiny_files()[0])
    from model.tokenizer import load_tokenizer
    from train.sft_config import SFTConfig
    from train.sft_loop import encode_data

    encoded, _ = encode_data(SFTConfig(data=str(tiny_files()[1])), load_tokenizer(tiny_files()[0]))
    row = next(row for row in encoded if row.id == first["id"])
    logits_TV = model(torch.tensor([list(row.input_ids)]))[0]
    expected = torch.log_softmax(logits_TV, -1)[first["position"], first["target_id"]].item()
    assert first["logprob"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("normalization", ["token_mean", "sum"])
def test_other_normalisations_sum_up_too(tmp_path, normalization):
    code, _, err = run_here(tmp_path / "run", max_steps=1, loss_normalization=normalization)
    assert code == 0, err
    code, out, err = audit("--run", tmp_path / "run", "--step", 1, "--output", tmp_path / "lines.jsonl")
    assert (code, err) == (0, ""), out


def test_a_wrong_logged_loss_is_noticed(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["sft/loss"] *= 1.001
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = audit("--run", tmp_path / "run", "--step", 1)
    assert code == 1 and "DIFFERS" in out


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (2, "found no such checkpoint, expected one saved right before the step; --step may be 1, 3\n"),
        (4, "--step: found 4, expected one of the 3 steps in "),
        (0, "--step: found 0, expected one of the 3 steps in "),
    ],
)
def test_impossible_steps(run, step, message):
    code, _, err = audit("--run", run, "--step", step)
    assert code == 2 and message in err and err.count("\n") == 1


def test_not_a_run_and_a_damaged_checkpoint(run, tmp_path):
    code, _, err = audit("--run", tmp_path, "--step", 1)
    assert (
        code == 2
        and err.count("\n") == 1
        and "config.json: found No such file or directory, expected a readable file" in err
    )
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run_identity.json").write_text("{}")
    code, _, err = audit("--run", tmp_path, "--step", 1)
    assert (code, err) == (2, f"{tmp_path}/config.json: found no setting 'model', expected those of an SFT run\n")
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000002" / "trainer_state.json").write_text("{}")
    code, _, err = audit("--run", tmp_path / "run", "--step", 3)
    assert code == 2 and "trainer_state.json: found 2 bytes" in err
