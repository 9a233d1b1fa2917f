"""What the parameters are before any training: a memory of what was read, in the items' space, that can be asked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import machines
from rmjax.layers import recurrent
from rmjax.layers.attention import MultiHeadAttention
from rmjax.layers.transformer import Block
from rmjax.metrics import auc
from rmjax.optim import make_optimizer
from rmjax.reason import heads, multihop

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def test_a_gru_with_a_timescale_is_a_leaky_average():
    params = recurrent.init_gru(KEY, 8, 8, timescale=20)
    x, h = 0.01 * normal(30, 8), np.zeros(8)  # small: where tanh is the identity
    expected = np.zeros(8)
    for step in x:
        h = recurrent.gru(params, h, recurrent.gru_input(params, step))
        expected = 0.95 * expected + 0.05 * step
    np.testing.assert_allclose(h, expected, atol=2e-5)
    with pytest.raises(ValueError, match="inputs as wide as the state, got 8 and 4"):
        recurrent.init_gru(KEY, 8, 4, timescale=20)


def test_without_one_it_forgets_within_a_few_steps():
    params = recurrent.init_gru(KEY, 8, 8)
    one, two = jnp.zeros(8), jnp.ones(8)
    for step in normal(20, 8):
        gates = recurrent.gru_input(params, step)
        one, two = recurrent.gru(params, one, gates), recurrent.gru(params, two, gates)
    np.testing.assert_allclose(one, two, atol=1e-3)


def test_attention_returns_an_average_of_what_it_attends_to():
    x, memory = normal(2, 3, 8), np.broadcast_to(normal(2, 1, 8), (2, 5, 8))
    out, _ = MultiHeadAttention(2).init_with_output(KEY, x, memory, np.ones((2, 5), bool))
    np.testing.assert_allclose(out, memory[:, :3], atol=1e-6)


def test_the_feed_forward_part_of_a_layer_adds_nothing():
    x, nowhere = normal(2, 3, 4, 8), np.zeros((2, 3, 4), bool)
    out, _ = Block(2).init_with_output(KEY, x, nowhere)
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("hops", [1, 2])
def test_a_reader_returns_what_it_found(hops):
    params = multihop.init(KEY, 8, 8, hops)
    slots = np.broadcast_to(normal(2, 1, 8), (2, 5, 8))
    answers, _ = multihop.multihop(params, normal(2, 3, 8), slots, np.ones((2, 5), bool))
    np.testing.assert_allclose(answers, slots[:, :3], atol=1e-6)


def test_the_head_prefers_what_points_the_same_way():
    params = heads.init_click(KEY, 16, 16, 16)
    features, query = normal(1, 2000, 16), normal(1, 2000, 16)
    match = (features * query).sum(-1) > 0
    assert auc(heads.click(params, features, query), match.astype(int)) > 0.9


def test_a_memory_tells_what_was_read_from_what_was_not():
    """Of 50 items a stream holds ten, in any segment: with no training at all they are told from the others."""
    machine = machines.make("rehearsal", 50, dim=32, slots=8, layers=1, segment_length=10, timescale=10)
    params = machine.init(KEY)
    chosen = np.argsort(RNG.random((64, 50)), 1)
    items = np.take_along_axis(chosen[:, :10], RNG.integers(0, 10, (64, 200)), 1).reshape(64, 20, 10)
    memory = machines.memorize(machine, params, items, np.ones(items.shape, bool)).memory
    query, asked = chosen[:, :20], np.ones((64, 20), bool)
    answers = heads.click(
        heads.init_click(KEY, 32, 32, 32), machine.read(params, memory, query, asked), machine.embed(params, query)
    )
    assert auc(answers, np.broadcast_to(np.arange(20) < 10, (64, 20)).astype(int)) > 0.8


def test_the_rate_falls_to_zero_by_half_a_cosine():
    optimizer = make_optimizer(0.1, 5.0, decay_steps=10)
    params, sizes = jnp.zeros(1), []
    state = optimizer.init(params)
    for _ in range(11):
        updates, state = optimizer.update(jnp.ones(1), state, params)
        sizes.append(-float(updates[0]))  # Adam's step on a constant gradient is the rate
    np.testing.assert_allclose(sizes, 0.05 * (1 + np.cos(np.pi * np.arange(11) / 10)), atol=1e-4)
    flat = make_optimizer(0.1, 5.0)
    updates, _ = flat.update(jnp.ones(1), flat.init(params), params)
    np.testing.assert_allclose(-updates, 0.1, rtol=1e-4)
