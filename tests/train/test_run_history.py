"""train/run_history.py: what --override lets through, what it refuses, and what a killed start leaves."""

import json

import pytest

from tests.support.tiny_ppo import journal_of, run_ppo_here
from tests.support.tiny_run import digest_of_final, metrics_of, run_here
from train.run_history import earlier_identities, is_overridden_since, without_overridden
from train.run_logging import fingerprint

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds


def history_of(output):
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


def rates_of(output):
    return [row["sft/learning_rate"] for row in metrics_of(output)]


CONSTANT = {"schedule": "constant", "warmup_ratio": 0.0, "checkpoint_every": 2}


def test_the_learning_rate_changes_where_it_is_asked_for(tmp_path):
    output = tmp_path / "run"
    assert run_here(output, **CONSTANT, max_steps=4, learning_rate=1e-2)[0] == 0
    asked = {**CONSTANT, "max_steps": 8, "learning_rate": 1e-3}
    code, _, err = run_here(output, **asked)
    assert code == 2 and "found learning_rate = 0.01, expected 0.001" in err and err.count("\n") == 1
    assert not (output / "history.jsonl").exists()
    code, out, err = run_here(output, **asked, override="learning_rate, max_grad_norm")
    assert (code, err) == (0, "")
    assert "override: learning_rate = 0.001 after step 4, before 0.01\n" in out
    assert "step_00000004 (step 4, saved by 1 rank)" in out
    assert rates_of(output) == pytest.approx([1e-2] * 4 + [1e-3] * 4)
    assert history_of(output) == [{"step": 4, "setting": "learning_rate", "old": 0.01, "new": 0.001}]
    # from now on it is the run's own value: no flag is needed, and the old one is refused
    code, out, _ = run_here(output, **{**asked, "max_steps": 9})
    assert code == 0 and "override" not in out and len(history_of(output)) == 1
    code, _, err = run_here(output, **{**asked, "max_steps": 10, "learning_rate": 1e-2})
    assert code == 2 and "found learning_rate = 0.001, expected 0.01" in err


def test_an_older_checkpoint_from_before_the_override_still_counts(tmp_path):
    """The start that overrides is killed before its first checkpoint: the next one resumes from the old checkpoint."""
    output, twin = tmp_path / "run", tmp_path / "twin"
    for folder in (output, twin):
        assert run_here(folder, **CONSTANT, max_steps=4)[0] == 0
    asked = {**CONSTANT, "learning_rate": 1e-3, "override": "learning_rate"}
    assert run_here(output, **asked, max_steps=6)[0] == 0
    for name in ("final", "checkpoints/step_00000006"):  # as if killed
        (output / name).rename(tmp_path / name.replace("/", "_"))
    (output / "finished.json").unlink()
    for folder in (output, twin):
        code, out, err = run_here(folder, **asked, max_steps=7)
        assert (code, err) == (0, "") and "(step 4, saved by 1 rank)" in out
    assert digest_of_final(output) == digest_of_final(twin)
    assert len(history_of(output)) == len(history_of(twin)) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"override": "max_tokens"}, "--override: found 'max_tokens', expected settings among learning_rate, schedule"),
        ({"override": "learning_rate,prompt_format"}, "--override: found 'prompt_format', expected settings among"),
        ({"override": "seed"}, "--override: found 'seed', expected"),
    ],
)
def test_settings_of_data_model_and_loss_are_never_overridden(tmp_path, flags, message):
    code, _, err = run_here(tmp_path / "run", **flags)
    assert code == 2 and err.startswith(message) and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_run_is_refused_and_its_folder_left_alone(tmp_path):
    output = tmp_path / "run"
    assert run_here(output, max_steps=2)[0] == 0
    before = {path: path.read_bytes() for path in output.glob("*.json*")}
    code, _, err = run_here(output, learning_rate=1e-3, seed=5, override="learning_rate")
    assert code == 2 and "found seed = 0, expected 5" in err
    assert {path: path.read_bytes() for path in output.glob("*.json*")} == before


def test_overriding_kl_coef_takes_the_place_of_the_saved_one(tmp_path):
    """The checkpoint has the controller's factor; only an override puts the setting in its place, and only once."""
    output, flags = tmp_path / "run", {"kl_controller": "adaptive", "kl_horizon": 10, "checkpoint_every": 1}
    assert run_ppo_here(output, **flags, max_steps=1)[0] == 0
    code, out, err = run_ppo_here(output, **flags, max_steps=2, kl_coef=0.7, override="kl_coef")
    assert (code, err) == (0, "")
    assert "override: kl_coef = 0.7 after step 1, before 0.05\n" in out
    assert run_ppo_here(output, **flags, max_steps=3, kl_coef=0.7, override="kl_coef")[0] == 0
    factors = [row["ppo/kl_coef"] for row in journal_of(output, "metrics.jsonl")]
    assert factors[:2] == [0.05, 0.7] and factors[2] != 0.7 and 0.5 < factors[2] < 0.9
    assert len(history_of(output)) == 1


def test_fingerprints_of_earlier_identities_by_hand():
    history = [
        {"step": 2, "setting": "a", "old": 1, "new": 2},
        {"step": 5, "setting": "a", "old": 2, "new": 3},
        {"step": 5, "setting": "b", "old": "x", "new": "y"},
    ]
    expected = ({"a": 3, "b": "x"}, {"a": 2, "b": "x"}, {"a": 1, "b": "x"})
    assert earlier_identities({"a": 3, "b": "y"}, history) == tuple(map(fingerprint, expected))
    assert earlier_identities({"a": 3}, []) == ()
    assert without_overridden({"a": 3, "b": "y"}, "b, c") == {"a": 3}
    assert is_overridden_since(history, "a", 5) and not is_overridden_since(history, "a", 6)
    assert not is_overridden_since(history, "c", 0)
