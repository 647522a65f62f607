"""From Python to the kernels without a GPU: packing, driver calls, kernel source; cache, loader and their failures.

A `libcuda.so.1` of ours (tests/support/cuda_shim/fake_driver.cpp, with the kernels' own text inside) is found first by
the loader of a child process; there train/cuda/runtime.py compiles with the real NVRTC and launches on CPU tensors. The
child runs every `check_...` function below and reports; each is one test here. What only a GPU can show is in
test_cuda_gpu.py.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch

from tests.support.build_cache import made_once
from tests.support.cuda_build import COMMON_FLAGS, ROOT, SHIM, run_compiler, shim_texts, translation_unit, why_no_gxx
from tests.support.loss_rows import make_rows, oracle
from tests.support.tiny_run import random_batch, tiny_model
from train.cuda import launch as cuda_cross_entropy
from train.cuda import runtime as cuda_runtime
from train.cuda.launch import (
    DTYPES,
    ROW_KERNELS,
    SOURCE,
    STREAM_THREADS,
    LossBackendError,
    RowExtras,
    check_kernels,
    choose_kernel,
    choose_loss_backend,
    cuda_row_cross_entropy,
    cuda_scale_,
)
from train.cuda.runtime import CudaKernelError, KernelSource, cached_kernels, compile_kernels, load_kernels
from train.distributed import init_world, shard_model
from train.sft_config import SFTConfig
from train.sft_loop import train_step
from train.weighted_cross_entropy import linear_token_logprobs, linear_weighted_cross_entropy, weighted_cross_entropy

IMAGE = b"\x7fELF of no kernel"
SOURCE_OF_NOTHING = KernelSource("nothing.cu", b"// no kernel")


# ---------------------------------------------------------------------------------------------------------------------
# Checks that run in the child, behind the fake driver


@contextlib.contextmanager
def environment(**variables):
    """The C library sees os.environ too, so the fake driver obeys at once."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def launched(log: Path) -> list[str]:
    return log.read_text(encoding="ascii").splitlines() if log.exists() else []


def random_rows(dtype, n_rows, vocab_size, *, stride=None, seed=0, device="cpu"):
    """Logits (rows padded to `stride`), targets, weights with a zero, a negative and a fraction."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.full((n_rows, stride or vocab_size), float("nan"))
    block[:, :vocab_size] = 4 * torch.randn(n_rows, vocab_size, generator=generator)
    weights = torch.tensor([1.0, 0.0, -0.375, 9.0])[torch.arange(n_rows) % 4]
    target_ids = torch.randint(0, vocab_size, (n_rows,), generator=generator)
    return block.to(dtype).to(device)[:, :vocab_size], target_ids.to(device), weights.to(device)


def exact_results(logits_CV, target_ids_C, loss_weights_C):
    """fp64: losses, logsumexps (0 on rows of weight 0), gradient."""
    logits_CV = logits_CV.double()
    loss_weights_C = loss_weights_C.double()
    logsumexps_C = logits_CV.logsumexp(1)
    losses_C = loss_weights_C * (logsumexps_C - logits_CV.gather(1, target_ids_C[:, None]).squeeze(1))
    gradient_CV = logits_CV.softmax(1)
    gradient_CV[torch.arange(len(target_ids_C), device=target_ids_C.device), target_ids_C] -= 1
    return losses_C, logsumexps_C * (loss_weights_C != 0), gradient_CV * loss_weights_C[:, None]


def assert_rows_agree(logits_CV, target_ids_C, loss_weights_C, kernel=None, in_place=True, upstream=None):
    """One launch against fp64; loss to 1e-5, gradient to one rounding of the dtype beside fp32 arithmetic."""
    losses_C, logsumexps_C, exact_CV = exact_results(logits_CV, target_ids_C, loss_weights_C)
    factor = 1.0 if upstream is None else upstream.item()
    untouched = logits_CV.clone()
    gradient_CV = logits_CV
    if not in_place:
        gradient_CV = torch.empty_strided(
            logits_CV.shape, logits_CV.stride(), dtype=logits_CV.dtype, device=logits_CV.device
        )
    found_lse_C, bad_row = torch.full_like(loss_weights_C, 7.0), torch.zeros_like(target_ids_C[:1], dtype=torch.int32)
    found_C = cuda_row_cross_entropy(
        logits_CV,
        target_ids_C,
        loss_weights_C,
        gradient_CV,
        upstream=upstream,
        extras=RowExtras(found_lse_C, bad_row),
        kernel=kernel,
    )
    torch.testing.assert_close(found_C.double(), losses_C, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_lse_C.double(), logsumexps_C, rtol=1e-6, atol=1e-6)
    rounding = torch.finfo(logits_CV.dtype).eps / 2 if logits_CV.dtype != torch.float32 else 0
    smallest = torch.finfo(logits_CV.dtype).tiny
    assert (
        (gradient_CV.double() - factor * exact_CV).abs()
        <= rounding * (factor * exact_CV).abs() + 2e-6 * loss_weights_C[:, None].abs() * factor + smallest
    ).all()
    assert bad_row.item() == 0
    if not in_place:
        assert torch.equal(logits_CV, untouched)


def check_every_row_kernel_agrees_with_fp64():
    for dtype in DTYPES:
        for threads, vectors in ROW_KERNELS:
            per_block = threads * vectors * 16 // dtype.itemsize
            for vocab_size in {per_block, min(per_block - 5, 1003)}:
                kernel = (f"wce_row_{DTYPES[dtype]}_{threads}x{vectors}", threads)
                rows = random_rows(dtype, 2, vocab_size, stride=-(-vocab_size // 8) * 8)
                assert_rows_agree(*rows, kernel=kernel)


def check_every_stream_kernel_agrees_with_fp64():
    for dtype in DTYPES:
        for vocab_size in (1, 7, 1003, 4096):
            assert_rows_agree(*random_rows(dtype, 5, vocab_size), kernel=(f"wce_stream_{DTYPES[dtype]}", 512))


def check_every_scale_kernel():
    for dtype in DTYPES:
        for count in (1, 1000, 5003):
            values = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
            expected = (values.float() * 0.3).to(dtype)
            same = values.clone()
            cuda_scale_(same, torch.ones(()))
            cuda_scale_(values, torch.tensor(0.3))
            assert torch.equal(values, expected) and torch.equal(same.isnan(), values.isnan())


def check_chosen_kernels_and_the_streams_handle():
    log = Path(tempfile.mkdtemp()) / "launches"
    cuda_cross_entropy.device_and_stream = lambda tensor: (0, 4711)
    with environment(FAKE_DRIVER_LOG=str(log)):
        for dtype, vocab_size, stride in (
            (torch.bfloat16, 32016, None),
            (torch.bfloat16, 1003, None),
            (torch.bfloat16, 1003, 1008),
            (torch.float32, 70000, None),
        ):
            assert_rows_agree(
                *random_rows(dtype, 3, vocab_size, stride=stride), in_place=False, upstream=torch.tensor(0.125)
            )
    cuda_cross_entropy.device_and_stream = lambda tensor: (0, 0)
    assert launched(log) == [
        "wce_row_bf16_512x8 3 512 4711",
        "wce_stream_bf16 3 512 4711",
        "wce_row_bf16_128x1 3 128 4711",
        "wce_stream_fp32 3 512 4711",
    ], launched(log)


def check_rows_of_weight_0_are_not_read_and_bad_targets_are_named():
    for vocab_size in (1000, 1003):  # in bf16 a row kernel and a stream kernel
        logits_CV, target_ids_C, loss_weights_C = random_rows(torch.bfloat16, 6, vocab_size)
        logits_CV[1] = float("nan")
        target_ids_C[1], target_ids_C[3] = -100, vocab_size
        bad_row = torch.zeros(1, dtype=torch.int32)
        losses_C = cuda_row_cross_entropy(
            logits_CV, target_ids_C, loss_weights_C, logits_CV, extras=RowExtras(bad_row=bad_row)
        )
        assert losses_C.isnan().tolist() == [False, False, False, True, False, False] and losses_C[1] == 0
        assert not logits_CV[1].any() and not logits_CV[3].any() and logits_CV.isfinite().all()
        assert bad_row.item() == 4


def check_losses_through_autograd():
    """All public functions with backend="cuda" on bf16 and fp32 against fp64 arithmetic on the same numbers."""
    for dtype, loss_tolerance, tolerance in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 4e-3, 8e-3)):
        rows = make_rows(dtype, n_rows=28, dim=16, vocab_size=40)
        expected, *gradients = oracle(*rows)
        losses = {
            "piece": linear_weighted_cross_entropy(*rows, backend="cuda"),
            "chunks": linear_weighted_cross_entropy(*rows, chunk_rows=3, backend="cuda"),
            "logprobs": -(linear_token_logprobs(*rows[:3], 5, backend="cuda") * rows[3]).sum(),
        }
        for name, loss in losses.items():
            torch.testing.assert_close(loss.detach().double(), expected, rtol=loss_tolerance, atol=0)
            for found, exact in zip(torch.autograd.grad(loss * 0.3, rows[:2]), gradients, strict=True):
                error = (found.double() - 0.3 * exact).norm() / (0.3 * exact).norm()
                assert error < tolerance, (name, dtype, error)


def check_loss_of_given_logits_through_autograd():
    for dtype in DTYPES:
        logits_MV, target_ids_M, loss_weights_M = random_rows(dtype, 6, 40)
        logits_MV[1] = float("nan")  # weight 0
        logits_MV.requires_grad_()
        loss, plain = (
            weighted_cross_entropy(logits_MV, target_ids_M, loss_weights_M, backend=each) for each in ("cuda", "torch")
        )
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
        found, expected = (torch.autograd.grad(each * 0.3, logits_MV) for each in (loss, plain))
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def check_each_backward_of_chunks_happens_once():
    """The kernel scales the kept gradients in place: another backward of the same graph must not go unnoticed."""
    rows = make_rows(torch.float32)
    loss = linear_weighted_cross_entropy(*rows, chunk_rows=2, backend="cuda")
    (loss * 2).backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        raise AssertionError("a second backward was accepted")


def check_the_logits_of_any_vocabulary_begin_where_a_row_kernel_reads():
    """Logits that the loss makes itself: rows padded to 16 bytes, in chunks and in one piece, eager and compiled."""
    log = Path(tempfile.mkdtemp()) / "launches"
    for dtype, vocab_size in ((torch.bfloat16, 41), (torch.float16, 47), (torch.float32, 43)):
        rows = make_rows(dtype, n_rows=12, dim=16, vocab_size=vocab_size)
        index_K = rows[3].nonzero().squeeze(1)
        for chunk_rows in (None, 3):

            def loss_of(hidden_MD, head_weight_VD, rows=rows, index_K=index_K, chunk_rows=chunk_rows):
                return linear_weighted_cross_entropy(
                    hidden_MD, head_weight_VD, *rows[2:], trained_index_K=index_K, chunk_rows=chunk_rows, backend="cuda"
                )

            with environment(FAKE_DRIVER_LOG=str(log)):
                found = loss_of(*rows[:2])
                gradients = torch.autograd.grad(found, rows[:2])
                torch._dynamo.reset()
                compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)(*rows[:2])
            expected, *exact = oracle(*rows)
            torch.testing.assert_close(found.detach().double(), expected, rtol=5e-3, atol=0)
            assert torch.equal(found, compiled)
            for gradient, each in zip(gradients, exact, strict=True):
                assert (gradient.double() - each).norm() / each.norm() < 1e-2
    kernels = {line.split()[0] for line in launched(log)} - {f"wce_scale_{name}" for name in DTYPES.values()}
    assert kernels == {"wce_row_bf16_128x1", "wce_row_fp16_128x1", "wce_row_fp32_128x1"}, kernels


def check_no_rows_are_no_launch():
    log = Path(tempfile.mkdtemp()) / "launches"
    hidden_MD, head_weight_VD, target_ids_M, _ = make_rows(torch.float32, n_rows=3)
    with environment(FAKE_DRIVER_LOG=str(log)):
        loss = linear_weighted_cross_entropy(hidden_MD, head_weight_VD, target_ids_M, torch.zeros(3), backend="cuda")
        loss.backward()
    assert loss.item() == 0 and not hidden_MD.grad.any() and not head_weight_VD.grad.any() and not launched(log)


def check_train_steps_of_a_sharded_model():
    """FSDP in bf16 on one rank: the head is gathered when the loss runs, its gradient joins the reduction."""
    world = init_world("cpu")
    figures = {}
    for backend in ("cuda", "torch"):
        model = tiny_model()
        shard_model(model, world, dtype="bfloat16")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = [
            train_step(
                SFTConfig(loss_normalization="token_mean", max_grad_norm=1.0),
                model,
                optimizer,
                [random_batch(each), random_batch(each + 1)],
                world,
                step=1,
                loss_backend=backend,
            )
            for each in (0, 2)
        ]
        figures[backend] = torch.tensor([(each.loss, each.grad_norm) for each in steps])
    torch.testing.assert_close(figures["cuda"], figures["torch"], rtol=1e-3, atol=0)


def check_compiled_loss_launches_the_kernels():
    rows = make_rows(torch.float32)
    index_K = rows[3].nonzero().squeeze(1)
    log = Path(tempfile.mkdtemp()) / "launches"

    def loss_of(hidden_MD, head_weight_VD):
        return linear_weighted_cross_entropy(
            hidden_MD, head_weight_VD, *rows[2:], trained_index_K=index_K, chunk_rows=2, backend="cuda"
        )

    expected = torch.autograd.grad(loss_of(*rows[:2]), rows[:2])
    with environment(FAKE_DRIVER_LOG=str(log)):
        found = torch.autograd.grad(torch.compile(loss_of, backend="aot_eager", fullgraph=True)(*rows[:2]), rows[:2])
    assert all(map(torch.equal, found, expected))
    assert [line.split()[0] for line in launched(log)] == ["wce_row_fp32_128x1"] * 2 + ["wce_scale_fp32"] * 2


def check_wrong_parameters_are_noticed():
    """By their sizes before the launch; two of one size that change places, by the numbers that come out."""
    rows = random_rows(torch.float32, 3, 64)
    launch = cuda_cross_entropy.launch

    def with_changed(change):
        def changed_launch(module, name, *, parameters, **rest):
            module.functions.clear()  # parameters are compared when a kernel is looked up
            launch(module, name, parameters=change(list(parameters)), **rest)

        return changed_launch

    def swapped(parameters, first, second):
        parameters[first], parameters[second] = parameters[second], parameters[first]
        return parameters

    changes = {
        r"parameter 1 has offset and size \(8, 8\), expected \(8, 4\)": lambda each: [
            each[0],
            (cuda_runtime.INT32, each[1][1]),
            *each[2:],
        ],
        r"parameter 4 has offset and size \(32, 4\), expected \(32, 8\)": lambda each: [
            *each[:4],
            (cuda_runtime.INT64, each[4][1]),
            *each[5:],
        ],
        "found more parameters than the 10 expected": lambda each: each[:-1],
        "found fewer parameters than the 12 expected": lambda each: [*each, each[-1]],
    }
    try:
        for message, change in changes.items():
            cuda_cross_entropy.launch = with_changed(change)
            assert re.search(message, error_of(assert_rows_agree, *rows)), message
        for first, second in ((0, 2), (6, 8), (8, 9)):  # logits and gradient, weights and losses, losses and logsumexps
            cuda_cross_entropy.launch = with_changed(
                lambda each, first=first, second=second: swapped(each, first, second)
            )
            assert error_of(assert_rows_agree, *[each.clone() for each in rows], in_place=False), (first, second)
    finally:
        cuda_cross_entropy.launch = launch
        load_kernels(SOURCE, 0).functions.clear()


def check_a_driver_without_parameter_sizes_still_runs():
    from cuda.bindings import driver

    def missing(*_):
        raise RuntimeError('Function "cuFuncGetParamInfo" not found')

    asks, driver.cuFuncGetParamInfo = driver.cuFuncGetParamInfo, missing
    load_kernels(SOURCE, 0).functions.clear()
    assert_rows_agree(*random_rows(torch.float32, 3, 64))
    driver.cuFuncGetParamInfo = asks


def error_of(function, *arguments, **keywords) -> str:
    try:
        function(*arguments, **keywords)
    except (CudaKernelError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_failures_name_call_kernel_and_grid():
    rows = random_rows(torch.float32, 3, 64)
    failures = {
        "cuLaunchKernel:700": r"cuLaunchKernel \(wce_row_fp32_128x1, 3 blocks of 128 threads\): "
        "CUDA_ERROR_ILLEGAL_ADDRESS, a failure of the fake driver$",
        "cuCtxPushCurrent:201": "cuCtxPushCurrent: CUDA_ERROR_INVALID_CONTEXT",
    }
    for order, message in failures.items():
        with environment(FAKE_DRIVER_FAIL=order):
            assert re.search(message, error_of(assert_rows_agree, *rows)), error_of(assert_rows_agree, *rows)
    loading = {
        "cuInit:100": "cuInit: CUDA_ERROR_NO_DEVICE",
        "cuDeviceGet:101": "cuDeviceGet: CUDA_ERROR_INVALID_DEVICE",
        "cuDevicePrimaryCtxRetain:2": "cuDevicePrimaryCtxRetain: CUDA_ERROR_OUT_OF_MEMORY",
        "cuModuleLoadData:209": "cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU",
    }
    compile_kernels, cuda_runtime.compile_kernels = cuda_runtime.compile_kernels, lambda *_: IMAGE
    for order, message in loading.items():
        load_kernels.cache_clear()
        with environment(FAKE_DRIVER_FAIL=order, TL_TRAINING_KERNEL_CACHE="off"):
            assert re.search(message, error_of(load_kernels, SOURCE, 0)), order
    load_kernels.cache_clear()
    with environment(FAKE_DRIVER_FAIL="cuModuleLoadData:209:1", TL_TRAINING_KERNEL_CACHE="off"):
        load_kernels(SOURCE, 0)  # the second image is taken
    cuda_runtime.compile_kernels = compile_kernels
    load_kernels.cache_clear()
    assert re.search(
        "cuModuleGetFunction .wce_row_fp8.: CUDA_ERROR_NOT_FOUND",
        error_of(cuda_row_cross_entropy, *rows, kernel=("wce_row_fp8", 128)),
    )
    assert_rows_agree(*rows)


def check_an_image_that_the_driver_refuses_is_compiled_again():
    folder = Path(os.environ["TL_TRAINING_KERNEL_CACHE"])
    load_kernels(SOURCE, 0)
    (entry,) = folder.glob("*.cubin")
    whole = entry.read_bytes()
    bad = b"a whole file, no machine code"
    entry.write_bytes(hashlib.sha256(bad).digest() + bad)
    load_kernels.cache_clear()
    compile_kernels, cuda_runtime.compile_kernels = cuda_runtime.compile_kernels, lambda *_: whole[32:]
    try:
        load_kernels(SOURCE, 0)
    finally:
        cuda_runtime.compile_kernels = compile_kernels
    assert entry.read_bytes() == whole


def check_devices_of_other_generations():
    with environment(FAKE_DRIVER_CAPABILITY="5.0"):
        load_kernels.cache_clear()
        assert re.search(
            r"compiles for compute capability 7\.5 and later, found a device of 5\.0", error_of(load_kernels, SOURCE, 0)
        )
    compile_kernels = cuda_runtime.compile_kernels
    cuda_runtime.compile_kernels = lambda _, arch: f".target {arch}\0".encode()
    with environment(FAKE_DRIVER_CAPABILITY="9.9", TL_TRAINING_KERNEL_CACHE="off"):  # newer than NVRTC knows: PTX
        load_kernels.cache_clear()
        assert load_kernels(SOURCE, 0).architecture == "compute_90"
    cuda_runtime.compile_kernels = compile_kernels
    load_kernels.cache_clear()
    assert load_kernels(SOURCE, 0).architecture == "sm_90"


def check_the_check_at_the_start_of_a_run():
    cpu = torch.device("cpu")
    for dtype in DTYPES:
        check_kernels(cpu, dtype, 1000)
        check_kernels(cpu, dtype, 1003)
    right = cuda_cross_entropy.cuda_row_cross_entropy
    for change in (lambda losses: losses + 1e-3, lambda losses: losses * float("nan")):
        cuda_cross_entropy.cuda_row_cross_entropy = lambda *each, change=change: change(right(*each))
        assert "disagree on cpu for torch.float32" in error_of(check_kernels, cpu, torch.float32, 1000)
    cuda_cross_entropy.cuda_row_cross_entropy = lambda logits, targets, weights, gradient: right(
        logits, targets, weights
    )
    assert "disagree" in error_of(check_kernels, cpu, torch.float32, 1000)  # no gradient came back
    cuda_cross_entropy.cuda_row_cross_entropy = right


CHECKS = sorted(name for name in globals() if name.startswith("check_") and name != "check_kernels")


def run_checks() -> dict[str, str]:
    """Name -> traceback, empty if it passed."""
    cuda_cross_entropy.device_and_stream = lambda tensor: (0, 0)  # the only change: CPU tensors are taken
    results = {}
    for name in CHECKS:
        try:
            globals()[name]()
            results[name] = ""
        except Exception:  # noqa: BLE001 - all of it goes to the test's report
            results[name] = traceback.format_exc()
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The child


def why_no_child() -> str:
    try:
        nvrtc_works = bool(cuda_runtime.nvrtc_version())
    except CudaKernelError as error:
        return str(error)
    return why_no_gxx() or ("" if nvrtc_works and sys.platform == "linux" else "needs Linux")


@pytest.fixture(scope="session")
def fake_driver() -> Path:
    """Folder with libcuda.so.1."""
    if reason := why_no_child():
        pytest.skip(reason)
    text = SOURCE.read_text(encoding="utf-8")

    def make(folder: Path) -> None:
        flags = [*COMMON_FLAGS, "-O0"]  # rows are short: compiling costs more than running
        names = translation_unit(text, folder, flags)
        with open(folder / "unit.cpp", "a", encoding="utf-8") as unit:
            unit.write('#include "fake_driver.cpp"\n' + "".join(f"FAKE_KERNEL({name})\n" for name in names))
        library = str(folder / "libcuda.so.1")
        run_compiler(["g++", *flags, f"-I{SHIM}", "-shared", str(folder / "unit.cpp"), "-o", library])

    return made_once("driver", [text, "-O0", *shim_texts()], make)


def run_child(code: str, driver: Path, cache: Path, **variables: str) -> str:
    """Last line that a Python process prints in which the fake driver is the machine's."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={
            **os.environ,
            "LD_LIBRARY_PATH": str(driver),
            "TL_TRAINING_KERNEL_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
            **variables,
        },
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    folder.chmod(0o700)
    return folder


@pytest.fixture(scope="session")
def results(fake_driver, cache) -> dict[str, str]:
    code = "import json; from tests.train.test_cuda_launch import run_checks; print(json.dumps(run_checks()))"
    return json.loads(run_child(code, fake_driver, cache))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_in_a_process_with_the_fake_driver(results, name):
    assert not results[name], results[name]


@pytest.mark.very_slow  # the bindings look for a function once per process; the check of the same name only pretends
def test_a_driver_without_parameter_sizes_still_runs(fake_driver, cache, results):
    code = """
from tests.train import test_cuda_launch as t
t.cuda_cross_entropy.device_and_stream = lambda tensor: (0, 0)
t.assert_rows_agree(*t.random_rows(t.torch.float32, 3, 64))
print("agreed")
"""
    assert run_child(code, fake_driver, cache, FAKE_DRIVER_LACKS="cuFuncGetParamInfo") == "agreed"


# ---------------------------------------------------------------------------------------------------------------------
# Choice of a kernel


def test_table_of_kernels_is_that_of_the_source():
    head = SOURCE.read_text(encoding="utf-8").partition("#ifndef WCE_HOST")[0]
    table = [(int(threads), int(vectors)) for threads, vectors in re.findall(r"wce_row_<dtype>_(\d+)x(\d+)", head)]
    assert tuple(table) == ROW_KERNELS
    assert re.search(rf"wce_stream_<dtype> +{STREAM_THREADS} ", head)


def test_smallest_kernel_that_holds_the_row():
    for dtype in DTYPES:
        for threads, vectors in ROW_KERNELS:
            most = threads * vectors * 16 // dtype.itemsize
            rows = torch.empty(2, most, dtype=dtype)
            assert choose_kernel(dtype, most, rows) == (f"wce_row_{DTYPES[dtype]}_{threads}x{vectors}", threads)
        too_long = torch.empty(1, most + 8, dtype=dtype)
        assert choose_kernel(dtype, most + 8, too_long) == (f"wce_stream_{DTYPES[dtype]}", 512)


def test_rows_off_16_bytes_go_to_the_streaming_kernel():
    memory = torch.empty(4 * 1008 + 8, dtype=torch.bfloat16)
    aligned, shifted = memory[:2016].view(2, 1008), memory[1:2017].view(2, 1008)
    odd = memory[:2006].view(2, 1003)
    assert choose_kernel(torch.bfloat16, 1003, aligned[:, :1003])[0] == "wce_row_bf16_128x1"
    for matrices in ((shifted,), (odd,), (aligned, odd), (aligned, shifted)):
        assert choose_kernel(torch.bfloat16, 1003, *matrices)[0] == "wce_stream_bf16"


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, lambda each: each.double(), "logits"),
        (0, lambda each: each.T, "logits"),
        (0, lambda each: each[0], "logits"),
        (1, lambda each: each.int(), "target ids"),
        (1, lambda each: each[:2], "target ids"),
        (2, lambda each: each.double(), "loss weights"),
        (2, lambda each: each.repeat(2)[::2], "loss weights"),
        (3, lambda each: each.half(), "gradient"),
        (3, lambda each: each[:2], "gradient"),
    ],
)
def test_tensors_that_a_kernel_cannot_take_are_refused(place, wrong, message):
    arguments = [*random_rows(torch.float32, 3, 8), torch.empty(3, 8)]
    arguments[place] = wrong(arguments[place])
    with pytest.raises(ValueError, match=message):
        cuda_row_cross_entropy(*arguments)


def test_upstream_logsumexps_bad_row_and_factor_are_checked_too():
    rows = random_rows(torch.float32, 3, 8)
    with pytest.raises(ValueError, match="upstream"):
        cuda_row_cross_entropy(*rows, upstream=torch.ones(2))
    with pytest.raises(ValueError, match="logsumexps"):
        cuda_row_cross_entropy(*rows, extras=RowExtras(logsumexps_C=torch.ones(2)))
    with pytest.raises(ValueError, match="bad_row"):
        cuda_row_cross_entropy(*rows, extras=RowExtras(bad_row=torch.zeros(1)))
    with pytest.raises(ValueError, match="factor"):
        cuda_scale_(torch.ones(3), torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous"):
        cuda_scale_(torch.ones(3, 2).T, torch.ones(()))


# ---------------------------------------------------------------------------------------------------------------------
# Cache


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    """Architectures that were compiled; NVRTC is not asked."""
    seen = []

    def compile_nothing(source, architecture):
        seen.append(architecture)
        return IMAGE + architecture.encode()

    monkeypatch.setattr(cuda_runtime, "compile_kernels", compile_nothing)
    monkeypatch.setattr(cuda_runtime, "nvrtc_version", lambda: (13, 0))
    return seen


def test_second_process_reads_what_the_first_compiled(tmp_path, monkeypatch, compilations):
    folder = tmp_path / "new" / "kernels"
    monkeypatch.setenv("TL_TRAINING_KERNEL_CACHE", str(folder))
    assert cached_kernels(SOURCE_OF_NOTHING, "sm_90") == cached_kernels(SOURCE_OF_NOTHING, "sm_90") == IMAGE + b"sm_90"
    assert compilations == ["sm_90"] and folder.stat().st_mode & 0o777 == 0o700
    (entry,) = folder.iterdir()
    assert entry.suffix == ".cubin"
    assert entry.read_bytes() == hashlib.sha256(IMAGE + b"sm_90").digest() + IMAGE + b"sm_90"


def test_each_ingredient_has_its_own_entry(tmp_path, monkeypatch, compilations):
    monkeypatch.setenv("TL_TRAINING_KERNEL_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)
    cached_kernels(SOURCE_OF_NOTHING, "sm_90")
    cached_kernels(SOURCE_OF_NOTHING, "sm_80")
    cached_kernels(SOURCE_OF_NOTHING, "compute_90")
    cached_kernels(KernelSource("nothing.cu", b"// no kernel "), "sm_90")
    monkeypatch.setattr(cuda_runtime, "nvrtc_version", lambda: (13, 1))
    cached_kernels(SOURCE_OF_NOTHING, "sm_90")
    assert compilations == ["sm_90", "sm_80", "compute_90", "sm_90", "sm_90"]
    assert len(list(tmp_path.glob("*.cubin"))) == 4 and len(list(tmp_path.glob("*.ptx"))) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: b"",
        lambda content: content[:40] + b"x" + content[41:],
        lambda content: content[:32],
    ],
)
def test_damaged_entry_is_compiled_anew(tmp_path, monkeypatch, compilations, damage):
    monkeypatch.setenv("TL_TRAINING_KERNEL_CACHE", str(tmp_path / "kernels"))
    cached_kernels(SOURCE_OF_NOTHING, "sm_90")
    (entry,) = (tmp_path / "kernels").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert cached_kernels(SOURCE_OF_NOTHING, "sm_90") == IMAGE + b"sm_90"
    assert len(compilations) == 2 and entry.read_bytes() == whole


def test_cache_switched_off_or_impossible_only_costs_time(tmp_path, monkeypatch, compilations):
    file = tmp_path / "file"
    file.touch()
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)  # anyone could put a kernel in there
    for setting in ("off", str(file), str(file / "below"), str(shared)):
        monkeypatch.setenv("TL_TRAINING_KERNEL_CACHE", setting)
        assert cuda_runtime.cache_folder() is None
        assert cached_kernels(SOURCE_OF_NOTHING, "sm_90") == IMAGE + b"sm_90"
    assert len(compilations) == 4 and not list(shared.iterdir())


def test_folder_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch, compilations):
    monkeypatch.setenv("TL_TRAINING_KERNEL_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(cuda_runtime.tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(OSError("no space")))
    for _ in range(2):
        assert cached_kernels(SOURCE_OF_NOTHING, "sm_90") == IMAGE + b"sm_90"
    assert len(compilations) == 2 and not list((tmp_path / "kernels").iterdir())


def test_default_folder_is_below_the_home(tmp_path, monkeypatch):
    monkeypatch.delenv("TL_TRAINING_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cuda_runtime.cache_folder() == tmp_path / ".cache" / "tl_training" / "kernels"


# ---------------------------------------------------------------------------------------------------------------------
# What is missing


@pytest.mark.slow
def test_cpu_needs_no_bindings():
    """torch itself imports them where they are installed; nvrtc is ours alone."""
    code = """
import sys
sys.modules["cuda"] = sys.modules["cuda.bindings.nvrtc"] = None
import torch
from train.cuda.launch import choose_loss_backend
from train.weighted_cross_entropy import linear_weighted_cross_entropy
choose_loss_backend("auto", torch.device("cpu"))
hidden = torch.ones(2, 3, requires_grad=True)
linear_weighted_cross_entropy(hidden, torch.ones(4, 3), torch.tensor([1, 2]), torch.ones(2)).backward()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_missing_bindings_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    for call in (cuda_runtime.nvrtc_version, lambda: cuda_runtime.device_capability(0)):
        with pytest.raises(CudaKernelError, match="cuda-bindings is not installed, see requirements-cuda.txt"):
            call()


def test_missing_nvrtc_is_named(monkeypatch):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

    def not_found():
        raise RuntimeError("Failure finding\n  libnvrtc.so")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", not_found)
    with pytest.raises(CudaKernelError, match=r"^NVRTC is not usable.*\(Failure finding libnvrtc.so\)$"):
        cuda_runtime.nvrtc_version()


def test_missing_driver_is_named():
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    with pytest.raises(CudaKernelError, match="^the CUDA driver is not usable|cuInit: CUDA_ERROR") as caught:
        cuda_runtime.device_capability(0)
    assert "\n" not in str(caught.value)


def test_missing_source_is_named(tmp_path):
    with pytest.raises(CudaKernelError, match="^gone.cu: cannot read the kernel source: No such file or directory$"):
        KernelSource.read(tmp_path / "gone.cu")


def test_virtual_architecture_gives_ptx_text_for_the_driver():
    if reason := why_no_child():
        pytest.skip(reason)
    source = KernelSource("one.cu", b'extern "C" __global__ void one(float* x) { x[0] = 1.f; }')
    image = compile_kernels(source, "compute_90")
    assert b".target sm_90" in image and b".entry one(" in image and image.endswith(b"\0")
    assert compile_kernels(source, "sm_90")[:4] == b"\x7fELF"


def test_compile_error_is_one_line_and_a_file(tmp_path, monkeypatch):
    if reason := why_no_child():
        pytest.skip(reason)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    broken = KernelSource("broken.cu", b'extern "C" __global__ void k(float* x) {\n  x[0] = lost;\n  also_lost();\n}\n')
    with pytest.raises(CudaKernelError) as caught:
        compile_kernels(broken, "sm_90")
    match = re.fullmatch(
        r'NVRTC cannot compile broken.cu for sm_90: broken.cu\(2\): error: identifier "lost" is '
        r"undefined \(whole log: (.*)\)",
        str(caught.value),
    )
    assert match and "also_lost" in Path(match[1]).read_text(encoding="utf-8")


def test_architecture_of_a_device(monkeypatch):
    monkeypatch.setattr(cuda_runtime, "_nvrtc", lambda name: ([75, 80, 90, 120],) if "Archs" in name else (13, 0))
    assert [cuda_runtime.choose_architecture(each) for each in ((8, 0), (9, 0), (12, 0))] == [
        "sm_80",
        "sm_90",
        "sm_120",
    ]
    assert [cuda_runtime.choose_architecture(each) for each in ((8, 9), (10, 3), (13, 0))] == [
        "compute_80",
        "compute_90",
        "compute_120",
    ]
    with pytest.raises(CudaKernelError, match=r"NVRTC 13.0 .* capability 7.5 and later, found a device of 7.0"):
        cuda_runtime.choose_architecture((7, 0))


def test_fallback_states_its_reason_and_cuda_refuses(monkeypatch):
    device = torch.device("cuda")

    def obstacle(*_):
        raise CudaKernelError("cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU")

    monkeypatch.setattr(cuda_cross_entropy, "check_kernels", obstacle)
    assert choose_loss_backend("auto", device) == ("torch", "cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU")
    with pytest.raises(LossBackendError, match="found cuda, expected auto or torch: cuModuleLoadData: CUDA_ERROR_NO"):
        choose_loss_backend("cuda", device)
    monkeypatch.setattr(cuda_cross_entropy, "check_kernels", lambda *_: None)
    assert choose_loss_backend("auto", device) == (
        "cuda",
        "kernels of weighted_cross_entropy.cu, checked against PyTorch on cuda",
    )


def test_the_check_tries_the_vocabulary_of_the_model(monkeypatch):
    tried = []
    monkeypatch.setattr(cuda_cross_entropy, "check_kernels", lambda _, dtype, n_ids: tried.append((dtype, n_ids)))
    assert choose_loss_backend("auto", torch.device("cuda"), 32016)[0] == "cuda"
    assert tried == [(dtype, n_ids) for dtype in DTYPES for n_ids in (1000, 1003, 32016)]


def test_a_kernel_that_breaks_the_device_ends_the_run(monkeypatch):
    def fault(*_):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(cuda_cross_entropy, "check_kernels", fault)
    with pytest.raises(LossBackendError, match=r"start again with torch \(CUDA error: an illegal memory access was"):
        choose_loss_backend("auto", torch.device("cuda"))
