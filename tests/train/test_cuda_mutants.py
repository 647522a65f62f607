"""The CUDA kernels under the sanitizers, and broken copies of them that each have to be caught by a named tool.

A check that has never failed proves nothing. Every mutant below is the kernels' text with one fault put in; the same
launch of the text as it is must pass under the same tool. Tools: `value` (float64 loop of run_checks.cpp), `bits`
(equal bits in all thread orders), `shim` (divergent barriers), `asan`, `ubsan`, `tsan` (g++ 12; the run time of newer
compilers can miss races between more than 256 fibers without a word, so a build of every race stays here).

All mutants of a tool are one program. A verdict holds as long as the kernels, the shim, this file and the compiler are
the same: the next run skips what has passed and says so; `--fresh` runs everything again.
"""

import functools
import hashlib
import math
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.support import cuda_build
from tests.support.build_cache import made_once
from tests.support.cuda_build import (
    ORDERS,
    build_program,
    emulated_library,
    keep_kernels,
    launch,
    shim_texts,
    why_no_gxx,
    why_no_sanitizer,
)
from train.cuda.launch import SOURCE

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_no_gxx() != "", reason=why_no_gxx() or "g++ is there")]

VARIANT_OF_TOOL = {"value": "quick", "bits": "quick", "shim": "quick", "asan": "asan", "ubsan": "asan", "tsan": "tsan"}
MESSAGES = {  # what a tool prints when it has found something
    "value": r"^value: ",
    "shim": r"^shim: ",
    "asan": r"ERROR: AddressSanitizer",
    "ubsan": r"runtime error: ",
    "tsan": r"WARNING: ThreadSanitizer: data race",
}


class Case(NamedTuple):
    """Arguments of run_checks.cpp: strides and offset in elements."""

    kernel: str
    threads: int
    vocabulary_size: int
    stride: int
    offset: int = 0
    place: str = "in"


ROW = Case("wce_row_bf16_128x2", 128, 1995, 2000)  # 249 vectors for 256 places, 3 single logits behind them
FP32 = Case("wce_row_fp32_256x4", 256, 4096, 4096, place="out")
ROW_OUT = ROW._replace(place="out")
STREAM = Case("wce_stream_bf16", 512, 4099, 4099, offset=1)
STREAM_OUT = STREAM._replace(place="out")


class Mutant(NamedTuple):
    name: str
    replacements: tuple[tuple[str, str], ...]
    tool: str
    message: str  # what the tool has to say, as a regular expression
    case: Case = ROW
    every_order: bool = True  # False: at least one of the three orders shows it


READ_OF_TARGET = "const float target_logit = owns_target ? Dtype::load(row.logits[row.target]) : 0.f;"
NO_BARRIER_1 = (("__syncthreads();  // barrier 1", "// barrier 1"),)
NO_BARRIER_2 = (("__syncthreads();  // barrier 2", "// barrier 2"),)
ONE_ARRAY = (("sum = block_sum<THREADS>(sum, warp_sums);", "sum = block_sum<THREADS>(sum, warp_maxima);"),)
WRONG_OWNER = (("const bool owns_target = threadIdx.x == target_owner;", "const bool owns_target = threadIdx.x == 0;"),)
LATE_READ = (
    (READ_OF_TARGET, ""),
    ("finish_row(call, row, target_logit,", "finish_row(call, row, Dtype::load(row.logits[row.target]),"),
)
LATE_READ_BY_ANOTHER = (*WRONG_OWNER, *LATE_READ)
SHARED_RACE = r"data race[\s\S]*(block_maximum|block_sum)"
ROW_RACE = r"data race[\s\S]*(row_kernel|stream_kernel)"
MUTANTS = (
    # Barriers.
    Mutant("no barrier 1, by race", NO_BARRIER_1, "tsan", SHARED_RACE),
    Mutant("no barrier 1, by value", NO_BARRIER_1, "value", "value: loss of row"),
    Mutant("no barrier 2, by race", NO_BARRIER_2, "tsan", SHARED_RACE),
    Mutant("no barrier 2, by value", NO_BARRIER_2, "value", "nan, expected"),
    Mutant("no barrier 1 in the stream kernel", NO_BARRIER_1, "value", "value: loss of row", STREAM),
    Mutant("maxima and sums in one array", ONE_ARRAY, "tsan", SHARED_RACE),
    Mutant(
        "barrier for half of the block",
        (("__syncthreads();  // barrier 2", "if (threadIdx.x < 64) __syncthreads();  // barrier 2"),),
        "shim",
        r"waits at __syncthreads in line \d+, thread \d+ has returned",
    ),
    Mutant(
        "return before a barrier",
        (("    // 3. Sum of", "    if (threadIdx.x >= 96) return;\n    // 3. Sum of"),),
        "shim",
        r"waits at __syncthreads in line \d+, thread \d+ has returned",
    ),
    Mutant(
        "barrier in two branches",
        (
            (
                "__syncthreads();  // barrier 1",
                "if (threadIdx.x / 32 == 1) __syncthreads();\nelse\n__syncthreads();  // barrier 1",
            ),
        ),
        "shim",
        r"__syncthreads in line \d+ by thread \d+, in line \d+ by thread \d+",
    ),
    # Shared memory and rows: one place too far.
    Mutant(
        "shared index + 1, written",
        (("warp_sums[threadIdx.x / 32] =", "warp_sums[threadIdx.x / 32 + 1] ="),),
        "asan",
        "use-after-poison",
    ),
    Mutant(
        "shared index + 1, read",
        (("warp_maxima[threadIdx.x % (THREADS / 32)]", "warp_maxima[threadIdx.x % (THREADS / 32) + 1]"),),
        "asan",
        "use-after-poison",
    ),
    Mutant(
        "end of the row taken for a whole vector",
        (
            (
                "n_vectors = call.vocabulary_size / PER_VECTOR",
                "n_vectors = (call.vocabulary_size + PER_VECTOR - 1) / PER_VECTOR",
            ),
        ),
        "asan",
        "use-after-poison",
    ),
    Mutant(
        "row of weight 0 is read",
        (
            (
                "row.weight != 0.f && target >= 0 && target < call.vocabulary_size",
                "row.weight == 0.f || (target >= 0 && target < call.vocabulary_size)",
            ),
        ),
        "asan",
        "use-after-poison",
        ROW_OUT,
    ),
    Mutant("rows misaligned for vectors", (), "ubsan", "misaligned address", ROW._replace(stride=1995)),
    Mutant("first row misaligned for vectors", (), "ubsan", "misaligned address", ROW._replace(offset=1)),
    # Strides.
    Mutant(
        "logits stride too long",
        (("i * call.logits_stride", "i * (call.logits_stride + 8)"),),
        "asan",
        "use-after-poison|heap-buffer-overflow",
    ),
    Mutant(
        "rows without their padding",
        (("i * call.logits_stride", "i * call.vocabulary_size"),),
        "ubsan",
        "misaligned address",
    ),
    Mutant(
        "rows without their padding, by value",
        (("i * call.logits_stride", "i * call.vocabulary_size"),),
        "value",
        "value: ",
        STREAM._replace(stride=4104, place="out"),
    ),
    Mutant(
        "gradient rows overlap by one vector",
        (("i * call.gradient_stride", "i * (call.gradient_stride - 8)"),),
        "tsan",
        ROW_RACE,
        ROW_OUT._replace(vocabulary_size=2000),
    ),
    Mutant(
        "32-bit offsets",
        (
            ("const long long i = blockIdx.x;", "const int i = blockIdx.x;"),
            ("i * call.logits_stride", "i * (int)call.logits_stride"),
        ),
        "ubsan",
        "signed integer overflow",
        ROW._replace(stride=2**30),
    ),
    # The target's column.
    Mutant("target's logit read after the stores", LATE_READ, "value", "value: loss of row 0"),
    Mutant("the same in the stream kernel", LATE_READ, "value", "value: loss of row 0", STREAM),
    Mutant("target's logit read late by another thread", LATE_READ_BY_ANOTHER, "tsan", ROW_RACE),
    Mutant("target's column written by another thread", WRONG_OWNER, "tsan", ROW_RACE),
    Mutant("the same by value", WRONG_OWNER, "value", "value: gradient", every_order=False),
    # Formulas and rounding.
    Mutant(
        "sum in the order of arrival",
        (
            (
                "if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;",
                "if (threadIdx.x == 0) *warp_sums = 0; __syncthreads(); "
                "if (threadIdx.x % 32 == 0) *warp_sums += value;",
            ),
            ("value = warp_sums[threadIdx.x % (THREADS / 32)];", "return *warp_sums;"),
        ),
        "bits",
        "",
        FP32,
    ),
    Mutant(
        "softmax without the one-hot",
        (("fmaf(row.factor / sum, term, -row.factor)", "row.factor / sum * term"),),
        "value",
        "value: gradient of row 0, column 0",
    ),
    Mutant("upstream forgotten", (("(call.upstream ? *call.upstream : 1.f)", "1.f"),), "value", "value: gradient"),
    Mutant("upstream in the loss", (("row.weight * loss", "row.factor * loss"),), "value", "value: loss"),
    Mutant(
        "last logits not in the sum",
        (("float sum = exp2_approximate(score_of(tail, shift));", "float sum = 0.f;"),),
        "value",
        "value: ",
    ),
    Mutant("logsumexp without the maximum", (("fmaf(LN_2, shift, log_sum)", "log_sum"),), "value", "value: logsumexp"),
)


# ---------------------------------------------------------------------------------------------------------------------
# Texts and programs


def mutate(text: str, replacements) -> str:
    """Every occurrence; one that is not there is an error, or the mutant would be the text itself."""
    for old, new in replacements:
        assert old in text, f"the kernels' text has no {old!r} any more: this mutant changes nothing"
        text = text.replace(old, new)
    return text


CLEAN_CASES = (  # the text as it is, under every tool
    ROW,
    ROW_OUT,
    ROW._replace(place="none"),
    Case("wce_row_fp16_128x1", 128, 1003, 1008),
    FP32,
    STREAM,
    STREAM_OUT,
    Case("wce_stream_fp32", 512, 31, 33, offset=3),
)
TSAN_CASES = (ROW, ROW_OUT, CLEAN_CASES[3], STREAM)  # a fiber costs ThreadSanitizer a millisecond
MISALIGNED = [mutant for mutant in MUTANTS if not mutant.replacements]


def label_of(mutant: Mutant | None) -> str:
    """Namespace of the mutant's text in the program; that of the text as it is for None and for misaligned rows."""
    return f"mutant_{MUTANTS.index(mutant)}" if mutant and mutant.replacements else "as_it_is"


@functools.cache
def program(variant: str) -> Path:
    """One program with the text as it is and all mutants that this build of the compiler has to show."""
    whole = SOURCE.read_text(encoding="utf-8")
    clean_kernels = sorted({case.kernel for case in CLEAN_CASES})
    texts, kernels = {"as_it_is": keep_kernels(whole, set(clean_kernels))}, {"as_it_is": clean_kernels}
    for mutant in MUTANTS:
        if mutant.replacements and VARIANT_OF_TOOL[mutant.tool] == variant:
            kernels[label_of(mutant)] = [mutant.case.kernel]
            texts[label_of(mutant)] = mutate(keep_kernels(whole, {mutant.case.kernel}), mutant.replacements)
    return build_program(texts, kernels, variant)


@pytest.fixture(autouse=True)
def remember(request):
    """Skips a test that has passed with these sources, this compiler and this processor; call it when it passes."""
    sources = [SOURCE.read_text(encoding="utf-8"), *shim_texts(), Path(__file__).read_text(encoding="utf-8")]
    sources.append(Path(cuda_build.__file__).read_text(encoding="utf-8"))
    verdicts = made_once("mutants", sources, lambda folder: None)
    verdict = verdicts / hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
    if verdict.exists():
        pytest.skip("mutants: verdict of an earlier run with the same sources, caught; --fresh runs them again")
    return verdict.touch


def run_case(mutant: Mutant | None, variant: str, case: Case, order: str) -> tuple[int, str]:
    """Exit code and all that was printed."""
    if why_no_sanitizer(variant):
        pytest.skip(why_no_sanitizer(variant))
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=0", "TSAN_OPTIONS": "exitcode=66"}
    kernel, *others = map(str, case)
    result = subprocess.run(
        [program(variant), f"{label_of(mutant)}:{kernel}", *others, str(ORDERS[order])],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **options},
        check=False,
    )
    if result.returncode == 2 and "mmap: " in result.stderr:
        pytest.skip(f"no 8 GiB of address space for far rows: {result.stderr.strip()}")
    return result.returncode, result.stdout + result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Tests


@pytest.mark.parametrize("variant", ["quick", "asan", "tsan"])
def test_the_text_as_it_is_passes_under_every_tool(variant, remember):
    for number, case in enumerate(TSAN_CASES if variant == "tsan" else CLEAN_CASES):
        orders = ORDERS if variant == "quick" else [list(ORDERS)[number % 3]]
        results = [run_case(None, variant, case, order) for order in orders]
        for code, said in results:
            assert code == 0, f"{case}: {said[:2000]}"
            assert not any(re.search(message, said, re.MULTILINE) for message in MESSAGES.values()), said[:2000]
        assert len({re.search(r"^ok (\w+)$", said, re.MULTILINE)[1] for _, said in results}) == 1
    remember()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.tool}: {mutant.name}")
def test_mutant_is_caught(mutant, remember):
    variant = VARIANT_OF_TOOL[mutant.tool]
    orders = ORDERS if mutant.tool in ("value", "bits", "shim") else ["random"]
    results = [run_case(mutant, variant, mutant.case, order) for order in orders]
    if mutant.tool == "bits":  # right within every tolerance, and yet not the same
        assert all(code == 0 for code, _ in results)
        assert len({said for _, said in results}) > 1
        remember()
        return
    caught = [
        code != 0
        and re.search(MESSAGES[mutant.tool], said, re.MULTILINE) is not None
        and re.search(mutant.message, said) is not None
        for code, said in results
    ]
    shown = "\n".join(said[:1500] for _, said in results)
    assert all(caught) if mutant.every_order else any(caught), shown
    if not mutant.every_order:  # why one order is not enough
        assert not all(caught)
    remember()


def test_every_tool_has_caught_something():
    assert {mutant.tool for mutant in MUTANTS} == set(VARIANT_OF_TOOL)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert MISALIGNED and all(mutant.tool == "ubsan" for mutant in MISALIGNED)


def test_a_replacement_that_finds_nothing_is_an_error():
    with pytest.raises(AssertionError, match="this mutant changes nothing"):
        mutate("abc", (("x", "y"),))


def test_a_rounded_product_costs_the_digits_of_large_logits(remember):
    # Logits 1e4 and 1e4 + 1, target the first: ln(1 + e) = 1.313261688. The text keeps 7 digits with one fused
    # multiply-add (tests/train/test_cuda_kernels.py); product and difference, rounded one after the other, keep 3.
    text = keep_kernels(SOURCE.read_text(encoding="utf-8"), {"wce_row_fp32_128x1"})
    separate = mutate(text, (("return fmaf(logit, LOG2_E, -shift);", "return logit * LOG2_E - shift;"),))
    errors = []
    for source in (text, separate):
        logits = torch.tensor([[1e4, 1e4 + 1, -1e4, 0.0]])
        loss = torch.zeros(1)
        launch(
            emulated_library(source, "quick"),
            "wce_row_fp32_128x1",
            grid=1,
            block=128,
            arguments=[logits, 4, None, 0, 4, torch.tensor([0]), torch.tensor([1.0]), None, loss, None, None],
        )
        errors.append(abs(loss.item() - math.log(1 + math.e)))
    assert errors[0] < 2e-6 and errors[1] > 1e-4
    remember()
