"""Orders of the image tokens that keep neighbours in time and space together.

Block-sparse attention cuts the sequence into blocks of 64 tokens (kernels/sparse.py). In the
model's own order, row by row, a block is a row or two of one frame; along a space-filling curve it
is a lump, whose tokens resemble each other. A transformer has no order but its rotary table, so a
pass may work in any: tokens and table are reordered once, see model.py.
"""

from functools import lru_cache

import torch
from torch import Tensor

Vector = tuple[int, int, int]
#: a corner and the three edges from it
Box = tuple[Vector, Vector, Vector, Vector]

#: bits of a coordinate that `morton_order` interleaves
_BITS = 16


def hilbert_order(grid: tuple[int, int, int]) -> Tensor:
    """The tokens along a generalized Hilbert curve, for a grid of any size.

    Each step goes to an adjacent token, apart from a few diagonal ones where a size is odd.

    Args:
        grid: tokens in time, height and width.

    Returns:
        [N] int64 on the CPU: the raster index (time, row, column) of each token along the curve.

    Source: the recursion of Gilbert, J. Cerveny, github.com/jakubcerveny/gilbert (BSD-2-Clause).
    """
    return _hilbert(tuple(grid)).clone()


@lru_cache(maxsize=16)
def _hilbert(grid: Vector) -> Tensor:
    _, height, width = grid
    axes: list[Vector] = [(grid[0], 0, 0), (0, grid[1], 0), (0, 0, grid[2])]
    a, b, c = sorted(axes, key=_length, reverse=True)  # it enters at the origin, and ends along a
    order: list[int] = []
    boxes: list[Box] = [((0, 0, 0), a, b, c)]
    while boxes:
        corner, a, b, c = boxes.pop()
        if sum(_length(x) > 1 for x in (a, b, c)) <= 1:
            longest = max((a, b, c), key=_length)
            step = _unit(longest)
            for index in range(_length(longest)):
                t, y, x = (at + index * by for at, by in zip(corner, step, strict=True))
                order.append((t * height + y) * width + x)
        else:
            boxes += reversed(_parts(corner, a, b, c))
    return torch.tensor(order)


def _parts(start: Vector, a: Vector, b: Vector, c: Vector) -> list[Box]:
    """Cut a box into boxes that the curve passes one after the other.

    Args:
        start: the corner where the curve enters.
        a: edge along which it leaves.
        b: another edge.
        c: the third.

    Returns:
        (start, a, b, c) of each.
    """
    long, wide, deep = _length(a), _length(b), _length(c)
    half_a, half_b, half_c = _half(a), _half(b), _half(c)
    rest_a, rest_b, rest_c = _less(a, half_a), _less(b, half_b), _less(c, half_c)
    last_a, last_b, last_c = _less(a, _unit(a)), _less(half_b, _unit(b)), _less(half_c, _unit(c))
    end_c = _less(c, _unit(c))
    back_a, back_b, back_c = (_less((0, 0, 0), edge) for edge in (rest_a, half_b, half_c))
    if 2 * long > 3 * wide and 2 * long > 3 * deep:  # a stick: two halves
        return [(start, half_a, b, c), (_plus(start, half_a), rest_a, b, c)]
    if 3 * wide > 4 * deep:  # a slab: the plane's Hilbert curve in a and b
        return [
            (start, half_b, c, half_a),
            (_plus(start, half_b), a, rest_b, c),
            (_plus(start, last_a, last_b), back_b, c, back_a),
        ]
    if 3 * deep > 4 * wide:  # the same in a and c
        return [
            (start, half_c, half_a, b),
            (_plus(start, half_c), a, b, rest_c),
            (_plus(start, last_a, last_c), back_c, back_a, b),
        ]
    return [
        (start, half_b, half_c, half_a),
        (_plus(start, half_b), c, half_a, rest_b),
        (_plus(start, last_b, end_c), a, back_b, _less((0, 0, 0), rest_c)),
        (_plus(start, last_a, half_b, end_c), _less((0, 0, 0), c), back_a, rest_b),
        (_plus(start, last_a, last_b), back_b, half_c, back_a),
    ]


def _half(edge: Vector) -> Vector:
    """Half of an edge, rounded so that it is even if it can be: odd edges cost diagonal steps."""
    x, y, z = (int(value / 2) for value in edge)
    half = (x, y, z)
    return _plus(half, _unit(edge)) if _length(half) % 2 and _length(edge) > 2 else half


def _length(edge: Vector) -> int:
    return abs(sum(edge))  # edges lie along an axis


def _unit(edge: Vector) -> Vector:
    x, y, z = ((value > 0) - (value < 0) for value in edge)
    return x, y, z


def _plus(*vectors: Vector) -> Vector:
    x, y, z = (sum(values) for values in zip(*vectors, strict=True))
    return x, y, z


def _less(first: Vector, second: Vector) -> Vector:
    x, y, z = (one - other for one, other in zip(first, second, strict=True))
    return x, y, z


def morton_order(grid: tuple[int, int, int]) -> Tensor:
    """The tokens along a Z curve, columns in the fastest bits; simple, to compare with.

    Args:
        grid: tokens in time, height and width.

    Returns:
        [N] int64, as `hilbert_order`.
    """
    index = torch.arange(grid[0] * grid[1] * grid[2])
    plane = grid[1] * grid[2]
    coordinates = (index % grid[2], index % plane // grid[2], index // plane)
    code = torch.zeros_like(index)
    for bit in range(_BITS):
        for lane, values in enumerate(coordinates):
            code |= (values >> bit & 1) << (3 * bit + lane)
    return code.argsort()
