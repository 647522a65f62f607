"""The ladder's figures: memory traffic counted in the CPU emulation, instructions counted in the machine code.

    python -m benchmarks.cuda_kernel_ladder.run

Needs g++ for the first table, NVRTC (cuda-bindings) and nvdisasm for the second; no GPU. Every kernel's losses and
gradients are compared with fp64 before a figure is printed. No figure here is a time.

Shape legend: M rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cuda_kernel_ladder.device_code import CompileError, ToolMissing, compile_with_nvrtc, disassemble
from benchmarks.cuda_kernel_ladder.sass_count import looped_count, straight_count

FOLDER = Path(__file__).resolve().parent
SHIM_FOLDER = FOLDER.parent.parent / "tests" / "cuda_shim"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
PRODUCT = FOLDER.parent.parent / "train" / "csrc" / "weighted_cross_entropy.cu"
PRODUCT_KERNELS = (  # shipped kernels shown beside the ladder: name, dtype of the logits, threads
    ("wce_row_fp32_1024x8", torch.float32, 1024),
    ("wce_stream_fp32", torch.float32, 512),
    ("wce_row_bf16_512x8", torch.bfloat16, 512),
    ("wce_stream_bf16", torch.bfloat16, 512),
)
VOCABULARY_SIZE = 32016
BYTES_PER_LOGIT = 4  # of the ladder


@dataclass(slots=True, frozen=True)
class Step:
    name: str
    rows_per_block: int
    threads: int  # per block
    reader: str  # what one row belongs to
    passes: int  # over the row in memory


STEPS = (
    Step("naive", rows_per_block=32, threads=32, reader="thread", passes=3),
    Step("warp", rows_per_block=4, threads=128, reader="warp", passes=3),
    Step("block", rows_per_block=1, threads=1024, reader="block", passes=2),
    Step("registers", rows_per_block=1, threads=1024, reader="block", passes=1),
)


@dataclass(slots=True, frozen=True)
class Access:
    """Loads (or stores) of logits by all threads of a launch."""

    bytes: int  # asked for by the threads
    requests: int  # instructions of warps
    sectors: int  # different 32-byte pieces, summed over the requests
    widest_bytes: int  # of the request that asks for most
    widest_sectors: int


# ----------------------------------------------------------------------------------------------------------- emulation
def build(folder: Path, sources: Path = FOLDER, *, with_product: bool = True) -> ctypes.CDLL:
    """The kernels of `sources` in the emulation, as a shared library in `folder`. Raises ToolMissing, CompileError."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise ToolMissing("g++ is not on PATH")
    library, counter, emulation = folder / "emulate.so", folder / "count_traffic.o", folder / "emulate.o"
    common = [compiler, "-std=c++17", "-fPIC", "-fno-gnu-unique"]  # or all libraries of a process share their variables
    only = [] if with_product else ["-DLADDER_ONLY"]
    for command in (
        [*common, "-O2", "-c", str(sources / "count_traffic.cpp"), "-o", str(counter)],
        [
            *common,
            "-O1",
            "-fno-tree-sra",
            "-fsanitize=thread",
            "-fno-threadsafe-statics",
            "-fno-strict-aliasing",
            "-Wno-unknown-pragmas",
            *only,
            "-c",
            "-I",
            str(SHIM_FOLDER),
            "-I",
            str(PRODUCT.parent),
            str(sources / "emulate.cpp"),
            "-o",
            str(emulation),
        ],
        [*common, "-shared", str(emulation), str(counter), "-o", str(library)],
    ):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise CompileError(f"g++: {run.stderr}")
    return ctypes.CDLL(str(library))


def emulate(
    library: ctypes.CDLL, kernel: str, grid: int, block: int, logits: Tensor, arguments: list, order: int = 0
) -> tuple[Access, Access]:
    """Run a kernel on the CPU; (loads, stores) of what lies in the tensor `logits`.

    arguments: the kernel's, ctypes numbers or tensors (their address is passed) or None (a null pointer).
    order: which ready thread runs next: 0 the lowest, 1 the highest, 2 a random one.
    Raises RuntimeError with the emulation's words, for instance for a barrier that not all threads reach.
    """
    values = [
        one
        if isinstance(one, ctypes.c_int | ctypes.c_longlong)
        else ctypes.c_void_p(None if one is None else one.data_ptr())
        for one in arguments
    ]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    span = (logits.shape[0] - 1) * logits.stride(0) + logits.shape[1]
    library.ladder_watch(ctypes.c_void_p(logits.data_ptr()), ctypes.c_longlong(span * logits.element_size()))
    library.simt_error.restype = ctypes.c_char_p
    if library.simt_launch(kernel.encode(), grid, block, pointers, order, ctypes.c_uint64(0)):
        raise RuntimeError(f"{kernel}: {library.simt_error().decode()}")
    figures = (ctypes.c_longlong * 10)()
    library.ladder_counted(figures)
    return Access(*figures[:5]), Access(*figures[5:])


def run_step(
    step: Step, library: ctypes.CDLL, logits_MV: Tensor, target_ids_M: Tensor, loss_weights_M: Tensor, order: int = 0
) -> tuple[Tensor, Access, Access]:
    """A kernel of the ladder; `logits_MV` (fp32, rows may be strided) ends as the gradient.

    Returns losses (M,), loads and stores of logits.
    """
    n_rows, vocabulary_size = logits_MV.shape
    losses_M = torch.full((n_rows,), float("nan"))
    arguments = [
        logits_MV,
        ctypes.c_longlong(logits_MV.stride(0)),
        ctypes.c_int(vocabulary_size),
        target_ids_M,
        loss_weights_M,
        losses_M,
        ctypes.c_int(n_rows),
    ]
    grid = -(-n_rows // step.rows_per_block)
    loads, stores = emulate(library, f"ladder_{step.name}", grid, step.threads, logits_MV, arguments, order)
    return losses_M, loads, stores


def expected(logits_MV: Tensor, target_ids_M: Tensor, loss_weights_M: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (M,) and gradient (M, V) of E9 and E10 in fp64."""
    weights_M = loss_weights_M.double()
    logprobs_MV = logits_MV.double().log_softmax(dim=1)
    losses_M = -weights_M * logprobs_MV.gather(1, target_ids_M[:, None]).squeeze(1)
    gradient_MV = logprobs_MV.exp()
    gradient_MV.scatter_add_(1, target_ids_M[:, None], -torch.ones_like(weights_M)[:, None])
    return losses_M, gradient_MV * weights_M[:, None]


def make_rows(n_rows: int, vocabulary_size: int, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random logits (M, V) on a 256-byte boundary as cudaMalloc gives them, targets (M,), weights (M,) > 0."""
    generator = torch.Generator().manual_seed(seed)
    count = n_rows * vocabulary_size
    store = torch.empty(count + 256, dtype=dtype)
    skip = -store.data_ptr() % 256 // store.element_size()
    logits_MV = store[skip : skip + count].view(n_rows, vocabulary_size)
    logits_MV.copy_(4 * torch.randn(n_rows, vocabulary_size, generator=generator))
    target_ids_M = torch.randint(vocabulary_size, (n_rows,), generator=generator)
    return logits_MV, target_ids_M, 0.5 + torch.rand(n_rows, generator=generator)


def traffic_cells(loads: Access, stores: Access, logits: int) -> str:
    moved = [32 * access.sectors / logits for access in (loads, stores)]
    return (
        f"{loads.bytes / logits:.2f} + {stores.bytes / logits:.2f} "
        f"| {loads.widest_sectors} for {loads.widest_bytes} B | {moved[0]:.2f} + {moved[1]:.2f}"
    )


def traffic_rows(library: ctypes.CDLL) -> list[str]:
    """Rows of the table on memory traffic: one launch of one block per kernel, every row with weight."""
    lines = []
    for step in STEPS:
        logits_MV, target_ids_M, loss_weights_M = make_rows(step.rows_per_block, VOCABULARY_SIZE)
        losses_M, gradient_MV = expected(logits_MV, target_ids_M, loss_weights_M)
        got_M, loads, stores = run_step(step, library, logits_MV, target_ids_M, loss_weights_M)
        torch.testing.assert_close(got_M.double(), losses_M, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits_MV.double(), gradient_MV, rtol=1e-4, atol=1e-7)
        lines.append(f"| {step.name} | {step.reader} | {traffic_cells(loads, stores, logits_MV.numel())} |")
    for kernel, dtype, threads in PRODUCT_KERNELS:
        logits_MV, target_ids_M, loss_weights_M = make_rows(1, VOCABULARY_SIZE, dtype)
        losses_M, gradient_MV = expected(logits_MV, target_ids_M, loss_weights_M)
        stride, got_M = ctypes.c_longlong(logits_MV.stride(0)), torch.full((1,), float("nan"))
        loads, stores = emulate(
            library,
            kernel,
            1,
            threads,
            logits_MV,
            [
                logits_MV,
                stride,
                logits_MV,
                stride,
                ctypes.c_int(VOCABULARY_SIZE),
                target_ids_M,
                loss_weights_M,
                None,
                got_M,
                None,
                None,
            ],
        )
        torch.testing.assert_close(got_M.double(), losses_M, rtol=1e-5, atol=1e-6)
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(logits_MV.double(), gradient_MV, rtol=rounding, atol=1e-7)
        lines.append(f"| `{kernel}` | block | {traffic_cells(loads, stores, logits_MV.numel())} |")
    return lines


# -------------------------------------------------------------------------------------------------------- machine code
def ladder_text() -> str:
    """The four kernels as one text, each in a namespace of its own: one compilation per architecture."""
    return "".join(
        f"namespace {step.name} {{\n{(FOLDER / f'{step.name}.cu').read_text(encoding='ascii')}}}\n" for step in STEPS
    )


def machine_code_rows() -> tuple[str, list[str]]:
    """(compiler, rows of the table on machine code): registers and instructions per logit, by architecture."""
    cells: dict[str, list[str]] = {step.name: [] for step in STEPS}
    for arch in ARCHITECTURES:
        compiled = compile_with_nvrtc(ladder_text(), arch)
        listings = disassemble(compiled.cubin)
        for step in STEPS:
            listing = listings[f"ladder_{step.name}"]
            count = (
                straight_count(listing, BYTES_PER_LOGIT)
                if step.passes == 1
                else looped_count(listing, BYTES_PER_LOGIT, step.passes)
            )
            cells[step.name].append(f"{compiled.resources[f'ladder_{step.name}'].registers} / {count:.1f}")
    return compiled.compiler, [f"| {name} | " + " | ".join(row) + " |" for name, row in cells.items()]


def main() -> int:
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(f"V = {VOCABULARY_SIZE}, every row with weight; counted in the CPU emulation\n")
            print(
                "| step | a row belongs to one | bytes per logit asked for, read + written "
                "| sectors of a full warp load | bytes per logit moved, read + written |\n|---|---|---|---|---|"
            )
            print("\n".join(traffic_rows(build(Path(folder)))))
        compiler, lines = machine_code_rows()
    except (ToolMissing, CompileError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\nRegisters per thread / instructions per logit; {compiler}\n")
    print("| step | " + " | ".join(ARCHITECTURES) + " |\n|---" * 1 + "|---" * len(ARCHITECTURES) + "|")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
