"""Checkpoints: nothing lost, nothing half-written, nothing damaged that is read."""

import json
import os
import pickle
import resource
import subprocess

import pytest
import torch

from tests.support.tiny_run import random_batch, tiny_model
from train.checkpoint import (
    CheckpointError,
    check_files,
    list_checkpoints,
    load_checkpoint,
    newest_good_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from train.distributed import init_world, local_part, shard_model
from train.optimizer import make_adamw
from train.seeding import random_state, restore_random_state
from train.sft_config import SFTConfig
from train.sft_loop import train_step


@pytest.fixture
def world():
    return init_world("cpu")


def make_trained(world, *, steps: int, optimizer_class=None, seed: int = 0, **changes):
    """A sharded model and its optimizer after `steps` steps."""
    model = tiny_model(seed, **changes)
    shard_model(model, world, dtype="float32")
    if optimizer_class is None:
        optimizer = make_adamw(model, learning_rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.01)
    else:
        optimizer = optimizer_class(model.parameters())
    advance(model, optimizer, world, range(steps))
    return model, optimizer


def advance(model, optimizer, world, steps):
    for step in steps:
        config = SFTConfig(loss_normalization="token_mean", max_grad_norm=1.0)
        train_step(config, model, optimizer, [random_batch(step)], world, step=step + 1)


def save(folder, step, model, optimizer, world, *, keep):
    parts = {"model": (model, optimizer)}
    return save_checkpoint(folder, step, parts, world, identity="run", keep=keep, extra={})


def weights(model):
    return {name: local_part(parameter).detach().clone() for name, parameter in model.named_parameters()}


def assert_equal_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


# ---------------------------------------------------------------------------------------------------------------------
# Whole


@pytest.mark.parametrize("optimizer_class", [None, momentum, torch.optim.Adagrad])
def test_training_goes_on_bit_for_bit(world, tmp_path, optimizer_class):
    model, optimizer = make_trained(world, steps=3, optimizer_class=optimizer_class)
    path = save(tmp_path, 3, model, optimizer, world, keep=2)
    advance(model, optimizer, world, range(3, 6))
    other, other_optimizer = make_trained(world, steps=1, optimizer_class=optimizer_class, seed=9)
    state = load_checkpoint(path, {"model": (other, other_optimizer)}, world)
    assert (state.step, state.saved_world_size) == (3, 1)
    advance(other, other_optimizer, world, range(3, 6))
    assert_equal_bits(weights(model), weights(other))


def test_optimizer_scalars_and_generators_come_back(world, tmp_path):
    model, optimizer = make_trained(world, steps=2)
    torch.manual_seed(5)
    path = save(tmp_path, 2, model, optimizer, world, keep=2)
    drawn = torch.rand(4)
    fresh, fresh_optimizer = make_trained(world, steps=0)
    load_checkpoint(path, {"model": (fresh, fresh_optimizer)}, world)
    assert torch.equal(torch.rand(4), drawn)
    assert {state["step"].item() for state in fresh_optimizer.state.values()} == {2.0}


def test_random_state_is_plain_json_and_exact():
    import random

    import numpy

    state = json.loads(json.dumps(random_state()))
    drawn = (random.random(), numpy.random.rand(3).tolist(), torch.rand(3).tolist())
    restore_random_state(state)
    assert (random.random(), numpy.random.rand(3).tolist(), torch.rand(3).tolist()) == drawn


def test_no_pickle_is_written_or_read(world, tmp_path, monkeypatch):
    model, optimizer = make_trained(world, steps=1)
    path = save(tmp_path, 1, model, optimizer, world, keep=2)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}

    def refuse(*_: object, **__: object):
        raise AssertionError("a pickle file was read")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load_checkpoint(path, {"model": (model, optimizer)}, world)


def test_state_is_split_into_several_files(world, tmp_path, monkeypatch):
    monkeypatch.setattr("train.checkpoint.STATE_FILE_BYTES", 20_000)
    model, optimizer = make_trained(world, steps=1)
    path = save(tmp_path, 1, model, optimizer, world, keep=2)
    assert len(list(path.glob("state/*.safetensors"))) > 3
    fresh, fresh_optimizer = make_trained(world, steps=0, seed=4)
    load_checkpoint(path, {"model": (fresh, fresh_optimizer)}, world)
    assert_equal_bits(weights(model), weights(fresh))


def test_another_model_is_refused_by_name(world, tmp_path):
    model, optimizer = make_trained(world, steps=1)
    path = save(tmp_path, 1, model, optimizer, world, keep=2)
    other, other_optimizer = make_trained(world, steps=0, tie_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing tensors \['model.output.weight'\]"):
        load_checkpoint(path, {"model": (other, other_optimizer)}, world)


def test_an_optimizer_from_before_sharding_is_refused(world, tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shard_model(model, world, dtype="bfloat16")  # one rank in float32 is not sharded at all
    with pytest.raises(CheckpointError, match="build it after shard_model"):
        save(tmp_path, 1, model, optimizer, world, keep=2)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged


def save_two(world, folder):
    model, optimizer = make_trained(world, steps=1)
    for step in (1, 2):
        save(folder, step, model, optimizer, world, keep=0)
    return folder / "step_00000001", folder / "step_00000002"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def newest_file(path, pattern):
    return min(path.glob(pattern))


@pytest.mark.parametrize("damage", [truncate, flip, os.remove])
@pytest.mark.parametrize(
    "pattern", ["state/*.safetensors", "trainer_state.json", "random_rank00000.json", "manifest.json"]
)
def test_every_damage_to_the_newest_is_seen_and_the_older_one_taken(world, tmp_path, damage, pattern):
    old, new = save_two(world, tmp_path)
    if damage is flip and pattern == "manifest.json":
        pytest.skip("a flipped bit in the manifest may hit white space; what it lists is checked against the files")
    damage(newest_file(new, pattern))
    path, refused = newest_good_checkpoint(tmp_path, world, identity="run")
    assert path == old
    assert len(refused) == 1 and refused[0].startswith(f"{new}: refused: ") and "found" in refused[0]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 9}', '{"format": 2, "files": {}}', '{"format": 2, "files": []}']
)
def test_a_nonsense_manifest_is_refused(world, tmp_path, text):
    old, new = save_two(world, tmp_path)
    (new / "manifest.json").write_text(text)
    assert check_files(new)
    assert newest_good_checkpoint(tmp_path, world, identity="run")[0] == old


def test_a_checkpoint_of_another_run_is_refused(world, tmp_path):
    save_two(world, tmp_path)
    path, refused = newest_good_checkpoint(tmp_path, world, identity="other")
    assert path is None and len(refused) == 2 and "another run" in refused[0]


def test_a_refused_checkpoint_is_replaced_when_its_step_is_reached_again(world, tmp_path):
    _, new = save_two(world, tmp_path)
    truncate(newest_file(new, "state/*.safetensors"))
    model, optimizer = make_trained(world, steps=1)
    save(tmp_path, 2, model, optimizer, world, keep=0)
    assert newest_good_checkpoint(tmp_path, world, identity="run") == (new, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


# ---------------------------------------------------------------------------------------------------------------------
# Pruning, leftovers, full disk


def test_older_checkpoints_are_pruned(world, tmp_path):
    model, optimizer = make_trained(world, steps=1)
    for step in (3, 9, 10, 11):
        save(tmp_path, step, model, optimizer, world, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000011", "step_00000010"]


def test_pruning_counts_no_damaged_newer_checkpoint(world, tmp_path):
    """Resumed from 1 because 9 was damaged: saving 2 with keep=1 must keep 2, not 9."""
    model, optimizer = make_trained(world, steps=1)
    for step in (1, 9, 2):
        save(tmp_path, step, model, optimizer, world, keep=1 if step == 2 else 0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000009", "step_00000002"]


def test_leftovers_of_killed_saves_are_removed(tmp_path):
    (tmp_path / ".saving_step_00000004" / "state").mkdir(parents=True)
    (tmp_path / "step_00000003").mkdir()
    assert remove_leftovers(tmp_path) == [".saving_step_00000004"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_a_write_that_fails_leaves_the_older_checkpoint(world, tmp_path):
    """A file-size limit stands in for a full disk: write() fails with an OSError in the middle of a state file."""
    model, optimizer = make_trained(world, steps=1)
    good = save(tmp_path, 1, model, optimizer, world, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, 2, model, optimizer, world, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert message.startswith(f"cannot save {tmp_path / 'step_00000002'}: ") and "File too large" in message
    assert "\n" not in message and "Traceback" not in message
    assert [path.name for path in tmp_path.iterdir()] == [good.name] and check_files(good) == ""


def test_a_full_disk_leaves_the_older_checkpoint(world, tmp_path):
    """A real one: a tmpfs of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(line, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        model, optimizer = make_trained(world, steps=1)
        saved = 0
        with pytest.raises(
            CheckpointError, match=r"step_0000000\d: found .* MB free, expected .* MB for the checkpoint"
        ):
            for step in range(1, 9):
                save(disk, step, model, optimizer, world, keep=0)
                saved = step
        assert saved >= 1
        assert len(list(disk.iterdir())) == saved  # no leftovers
        assert newest_good_checkpoint(disk, world, identity="run")[0].name == f"step_{saved:08d}"
    finally:
        subprocess.run(["umount", str(disk)], check=False)
