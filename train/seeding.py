"""Seeds, and the state of every random generator as plain JSON (no pickle)."""

import base64
import os
import random

import numpy
import torch


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, numpy and torch (CPU and CUDA) with `seed + rank`.

    The batch order depends on none of them: data.batches draws from a private generator, because a stray draw by some
    library would otherwise break bit-exact resume.
    """
    random.seed(seed + rank)
    numpy.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def use_deterministic_kernels() -> None:
    """cuDNN without autotuning and without TF32, so that a rerun on the same device gives the same bits."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def use_deterministic_algorithms(switch: str) -> None:
    """With "on", PyTorch's deterministic algorithms on CUDA, the backward of flash attention among them.

    Call it before the first CUDA call: cuBLAS reads its variable then. PyTorch warns of an operator that has no such
    algorithm; of ours that is the fp64 sum over probabilities in sampling. With "off" nothing changes.
    """
    if switch == "on":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _to_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def random_state() -> dict:
    """State of the generators of Python, numpy, torch CPU and (where present) the current CUDA device, JSON-ready."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
        "torch": _to_text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def restore_random_state(state: dict) -> None:
    """Inverse of random_state. A CUDA state is ignored on a machine without CUDA."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(_to_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_to_tensor(state["cuda"]))
