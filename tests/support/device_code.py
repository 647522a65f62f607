"""CUDA text through NVRTC or nvcc without a GPU: PTX, and what ptxas reports of the machine code.

Equal texts are compiled once per machine (build_cache.py).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.build_cache import made_once


class ToolMissing(Exception):
    """A compiler or disassembler that this machine does not have; the message says which."""


class CompileError(Exception):
    """The compiler refused the text; the message is its log."""


@dataclass(slots=True, frozen=True)
class Resources:
    """What ptxas reports about one function."""

    registers: int  # per thread
    spill_bytes: int  # per thread, stores and loads added up
    stack_bytes: int  # per thread
    shared_bytes: int  # per block, static


# ---------------------------------------------------------------------------------------------------------------------
# Compilers


def compile_with_nvrtc(text: str, arch: str) -> dict[str, Resources]:
    """The report on `text` for `arch` (sm_90), by function. Raises ToolMissing, CompileError."""

    def make(folder: Path) -> None:
        (folder / "log").write_text(_run_nvrtc(text, arch, "CUBIN")[1], encoding="utf-8")

    log = made_once("cubin", [nvrtc_version(), arch, text], make) / "log"
    return read_resources(log.read_text(encoding="utf-8"))


def ptx_of(text: str, arch: str) -> str:
    """PTX by NVRTC for a virtual architecture (compute_80). Raises ToolMissing, CompileError."""

    def make(folder: Path) -> None:
        (folder / "ptx").write_bytes(_run_nvrtc(text, arch, "PTX")[0].rstrip(b"\0"))

    return (made_once("ptx", [nvrtc_version(), arch, text], make) / "ptx").read_text(encoding="ascii")


def nvrtc_version() -> str:
    """Raises ToolMissing."""
    try:
        from cuda.bindings import nvrtc

        return "NVRTC {}.{}".format(*_checked(nvrtc.nvrtcVersion()))
    except (ImportError, RuntimeError, OSError) as error:  # without the library cuda.bindings raises RuntimeError
        raise ToolMissing(f"NVRTC through cuda.bindings: {error}") from error


def _run_nvrtc(text: str, arch: str, kind: str) -> tuple[bytes, str]:
    """(output, log)."""
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], []))[0]
    options = [f"--gpu-architecture={arch}".encode(), b"--ptxas-options=-v"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program))[0])
    nvrtc.nvrtcGetProgramLog(program, log)
    log = log.rstrip(b"\0").decode("utf-8", "replace")
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC for {arch}: {log}")
    output = bytearray(_checked(getattr(nvrtc, f"nvrtcGet{kind}Size")(program))[0])
    _checked(getattr(nvrtc, f"nvrtcGet{kind}")(program, output))
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(output), log


def _checked(answer: tuple) -> tuple:
    if int(answer[0]):
        raise RuntimeError(f"NVRTC: {answer[0].name}")
    return answer[1:]


def compile_with_nvcc(text: str, arch: str) -> dict[str, Resources]:
    """As compile_with_nvrtc, by the nvcc on PATH; an nvcc that does not know `arch` counts as missing."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ToolMissing("nvcc is not on PATH")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout

    def make(folder: Path) -> None:
        source = folder / "kernel.cu"
        source.write_text(text, encoding="ascii")
        command = [nvcc, "-cubin", f"-arch={arch}", "-Xptxas", "-v", "-o", str(folder / "kernel.cubin"), str(source)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if "nvcc fatal" in run.stderr:  # an architecture it does not know, no host compiler: not the text's fault
            raise ToolMissing(" ".join(run.stderr.split()))
        if run.returncode:
            raise CompileError(f"nvcc for {arch}: {run.stderr}")
        (folder / "log").write_text(run.stderr, encoding="utf-8")

    log = made_once("nvcc", [version, arch, text], make) / "log"
    return read_resources(log.read_text(encoding="utf-8"))


def read_resources(log: str) -> dict[str, Resources]:
    """The figures of `ptxas -v`, by function. Both compilers print the same three lines for each."""
    found = {}
    for part in re.split(r"Function properties for ", log)[1:]:
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[part.split()[0]] = Resources(
            int(registers[1]) if registers else 0, stores + loads, stack, int(shared[1]) if shared else 0
        )
    return found
