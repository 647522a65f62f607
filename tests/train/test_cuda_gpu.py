"""The kernels, attention and a training step on a real device: `pytest -m gpu`. NOT YET RUN BY US: no machine of ours
has one.

What the checks without a GPU cannot show is tested here: the device's rounding, streams, waits, 64-bit offsets, graphs.
"""

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from model.config import PRESETS
from model.transformer import Segments, attend, describe_attention
from run_sft import main
from tests.support.cuda_build import ROOT
from tests.support.loss_rows import make_rows, oracle
from tests.support.tiny_run import random_batch, tiny_model
from tests.train.test_cuda_launch import assert_rows_agree, random_rows
from train.cuda.launch import (
    DTYPES,
    ROW_KERNELS,
    RowExtras,
    choose_loss_backend,
    cuda_chunk_loss_and_gradient_,
    cuda_row_cross_entropy,
    cuda_scale_,
)
from train.distributed import init_world
from train.sft_config import SFTConfig
from train.sft_loop import train_step
from train.weighted_cross_entropy import linear_token_logprobs, linear_weighted_cross_entropy, weighted_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = "cuda"
VOCABULARIES = [1, 7, 8, 31, 1000, 1003, 4096, 32000, 32016, 128256, 151936]
each_dtype = pytest.mark.parametrize("dtype", list(DTYPES), ids=lambda dtype: DTYPES[dtype])


def on_device(rows, dtype):
    """make_rows on the device, leaves again."""
    return [
        each.detach().to(DEVICE, dtype if each.requires_grad else None).requires_grad_(each.requires_grad)
        for each in rows
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_kernels_are_taken_here():
    assert choose_loss_backend("auto", torch.device(DEVICE))[0] == "cuda"


@each_dtype
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_chosen_kernel_agrees_with_fp64(dtype, vocab_size):
    assert_rows_agree(*random_rows(dtype, 67, vocab_size, device=DEVICE))
    assert_rows_agree(
        *random_rows(dtype, 5, vocab_size, device=DEVICE), in_place=False, upstream=torch.tensor(0.125, device=DEVICE)
    )


@each_dtype
@pytest.mark.parametrize(("threads", "vectors"), ROW_KERNELS)
def test_every_row_kernel_agrees_with_fp64(dtype, threads, vectors):
    most = threads * vectors * 16 // dtype.itemsize
    for vocab_size in (most, most - 3, 5):
        rows = random_rows(dtype, 9, vocab_size, stride=-(-vocab_size // 8) * 8, device=DEVICE)
        assert_rows_agree(*rows, kernel=(f"wce_row_{DTYPES[dtype]}_{threads}x{vectors}", threads))


@each_dtype
def test_streaming_kernel_takes_any_alignment(dtype):
    for vocab_size, stride in ((32016, None), (32017, 32019), (70001, None), (1, None)):
        rows = random_rows(dtype, 9, vocab_size, stride=stride, device=DEVICE)
        assert_rows_agree(*rows, kernel=(f"wce_stream_{DTYPES[dtype]}", 512))


@each_dtype
def test_scale(dtype):
    for count in (1, 1003, 5_000_011):
        values = torch.randn(count, device=DEVICE).to(dtype)
        expected, same = (values.float() * 0.3).to(dtype), values.clone()
        cuda_scale_(same, torch.ones((), device=DEVICE))
        assert torch.equal(same, values)
        cuda_scale_(values, torch.tensor(0.3, device=DEVICE))
        assert torch.equal(values, expected)


@each_dtype
def test_rows_of_weight_0_and_bad_targets(dtype):
    for vocab_size in (32016, 1003):
        logits_CV, target_ids_C, loss_weights_C = random_rows(dtype, 6, vocab_size, device=DEVICE)
        logits_CV[1] = float("nan")
        target_ids_C[1], target_ids_C[3] = -100, vocab_size
        bad_row = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        losses_C = cuda_row_cross_entropy(
            logits_CV, target_ids_C, loss_weights_C, logits_CV, extras=RowExtras(bad_row=bad_row)
        )
        assert losses_C.isnan().tolist() == [False, False, False, True, False, False] and losses_C[1] == 0
        assert not logits_CV[1].any() and not logits_CV[3].any() and logits_CV.isfinite().all() and bad_row.item() == 4


@pytest.mark.parametrize(
    "dtype, loss_tolerance, tolerance", [(torch.float32, 1e-4, 1e-4), (torch.bfloat16, 4e-3, 8e-3)]
)
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_losses_and_gradients_through_autograd(dtype, loss_tolerance, tolerance, chunk_rows):
    rows = on_device(make_rows(torch.float32, n_rows=28, dim=16, vocab_size=40), dtype)
    expected, *gradients = oracle(*rows)
    losses = [
        linear_weighted_cross_entropy(*rows, chunk_rows=chunk_rows, backend="cuda"),
        -(linear_token_logprobs(*rows[:3], chunk_rows, backend="cuda") * rows[3]).sum(),
    ]
    for loss in losses:
        torch.testing.assert_close(loss.detach().double(), expected, rtol=loss_tolerance, atol=0)
        for found, exact in zip(torch.autograd.grad(loss * 0.3, rows[:2]), gradients, strict=True):
            assert (found.double() - 0.3 * exact).norm() < tolerance * (0.3 * exact).norm()


def test_loss_of_given_logits():
    logits_MV, target_ids_M, loss_weights_M = random_rows(torch.bfloat16, 40, 32016, device=DEVICE)
    logits_MV.requires_grad_()
    loss, plain = (
        weighted_cross_entropy(logits_MV, target_ids_M, loss_weights_M, backend=each) for each in ("cuda", "torch")
    )
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    found, expected = (torch.autograd.grad(each * 0.3, logits_MV)[0] for each in (loss, plain))
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("vocab_size", [32016, 1003])
def test_twenty_launches_give_equal_bits(vocab_size):
    rows = random_rows(torch.bfloat16, 300, vocab_size, device=DEVICE)
    results = []
    for _ in range(20):
        logits_CV = rows[0].clone()
        results.append((cuda_chunk_loss_and_gradient_(logits_CV, *rows[1:], True), logits_CV))
    for losses_C, gradient_CV in results[1:]:
        assert torch.equal(losses_C, results[0][0]) and torch.equal(gradient_CV, results[0][1])


def test_row_offsets_pass_2_31():
    vocab_size = 32016
    n_rows = 2**31 // vocab_size + 2
    if torch.cuda.mem_get_info()[0] < 3 * n_rows * vocab_size * 2:
        pytest.skip("needs 13 GB of free device memory")
    logits_CV = torch.full((n_rows, vocab_size), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    last_CV, target_ids, loss_weights = random_rows(torch.bfloat16, 4, vocab_size, device=DEVICE)
    logits_CV[-4:] = last_CV
    target_ids_C = torch.zeros(n_rows, dtype=torch.int64, device=DEVICE)
    loss_weights_C = torch.zeros(n_rows, device=DEVICE)
    target_ids_C[-4:], loss_weights_C[-4:] = target_ids, loss_weights
    losses_C = cuda_chunk_loss_and_gradient_(logits_CV, target_ids_C, loss_weights_C, True)
    expected_C = cuda_chunk_loss_and_gradient_(last_CV, target_ids, loss_weights, True)
    assert torch.equal(losses_C[-4:], expected_C) and torch.equal(logits_CV[-4:], last_CV)
    assert not losses_C[:-4].any() and not logits_CV[:-4].any()


# ---------------------------------------------------------------------------------------------------------------------
# Waits, streams, graphs


@pytest.mark.parametrize("chunk_rows", [None, 64])
def test_forward_and_backward_never_wait_for_the_device(chunk_rows):
    rows = on_device(make_rows(torch.float32, n_rows=280, dim=64, vocab_size=1000), torch.bfloat16)
    index_K = rows[3].nonzero().squeeze(1)
    denominator = torch.tensor(7.0, device=DEVICE)

    def step():
        loss = linear_weighted_cross_entropy(*rows, trained_index_K=index_K, chunk_rows=chunk_rows, backend="cuda")
        loss += linear_token_logprobs(*rows[:3], chunk_rows, backend="cuda").sum()
        (loss / denominator).backward()

    step()  # compiles and loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_waits_for_the_device_once():
    """PyTorch warns at each wait; the batches are pinned, as train_sft hands them over."""
    world, model = init_world(DEVICE), tiny_model().to(DEVICE, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(seed):
        batches = [random_batch(seed + number).pinned() for number in range(3)]
        return train_step(SFTConfig(), model, optimizer, batches, world, step=1, loss_backend="cuda")

    step(0)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in caught if "synchroniz" in str(each.message)]
    assert len(waits) == 1, waits


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_a_packed_row_in_one_call_equals_its_sequences(n_kv_heads):
    """varlen_attn against scaled_dot_product_attention in fp32, values and gradients; bf16 keeps 8 bits."""
    lengths = [1, 130, 64, 5]
    shape = replace(PRESETS["codellama_7b"], n_heads=4, n_kv_heads=n_kv_heads)
    if not describe_attention(shape, torch.bfloat16, torch.device(DEVICE)).startswith("varlen_attn"):
        pytest.skip("this torch or device has no varlen_attn for these heads")
    torch.manual_seed(0)
    row = [torch.randn(1, 200, heads, 128, device=DEVICE).bfloat16() for heads in (4, n_kv_heads, n_kv_heads)]
    borders = torch.tensor([0, 1, 131, 195, 200], dtype=torch.int32, device=DEVICE)
    results = []
    for dtype, segments in (
        (torch.bfloat16, Segments(lengths, borders, [None] * len(lengths))),
        (torch.float32, Segments(lengths, None, [None] * len(lengths))),
    ):
        leaves = [each.to(dtype).requires_grad_() for each in row]
        out_1TNH = attend(*leaves, segments=segments)
        results.append([out_1TNH, *torch.autograd.grad(out_1TNH.float().square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        assert (found.float() - expected).norm() < 2e-2 * expected.norm()


def test_launches_can_be_captured_in_a_graph():
    logits_CV, target_ids_C, loss_weights_C = random_rows(torch.bfloat16, 64, 32016, device=DEVICE)
    work_CV, factor = torch.empty_like(logits_CV), torch.tensor(0.5, device=DEVICE)

    def step():
        work_CV.copy_(logits_CV)
        losses_C = cuda_chunk_loss_and_gradient_(work_CV, target_ids_C, loss_weights_C, True)
        cuda_scale_(work_CV, factor)
        return losses_C

    expected_C, expected_CV = step(), work_CV.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses_C = step()
    work_CV.zero_()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(losses_C, expected_C) and torch.equal(work_CV, expected_CV)


def test_two_streams_do_not_disturb_each_other():
    inputs = [random_rows(torch.bfloat16, 512, 32016, seed=seed, device=DEVICE) for seed in (1, 2)]
    expected = []
    for logits_CV, target_ids_C, loss_weights_C in inputs:
        copy_CV = logits_CV.clone()
        expected.append((cuda_chunk_loss_and_gradient_(copy_CV, target_ids_C, loss_weights_C, True), copy_CV))
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in inputs], [[], []]
    for _ in range(10):
        for number, (stream, (logits_CV, *rest)) in enumerate(zip(streams, inputs, strict=True)):
            with torch.cuda.stream(stream):
                copy_CV = logits_CV.clone()
                found[number].append((cuda_chunk_loss_and_gradient_(copy_CV, *rest, True), copy_CV))
    torch.cuda.synchronize()
    for results, (losses_C, gradient_CV) in zip(found, expected, strict=True):
        assert all(torch.equal(each[0], losses_C) and torch.equal(each[1], gradient_CV) for each in results)


def test_launch_waits_for_the_work_before_it_on_its_stream():
    """The logits are written by a matmul on a side stream; a launch on the default stream would read too early."""
    with torch.cuda.stream(torch.cuda.Stream()):
        hidden_CD = torch.randn(4096, 2048, device=DEVICE).bfloat16()
        head_weight_VD = torch.randn(32000, 2048, device=DEVICE).bfloat16() / 45
        target_ids_C = torch.randint(0, 32000, (4096,), device=DEVICE)
        logits_CV = hidden_CD @ head_weight_VD.T
        losses_C = cuda_chunk_loss_and_gradient_(logits_CV, target_ids_C, torch.ones(4096, device=DEVICE), False)
        expected_C = torch.nn.functional.cross_entropy(logits_CV.float(), target_ids_C, reduction="none")
        torch.testing.assert_close(losses_C, expected_C, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_each_device_gets_its_own_module():
    for index in (1, 0):
        rows = random_rows(torch.bfloat16, 9, 32016, device=f"cuda:{index}")
        assert_rows_agree(*rows)


# ---------------------------------------------------------------------------------------------------------------------
# Compiler, memory, runs


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_loss(backend):
    rows = on_device(make_rows(torch.float32, n_rows=28, dim=16, vocab_size=40), torch.float32)
    index_K = rows[3].nonzero().squeeze(1)

    def loss_of(hidden_MD, head_weight_VD):
        return (
            linear_weighted_cross_entropy(
                hidden_MD * 1.5, head_weight_VD, *rows[2:], trained_index_K=index_K, backend="cuda"
            )
            / 3
        )

    torch._dynamo.reset()
    eager, compiled = loss_of(*rows[:2]), torch.compile(loss_of, backend=backend, fullgraph=True)(*rows[:2])
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    for found, expected in zip(
        torch.autograd.grad(compiled, rows[:2]), torch.autograd.grad(eager, rows[:2]), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_memory_is_the_logits_and_the_gradients():
    """In one piece: (K, V) once, in its own dtype; then the gradients of hidden and head."""
    n_rows, dim, vocab_size = 1024, 512, 32016
    hidden_MD = torch.randn(n_rows, dim, device=DEVICE).bfloat16().requires_grad_()
    head_weight_VD = (torch.randn(vocab_size, dim, device=DEVICE) * 0.02).bfloat16().requires_grad_()
    target_ids_M = torch.zeros(n_rows, dtype=torch.int64, device=DEVICE)
    loss_weights_M = torch.ones(n_rows, device=DEVICE)
    index_K = torch.arange(n_rows, device=DEVICE)

    def step():
        linear_weighted_cross_entropy(
            hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, trained_index_K=index_K, backend="cuda"
        ).backward()

    step()
    hidden_MD.grad = head_weight_VD.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    expected = 2 * (n_rows * vocab_size + 2 * n_rows * dim + vocab_size * dim)
    assert peak <= 1.1 * expected, f"{peak / 2**20:.0f} MiB, expected {expected / 2**20:.0f}"


def test_ten_steps_of_the_bundled_run_equal_those_of_torch(tmp_path):
    losses = {}
    for backend in ("cuda", "torch"):
        output = tmp_path / backend
        assert (
            main(
                [
                    "--output",
                    str(output),
                    "--device",
                    "cuda",
                    "--loss_backend",
                    backend,
                    "--max_steps",
                    "10",
                    "--plot",
                    "off",
                    "--checkpoint_every",
                    "0",
                ]
            )
            == 0
        )
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses[backend] = [row["sft/loss"] for row in rows]
    assert losses["cuda"] == pytest.approx(losses["torch"], rel=1e-4)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    code = """
import torch
from tests.train.test_cuda_launch import assert_rows_agree, random_rows
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for vocab_size in (7, 1000, 1003, 32016, 70000):
        assert_rows_agree(*random_rows(dtype, 5, vocab_size, device="cuda"))
"""
    result = subprocess.run(
        [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "86",
            "--kernel-regex",
            "kns=wce_",
            sys.executable,
            "-c",
            code,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
