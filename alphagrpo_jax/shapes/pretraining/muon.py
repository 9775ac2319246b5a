"""Muon for the matrices of a small torch model, AdamW for everything else."""

from collections import defaultdict

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients that send singular values in (0, 1] near 1 in five steps
# (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replaces each matrix of float32[K, m, n] by approximately its nearest orthogonal matrix."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalized and scaled to AdamW's typical size."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Updates the weights; matrices of one shape are orthogonalized together."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for value in group["params"]:
                if value.grad is not None:
                    by_shape[value.shape].append(value)
            for shape, values in by_shape.items():
                grads = [value.grad for value in values]
                for value, grad in zip(values, grads, strict=True):
                    state = self.state[value]
                    if not state:
                        state["momentum"] = torch.zeros_like(value)
                    state["momentum"].lerp_(grad, 1 - group["momentum"])
                looked_ahead = torch.stack(
                    [
                        grad.lerp(self.state[value]["momentum"], group["momentum"])
                        for value, grad in zip(values, grads, strict=True)
                    ]
                )
                # 0.2 sqrt(max(m, n)): root mean square of about 0.2, as AdamW's updates have.
                size = -group["lr"] * 0.2 * max(shape) ** 0.5
                for value, update in zip(values, orthogonalize(looked_ahead), strict=True):
                    value.add_(update, alpha=size)


def make_optimizers(modules: list[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Builds Muon for matrices inside the layers, AdamW for embeddings, heads, norms and biases."""
    matrices, vectors = [], []
    for module in modules:
        for name, value in module.named_parameters():
            inner = value.ndim == 2 and ("layers." in name or "projector" in name)
            (matrices if inner else vectors).append(value)
    adamw = torch.optim.AdamW(vectors, lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr), adamw]
