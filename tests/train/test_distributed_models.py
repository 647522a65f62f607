"""Two models on one and two ranks: critics, plain copies for rollouts, checkpoints of several parts.

What needs two ranks runs in one pair of gloo processes (two_ranks), which asserts on both.
"""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from model.config import ModelFolderError
from model.pretrained_weights import load_pretrained, load_value_model, save_pretrained, save_value_model
from model.sampling import generate
from tests.model.test_value_model import random_ids, tiny_value_model
from tests.support.processes import free_port, spawn
from tests.support.tiny_run import VOCAB_SIZE, tiny_model
from train.checkpoint import CheckpointError, load_checkpoint, load_weights, newest_good_checkpoint, save_checkpoint
from train.distributed import (
    World,
    apply_fsdp,
    clip_gradients,
    close_world,
    fsdp_modules,
    gathered_model,
    init_world,
    load_sharded_model,
    load_sharded_value_model,
    local_part,
    reshard_all,
    shard_model,
    wait_for_all,
)
from train.optimizer import make_adamw


@pytest.fixture
def world():
    return init_world("cpu")


def make_folders(root: Path) -> None:
    """A policy with a head of its own and a critic; the 33 rows of w1 and w3 do not divide by 2."""
    save_pretrained(tiny_model(tie_embeddings=False, ffn_dim=33), root / "policy")
    save_value_model(tiny_value_model(tie_embeddings=False, ffn_dim=33), root / "critic")


def wrap(model: torch.nn.Module, world: World) -> None:
    """FSDP in float32 also on one rank, where shard_model leaves a model alone."""
    if not fsdp_modules(model):
        apply_fsdp(model, world, dtype="float32")
    assert fsdp_modules(model)


def load_parts(root: Path, world: World) -> dict:
    """Policy and critic of make_folders, wrapped as by `wrap`, each with its AdamW."""
    settings = {"dtype": "float32", "tokenizer_size": VOCAB_SIZE}
    models = {
        "policy": load_sharded_model(str(root / "policy"), world, **settings),
        "critic": load_sharded_value_model(str(root / "critic"), world, **settings),
    }
    for model in models.values():
        wrap(model, world)
    settings = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.01}
    return {part: (model, make_adamw(model, **settings)) for part, model in models.items()}


def backward(model: torch.nn.Module, world: World, seed: int) -> None:
    """Gradients of a squared error, the same on any number of ranks."""
    (model(random_ids(12, seed)) - 1.0).square().mean().div(world.size).backward()


def advance(parts: dict, world: World, seeds: range) -> None:
    for seed in seeds:
        for model, optimizer in parts.values():
            backward(model, world, seed)
            clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def full_state(parts: dict) -> dict[str, torch.Tensor]:
    """Every weight and every optimizer tensor of all parts, whole, on each rank."""
    state = {}
    for part, (model, optimizer) in parts.items():
        reshard_all(model)
        for name, parameter in model.named_parameters():
            tensors = {"weight": parameter, **optimizer.state[parameter]}
            for key, value in tensors.items():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                state[f"{part}.{name}.{key}"] = whole.detach().clone()
    return state


def assert_same_state(first: dict, second: dict, **tolerance: float) -> None:
    assert first.keys() == second.keys() and len(first) > 100
    for name, tensor in first.items():
        if tolerance:
            torch.testing.assert_close(second[name], tensor, msg=lambda text, n=name: f"{n}: {text}", **tolerance)
        else:
            assert torch.equal(second[name], tensor), name


# ---------------------------------------------------------------------------------------------------------------------
# One rank


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_gathered_model_computes_what_the_sharded_one_does(world, dtype, tied):
    model = tiny_model(tie_embeddings=tied)
    shard_model(model, world, dtype=dtype)
    with torch.no_grad():
        expected = model(random_ids(9))  # leaves everything gathered: gathered_model has to reshard first
        plain = gathered_model(model, world, dtype=dtype)
        assert torch.equal(plain(random_ids(9)), expected)
    assert not plain.training and not any(parameter.requires_grad for parameter in plain.parameters())
    assert {parameter.dtype for parameter in plain.parameters()} == {expected.dtype}
    assert type(plain).__name__ == "Transformer"


@pytest.mark.parametrize("wrapped", [False, True])
def test_gathered_model_shares_memory_on_one_rank_in_fp32(world, wrapped):
    model = tiny_model()
    if wrapped:
        wrap(model, world)
    shards = {name: local_part(parameter).data_ptr() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model(random_ids(5))  # the copies that this leaves must not be what the plain model holds
    plain = gathered_model(model, world, dtype="float32")
    assert {name: parameter.data_ptr() for name, parameter in plain.named_parameters()} == shards
    backward(model, world, 1)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    with torch.no_grad():
        assert torch.equal(plain(random_ids(9)), model(random_ids(9)))  # it follows the optimizer


def test_one_rank_in_float32_stays_a_plain_model(world):
    model = tiny_model()
    before = list(model.parameters())
    shard_model(model, world, dtype="float32")
    assert all(left is right for left, right in zip(before, model.parameters(), strict=True))
    assert not fsdp_modules(model)


def test_reshard_all_frees_the_gathered_copies(world):
    model = tiny_model()
    wrap(model, world)
    with torch.no_grad():
        model(random_ids(9))
    gathered = list(model.parameters())
    assert not any(isinstance(parameter, DTensor) for parameter in gathered)
    reshard_all(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert {parameter.untyped_storage().size() for parameter in gathered} == {0}
    reshard_all(model)
    reshard_all(tiny_model())  # nothing to do


@pytest.mark.parametrize("value_model", [False, True])
def test_a_forward_without_gradients_leaves_no_trace(world, value_model):
    """PPO's order: no_grad forward (rollout figures), forward, backward. Gradients as without the first."""
    gradients = []
    for first in (False, True):
        model = tiny_value_model() if value_model else tiny_model()
        wrap(model, world)
        if first:
            with torch.no_grad():
                model(random_ids(5, seed=3))
        backward(model, world, 1)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        gradients.append({name: local_part(parameter.grad) for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_sharded_critic_trains_like_a_plain_one(world):
    plain, model = tiny_value_model(), tiny_value_model()
    backward(plain, world, 1)
    wrap(model, world)
    model.activation_checkpointing = True
    backward(model, world, 1)
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(local_part(parameter.grad), expected.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_sharded_critic_in_bf16_answers_in_fp32_and_keeps_fp32_gradients(world):
    model = tiny_value_model()
    shard_model(model, world, dtype="bfloat16")
    assert model(random_ids(5)).dtype == torch.float32
    backward(model, world, 1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_critic_with_too_few_rows_is_refused(world, tmp_path):
    make_folders(tmp_path)
    with pytest.raises(ModelFolderError, match="found a tokenizer of 401 ids, expected at most 400"):
        load_sharded_value_model(str(tmp_path / "critic"), world, dtype="float32", tokenizer_size=401)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of several parts


def save_parts(folder: Path, step: int, parts: dict, world: World) -> Path:
    folder.mkdir(exist_ok=True)
    return save_checkpoint(folder, step, parts, world, identity="run", keep=0, extra={"kl_coef": 0.125, "seen": step})


def test_two_parts_go_on_bit_for_bit(world, tmp_path):
    make_folders(tmp_path)
    parts = load_parts(tmp_path, world)
    advance(parts, world, range(2))
    with torch.no_grad():
        parts["policy"][0](random_ids(5))  # gathered when the checkpoint is saved
    path = save_parts(tmp_path / "checkpoints", 2, parts, world)
    others = load_parts(tmp_path, world)
    with torch.no_grad():
        others["critic"][0](random_ids(5))  # gathered when it is read
    state = load_checkpoint(path, others, world)
    assert (state.step, state.extra) == (2, {"kl_coef": 0.125, "seen": 2})
    for each in (parts, others):
        advance(each, world, range(2, 4))
    assert_same_state(full_state(parts), full_state(others))


def test_the_names_in_the_files(world, tmp_path):
    make_folders(tmp_path)
    parts = load_parts(tmp_path, world)
    advance(parts, world, range(1))
    path = save_parts(tmp_path / "checkpoints", 1, parts, world)
    names = {name for file in path.glob("state/*.safetensors") for name in load_file(file)}
    for part, model in (("policy", tiny_model(tie_embeddings=False)), ("critic", tiny_value_model())):
        for name, _ in model.named_parameters():
            wanted = {f"{part}.{name}", f"{part}_optimizer.exp_avg.{name}", f"{part}_optimizer.exp_avg_sq.{name}"}
            assert wanted <= names
            names -= wanted
    assert not names


def test_weights_of_one_part_alone(world, tmp_path):
    make_folders(tmp_path)
    parts = load_parts(tmp_path, world)
    advance(parts, world, range(1))
    path = save_parts(tmp_path / "checkpoints", 1, parts, world)
    for part, (model, _) in load_parts(tmp_path, world).items():
        assert load_weights(path, model, part) == 1
        for parameter, expected in zip(model.parameters(), parts[part][0].parameters(), strict=True):
            assert torch.equal(local_part(parameter), local_part(expected))
    with pytest.raises(CheckpointError, match="missing tensors .'model.layers.0"):
        load_weights(path, load_parts(tmp_path, world)["policy"][0])


def test_other_parts_are_refused(world, tmp_path):
    make_folders(tmp_path)
    parts = load_parts(tmp_path, world)
    path = save_parts(tmp_path / "checkpoints", 0, parts, world)
    with pytest.raises(CheckpointError, match=r"found the parts \['critic', 'policy'\], expected \['model'\]"):
        load_checkpoint(path, {"model": parts["policy"]}, world)
    swapped = {"policy": parts["critic"], "critic": parts["policy"]}
    with pytest.raises(CheckpointError, match="missing tensors .'critic.layers.0"):
        load_checkpoint(path, swapped, world)


def test_an_older_format_is_refused(world, tmp_path):
    make_folders(tmp_path)
    path = save_parts(tmp_path / "checkpoints", 0, load_parts(tmp_path, world), world)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    found, refused = newest_good_checkpoint(tmp_path / "checkpoints", world, identity="run")
    assert found is None
    reason = "manifest.json: found format 1, expected 2; it was saved by another version of this code"
    assert refused == [f"{path}: refused: {reason}"]


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks


def two_ranks(rank: int, port: int, folder: str) -> None:
    """All that two ranks must agree on; the parent made the folders and a checkpoint saved by one rank."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # a rank left waiting fails instead of hanging
    world, root = init_world("cpu"), Path(folder)
    try:
        check_rollout_model(world, root)
        check_order_of_forwards(world, root)
        check_checkpoints(world, root)
        check_loading_and_export(world, root)
    finally:
        close_world()


def check_rollout_model(world: World, root: Path) -> None:
    single = load_pretrained(root / "policy")
    model = load_sharded_model(str(root / "policy"), world, dtype="float32", tokenizer_size=VOCAB_SIZE)
    with torch.no_grad():
        assert torch.equal(model(random_ids(9)), single(random_ids(9)))
    assert not isinstance(model.norm.weight, DTensor)  # the root is gathered still
    plain = gathered_model(model, world, dtype="float32")
    assert isinstance(model.norm.weight, DTensor)
    assert torch.equal(plain(random_ids(9)), single(random_ids(9)))
    prompts = [[1, 5, 6 + number] for number in range(7 * world.rank)]  # none on rank 0
    responses = generate(plain, prompts, max_new_tokens=3 + 20 * world.rank, eos_id=None)
    assert responses == generate(single, prompts, max_new_tokens=3 + 20 * world.rank, eos_id=None)
    assert len(responses) == 7 * world.rank
    if world.rank == 1:
        generate(plain, [[1]], max_new_tokens=4, eos_id=None)  # nobody else takes part
    # a snapshot: it does not follow the optimizer
    before = plain(random_ids(9))
    backward(model, world, 1)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(plain(random_ids(9)), before)
    with torch.no_grad():
        now = model(random_ids(9))
        assert not torch.equal(now, before)
        assert torch.equal(gathered_model(model, world, dtype="float32")(random_ids(9)), now)
    reshard_all(model)
    halved = load_sharded_model(str(root / "policy"), world, dtype="bfloat16", tokenizer_size=VOCAB_SIZE)
    with torch.no_grad():
        assert torch.equal(gathered_model(halved, world, dtype="bfloat16")(random_ids(9)), halved(random_ids(9)))


def check_order_of_forwards(world: World, root: Path) -> None:
    for part in ("policy", "critic"):
        gradients = []
        for first in (False, True):
            model = load_parts(root, world)[part][0]
            if first:
                with torch.no_grad():
                    model(random_ids(5, seed=3))
                assert not isinstance(next(model.parameters()), DTensor)
            backward(model, world, 1)
            gradients.append({name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()})
        single = (load_pretrained if part == "policy" else load_value_model)(root / part)
        (single(random_ids(12, 1)) - 1.0).square().mean().backward()
        for name, parameter in single.named_parameters():
            assert torch.equal(gradients[0][name], gradients[1][name]), name
            torch.testing.assert_close(gradients[0][name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


def check_checkpoints(world: World, root: Path) -> None:
    """From one rank's checkpoint to two, and two's back to the parent. Rank 1 holds no row of the value head."""
    parts = load_parts(root, world)
    assert local_part(parts["critic"][0].value_head.weight).numel() == (32 if world.is_main else 0)
    path, refused = newest_good_checkpoint(root / "from_one", world, identity="run")
    state = load_checkpoint(path, parts, world)
    assert not refused and (state.saved_world_size, state.extra) == (1, {"kl_coef": 0.125, "seen": 2})
    expected = load_file(root / "state_of_one.safetensors")
    assert_same_state(full_state(parts), expected)
    advance(parts, world, range(2, 4))
    saved = save_parts(root / "from_two", 4, parts, world)
    whole = full_state(parts)
    if world.is_main:
        save_file(whole, root / "state_of_two.safetensors")
    others = load_parts(root, world)
    load_checkpoint(saved, others, world)
    assert_same_state(full_state(others), whole)


def check_loading_and_export(world: World, root: Path) -> None:
    """Sharded models hold the folder's tensors bit for bit, gathered; an exported critic holds the trained ones."""
    parts = load_parts(root, world)
    for part, load in (("policy", load_pretrained), ("critic", load_value_model)):
        single = load(root / part)
        for name, parameter in parts[part][0].named_parameters():
            assert torch.equal(parameter.full_tensor(), single.get_parameter(name)), name
    critic = parts["critic"][0]
    advance({"critic": parts["critic"]}, world, range(1))
    save_value_model(critic, root / "exported")
    wait_for_all()
    single, before = load_value_model(root / "exported"), load_value_model(root / "critic")
    for name, parameter in critic.named_parameters():
        assert torch.equal(parameter.full_tensor(), single.get_parameter(name)), name
    assert not torch.equal(single.backbone.norm.weight, before.backbone.norm.weight)


@pytest.mark.slow
def test_two_ranks(world, tmp_path):
    make_folders(tmp_path)
    parts = load_parts(tmp_path, world)
    advance(parts, world, range(2))
    save_parts(tmp_path / "from_one", 2, parts, world)
    save_file(full_state(parts), tmp_path / "state_of_one.safetensors")
    spawn(two_ranks, (free_port(), str(tmp_path)), ranks=2)
    others = load_parts(tmp_path, world)
    state = load_checkpoint(tmp_path / "from_two" / "step_00000004", others, world)
    assert (state.step, state.saved_world_size) == (4, 2)
    after_two = load_file(tmp_path / "state_of_two.safetensors")
    assert_same_state(full_state(others), after_two)
    # one rank from the same point: the same up to the order of sums
    advance(parts, world, range(2, 4))
    assert_same_state(full_state(parts), after_two, rtol=1e-3, atol=1e-5)
