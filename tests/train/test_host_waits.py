"""How often the host waits for the device in a step of SFT, counted without a device.

The model and the batches live on PyTorch's meta device, which computes nothing, so every operator that would move a
number between host and device is seen by a dispatch mode: reads (item, tolist), operators whose result has a size that
only the device knows, and copies from memory that is not pinned or with non_blocking off.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.tiny_run import random_batch, tiny_model
from train.distributed import init_world
from train.sft_config import SFTConfig
from train.sft_loop import train_step

META = torch.device("meta")


class CountWaits(TorchDispatchMode):
    """Counts what would make the host wait, and answers reads with ones."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        devices = {each.device.type for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select") and "meta" in devices:
            self.counts["read"] += 1
            return 1.0
        if name == "_to_copy" and kwargs.get("device") is not None:
            target = torch.device(kwargs["device"]).type
            if target == "cpu" and "meta" in devices:
                self.counts["read"] += 1
                return torch.ones(args[0].shape, dtype=args[0].dtype)
            if target == "meta" and "cpu" in devices:
                self.counts["copy without wait" if kwargs.get("non_blocking") else "copy"] += 1
        return function(*args, **kwargs)


def test_the_counting_itself():
    numbers = torch.ones(3, device=META)
    with CountWaits() as waits:
        assert numbers.sum().item() == 1.0
        assert numbers.tolist() == [1.0, 1.0, 1.0]
        torch.zeros(2).to(META)
        torch.zeros(2).to(META, non_blocking=True)
        torch.zeros(2).to("cpu").sum().item()
    assert waits.counts == {"read": 2, "copy": 1, "copy without wait": 1}


@pytest.mark.parametrize("n_micro_batches", [1, 4])
def test_a_step_waits_once_however_many_micro_batches(monkeypatch, n_micro_batches):
    """At an earlier commit, with 1 and 4 micro-batches: 7 and 22 waits, and 3 sums over ranks on the host."""
    world = replace(init_world("cpu"), device=META)
    sums = Counter()
    monkeypatch.setattr("torch.distributed.all_reduce", lambda totals, op: sums.update([totals.device.type]))
    model = tiny_model().to(META)
    model.inverse_frequencies = model.inverse_frequencies.to(META)  # moves once per run
    optimizer = torch.optim.AdamW(model.parameters())
    batches = [random_batch(seed) for seed in range(n_micro_batches)]
    with CountWaits() as waits:
        train_step(SFTConfig(loss_normalization="token_mean"), model, optimizer, batches, world, step=1)
    assert waits.counts == {"read": 1, "copy without wait": 5 * n_micro_batches + 1}
    assert sums == {"meta": 2}
