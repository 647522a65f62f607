"""`--offload on`: parameters, gradients and optimizer state in host memory, with the bits of a run on the device.

On a CPU both are the same memory, so these tests show that nothing but the place changes; the `gpu` test moves data.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from tests.support.processes import run
from tests.support.tiny_run import arguments, digest_of_final, metrics_of, run_here, tiny_model
from train import checkpoint, distributed
from train.distributed import apply_fsdp


def figures_of(output):
    """The lines of metrics.jsonl without times."""
    return [{key: value for key, value in row.items() if "time/" not in key} for row in metrics_of(output)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offloaded_run_has_the_bits_of_another_and_goes_on_as_one(tmp_path, dtype):
    """4 steps without, against 2 with and then 2 without: weights and both means of AdamW pass through a checkpoint."""
    assert run_here(tmp_path / "device", dtype=dtype, max_steps=4)[0] == 0
    for steps, offload in ((2, "on"), (4, "off")):
        assert run_here(tmp_path / "host", dtype=dtype, max_steps=steps, offload=offload)[0] == 0
    assert figures_of(tmp_path / "host") == figures_of(tmp_path / "device")
    assert digest_of_final(tmp_path / "host") == digest_of_final(tmp_path / "device")


@pytest.mark.very_slow
def test_two_ranks_offload_with_the_same_bits(tmp_path):
    for name in ("off", "on"):
        code, _, err = run("run_sft", arguments(tmp_path / name, max_steps=4, offload=name), 2)
        assert code == 0, err
    assert digest_of_final(tmp_path / "on") == digest_of_final(tmp_path / "off")


@pytest.mark.parametrize(("offload", "device"), [(False, "cuda"), (True, "cuda"), (True, "cpu")])
def test_every_group_of_parameters_gets_the_policy(monkeypatch, offload, device):
    """Pinned where a device copies from it."""
    policies = []
    monkeypatch.setattr(distributed, "fully_shard", lambda *_, offload_policy, **__: policies.append(offload_policy))
    world = SimpleNamespace(device=torch.device(device), mesh=None, shards=2)
    apply_fsdp(tiny_model(), world, dtype="bfloat16", offload=offload)
    expected = CPUOffloadPolicy(pin_memory=device == "cuda") if offload else OffloadPolicy()
    assert policies == [expected] * 3  # two blocks and the root


@pytest.mark.parametrize(("device", "on_cpu"), [("cpu", False), ("meta", True)])
def test_an_optimizer_scalar_moves_with_its_parameter_unless_it_was_apart(device, on_cpu):
    """A step count saved next to a parameter on the host must be on the GPU when the parameter is there."""
    layer = torch.nn.Linear(2, 1, bias=False, device=device)
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.state[layer.weight] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(layer.weight)}
    _, layout = checkpoint._optimizer_tensors("model", layer, optimizer)
    assert layout["weight"]["step"] == {"kind": "scalar", "dtype": "float32", "on_cpu": on_cpu, "value": 3.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_trains_resumes_and_moves_back(tmp_path):
    """AdamW on the host and on the device may differ in the last bits; a resumed run on the host must not."""
    flags = {"device": "cuda", "dtype": "bfloat16", "deterministic": "on"}
    for name, parts in {
        "host": [(4, "on")],
        "resumed": [(2, "on"), (4, "on")],
        "back": [(2, "on"), (4, "off")],
    }.items():
        for steps, offload in parts:
            code, _, err = run_here(tmp_path / name, **flags, max_steps=steps, offload=offload)
            assert code == 0, err
    assert digest_of_final(tmp_path / "resumed") == digest_of_final(tmp_path / "host")
    for row, other in zip(figures_of(tmp_path / "back"), figures_of(tmp_path / "host"), strict=True):
        assert row["sft/loss"] == pytest.approx(other["sft/loss"], rel=1e-3)
