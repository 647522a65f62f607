"""The teaching ladder's kernels, run on the CPU: right answers, and the traffic its page states.

Shape legend: M rows, V vocabulary.
"""

import math
import re
import shutil

import pytest
import torch

from benchmarks.cuda_kernel_ladder.device_code import ToolMissing
from benchmarks.cuda_kernel_ladder.run import (
    FOLDER,
    STEPS,
    build,
    expected,
    machine_code_rows,
    make_rows,
    run_step,
    traffic_rows,
)

README = FOLDER / "README.md"
ORDERS = (0, 1, 2)  # of threads: ascending, descending, random
STEP = {step.name: step for step in STEPS}
each_step = pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)


def build_or_skip(folder, *arguments, **options):
    try:
        return build(folder, *arguments, **options)
    except ToolMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_or_skip(tmp_path_factory.mktemp("ladder"))


# -------------------------------------------------------------------------------------------------------- right answers
@each_step
def test_row_worked_by_hand(library, step):
    """Exponentials 1, 2, 5, 8 have sum 16; weight 16 and target 2: loss 16 ln(16 / 5), gradient (1, 2, 5 - 16, 8)."""
    logits_MV, *_ = make_rows(1, 4)
    logits_MV.copy_(torch.tensor([[1.0, 2.0, 5.0, 8.0]]).log())
    losses_M, _, _ = run_step(step, library, logits_MV, torch.tensor([2]), torch.tensor([16.0]))
    assert losses_M.item() == pytest.approx(16 * math.log(16 / 5), rel=1e-6)
    assert logits_MV.tolist()[0] == pytest.approx([1, 2, -11, 8], rel=1e-6)


@each_step
@pytest.mark.parametrize("vocabulary_size", [1, 7, 32, 1003, 4096])
def test_rows_in_three_orders(library, step, vocabulary_size):
    """Against fp64; rows of weight 0 hold NaN; no order of threads changes a bit."""
    if step.name == "registers":
        vocabulary_size = -(-vocabulary_size // 4) * 4  # its contract
    results = []
    for order in ORDERS:
        logits_MV, target_ids_M, loss_weights_M = make_rows(5, vocabulary_size)
        target_ids_M[:2] = torch.tensor([0, vocabulary_size - 1])
        target_ids_M[3] = logits_MV[3].argmax()
        loss_weights_M[2], loss_weights_M[4] = 0, -3
        losses_M, gradient_MV = expected(logits_MV, target_ids_M, loss_weights_M)
        logits_MV[2] = float("nan")
        got_M, loads, stores = run_step(step, library, logits_MV, target_ids_M, loss_weights_M, order)
        torch.testing.assert_close(got_M.double(), losses_M, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(logits_MV.double(), gradient_MV, rtol=1e-4, atol=1e-6)
        results.append((got_M, logits_MV.clone(), loads.bytes, stores.bytes))
    for got_M, gradient_MV, *traffic in results[1:]:
        assert torch.equal(got_M, results[0][0])
        assert torch.equal(gradient_MV, results[0][1])
        assert tuple(traffic) == results[0][2:]


@each_step
def test_large_logits_and_minus_infinity(library, step):
    """The maximum goes first: exp(1e4) is inf in fp32, and -1e4 everywhere would give ln 0."""
    logits_MV, target_ids_M, loss_weights_M = make_rows(2, 8)
    logits_MV.copy_(torch.tensor([[1e4, 1e4 - 1, 0, 0, 0, 0, 0, float("-inf")], [-1e4] * 8]))
    target_ids_M.copy_(torch.tensor([1, 3]))
    losses_M, gradient_MV = expected(logits_MV, target_ids_M, loss_weights_M)
    got_M, _, _ = run_step(step, library, logits_MV, target_ids_M, loss_weights_M)
    torch.testing.assert_close(got_M.double(), losses_M, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits_MV.double(), gradient_MV, rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------------------------------------------- traffic
@each_step
@pytest.mark.parametrize("vocabulary_size", [1000, 4096])
def test_bytes_are_the_passes_times_the_row(library, step, vocabulary_size):
    rows = 3
    loads, stores = run_step(step, library, *make_rows(rows, vocabulary_size))[1:]
    target_bytes = (2 * 4, 4) if step.name == "registers" else (0, 0)  # two threads read its logit, one writes it again
    assert loads.bytes == rows * (step.passes * 4 * vocabulary_size + target_bytes[0])
    assert stores.bytes == rows * (4 * vocabulary_size + target_bytes[1])


@each_step
def test_row_without_weight_is_written_but_not_read(library, step):
    logits_MV, target_ids_M, _ = make_rows(3, 1000)
    target_ids_M.fill_(-100)
    losses_M, loads, stores = run_step(step, library, logits_MV, target_ids_M, torch.zeros(3))
    assert (loads.bytes, stores.bytes) == (0, 3 * 4 * 1000)
    assert losses_M.count_nonzero() == logits_MV.count_nonzero() == 0


def test_sectors_of_a_warp_worked_by_hand(library):
    """Rows of 64 logits are 8 sectors of 32 bytes, and a request of one warp touches:

    naive: lane l reads logit v of row l: 32 rows, 32 sectors; 3 * 64 requests to read, 64 to write. warp: 32
    neighbours, 128 bytes, 4 sectors; 2 requests each way and pass. registers: 64 logits are 16 vectors, all in one
    warp's one request, 256 bytes in 8 sectors.
    """
    for name, read, written in (
        ("naive", (192, 192 * 32), (64, 64 * 32)),
        ("warp", (6, 24), (2, 8)),
        ("block", (4, 16), (2, 8)),
    ):
        step = STEP[name]
        rows = 32 if name == "naive" else 1
        loads, stores = run_step(step, library, *make_rows(rows, 64))[1:]
        assert (loads.requests, loads.sectors) == read, name
        assert (stores.requests, stores.sectors) == written, name
    logits_MV, _, loss_weights_M = make_rows(1, 64)
    loads, stores = run_step(STEP["registers"], library, logits_MV, torch.tensor([5]), loss_weights_M)[1:]
    assert (loads.requests, loads.sectors, loads.widest_bytes, loads.widest_sectors) == (2, 8 + 2 - 1, 256, 8)
    assert (stores.requests, stores.sectors) == (2, 9)


# ------------------------------------------------------------------------------------------------------------- the page
def test_traffic_table_of_the_page(library):
    lines = traffic_rows(library)
    text = README.read_text(encoding="ascii")
    assert not [line for line in lines if line not in text.splitlines()], "README.md must have:\n" + "\n".join(lines)


def test_machine_code_table_of_the_page():
    text = README.read_text(encoding="ascii")
    stated = re.search(r"instructions per logit; (NVRTC [\d.]+)", text)[1]
    try:
        compiler, lines = machine_code_rows()
    except ToolMissing as error:
        pytest.skip(str(error))
    if compiler != stated:
        pytest.skip(f"the page's figures are {stated}'s, here is {compiler}")
    assert not [line for line in lines if line not in text.splitlines()], "README.md must have:\n" + "\n".join(lines)


def test_arithmetic_of_the_page():
    """Rows that are open at once on 132 multiprocessors of 2,048 threads, and their bytes; threads of the device."""
    text = README.read_text(encoding="ascii")
    row_bytes = 4 * 32016
    for name, threads_per_row in (("naive", 1), ("warp", 32), ("block", 1024)):
        rows = 132 * 2048 // threads_per_row
        size = rows * row_bytes
        amount = f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.3g} GB"
        assert f"| {name} | {rows:,} | {amount} |" in text
    assert f"{row_bytes:,} bytes apart" in text
    assert f"room for\n{132 * 2048:,}" in text or f"room for {132 * 2048:,}" in text
    assert math.ceil(32016 / 32) == 1001


def test_each_kernel_is_on_the_page_and_stands_alone():
    text = README.read_text(encoding="ascii")
    for step in STEPS:
        assert f"[{step.name}.cu]({step.name}.cu)" in text
        source = (FOLDER / f"{step.name}.cu").read_text(encoding="ascii")
        assert "#include" not in source
        assert "// E9" in source
        assert "// E10" in source
        assert max(map(len, source.splitlines())) <= 120
    assert "nothing ran on a GPU" in text


# ---------------------------------------------------------------------------------------------- the tests are not blind
MUTANTS = {  # step -> (text, its replacement): all four in one build
    "naive": ("v == target ? gradient - weight : gradient", "v == target ? gradient : gradient"),
    "warp": (
        "for (int v = lane; v < vocabulary_size; v += 32) maximum",
        "for (int v = lane * (vocabulary_size / 32); v < (lane + 1) * (vocabulary_size / 32); v++) maximum",
    ),
    "block": ("    __syncthreads();", "    "),
    "registers": ("z[target] = scale * expf(target_logit - maximum)", "z[target] = scale * expf(z[target] - maximum)"),
}


@pytest.fixture(scope="module")
def broken_library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken_ladder")
    for file in ("emulate.cpp", "count_traffic.cpp"):
        shutil.copy(FOLDER / file, folder)
    for name, (text, replacement) in MUTANTS.items():
        source = (FOLDER / f"{name}.cu").read_text(encoding="ascii")
        assert text in source
        (folder / f"{name}.cu").write_text(source.replace(text, replacement, 1))
    return build_or_skip(folder, folder, with_product=False)


def wrong_orders(library, name: str) -> list[int]:
    """Orders of threads in which a step's loss or gradient is wrong."""
    wrong = []
    for order in ORDERS:
        logits_MV, target_ids_M, loss_weights_M = make_rows(2, 4096)
        target_ids_M[1] = logits_MV[1].argmax()  # else the target's probability is nothing beside its weight
        losses_M, gradient_MV = expected(logits_MV, target_ids_M, loss_weights_M)
        got_M, _, _ = run_step(STEP[name], library, logits_MV, target_ids_M, loss_weights_M, order)
        right = torch.allclose(got_M.double(), losses_M, rtol=1e-5) and torch.allclose(
            logits_MV.double(), gradient_MV, rtol=1e-4, atol=1e-6
        )
        wrong += [] if right else [order]
    return wrong


@pytest.mark.parametrize("name", ["naive", "block", "registers"])
def test_wrong_kernel_is_noticed(library, broken_library, name):
    """No one-hot; no barrier (shared memory starts as NaN); the target's logit read after it was overwritten."""
    assert wrong_orders(library, name) == []
    assert wrong_orders(broken_library, name) == list(ORDERS)


def test_uncoalesced_pass_is_noticed(broken_library):
    """A lane that walks a piece of its own gives the right answer with 32 sectors where 4 were: 4 + 4 + 32 in all."""
    logits_MV, target_ids_M, loss_weights_M = make_rows(1, 4096)
    losses_M, _ = expected(logits_MV, target_ids_M, loss_weights_M)
    got_M, loads, _ = run_step(STEP["warp"], broken_library, logits_MV, target_ids_M, loss_weights_M)
    torch.testing.assert_close(got_M.double(), losses_M, rtol=1e-5, atol=0)
    assert loads.bytes == 3 * 4 * 4096
    assert loads.sectors == 4096 // 32 * (4 + 4 + 32)
