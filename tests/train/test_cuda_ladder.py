"""The four kernels of benchmarks/cuda_kernel_ladder, run on the CPU: right answers in every order of threads.

Shape legend: M rows, V vocabulary.
"""

import math
from pathlib import Path

import pytest
import torch

from tests.support.cuda_build import ORDERS, ROOT, emulated_library, launch, why_no_gxx

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_no_gxx() != "", reason=why_no_gxx() or "g++ is there")]

FOLDER = ROOT / "benchmarks" / "cuda_kernel_ladder"
STEPS = {"naive": (32, 32), "warp": (4, 128), "block": (1, 1024), "registers": (1, 1024)}  # rows, threads of a block
MUTANTS = {  # the one-hot forgotten; the sum of one lane alone; no barrier; the target's logit read after the stores
    "naive": ("v == target ? gradient - weight : gradient", "v == target ? gradient : gradient"),
    "warp": ("    sum = warp_sum(sum);", "    "),
    "block": ("    __syncthreads();", "    "),
    "registers": ("z[target] = scale * expf(target_logit - maximum)", "z[target] = scale * expf(z[target] - maximum)"),
}
each_step = pytest.mark.parametrize("step", STEPS)


def ladder_text(mutants: dict[str, tuple[str, str]] = {}) -> str:
    """The four kernels as one text, each in a namespace of its own, because their helpers share names."""
    parts = []
    for step in STEPS:
        text = (FOLDER / f"{step}.cu").read_text(encoding="ascii")
        old, new = mutants.get(step, ("", ""))
        assert old in text
        text = text.replace(old, new, 1) if old else text
        parts.append(f"namespace {step} {{\n{text}}}\nusing {step}::ladder_{step};\n")
    return "".join(parts)


def make_rows(n_rows: int, vocabulary_size: int):
    """Random logits (M, V) at a 16-byte border, targets (M,), weights (M,) > 0."""
    generator = torch.Generator().manual_seed(0)
    storage = torch.empty(n_rows * vocabulary_size + 4)
    start = -storage.data_ptr() % 16 // 4
    logits_MV = storage[start : start + n_rows * vocabulary_size].view(n_rows, vocabulary_size)
    logits_MV.copy_(4 * torch.randn(n_rows, vocabulary_size, generator=generator))
    target_ids_M = torch.randint(vocabulary_size, (n_rows,), generator=generator)
    return logits_MV, target_ids_M, 0.5 + torch.rand(n_rows, generator=generator)


def expected(logits_MV, target_ids_M, loss_weights_M):
    """Losses (M,) and gradient (M, V) of E9 and E10 in fp64."""
    weights_M = loss_weights_M.double()
    logprobs_MV = logits_MV.double().log_softmax(dim=1)
    losses_M = -weights_M * logprobs_MV.gather(1, target_ids_M[:, None]).squeeze(1)
    gradient_MV = logprobs_MV.exp()
    gradient_MV.scatter_add_(1, target_ids_M[:, None], -torch.ones_like(weights_M)[:, None])
    return losses_M, gradient_MV * weights_M[:, None]


def run_step(text: str, step: str, logits_MV, target_ids_M, loss_weights_M, order: str = "ascending"):
    """Losses (M,); `logits_MV` becomes the gradient."""
    (rows_per_block, threads), n_rows = STEPS[step], len(logits_MV)
    losses_M = torch.full((n_rows,), math.nan)
    arguments = [logits_MV, logits_MV.stride(0), logits_MV.shape[1], target_ids_M, loss_weights_M, losses_M, n_rows]
    grid = -(-n_rows // rows_per_block)
    launch(emulated_library(text), f"ladder_{step}", grid=grid, block=threads, arguments=arguments, order=order)
    return losses_M


def agrees(losses_M, gradient_MV, expected_losses_M, expected_gradient_MV) -> bool:
    return torch.allclose(losses_M.double(), expected_losses_M, rtol=1e-5, atol=2e-6) and torch.allclose(
        gradient_MV.double(), expected_gradient_MV, rtol=1e-4, atol=1e-6
    )


@each_step
def test_row_worked_by_hand(step):
    """Exponentials 1, 2, 5, 8 have sum 16; weight 16 and target 2: loss 16 ln(16 / 5), gradient (1, 2, 5 - 16, 8)."""
    logits_MV, *_ = make_rows(1, 4)
    logits_MV.copy_(torch.tensor([[1.0, 2.0, 5.0, 8.0]]).log())
    losses_M = run_step(ladder_text(), step, logits_MV, torch.tensor([2]), torch.tensor([16.0]))
    assert losses_M.item() == pytest.approx(16 * math.log(16 / 5), rel=1e-6)
    assert logits_MV.tolist()[0] == pytest.approx([1, 2, -11, 8], rel=1e-6)


@each_step
@pytest.mark.parametrize("vocabulary_size", [1, 7, 32, 1003, 4096])
def test_rows_in_three_orders(step, vocabulary_size):
    """Against fp64; rows of weight 0 hold NaN; no order of threads changes a bit."""
    if step == "registers":
        vocabulary_size = -(-vocabulary_size // 4) * 4  # its contract
    results = []
    for order in ORDERS:
        logits_MV, target_ids_M, loss_weights_M = make_rows(5, vocabulary_size)
        target_ids_M[:2] = torch.tensor([0, vocabulary_size - 1])
        target_ids_M[3] = logits_MV[3].argmax()
        loss_weights_M[2], loss_weights_M[4] = 0, -3
        right = expected(logits_MV, target_ids_M, loss_weights_M)
        logits_MV[2] = math.nan
        losses_M = run_step(ladder_text(), step, logits_MV, target_ids_M, loss_weights_M, order)
        assert agrees(losses_M, logits_MV, *right)
        results.append((losses_M, logits_MV.clone()))
    for losses_M, gradient_MV in results[1:]:
        assert torch.equal(losses_M, results[0][0]) and torch.equal(gradient_MV, results[0][1])


@each_step
def test_large_logits_and_minus_infinity(step):
    """The maximum goes first: exp(1e4) is inf in fp32, and -1e4 everywhere would give ln 0."""
    logits_MV, target_ids_M, loss_weights_M = make_rows(2, 8)
    logits_MV.copy_(torch.tensor([[1e4, 1e4 - 1, 0, 0, 0, 0, 0, -math.inf], [-1e4] * 8]))
    target_ids_M.copy_(torch.tensor([1, 3]))
    right = expected(logits_MV, target_ids_M, loss_weights_M)
    assert agrees(run_step(ladder_text(), step, logits_MV, target_ids_M, loss_weights_M), logits_MV, *right)


@each_step
def test_wrong_kernel_is_noticed(step):
    for order in ORDERS:
        logits_MV, target_ids_M, loss_weights_M = make_rows(2, 4096)
        target_ids_M[1] = logits_MV[1].argmax()  # else the target's probability is nothing beside its weight
        right = expected(logits_MV, target_ids_M, loss_weights_M)
        losses_M = run_step(ladder_text(MUTANTS), step, logits_MV, target_ids_M, loss_weights_M, order)
        assert not agrees(losses_M, logits_MV, *right)


def test_each_kernel_is_on_the_page_and_stands_alone():
    page = (FOLDER / "README.md").read_text(encoding="ascii")
    assert sorted(path.stem for path in Path(FOLDER).glob("*.cu")) == sorted(STEPS)
    for step in STEPS:
        assert f"[{step}.cu]({step}.cu)" in page
        source = (FOLDER / f"{step}.cu").read_text(encoding="ascii")
        assert "#include" not in source and "// E9" in source and "// E10" in source
    assert "nothing ran on a GPU" in page
