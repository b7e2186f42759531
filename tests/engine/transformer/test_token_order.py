"""Orders of the tokens: every token once, and neighbours together."""

import random

import pytest
import torch
from comfyui_skyreels.skyreels.transformer.token_order import hilbert_order, morton_order


def coordinates(order, grid):
    _, height, width = grid
    plane = height * width
    return torch.stack([order // plane, order % plane // width, order % width], dim=1)


def spreads(order, grid):
    """Root mean square distance of the tokens of each whole block of 64 to their centre."""
    places = coordinates(order, grid).float()
    blocks = places[: len(places) // 64 * 64].view(-1, 64, 3)
    centred = blocks - blocks.mean(dim=1, keepdim=True)
    return centred.square().sum(dim=2).mean(dim=1).sqrt()


@pytest.mark.parametrize("order_of", [hilbert_order, morton_order])
def test_every_token_is_there_once(order_of):
    numbers = random.Random(0)
    grids = [(1, 1, 1), (1, 45, 45), (25, 1, 60), (13, 34, 1), (1, 1, 64)]
    grids += [tuple(numbers.randint(1, 12) for _ in range(3)) for _ in range(200)]
    for grid in grids:
        order = order_of(grid)
        count = grid[0] * grid[1] * grid[2]
        assert torch.equal(order.sort().values, torch.arange(count)), grid


@pytest.mark.parametrize("grid", [(4, 8, 16), (9, 12, 12), (13, 8, 6)])
def test_each_step_of_the_curve_goes_to_a_neighbour(grid):
    places = coordinates(hilbert_order(grid), grid)
    steps = places.diff(dim=0).abs()
    assert steps.max() == 1  # diagonal at most
    share = (steps.sum(dim=1) > 1).float().mean()
    assert share <= 0.02 and (share == 0 or any(size % 2 for size in grid))


@pytest.mark.parametrize("grid", [(25, 34, 60), (13, 34, 60)])
def test_blocks_are_lumps_at_the_sizes_of_the_product(grid):
    curve, raster = (spreads(order, grid) for order in (
        hilbert_order(grid), torch.arange(grid[0] * grid[1] * grid[2])
    ))  # fmt: skip
    simple = spreads(morton_order(grid), grid)
    assert curve.quantile(0.99) <= 3.0 and curve.quantile(0.99) <= simple.quantile(0.99)
    assert curve.mean() <= 0.14 * raster.mean()


def test_what_is_returned_may_be_written_to():
    hilbert_order((3, 4, 5)).zero_()
    assert hilbert_order((3, 4, 5)).sum() == 59 * 30
