"""`--compile on`: PyTorch compiles what a block computes before and after its attention.

Attention itself stays as it is: it is one kernel already, and its lengths are a list of numbers, each of which would be
compiled in. So a program knows no length, and one serves all blocks of a model. Gradient checkpointing and FSDP work on
whole blocks, from outside, and see no difference; parameters keep their names.
"""

from types import MethodType

import torch

from command_line import ConfigError
from model.transformer import TransformerBlock


def compile_blocks(model: torch.nn.Module) -> None:
    """Have the blocks of a Transformer or ValueModel compiled, in place, at their first use.

    Once with gradients and once without. The two programs, or one that is compiled again, may round differently.
    """
    before, after = (
        torch.compile(part, dynamic=True)
        for part in (TransformerBlock.before_attention, TransformerBlock.after_attention)
    )
    for block in model.layers:
        block.before_attention, block.after_attention = MethodType(before, block), MethodType(after, block)


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
