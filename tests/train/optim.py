"""The optimiser, the schedule, the moving average and the resumable state of a training run."""

import copy
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest semi-orthogonal matrices of [N, a, b], about: all singular values near 1.

    Source: the quintic Newton-Schulz iteration of Muon (K. Jordan, 2024, kellerjordan/Muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class MuonAdam(torch.optim.Optimizer):
    """Muon for weights of two and more dimensions inside the network, Adam for everything else.

    Updates of both have the same size for the same rate (Moonshot's factor, arXiv:2502.16982).

    Args:
        inner: parameters for Muon, taken as [out, rest] matrices. others: parameters for Adam.
        lr: of Muon. adam_lr: of Adam. Both are multiplied by the schedule's `scale`.
        dtype: of Muon's products.
    """

    def __init__(
        self, inner: list[nn.Parameter], others: list[nn.Parameter], lr: float, adam_lr: float,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        self.dtype = dtype
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
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            grads, states = [p.grad for p in parameters], [self.state[p] for p in parameters]
            if group["muon"]:  # a matrix decays slowly to what the data need
                torch._foreach_mul_(parameters, 1 - 0.01 * rate)
            updates = _muon(grads, states, self.dtype) if group["muon"] else _adam(grads, states)
            torch._foreach_sub_(parameters, updates, alpha=rate)


def _muon(grads: list[Tensor], states: list[dict], dtype: torch.dtype) -> list[Tensor]:
    for grad, state in zip(grads, states, strict=True):
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grad)
    momenta = [state["momentum"] for state in states]
    torch._foreach_lerp_(momenta, grads, 0.05)
    matrices = [m.flatten(1) for m in torch._foreach_lerp(grads, momenta, 0.95)]
    places = defaultdict(list)
    for place, matrix in enumerate(matrices):
        places[matrix.shape].append(place)
    for shape, same in places.items():  # all of one shape at once: fewer, larger products
        stack = orthogonalise(torch.stack([matrices[place] for place in same]), dtype=dtype)
        for place, matrix in zip(same, stack * (0.2 * max(shape) ** 0.5), strict=True):
            matrices[place] = matrix.view(grads[place].shape)
    return matrices


def _adam(grads: list[Tensor], states: list[dict]) -> list[Tensor]:
    for grad, state in zip(grads, states, strict=True):
        if "step" not in state:
            state.update(step=0, mean=torch.zeros_like(grad), square=torch.zeros_like(grad))
        state["step"] += 1
    means, squares = ([state[name] for state in states] for name in ("mean", "square"))
    torch._foreach_lerp_(means, grads, 0.1)
    torch._foreach_lerp_(squares, torch._foreach_mul(grads, grads), 0.01)
    step = states[0]["step"]  # one count: a parameter has a gradient in every step or in none
    roots = torch._foreach_sqrt(torch._foreach_div(squares, 1 - 0.99**step))
    torch._foreach_add_(roots, 1e-8)
    return torch._foreach_div(torch._foreach_div(means, 1 - 0.9**step), roots)


def make_optimizer(
    module: nn.Module, lr: float, adam_lr: float, outer: Iterable[str] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> MuonAdam:  # fmt: skip
    """Muon for the matrices of a module.

    Args:
        outer: parts of names whose parameters Adam takes: first and last layers, embeddings.
    """
    inner, others = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim > 1 and not any(part in name for part in outer)
            (inner if is_matrix else others).append(parameter)
    return MuonAdam(inner, others, lr, adam_lr, dtype)


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
        mine, theirs = (list(m.parameters()) for m in (self.module, module))
        torch._foreach_lerp_(mine, theirs, 1 - decay)


def save_run(path: Path, **values) -> None:
    """Write a resumable state; a break leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save(values, part)
    os.replace(part, path)


def load_run(path: Path) -> dict | None:
    """The state of an earlier run on any device, or None."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
