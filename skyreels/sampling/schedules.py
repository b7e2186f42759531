"""Schedules by the names that ComfyUI gives them, with its numbers for a flow model of this shift.

"default" is the official one, `get_sigmas`. Most others read a table of 1000 shifted sigmas, as
core does; "sgm_uniform" and "normal" shift a second time, so they stay longer at high noise.
"""

import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import MAX_STEPS, NUM_TRAIN_TIMESTEPS
from ..errors import OptionError
from .settings import check_schedule, get_sigmas

#: parameter of core's Beta distribution, for both ends. Source: arXiv:2407.12173
_BETA = 0.6
#: core's values for linear_quadratic. Source: genmoai/models, src/mochi_preview/infer.py
_LINEAR_NOISE = 0.025


def named_sigmas(
    name: str, num_inference_steps: int = 30, shift: float = 7.0, denoise: float = 1.0
) -> Tensor:
    """A schedule by its name.

    Args:
        name: one of SCHEDULES.
        num_inference_steps: 1..1000.
        shift: 0.01..100.
        denoise: below 1, the last part of a longer schedule.

    Returns:
        [N + 1] float32, falling to 0; "beta" may drop steps that fall on the same table entry.

    Raises:
        OptionError: an unknown name, or a number outside its range.

    Source: comfy/samplers.py and comfy/k_diffusion/sampling.py of ComfyUI, as BasicScheduler uses
        them.
    """
    if name not in SCHEDULES:
        raise OptionError(f"Schedule {name!r} is not one of {', '.join(SCHEDULES)}.")
    make = SCHEDULES[name]
    if make is None:
        return get_sigmas(num_inference_steps, shift, denoise)
    check_schedule(num_inference_steps, shift, denoise)
    total = int(num_inference_steps / denoise)
    if total > MAX_STEPS:
        raise OptionError(
            f"{num_inference_steps} steps at denoise {denoise} are the end of {total} steps, and "
            f"schedule {name} has at most {MAX_STEPS}: use fewer steps, or schedule default."
        )
    return make(total, shift)[-(num_inference_steps + 1) :]


def _shifted(times: Tensor, shift: float) -> Tensor:
    return shift * times / (1 + (shift - 1) * times)


def _table(shift: float) -> Tensor:
    """[1000] sigmas, rising, with the rounding of core's table."""
    count = NUM_TRAIN_TIMESTEPS
    times = (torch.arange(1, count + 1) / count) * count
    return _shifted(times / count, shift)


def _simple(steps: int, shift: float) -> Tensor:
    table = _table(shift)
    stride = len(table) / steps
    picked = [float(table[-(1 + int(step * stride))]) for step in range(steps)]
    return torch.tensor([*picked, 0.0])


def _of_times(times: Tensor, shift: float) -> Tensor:
    return torch.cat([_shifted(times / NUM_TRAIN_TIMESTEPS, shift), torch.zeros(1)])


def _ends(shift: float) -> tuple[Tensor, Tensor]:
    table = _table(shift)
    return table[-1] * NUM_TRAIN_TIMESTEPS, table[0] * NUM_TRAIN_TIMESTEPS


def _sgm_uniform(steps: int, shift: float) -> Tensor:
    return _of_times(torch.linspace(*_ends(shift), steps + 1)[:-1], shift)


def _normal(steps: int, shift: float) -> Tensor:
    return _of_times(torch.linspace(*_ends(shift), steps), shift)


def _karras(steps: int, shift: float) -> Tensor:
    table = _table(shift)
    low, high = float(table[0]) ** (1 / 7), float(table[-1]) ** (1 / 7)
    return torch.cat([(high + torch.linspace(0, 1, steps) * (low - high)) ** 7, torch.zeros(1)])


def _exponential(steps: int, shift: float) -> Tensor:
    table = _table(shift)
    ends = math.log(float(table[-1])), math.log(float(table[0]))
    return torch.cat([torch.linspace(*ends, steps).exp(), torch.zeros(1)])


def _beta(steps: int, shift: float) -> Tensor:
    table, limits = _table(shift), _beta_limits()
    times = (bisect_left(limits, 1 - step / steps) for step in range(steps))
    return torch.tensor([*(float(table[time]) for time, _ in itertools.groupby(times)), 0.0])


def _linear_quadratic(steps: int, shift: float) -> Tensor:
    if steps == 1:
        return torch.tensor([1.0, 0.0])
    linear = steps // 2
    rest = steps - linear
    excess = linear - _LINEAR_NOISE * steps
    quadratic = excess / (linear * rest**2)
    slope = _LINEAR_NOISE / linear - 2 * excess / rest**2
    offset = quadratic * linear**2
    clean = [step * _LINEAR_NOISE / linear for step in range(linear)]
    clean += [quadratic * step**2 + slope * step + offset for step in range(linear, steps)]
    return torch.tensor([1.0 - each for each in [*clean, 1.0]]) * _table(shift)[-1]


#: name -> make(steps, shift) -> [steps + 1] float32
SCHEDULES: dict[str, Callable[[int, float], Tensor] | None] = {
    "default": None,
    "simple": _simple,
    "sgm_uniform": _sgm_uniform,
    "beta": _beta,
    "normal": _normal,
    "linear_quadratic": _linear_quadratic,
    "karras": _karras,
    "exponential": _exponential,
}


@functools.cache
def _beta_limits() -> list[float]:
    """Where the Beta distribution's quantile rounds from one table entry to the next, rising.

    No inverse of the distribution is needed then.

    Returns:
        As many as there are table entries but one. The quantile of p, times the last index and
        rounded, is the number of these below p.
    """
    last = NUM_TRAIN_TIMESTEPS - 1
    return [beta_cdf((index + 0.5) / last, _BETA) for index in range(last)]


def beta_cdf(x: float, a: float) -> float:
    """The distribution function of Beta(a, a), to about 1e-15.

    Args:
        x: 0..1.
        a: > 0.

    Returns:
        0..1.

    Source: the continued fraction of DLMF 8.17.22, evaluated by Lentz's method.
    """
    if x > 0.5:
        return 1.0 - beta_cdf(1.0 - x, a)
    if x <= 0.0:
        return 0.0
    tiny = 1e-300
    value, c, d = 1.0, 1.0, 0.0
    for index in range(500):
        m = index // 2
        if index == 0:
            term = 1.0
        elif index % 2:
            term = -(a + m) * (2 * a + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (a - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / (1.0 + term * d or tiny)
        c = 1.0 + term / c or tiny
        value *= c * d
        if index and abs(c * d - 1.0) < 1e-16:
            break
    front = math.exp(a * math.log(x * (1 - x)) + math.lgamma(2 * a) - 2 * math.lgamma(a)) / a
    return front * (value - 1.0)
