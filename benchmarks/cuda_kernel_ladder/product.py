"""Machine-code figures of the shipped kernels, train/cuda/csrc/weighted_cross_entropy.cu, without a GPU.

    python -m benchmarks.cuda_kernel_ladder.product [--compiler nvcc]

Prints registers per thread, spilled bytes and instructions per logit of every entry point on three architectures: the
table of train/cuda/csrc/README.md, which tests/train/test_cuda_compile.py keeps true. No figure here is a time.
"""

from __future__ import annotations

import argparse
import re
import sys

from benchmarks.cuda_kernel_ladder.device_code import (
    Compiled,
    CompileError,
    Listing,
    ToolMissing,
    compile_with_nvcc,
    compile_with_nvrtc,
    disassemble,
)
from benchmarks.cuda_kernel_ladder.sass_count import looped_count, straight_count
from train.cuda.launch import ROW_KERNELS, SOURCE

KERNEL_FILE = SOURCE.resolve()
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes of a logit
SHAPES = tuple(f"{threads}x{vectors}" for threads, vectors in ROW_KERNELS)
PASSES = {"stream": 2, "scale": 1}
COMPILERS = {"nvrtc": compile_with_nvrtc, "nvcc": compile_with_nvcc}
ROW_NAME = re.compile(r"wce_row_(?P<dtype>\w+?)_(?P<threads>\d+)x(?P<vectors>\d+)")


def entry_names() -> list[str]:
    """Every entry point, in the order of the table."""
    names = [f"wce_row_{{}}_{shape}" for shape in SHAPES] + ["wce_stream_{}", "wce_scale_{}"]
    return [name.format(dtype) for name in names for dtype in DTYPES]


def logit_bytes(name: str) -> int:
    return next(size for dtype, size in DTYPES.items() if f"_{dtype}" in name)


def instructions_per_logit(name: str, listing: Listing) -> float:
    """What one thread executes per logit of a row with weight (or per value scaled). Raises UnknownFlow."""
    if ROW_NAME.fullmatch(name):
        return straight_count(listing, logit_bytes(name))
    return looped_count(listing, logit_bytes(name), PASSES[name.split("_")[1]])


def table_lines(compiled_by_arch: dict[str, Compiled], listings_by_arch: dict[str, dict[str, Listing]]) -> list[str]:
    """Markdown rows: registers / spilled bytes / instructions per logit, for each architecture and kernel."""
    lines = []
    for name in entry_names():
        cells = []
        for arch, compiled in compiled_by_arch.items():
            resources = compiled.resources[name]
            count = instructions_per_logit(name, listings_by_arch[arch][name])
            cells.append(f"{resources.registers} / {resources.spill_bytes} / {count:.1f}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", choices=sorted(COMPILERS), default="nvrtc", help="which compiler [nvrtc]")
    args = parser.parse_args()
    text = KERNEL_FILE.read_text(encoding="ascii")
    try:
        compiled = {arch: COMPILERS[args.compiler](text, arch) for arch in ARCHITECTURES}
        listings = {arch: disassemble(one.cubin) for arch, one in compiled.items()}
    except (ToolMissing, CompileError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Registers per thread / spilled bytes / instructions per logit; {compiled[ARCHITECTURES[0]].compiler}\n")
    print("| kernel | " + " | ".join(ARCHITECTURES) + " |\n" + "|---" * (1 + len(ARCHITECTURES)) + "|")
    print("\n".join(table_lines(compiled, listings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
