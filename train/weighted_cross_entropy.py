"""Weighted cross-entropy: the one loss of supervised fine-tuning.

Adverse-effect masking, key-token weights and normalisation all arrive as one float per target token; this file only
computes `sum_i w_i * (logsumexp_i - logit_i[target_i])` and its gradients (docs/math.md, E9-E11).

Shape legend: M rows (tokens of a micro-batch), K rows with weight != 0, C rows of one chunk, D model dim, V vocabulary.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

# Largest block of logits alive at once, counted in bytes of the fp32 arithmetic. Fewer rows than this are done in one
# piece (fastest); more rows are chunked, which costs one pass over the head gradient per chunk and bounds the memory.
# CPU: measured by benchmarks/benchmark_loss.py. CUDA: from arithmetic only (accumulating into a 7B head's gradient
# then takes less time than the chunk's matmuls).
MAX_LOGITS_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


# ---------------------------------------------------------------------------------------------------- public functions
def weighted_cross_entropy(logits_MV: Tensor, target_ids_M: Tensor, loss_weights_M: Tensor) -> Tensor:
    """Sum over rows of weight times cross-entropy (nats), from logits that exist already (E9).

    Args: logits_MV float; target_ids_M integer, any value where the weight is 0; loss_weights_M float.
    Returns a scalar in fp32 (fp64 for fp64 logits), differentiable in the logits. Rows of weight 0 are never read: they
    may hold inf or nan, and their gradient is exactly 0.
    Raises ValueError for shapes that disagree or a target outside [0, V) on a row with weight.
    """
    _check_rows(logits_MV, target_ids_M, loss_weights_M)
    index_K = loss_weights_M.detach().nonzero().squeeze(1)
    logits_KV, target_ids_K, loss_weights_K = _select_rows(logits_MV, target_ids_M, loss_weights_M, index_K)
    _check_targets(target_ids_K, index_K, logits_MV.shape[1])
    # log_softmax subtracts the row's maximum first. logsumexp(x) - x[target] rounds at the size of the logits instead:
    # at 1e4 in fp32 a probability of 0.5 comes out as 0.4999.
    logprobs_KV = logits_KV.to(_compute_dtype(logits_MV)).log_softmax(dim=1)
    target_logprob_K = logprobs_KV.gather(1, target_ids_K.long()[:, None]).squeeze(1)
    return -(loss_weights_K.to(logprobs_KV.dtype) * target_logprob_K).sum()  # E9


def linear_weighted_cross_entropy(
    hidden_MD: Tensor, head_weight_VD: Tensor, target_ids_M: Tensor, loss_weights_M: Tensor, *,
    chunk_rows: int | None = None, trained_index_K: Tensor | None = None,
) -> Tensor:
    """The value of `weighted_cross_entropy(hidden @ head.T, ...)` without ever building (M, V) logits (E9-E11).

    Rows of weight 0 are dropped before the matmul; the rest go through in chunks of `chunk_rows` (default: as many as
    MAX_LOGITS_BYTES allows). Logits are made in the dtype of `hidden`; softmax, loss and the head's gradient are
    accumulated in fp32 (fp64 for fp64 inputs) and rounded to the parameter's dtype once.
    Args: hidden_MD and head_weight_VD of one dtype; trained_index_K the rows with weight != 0 when the caller knows
    them (data/batches.py does): saves a wait for the device on CUDA.
    Returns a scalar in fp32 (fp64 for fp64 inputs), differentiable once in hidden and head. Without any trained row it
    is 0, still connected to both, so that every rank of a sharded model runs the same collectives.
    Raises ValueError for shapes, dtypes or an index that disagree and for a target outside [0, V) on a row with weight;
    on CUDA with trained_index_K given, target and index are not inspected (no wait) and torch's own assertion stops.
    """
    _check_rows(hidden_MD, target_ids_M, loss_weights_M)
    _check_head(hidden_MD, head_weight_VD)
    vocab_size = head_weight_VD.shape[0]
    may_inspect = trained_index_K is None or hidden_MD.device.type == "cpu"
    index_K = _checked_index(loss_weights_M.detach(), trained_index_K, may_inspect)
    hidden_KD, target_ids_K, loss_weights_K = _select_rows(hidden_MD, target_ids_M, loss_weights_M, index_K)
    if may_inspect:
        _check_targets(target_ids_K, index_K, vocab_size)
    rows = _chunk_rows(index_K.numel(), vocab_size, hidden_MD, chunk_rows)
    loss_weights_K = loss_weights_K.detach().to(_compute_dtype(hidden_MD))
    return _LinearWeightedCrossEntropy.apply(hidden_KD, head_weight_VD, target_ids_K.long(), loss_weights_K, rows)


def linear_token_logprobs(
    hidden_MD: Tensor, head_weight_VD: Tensor, target_ids_M: Tensor, chunk_rows: int | None = None
) -> Tensor:
    """Log-probability of each row's target, (M,) fp32 (fp64 for fp64 inputs), <= 0; `-result` is the unreduced E9.

    Differentiable in hidden and head; the backward pass makes the logits again, chunk by chunk.
    Raises ValueError as `linear_weighted_cross_entropy`; every target must be inside [0, V).
    """
    _check_rows(hidden_MD, target_ids_M, target_ids_M)
    _check_head(hidden_MD, head_weight_VD)
    _check_targets(target_ids_M, None, head_weight_VD.shape[0])
    rows = _chunk_rows(target_ids_M.numel(), head_weight_VD.shape[0], hidden_MD, chunk_rows)
    return _LinearTokenLogprobs.apply(hidden_MD, head_weight_VD, target_ids_M.long(), rows)


# -------------------------------------------------------------------------------------------- one chunk of logits: seam
def chunk_loss_and_gradient_(
    logits_CV: Tensor, target_ids_C: Tensor, loss_weights_C: Tensor, need_gradient: bool
) -> Tensor:
    """Weighted cross-entropy of each row, (C,); the logits are overwritten by their gradient (E9, E10).

    The only place that touches logits of the linear loss, and all that another backend has to replace: same arguments,
    same result. `loss_weights_C` has the dtype of the arithmetic. Without `need_gradient` the logits end as scratch.
    """
    scores_CV = logits_CV.to(loss_weights_C.dtype)  # the same memory for fp32 and fp64, a copy for bf16
    scores_CV.sub_(scores_CV.amax(dim=1, keepdim=True))
    target_score_C = scores_CV.gather(1, target_ids_C[:, None]).squeeze(1)
    sum_exp_C = scores_CV.exp_().sum(dim=1)
    loss_C = loss_weights_C * (sum_exp_C.log() - target_score_C)  # E9: the row's maximum cancels
    if need_gradient:
        scores_CV.mul_((loss_weights_C / sum_exp_C)[:, None])
        scores_CV.scatter_add_(1, target_ids_C[:, None], -loss_weights_C[:, None])  # E10: w * (softmax - one_hot)
        if scores_CV.dtype != logits_CV.dtype:
            logits_CV.copy_(scores_CV)
    return loss_C


def _loss_and_gradients(
    hidden_KD: Tensor, head_weight_VD: Tensor, target_ids_K: Tensor, loss_weights_K: Tensor, *,
    chunk_rows: int, need_hidden: bool, need_head: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Row losses (K,), gradient of their sum for hidden (hidden's dtype) and for the head (dtype of the arithmetic)."""
    loss_K = torch.empty_like(loss_weights_K)
    grad_hidden_KD = torch.empty_like(hidden_KD) if need_hidden else None
    grad_head_VD = torch.zeros_like(head_weight_VD, dtype=loss_weights_K.dtype) if need_head else None
    for start in range(0, hidden_KD.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits_CV = hidden_KD[rows] @ head_weight_VD.T
        loss_K[rows] = chunk_loss_and_gradient_(
            logits_CV, target_ids_K[rows], loss_weights_K[rows], need_hidden or need_head)
        if need_hidden:
            torch.mm(logits_CV, head_weight_VD, out=grad_hidden_KD[rows])  # E11
        if need_head:
            _add_matmul_(grad_head_VD, logits_CV.T, hidden_KD[rows])  # E11
    return loss_K, grad_hidden_KD, grad_head_VD


def _add_matmul_(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """total += left @ right without rounding the product to the inputs' dtype first."""
    if left_VC.dtype == total_VD.dtype:
        total_VD.addmm_(left_VC, right_CD)
    elif total_VD.device.type == "cuda":
        total_VD.add_(torch.mm(left_VC, right_CD, out_dtype=total_VD.dtype))
    else:  # the CPU has no mixed matmul
        total_VD.addmm_(left_VC.to(total_VD.dtype), right_CD.to(total_VD.dtype))


# ------------------------------------------------------------------------------------------------------------- autograd
class _LinearWeightedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, while a chunk's logits are at hand: three matmuls in all, none twice.

    With one chunk the logits' gradient is kept instead and the two matmuls wait for the backward pass, where the factor
    of the incoming gradient goes into the small matrix: no second copy of the head's gradient.
    """

    @staticmethod
    def forward(ctx, hidden_KD, head_weight_VD, target_ids_K, loss_weights_K, chunk_rows):
        need_hidden, need_head = ctx.needs_input_grad[:2]
        ctx.one_chunk = hidden_KD.shape[0] <= chunk_rows
        if ctx.one_chunk and (need_hidden or need_head):
            logits_KV = hidden_KD @ head_weight_VD.T
            loss_K = chunk_loss_and_gradient_(logits_KV, target_ids_K, loss_weights_K, need_gradient=True)
            ctx.save_for_backward(logits_KV, hidden_KD, head_weight_VD)
        else:
            loss_K, grad_hidden_KD, grad_head_VD = _loss_and_gradients(
                hidden_KD, head_weight_VD, target_ids_K, loss_weights_K,
                chunk_rows=chunk_rows, need_hidden=need_hidden, need_head=need_head)
            ctx.save_for_backward(grad_hidden_KD, grad_head_VD)
        ctx.head_dtype = head_weight_VD.dtype
        return loss_K.sum()  # E1: over the tokens of a micro-batch; E2-E8 are in the weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        need_hidden, need_head = ctx.needs_input_grad[:2]
        if not ctx.one_chunk:
            grad_hidden_KD, grad_head_VD = ctx.saved_tensors
            grad_hidden_KD = grad_hidden_KD * grad_loss if need_hidden else None
            grad_head_VD = (grad_head_VD * grad_loss).to(ctx.head_dtype) if need_head else None
            return grad_hidden_KD, grad_head_VD, None, None, None
        grad_logits_KV, hidden_KD, head_weight_VD = ctx.saved_tensors
        grad_hidden_KD = (grad_logits_KV @ head_weight_VD).mul_(grad_loss) if need_hidden else None  # E11
        grad_head_VD = grad_logits_KV.T @ (hidden_KD * grad_loss) if need_head else None  # E11
        return grad_hidden_KD, grad_head_VD, None, None, None


class _LinearTokenLogprobs(torch.autograd.Function):
    """Unreduced; the backward pass is the weighted loss with the incoming gradient, negated, as weights."""

    @staticmethod
    def forward(ctx, hidden_MD, head_weight_VD, target_ids_M, chunk_rows):
        ctx.save_for_backward(hidden_MD, head_weight_VD, target_ids_M)
        ctx.chunk_rows = chunk_rows
        ones_M = torch.ones_like(target_ids_M, dtype=_compute_dtype(hidden_MD))
        loss_M, _, _ = _loss_and_gradients(hidden_MD, head_weight_VD, target_ids_M, ones_M,
                                           chunk_rows=chunk_rows, need_hidden=False, need_head=False)
        return -loss_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs_M):
        hidden_MD, head_weight_VD, target_ids_M = ctx.saved_tensors
        need_hidden, need_head = ctx.needs_input_grad[:2]
        _, grad_hidden_MD, grad_head_VD = _loss_and_gradients(
            hidden_MD, head_weight_VD, target_ids_M, -grad_logprobs_M,
            chunk_rows=ctx.chunk_rows, need_hidden=need_hidden, need_head=need_head)
        return grad_hidden_MD, None if grad_head_VD is None else grad_head_VD.to(head_weight_VD.dtype), None, None


# --------------------------------------------------------------------------------------------------- checks and choices
def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunk_rows(n_rows: int, vocab_size: int, hidden: Tensor, chunk_rows: int | None) -> int:
    """Rows per chunk; by default chunks of equal size, as few as the memory bound allows."""
    if chunk_rows is not None:
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows is {chunk_rows}, expected at least 1")
        return chunk_rows
    row_bytes = vocab_size * _compute_dtype(hidden).itemsize
    limit = max(1, MAX_LOGITS_BYTES.get(hidden.device.type, MAX_LOGITS_BYTES["cpu"]) // row_bytes)
    n_chunks = max(1, math.ceil(n_rows / limit))
    return max(1, math.ceil(n_rows / n_chunks))


def _select_rows(rows_MX: Tensor, target_ids_M: Tensor, loss_weights_M: Tensor, index_K: Tensor):
    if index_K.numel() == rows_MX.shape[0]:  # every row has weight: no copy
        return rows_MX, target_ids_M, loss_weights_M
    return rows_MX.index_select(0, index_K), target_ids_M[index_K], loss_weights_M[index_K]


def _checked_index(loss_weights_M: Tensor, trained_index_K: Tensor | None, may_inspect: bool) -> Tensor:
    """Ascending rows with weight != 0. A wrong index given by the caller would silently train other tokens."""
    if trained_index_K is not None and not may_inspect:
        return trained_index_K
    index_K = loss_weights_M.nonzero().squeeze(1)
    if trained_index_K is not None and not torch.equal(index_K, trained_index_K):
        raise ValueError(f"trained_index_K holds {trained_index_K.numel()} rows, expected the {index_K.numel()} rows "
                         "with loss weight != 0 in ascending order")
    return index_K


def _check_rows(rows_MX: Tensor, target_ids_M: Tensor, loss_weights_M: Tensor) -> None:
    n_rows = rows_MX.shape[0]
    if rows_MX.dim() != 2 or target_ids_M.shape != (n_rows,) or loss_weights_M.shape != (n_rows,):
        raise ValueError(f"rows {tuple(rows_MX.shape)}, targets {tuple(target_ids_M.shape)}, loss weights "
                         f"{tuple(loss_weights_M.shape)}: expected (M, X), (M,), (M,)")


def _check_head(hidden_MD: Tensor, head_weight_VD: Tensor) -> None:
    if head_weight_VD.dim() != 2 or head_weight_VD.shape[1] != hidden_MD.shape[1]:
        raise ValueError(f"head weight {tuple(head_weight_VD.shape)}, expected (V, {hidden_MD.shape[1]})")
    if head_weight_VD.dtype != hidden_MD.dtype:
        raise ValueError(f"hidden is {hidden_MD.dtype}, head weight {head_weight_VD.dtype}: expected one dtype")
    if hasattr(head_weight_VD, "full_tensor"):
        raise ValueError("head weight is a sharded DTensor, expected the unsharded parameter (inside FSDP's forward)")


def _check_targets(target_ids_K: Tensor, index_K: Tensor | None, vocab_size: int) -> None:
    bad_K = (target_ids_K < 0) | (target_ids_K >= vocab_size)
    if bad_K.any():
        position = int(bad_K.nonzero()[0])
        row = position if index_K is None else int(index_K[position])
        raise ValueError(f"target id {int(target_ids_K[position])} at row {row} has a loss weight, "
                         f"expected an id in [0, {vocab_size})")
