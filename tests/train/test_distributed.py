"""Sharding, gradient sums and clipping: one rank against a plain model, and 1, 2, 4 ranks against each other.

The command of the documentation, with torchrun, is in tests/train/test_lost_ranks.py.
"""

import json
import math
import os

import pytest
import torch

from tests.support.processes import free_port, run, spawn
from tests.support.tiny_run import arguments, make_records, metrics_of, random_batch, run_here, tiny_model
from train.distributed import (
    DeviceError,
    any_rank,
    apply_fsdp,
    clip_gradients,
    close_world,
    gather_objects,
    gathered_model,
    global_sum,
    gradient_square,
    init_world,
    local_part,
    set_up_cuda,
    shard_model,
)
from train.sft_config import SFTConfig
from train.sft_loop import train_step
from train.weighted_cross_entropy import linear_weighted_cross_entropy


@pytest.fixture
def world():
    return init_world("cpu")


def batch_loss(model, batch, device):
    """sum_i w_i * ce_i of one micro-batch through the sharded model, as train_step computes it."""
    batch = batch.to(device)
    hidden_BTD = model(batch.input_ids_T[None], segment_lengths=batch.segment_lengths, return_hidden=True)
    return linear_weighted_cross_entropy(hidden_BTD[0], model.head_weight(), batch.target_ids_T, batch.loss_weights_T)


def plain_gradients(model, batches, denominator):
    """Gradients of an unsharded model through full logits and torch's own cross-entropy: none of our training code."""
    total = 0.0
    for batch in batches:
        start = 0
        for length in batch.segment_lengths:
            part = slice(start, start + length)
            logits_TV = model(batch.input_ids_T[None, part])[0]
            losses_T = torch.nn.functional.cross_entropy(logits_TV, batch.target_ids_T[part], reduction="none")
            total = total + (losses_T * batch.loss_weights_T[part]).sum()
            start += length
    (total / denominator).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_one_process_is_a_world_of_one(world):
    assert (world.rank, world.size, world.is_main, world.device.type) == (0, 1, True, "cpu")
    assert global_sum([1.5, 2**53]) == [1.5, 2**53]
    assert any_rank(True) and not any_rank(False)
    assert gather_objects({"a": 1}) == [{"a": 1}]


def test_cuda_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device: found cuda, expected cpu or auto"):
        init_world("cuda")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_gradients_equal_a_plain_model(world, tied, checkpointing):
    batches = [random_batch(1), random_batch(2, n_tokens=25), random_batch(3, n_tokens=60)]
    denominator = sum(batch.denominator for batch in batches)
    expected = plain_gradients(tiny_model(tie_embeddings=tied), batches, denominator)
    model = tiny_model(tie_embeddings=tied)
    apply_fsdp(model, world, dtype="float32")  # on one rank too, where shard_model does nothing
    model.activation_checkpointing = checkpointing
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: local_part(parameter).detach().clone() for name, parameter in model.named_parameters()}
    config = SFTConfig(loss_normalization="token_mean", max_grad_norm=0.0)
    result = train_step(config, model, optimizer, batches, world, step=1)
    assert result.denominator == pytest.approx(denominator)
    for name, parameter in model.named_parameters():
        moved = before[name] - local_part(parameter)  # SGD with rate 1: the step is the gradient
        # 3e-7: subtracting two fp32 weights of size about 1 loses digits of the step
        torch.testing.assert_close(moved, expected[name], rtol=1e-4, atol=3e-7, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("when", "reduced"), [("step", [False, False]), ("micro_batch", [False, True])])
def test_gradients_are_reduced_at_the_end_of_a_step_or_of_each_micro_batch(world, when, reduced):
    model, seen = tiny_model(), []
    apply_fsdp(model, world, dtype="float32")
    weight = model.norm.weight  # the shard: in forward the name belongs to the gathered copy
    model.register_forward_pre_hook(lambda *_: seen.append(weight.grad is not None))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = SFTConfig(reduce_gradients=when)
    train_step(config, model, optimizer, [random_batch(1), random_batch(2)], world, step=1)
    assert seen == reduced


def test_bfloat16_computes_in_bf16_and_keeps_fp32_weights_and_gradients(world):
    model = tiny_model()
    shard_model(model, world, dtype="bfloat16")
    seen = []
    model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    batch_loss(model, random_batch(1), world.device).backward()
    assert seen == [torch.bfloat16]
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32 and parameter.grad.dtype == torch.float32


def test_idle_batch_gives_zero_gradients_not_none(world):
    model = tiny_model()
    apply_fsdp(model, world, dtype="float32")  # on one rank too, where shard_model does nothing
    batch_loss(model, random_batch(1, trained_share=0.0), world.device).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not local_part(parameter.grad).any(), name


# ---------------------------------------------------------------------------------------------------------------------
# CUDA's settings


def test_settings_of_cuda():
    """No attention by cuDNN, which plans for every new shape; products in half precision are summed in fp32."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.cudnn_sdp_enabled()
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    kept = [getattr(matmul, name) for name in names]
    try:
        set_up_cuda()
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
        assert [getattr(matmul, name) for name in names] == [False, False]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        for name, value in zip(names, kept, strict=True):
            setattr(matmul, name, value)


# ---------------------------------------------------------------------------------------------------------------------
# Clipping


def with_gradients(*rows):
    parameters = [torch.nn.Parameter(torch.zeros(len(row))) for row in rows]
    for parameter, row in zip(parameters, rows, strict=True):
        parameter.grad = torch.tensor(row)
    return parameters


def test_clip_by_hand(world):
    parameters = with_gradients([3.0, 0.0], [4.0])  # norm 5
    assert clip_gradients(parameters, 1.0) == pytest.approx(5.0)
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.0])
    assert parameters[1].grad.tolist() == pytest.approx([0.8])


def test_a_rank_without_gradients_adds_nothing_on_the_device_of_its_parameters():
    bare = [torch.nn.Parameter(torch.zeros(2, device="meta"))]
    assert gradient_square(bare).device.type == "meta"
    empty = with_gradients([])
    assert gradient_square(empty).item() == 0.0 and gradient_square(empty).dtype == torch.float64


@pytest.mark.parametrize("limit", [0.0, 5.0, 7.0])
def test_no_clipping_at_or_below_the_limit(world, limit):
    parameters = with_gradients([3.0, 0.0], [4.0])
    assert clip_gradients(parameters, limit) == pytest.approx(5.0)
    assert parameters[0].grad.tolist() == [3.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_norm_is_returned_and_gradients_stay(world, bad):
    parameters = with_gradients([3.0, bad], [4.0])
    assert not math.isfinite(clip_gradients(parameters, 1.0))
    assert parameters[1].grad.tolist() == [4.0]


def test_clip_equals_brute_force_on_sharded_gradients(world):
    model = tiny_model()
    apply_fsdp(model, world, dtype="float32")  # on one rank too, where shard_model does nothing
    batch_loss(model, random_batch(5), world.device).backward()
    before = torch.cat([local_part(parameter.grad).flatten().double() for parameter in model.parameters()])
    limit = before.norm().item() / 3
    assert clip_gradients(model.parameters(), limit) == pytest.approx(before.norm().item(), rel=1e-12)
    after = torch.cat([local_part(parameter.grad).flatten().double() for parameter in model.parameters()])
    torch.testing.assert_close(after, before / 3, rtol=1e-6, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def assert_same_training(first, second, steps):
    rows, others = metrics_of(first), metrics_of(second)
    assert len(rows) == len(others) == steps
    for row, other in zip(rows, others, strict=True):
        for key in ("sft/loss", "sft/grad_norm"):
            assert other[key] == pytest.approx(row[key], rel=1e-4), (row["step"], key)
        for key in ("step", "sft/trained_tokens", "sft/trained_turns", "sft/denominator"):
            assert other[key] == row[key], (row["step"], key)


@pytest.fixture(scope="module")
def flags_of_steps(tmp_path_factory):
    """Two epochs of 4, 4 and 1 trajectories: with several ranks the third step of each leaves all but one idle."""
    data = tmp_path_factory.mktemp("nine") / "data.json"
    data.write_text(json.dumps(make_records(9)), encoding="utf-8")
    return {"data": data, "global_batch_size": 4, "epochs": 2}


@pytest.fixture(scope="module")
def trained_by_one_rank(flags_of_steps, tmp_path_factory):
    """The output of a whole run."""
    output = tmp_path_factory.mktemp("one_rank") / "run"
    code, _, err = run_here(output, **flags_of_steps)
    assert code == 0, err
    return output


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["turn_mean", "token_mean"])
def test_two_ranks_train_like_one(flags_of_steps, tmp_path, normalization):
    """1 rank x 4 micro-batches against 2 x 2; step 3 has one trajectory, so that one of two ranks is idle."""
    flags = flags_of_steps | {"max_steps": 4, "loss_normalization": normalization}
    code, _, err = run_here(tmp_path / "a", **flags)
    assert code == 0, err
    flags["reduce_gradients"] = "micro_batch" if normalization == "token_mean" else "step"
    code, _, err = run("run_sft", arguments(tmp_path / "b", **flags), ranks=2)
    assert code == 0, err
    assert_same_training(tmp_path / "a", tmp_path / "b", 4)


def two_by_two(rank: int, port: int, folder: str) -> None:
    """4 ranks, 2 copies of the model in 2 shards each, one batch per rank: gradients, norm and copies, by an oracle."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with pytest.raises(DeviceError, match="--shard_group_size: found 3, expected 0 or a divisor of 4, the number of r"):
        init_world("cpu", shard_group_size=3)
    world = init_world("cpu", shard_group_size=2)
    assert (world.size, world.shards, tuple(world.mesh.shape)) == (4, 2, (2, 2))
    batches = [random_batch(number + 1, n_tokens=20 + 7 * number) for number in range(4)]
    denominator = sum(batch.denominator for batch in batches)
    expected = plain_gradients(tiny_model(), batches, denominator)
    norm = torch.cat([gradient.flatten().double() for gradient in expected.values()]).norm().item()
    model = tiny_model()
    shard_model(model, world, dtype="float32")
    (batch_loss(model, batches[rank], world.device) / denominator).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-7, msg=name)
        shards = gather_objects(local_part(parameter.grad).tolist())
        assert shards[:2] == shards[2:] and sum(map(len, shards)) == 2 * len(expected[name])
    assert clip_gradients(model.parameters(), norm / 2) == pytest.approx(norm, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name] / 2, rtol=1e-4, atol=1e-7, msg=name)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    plain = gathered_model(model, world, dtype="float32")
    for name, parameter in tiny_model().named_parameters():
        moved = parameter.detach() - plain.get_parameter(name)
        torch.testing.assert_close(moved, expected[name] / 2, rtol=1e-4, atol=3e-7, msg=name)
    close_world()


@pytest.mark.slow
def test_two_copies_in_two_shards_each(tmp_path):
    spawn(two_by_two, (free_port(), str(tmp_path)), ranks=4)


@pytest.mark.slow
def test_groups_of_shards_train_like_one_rank_and_resume_as_others(flags_of_steps, trained_by_one_rank, tmp_path):
    """4 ranks in 2 groups up to step 3, 2 ranks as one group up to step 5, then 1 rank with the rest."""
    output = tmp_path / "run"
    for steps, ranks, group in ((3, 4, 2), (5, 2, 0)):
        flags = flags_of_steps | {"max_steps": steps, "shard_group_size": group}
        code, _, err = run("run_sft", arguments(output, **flags), ranks)
        assert code == 0, err
    code, _, err = run_here(output, **flags_of_steps)
    assert code == 0, err
    assert_same_training(trained_by_one_rank, output, 6)
