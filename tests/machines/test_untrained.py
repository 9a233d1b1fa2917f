"""Parameters before any training.

They already remember items, keep them in the space of the items, and answer questions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import machines, schedules
from rmjax.evaluation.metrics import auc
from rmjax.layers import recurrent
from rmjax.layers.attention import MultiHeadAttention, additive_scores
from rmjax.layers.transformer import Block
from rmjax.reason import heads
from rmjax.reason import hops as multihop
from rmjax.run.optimizer import make_optimizer
from rmjax.types import Context

KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_gru_with_a_timescale_is_a_leaky_average():
    params = recurrent.init_gru(KEY, 8, 8, timescale=20)
    x, h = 0.01 * normal(30, 8), np.zeros(8)  # so small that tanh is the identity
    expected = np.zeros(8)
    for step in x:
        h = recurrent.gru(params, h, recurrent.gru_input(params, step))
        expected = 0.95 * expected + 0.05 * step
    np.testing.assert_allclose(h, expected, atol=2e-5)
    with pytest.raises(ValueError, match="timescale needs inputs == hidden, got 8 and 4"):
        recurrent.init_gru(KEY, 8, 4, timescale=20)


def test_a_gru_without_a_timescale_forgets():
    params = recurrent.init_gru(KEY, 8, 8)
    one, two = jnp.zeros(8), jnp.ones(8)
    for step in normal(40, 8):
        gates = recurrent.gru_input(params, step)
        one, two = recurrent.gru(params, one, gates), recurrent.gru(params, two, gates)
    np.testing.assert_allclose(one, two, atol=1e-3)


def test_attention_returns_an_average_of_what_it_attends_to():
    """With one token every head returns that token.

    A second token pulls every head some way to itself.
    """
    x, memory, mask = normal(2, 3, 8), normal(2, 5, 8, seed=1), np.arange(5) == [[2], [4]]
    attention = MultiHeadAttention(2)
    params = attention.init(KEY, x, memory, mask)
    alone = attention.apply(params, x, memory, mask)
    np.testing.assert_allclose(alone, memory[[0, 1], [2, 4]][:, None].repeat(3, 1), atol=1e-6)
    both = attention.apply(params, x, memory, mask | (np.arange(5) == 0))
    way = ((both - alone) / (memory[:, :1] - alone)).reshape(2, 3, 2, 4)
    assert (way > 0).all() and (way < 1).all()
    np.testing.assert_allclose(way, way[..., :1].repeat(4, -1), atol=1e-4)


def test_the_feed_forward_part_of_a_layer_adds_nothing():
    x, mask = normal(2, 3, 4, 8), np.zeros((2, 3, 4), bool)
    out, _ = Block(2).init_with_output(KEY, x, mask)
    np.testing.assert_array_equal(out, x)


def test_a_larger_item_scale_lets_the_item_decide_its_slot():
    """The part of the scores of Eq. 1 that is the same for all items shrinks."""

    def common(scale, seed):
        machine = machines.make("rehearsal", 20, dim=64, slots=20, layers=1, item_scale=scale)
        params = machine.init(jax.random.key(seed))
        _, projected = machine.encode(
            params, jnp.arange(20)[None, None], jnp.ones((1, 1, 20), bool)
        )
        w = params["attention"]
        scores = additive_scores(params["slots"] @ w["slot"], projected[0, 0], w["score"])
        scores -= scores.mean(0)  # a softmax over slots sees only the differences
        return float(scores.mean(1).var() / scores.var())

    for seed in range(3):
        assert common(3.0, seed) < 0.8 * common(1.0, seed)


@pytest.mark.parametrize("hops", [1, 2])
def test_an_untrained_reader_returns_the_weighted_slots(hops):
    params = multihop.init(KEY, 8, 8, Context(segment_length=1, hops=hops))
    slots = normal(2, 5, 8, seed=1)
    answers, weights = multihop.multihop(params, normal(2, 3, 8), slots, np.ones((2, 5), bool))
    assert np.ptp(weights, -1).min() > 0.01
    np.testing.assert_allclose(answers, weights @ slots, atol=1e-6)


def test_an_untrained_head_prefers_a_matching_query():
    params = heads.init_click(KEY, 16, 16, 16)
    features, query = normal(1, 2000, 16), normal(1, 2000, 16, seed=1)
    match = (features * query).sum(-1) > 0
    assert auc(heads.click(params, features, query), match.astype(int)) > 0.9


def test_an_untrained_memory_tells_seen_items_from_unseen_items():
    """A stream holds ten of 50 items, in any segment.

    Without any training the answers tell them from the others.
    """
    machine = machines.make(
        "rehearsal", 50, dim=32, slots=8, layers=1, segment_length=10, timescale=10
    )
    params = machine.init(KEY)
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((64, 50)), 1)
    items = np.take_along_axis(chosen[:, :10], rng.integers(0, 10, (64, 200)), 1).reshape(
        64, 20, 10
    )
    memory = machines.memorize(machine, params, items, np.ones(items.shape, bool)).memory
    query, asked = chosen[:, :20], np.ones((64, 20), bool)
    features = machine.embed(params, query)
    answers = heads.click(
        heads.init_click(KEY, 32, 32, 32), machine.read(params, memory, features, asked), features
    )
    assert auc(answers, np.broadcast_to(np.arange(20) < 10, (64, 20)).astype(int)) > 0.8


def test_the_learning_rate_falls_to_zero_along_half_a_cosine():
    optimizer = make_optimizer(0.1, 5.0, schedules.build("cosine", 10))
    params, sizes = jnp.zeros(1), []
    state = optimizer.init(params)
    for _ in range(11):
        updates, state = optimizer.update(jnp.ones(1), state, params)
        sizes.append(-float(updates[0]))  # Adam's step on a constant gradient is the rate
    np.testing.assert_allclose(sizes, 0.05 * (1 + np.cos(np.pi * np.arange(11) / 10)), atol=1e-4)
    flat = make_optimizer(0.1, 5.0)
    updates, _ = flat.update(jnp.ones(1), flat.init(params), params)
    np.testing.assert_allclose(-updates, 0.1, rtol=1e-4)
