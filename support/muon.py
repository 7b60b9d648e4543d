"""Muon updates a matrix by the orthogonal matrix nearest to its momentum; AdamW updates everything else.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al., "Muon is scalable
for LLM training", arXiv 2502.16982, section 2.2, for the size of an update. torch.optim.Muon takes 2-D weights only,
one after the other, in bfloat16; the attention weights here have an axis for the heads, and on a CPU one float32
product over all weights of a shape is faster.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial; they bring singular values near 1 in five steps (Jordan)
N_ITERATIONS = 5
MOMENTUM = 0.95
RMS = 0.2  # of an update at learning rate 1, about that of AdamW (Liu et al.), so that both take the same rate


class Muon(torch.optim.AdamW):
    """AdamW, except in parameter groups with "muon": True, whose members are matrices.

    A member with more than two axes counts as a matrix: its first axis by all others. Its state is "exp_avg", the mean
    of past gradients, and AdamW's "step". found_inf, a tensor of 1 or 0, skips an update as in the fused AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__([{"muon": False} | group for group in groups], **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters once, from their gradients."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            result = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self.update_matrices(group)
        return result

    def update_matrices(self, group: dict[str, Any]) -> None:
        """Update the members of a group; members of one shape are updated together."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            found_inf = torch.zeros((), device=group["params"][0].device)
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.flatten(1).shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            momentum = torch.stack([self.momentum(parameter).flatten(1) for parameter in parameters])
            gradient = torch.stack([parameter.grad.flatten(1) for parameter in parameters])
            gradient = torch.where(found_inf > 0, momentum, gradient)  # then the momentum stays as it is
            momentum.lerp_(gradient, 1 - MOMENTUM)
            direction = orthogonalize(gradient.lerp(momentum, MOMENTUM))  # Nesterov's look ahead
            rate = group["lr"] * (1 - found_inf)
            direction *= RMS * math.sqrt(max(shape)) * rate
            for parameter, new_momentum, change in zip(parameters, momentum, direction, strict=True):
                self.momentum(parameter).copy_(new_momentum.view_as(parameter))
                parameter.mul_(1 - rate * group["weight_decay"]).sub_(change.view_as(parameter))

    def momentum(self, parameter: Tensor) -> Tensor:
        """Return the mean of past gradients of a matrix, 0 before its first update."""
        state = self.state[parameter]
        if not state:
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(parameter)
        return state["exp_avg"]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices with the same singular vectors, and singular values between 0.7 and 1.2: [n, rows, columns].

    Singular values far below the norm of their matrix stay small. Source: Jordan et al., a Newton-Schulz iteration.
    """
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    is_tall = x.size(1) > x.size(2)
    if is_tall:  # the smaller of the two products
        x = x.mT.contiguous()
    for _ in range(N_ITERATIONS):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b square + c square^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x.mT if is_tall else x
