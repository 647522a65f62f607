"""`--compile on`: PyTorch compiles what a block computes before and after its attention.

Attention itself stays as it is: it is a kernel already, and its lengths are a list of numbers, each of which would be
compiled in. So a program knows no length, and one serves all blocks of a model. Activation checkpointing and FSDP take
whole blocks, from outside, and see no difference. Parameters keep their names.
"""

from collections.abc import Callable
from types import MethodType

import torch

from command_line import ConfigError
from model.transformer import TransformerBlock


def compile_blocks(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Have the blocks of a Transformer or ValueModel compiled at their first use, in place.

    They are compiled once for use with gradients and once for use without. Those two programs, or one that another
    process compiles, may round differently. backend: of torch.compile; others than the default are for tests.
    """
    before, after = (
        compiled(part, backend) for part in (TransformerBlock.before_attention, TransformerBlock.after_attention)
    )
    for block in model.layers:
        block.before_attention, block.after_attention = MethodType(before, block), MethodType(after, block)


def compiled(part: Callable, backend: str) -> Callable:
    """A method of a block, compiled for any number of tokens, which is dimension 1 of all its tensors."""
    # a fused chain of bf16 operators rounds after each, as eager does: which chains are fused depends on gradients, and
    # PPO's first ratio must be 1
    options = {"emulate_precision_casts": True} if backend == "inductor" else None
    program = torch.compile(part, backend=backend, options=options)

    def run(block: TransformerBlock, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return program(block, *tensors)

    return run


def check_compiler(switch: str, device: torch.device) -> None:
    """Compile something small, if the run will compile. Raises ConfigError where that fails, as without a compiler."""
    if switch == "on":
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        except RuntimeError as error:
            cause = getattr(error, "inner_exception", error)  # of a backend's error, which only names the backend
            needed = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
            raise ConfigError(
                f"--compile: found that PyTorch cannot compile ({str(cause).strip().partition(chr(10))[0]}), "
                f"expected {needed}"
            ) from None
