"""The script of a first run on a GPU: its stage runner on stages that misbehave, and every stage in miniature."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import STAGES, plain, run_stage
from tests.support.gpu_stage_doubles import (
    damages_its_record,
    exits,
    fails_a_check,
    hangs,
    is_killed,
    is_skipped,
    passes,
    prints_garbage,
    raises,
    yields_garbage,
)

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------------------------------------------------------------
# The runner


def result_of(stage, seconds=60):
    return run_stage(stage, seconds, [])


def test_a_stage_that_passes():
    result = result_of(passes)
    assert result["ok"] is True and result["error"] == "" and result["not_run"] == ["the rest"]
    assert result["figures"] == {"answer": 42, "rate": 0.33333} and 0 < result["seconds"] < 60


@pytest.mark.parametrize(
    ("stage", "figures", "error"),
    [
        (raises, {"before": 1}, "found ValueError: two lines"),
        (fails_a_check, {"difference": 2.0, "after": 1}, "difference: found 2, expected at most 1"),
        (exits, {"before": 1}, "found exit code 3, expected 0; last line: no memory left"),
        (is_killed, {"before": 1}, "found signal 9, expected 0; last line: nearly done"),
    ],
)
def test_a_stage_that_fails_keeps_what_it_found(stage, figures, error):
    result = result_of(stage)
    assert (result["ok"], result["figures"], result["error"]) == (False, figures, error)


@pytest.mark.slow
def test_a_stage_that_hangs_is_killed_with_its_processes(tmp_path):
    assert result_of(passes)["ok"] is True  # starts the server that forks the stages, which may take seconds
    began = time.monotonic()
    result = result_of(partial(hangs, str(tmp_path / "pid")), seconds=4)
    assert time.monotonic() - began < 60
    assert (result["ok"], result["figures"]) == (False, {"before": 1})
    assert result["error"] == "found no end after 4 s, expected one"
    child = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    end = time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_a_stage_prints_is_not_its_result(capfd):
    result = result_of(prints_garbage)
    assert result["ok"] is True and result["figures"] == {"figure": "nan", "other": "x"}
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("stage", "error"), [(yields_garbage, "record.jsonl:1: found a number"), (damages_its_record, "record.jsonl:2: ")]
)
def test_items_that_are_no_items(stage, error):
    result = result_of(stage)
    assert result["ok"] is False and error in result["error"]


def test_a_skipped_stage_neither_passes_nor_fails():
    result = result_of(is_skipped)
    assert result["ok"] is None and result["figures"] == {"skipped": "a package is not installed"}


def test_figures_as_json():
    found = plain({1: [float("inf"), 2.000004, True, None], "a": (torch.float32, 123456.7)})
    assert found == {"1": ["inf", 2.0, True, None], "a": ["torch.float32", 123460.0]}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_limits_keep_the_promise_of_8_minutes():
    assert sum(seconds for _, seconds in STAGES.values()) <= 8 * 60 - 5


def run_main(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu_check", *flags])
    try:
        code = gpu_check.main()
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_one_failure_stops_no_other_stage_and_sets_the_exit_code(monkeypatch, capsys, tmp_path):
    results = {"versions": True, "attention": False, "decode": None}

    def answer(stage, seconds, preload):
        return {"ok": results[stage.args[0]], "seconds": 1.0, "figures": {}, "not_run": [], "error": ""}

    monkeypatch.setattr(gpu_check, "run_stage", answer)
    output = tmp_path / "out.jsonl"
    output.write_text('{"earlier": 1}\n')
    code, lines, _ = run_main(monkeypatch, capsys, "--stages", "a,c,g", "--output", str(output))
    assert code == 1 and [line.get("stage") for line in lines] == ["a", "c", "g", None]
    assert lines[-1]["summary"] == {"passed": ["a"], "failed": ["c"], "skipped": ["g"]} and lines[-1]["ok"] is False
    assert [json.loads(line) for line in output.read_text().splitlines()] == [{"earlier": 1}, *lines]
    assert run_main(monkeypatch, capsys, "--stages", "a,g")[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages", "a,z"], "argument --stages: found 'z', expected letters of a,b,c,d,e,f,g,h,i"),
        (["--device", "cpu"], "--device: found cpu without --small, expected both: full shapes are for a GPU"),
        (["--output", "no/such/folder/x"], "expected a file to append to"),
    ],
)
def test_bad_flags_are_one_line(monkeypatch, capsys, flags, message):
    code, lines, err = run_main(monkeypatch, capsys, *flags)
    assert code == 2 and lines == [] and message in err and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_the_stage_says_so():
    from benchmarks.gpu_stages import run

    assert list(run("decode", "cuda", True)) == [{"fault": "found no CUDA device, expected one"}]


# ---------------------------------------------------------------------------------------------------------------------
# What stages compute


def test_checks_of_figures():
    from benchmarks.gpu_measures import at_most, must_be

    assert at_most("x", 1.0, 1.0) == {"x": 1.0} and must_be("y", True) == {"y": True}
    assert at_most("x", 1.5, 1.0)["fault"] == "x: found 1.5, expected at most 1"
    assert "fault" in at_most("x", float("nan"), 1.0) and "fault" in must_be("y", False)


def test_useful_operations_by_hand():
    """The block has 4 * (2 * 4 + 2 * 2 + 3 * 8) = 144 weights; segments of 3 and 5; 2 rows through a head of 10 x 4."""
    from benchmarks.benchmark_plan import make_batch
    from benchmarks.gpu_stages import useful_flops
    from tests.support.tiny_run import tiny_config

    shape = tiny_config(dim=4, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=2, ffn_dim=8, vocab_size=10)
    batch = make_batch(8)
    batch.segment_lengths[:] = [3, 5]
    assert batch.trained_tokens == 2
    assert useful_flops(shape, batch) == 6 * 144 * 8 + 6 * 4 * (9 + 25) + 6 * 10 * 4 * 2


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_error_of_attention_sees_a_wrong_formula(n_kv_heads, monkeypatch):
    from benchmarks import gpu_stages

    torch.manual_seed(0)
    inputs = [torch.randn(1, 9, n, 8).requires_grad_() for n in (4, n_kv_heads, n_kv_heads)]
    assert gpu_stages.error_of_attend(inputs) < 1e-6
    packed = gpu_stages.Segments([4, 5], None, [None, None])
    assert gpu_stages.error_of_attend(inputs, segments=packed) < 1e-6
    attend = gpu_stages.attend
    monkeypatch.setattr(gpu_stages, "attend", lambda q, k, v, segments: attend(q, k, v))  # over the border
    assert gpu_stages.error_of_attend(inputs, segments=packed) > 1e-3
    for broken in (
        lambda q, k, v: attend(1.01 * q, k, v),  # another scale
        lambda q, k, v: attend(q, k, v, torch.ones(9, 9, dtype=torch.bool)),  # not causal
        lambda q, k, v: attend(q, k, v) + 0.1 * (q - q.detach()),  # another gradient
    ):
        monkeypatch.setattr(gpu_stages, "attend", broken)
        assert gpu_stages.error_of_attend(inputs) > 1e-3


@pytest.mark.slow
def test_every_stage_in_miniature(tmp_path):
    """What passes on the CPU, what is left to a GPU, and that a run leaves nothing in the folder of temporary files."""
    output = tmp_path / "lines.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--small", "--output", str(output)]
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    *stages, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert output.read_text() == done.stdout
    assert [(line["stage"], line["name"]) for line in stages] == [(key, name) for key, (name, _) in STAGES.items()]
    results = {line["name"]: line for line in stages}
    for name in ("gpu_tests", "transformers_logits"):  # the second only where transformers is not installed
        if "skipped" in results[name]["figures"]:
            assert results.pop(name)["ok"] is None
    assert "gpu_tests" not in results or torch.cuda.is_available()
    assert all(line["ok"] is True and not line["error"] for line in results.values())
    assert results["bundled_sft"]["figures"]["resumed_weights_equal"] is True
    assert results["decode"]["figures"]["eager_greedy_output_independent_of_batching"] is True
    assert results["ppo_and_checkpoint"]["figures"]["checkpoint_equal_after_load"] is True
    assert "our kernels: needs a CUDA device" in results["loss_kernels"]["not_run"]
    assert summary["ok"] is True and not summary["summary"]["failed"]
    assert [path.name for path in tmp_path.iterdir()] == ["lines.jsonl"]
