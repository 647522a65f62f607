"""The CUDA kernels' own text, run on the CPU by tests/support/cuda_shim, against float64 (docs/math.md, E9 and E10).

Shape legend: M rows, V vocabulary. No line here runs on a GPU; what that leaves open is in train/cuda/csrc/README.md.
"""

import ctypes
import math
import mmap
import re
from random import Random

import pytest
import torch

from tests.support.cuda_build import (
    ORDERS,
    LaunchError,
    build_all,
    counted,
    emulated_library,
    keep_kernels,
    kernel_names,
    launch,
    why_no_gxx,
)
from train.cuda.launch import ROW_KERNELS, SOURCE, STREAM_THREADS, choose_kernel

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_no_gxx() != "", reason=why_no_gxx() or "g++ is there")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCABULARIES = [1, 7, 8, 31, 1000, 1003, 4096, 32016]
SCALE_THREADS = 64
each_dtype = pytest.mark.parametrize("dtype_name", DTYPES)
each_vocabulary = pytest.mark.parametrize("vocabulary_size", VOCABULARIES)


@pytest.fixture(scope="module", autouse=True)
def libraries():
    """The plain build and two others, made side by side."""
    build_all([(SOURCE, "plain"), (SOURCE, "count"), (long_row_kernels(), "rough")])


# ---------------------------------------------------------------------------------------------------------------------
# The oracle


def row_capacity(dtype, threads: int, vectors: int) -> int:
    return threads * vectors * 16 // dtype.itemsize


def kernels_for(dtype_name: str, vocabulary_size: int) -> list[tuple[str, int]]:
    """(name, threads) of the stream kernel and of every row kernel that can hold the row; for short rows, where all
    can, of the smallest, the largest and one of 256 threads."""
    fitting = [
        (f"wce_row_{dtype_name}_{threads}x{vectors}", threads)
        for threads, vectors in ROW_KERNELS
        if row_capacity(DTYPES[dtype_name], threads, vectors) >= vocabulary_size
    ]
    if vocabulary_size <= 31:
        fitting = [fitting[0], fitting[3], fitting[-1]]
    return [*fitting, (f"wce_stream_{dtype_name}", STREAM_THREADS)]


def row_and_stream(dtype_name: str) -> tuple[tuple[str, int], tuple[str, int]]:
    """One of each kind: rows of up to 2048 fp32 logits in registers, rows of any length."""
    return (f"wce_row_{dtype_name}_128x4", 128), (f"wce_stream_{dtype_name}", STREAM_THREADS)


def long_row_kernels() -> str:
    """The text with only those kernels that can hold 32016 logits."""
    names = {name for dtype_name in DTYPES for name, _ in kernels_for(dtype_name, 32016)}
    return keep_kernels(SOURCE.read_text(encoding="utf-8"), names)


def neighbour_distance(values: torch.Tensor, dtype) -> torch.Tensor:
    """Distance of two neighbouring numbers of the dtype at each (float64) value: one unit in the last place."""
    information = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=information.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(values, information.eps), exponent)


def oracle(logits_MV, target_ids_M, loss_weights_M, upstream=1.0):
    """float64 losses, gradient and logsumexps; rows of weight 0 are zero, whatever they hold."""
    logits_MV, weights_M = logits_MV.double(), loss_weights_M.double()
    used_M = weights_M != 0
    logits_MV = torch.where(used_M[:, None], logits_MV, 0)
    targets_M = torch.where(used_M, target_ids_M, 0)
    logsumexp_M = logits_MV.logsumexp(1)
    losses_M = weights_M * (logsumexp_M - logits_MV.gather(1, targets_M[:, None])[:, 0])
    gradient_MV = (logits_MV - logsumexp_M[:, None]).exp()
    gradient_MV[torch.arange(len(targets_M)), targets_M] -= 1
    return losses_M, gradient_MV * (weights_M * upstream)[:, None], torch.where(used_M, logsumexp_M, 0)


class Rows:
    """Inputs of one launch: `stride` elements from row to row, `offset` elements from the first 16-byte border."""

    def __init__(self, dtype, vocabulary_size: int, *, n_rows=4, stride=None, offset=0, seed=0, scale=3.0):
        generator = torch.Generator().manual_seed(seed)
        self.vocabulary_size = vocabulary_size
        self.stride = stride or vocabulary_size
        storage = torch.full((n_rows * self.stride + offset + 8,), math.nan, dtype=dtype)  # padding must not be read
        start = -storage.data_ptr() % 16 // storage.element_size() + offset
        self.logits_MV = storage[start:].as_strided((n_rows, vocabulary_size), (self.stride, 1))
        logits = torch.randn(n_rows, vocabulary_size, generator=generator, dtype=torch.float64) * scale
        self.target_ids_M = torch.randint(vocabulary_size, (n_rows,), generator=generator)
        logits.scatter_add_(1, self.target_ids_M[:, None], torch.linspace(0, 12, n_rows, dtype=torch.float64)[:, None])
        self.logits_MV.copy_(logits)
        self.loss_weights_M = torch.tensor([0.75, 0.0, -2.5, 0.0625, 1.0, 3.0, 0.5, 0.001])[:n_rows]
        self.skipped_M = self.loss_weights_M == 0
        self.logits_MV[self.skipped_M] = math.nan
        self.target_ids_M[self.skipped_M] = -100

    def new_gradient(self):
        """Of the same strides and alignment, filled with a number that no gradient has."""
        size = (len(self.logits_MV) - 1) * self.stride + self.vocabulary_size
        storage = torch.full((size + 16,), 77.0, dtype=self.logits_MV.dtype)
        start = (self.logits_MV.data_ptr() - storage.data_ptr()) % 16 // storage.element_size()
        return storage[start:].as_strided(self.logits_MV.shape, self.logits_MV.stride())


class Result:
    def __init__(self, rows: Rows, gradient_MV):
        n_rows = len(rows.logits_MV)
        self.gradient_MV = gradient_MV
        self.losses_M = torch.full((n_rows,), 55.0)
        self.logsumexps_M = torch.full((n_rows,), 55.0)
        self.bad_row = torch.zeros(1, dtype=torch.int32)

    def bits(self) -> bytes:
        parts = [self.losses_M, self.logsumexps_M, self.bad_row]
        if self.gradient_MV is not None:
            parts.append(self.gradient_MV.contiguous())
        return b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts)


def run(
    kernel: tuple[str, int], rows: Rows, *, place="in", upstream=None, order="ascending", library=None, watch=None
) -> Result:
    """One launch; place "in" overwrites a copy of the logits, "out" has its own gradient, "none" wants none."""
    name, threads = kernel
    logits_MV = rows.logits_MV
    if place == "in":
        logits_MV = rows.new_gradient()
        logits_MV.copy_(rows.logits_MV)
    gradient_MV = {"in": logits_MV, "out": None, "none": None}[place]
    if place == "out":
        gradient_MV = rows.new_gradient()
    result = Result(rows, gradient_MV)
    arguments = [
        logits_MV,
        rows.stride,
        gradient_MV,
        rows.stride,
        rows.vocabulary_size,
        rows.target_ids_M,
        rows.loss_weights_M,
        upstream,
        result.losses_M,
        result.logsumexps_M,
        result.bad_row,
    ]
    library = library or emulated_library(SOURCE)
    with counted(library, **(watch(logits_MV, gradient_MV) if watch else {})) as result.traffic:
        launch(library, name, grid=len(logits_MV), block=threads, arguments=arguments, order=order, seed=7)
    return result


def check(result: Result, rows: Rows, upstream=1.0):
    losses_M, gradient_MV, logsumexps_M = oracle(rows.logits_MV, rows.target_ids_M, rows.loss_weights_M, upstream)
    weights_M = rows.loss_weights_M.double().abs()
    # 1e-5 of the loss; below 0.1 nats a float32 sum near 1 cannot resolve that, and the bound is 1e-6 of the weight.
    loss_tolerance_M = torch.maximum(1e-5 * losses_M.abs(), 1e-6 * weights_M)
    assert ((result.losses_M - losses_M).abs() <= loss_tolerance_M).all()
    assert ((result.logsumexps_M - logsumexps_M).abs() <= 1e-6 * logsumexps_M.abs().clamp(min=1)).all()
    assert (result.losses_M * rows.loss_weights_M.sign() >= 0).all()  # a cross-entropy is never negative
    if result.gradient_MV is not None:
        dtype = result.gradient_MV.dtype
        tolerance_MV = torch.maximum(neighbour_distance(gradient_MV, dtype), 1e-6 * weights_M[:, None])
        error_MV = (result.gradient_MV.double() - gradient_MV).abs()
        assert (error_MV <= tolerance_MV).all(), f"worst {(error_MV / tolerance_MV).max()} of the tolerance"
        assert (result.gradient_MV[rows.skipped_M] == 0).all()
    assert result.bad_row.item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Worked by hand
# Logits (0, ln 2, ln 5): exponentials 1, 2, 5, their sum 8, softmax (1/8, 2/8, 5/8).
@pytest.mark.parametrize("kernel", [("wce_row_fp32_128x1", 128), ("wce_stream_fp32", STREAM_THREADS)])
def test_one_row_worked_by_hand(kernel):
    rows = Rows(torch.float32, 3, n_rows=1, stride=4)
    rows.logits_MV.copy_(torch.tensor([[0, math.log(2), math.log(5)]]))
    rows.target_ids_M[0], rows.loss_weights_M[0] = 2, 8.0
    result = run(kernel, rows, upstream=torch.tensor([0.5]))
    assert result.losses_M.item() == pytest.approx(8 * 0.470003629, rel=1e-6)  # 8 * ln(8 / 5): upstream is not in it
    assert result.logsumexps_M.item() == pytest.approx(2.079441542, rel=1e-6)  # ln 8
    torch.testing.assert_close(result.gradient_MV, torch.tensor([[0.5, 1.0, -1.5]]))  # 4 * (1/8, 2/8, 5/8 - 1)


# ---------------------------------------------------------------------------------------------------------------------
# The matrix


@each_dtype
@each_vocabulary
def test_every_kernel_that_fits_in_every_order(dtype_name, vocabulary_size):
    dtype = DTYPES[dtype_name]
    aligned_stride = -(-vocabulary_size // 8) * 8
    rows = Rows(dtype, vocabulary_size, stride=aligned_stride)
    for kernel in kernels_for(dtype_name, vocabulary_size):
        results = [run(kernel, rows, order=order) for order in ORDERS]
        check(results[0], rows)
        assert len({result.bits() for result in results}) == 1, f"{kernel}: bits depend on the order of the threads"


@each_dtype
@each_vocabulary
def test_stream_kernel_at_every_alignment_of_rows(dtype_name, vocabulary_size):
    rows = Rows(DTYPES[dtype_name], vocabulary_size, offset=1)  # rows without padding: each has its own alignment
    if vocabulary_size < 8:
        rows = Rows(DTYPES[dtype_name], vocabulary_size, offset=1, n_rows=8)
    results = [
        run((f"wce_stream_{dtype_name}", STREAM_THREADS), rows, order=order, place=place)
        for order, place in zip(ORDERS, ("in", "out", "in"))
    ]
    for result in results:
        check(result, rows)
    assert len({result.bits() for result in results}) == 1


@pytest.mark.parametrize("seed", range(30))
def test_the_kernel_that_the_product_chooses_for_any_rows(seed):
    # Length, stride, first address, place and order at random; every second case keeps rows at 16-byte borders.
    random = Random(seed)
    dtype_name = random.choice(list(DTYPES))
    vocabulary_size = random.randint(1, 700)
    stride = vocabulary_size + random.randint(0, 20)
    offset = random.randint(0, 7)
    if seed % 2:
        stride, offset = -(-stride // 8) * 8, 0
    rows = Rows(DTYPES[dtype_name], vocabulary_size, stride=stride, offset=offset, seed=seed, n_rows=3)
    kernel = choose_kernel(DTYPES[dtype_name], vocabulary_size, rows.logits_MV)
    if seed % 2:
        assert kernel[0].startswith("wce_row_")
    check(run(kernel, rows, place=random.choice(["in", "out"]), order=random.choice(list(ORDERS))), rows)


@each_dtype
def test_out_of_place_keeps_the_logits_and_no_gradient_keeps_the_loss(dtype_name):
    for kernel in row_and_stream(dtype_name):
        rows = Rows(DTYPES[dtype_name], 1003, stride=1008)
        before = rows.logits_MV.clone()
        in_place, out, none = (run(kernel, rows, place=place) for place in ("in", "out", "none"))
        check(out, rows)
        assert out.bits() == in_place.bits()
        assert torch.equal(none.losses_M, out.losses_M) and torch.equal(none.logsumexps_M, out.logsumexps_M)
        assert torch.equal(rows.logits_MV.nan_to_num(), before.nan_to_num())


@each_dtype
def test_stream_kernel_with_a_gradient_of_another_alignment(dtype_name):
    rows = Rows(DTYPES[dtype_name], 1003, offset=1)
    elsewhere = Rows(DTYPES[dtype_name], 1003, offset=2)
    rows.new_gradient = elsewhere.new_gradient
    check(run((f"wce_stream_{dtype_name}", STREAM_THREADS), rows, place="out"), rows)


@each_dtype
def test_padding_between_rows_is_left_alone(dtype_name):
    for kernel in row_and_stream(dtype_name):
        rows = Rows(DTYPES[dtype_name], 995, stride=1008)
        result = run(kernel, rows)  # on a copy whose padding is 77
        whole = result.gradient_MV.as_strided((len(rows.logits_MV) - 1, 1008), (1008, 1))
        assert (whole[:, 995:] == 77).all()


@each_dtype
def test_upstream_multiplies_before_the_gradient_is_rounded(dtype_name):
    # 1 / 60000 of a probability of 1 / 32016 is 5e-10: below the smallest fp16 (6e-8), unless the scale of a
    # GradScaler, 65536, comes in before rounding.
    rows = Rows(DTYPES[dtype_name], 32016, n_rows=3, scale=0.1)
    rows.loss_weights_M[:] = torch.tensor([1 / 60000, 0, -1 / 60000])
    for kernel in kernels_for(dtype_name, 32016):
        result = run(kernel, rows, upstream=torch.tensor([65536.0]))
        _, gradient_MV, _ = oracle(rows.logits_MV, rows.target_ids_M, rows.loss_weights_M, 65536.0)
        error_MV = (result.gradient_MV.double() - gradient_MV).abs()
        assert (
            error_MV <= torch.maximum(neighbour_distance(gradient_MV, DTYPES[dtype_name]), 2e-6 * gradient_MV.abs())
        ).all()
        assert (result.gradient_MV[[0, 2]] != 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Odd numbers


@each_dtype
def test_rows_that_hold_infinities(dtype_name):
    for kernel in row_and_stream(dtype_name):
        rows = Rows(DTYPES[dtype_name], 40, n_rows=8)
        infinite = math.inf
        rows.loss_weights_M[:] = 1.0
        rows.skipped_M[:] = False
        rows.target_ids_M[:] = 5
        rows.logits_MV[:] = Rows(DTYPES[dtype_name], 40, n_rows=8, seed=3).logits_MV.nan_to_num(0.5)
        rows.logits_MV[1, 6:] = -infinite  # fine: probability 0
        rows.logits_MV[2, 5] = -infinite  # the target: loss inf, gradient -1 there
        rows.logits_MV[3, :] = -infinite
        rows.logits_MV[4, 30] = infinite
        rows.logits_MV[5, 30] = math.nan
        rows.logits_MV[6, :39] = -infinite  # one logit left, which is not the target
        result = run(kernel, rows)
        for row in (3, 4, 5):  # as torch.nn.functional.cross_entropy: NaN, in this row alone
            assert math.isnan(result.losses_M[row]) and result.gradient_MV[row].isnan().all()
        for row in (2, 6):
            assert result.losses_M[row] == infinite
            assert result.gradient_MV[row, 5] == -1
        finite = torch.tensor([0, 1, 2, 6, 7])
        losses_M, gradient_MV, logsumexps_M = oracle(rows.logits_MV, rows.target_ids_M, rows.loss_weights_M)
        torch.testing.assert_close(result.losses_M[finite].double(), losses_M[finite], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.logsumexps_M[finite].double(), logsumexps_M[finite], rtol=1e-6, atol=1e-6)
        tolerance_MV = neighbour_distance(gradient_MV, DTYPES[dtype_name]).clamp(min=1e-6)[finite]
        assert ((result.gradient_MV.double() - gradient_MV)[finite].abs() <= tolerance_MV).all()


@pytest.mark.parametrize("kernel", [("wce_row_fp32_128x1", 128), ("wce_stream_fp32", STREAM_THREADS)])
def test_large_logits_keep_the_digits_of_the_loss(kernel):
    # Two logits of 1e4 and 1e4 + 1: the loss is ln(1 + e) = 1.313261688. 1e4 * log2(e) is rounded by up to 5e-4.
    rows = Rows(torch.float32, 2, n_rows=3, stride=4)
    rows.logits_MV[:] = torch.tensor([[1e4, 1e4 + 1], [-1e4, -1e4 + 1], [99999, 1e5]])
    rows.target_ids_M[:], rows.loss_weights_M[:] = 0, 1.0
    result = run(kernel, rows)
    assert result.losses_M.tolist() == pytest.approx([1.313261688] * 3, rel=1e-6)
    assert result.logsumexps_M.tolist() == pytest.approx([10001.313262, -9998.686738, 100000.313262], rel=2e-7)
    assert result.gradient_MV[:, 1].tolist() == pytest.approx([0.731058579] * 3, rel=1e-6)


@each_dtype
def test_tolerances_hold_with_the_roughest_exponentials_a_gpu_may_have(dtype_name):
    # Here exp2f is right to half a unit in the last place; the GPU's instruction may be off by 2^-22 in each term.
    kernels = kernels_for(dtype_name, 32016)
    library = emulated_library(long_row_kernels(), "rough")
    for vocabulary_size in (7, 1003, 32016):
        rows = Rows(DTYPES[dtype_name], vocabulary_size, n_rows=8, stride=32016)
        for kernel in kernels:
            result = run(kernel, rows, library=library)
            check(result, rows)
            assert result.bits() != run(kernel, rows).bits()


@each_dtype
def test_bad_targets_are_reported_and_trained_on_nothing(dtype_name):
    for kernel in row_and_stream(dtype_name):
        rows = Rows(DTYPES[dtype_name], 31, n_rows=8, stride=32)
        rows.target_ids_M[[2, 4, 6]] = torch.tensor([-1, 31, 2**32 + 3])  # the last is 3 in 32 bits
        for order in ORDERS:
            result = run(kernel, rows, order=order)
            assert result.bad_row.item() == 7  # the last bad row is 6; row 1, of weight 0, may hold -100
            assert result.losses_M[[2, 4, 6]].isnan().all() and result.logsumexps_M[[2, 4, 6]].isnan().all()
            assert (result.gradient_MV[[1, 2, 4, 6]] == 0).all()
        good = torch.tensor([0, 3, 5, 7])
        losses_M = oracle(rows.logits_MV[good], rows.target_ids_M[good], rows.loss_weights_M[good])[0]
        torch.testing.assert_close(result.losses_M[good].double(), losses_M, rtol=1e-5, atol=1e-6)


def test_null_results_are_allowed():
    rows = Rows(torch.float32, 31, stride=32)
    rows.target_ids_M[0] = 99
    for name, threads in (("wce_row_fp32_128x1", 128), ("wce_stream_fp32", STREAM_THREADS)):
        losses_M = torch.zeros(4)
        launch(
            emulated_library(SOURCE),
            name,
            grid=4,
            block=threads,
            arguments=[
                rows.logits_MV,
                32,
                None,
                0,
                31,
                rows.target_ids_M,
                rows.loss_weights_M,
                None,
                losses_M,
                None,
                None,
            ],
        )
        assert losses_M[0].isnan() and losses_M[1] == 0 and losses_M[2:].abs().min() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Memory traffic


def rows_apart(logits_MV, gradient_MV):
    """Row 0 has weight, row 1 has not."""
    return {"used": logits_MV[0], "skipped": logits_MV[1]}


@each_dtype
def test_each_logit_is_read_once_and_written_once_and_a_skipped_row_is_not_read(dtype_name):
    size = DTYPES[dtype_name].itemsize
    rows = Rows(DTYPES[dtype_name], 1003, n_rows=2, stride=1008)
    row_bytes, one = 1003 * size, size  # `one`: the target's column is read and written once more by its owner
    options = {"library": emulated_library(SOURCE, "count"), "watch": rows_apart}
    traffic = run((f"wce_row_{dtype_name}_256x4", 256), rows, **options).traffic
    assert traffic == {"used": (row_bytes + one, row_bytes + one), "skipped": (0, row_bytes)}
    traffic = run((f"wce_stream_{dtype_name}", STREAM_THREADS), rows, **options).traffic
    assert traffic == {"used": (2 * row_bytes + one, row_bytes + one), "skipped": (0, row_bytes)}
    traffic = run((f"wce_row_{dtype_name}_256x4", 256), rows, place="none", **options).traffic
    assert traffic == {"used": (row_bytes + one, 0), "skipped": (0, 0)}


@each_dtype
def test_scale_multiplies_once_and_reads_nothing_for_a_factor_of_one(dtype_name):
    dtype = DTYPES[dtype_name]
    library = emulated_library(SOURCE, "count")
    for count, offset in ((1, 0), (5, 3), (1003, 0), (1003, 1), (4099, 7)):
        values = torch.linspace(-3, 3, count + offset + 8).to(dtype)
        before, part = values.clone(), values[offset : offset + count]
        for factor in (1.0, -0.375, 3.0):
            with counted(library, part=part) as traffic:
                launch(
                    library,
                    f"wce_scale_{dtype_name}",
                    grid=3,
                    block=SCALE_THREADS,
                    arguments=[part, count, torch.tensor([factor])],
                    order="random",
                )
            n_bytes = 0 if factor == 1 else count * dtype.itemsize
            assert traffic["part"] == (n_bytes, n_bytes)
            expected = before.clone()
            expected[offset : offset + count] = (before[offset : offset + count].float() * factor).to(dtype)
            assert torch.equal(values, expected)
            values.copy_(before)


def test_scale_of_an_empty_range_and_of_nan():
    library = emulated_library(SOURCE)
    values = torch.tensor([1.0, math.nan, -math.inf, 0.0])
    launch(library, "wce_scale_fp32", grid=1, block=32, arguments=[values, 0, torch.tensor([3.0])])
    assert values[0] == 1
    launch(library, "wce_scale_fp32", grid=1, block=32, arguments=[values, 4, torch.tensor([math.nan])])
    assert values.isnan().all()


class InaccessibleMemory:
    """Address space without a readable page: touching it ends the process."""

    def __init__(self, n_bytes: int):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        no_access, reserve_nothing = 0, 0x4000
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
        self.address = libc.mmap(None, n_bytes, no_access, flags, -1, 0)
        if self.address in (None, ctypes.c_void_p(-1).value):
            pytest.skip("no address space for an inaccessible row")

    def data_ptr(self) -> int:
        return self.address


@each_dtype
def test_logits_of_weight_zero_may_lie_in_memory_that_cannot_be_read(dtype_name):
    dtype = DTYPES[dtype_name]
    memory = InaccessibleMemory(2**22)
    gradient_MV = torch.full((3, 1024), 7.0, dtype=dtype)
    for name, threads in row_and_stream(dtype_name):
        losses_M, logsumexps_M = torch.ones(3), torch.ones(3)
        launch(
            emulated_library(SOURCE),
            name,
            grid=3,
            block=threads,
            arguments=[
                memory.data_ptr(),
                1024,
                gradient_MV,
                1024,
                1024,
                torch.full((3,), -100),
                torch.zeros(3),
                None,
                losses_M,
                logsumexps_M,
                None,
            ],
        )
        assert not gradient_MV.any() and not losses_M.any() and not logsumexps_M.any()


def test_rows_further_apart_than_32_bits():
    stride = 2**31 + 8  # 4 GiB from row to row of bf16: sparse memory, of which only the rows become real
    n_rows, vocabulary_size = 3, 1000
    reserve_nothing = 0x4000
    try:
        memory = mmap.mmap(
            -1,
            2 * (n_rows - 1) * stride + 2 * vocabulary_size,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing,
        )
    except (OSError, ValueError) as error:
        pytest.skip(f"no 8 GiB of address space: {error}")
    logits_MV = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((n_rows, vocabulary_size), (stride, 1))
    dense = Rows(torch.bfloat16, vocabulary_size, n_rows=n_rows)
    for name, threads in (("wce_row_bf16_256x4", 256), ("wce_stream_bf16", STREAM_THREADS)):
        logits_MV.copy_(dense.logits_MV)
        expected = run((name, threads), dense)
        losses_M = torch.zeros(n_rows)
        launch(
            emulated_library(SOURCE),
            name,
            grid=n_rows,
            block=threads,
            arguments=[
                logits_MV,
                stride,
                logits_MV,
                stride,
                vocabulary_size,
                dense.target_ids_M,
                dense.loss_weights_M,
                None,
                losses_M,
                None,
                None,
            ],
        )
        assert torch.equal(losses_M, expected.losses_M)
        assert torch.equal(logits_MV, expected.gradient_MV)


# ---------------------------------------------------------------------------------------------------------------------
# The text and the shim


def test_table_in_the_header_names_the_kernels_of_the_text():
    text = SOURCE.read_text(encoding="utf-8")
    table = {
        (int(threads), int(vectors)): (int(half.replace(",", "")), int(full.replace(",", "")))
        for threads, vectors, half, full in re.findall(
            r"^//   wce_row_<dtype>_(\d+)x(\d) +\d+ +([\d,]+) / +([\d,]+)", text, re.MULTILINE
        )
    }
    assert tuple(table) == ROW_KERNELS
    assert f"STREAM_THREADS = {STREAM_THREADS};" in text
    for (threads, vectors), (half, full) in table.items():
        assert (half, full) == (
            row_capacity(torch.bfloat16, threads, vectors),
            row_capacity(torch.float32, threads, vectors),
        )
    library = emulated_library(SOURCE)
    for dtype_name in DTYPES:
        for name in (
            *(f"wce_row_{dtype_name}_{threads}x{vectors}" for threads, vectors in ROW_KERNELS),
            f"wce_stream_{dtype_name}",
            f"wce_scale_{dtype_name}",
        ):
            assert library.simt_has_kernel(name.encode()) == 1


def test_text_includes_nothing_and_adds_nothing_by_float_atomics():
    text = SOURCE.read_text(encoding="utf-8")
    assert not re.search(r"^\s*#\s*include", text, re.MULTILINE)
    assert re.findall(r"\batomic\w+", text) and set(re.findall(r"\batomic\w+\(", text)) == {"atomicMax("}


SHIM_KERNELS = """
extern "C" __global__ void returns_early(int* result) {
    if (threadIdx.x == 40) return;
    __syncthreads();
    result[threadIdx.x] = 1;
}
extern "C" __global__ void two_barriers(int* result) {
    if (threadIdx.x % 2) __syncthreads();
    else
        __syncthreads();
    result[threadIdx.x] = 1;
}
extern "C" __global__ void half_a_warp_shuffles(int* result) {
    if (threadIdx.x < 16) result[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
extern "C" __global__ void shuffles(int* result, int distance) {
    const int lane = threadIdx.x % 32, value = 100 * (threadIdx.x / 32) + lane;
    result[4 * threadIdx.x] = __shfl_xor_sync(0xffffffffu, value, distance);
    result[4 * threadIdx.x + 1] = __shfl_down_sync(0xffffffffu, value, distance);
    result[4 * threadIdx.x + 2] = __shfl_sync(0xffffffffu, value, 3);
    result[4 * threadIdx.x + 3] = lane < 16 ? __shfl_xor_sync(0xffffu, value, 1) : -1;
}
extern "C" __global__ void reads_unwritten_memory(float* result) {
    SHARED(float, values, 64);
    result[threadIdx.x] = values[threadIdx.x];
}
extern "C" __global__ void first_come(int* counter, int* result) { result[threadIdx.x] = counter[0]++; }
"""


def test_shim_names_what_a_block_did_wrong():
    library = emulated_library(SHIM_KERNELS)
    result = torch.zeros(256, dtype=torch.int32)
    for name, message in (
        ("returns_early", r"thread 0 waits at __syncthreads in line 4, thread 40 has returned \(block 0\)"),
        ("two_barriers", r"__syncthreads in line \d+ by thread \d+, in line \d+ by thread \d+"),
        ("half_a_warp_shuffles", r"thread 0 waits in a shuffle in line 14, thread 16 has returned"),
        ("missing", "no kernel missing"),
    ):
        for order in ORDERS:
            with pytest.raises(LaunchError, match=message):
                launch(library, name, grid=1, block=64, arguments=[result], order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_shim_shuffles_as_the_cuda_guide_says(order):
    result = torch.zeros(64, 4, dtype=torch.int32)
    launch(emulated_library(SHIM_KERNELS), "shuffles", grid=1, block=64, arguments=[result, 4], order=order)
    for thread in range(64):
        lane, base = thread % 32, 100 * (thread // 32)
        assert result[thread].tolist() == [
            base + (lane ^ 4),
            base + (lane + 4 if lane < 28 else lane),
            base + 3,
            base + (lane ^ 1) if lane < 16 else -1,
        ]


def test_shim_orders_differ_and_shared_memory_starts_as_nan():
    library = emulated_library(SHIM_KERNELS)
    values = torch.zeros(64)
    launch(library, "reads_unwritten_memory", grid=1, block=64, arguments=[values])
    assert values.isnan().all()
    came = {}
    for order in ORDERS:
        came[order] = torch.zeros(64, dtype=torch.int32)
        launch(
            library,
            "first_come",
            grid=1,
            block=64,
            arguments=[torch.zeros(1, dtype=torch.int32), came[order]],
            order=order,
            seed=1,
        )
    assert came["ascending"].tolist() == list(range(64))
    assert came["descending"].tolist() == list(range(63, -1, -1))
    assert sorted(came["random"].tolist()) == list(range(64))
    assert came["random"].tolist() not in (came["ascending"].tolist(), came["descending"].tolist())


def test_two_libraries_in_one_process_keep_their_kernels_apart():
    first, second = (
        emulated_library(f'extern "C" __global__ void same_name(int* result) {{ result[0] = {number}; }}')
        for number in (1, 2)
    )
    result = torch.zeros(1, dtype=torch.int32)
    for library, number in ((first, 1), (second, 2), (first, 1)):
        launch(library, "same_name", grid=1, block=1, arguments=[result])
        assert result.item() == number
    assert not first.simt_has_kernel(b"wce_stream_fp32")


def test_kernel_names_are_read_behind_the_preprocessor():
    assert kernel_names('extern "C" void a(int* b) {}\nextern "C"  void\nc_1x2 (int d) {}\nvoid e();') == ["a", "c_1x2"]
