"""Weighted cross-entropy: hand-worked numbers, PyTorch's loss, finite differences, promises about rows."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from tests.support.loss_rows import make_rows, oracle
from train import weighted_cross_entropy as module_file
from train.weighted_cross_entropy import (
    chunk_loss_and_gradient_,
    linear_token_logprobs,
    linear_weighted_cross_entropy,
    weighted_cross_entropy,
)

CHUNKS = [None, 1, 2, 3, 100]


# ---------------------------------------------------------------------------------------------------------------------
# Worked by hand
# Row with logits (0, ln 2, ln 5): exponentials 1, 2, 5, their sum 8, softmax (1/8, 2/8, 5/8).
HAND_LOGITS = [[0.0, math.log(2), math.log(5)], [0.0, math.log(2), math.log(5)], [0.0, 0.0, 0.0]]


def test_value_worked_by_hand():
    # Target 2 with weight 9: -ln(5/8); target 0 with weight 1: ln 8; the third row has weight 0.
    loss = weighted_cross_entropy(torch.tensor(HAND_LOGITS), torch.tensor([2, 0, 1]), torch.tensor([9.0, 1.0, 0.0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(9 * 0.470003629 + 2.079441542, rel=1e-6)


def test_gradient_worked_by_hand():
    logits_MV = torch.tensor(HAND_LOGITS, dtype=torch.float64, requires_grad=True)
    weighted_cross_entropy(logits_MV, torch.tensor([2, 0, 1]), torch.tensor([8.0, 2.0, 0.0])).backward()
    # 8 * (1/8, 2/8, 5/8 - 1) and 2 * (1/8 - 1, 2/8, 5/8)
    expected = torch.tensor([[1.0, 2.0, -3.0], [-1.75, 0.5, 1.25], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(logits_MV.grad, expected)


def test_head_gradients_worked_by_hand():
    # One row, hidden (2, -1), head rows (0, 0) three times: logits 0, softmax 1/3 each, target 1, weight 3.
    # Gradient of the logits (1, -2, 1); hidden gets head^T of it = 0; head row v gets it times hidden.
    hidden_MD = torch.tensor([[2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    head_weight_VD = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    loss = linear_weighted_cross_entropy(hidden_MD, head_weight_VD, torch.tensor([1]), torch.tensor([3.0]))
    loss.backward()
    assert loss.item() == pytest.approx(3 * math.log(3), rel=1e-12)
    expected = torch.tensor([[2.0, -1.0], [-4.0, 2.0], [2.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(head_weight_VD.grad, expected)
    assert torch.equal(hidden_MD.grad, torch.zeros(1, 2, dtype=torch.float64))


def test_token_logprobs_worked_by_hand():
    # Head = identity, hidden = logits: ln(5/8), ln(1/8), ln(1/3).
    logits_MV, eye = torch.tensor(HAND_LOGITS), torch.eye(3)
    logprobs_M = linear_token_logprobs(logits_MV, eye, torch.tensor([2, 0, 1]), 2)
    assert logprobs_M.tolist() == pytest.approx([-0.470003629, -2.079441542, -1.098612289], rel=1e-6)


def test_large_logits_do_not_overflow():
    logits_MV = torch.tensor([[1e4, 0.0], [-1e4, -1e4]], requires_grad=True)
    loss = weighted_cross_entropy(logits_MV, torch.tensor([1, 0]), torch.ones(2))
    assert loss.item() == pytest.approx(1e4 + math.log(2), rel=1e-6)
    loss.backward()
    torch.testing.assert_close(logits_MV.grad, torch.tensor([[1.0, -1.0], [-0.5, 0.5]]))
    linear = linear_weighted_cross_entropy(logits_MV, torch.eye(2), torch.tensor([1, 0]), torch.ones(2))
    assert linear.item() == pytest.approx(1e4 + math.log(2), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Against PyTorch and gradcheck


@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_linear_loss_equals_pytorch(chunk_rows, dtype, rtol):
    rows = make_rows(dtype, n_rows=23)
    loss = linear_weighted_cross_entropy(*rows, chunk_rows=chunk_rows)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (loss * -0.375).backward()
    expected, grad_hidden, grad_head = oracle(*rows)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=rtol, atol=0)
    torch.testing.assert_close(rows[0].grad.double(), grad_hidden * -0.375, rtol=rtol, atol=rtol)
    torch.testing.assert_close(rows[1].grad.double(), grad_head * -0.375, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_linear_loss_in_bf16(chunk_rows):
    rows = make_rows(torch.bfloat16, n_rows=28, dim=16, vocab_size=40)
    loss = linear_weighted_cross_entropy(*rows, chunk_rows=chunk_rows)
    (loss * 0.25).backward()
    expected, grad_hidden, grad_head = oracle(*rows)  # fp64 arithmetic on the same bf16 numbers
    assert loss.dtype == torch.float32 and rows[0].grad.dtype == rows[1].grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.detach().double(), expected, rtol=4e-3, atol=0)  # logits carry 8 bits
    for grad, exact in ((rows[0].grad, grad_hidden), (rows[1].grad, grad_head)):
        error = (grad.double() - exact * 0.25).norm() / (exact * 0.25).norm()
        assert error < 8e-3, error


@pytest.mark.parametrize("half_is_slow", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_are_rounded_once_whichever_way_they_are_made(monkeypatch, dtype, half_is_slow):
    """On CPUs without bf16 units the product of fp32 copies stands in for that of bf16 matrices."""
    monkeypatch.setattr(module_file, "HALF_IS_SLOW", half_is_slow)
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 33), (33, 5)))
    exact = left.double() @ right.double()
    product = module_file._matmul(left, right)
    given = torch.full((9, 5), torch.nan, dtype=dtype)
    module_file._matmul(left, right, out=given[1:8])
    assert product.dtype == dtype and given[[0, 8]].isnan().all()
    # half an ulp of rounding, and what 33 sums in fp32 may lose
    bound = exact.abs() * torch.finfo(dtype).eps * 0.5 + 33 * 8 * torch.finfo(torch.float32).eps
    for found in (product, given[1:8]):
        assert ((found.double() - exact).abs() <= bound).all()


def test_bf16_head_gradient_is_accumulated_in_fp32():
    # Two logits, both 0: gradients +-1/2. Chunks of two rows add -(1 + 2^-9) / 2 and +1 / 2 in turn to head row 0; the
    # 2^-9 is lost if a chunk's product, or the running total, is rounded to bf16 (8 bits). Truth: 256 * -2^-10.
    hidden_MD = torch.tensor([1.0, 2**-9, 1.0, 0.0], dtype=torch.bfloat16).repeat(256)[:, None]
    target_ids_M = torch.tensor([0, 0, 1, 1]).repeat(256)
    head_weight_VD = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_weighted_cross_entropy(hidden_MD, head_weight_VD, target_ids_M, torch.ones(1024), chunk_rows=2).backward()
    assert head_weight_VD.grad.flatten().tolist() == [-0.25, 0.25]


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_gradcheck(chunk_rows):
    hidden_MD, head_weight_VD, target_ids_M, loss_weights_M = make_rows()
    assert gradcheck(
        lambda hidden, head: linear_weighted_cross_entropy(
            hidden, head, target_ids_M, loss_weights_M, chunk_rows=chunk_rows
        ),
        (hidden_MD, head_weight_VD),
    )
    assert gradcheck(
        lambda hidden, head: linear_token_logprobs(hidden, head, target_ids_M, chunk_rows), (hidden_MD, head_weight_VD)
    )


def test_gradcheck_on_logits():
    logits_MV = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    _, _, target_ids_M, loss_weights_M = make_rows()
    assert gradcheck(lambda logits: weighted_cross_entropy(logits, target_ids_M, loss_weights_M), (logits_MV,))


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_chunks_only_change_rounding(chunk_rows):
    rows = make_rows(torch.float32, n_rows=28)
    whole = linear_weighted_cross_entropy(*rows)
    expected = torch.autograd.grad(whole, rows[:2])
    chunked = linear_weighted_cross_entropy(*rows, chunk_rows=chunk_rows)
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(chunked, rows[:2]), expected, rtol=1e-5, atol=1e-5)


def test_default_chunks_respect_the_memory_bound(monkeypatch):
    monkeypatch.setitem(module_file.MAX_LOGITS_BYTES, "cpu", 3 * 11 * 4 + 5)  # 3 rows of 11 fp32 logits, not 4
    seen = []

    def recording(logits_CV, *rest):
        seen.append(logits_CV.shape[0])
        return chunk_loss_and_gradient_(logits_CV, *rest)

    monkeypatch.setattr(module_file, "chunk_loss_and_gradient_", recording)
    linear_weighted_cross_entropy(*make_rows(torch.float32)).backward()
    assert seen == [2, 2]  # the 4 trained rows of 7, in equal chunks of at most 3


# ---------------------------------------------------------------------------------------------------------------------
# Rows of weight 0


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_zero_weight_rows_may_hold_anything(junk, chunk_rows):
    hidden_MD, head_weight_VD, target_ids_M, loss_weights_M = make_rows()
    expected, grad_hidden, grad_head = oracle(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M)
    dropped_M = loss_weights_M == 0
    with torch.no_grad():
        hidden_MD[dropped_M] = junk
    target_ids_M[dropped_M] = torch.tensor([-100, 10**9, 11])
    loss = linear_weighted_cross_entropy(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, chunk_rows=chunk_rows)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden_MD.grad, grad_hidden)
    torch.testing.assert_close(head_weight_VD.grad, grad_head)
    assert torch.equal(hidden_MD.grad[dropped_M], torch.zeros(3, 5, dtype=torch.float64))

    logits_MV = (hidden_MD.detach() @ head_weight_VD.detach().T).requires_grad_()
    loss = weighted_cross_entropy(logits_MV, target_ids_M, loss_weights_M)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    assert torch.equal(logits_MV.grad[dropped_M], torch.zeros(3, 11, dtype=torch.float64))
    assert logits_MV.grad.isfinite().all()


def test_inf_in_a_weighted_row_is_not_hidden():
    logits_MV = torch.tensor([[float("nan"), 0.0]])
    assert weighted_cross_entropy(logits_MV, torch.tensor([0]), torch.ones(1)).isnan()


@pytest.mark.parametrize("n_rows", [0, 3])
def test_no_trained_row_gives_a_connected_zero(n_rows):
    hidden_MD, head_weight_VD, target_ids_M, _ = make_rows(torch.float32, n_rows=n_rows)
    empty = torch.zeros(0, dtype=torch.long)
    loss = linear_weighted_cross_entropy(
        hidden_MD, head_weight_VD, target_ids_M, torch.zeros(n_rows), trained_index_K=empty
    )
    assert loss.item() == 0 and loss.dtype == torch.float32
    (loss / 3).backward()
    assert torch.equal(hidden_MD.grad, torch.zeros(n_rows, 5)) and torch.equal(head_weight_VD.grad, torch.zeros(11, 5))
    logits_MV = torch.zeros(n_rows, 4, requires_grad=True)
    loss = weighted_cross_entropy(logits_MV, target_ids_M, torch.zeros(n_rows))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits_MV.grad, torch.zeros(n_rows, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Autograd corners


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_only_one_side_requires_grad(chunk_rows):
    rows = make_rows()
    _, grad_hidden, grad_head = oracle(*rows)
    for side, expected in ((0, grad_hidden), (1, grad_head)):
        inputs = [row.detach() for row in rows]
        inputs[side].requires_grad_()
        linear_weighted_cross_entropy(*inputs, chunk_rows=chunk_rows).backward()
        torch.testing.assert_close(inputs[side].grad, expected)
        assert inputs[1 - side].grad is None
        inputs[side].grad = None
        linear_token_logprobs(inputs[0], inputs[1], inputs[2], chunk_rows).mul(-inputs[3]).sum().backward()
        torch.testing.assert_close(inputs[side].grad, expected)


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_without_gradients(chunk_rows):
    rows = make_rows()
    expected = oracle(*rows)[0]
    with torch.no_grad():
        loss = linear_weighted_cross_entropy(*rows, chunk_rows=chunk_rows)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_two_micro_batches_and_two_backwards_add_up(chunk_rows):
    rows = make_rows()
    _, grad_hidden, grad_head = oracle(*rows)
    loss = linear_weighted_cross_entropy(*rows, chunk_rows=chunk_rows)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    torch.testing.assert_close(rows[0].grad, 3 * grad_hidden)
    torch.testing.assert_close(rows[1].grad, 3 * grad_head)


def test_token_logprobs_sum_to_the_loss():
    hidden_MD, head_weight_VD, target_ids_M, loss_weights_M = make_rows()
    contributions_M = -linear_token_logprobs(hidden_MD, head_weight_VD, target_ids_M, 3) * loss_weights_M
    loss = linear_weighted_cross_entropy(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M)
    torch.testing.assert_close(contributions_M.sum(), loss, rtol=1e-12, atol=0)


def test_loss_weights_may_be_any_float_type_and_inputs_stay_unchanged():
    hidden_MD, head_weight_VD, target_ids_M, loss_weights_M = make_rows(torch.float32)
    copies = [row.detach().clone() for row in (hidden_MD, head_weight_VD, target_ids_M, loss_weights_M)]
    first = linear_weighted_cross_entropy(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M.double())
    second = linear_weighted_cross_entropy(hidden_MD, head_weight_VD, target_ids_M.int(), loss_weights_M)
    assert torch.equal(first, second)
    first.backward()
    rows = (hidden_MD, head_weight_VD, target_ids_M, loss_weights_M)
    assert all(torch.equal(row, copy) for row, copy in zip(rows, copies, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("bad", [-1, -100, 11])
def test_bad_target_on_a_weighted_row_is_named(bad):
    hidden_MD, head_weight_VD, target_ids_M, loss_weights_M = make_rows()
    target_ids_M[4] = bad  # the third row with weight
    calls = [
        lambda: weighted_cross_entropy(hidden_MD @ head_weight_VD.T, target_ids_M, loss_weights_M),
        lambda: linear_weighted_cross_entropy(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M),
        lambda: linear_token_logprobs(hidden_MD, head_weight_VD, target_ids_M),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"target id {bad} at row 4 .*\[0, 11\)"):
            call()


@pytest.mark.parametrize("index", [[1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 5, 6], [5, 4, 2, 1]])
def test_wrong_trained_index_is_refused(index):
    rows = make_rows()
    assert linear_weighted_cross_entropy(*rows, trained_index_K=torch.tensor([1, 2, 4, 5])) > 0
    with pytest.raises(ValueError, match="trained_index_K"):
        linear_weighted_cross_entropy(*rows, trained_index_K=torch.tensor(index))


def test_shapes_and_dtypes_that_disagree_are_refused():
    hidden_MD, head_weight_VD, target_ids_M, loss_weights_M = make_rows()
    with pytest.raises(ValueError, match="targets"):
        weighted_cross_entropy(torch.zeros(7, 11), target_ids_M[:6], loss_weights_M)
    with pytest.raises(ValueError, match="loss weights"):
        linear_weighted_cross_entropy(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M[:, None])
    with pytest.raises(ValueError, match="head weight"):
        linear_weighted_cross_entropy(hidden_MD, head_weight_VD[:, :4], target_ids_M, loss_weights_M)
    with pytest.raises(ValueError, match="one dtype"):
        linear_weighted_cross_entropy(hidden_MD, head_weight_VD.float(), target_ids_M, loss_weights_M)
    with pytest.raises(ValueError, match="chunk_rows"):
        linear_weighted_cross_entropy(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M, chunk_rows=0)
