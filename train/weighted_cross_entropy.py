"""Weighted cross-entropy: the one loss of supervised fine-tuning.

Adverse-effect masking, key-token weights and normalisation all arrive as one float per target token; this file only
computes `sum_i w_i * (logsumexp_i - logit_i[target_i])` and its gradients (docs/math.md, E9-E11).

Public functions choose rows. Operators (torch.library) hold forward and backward: torch.compile sees one node each, and
what depends on the data (checks of targets, number of chunks) stays inside. Only `chunk_loss_and_gradient_` touches a
chunk of logits, or with backend="cuda" its twin in train/cuda/launch.py.

Shape suffixes: M rows (tokens of a micro-batch), K rows with weight != 0, C rows of one chunk, D model dim, V
vocabulary, X any of D and V.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import custom_op

from train.cuda.launch import cuda_chunk_loss_and_gradient_, cuda_row_cross_entropy, cuda_scale_, empty_logits

# Largest block of logits alive at once, counted in bytes of the arithmetic. Fewer rows than this are done in one
# piece (fastest); more rows are chunked, which costs one pass over the head gradient per chunk and bounds the memory.
# CPU: measured by benchmarks/benchmark_loss.py. CUDA: from arithmetic only: 8,192 rows of 32,016 logits in one piece,
# in fp32 too.
MAX_LOGITS_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}

# A CPU without bf16 units multiplies bf16 matrices up to ninety times slower than their fp32 copies (measured, AVX2).
HALF_IS_SLOW = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def weighted_cross_entropy(
    logits_MV: Tensor, target_ids_M: Tensor, loss_weights_M: Tensor, *, backend: str = "torch"
) -> Tensor:
    """Sum over rows of weight times cross-entropy (nats), from logits that exist already (E9).

    Args: logits_MV float; target_ids_M integer, any value where the weight is 0; loss_weights_M float; backend as
    train.cuda.launch.choose_loss_backend gives it.
    Returns a scalar in fp32 (fp64 for fp64 logits), differentiable once in the logits; the backward pass reads them
    again. Rows of weight 0 are never read: they may hold inf or nan, and their gradient is exactly 0.
    Raises ValueError for shapes that disagree, another backend, or a target outside [0, V) on a row with weight
    (backend "cuda": the loss is nan instead).
    """
    _check_rows(logits_MV, target_ids_M, loss_weights_M)
    _check_backend(backend)
    return _logits_loss(logits_MV, target_ids_M.long(), loss_weights_M.detach().to(_compute_dtype(logits_MV)), backend)


def linear_weighted_cross_entropy(
    hidden_MD: Tensor,
    head_weight_VD: Tensor,
    target_ids_M: Tensor,
    loss_weights_M: Tensor,
    *,
    chunk_rows: int | None = None,
    trained_index_K: Tensor | None = None,
    backend: str = "torch",
) -> Tensor:
    """The value of `weighted_cross_entropy(hidden @ head.T, ...)` without ever building (M, V) logits (E9-E11).

    Rows of weight 0 are dropped before the matmul; the rest go through in equal chunks of at most `chunk_rows`
    (default: as many as MAX_LOGITS_BYTES allows). Logits are made in the dtype of `hidden`; softmax, loss and the
    head's gradient are accumulated in fp32 (fp64 for fp64 inputs) and rounded to the parameter's dtype once.
    Args: hidden_MD and head_weight_VD of one dtype; trained_index_K the rows with weight != 0 when the caller knows
    them (data/batches.py does): saves a wait for the device on CUDA, and torch.compile a break of its graph; backend as
    train.cuda.launch.choose_loss_backend gives it.
    Returns a scalar in fp32 (fp64 for fp64 inputs), differentiable once in hidden and head. Without any trained row it
    is 0, still connected to both, so that every rank of a sharded model runs the same collectives.
    Raises ValueError for shapes, dtypes or an index that disagree, another backend, and for a target outside [0, V) on
    a row with weight; on CUDA with trained_index_K given, target and index are not inspected (no wait): a wrong target
    makes the loss nan (backend "cuda") or meets torch's own assertion.
    """
    _check_rows(hidden_MD, target_ids_M, loss_weights_M)
    _check_head(hidden_MD, head_weight_VD)
    _check_backend(backend)
    loss_weights_M = loss_weights_M.detach()
    may_inspect = trained_index_K is None or hidden_MD.device.type == "cpu"
    index_K = loss_weights_M.nonzero().squeeze(1) if trained_index_K is None else trained_index_K
    if may_inspect:
        index_K = _checked_index(target_ids_M, loss_weights_M, index_K, head_weight_VD.shape[0])
    hidden_KD, target_ids_K, loss_weights_K = _select_rows(hidden_MD, target_ids_M, loss_weights_M, index_K)
    max_rows = _max_rows(hidden_MD, head_weight_VD, chunk_rows, backend)
    loss_weights_K = loss_weights_K.to(_compute_dtype(hidden_MD))
    needs = [torch.is_grad_enabled() and each.requires_grad for each in (hidden_KD, head_weight_VD)]
    inputs = (hidden_KD, head_weight_VD, target_ids_K.long(), loss_weights_K)
    if any(needs) and hidden_KD.shape[0] <= max_rows:
        return _one_piece(*inputs, backend)[0]
    return _in_chunks(*inputs, max_rows, needs, backend)[0]


def linear_token_logprobs(
    hidden_MD: Tensor,
    head_weight_VD: Tensor,
    target_ids_M: Tensor,
    chunk_rows: int | None = None,
    *,
    backend: str = "torch",
) -> Tensor:
    """Log-probability of each row's target, (M,) fp32 (fp64 for fp64 inputs), <= 0; `-result` is the unreduced E9.

    Differentiable once in hidden and head; the backward pass makes the logits again, chunk by chunk.
    Raises ValueError as `linear_weighted_cross_entropy`; every target must be inside [0, V) (backend "cuda": the result
    is nan where it is not).
    """
    _check_rows(hidden_MD, target_ids_M, target_ids_M)
    _check_head(hidden_MD, head_weight_VD)
    _check_backend(backend)
    max_rows = _max_rows(hidden_MD, head_weight_VD, chunk_rows, backend)
    return _token_logprobs(hidden_MD, head_weight_VD, target_ids_M.long(), max_rows, backend)


# ---------------------------------------------------------------------------------------------------------------------
# One chunk of logits


def chunk_loss_and_gradient_(
    logits_CV: Tensor, target_ids_C: Tensor, loss_weights_C: Tensor, need_gradient: bool
) -> Tensor:
    """Weighted cross-entropy of each row, (C,); the logits are overwritten by their gradient (E9, E10).

    `loss_weights_C` has the dtype of the arithmetic. Without `need_gradient` the logits end as scratch.
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


def _chunk_function(backend: str) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    """chunk_loss_and_gradient_ of a backend: same arguments, same result."""
    return cuda_chunk_loss_and_gradient_ if backend == "cuda" else chunk_loss_and_gradient_


def _loss_and_gradients(
    hidden_KD: Tensor,
    head_weight_VD: Tensor,
    target_ids_K: Tensor,
    loss_weights_K: Tensor,
    max_rows: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses (K,), gradient of their sum for hidden (hidden's dtype) and for the head (dtype of the arithmetic).

    needs: whether hidden and head need their gradient; one that is not needed has no elements.
    """
    need_hidden, need_head = needs
    n_rows = hidden_KD.shape[0]
    chunk_rows = _chunk_rows(n_rows, max_rows)
    loss_K, grad_hidden_KD, grad_head_VD = _empty_results(hidden_KD, head_weight_VD, loss_weights_K, needs)
    grad_head_VD.zero_()
    in_place = _chunk_function(backend)
    for start in range(0, n_rows, chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits_CV = _logits(hidden_KD[rows], head_weight_VD, backend)
        loss_K[rows] = in_place(logits_CV, target_ids_K[rows], loss_weights_K[rows], any(needs))
        if need_hidden:
            _matmul(logits_CV, head_weight_VD, out=grad_hidden_KD[rows])  # E11
        if need_head:
            _add_matmul_(grad_head_VD, logits_CV.T, hidden_KD[rows])  # E11
    return loss_K, grad_hidden_KD, grad_head_VD


def _empty_results(
    hidden_KD: Tensor, head_weight_VD: Tensor, loss_weights_K: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What _loss_and_gradients fills."""
    need_hidden, need_head = needs
    return (
        torch.empty_like(loss_weights_K),
        torch.empty_like(hidden_KD) if need_hidden else hidden_KD.new_empty(0),
        head_weight_VD.new_empty(head_weight_VD.shape if need_head else 0, dtype=loss_weights_K.dtype),
    )


def _logits(hidden_CD: Tensor, head_weight_VD: Tensor, backend: str) -> Tensor:
    """hidden @ head.T, (C, V)."""
    return _matmul(hidden_CD, head_weight_VD.T, out=_room_for_logits(hidden_CD, head_weight_VD, backend))


def _room_for_logits(hidden_CD: Tensor, head_weight_VD: Tensor, backend: str) -> Tensor:
    """Uninitialised logits, (C, V), with the row stride that the backend's kernels like best."""
    n_rows, vocab_size = hidden_CD.shape[0], head_weight_VD.shape[0]
    if backend == "cuda":
        return empty_logits(n_rows, vocab_size, hidden_CD.dtype, hidden_CD.device)
    return hidden_CD.new_empty(n_rows, vocab_size)


def _matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right. Also in half precision it is summed in fp32 and rounded once (on CUDA: train.distributed)."""
    if left.device.type == "cpu" and left.dtype in (torch.bfloat16, torch.float16) and HALF_IS_SLOW:
        product = (left.float() @ right.float()).to(left.dtype)
        return product if out is None else out.copy_(product)
    return torch.mm(left, right, out=out)


def _add_matmul_(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """total += left @ right without rounding the product to the inputs' dtype first."""
    if left_VC.dtype == total_VD.dtype:
        total_VD.addmm_(left_VC, right_CD)
    elif total_VD.device.type == "cuda":
        torch.addmm(total_VD, left_VC, right_CD, out_dtype=total_VD.dtype, out=total_VD)
    else:  # the CPU has no mixed matmul
        total_VD.addmm_(left_VC.to(total_VD.dtype), right_CD.to(total_VD.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Operator: loss of given logits


@custom_op("tl_training::logits_loss", mutates_args=())
def _logits_loss(logits_MV: Tensor, target_ids_M: Tensor, loss_weights_M: Tensor, backend: str) -> Tensor:
    if backend == "cuda":
        return cuda_row_cross_entropy(logits_MV, target_ids_M, loss_weights_M).sum()
    index_K = loss_weights_M.nonzero().squeeze(1)
    logits_KV, target_ids_K, loss_weights_K = _select_rows(logits_MV, target_ids_M, loss_weights_M, index_K)
    _check_targets(target_ids_K, index_K, logits_MV.shape[1])
    # log_softmax subtracts the row's maximum first. logsumexp(x) - x[target] rounds at the size of the logits instead:
    # at 1e4 in fp32 a probability of 0.5 comes out as 0.4999.
    logprobs_KV = logits_KV.to(loss_weights_M.dtype).log_softmax(dim=1)
    return -(loss_weights_K * logprobs_KV.gather(1, target_ids_K[:, None]).squeeze(1)).sum()  # E9


@custom_op("tl_training::logits_gradient", mutates_args=())
def _logits_gradient(
    grad_loss: Tensor, logits_MV: Tensor, target_ids_M: Tensor, loss_weights_M: Tensor, backend: str
) -> Tensor:
    if backend == "cuda":
        grad_MV = torch.empty_like(logits_MV)
        cuda_row_cross_entropy(logits_MV, target_ids_M, loss_weights_M, grad_MV, upstream=grad_loss.contiguous())
        return grad_MV
    index_K = loss_weights_M.nonzero().squeeze(1)
    logits_KV, target_ids_K, loss_weights_K = _select_rows(logits_MV, target_ids_M, loss_weights_M, index_K)
    grad_loss_K1 = (loss_weights_K * grad_loss)[:, None]
    grad_KV = logits_KV.to(loss_weights_M.dtype).softmax(dim=1).mul_(grad_loss_K1)
    grad_KV = grad_KV.scatter_add_(1, target_ids_K[:, None], -grad_loss_K1).to(logits_MV.dtype)  # E10
    return grad_KV if grad_KV.shape == logits_MV.shape else torch.zeros_like(logits_MV).index_copy_(0, index_K, grad_KV)


@_logits_loss.register_fake
def _(logits_MV, target_ids_M, loss_weights_M, backend):
    return loss_weights_M.new_empty(())


@_logits_gradient.register_fake
def _(grad_loss, logits_MV, target_ids_M, loss_weights_M, backend):
    return torch.empty_like(logits_MV)


def _save_logits(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _logits_backward(ctx, grad_loss):
    _refuse_double_backward()
    return _logits_gradient(grad_loss, *ctx.saved_tensors, ctx.backend), None, None, None


_logits_loss.register_autograd(_logits_backward, setup_context=_save_logits)


# ---------------------------------------------------------------------------------------------------------------------
# Operators: linear loss, in one piece or more


# Gradients are made in the forward pass, while a chunk's logits are at hand: three matmuls in all, none twice. In one
# piece the logits' gradient is kept instead and the two matmuls wait for the backward pass, where the factor of the
# incoming gradient goes into the small matrix: no second copy of the head's gradient.
@custom_op("tl_training::linear_loss_in_one_piece", mutates_args=())
def _one_piece(
    hidden_KD: Tensor, head_weight_VD: Tensor, target_ids_K: Tensor, loss_weights_K: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the logits)."""
    logits_KV = _logits(hidden_KD, head_weight_VD, backend)
    loss_K = _chunk_function(backend)(logits_KV, target_ids_K, loss_weights_K, True)
    return loss_K.sum(), logits_KV  # E1: over the tokens of a micro-batch; E2-E8 are in the weights


@_one_piece.register_fake
def _(hidden_KD, head_weight_VD, target_ids_K, loss_weights_K, backend):
    return loss_weights_K.new_empty(()), _room_for_logits(hidden_KD, head_weight_VD, backend)


def _save_one_piece(ctx, inputs, output) -> None:
    hidden_KD, head_weight_VD = inputs[:2]
    _, grad_logits_KV = output
    ctx.mark_non_differentiable(grad_logits_KV)
    ctx.set_materialize_grads(False)  # zeros for the gradient of grad_logits_KV would be another (K, V)
    ctx.save_for_backward(grad_logits_KV, hidden_KD, head_weight_VD)


def _one_piece_backward(ctx, grad_loss, _):
    _refuse_double_backward()
    if grad_loss is None:
        return (None,) * 5
    need_hidden, need_head = ctx.needs_input_grad[:2]
    grad_logits_KV, hidden_KD, head_weight_VD = ctx.saved_tensors
    grad_hidden_KD = _matmul(grad_logits_KV, head_weight_VD).mul_(grad_loss) if need_hidden else None  # E11
    grad_head_VD = _matmul(grad_logits_KV.T, hidden_KD * grad_loss) if need_head else None  # E11
    return grad_hidden_KD, grad_head_VD, None, None, None


_one_piece.register_autograd(_one_piece_backward, setup_context=_save_one_piece)


@custom_op("tl_training::linear_loss_in_chunks", mutates_args=())
def _in_chunks(
    hidden_KD: Tensor,
    head_weight_VD: Tensor,
    target_ids_K: Tensor,
    loss_weights_K: Tensor,
    max_rows: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient for hidden, for the head); see _loss_and_gradients."""
    loss_K, *gradients = _loss_and_gradients(
        hidden_KD, head_weight_VD, target_ids_K, loss_weights_K, max_rows, needs, backend
    )
    return loss_K.sum(), *gradients


@_in_chunks.register_fake
def _(hidden_KD, head_weight_VD, target_ids_K, loss_weights_K, max_rows, needs, backend):
    _, *gradients = _empty_results(hidden_KD, head_weight_VD, loss_weights_K, needs)
    return loss_weights_K.new_empty(()), *gradients


def _save_chunks(ctx, inputs, output) -> None:
    ctx.head_dtype, ctx.backend = inputs[1].dtype, inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _chunks_backward(ctx, grad_loss, *_):
    _refuse_double_backward()
    if grad_loss is None:
        return (None,) * 7
    need_hidden, need_head = ctx.needs_input_grad[:2]
    grad_hidden_KD, grad_head_VD = ctx.saved_tensors
    if ctx.backend == "cuda":  # in place: a second backward of this graph is refused by autograd's version counter
        _scale_(grad_hidden_KD, grad_loss)
        _scale_(grad_head_VD, grad_loss)
    else:
        grad_hidden_KD, grad_head_VD = grad_hidden_KD * grad_loss, grad_head_VD * grad_loss
    return (
        grad_hidden_KD if need_hidden else None,
        grad_head_VD.to(ctx.head_dtype) if need_head else None,
        *(None,) * 5,
    )


_in_chunks.register_autograd(_chunks_backward, setup_context=_save_chunks)


@custom_op("tl_training::scale_", mutates_args={"values"})
def _scale_(values: Tensor, factor: Tensor) -> None:
    cuda_scale_(values, factor.contiguous())


# ---------------------------------------------------------------------------------------------------------------------
# Operator: log-probabilities


@custom_op("tl_training::token_logprobs", mutates_args=())
def _token_logprobs(
    hidden_MD: Tensor, head_weight_VD: Tensor, target_ids_M: Tensor, max_rows: int, backend: str
) -> Tensor:
    if backend == "torch":
        _check_targets(target_ids_M, None, head_weight_VD.shape[0])
    no_gradients = [False, False]
    loss_M, _, _ = _loss_and_gradients(
        hidden_MD, head_weight_VD, target_ids_M, _ones(hidden_MD), max_rows, no_gradients, backend
    )
    return -loss_M


@_token_logprobs.register_fake
def _(hidden_MD, head_weight_VD, target_ids_M, max_rows, backend):
    return torch.empty_like(_ones(hidden_MD))


def _ones(hidden_MD: Tensor) -> Tensor:
    return hidden_MD.new_ones(hidden_MD.shape[0], dtype=_compute_dtype(hidden_MD))


def _save_token_logprobs(ctx, inputs, output) -> None:
    *tensors, ctx.max_rows, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _token_logprobs_backward(ctx, grad_logprobs_M):
    """Unreduced: the weighted loss with the incoming gradient, negated, as weights."""
    _refuse_double_backward()
    need_hidden, need_head = needs = list(ctx.needs_input_grad[:2])
    hidden_MD, head_weight_VD, target_ids_M = ctx.saved_tensors
    _, grad_hidden_MD, grad_head_VD = _in_chunks(
        hidden_MD, head_weight_VD, target_ids_M, -grad_logprobs_M, ctx.max_rows, needs, ctx.backend
    )
    return (
        grad_hidden_MD if need_hidden else None,
        grad_head_VD.to(head_weight_VD.dtype) if need_head else None,
        None,
        None,
        None,
    )


_token_logprobs.register_autograd(_token_logprobs_backward, setup_context=_save_token_logprobs)


# ---------------------------------------------------------------------------------------------------------------------
# Checks and choices


def _refuse_double_backward() -> None:
    """Gradients that were made in forward are constants to autograd: their derivative would silently be 0."""
    if torch.is_grad_enabled():
        raise RuntimeError("the weighted cross-entropy can be differentiated once, found create_graph=True")


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _max_rows(hidden_MD: Tensor, head_weight_VD: Tensor, chunk_rows: int | None, backend: str) -> int:
    """Most rows whose logits may exist at once. The kernels need no copy of them in the arithmetic's dtype."""
    if chunk_rows is not None:
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows is {chunk_rows}, expected at least 1")
        return chunk_rows
    dtype = hidden_MD.dtype if backend == "cuda" else _compute_dtype(hidden_MD)
    limit = MAX_LOGITS_BYTES.get(hidden_MD.device.type, MAX_LOGITS_BYTES["cpu"])
    return max(1, limit // (head_weight_VD.shape[0] * dtype.itemsize))


def _chunk_rows(n_rows: int, max_rows: int) -> int:
    """Rows per chunk: chunks of equal size, as few as the bound allows."""
    n_chunks = max(1, -(-n_rows // max_rows))
    return max(1, -(-n_rows // n_chunks))


def _select_rows(rows_MX: Tensor, target_ids_M: Tensor, loss_weights_M: Tensor, index_K: Tensor):
    if index_K.numel() == rows_MX.shape[0]:  # every row has weight: no copy
        return rows_MX, target_ids_M, loss_weights_M
    return rows_MX.index_select(0, index_K), target_ids_M[index_K], loss_weights_M[index_K]


@custom_op("tl_training::checked_index", mutates_args=())
def _checked_index(target_ids_M: Tensor, loss_weights_M: Tensor, trained_index_K: Tensor, vocab_size: int) -> Tensor:
    """The rows with weight != 0, ascending, whose targets are in [0, vocab_size); a ValueError if that is not so.

    A wrong index given by the caller would silently train other tokens.
    """
    index_K = loss_weights_M.nonzero().squeeze(1)
    if not torch.equal(index_K, trained_index_K):
        raise ValueError(
            f"trained_index_K holds {trained_index_K.numel()} rows, expected the {index_K.numel()} rows "
            "with loss weight != 0 in ascending order"
        )
    _check_targets(target_ids_M[index_K], index_K, vocab_size)
    return index_K


@_checked_index.register_fake
def _(target_ids_M, loss_weights_M, trained_index_K, vocab_size):
    return torch.empty_like(trained_index_K)


def _check_backend(backend: str) -> None:
    if backend not in ("torch", "cuda"):
        raise ValueError(f"backend: found {backend!r}, expected torch or cuda")


def _check_rows(rows_MX: Tensor, target_ids_M: Tensor, loss_weights_M: Tensor) -> None:
    n_rows = rows_MX.shape[0]
    if rows_MX.dim() != 2 or target_ids_M.shape != (n_rows,) or loss_weights_M.shape != (n_rows,):
        raise ValueError(
            f"rows {tuple(rows_MX.shape)}, targets {tuple(target_ids_M.shape)}, loss weights "
            f"{tuple(loss_weights_M.shape)}: expected (M, X), (M,), (M,)"
        )


def _check_head(hidden_MD: Tensor, head_weight_VD: Tensor) -> None:
    if head_weight_VD.dim() != 2 or head_weight_VD.shape[1] != hidden_MD.shape[1]:
        raise ValueError(f"head weight {tuple(head_weight_VD.shape)}, expected (V, {hidden_MD.shape[1]})")
    if head_weight_VD.dtype != hidden_MD.dtype:
        raise ValueError(f"hidden is {hidden_MD.dtype}, head weight {head_weight_VD.dtype}: expected one dtype")
    if hasattr(head_weight_VD, "full_tensor"):
        raise ValueError("head weight is a sharded DTensor, expected the unsharded parameter (inside FSDP's forward)")


def _check_targets(target_ids_K: Tensor, row_numbers_K: Tensor | None, vocab_size: int) -> None:
    bad_K = (target_ids_K < 0) | (target_ids_K >= vocab_size)
    if bad_K.any():
        position = int(bad_K.nonzero()[0])
        row = position if row_numbers_K is None else int(row_numbers_K[position])
        raise ValueError(
            f"target id {int(target_ids_K[position])} at row {row} has a loss weight, "
            f"expected an id in [0, {vocab_size})"
        )
