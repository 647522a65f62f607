"""Builds kernel texts for the CPU (g++ and tests/support/cuda_shim) and launches them there.

    library = emulated_library(SOURCE)                      # a shared library of all kernels of the text
    launch(library, "wce_row_bf16_128x1", grid=3, block=128, arguments=[logits, 8, ...], order="random", seed=1)
    with counted(counting_library, logits=logits) as traffic: launch(...)      # bytes read and written per array

Equal texts and options are built once per machine (build_cache.py).
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.support.build_cache import made_once

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).parent / "cuda_shim"
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


# ---------------------------------------------------------------------------------------------------------------------
# What is missing


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
    compile_flags, link_flags = VARIANTS[variant]

    def make(folder: Path) -> None:
        source, program = folder / "empty.cpp", folder / "empty"
        source.write_text("int main() {}\n", encoding="utf-8")
        for command in (["g++", *compile_flags, str(source), *link_flags, "-o", str(program)], [str(program)]):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                last_line = (result.stderr.strip().splitlines() or ["no message"])[-1]
                (folder / "why_not").write_text(f"{variant}: {last_line}", encoding="utf-8")
                return

    why_not = made_once("sanitizer", [*compile_flags, *link_flags], make) / "why_not"
    return why_not.read_text(encoding="utf-8") if why_not.exists() else ""


# ---------------------------------------------------------------------------------------------------------------------
# Builds


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
    """Launched names, read after the preprocessor has run, because macros write most of them."""
    return re.findall(r'extern "C"\s+void\s+(\w+)\s*\(', preprocessed)


def shim_texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(SHIM.iterdir())]


def translation_unit(text: str, folder: Path, flags: list[str]) -> list[str]:
    """Writes kernels.cu (the text) and unit.cpp: the shim, the text, one registration per kernel. Returns the names."""
    kernels = folder / "kernels.cu"
    kernels.write_text(text, encoding="utf-8")
    head = f'#include "simt_shim.h"\n#include "element_host.h"\n#include "{kernels}"\n'
    unit = folder / "unit.cpp"
    unit.write_text(head, encoding="utf-8")
    names = kernel_names(run_compiler(["g++", "-E", "-P", *flags, f"-I{SHIM}", str(unit)]))
    unit.write_text(head + "".join(f"SIMT_KERNEL({name})\n" for name in names), encoding="utf-8")
    return names


def unit_of_texts(texts: Mapping[str, str], kernels: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Writes unit.cpp with many texts, each in a namespace: kernel k of text t is launched as "t:k"."""

    def macros(text: str) -> set[str]:
        return set(re.findall(r"^#define (\w+)", text, re.MULTILINE))

    unit, of_the_shim = '#include "simt_shim.h"\n#include "element_host.h"\n', macros("".join(shim_texts()))
    for label, text in texts.items():
        file = folder / f"{label}.cu"
        file.write_text(text.replace('extern "C"', ""), encoding="utf-8")  # or all texts would share their kernels
        unit += f'namespace {label} {{\n#include "{file}"\n'
        unit += "".join(f'SIMT_KERNEL_AS("{label}:{name}", {name})\n' for name in kernels[label]) + "}\n"
        unit += "".join(f"#undef {macro}\n" for macro in sorted(macros(text) - of_the_shim))
    (folder / "unit.cpp").write_text(unit, encoding="utf-8")


def compile_and_link(sources: Sequence[Path], variant: str, result: Path) -> None:
    """Compiled and linked apart: the "count" variant must not link the sanitizer that it compiles for."""
    compile_flags, link_flags = VARIANTS[variant]
    objects = [str(result.parent / f"{source.stem}.o") for source in sources]
    for source, target in zip(sources, objects, strict=True):
        run_compiler(["g++", *COMMON_FLAGS, *compile_flags, f"-I{SHIM}", "-c", str(source), "-o", target])
    kind = ["-shared"] if result.suffix == ".so" else []
    run_compiler(["g++", *kind, *objects, *link_flags, "-ldl", "-o", str(result)])


def build_library(source: Path | str, variant: str = "plain") -> Path:
    """Shared library of a kernel text for the CPU."""
    text = source_text(source)

    def make(folder: Path) -> None:
        translation_unit(text, folder, [*COMMON_FLAGS, *VARIANTS[variant][0]])
        compile_and_link([folder / "unit.cpp"], variant, folder / "kernels.so")

    return made_once("library", [text, variant, *shim_texts()], make) / "kernels.so"


def build_program(texts: Mapping[str, str], kernels: Mapping[str, Sequence[str]], variant: str) -> Path:
    """run_checks.cpp with the kernels of all texts; each label is one of C++."""

    def make(folder: Path) -> None:
        unit_of_texts(texts, kernels, folder)
        compile_and_link([folder / "unit.cpp", SHIM / "run_checks.cpp"], variant, folder / "program")

    return made_once("program", [repr(texts), repr(kernels), variant, *shim_texts()], make) / "program"


def build_all(requests: Iterable[tuple[Path | str, str]]) -> None:
    """`build_library(source, variant)` for each request, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda request: build_library(*request), requests))


# ---------------------------------------------------------------------------------------------------------------------
# Launches


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
    return load_library(build_library(source, variant))


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
