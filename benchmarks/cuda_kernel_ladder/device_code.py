"""CUDA text to machine code and its figures, without a GPU: NVRTC or nvcc, ptxas's own report, nvdisasm's listing.

Nothing here runs on a device; compiler and disassembler need neither GPU nor driver.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


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


@dataclass(slots=True, frozen=True)
class Compiled:
    compiler: str  # "NVRTC 13.5"
    arch: str  # "sm_90"
    cubin: bytes
    resources: dict[str, Resources]  # by function name


# ----------------------------------------------------------------------------------------------------------- compilers
def compile_with_nvrtc(text: str, arch: str) -> Compiled:
    """`text` to a cubin for `arch` (sm_90). Raises ToolMissing, CompileError."""
    cubin, log, version = _run_nvrtc(text, arch, "CUBIN")
    return Compiled(version, arch, cubin, read_resources(log))


def ptx_of(text: str, arch: str) -> str:
    """PTX by NVRTC for a virtual architecture (compute_80). Raises ToolMissing, CompileError."""
    return _run_nvrtc(text, arch, "PTX")[0].rstrip(b"\0").decode("ascii")


def _run_nvrtc(text: str, arch: str, kind: str) -> tuple[bytes, str, str]:
    """(output, log, "NVRTC major.minor")."""
    try:
        from cuda.bindings import nvrtc

        version = _checked(nvrtc.nvrtcVersion())
    except (ImportError, RuntimeError, OSError) as error:  # without the library cuda.bindings raises RuntimeError
        raise ToolMissing(f"NVRTC through cuda.bindings: {error}") from error
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
    return bytes(output), log, "NVRTC {}.{}".format(*version)


def _checked(answer: tuple) -> tuple:
    if int(answer[0]):
        raise RuntimeError(f"NVRTC: {answer[0].name}")
    return answer[1:]


def compile_with_nvcc(text: str, arch: str) -> Compiled:
    """As compile_with_nvrtc, by the nvcc on PATH; an nvcc that does not know `arch` counts as missing."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ToolMissing("nvcc is not on PATH")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        source.write_text(text)
        command = [nvcc, "-cubin", f"-arch={arch}", "-Xptxas", "-v", "-o", str(cubin), str(source)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if "nvcc fatal" in run.stderr:  # an architecture it does not know, no host compiler: not the text's fault
            raise ToolMissing(" ".join(run.stderr.split()))
        if run.returncode:
            raise CompileError(f"nvcc for {arch}: {run.stderr}")
        compiler = "nvcc " + re.search(r"release (\d+\.\d+)", version)[1]
        return Compiled(compiler, arch, cubin.read_bytes(), read_resources(run.stderr))


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


# ------------------------------------------------------------------------------------------------------------- listing
@dataclass(slots=True, frozen=True)
class Instruction:
    address: int
    is_guarded: bool  # runs under a predicate (@P0)
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(slots=True, frozen=True)
class Listing:
    """Machine code of one function in order, and the address of each label."""

    instructions: list[Instruction]
    labels: dict[str, int]


LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"\s*(?P<operands>[^;]*);"
)


def disassemble(cubin: bytes) -> dict[str, Listing]:
    """Function name -> listing, by nvdisasm (PyPI: nvidia-cuda-nvdisasm). Raises ToolMissing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([_find_nvdisasm(), "-c", str(path)], capture_output=True, text=True, check=True).stdout
    return read_listing(text)


def read_listing(text: str) -> dict[str, Listing]:
    """Parse what `nvdisasm -c` prints. A trailing `NOP` after the last branch is padding and is left out."""
    listings = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        instructions, labels, waiting = [], {}, []
        for line in part.splitlines():
            if label := re.match(r"(\.L\w+):", line):
                waiting.append(label[1])
            elif match := LINE.search(line):
                address = int(match["address"], 16)
                labels.update(dict.fromkeys(waiting, address))
                waiting.clear()
                instructions.append(
                    Instruction(address, match["guard"] is not None, match["opcode"], match["operands"].strip())
                )
        while instructions and instructions[-1].name == "NOP":
            instructions.pop()
        listings[re.match(r"\w+", part)[0]] = Listing(instructions, labels)
    return listings


def _find_nvdisasm() -> str:
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
        for file in files:
            if file.name == "nvdisasm":
                return str(file.locate())
    except importlib.metadata.PackageNotFoundError:
        pass
    path = shutil.which("nvdisasm")
    if path is None:
        raise ToolMissing("nvdisasm: neither the package nvidia-cuda-nvdisasm nor the program on PATH")
    return path
