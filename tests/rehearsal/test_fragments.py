"""Laws of choosing, masking and replacing fragments, over many random rows at once."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.rehearsal import fragments
from tests.small import keys

ROWS, T, N = 200, 9, 7
RNG = np.random.default_rng(0)


def scores_and_valid():
    """Draws streams of 0 to T segments, with holes."""
    valid = (RNG.random((ROWS, T)) < 0.8) & (np.arange(T) < RNG.integers(0, T + 1, (ROWS, 1)))
    return RNG.normal(size=(ROWS, T)).astype(np.float32), valid


def largest(scores, among, count):
    return set(among[np.argsort(-scores[among])][:count].tolist())


@pytest.mark.parametrize("count", [1, 2, 5, 6, 12])
@pytest.mark.parametrize("halves", [True, False])
def test_select_takes_the_largest_of_each_half_of_the_valid_segments(count, halves):
    scores, valid = scores_and_valid()
    select = jax.jit(fragments.select, static_argnums=(2, 3))
    indices, exists = select(scores, valid, count, halves)
    chex.assert_shape((indices, exists), (ROWS, count))
    for row in range(ROWS):
        places = np.flatnonzero(valid[row])
        middle = -(-len(places) // 2)
        pools = [(places, count)]
        if halves:
            pools = [(places[:middle], -(-count // 2)), (places[middle:], count // 2)]
        expected = set().union(*(largest(scores[row], pool, k) for pool, k in pools))
        chosen = np.asarray(indices[row])[np.asarray(exists[row])].tolist()
        assert set(chosen) == expected and len(chosen) == len(expected)
    assert (indices >= 0).all() and (indices < T).all()


@functools.cache
def jitted(mask_ratio=0.5, replace_ratio=0.5):
    ratios = {"mask_ratio": mask_ratio, "replace_ratio": replace_ratio}
    return jax.jit(functools.partial(fragments.build, **ratios))


def case():
    """Draws fragments of 0 to N items, some of them missing.

    Items are below 100, negatives from 100 on.
    """
    scores, valid = scores_and_valid()
    items = RNG.integers(0, 100, (ROWS, T, N)).astype(np.int32)
    mask = (RNG.random((ROWS, T, N)) < RNG.random((ROWS, T, 1)) * 1.2) & valid[..., None]
    chosen = fragments.select(scores, mask.any(-1), 6)
    others = RNG.integers(100, 200, (ROWS, 8)).astype(np.int32)
    return items, mask, chosen, others, np.arange(8) < RNG.integers(1, 9, (ROWS, 1))


def built(*data, **ratios):
    cut = jitted(**ratios)(keys(ROWS), *data)
    return jax.tree.map(np.asarray, cut)


@pytest.mark.parametrize("ratio", [0.5, 0.15, 0.8])
def test_the_ratio_sets_the_number_of_masked_items_at_least_one(ratio):
    items, mask, chosen, *others = case()
    cut = built(items, mask, chosen, *others, mask_ratio=ratio)
    size = cut.mask.sum(-1)
    assert (cut.hidden.sum(-1) == np.where(size, np.maximum(np.round(ratio * size), 1), 0)).all()
    assert not (cut.hidden & ~cut.mask).any()
    at = np.zeros_like(cut.hidden)
    np.put_along_axis(at, cut.hidden_at, cut.hidden_mask, -1)
    assert (at == cut.hidden).all()


def test_a_fragment_holds_its_segment_and_a_missing_fragment_is_empty():
    items, mask, (indices, exists), *others = case()
    cut = built(items, mask, (indices, exists), *others)
    row = np.arange(ROWS)[:, None]
    assert (cut.items == items[row, indices]).all()
    assert (cut.mask == (mask[row, indices] & np.asarray(exists)[..., None])).all()
    missing = ~np.asarray(exists)
    assert missing.any()
    for name in ("hidden", "hidden_mask", "pair"):
        assert not getattr(cut, name)[missing].any()


def test_only_unmasked_items_are_replaced_by_valid_negatives():
    items, mask, chosen, others, others_mask = case()
    cut = built(items, mask, chosen, others, others_mask)
    replaced, shown = cut.negative != cut.items, cut.mask & ~cut.hidden
    assert not (replaced & ~shown).any()
    count = shown.sum(-1)
    assert (replaced.sum(-1) == np.where(count, np.maximum(np.round(0.5 * count), 1), 0)).all()
    for row in range(ROWS):
        assert set(cut.negative[row][replaced[row]]) <= set(others[row][others_mask[row]])
    assert (cut.pair == replaced.any(-1)).all() and cut.pair.any() and not cut.pair.all()


def test_a_pair_needs_an_item_that_differs():
    items, mask, chosen, others, others_mask = case()
    equal, none = np.full_like(others, 7), np.zeros_like(others_mask)
    for negatives, negatives_mask in ((equal, others_mask), (others, none)):
        cut = built(np.full_like(items, 7), mask, chosen, negatives, negatives_mask)
        assert not cut.pair.any() and (cut.negative == 7).all()


def test_a_single_item_is_masked_and_gives_no_pair():
    items, mask, chosen, *others = case()
    cut = built(items, mask & (np.cumsum(mask, -1) == 1), chosen, *others)
    assert (cut.hidden == cut.mask).all() and cut.hidden.any() and not cut.pair.any()


def test_rows_draw_from_their_own_key_alone():
    data = case()
    cut = built(*data)
    order = RNG.permutation(ROWS)
    moved = jitted()(keys(ROWS)[order], *jax.tree.map(lambda x: x[order], data))
    chex.assert_trees_all_equal(moved, jax.tree.map(lambda x: x[order], cut))
    others = jax.tree.map(lambda x, y: jnp.concatenate([x[:1], y[1:]]), data, case())
    beside = jitted()(jnp.concatenate([keys(ROWS)[:1], keys(ROWS, 1)[1:]]), *others)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[0], tree) for tree in (beside, cut)))


def test_every_item_is_masked_and_replaced_and_every_negative_drawn_equally_often():
    items, mask = np.zeros((4000, 1, 8), np.int32), np.ones((4000, 1, 8), bool)
    negative = np.tile(np.arange(1, 5, dtype=np.int32), (4000, 1))
    chosen = np.zeros((4000, 1), np.int32), np.ones((4000, 1), bool)
    cut = jitted()(keys(4000), items, mask, chosen, negative, negative > 0)
    negatives = [(1 / 16, cut.negative == i) for i in range(1, 5)]
    for rate, hits in ((0.5, cut.hidden), (0.25, cut.negative > 0), *negatives):
        deviation = np.sqrt(rate * (1 - rate) / 4000)
        np.testing.assert_allclose(hits.mean((0, 1)), rate, atol=5 * deviation)
