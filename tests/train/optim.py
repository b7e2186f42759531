"""The optimiser, the schedule, the moving average and the resumable state of a training run."""

import copy
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, about: all singular values near 1.

    Source: the quintic Newton-Schulz iteration of Muon (K. Jordan, 2024, kellerjordan/Muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


class MuonAdam(torch.optim.Optimizer):
    """Muon for weights of two and more dimensions inside the network, Adam for everything else.

    Updates of both have the same size for the same rate (Moonshot's factor, arXiv:2502.16982).

    Args:
        inner: parameters for Muon, taken as [out, rest] matrices. others: parameters for Adam.
        lr: of Muon. adam_lr: of Adam. Both are multiplied by the schedule's `scale`.
    """

    def __init__(
        self, inner: list[nn.Parameter], others: list[nn.Parameter], lr: float, adam_lr: float
    ) -> None:
        groups = [
            {"params": inner, "lr": lr, "muon": True, "scale": 1.0},
            {"params": others, "lr": adam_lr, "muon": False, "scale": 1.0},
        ]
        super().__init__([g for g in groups if g["params"]], {})

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        for group in self.param_groups:
            rate = group["lr"] * group["scale"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                update = (_muon if group["muon"] else _adam)(parameter.grad, state)
                if group["muon"]:  # a matrix decays slowly to what the data need
                    parameter.mul_(1 - 0.01 * rate)
                parameter.sub_(rate * update)


def _muon(grad: Tensor, state: dict) -> Tensor:
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(grad)
    state["momentum"].lerp_(grad, 0.05)
    matrix = grad.lerp(state["momentum"], 0.95).flatten(1)
    return orthogonalise(matrix).view(grad.shape) * (0.2 * max(matrix.shape) ** 0.5)


def _adam(grad: Tensor, state: dict) -> Tensor:
    if "step" not in state:
        state.update(step=0, mean=torch.zeros_like(grad), square=torch.zeros_like(grad))
    state["step"] += 1
    state["mean"].lerp_(grad, 0.1)
    state["square"].lerp_(grad.square(), 0.01)
    mean = state["mean"] / (1 - 0.9 ** state["step"])
    square = state["square"] / (1 - 0.99 ** state["step"])
    return mean / (square.sqrt() + 1e-8)


def make_optimizer(
    module: nn.Module, lr: float, adam_lr: float, outer: Iterable[str] = ()
) -> MuonAdam:
    """Muon for the matrices of a module.

    Args:
        outer: parts of names whose parameters Adam takes: first and last layers, embeddings.
    """
    inner, others = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim > 1 and not any(part in name for part in outer)
            (inner if is_matrix else others).append(parameter)
    return MuonAdam(inner, others, lr, adam_lr)


def scale_at(step: int, steps: int, warmup: int = 100, decay: float = 0.35) -> float:
    """Warm up, stay, and fall to zero over the last `decay` of the steps."""
    falling = (steps - step) / (decay * steps)
    return max(0.0, min(1.0, (step + 1) / warmup, falling))


class Average:
    """Exponential moving average of a module's weights; early on over fewer steps."""

    def __init__(self, module: nn.Module, decay: float = 0.998) -> None:
        self.module, self.decay, self.count = copy.deepcopy(module).requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the module's weights."""
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 10))
        for mine, theirs in zip(self.module.parameters(), module.parameters(), strict=True):
            mine.lerp_(theirs.to(mine), 1 - decay)


def save_run(path: Path, **values) -> None:
    """Write a resumable state; a break leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save(values, part)
    os.replace(part, path)


def load_run(path: Path) -> dict | None:
    """The state of an earlier run, or None."""
    return torch.load(path, weights_only=True) if path.exists() else None
