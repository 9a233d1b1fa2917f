"""Ranks, best items and losses by blocks against scores of all items; sampled softmax."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.reason import ranking

B, Q, M, D, V, L = 3, 2, 5, 4, 37, 9


@functools.cache  # so that traced functions get concrete arrays
def model(seed: int = 0, coarse: bool = True):
    """Head, table, features and all scores; coarse numbers make many equal scores."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).round(0 if coarse else 6).astype(np.float32)
    head = {"project": jnp.asarray(draw(M, D)), "bias": jnp.asarray(draw(V))}
    table, features = jnp.asarray(draw(V, D)), jnp.asarray(draw(B, Q, M))
    wide = lambda x: np.asarray(x, np.float64)
    scores = wide(features) @ wide(head["project"]) * D**-0.5 @ wide(table).T + wide(head["bias"])
    return head, (lambda ids: table[ids]), features, scores


def streams(seed: int = 0):
    rng = np.random.default_rng(seed)
    items, mask = rng.integers(0, V, (B, L)), np.arange(L) < np.array([[9], [5], [0]])
    before = np.array([[3, 9], [0, 5], [0, 0]])
    target = rng.integers(0, V, (B, Q))
    target[0, 0] = items[0, 1]  # a target that was seen
    return items, mask, before, target


def own_scores(scores, target):
    return np.take_along_axis(scores, np.asarray(target)[..., None], -1)[..., 0]


@pytest.mark.parametrize("block", [0, 5, 36])
def test_ranks_are_the_places_after_sorting(block):
    head, embed_items, features, scores = model()
    items, mask, before, target = streams()

    @jax.jit
    def ranked():
        score = ranking.scorer(head, embed_items, features)
        seen = ranking.seen_before(jnp.asarray(items), jnp.asarray(mask), jnp.asarray(before))
        both = (ranking.nothing, seen)
        return [ranking.ranks(score, jnp.asarray(target), V, w, block) for w in both]

    every, unseen = ranked()
    for b in range(B):
        for q in range(Q):
            own = scores[b, q, target[b, q]]
            out = set(items[b, : before[b, q]][mask[b, : before[b, q]]])
            for rank, left in ((every, set()), (unseen, out)):
                others = np.array([v for v in range(V) if v != target[b, q] and v not in left])
                better = (scores[b, q, others] > own + 1e-9).sum()
                equal = (np.abs(scores[b, q, others] - own) < 1e-9).sum()
                assert rank[b, q] == 1 + better + equal / 2
    assert (every != np.floor(every)).any() and (every > unseen).any()


def test_a_target_that_is_no_item_has_no_rank_and_nan_stays_nan():
    head, embed_items, features, _ = model()
    target = jnp.array([[V, 1], [-1, 2], [3, 4]])
    ranked = jax.jit(
        lambda x: ranking.ranks(ranking.scorer(head, embed_items, x), target, V, block=5)
    )
    right = [[True, False], [True, False], [False, False]]
    np.testing.assert_array_equal(np.isinf(ranked(features)), right)
    wrong = ranked(features.at[0, 1].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(wrong), [[False, True], [False] * 2, [False] * 2])


@pytest.mark.parametrize("block", [0, 5])
@pytest.mark.parametrize("k", [6, V + 3])
def test_the_best_items_are_the_first_of_a_full_sort(block, k):
    head, embed_items, features, scores = model()
    exclude = np.array([[3, 4, 3], [0, -1, -1], [-1, -1, -1]])

    @jax.jit
    def best():
        score = ranking.scorer(head, embed_items, features)
        return ranking.top_k(score, k, V, ranking.listed(exclude, exclude >= 0), block)

    value, ids = map(np.asarray, best())
    for b in range(B):
        for q in range(Q):
            rows = [(-round(s, 6), v) for v, s in enumerate(scores[b, q]) if v not in exclude[b]]
            expected = [v for _, v in sorted(rows)][:k]
            assert ids[b, q].tolist() == expected + [-1] * (k - len(expected))
            np.testing.assert_allclose(value[b, q, : len(expected)], scores[b, q, expected], 1e-5)
            assert np.isneginf(value[b, q, len(expected) :]).all()


@pytest.mark.parametrize("block", [0, 5])
def test_the_full_loss_and_its_gradient_are_those_of_a_softmax(block):
    head, embed_items, features, scores = model(coarse=False)
    target = jnp.asarray(streams()[3])

    def loss(features):
        score = ranking.scorer(head, embed_items, features)
        own = ranking.score_one(head, embed_items, features, target)
        return (ranking.log_normaliser(score, V, B * Q, block) - own).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(features)
    own, total = own_scores(scores, target), np.exp(scores).sum(-1)
    assert value == pytest.approx((np.log(total) - own).sum(), rel=1e-5)
    probability = np.exp(scores) / total[..., None]
    table = np.asarray(embed_items(np.arange(V)), np.float64)
    items = np.einsum("bqv,vd->bqd", probability, table) - table[np.asarray(target)]
    expected = items * D**-0.5 @ np.asarray(head["project"], np.float64).T
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def sampled(bias, target, ids, log_probability):
    """The sampled loss [B, Q] and the scores of the targets."""
    head, embed_items, features, _ = model(coarse=False)
    head = head | {"bias": bias}
    score = ranking.scorer(head, embed_items, features)
    own = ranking.score_one(head, embed_items, features, target)
    return ranking.sampled_loss(own, target, score(ids), ids, log_probability), own


def test_drawing_every_item_once_gives_the_full_softmax():
    head, _, _, scores = model(coarse=False)
    target = jnp.asarray(streams()[3])
    uniform = jnp.full(V, -np.log(V), jnp.float32)
    loss = jax.jit(lambda: sampled(head["bias"], target, jnp.arange(V), uniform)[0])()
    expected = np.log(np.exp(scores).sum(-1)) - own_scores(scores, target)
    np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_the_sampled_normaliser_and_its_gradient_are_unbiased():
    """The mean over every possible draw, weighted by its probability, is that over all items."""
    head, _, _, scores = model(coarse=False)
    target = jnp.asarray(streams()[3])
    weights = np.random.default_rng(1).integers(1, 9, V)
    q = jnp.asarray(weights / weights.sum(), jnp.float32)

    def normaliser(bias, ids):
        loss, own = sampled(bias, target, ids, jnp.log(q)[ids])
        return jnp.exp(loss + own)

    def expected(bias):
        every = jax.vmap(lambda v: normaliser(bias, v[None]))(jnp.arange(V))
        return jnp.tensordot(q, every, 1)

    both = jax.jit(lambda bias: (expected(bias), jax.jacrev(expected)(bias)))
    mean, gradient = both(head["bias"])
    np.testing.assert_allclose(mean, np.exp(scores).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(gradient, np.exp(scores), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("popular", [False, True])
def test_draws_have_the_stated_probabilities(popular):
    weights = np.arange(1, V + 1) if popular else np.ones(V)
    cumulative = jnp.asarray(np.cumsum(weights), jnp.int32) if popular else None
    draw = jax.jit(lambda key: ranking.draw(key, 40_000, V, cumulative))
    ids, log_probability = draw(jax.random.key(0))
    q = weights / weights.sum()
    np.testing.assert_allclose(np.exp(log_probability), q[np.asarray(ids)], rtol=1e-5)
    share = np.bincount(ids, minlength=V) / 40_000
    assert (np.abs(share - q) < 5 * np.sqrt(q / 40_000)).all()
