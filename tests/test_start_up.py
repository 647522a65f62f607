"""start_up.py: what reaches a script while it imports torch; here torch is a module that sleeps."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_run import ROOT

SCRIPTS = ("run_sft", "run_ppo", "run_eval")
# short sleeps: a signal that comes just before one is heard after it
TORCH = "import time; print('importing', flush=True); [time.sleep(0.1) for _ in range(600)]"
AGENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, sys.argv[1]]); time.sleep(60)"


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "torch.py").write_text(TORCH)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def start(line: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """The process, once it imports torch."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "importing\n"
    return process


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_imports_is_one_line(environment, script, number, code):
    process = start([sys.executable, f"{script}.py"], environment)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, f"stopped by {number.name}; the same command continues\n")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_worker_ends_with_its_torchrun_during_the_imports(environment, script):
    environment["TORCHELASTIC_RUN_ID"] = "trial"
    agent = start([sys.executable, "-c", AGENT, str(Path(ROOT) / f"{script}.py")], environment)
    agent.kill()
    ready, _, _ = select.select([agent.stdout], [], [], 30)  # readable: the worker, which held the other end, is gone
    assert ready and agent.communicate()[0] == ""


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_the_allocator_is_set_before_torch_is_imported(environment, tmp_path, set_by_user, expected):
    show = "import json, os, sys; print(json.dumps({k: v for k, v in os.environ.items() if 'ALLOC_CONF' in k}))"
    (tmp_path / "torch.py").write_text(f"{show}; sys.exit()")
    environment = {name: value for name, value in environment.items() if "ALLOC_CONF" not in name} | set_by_user
    line = [sys.executable, "run_sft.py"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (json.loads(done.stdout), done.stderr) == (expected, "")
