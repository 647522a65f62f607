"""CUDA kernels from source text at run time: NVRTC, a cache of its output on disk, launches on torch's current stream.

Users need no nvcc and no compiler, only cuda-bindings and NVRTC, which come with a CUDA build of torch (without one:
requirements-cuda.txt). They are imported only when a kernel is needed, so this file costs nothing without CUDA. Every
fault is a CudaKernelError of one line that names the call, the kernel and the grid.

Cache: one file per compiled source in $TL_TRAINING_KERNEL_CACHE ("off": none; default ~/.cache/tl_training/kernels,
mode 0700). Its name is the sha256 of source, NVRTC's version and architecture; its first 32 bytes are the sha256 of
the rest, so that a half-written or damaged file is compiled again.
"""

import ctypes
import functools
import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

CACHE_VARIABLE = "TL_TRAINING_KERNEL_CACHE"
POINTER, INT64, INT32 = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int  # a kernel's parameter types


class CudaKernelError(RuntimeError):
    """A kernel cannot be compiled, loaded or launched. One line."""


def _bindings() -> tuple[ModuleType, ModuleType]:
    """cuda.bindings.driver and cuda.bindings.nvrtc."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise CudaKernelError(
            f"cuda-bindings is not installed, see requirements-cuda.txt ({_one_line(error)})"
        ) from None
    return driver, nvrtc


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


# ---------------------------------------------------------------------------------------------------------------------
# Compiling


@dataclass(frozen=True, slots=True)
class KernelSource:
    """Text of kernels with `extern "C"` names and without any #include."""

    name: str  # shown in messages
    text: bytes

    @staticmethod
    def read(path: Path) -> "KernelSource":
        """Raises CudaKernelError if the file is not there."""
        try:
            return KernelSource(path.name, path.read_bytes())
        except OSError as error:
            raise CudaKernelError(f"{path.name}: cannot read the kernel source: {error.strerror}") from None


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC library. Raises CudaKernelError when it is absent."""
    return _nvrtc("nvrtcVersion")


def choose_architecture(capability: tuple[int, int]) -> str:
    """`sm_XY` for a device of this compute capability, or the newest older `compute_XY`, which its driver compiles.

    Raises CudaKernelError for a device older than any that NVRTC knows.
    """
    (supported,) = _nvrtc("nvrtcGetSupportedArchs")
    wanted = 10 * capability[0] + capability[1]
    if wanted in supported:
        return f"sm_{wanted}"
    older = [each for each in supported if each < wanted]
    if not older:
        raise CudaKernelError(
            f"NVRTC {'.'.join(map(str, nvrtc_version()))} compiles for compute capability "
            f"{min(supported) / 10} and later, found a device of {wanted / 10}"
        )
    return f"compute_{max(older)}"


def compile_kernels(source: KernelSource, architecture: str) -> bytes:
    """Machine code (cubin) for `sm_XY`, PTX text for `compute_XY`; a few seconds, without cache.

    Raises CudaKernelError with the compiler's first error; the whole log is kept in a file that it names.
    """
    _, nvrtc = _bindings()
    (program,) = _nvrtc("nvrtcCreateProgram", source.text, source.name.encode(), 0, [], [])
    try:
        status = nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture={architecture}".encode()])[0]
        if status == nvrtc.nvrtcResult.NVRTC_ERROR_COMPILATION:
            raise CudaKernelError(_compile_error(source, architecture, _nvrtc_bytes("ProgramLog", program)))
        _check_nvrtc("nvrtcCompileProgram", status)
        return _nvrtc_bytes("CUBIN" if architecture.startswith("sm_") else "PTX", program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _compile_error(source: KernelSource, architecture: str, log: bytes) -> str:
    text = log.decode(errors="replace").rstrip("\0")
    handle, path = tempfile.mkstemp(prefix="nvrtc_", suffix=".log")
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
    first = next((line for line in text.splitlines() if "error" in line), text)
    return f"NVRTC cannot compile {source.name} for {architecture}: {_one_line(first)} (whole log: {path})"


def _nvrtc_bytes(what: str, program: object) -> bytes:
    """One of the buffers of a program; NVRTC tells its size first."""
    (size,) = _nvrtc(f"nvrtcGet{what}Size", program)
    buffer = bytearray(size)
    _nvrtc(f"nvrtcGet{what}", program, buffer)
    return bytes(buffer)


def _nvrtc(name: str, *arguments: object) -> tuple:
    _, nvrtc = _bindings()
    try:
        status, *values = getattr(nvrtc, name)(*arguments)
    except (RuntimeError, OSError) as error:  # the library, or this function of it, is not there
        raise CudaKernelError(f"NVRTC is not usable, see requirements-cuda.txt ({_one_line(error)})") from None
    _check_nvrtc(name, status)
    return tuple(values)


def _check_nvrtc(name: str, status: object) -> None:
    if int(status):
        raise CudaKernelError(f"{name}: {status.name}")


# ---------------------------------------------------------------------------------------------------------------------
# Cache on disk


def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None if switched off or if no private folder can be made."""
    setting = os.environ.get(CACHE_VARIABLE, "")
    if setting == "off":
        return None
    try:
        folder = Path(setting) if setting else Path.home() / ".cache" / "tl_training" / "kernels"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: the home folder is unknown
        return None
    # the device runs what is in there: no other user may write it
    is_private = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if is_private else None


def cached_kernels(source: KernelSource, architecture: str, *, recompile: bool = False) -> bytes:
    """compile_kernels through the cache. recompile: ignore an existing file. Raises CudaKernelError."""
    folder = cache_folder()
    if folder is None:
        return compile_kernels(source, architecture)
    key = hashlib.sha256()
    for part in (source.text, source.name.encode(), architecture.encode(), repr(nvrtc_version()).encode()):
        key.update(len(part).to_bytes(8, "little") + part)
    path = folder / f"{key.hexdigest()}.{'cubin' if architecture.startswith('sm_') else 'ptx'}"
    if not recompile and (image := _read_entry(path)) is not None:
        return image
    image = compile_kernels(source, architecture)
    _write_entry(path, image)
    return image


def _read_entry(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, image = content[:32], content[32:]
    return image if image and hashlib.sha256(image).digest() == digest else None


def _write_entry(path: Path, image: bytes) -> None:
    """Write a temporary file and rename it: ranks that compile at the same time see no file or a complete one."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".part_")
    except OSError:  # the next process compiles again
        return
    try:
        with open(handle, "wb") as file:
            file.write(hashlib.sha256(image).digest() + image)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Loading and launching


@dataclass(slots=True)
class KernelModule:
    """The kernels of one source on one device."""

    device_index: int
    architecture: str
    context: object  # the device's primary context, which torch uses too
    handle: object
    functions: dict[str, object] = field(default_factory=dict)


def device_capability(device_index: int) -> tuple[int, int]:
    """Compute capability of a device. Raises CudaKernelError without a driver or without that device."""
    driver, _ = _bindings()
    _driver("cuInit", 0)
    (device,) = _driver("cuDeviceGet", device_index)
    attributes = driver.CUdevice_attribute
    major = _driver("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)[0]
    minor = _driver("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)[0]
    return major, minor


@functools.cache
def load_kernels(path: Path, device_index: int) -> KernelModule:
    """Compile (or take from the cache) and load a source for a device; once per process. Raises CudaKernelError."""
    source = KernelSource.read(path)
    architecture = choose_architecture(device_capability(device_index))
    (device,) = _driver("cuDeviceGet", device_index)
    (context,) = _driver("cuDevicePrimaryCtxRetain", device)
    image = cached_kernels(source, architecture)
    with _current(context):
        try:
            (handle,) = _driver("cuModuleLoadData", image)
        except CudaKernelError:  # a whole file, but not one that this driver takes
            (handle,) = _driver("cuModuleLoadData", cached_kernels(source, architecture, recompile=True))
    return KernelModule(device_index, architecture, context, handle)


def find_kernel(module: KernelModule, name: str, parameter_types: Sequence[type]) -> object:
    """The kernel `name`, found once; its parameters, as the driver reports them, must have the sizes of ours.

    Raises CudaKernelError for an unknown name or other parameters: with a wrong list the kernel would read a pointer
    from other bytes.
    """
    function = module.functions.get(name)
    if function is None:
        with _current(module.context):
            (function,) = _driver("cuModuleGetFunction", module.handle, name.encode(), place=name)
            _check_parameters(function, name, parameter_types)
        module.functions[name] = function
    return function


def _check_parameters(function: object, name: str, parameter_types: Sequence[type]) -> None:
    driver, _ = _bindings()
    offset = 0
    for number, each in enumerate(parameter_types):
        size = ctypes.sizeof(each)
        offset = -(-offset // size) * size  # aligned to its own size
        try:
            found = _driver("cuFuncGetParamInfo", function, number, place=name)
        except CudaKernelError as error:
            if error.__cause__ is not None:  # a driver, or bindings, older than CUDA 12.4 cannot be asked
                return
            raise CudaKernelError(f"{name}: found fewer parameters than the {len(parameter_types)} expected") from None
        if tuple(found) != (offset, size):
            raise CudaKernelError(
                f"{name}: parameter {number} has offset and size {tuple(found)}, expected {(offset, size)}"
            )
        offset += size
    if int(driver.cuFuncGetParamInfo(function, len(parameter_types))[0]) == 0:
        raise CudaKernelError(f"{name}: found more parameters than the {len(parameter_types)} expected")


def launch(module: KernelModule, name: str, *, grid: int, block: int, stream: int, parameters: Sequence[tuple]) -> None:
    """Start kernel `name` with `grid` blocks of `block` threads on a stream; returns at once.

    parameters: (type, value) pairs, types out of POINTER, INT64 and INT32, a null pointer as 0. Raises CudaKernelError.
    """
    types = tuple(each for each, _ in parameters)
    function = find_kernel(module, name, types)
    values = tuple(value for _, value in parameters)
    with _current(module.context):
        _driver(
            "cuLaunchKernel",
            function,
            grid,
            1,
            1,
            block,
            1,
            1,
            0,
            stream,
            (values, types),
            0,
            place=f"{name}, {grid} blocks of {block} threads",
        )


def device_and_stream(tensor: torch.Tensor) -> tuple[int, int]:
    """Index of a CUDA tensor's device and the handle of torch's current stream there. Raises ValueError on the CPU."""
    if tensor.device.type != "cuda":
        raise ValueError(f"found a tensor on {tensor.device}, expected CUDA: backend cuda launches kernels there")
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


@contextmanager
def _current(context: object):
    """Make a device's context current: a thread of autograd may have another current device."""
    _driver("cuCtxPushCurrent", context)
    try:
        yield
    finally:
        _driver("cuCtxPopCurrent")


def _driver(name: str, *arguments: object, place: str = "") -> tuple:
    driver, _ = _bindings()
    try:
        status, *values = getattr(driver, name)(*arguments)
    except (AttributeError, RuntimeError, OSError) as error:  # the driver, or this function of it, is not there
        raise CudaKernelError(f"the CUDA driver is not usable ({_one_line(error)})") from error
    if int(status):
        where = f" ({place})" if place else ""
        raise CudaKernelError(f"{name}{where}: {status.name}{_description(driver, status)}")
    return tuple(values)


def _description(driver: ModuleType, status: object) -> str:
    failed, text = driver.cuGetErrorString(status)
    return "" if int(failed) or not text else f", {text.decode(errors='replace')}"
