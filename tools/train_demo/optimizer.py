"""How are the weights moved? Muon for the matrices, Adam for the rest, one schedule for both."""

from collections import defaultdict
from typing import Final

import torch
from torch import Tensor

from .model import DemoModel

#: Coefficients of the quintic Newton-Schulz step that Muon's authors published.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_NEWTON_STEPS: Final = 5
_MOMENTUM: Final = 0.95
_WARM_UP_STEPS: Final = 40


class Optimizer:
    """Steps all weights of a model; the rates fall to nothing over the last part of the run."""

    def __init__(self, model: DemoModel, *, matrix_rate: float, other_rate: float, decay_part: float) -> None:
        self._matrix_rate = matrix_rate
        self._other_rate = other_rate
        self._decay_part = decay_part
        groups: defaultdict[tuple[int, ...], list[torch.nn.Parameter]] = defaultdict(list)
        for parameter in model.blocks.parameters():
            if parameter.dim() == 2:
                groups[tuple(parameter.shape)].append(parameter)
        self._groups = list(groups.values())
        self._momenta = [torch.zeros_like(torch.stack(list(group))) for group in self._groups]
        matrices = {id(parameter) for group in self._groups for parameter in group}
        others = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
        self._adam = torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, step: int, done: float) -> None:
        """Move the weights by their gradients, which are cleared; `done` is the run's part so far."""
        factor = min(1.0, (step + 1) / _WARM_UP_STEPS, (1 - done) / self._decay_part)
        for group in self._adam.param_groups:
            group["lr"] = self._other_rate * factor
        self._adam.step()
        self._adam.zero_grad()
        for parameters, momentum in zip(self._groups, self._momenta, strict=True):
            self._step_matrices(parameters, momentum, self._matrix_rate * factor)

    @torch.no_grad()
    def _step_matrices(self, parameters: list[torch.nn.Parameter], momentum: Tensor, rate: float) -> None:
        gradient = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        update = orthogonalised(gradient.lerp(momentum, _MOMENTUM))
        rows, columns = update.shape[-2:]
        update *= max(1.0, rows / columns) ** 0.5
        for parameter, change in zip(parameters, update, strict=True):
            parameter.mul_(1 - 0.05 * rate).sub_(change, alpha=rate)
            parameter.grad = None


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return the matrices (batch, rows, columns) with all singular values near one."""
    flipped = matrices.shape[-2] > matrices.shape[-1]
    result = matrices.mT if flipped else matrices
    result = result / (result.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_STEPS):
        gram = result @ result.mT
        result = _A * result + (_B * gram + _C * gram @ gram) @ result
    return result.mT if flipped else result
