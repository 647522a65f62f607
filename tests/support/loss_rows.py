"""Random rows for the loss and what PyTorch makes of them.

Shape legend: M rows, D model dimension, V vocabulary.
"""

import torch
from torch.nn.functional import cross_entropy


def make_rows(dtype=torch.float64, n_rows=7, dim=5, vocab_size=11, seed=0):
    """hidden (M, D), head (V, D), targets (M,), weights (M,) 3 of 7 zero."""
    generator = torch.Generator().manual_seed(seed)
    hidden_MD = torch.randn(n_rows, dim, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    head_weight_VD = torch.randn(vocab_size, dim, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    target_ids_M = torch.randint(0, vocab_size, (n_rows,), generator=generator)
    loss_weights_M = torch.tensor([0, 1, 2.5, 0, 0.25, 9, 0])[torch.arange(n_rows) % 7]
    return hidden_MD, head_weight_VD, target_ids_M, loss_weights_M


def oracle(hidden_MD, head_weight_VD, target_ids_M, loss_weights_M):
    """PyTorch's cross-entropy in fp64 on all logits; returns value and gradients of fp64 copies."""
    hidden_MD = hidden_MD.detach().double().requires_grad_()
    head_weight_VD = head_weight_VD.detach().double().requires_grad_()
    rows = cross_entropy(hidden_MD @ head_weight_VD.T, target_ids_M, reduction="none")
    loss = (rows * loss_weights_M.double()).sum()
    return loss.detach(), *torch.autograd.grad(loss, [hidden_MD, head_weight_VD])
