"""The switch of deterministic algorithms: what it sets, and that it changes nothing on the CPU."""

import os

import pytest
import torch

from tests.support.tiny_run import digest_of_final, run_here
from train.seeding import use_deterministic_algorithms


@pytest.fixture
def as_before(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_off_sets_nothing_and_on_sets_what_pytorch_offers(as_before):
    use_deterministic_algorithms("off")
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    use_deterministic_algorithms("on")
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_on_the_cpu_the_bits_are_those_of_before(as_before, tmp_path):
    for switch in ("off", "on"):
        code, _, err = run_here(tmp_path / switch, max_steps=3, deterministic=switch)
        assert code == 0, err
    assert digest_of_final(tmp_path / "on") == digest_of_final(tmp_path / "off")
