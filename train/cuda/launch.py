"""The kernels of train/cuda/csrc/weighted_cross_entropy.cu as functions on tensors, and the choice to use them.

The top of the kernels' source says what each promises. This file chooses one for a dtype, vocabulary and alignment,
checks its arguments so that no wrong pointer reaches it, and launches it. No call waits for the device.

Shape legend: C rows of logits, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from train.cuda.runtime import INT32, INT64, POINTER, CudaKernelError, device_and_stream, launch, load_kernels
from train.distributed import World, gather_objects

SOURCE = Path(__file__).parent / "csrc" / "weighted_cross_entropy.cu"
ROW_KERNELS = ((128, 1), (128, 2), (128, 4), (256, 4), (256, 8), (512, 8), (1024, 8))  # threads x vectors per thread
STREAM_THREADS = 512
SCALE_THREADS, SCALE_MAX_BLOCKS = 256, 4096
VECTOR_BYTES = 16
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class LossBackendError(ValueError):
    """--loss_backend cuda is not possible here. The message is one line."""


# ---------------------------------------------------------------------------------------------------------------------
# The choice, once per run


def choose_loss_backend(requested: str, device: torch.device, vocab_size: int = 0) -> tuple[str, str]:
    """("cuda" or "torch", why) for a run on `device`; "auto" takes our kernels where they compile, load and agree with
    PyTorch on a few rows, and PyTorch's operators elsewhere.

    vocab_size: of the model, whose rows are tried too; 0: no model. Raises LossBackendError if "cuda" is requested and
    not possible, ValueError for another word. With "auto" only a kernel that breaks the device is an error.
    """
    if requested not in ("auto", "cuda", "torch"):
        raise ValueError(f"loss_backend: found {requested!r}, expected auto, cuda or torch")
    if requested == "torch":
        return "torch", "as requested"
    obstacle = _obstacle(device, vocab_size)
    if obstacle is None:
        return "cuda", f"kernels of {SOURCE.name}, checked against PyTorch on {device}"
    if requested == "cuda":
        raise LossBackendError(f"--loss_backend: found cuda, expected auto or torch: {obstacle}")
    return "torch", obstacle


def agree_on_loss_backend(requested: str, world: World, vocab_size: int) -> tuple[str, str]:
    """choose_loss_backend on every rank; the kernels only if all ranks can run them. A collective.

    Raises LossBackendError on every rank alike.
    """
    try:
        choice = choose_loss_backend(requested, world.device, vocab_size)
    except LossBackendError as error:
        choice = ("", str(error))
    choices = gather_objects(choice)
    for backend, reason in choices:
        if not backend:
            raise LossBackendError(reason)
    return next((tuple(each) for each in choices if each[0] == "torch"), choice)


def _obstacle(device: torch.device, vocab_size: int) -> str | None:
    """Why the kernels cannot run on this device for this vocabulary; None if they can."""
    if device.type != "cuda":
        return f"our kernels need a CUDA device, this run is on {device.type}"
    if torch.version.hip:
        return "our kernels need CUDA, this torch is built for ROCm"
    try:
        for dtype in DTYPES:
            for n_ids in filter(None, (1000, 1003, vocab_size)):  # 1003: rows that do not end at 16 bytes
                check_kernels(device, dtype, n_ids)
    except CudaKernelError as error:
        return str(error)
    except RuntimeError as error:  # torch reported a kernel's fault; after that nothing works on this device
        raise LossBackendError(
            f"--loss_backend: the check of the kernels broke off on {device}, start again with "
            f"torch ({' '.join(str(error).split())})"
        ) from None
    return None


def check_kernels(device: torch.device, dtype: torch.dtype, vocab_size: int) -> None:
    """Loss and gradient of three rows against PyTorch in fp64 on the CPU. Raises CudaKernelError if they differ."""
    generator = torch.Generator().manual_seed(0)
    logits_CV = (4 * torch.randn(3, vocab_size, generator=generator)).to(dtype)
    target_ids_C, loss_weights_C = torch.tensor([0, 7, vocab_size - 1]), torch.tensor([2.0, 0.0, -0.5])
    exact_CV = logits_CV.double().log_softmax(1)
    exact_loss_C = -loss_weights_C * exact_CV.gather(1, target_ids_C[:, None]).squeeze(1)
    exact_CV = exact_CV.exp()
    exact_CV[torch.arange(3), target_ids_C] -= 1
    exact_CV *= loss_weights_C[:, None]
    found_CV = empty_logits(3, vocab_size, dtype, device).copy_(logits_CV)
    loss_C = cuda_chunk_loss_and_gradient_(found_CV, target_ids_C.to(device), loss_weights_C.to(device), True)
    rounding = torch.finfo(dtype).eps * exact_CV.abs() + 1e-5
    is_right = ((loss_C.cpu() - exact_loss_C).abs() <= 1e-5 * exact_loss_C.abs() + 1e-5).all() and (
        (found_CV.cpu() - exact_CV).abs() <= rounding
    ).all()
    if not is_right:
        raise CudaKernelError(f"the kernels of {SOURCE.name} and PyTorch disagree on {device} for {dtype}")


# ---------------------------------------------------------------------------------------------------------------------
# Functions on tensors


def empty_logits(n_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised logits (C, V), rows at multiples of 16 bytes: up to 65,536 of 2 bytes they go to a row kernel."""
    per_vector = VECTOR_BYTES // dtype.itemsize
    width = -(-vocab_size // per_vector) * per_vector
    return torch.empty(n_rows, width, dtype=dtype, device=device)[:, :vocab_size]


def choose_kernel(dtype: torch.dtype, vocab_size: int, *matrices: Tensor) -> tuple[str, int]:
    """(name, threads) of the smallest kernel for rows of this length; matrices: everything with rows that it accesses.

    Row kernels move 16 bytes at a time: rows that do not all begin at a multiple of that, or are too long for the
    registers of 1024 threads, go to the streaming kernel.
    """
    is_aligned = all(
        each.data_ptr() % VECTOR_BYTES == 0 and each.stride(0) * each.element_size() % VECTOR_BYTES == 0
        for each in matrices
    )
    if is_aligned:
        for threads, vectors in ROW_KERNELS:
            if vocab_size * dtype.itemsize <= threads * vectors * VECTOR_BYTES:
                return f"wce_row_{DTYPES[dtype]}_{threads}x{vectors}", threads
    return f"wce_stream_{DTYPES[dtype]}", STREAM_THREADS


class RowExtras(NamedTuple):
    """What a kernel also writes where there is a tensor for it."""

    logsumexps_C: Tensor | None = None  # fp32
    bad_row: Tensor | None = None  # one int32, 0 before: 1 + the last row with a weight and a target outside [0, V)


def cuda_row_cross_entropy(
    logits_CV: Tensor,
    target_ids_C: Tensor,
    loss_weights_C: Tensor,
    gradient_CV: Tensor | None = None,
    *,
    upstream: Tensor | None = None,
    extras: RowExtras = RowExtras(),
    kernel: tuple[str, int] | None = None,
) -> Tensor:
    """Weighted cross-entropy of each row, (C,) fp32 (E9); gradient_CV, if given, receives its gradient (E10).

    Args: logits bf16, fp16 or fp32, rows contiguous, untouched unless gradient_CV is the same tensor; target ids int64;
    weights fp32; upstream: one fp32 number on the device that multiplies the gradient before it is rounded; extras are
    written where given; kernel: another one than choose_kernel's. A row with a weight whose target is outside [0, V)
    has loss nan and gradient 0.
    Raises ValueError for tensors that a kernel cannot take, CudaKernelError for a failed launch.
    """
    _check_matrix("logits", logits_CV, logits_CV)
    n_rows, vocab_size = logits_CV.shape
    if gradient_CV is not None:
        _check_matrix("gradient", gradient_CV, logits_CV)
    _check_vector("target ids", target_ids_C, torch.int64, n_rows, logits_CV)
    _check_vector("loss weights", loss_weights_C, torch.float32, n_rows, logits_CV)
    _check_vector("upstream", upstream, torch.float32, 1, logits_CV)
    _check_vector("logsumexps", extras.logsumexps_C, torch.float32, n_rows, logits_CV)
    _check_vector("bad_row", extras.bad_row, torch.int32, 1, logits_CV)
    losses_C = torch.empty(n_rows, dtype=torch.float32, device=logits_CV.device)
    if n_rows == 0:
        return losses_C
    matrices = (logits_CV,) if gradient_CV is None else (logits_CV, gradient_CV)
    name, threads = kernel or choose_kernel(logits_CV.dtype, vocab_size, *matrices)
    device_index, stream = device_and_stream(logits_CV)
    launch(
        load_kernels(SOURCE, device_index),
        name,
        grid=n_rows,
        block=threads,
        stream=stream,
        parameters=(
            (POINTER, logits_CV.data_ptr()),
            (INT64, logits_CV.stride(0)),
            (POINTER, _address(gradient_CV)),
            (INT64, 0 if gradient_CV is None else gradient_CV.stride(0)),
            (INT32, vocab_size),
            (POINTER, target_ids_C.data_ptr()),
            (POINTER, loss_weights_C.data_ptr()),
            (POINTER, _address(upstream)),
            (POINTER, losses_C.data_ptr()),
            (POINTER, _address(extras.logsumexps_C)),
            (POINTER, _address(extras.bad_row)),
        ),
    )
    return losses_C


def cuda_chunk_loss_and_gradient_(
    logits_CV: Tensor, target_ids_C: Tensor, loss_weights_C: Tensor, need_gradient: bool
) -> Tensor:
    """train.weighted_cross_entropy.chunk_loss_and_gradient_ in one launch: each logit is read and written once.

    A target outside [0, V) on a row with weight gives loss nan instead of an error: nothing here waits for the device.
    """
    return cuda_row_cross_entropy(logits_CV, target_ids_C, loss_weights_C, logits_CV if need_gradient else None)


def cuda_scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor (one fp32 number on the device) in place; not even read if the factor is 1.

    Raises ValueError for tensors that the kernel cannot take, CudaKernelError for a failed launch.
    """
    if values.dtype not in DTYPES or not values.is_contiguous():
        raise ValueError(f"values {values.dtype}, stride {values.stride()}: expected contiguous bf16, fp16 or fp32")
    _check_vector("factor", factor, torch.float32, 1, values)
    if values.numel() == 0:
        return
    device_index, stream = device_and_stream(values)
    grid = min(-(-values.numel() * values.element_size() // (VECTOR_BYTES * SCALE_THREADS)), SCALE_MAX_BLOCKS)
    launch(
        load_kernels(SOURCE, device_index),
        f"wce_scale_{DTYPES[values.dtype]}",
        grid=grid,
        block=SCALE_THREADS,
        stream=stream,
        parameters=((POINTER, values.data_ptr()), (INT64, values.numel()), (POINTER, factor.data_ptr())),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_matrix(name: str, matrix: Tensor, logits_CV: Tensor) -> None:
    if matrix.dtype not in DTYPES or matrix.dim() != 2 or matrix.shape[1] == 0 or matrix.stride(1) != 1:
        raise ValueError(
            f"{name} {tuple(matrix.shape)}, {matrix.dtype}, stride {matrix.stride()}: expected bf16, fp16 "
            "or fp32 of two dimensions with contiguous rows"
        )
    if (matrix.shape, matrix.dtype, matrix.device) != (logits_CV.shape, logits_CV.dtype, logits_CV.device):
        raise ValueError(
            f"{name} {tuple(matrix.shape)}, {matrix.dtype} on {matrix.device}, expected as the logits "
            f"{tuple(logits_CV.shape)}, {logits_CV.dtype} on {logits_CV.device}"
        )


def _check_vector(name: str, vector: Tensor | None, dtype: torch.dtype, length: int, logits: Tensor) -> None:
    if vector is not None and (
        vector.dtype != dtype
        or vector.numel() != length
        or not vector.is_contiguous()
        or vector.device != logits.device
    ):
        raise ValueError(
            f"{name} {tuple(vector.shape)}, {vector.dtype} on {vector.device}, expected {length} of "
            f"{dtype}, contiguous, on {logits.device}"
        )
