"""Muon for matrices and AdamW for everything else, in one optimizer: only the bundled base is pre-trained with it.

Muon replaces a matrix's momentum by the nearest (semi-)orthogonal matrix, so every direction of the update has the same
length. Whether it beats AdamW on this base, with all else equal, was not measured. Fine-tuning uses train.optimizer's
AdamW. Works on sharded parameters.

Why not `torch.optim.Muon`: it computes in bf16, five times slower than fp32 on a CPU without bf16 units.

Shape suffixes: R rows and C columns of a matrix.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from train.distributed import local_part

# Quintic Newton-Schulz coefficients of the Muon reference: they trade exact convergence for speed; singular values
# end within 0.7..1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix_RC: torch.Tensor, steps: int) -> torch.Tensor:
    """About U V^T of the singular value decomposition U S V^T, by `steps` Newton-Schulz iterations. Shapes (R, C) ->
    (R, C)."""
    a, b, c = NEWTON_SCHULZ
    x = matrix_RC / (matrix_RC.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `is_muon` are updated by Muon, the others by AdamW without weight decay. Parameters are sharded
    DTensors."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        muon_learning_rate: float,
        adam_learning_rate: float,
        momentum: float,
        betas: tuple[float, float],
        epsilon: float,
    ) -> None:
        named = list(model.named_parameters())
        matrices = [
            p for name, p in named if p.ndim == 2 and "tok_embeddings" not in name and not name.startswith("output")
        ]
        others = [p for _, p in named if not any(p is matrix for matrix in matrices)]
        super().__init__(
            [
                {"params": matrices, "lr": muon_learning_rate, "is_muon": True},
                {"params": others, "lr": adam_learning_rate, "is_muon": False},
            ],
            {"momentum": momentum, "betas": betas, "epsilon": epsilon},
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter; a collective (each rank orthogonalizes its share of the matrices)."""
        for group in self.param_groups:
            if group["is_muon"]:
                self._muon(group)
            else:
                self._adamw(group)

    def _muon(self, group: dict) -> None:
        updates = []
        for index, parameter in enumerate(group["params"]):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
            nesterov = parameter.grad + group["momentum"] * state["momentum"]
            full_RC = nesterov.full_tensor() if isinstance(nesterov, DTensor) else nesterov
            if index % dist.get_world_size() == dist.get_rank():
                full_RC = orthogonalize(full_RC, steps=5)
            updates.append(full_RC.contiguous())
        for index, (parameter, update_RC) in enumerate(zip(group["params"], updates, strict=True)):
            dist.broadcast(update_RC, src=index % dist.get_world_size())
            if isinstance(parameter, DTensor):
                update_RC = distribute_tensor(
                    update_RC, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            # A tall matrix has larger rows after orthogonalization; sqrt(R / C) makes updates comparable over shapes.
            scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
            local_part(parameter).add_(local_part(update_RC), alpha=-group["lr"] * scale)

    def _adamw(self, group: dict) -> None:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            gradient, mean, square = (local_part(t) for t in (parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            step = state["step"].item()
            denominator = (square / (1 - beta2**step)).sqrt_().add_(group["epsilon"])
            local_part(parameter).addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))
