"""What the stages of benchmarks/gpu_check.py have in common: items, limits, random models, clocks, counters."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from model.config import PRESETS, ModelConfig
from train.plan import GIB

Items = Iterator[dict]


def at_most(name: str, found: float, limit: float) -> dict:
    """A figure that must not exceed the limit; nan does."""
    fault = {} if found <= limit else {"fault": f"{name}: found {found:.3g}, expected at most {limit:.3g}"}
    return {name: found} | fault


def must_be(name: str, is_true: bool) -> dict:
    """A promise and whether it holds."""
    return {name: bool(is_true)} | ({} if is_true else {"fault": f"{name}: found no, expected yes"})


def needs_cuda(device: str, *what: str) -> Items:
    """On the CPU: what it cannot show."""
    if device == "cpu":
        yield from ({"not_run": f"{each}: needs a CUDA device"} for each in what)


def compute_dtype(device: str) -> torch.dtype:
    """What a device is best at."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def random_model(build: type, shape: ModelConfig, device: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model with the same random weights in every call, those of norms and biases not trivial."""
    with torch.device("meta"):
        model = build(shape)
    model = model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02) if parameter.ndim == 2 else parameter.normal_(1.0, 0.1)
    return model


def llama_shape(small: bool, n_layers: int, dim: int = 4096, **changes: object) -> ModelConfig:
    """CodeLLaMA with n_layers layers of width dim; in miniature 64 wide."""
    full = PRESETS["codellama_7b"]
    dim, head_dim = (64, 16) if small else (dim, full.head_dim)
    heads = {"n_heads": dim // head_dim, "n_kv_heads": dim // head_dim, "head_dim": head_dim}
    sizes = {"dim": dim, "n_layers": n_layers, "ffn_dim": dim * full.ffn_dim // full.dim}
    vocabulary = {"vocab_size": 500} if small else {}
    return replace(full, **(heads | sizes | vocabulary | changes))


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Of one call, the device's work included."""
    wait = torch.cuda.synchronize if device == "cuda" else int
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def count_calls(call: Callable[[], object], device: str) -> dict:
    """Kernels that a call launches and times that it waits for the device; on the CPU its operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
    counts = {event.key: event.count for event in profile.key_averages()}
    if device == "cpu":
        return {"operators": sum(n for name, n in counts.items() if name.startswith("aten::"))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    launches = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
    return {
        "kernels": sum(n for name, n in counts.items() if name.startswith(launches))
        or "unknown: the profiler saw none",
        "synchronizations": sum("synchroniz" in str(each.message) for each in caught),
    }


def peak_gib(device: str) -> float | None:
    """Highest allocation since the last call; None on the CPU, which does not count."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return peak
