"""The loss as operators of torch.library: torch's own checks, torch.compile of a train step, one differentiation."""

import json
import math

import pytest
import torch
from torch.library import opcheck

from run_sft import main
from tests.support.loss_rows import make_rows, oracle
from tests.support.tiny_ppo import run_ppo_here
from tests.support.tiny_run import random_batch, tiny_files, tiny_model
from train import weighted_cross_entropy as module_file
from train.cuda.launch import LossBackendError, agree_on_loss_backend, choose_loss_backend
from train.distributed import init_world
from train.sft_config import SFTConfig
from train.sft_loop import train_step
from train.weighted_cross_entropy import (
    chunk_loss_and_gradient_,
    linear_token_logprobs,
    linear_weighted_cross_entropy,
    weighted_cross_entropy,
)

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds


def trained_rows(dtype=torch.float64, requires_grad=True):
    """hidden (K, D), head (V, D), targets (K,), weights (K,) of the 12 rows of 21 that have a weight; their numbers."""
    hidden_MD, head_weight_VD, target_ids_M, loss_weights_M = make_rows(dtype, n_rows=21)
    index_K = loss_weights_M.nonzero().squeeze(1)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rows = (
        hidden_MD.detach()[index_K].requires_grad_(requires_grad),
        head_weight_VD.detach().requires_grad_(requires_grad),
        target_ids_M[index_K],
        loss_weights_M[index_K].to(compute),
    )
    return rows, index_K


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's own checks


def test_operators_pass_opcheck():
    rows, _ = trained_rows(torch.bfloat16)  # where inputs, losses and gradients have different dtypes
    hidden_KD, head_weight_VD, target_ids_K, loss_weights_K = rows
    logits_KV = (hidden_KD @ head_weight_VD.T).detach().requires_grad_()
    opcheck(module_file._one_piece, (*rows, "torch"))
    opcheck(module_file._in_chunks, (*rows, 5, [True, True], "torch"))
    opcheck(module_file._in_chunks, (hidden_KD.detach(), *rows[1:], 5, [False, True], "torch"))
    opcheck(module_file._token_logprobs, (*rows[:3], 5, "torch"))
    opcheck(module_file._logits_loss, (logits_KV, target_ids_K, loss_weights_K, "torch"))
    opcheck(
        module_file._logits_gradient,
        (torch.ones((), dtype=loss_weights_K.dtype), logits_KV.detach(), target_ids_K, loss_weights_K, "torch"),
    )
    opcheck(module_file._checked_index, (target_ids_K, loss_weights_K, torch.arange(12), len(head_weight_VD)))


def test_operators_of_the_linear_loss_save_no_second_copy():
    """One piece: logits' gradient, hidden, head; chunks: the two gradients. What autograd keeps costs memory."""
    rows, _ = trained_rows(torch.float32)
    sizes = {}
    for name, max_rows in (("one piece", 12), ("chunks", 5)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, saved=saved: saved.append(each) or each, lambda each: each
        ):
            linear_weighted_cross_entropy(*rows, chunk_rows=max_rows)
        sizes[name] = [tuple(each.shape) for each in saved]
    assert sizes == {"one piece": [(12, 11), (12, 5), (11, 5)], "chunks": [(12, 5), (11, 5)]}


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", **options)


@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_loss_is_one_graph_with_equal_bits(chunk_rows, dynamic):
    hidden_MD, head_weight_VD, target_ids_M, loss_weights_M = make_rows(torch.float32, n_rows=21)
    index_K = loss_weights_M.nonzero().squeeze(1)

    def loss_of(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, index_K):
        return 0.5 * linear_weighted_cross_entropy(
            hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, trained_index_K=index_K, chunk_rows=chunk_rows
        )

    inputs = (hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, index_K)
    eager = loss_of(*inputs)
    expected = torch.autograd.grad(eager, inputs[:2])
    loss = compiled(loss_of, fullgraph=True, dynamic=dynamic)(*inputs)
    assert torch.equal(loss, eager)
    for found, each in zip(torch.autograd.grad(loss, inputs[:2]), expected, strict=True):
        assert torch.equal(found, each)


def test_compiled_logprobs_and_logits_loss_are_one_graph():
    hidden_MD, head_weight_VD, target_ids_M, loss_weights_M = make_rows(torch.float32)

    def both(hidden_MD, head_weight_VD):
        logprobs_M = linear_token_logprobs(hidden_MD, head_weight_VD, target_ids_M, 3)
        loss = weighted_cross_entropy(hidden_MD @ head_weight_VD.T, target_ids_M, loss_weights_M)
        return loss + logprobs_M.exp().sum()

    expected = torch.autograd.grad(both(hidden_MD, head_weight_VD), (hidden_MD, head_weight_VD))
    found = torch.autograd.grad(compiled(both, fullgraph=True)(hidden_MD, head_weight_VD), (hidden_MD, head_weight_VD))
    for each, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(each, exact, rtol=1e-6, atol=1e-6)


def test_checks_of_the_data_still_speak_from_inside_the_graph():
    hidden_MD, head_weight_VD, target_ids_M, loss_weights_M = make_rows(torch.float32)
    index_K = loss_weights_M.nonzero().squeeze(1)
    target_ids_M[4] = 11

    def loss_of(index_K):
        return linear_weighted_cross_entropy(
            hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, trained_index_K=index_K
        )

    loss_of = compiled(loss_of, fullgraph=True)
    with pytest.raises(ValueError, match=r"target id 11 at row 4 .*\[0, 11\)"):
        loss_of(index_K)
    with pytest.raises(ValueError, match="trained_index_K"):
        loss_of(index_K.flip(0))


def test_without_an_index_the_graph_breaks_and_the_value_stays():
    rows = make_rows(torch.float32)
    loss = compiled(linear_weighted_cross_entropy)(*rows)
    assert torch.equal(loss, linear_weighted_cross_entropy(*rows))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.very_slow)])
def test_compiled_train_steps_equal_eager_ones(backend):
    """Two optimizer steps of the tiny Transformer, its forward and the loss compiled as one function."""
    batches = [random_batch(0)] * 2
    results = []
    for use_compiler in (False, True):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def loss_of(input_ids_T, position_ids_T, target_ids_T, loss_weights_T, index_K, lengths, model=model):
            hidden_BTD = model(
                input_ids_T[None], position_ids_BT=position_ids_T[None], segment_lengths=lengths, return_hidden=True
            )
            return linear_weighted_cross_entropy(
                hidden_BTD[0], model.head_weight(), target_ids_T, loss_weights_T, trained_index_K=index_K
            )

        if use_compiler:
            torch._dynamo.reset()
            loss_of = torch.compile(loss_of, backend=backend, fullgraph=True)
        losses = []
        for batch in batches:
            loss = (
                loss_of(
                    batch.input_ids_T,
                    batch.position_ids_T,
                    batch.target_ids_T,
                    batch.loss_weights_T,
                    batch.trained_index_K,
                    batch.segment_lengths,
                )
                / batch.denominator
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append((losses, [parameter.detach() for parameter in model.parameters()]))
    (losses, parameters), (compiled_losses, compiled_parameters) = results
    assert compiled_losses == pytest.approx(losses, rel=1e-6)
    for found, expected in zip(compiled_parameters, parameters, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 if backend == "inductor" else 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Differentiation


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_a_second_differentiation_is_refused(chunk_rows):
    rows = make_rows()
    calls = [
        lambda: linear_weighted_cross_entropy(*rows, chunk_rows=chunk_rows),
        lambda: linear_token_logprobs(*rows[:3], chunk_rows).sum(),
        lambda: weighted_cross_entropy(rows[0] @ rows[1].T, *rows[2:]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="differentiated once, found create_graph"):
            torch.autograd.grad(call(), rows[0], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_plain_formulas(dtype):
    """Matmul, seam, matmul without operators: equal bits in one piece (0.5 only moves the exponent), where the order of
    sums is the same; one rounding of the largest entry in chunks of fp32, where it is not."""
    rows, _ = trained_rows(dtype)
    hidden_KD, head_weight_VD, target_ids_K, loss_weights_K = rows
    with torch.no_grad():
        grad_KV = hidden_KD @ head_weight_VD.T
        chunk_loss_and_gradient_(grad_KV, target_ids_K, loss_weights_K, True)
        expected = (grad_KV @ head_weight_VD * 0.5, grad_KV.T @ hidden_KD * 0.5)
    for chunk_rows, roundings in ((None, 0), (5, 1)):
        loss = linear_weighted_cross_entropy(*rows, chunk_rows=chunk_rows)
        for found, each in zip(torch.autograd.grad(loss * 0.5, rows[:2]), expected, strict=True):
            assert (found - each).abs().max() <= roundings * torch.finfo(dtype).eps * each.abs().max()


def test_loss_of_bf16_logits_rounds_once():
    """Loss in fp32 from bf16 logits; gradient the fp64 one, rounded to bf16."""
    generator = torch.Generator().manual_seed(3)
    logits_MV = (3 * torch.randn(9, 50, generator=generator)).bfloat16().requires_grad_()
    target_ids_M = torch.randint(0, 50, (9,), generator=generator)
    loss_weights_M = torch.tensor([0.0, 2.0, -1.0] * 3)
    loss = weighted_cross_entropy(logits_MV, target_ids_M, loss_weights_M)
    (0.5 * loss).backward()
    exact_MV = logits_MV.detach().double().requires_grad_()
    exact = (torch.nn.functional.cross_entropy(exact_MV, target_ids_M, reduction="none") * loss_weights_M).sum()
    (0.5 * exact).backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-6)
    torch.testing.assert_close(logits_MV.grad.double(), exact_MV.grad, rtol=2**-8, atol=1e-7)


def test_gradient_is_scaled_before_it_is_rounded_to_fp16():
    """p * w = 2^-26 underflows in fp16 (smallest 2^-24); the loss scaler's 2^12 has to come first."""
    logits_MV = torch.zeros(1, 4, dtype=torch.float16, requires_grad=True)
    loss = weighted_cross_entropy(logits_MV, torch.tensor([0]), torch.tensor([2.0**-24]))
    (loss * 2**12).backward()
    assert logits_MV.grad.tolist() == [[-3 * 2.0**-14, 2.0**-14, 2.0**-14, 2.0**-14]]


# ---------------------------------------------------------------------------------------------------------------------
# Choice of a backend


def test_unknown_backend_is_refused():
    rows = make_rows()
    for call in (
        lambda: linear_weighted_cross_entropy(*rows, backend="triton"),
        lambda: linear_token_logprobs(*rows[:3], backend="auto"),
        lambda: weighted_cross_entropy(rows[0] @ rows[1].T, *rows[2:], backend=""),
    ):
        with pytest.raises(ValueError, match="backend: found"):
            call()


def test_kernels_refuse_tensors_on_the_cpu():
    rows = make_rows(torch.float32)
    with pytest.raises(ValueError, match="found a tensor on cpu, expected CUDA"):
        linear_weighted_cross_entropy(*rows, backend="cuda")


def test_choice_on_this_machines_cpu():
    cpu = torch.device("cpu")
    assert choose_loss_backend("torch", cpu) == ("torch", "as requested")
    assert choose_loss_backend("auto", cpu) == ("torch", "our kernels need a CUDA device, this run is on cpu")
    with pytest.raises(LossBackendError, match="^--loss_backend: found cuda, expected auto or torch: our kernels need"):
        choose_loss_backend("cuda", cpu)
    with pytest.raises(ValueError, match="found 'triton'"):
        choose_loss_backend("triton", cpu)


def test_one_rank_without_kernels_takes_them_from_all(monkeypatch):
    world = init_world("cpu")
    other = ("torch", "cuda-bindings is not installed")
    monkeypatch.setattr("train.cuda.launch.choose_loss_backend", lambda *_: ("cuda", "checked"))
    monkeypatch.setattr("train.cuda.launch.gather_objects", lambda choice: [choice, other, choice])
    assert agree_on_loss_backend("auto", world, 500) == other
    monkeypatch.setattr("train.cuda.launch.gather_objects", lambda choice: [choice, ("", "rank 1 cannot")])
    with pytest.raises(LossBackendError, match="rank 1 cannot"):
        agree_on_loss_backend("cuda", world, 500)


def test_run_with_loss_backend_cuda_ends_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--loss_backend", "cuda", "--device", "cpu", "--output", str(tmp_path / "run")])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    line = "--loss_backend: found cuda, expected auto or torch: our kernels need a CUDA device, this run is on cpu"
    assert lines == [line]
    assert not (tmp_path / "run").exists()


def test_run_says_once_which_backend_it_takes_and_hands_it_to_the_loss(tmp_path, capsys, monkeypatch):
    seen = []

    def recording(*arguments, backend, **keywords):
        seen.append(backend)
        return linear_weighted_cross_entropy(*arguments, backend=backend, **keywords)

    monkeypatch.setattr("train.sft_loop.linear_weighted_cross_entropy", recording)
    output = tmp_path / "run"
    assert main(["--output", str(output), "--device", "cpu", "--max_steps", "1", "--plot", "off"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "backend" in line]
    assert lines == ["loss backend: torch (our kernels need a CUDA device, this run is on cpu)"]
    assert set(seen) == {"torch"}
    assert json.loads((output / "config.json").read_text(encoding="utf-8"))["loss_backend"] == "auto"


def test_ppo_hands_its_backend_to_every_log_probability(tmp_path, monkeypatch):
    seen = []

    def recording(*arguments, backend):
        seen.append(backend)
        return linear_token_logprobs(*arguments)

    monkeypatch.setattr("rl.rollout.linear_token_logprobs", recording)
    monkeypatch.setattr("run_ppo.agree_on_loss_backend", lambda requested, *_: ("cuda", f"for {requested}"))
    code, out, err = run_ppo_here(tmp_path / "run", model=tiny_files()[0], max_steps=1, max_response_tokens=24)
    assert code == 0, err
    assert "loss backend: cuda (for auto)" in out.splitlines()
    assert len(seen) == 3 * 2 and set(seen) == {"cuda"}  # policy, reference, update; two micro-batches each


def test_train_step_passes_the_backend_on(monkeypatch):
    world, model = init_world("cpu"), tiny_model()
    monkeypatch.setattr(
        "train.sft_loop.linear_weighted_cross_entropy",
        lambda *_, backend, **__: 1 / 0 if backend == "cuda" else math.nan,
    )
    with pytest.raises(ZeroDivisionError):
        train_step(
            SFTConfig(loss_normalization="token_mean", max_grad_norm=0.0),
            model,
            torch.optim.SGD(model.parameters()),
            [random_batch(0)],
            world,
            step=1,
            loss_backend="cuda",
        )


def test_oracle_agrees_with_the_operators_on_all_rows():
    rows = make_rows()
    loss = weighted_cross_entropy(rows[0] @ rows[1].T, *rows[2:])
    torch.testing.assert_close(loss.detach(), oracle(*rows)[0], rtol=1e-12, atol=0)
