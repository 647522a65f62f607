"""Builds kernel texts for the CPU (g++ and tests/support/cuda_shim), launches them there, and builds cubins with nvcc.

    library = emulated_library(SOURCE)                      # a shared library of all kernels of the text
    launch(library, "wce_row_bf16_128x1", grid=3, block=128, arguments=[logits, 8, ...], order="random", seed=1)
    with counted(counting_library, logits=logits) as traffic: launch(...)      # bytes read and written per array

Each build happens once per test session, in a temporary folder; equal text and options give the same file.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests" / "cuda_shim"
SOURCE = ROOT / "train" / "csrc" / "weighted_cross_entropy.cu"
ORDERS = {"ascending": 0, "descending": 1, "random": 2}  # simt_api.h
VARIANTS = {  # name -> (flags of the compiler, flags of the linker)
    "plain": (["-O1"], []),
    "rough": (["-O1", "-DROUGH_EXP2"], []),  # element_host.h
    "quick": (["-O0"], []),  # for programs that are built more often than they run
    "count": (["-O1", "-fsanitize=thread", "-DSIMT_COUNT"], []),  # hooks of simt_count.h, not the real run time
    # Without optimisation: a quarter of the compile time, and no faulty access is optimised away.
    "asan": (
        ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        ["-fsanitize=address,undefined"],
    ),
    "tsan": (["-O0", "-g", "-fsanitize=thread"], ["-fsanitize=thread"]),
}
# fno-strict-aliasing and ffp-contract=off: what nvcc allows, and only the fused operations that the text names.
COMMON_FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-threadsafe-statics",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-sign-compare",
]


# ------------------------------------------------------------------------------------------------------ what is missing
@functools.cache
def why_no_gxx() -> str:
    """Why kernels cannot be run on this machine's CPU; empty if they can."""
    if sys.platform != "linux":
        return f"kernels run on the CPU under Linux, this is {sys.platform}"
    if shutil.which("g++") is None:
        return "g++ is not installed: kernels cannot be run on the CPU"
    version = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.partition(".")[0] or 0) < 12:
        return f"g++ {version}: 12 or newer is needed (_Float16)"
    return ""


@functools.cache
def why_no_sanitizer(variant: str) -> str:
    """Why programs of this variant cannot be built or run here; empty if they can."""
    source, program = session_folder() / f"empty_{variant}.cpp", session_folder() / f"empty_{variant}"
    source.write_text("int main() {}\n", encoding="utf-8")
    compile_flags, link_flags = VARIANTS[variant]
    commands = (["g++", *compile_flags, str(source), *link_flags, "-o", str(program)], [str(program)])
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            return f"{variant}: {(result.stderr.strip().splitlines() or ['no message'])[-1]}"
    return ""


@functools.cache
def why_no_nvcc() -> str:
    return "" if shutil.which("nvcc") else "nvcc is not installed"


@functools.cache
def session_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="cuda_build_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


# --------------------------------------------------------------------------------------------------------------- builds
def source_text(source: Path | str) -> str:
    """`source` is a file, or the text itself (a mutant)."""
    return source.read_text(encoding="utf-8") if isinstance(source, Path) else source


def run_compiler(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def keep_kernels(text: str, names: set[str]) -> str:
    """The text of weighted_cross_entropy.cu without the lines that make other kernels: less to compile."""

    def kept(line: str) -> bool:
        row = re.match(r"ROW_KERNEL\((\w+), \w+, (\d+), (\d+)\)", line)
        other = re.match(r"STREAM_AND_SCALE_KERNELS\((\w+), \w+\)", line)
        if row:
            return f"wce_row_{row[1]}_{row[2]}x{row[3]}" in names
        return not other or f"wce_stream_{other[1]}" in names

    return "".join(line for line in text.splitlines(keepends=True) if kept(line))


def kernel_names(preprocessed: str) -> list[str]:
    """Launched names, read behind the preprocessor, because macros write most of them."""
    return re.findall(r'extern "C"\s+void\s+(\w+)\s*\(', preprocessed)


@functools.cache
def precompiled_shim(variant: str) -> Path:
    """Folder with the shim's header as the compiler has read it: half of the time of a small mutant."""
    folder = session_folder() / f"header_{variant}"
    folder.mkdir(exist_ok=True)
    run_compiler(
        [
            "g++",
            *COMMON_FLAGS,
            *VARIANTS[variant][0],
            "-x",
            "c++-header",
            str(SHIM / "simt_shim.h"),
            "-o",
            str(folder / "simt_shim.h.gch"),
        ]
    )
    return folder


def translation_unit(text: str, folder: Path, flags: list[str]) -> Path:
    """Writes kernels.cu (the text) and unit.cpp: the shim, the text, one registration per kernel."""
    kernels = folder / "kernels.cu"
    kernels.write_text(text, encoding="utf-8")
    head = f'#include "simt_shim.h"\n#include "element_host.h"\n#include "{kernels}"\n'
    unit = folder / "unit.cpp"
    unit.write_text(head, encoding="utf-8")
    names = kernel_names(run_compiler(["g++", "-E", "-P", *flags, f"-I{SHIM}", str(unit)]))
    unit.write_text(head + "".join(f"SIMT_KERNEL({name})\n" for name in names), encoding="utf-8")
    return unit


def compiled(source: Path, flags: list[str]) -> Path:
    """Object file of a C++ file; the same file is compiled once for all mutants."""
    key = hashlib.sha256("\0".join([*flags, source.read_text(encoding="utf-8")]).encode()).hexdigest()[:16]
    result = session_folder() / f"{source.stem}_{key}.o"
    if not result.exists():
        partial = result.with_suffix(f".{threading.get_ident()}.o")  # two threads may compile it at once
        run_compiler(["g++", *flags, f"-I{SHIM}", "-c", str(source), "-o", str(partial)])
        partial.rename(result)
    return result


def build(
    source: Path | str,
    variant: str = "plain",
    *,
    more_sources: Iterable[Path] = (),
    program: bool = False,
    name: str = "",
) -> Path:
    """Shared library (or program) of a kernel text for the CPU; `more_sources` are C++ files linked with it."""
    compile_flags, link_flags = VARIANTS[variant]
    text, more_sources = source_text(source), list(more_sources)
    shim_texts = [path.read_text(encoding="utf-8") for path in sorted(SHIM.glob("*.h")) + more_sources]
    key = hashlib.sha256("\0".join([variant, str(program), name, text, *shim_texts]).encode()).hexdigest()[:16]
    folder = session_folder() / key
    result = folder / (name or ("program" if program else "libkernels.so"))
    if not result.exists():
        folder.mkdir(exist_ok=True)
        flags = [*COMMON_FLAGS, *compile_flags, *([f"-I{precompiled_shim(variant)}"] if program else [])]
        unit = translation_unit(text, folder, flags)
        # Compiled and linked apart: the "count" variant must not link the sanitizer that it compiles for.
        objects = [compiled(unit, flags), *(compiled(path, flags) for path in more_sources)]
        kind = [] if program else ["-shared"]
        run_compiler(["g++", *kind, *map(str, objects), *link_flags, "-ldl", "-o", str(result)])
    return result


def build_all(requests: Iterable[dict]) -> list[Path]:
    """`build(**request)` for each request, two at a time."""
    requests = list(requests)
    for variant in {request["variant"] for request in requests if request.get("program")}:
        precompiled_shim(variant)  # here, and not in both threads at once
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda request: build(**request), requests))


def compile_cubin(source: Path | str, architecture: str, name: str = "kernels") -> tuple[Path, str]:
    """nvcc to a cubin for e.g. "sm_90": the file and what ptxas said (registers, spills)."""
    text = source_text(source)
    folder = session_folder() / hashlib.sha256(f"{architecture}\0{text}".encode()).hexdigest()[:16]
    cubin, log = folder / f"{name}.cubin", folder / f"{name}.log"
    if not log.exists():
        folder.mkdir(exist_ok=True)
        kernels = folder / f"{name}.cu"
        kernels.write_text(text, encoding="utf-8")
        command = ["nvcc", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-o", str(cubin), str(kernels)]
        log.write_text(run_compiler(command), encoding="utf-8")
    return cubin, log.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- launches
def load_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.simt_error.restype = ctypes.c_char_p
    library.simt_launch.argtypes = [
        ctypes.c_char_p,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint64,
    ]
    library.simt_watch.argtypes = [ctypes.c_void_p, ctypes.c_longlong]
    library.simt_counted.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_longlong), ctypes.POINTER(ctypes.c_longlong)]
    return library


@functools.cache
def emulated_library(source: Path | str, variant: str = "plain") -> ctypes.CDLL:
    """Kernels of the text, ready for `launch`; `variant` "plain" or "count" (a process cannot load the sanitizers)."""
    return load_library(build(source, variant))


class LaunchError(Exception):
    """What the emulated block did that a GPU must not: divergent barrier, deadlock."""


def launch(
    library: ctypes.CDLL, name: str, *, grid: int, block: int, arguments: list, order: str = "ascending", seed: int = 0
) -> None:
    """Runs a kernel on CPU memory. Arguments: tensors (their first element), integers, None (a null pointer)."""
    values = [argument.data_ptr() if isinstance(argument, torch.Tensor) else argument or 0 for argument in arguments]
    cells = (ctypes.c_longlong * len(values))(*values)  # little endian: a kernel's `int` is the cell's first half
    first = ctypes.addressof(cells)
    parameters = (ctypes.c_void_p * len(values))(*(first + 8 * i for i in range(len(values))))
    if library.simt_launch(name.encode(), grid, block, ctypes.addressof(parameters), ORDERS[order], seed):
        raise LaunchError(f"{name}: {library.simt_error().decode()}")


@contextmanager
def counted(library: ctypes.CDLL, **arrays: torch.Tensor) -> Iterator[dict[str, tuple[int, int]]]:
    """Bytes (read, written) of each array by the launches inside the block; filled in when the block ends.

    Needs a library of variant "count". Counted are the accesses that the compiler left in the kernel, cached or not.
    """
    traffic: dict[str, tuple[int, int]] = {}
    for array in arrays.values():
        extent = sum((size - 1) * stride for size, stride in zip(array.shape, array.stride())) + 1
        library.simt_watch(array.data_ptr(), extent * array.element_size())
    try:
        yield traffic
        for index, name in enumerate(arrays):
            read, written = ctypes.c_longlong(), ctypes.c_longlong()
            library.simt_counted(index, ctypes.byref(read), ctypes.byref(written))
            traffic[name] = (read.value, written.value)
    finally:
        library.simt_forget_watched()
