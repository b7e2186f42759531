"""Sparse attention in plain torch: what it equals, and how its error depends on its parts."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from comfyui_skyreels.skyreels.kernels import sparse
from comfyui_skyreels.skyreels.transformer.token_order import hilbert_order
from support.heads import GRID, HEADS, TEXT, draw_head


def drawn(image: int, text: int, *, heads=2, width=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, 1, heads, image + text, width, generator=generator, dtype=dtype)
    query, key, value = qkv
    return query * 1.5, key + torch.randn(width, generator=generator, dtype=dtype), value


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("text", [0, 1, 8, 60, 256])
@pytest.mark.parametrize("rest", [0, 1, 56, 63])
@pytest.mark.parametrize("tail", sparse.TAILS)
def test_with_every_block_exact_it_is_attention(text, rest, tail):
    query, key, value = drawn(192 + rest, text)
    exact = sparse.route(query, key, -math.inf, 3)
    assert exact.all() and exact.shape == (2, 3, 3)
    got = sparse.attend(query, key, value, sparse.pool(query, key, value), exact, tail)
    expected = F.scaled_dot_product_attention(query, key, value)
    assert (got - expected).abs().max() <= 1e-12


def test_a_skipped_block_is_one_term_of_the_softmax_as_written():
    query, key, value = drawn(4 * 64, 5, heads=1)
    pooled = sparse.pool(query, key, value)
    exact = torch.eye(4, dtype=torch.bool)[None]
    got = {tail: sparse.attend(query, key, value, pooled, exact, tail) for tail in sparse.TAILS}
    row, width = 70, 16  # of block 1
    q, k, v = query[0, 0, row], key[0, 0], value[0, 0]
    centre = torch.stack([block.mean(dim=0) for block in k.split(64)]).mean(dim=0)
    for tail, out in got.items():
        number = torch.zeros(width, dtype=torch.float64)
        total = 0.0
        for block, (keys, values) in enumerate(zip(k.split(64), v.split(64), strict=True)):
            if block in (1, 4):  # its own, and the text
                weights = ((keys - centre) @ q / 4).exp()
                number, total = number + weights @ values, total + weights.sum()
            elif tail != "none":
                one = query[0, 0, 64:128].mean(dim=0) if tail == "block" else q
                score = (keys.mean(dim=0) - centre) @ one / 4
                if tail == "variance":
                    spread = keys.var(dim=0, correction=0)
                    score = score + (q.square() @ spread / 32).clamp(max=4.0)
                number, total = number + score.exp() * values.sum(dim=0), total + 64 * score.exp()
        torch.testing.assert_close(out[0, 0, row], number / total, atol=1e-12, rtol=0)


def test_blocks_are_chosen_by_the_log_sum_exp_of_their_parts_as_written():
    query, key, _ = drawn(6 * 64 + 9, 7, heads=1)
    got = sparse.route(query, key, 0.5, 6)[0]
    parts_q, parts_k = (
        [part.mean(dim=0) for part in x[0, 0, : 6 * 64].split(16)] for x in (query, key)
    )
    centre = torch.stack(parts_k).mean(dim=0)
    for row in range(6):
        scores = []
        for column in range(6):
            pairs = itertools.product(
                parts_q[4 * row : 4 * row + 4], parts_k[4 * column : 4 * column + 4]
            )
            scores.append(
                torch.stack([(q @ (k - centre)) / 4 for q, k in pairs]).logsumexp(dim=0).item()
            )
        mean = sum(scores) / 6
        spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / 6 + 1e-6)
        expected = [
            score > mean + 0.5 * spread or abs(row - column) <= 1
            for column, score in enumerate(scores)
        ]
        assert got[row].tolist() == expected


def test_the_choice_knows_nothing_of_the_text_and_of_other_heads():
    query, key, _ = drawn(8 * 64 + 3, 60, heads=6)
    chosen = sparse.route(query, key, 0.5, 8)
    assert 0.3 < chosen.double().mean() < 0.9
    assert torch.equal(chosen, sparse.route(query[:, :, :520], key[:, :, :520], 0.5, 8))
    for heads in (1, 2, 3):
        parts = zip(query.split(heads, dim=1), key.split(heads, dim=1), strict=True)
        assert torch.equal(chosen, torch.cat([sparse.route(q, k, 0.5, 8) for q, k in parts]))


def test_text_is_exact_for_every_query_and_asks_every_key():
    query, key, value = drawn(8 * 64 + 40, 30)
    exact = sparse.route(query, key, 2.0, 8)
    assert exact.double().mean() < 0.6

    def outputs(value):
        dense = F.scaled_dot_product_attention(query, key, value)
        pooled = sparse.pool(query, key, value)
        return sparse.attend(query, key, value, pooled, exact, "none"), dense

    got, dense = outputs(value)
    assert (got - dense)[:, :, 8 * 64 :].abs().max() <= 1e-12
    changed = value.clone()
    changed[:, :, -1] += 1.0  # of one text key: each row shows the weight of that key
    with_change, dense_change = outputs(changed)
    weight, expected = (with_change - got).mean(-1), (dense_change - dense).mean(-1)
    # the same key has the same score in both; what it is divided by is larger where all is exact
    assert (weight >= expected - 1e-12).all() and (weight > 0).all()
    pooled = sparse.pool(query, key, value)
    everything = torch.ones_like(exact)
    whole = [sparse.attend(query, key, each, pooled, everything) for each in (value, changed)]
    assert ((whole[1] - whole[0]).mean(-1) - expected).abs().max() <= 1e-12


def test_keys_that_are_all_alike_choose_their_neighbours_alone():
    query, _, value = drawn(6 * 64, 0)
    key = torch.ones_like(query)
    exact = sparse.route(query, key, 0.85, 6)
    index = torch.arange(6)
    assert torch.equal(exact[0], (index[:, None] - index).abs() <= 1)
    got = sparse.attend(query, key, value, sparse.pool(query, key, value), exact)
    expected = value.mean(dim=2, keepdim=True).expand_as(value)  # pooling loses nothing here
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_a_key_far_from_its_block_stays_finite():
    query, key, value = drawn(6 * 64, 0, dtype=torch.float32)
    key[:, :, 100] = 1e4
    got = sparse.sparse_attention(query, key, value, 0.85, 6).out
    assert got.isfinite().all()


@pytest.mark.parametrize("count", [1, 3, 8, 13, 16])
def test_bits_are_as_many_as_blocks(count):
    exact = torch.rand(2, count, count, generator=torch.Generator().manual_seed(count)) > 0.5
    packed = sparse.pack(exact)
    assert packed.shape == (2, count, -(-count // 8)) and packed.dtype == torch.uint8
    assert torch.equal(sparse.unpack(packed), exact)


def test_what_one_branch_chose_serves_another_with_more_text():
    query, key, value = drawn(8 * 64 + 20, 60)
    first = sparse.sparse_attention(query[:, :, :540], key[:, :, :540], value[:, :, :540], 0.5, 8)
    assert torch.equal(first.counts, sparse.unpack(first.exact).sum(dim=2))
    second = sparse.sparse_attention(query, key, value, math.nan, 8, first.exact)
    assert torch.equal(second.exact, first.exact)
    assert torch.equal(second.out, sparse.sparse_attention(query, key, value, 0.5, 8).out)


@pytest.mark.parametrize(("image", "text"), [(1000, 60), (960, 7)])
def test_it_is_comfy_kitchens_with_its_rule_and_its_tail(image, text):
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    import comfy_kitchen.backends.eager.sol_attn  # noqa: F401 - a function hides the module

    theirs = sys.modules["comfy_kitchen.backends.eager.sol_attn"].sol_attn
    query, key, value = drawn(image, text, heads=3, width=128, dtype=torch.float32)
    count, blocks = image // 64, sparse.num_blocks(image + text)
    pooled = sparse.pool(query, key, value)
    chosen = sparse.route_by_means(pooled, 0.85, count)
    got = sparse.attend(query, key, value, pooled, chosen, "block")
    tokens_first = (x.transpose(1, 2) for x in (query, key, value))
    texts = [count, blocks]
    expected = theirs(*tokens_first, tau=0.85, sink_blocks=texts, sink_q=texts).transpose(1, 2)
    assert relative(got, expected) <= 1e-3
    # with the identity for values an output row is the weight of each key, none of which is
    # pooled without its tail: so the lists themselves are compared
    for first in range(0, count * 64, 128):
        eye = torch.zeros_like(value)
        eye[:, :, first : first + 128] = torch.eye(128)[: image + text - first]
        alone = theirs(
            *(x.transpose(1, 2) for x in (query, key, eye)), tau=0.85, sink_blocks=texts,
            sink_q=texts, tail=False,
        ).transpose(1, 2)  # fmt: skip
        seen = alone[0, :, : count * 64, ::64].unflatten(1, (count, 64))[:, :, 0] > 0
        for offset in range(2):
            block = first // 64 + offset
            if block < count:
                assert torch.equal(seen[:, :, offset], chosen[:, :, block])


# --- error against density, on six kinds of head -------------------------------------------------


@pytest.fixture(scope="module")
def heads():
    parts = zip(*(draw_head(kind) for kind in HEADS), strict=True)
    query, key, value = (torch.stack(part)[None] for part in parts)
    return query, key, value, F.scaled_dot_product_attention(query, key, value)


def judged(monkeypatch, heads, order, beta, tails=sparse.TAILS):
    """Density, and for each tail the mean relative error of image rows of the six heads.

    The rows are every third run of blocks that are worked on together.
    """
    seen, attend_rows = set(), sparse._attend_rows

    def every_third(q, head, exact, blocks, tail):
        if blocks.start // sparse._CHUNK % 3:
            return torch.zeros_like(q)
        seen.update(range(blocks.start * 64, blocks.stop * 64))
        return attend_rows(q, head, exact, blocks, tail)

    image = math.prod(GRID)
    place = torch.cat([order, torch.arange(image, image + TEXT)])
    query, key, value, dense = (x[:, :, place] for x in heads)
    count, blocks = image // 64, sparse.num_blocks(image + TEXT)
    pooled, chosen = sparse.pool(query, key, value), sparse.route(query, key, beta, count)
    density = (chosen.sum(dim=2).double().mean().item() + blocks - count) / blocks
    errors = {}
    for tail in tails:
        with monkeypatch.context() as patch:
            patch.setattr(sparse, "_attend_rows", every_third)
            got = sparse.attend(query, key, value, pooled, chosen, tail)
        rows = dense[0, :, sorted(seen)]
        difference = got[0, :, sorted(seen)] - rows
        errors[tail] = (difference.norm(dim=(1, 2)) / rows.norm(dim=(1, 2))).mean().item()
    return density, errors


def test_order_tail_and_density_each_lower_the_error(heads, monkeypatch):
    density, errors = judged(monkeypatch, heads, hilbert_order(GRID), 0.62)
    assert 0.24 <= density <= 0.26
    assert errors["variance"] <= 0.032
    assert errors["rows"] <= 0.045
    assert 0.1 <= errors["none"] <= 0.2
    assert errors["rows"] <= 0.4 * errors["none"]
    assert errors["variance"] < errors["rows"] < errors["block"] < errors["none"]
    raster_density, raster = judged(
        monkeypatch, heads, torch.arange(math.prod(GRID)), 0.62, ["variance"]
    )
    assert raster_density > density  # it has fewer good blocks, so more pass the threshold
    assert errors["variance"] <= 0.6 * raster["variance"]


def test_more_blocks_leave_less_error(heads, monkeypatch):
    two = [x[:, :2] for x in heads]
    found = [
        judged(monkeypatch, two, hilbert_order(GRID), beta, ["variance"])
        for beta in (1.1, 0.6, 0.0)
    ]
    densities, errors = zip(*((density, each["variance"]) for density, each in found), strict=True)
    assert list(densities) == sorted(densities)
    assert list(errors) == sorted(errors, reverse=True)
