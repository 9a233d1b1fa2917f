"""Memoria BERT: what holds of it as of every sequence model, and where its memory stands."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import memoria
from rmjax.models import bert, memoria_bert
from rmjax.models.scan import unroll
from tests.models.small import ENGRAMS, N, compiled, noisy, streams

B, T = 3, 6
KEY = jax.random.key(0)
SIZES = bert.Sizes(vocabulary=11, positions=N, dim=16, layers=3, heads=2)
MODEL = compiled(memoria_bert.make(SIZES, 2, ENGRAMS, memory_layer=1))
PLAIN = compiled(bert.make_plain(SIZES, 2))
PARAMS = noisy(MODEL.init)


@jax.jit
def scanned(params, state, tokens, mask, reset):
    each = lambda hidden, given: (hidden, MODEL.logits(params, hidden))
    return unroll(MODEL, params, state, tokens, mask, each, reset=reset)[:2]


def run(params, state, tokens, mask, reset=None):
    return scanned(
        params, state, tokens, mask, np.zeros(tokens.shape[:2], bool) if reset is None else reset
    )


def test_a_stream_may_come_in_parts_and_begin_anew():
    tokens, mask = streams(KEY, B, T)
    state, (hidden, logits) = run(PARAMS, MODEL.init_state(PARAMS, B), tokens, mask)
    between, (before, _) = run(PARAMS, MODEL.init_state(PARAMS, B), tokens[:, :3], mask[:, :3])
    after, (rest, _) = run(PARAMS, between, tokens[:, 3:], mask[:, 3:])
    np.testing.assert_allclose(np.concatenate([before, rest]), hidden, atol=1e-5)
    chex.assert_trees_all_close(after, state, atol=1e-5)
    assert logits.shape == (T, B, 2)
    reset = jnp.zeros((B, T), bool).at[1, 3].set(True)
    _, (anew, _) = run(PARAMS, MODEL.init_state(PARAMS, B), tokens, mask, reset)
    _, (fresh, _) = run(PARAMS, MODEL.init_state(PARAMS, B), tokens[:, 3:], mask[:, 3:])
    np.testing.assert_allclose(anew[3:, 1], fresh[:, 1], atol=1e-5)
    assert np.abs(anew[3:, 1] - hidden[3:, 1]).max() > 1e-3  # what was remembered mattered


def test_rows_are_independent_and_padding_is_inert():
    tokens, mask = streams(KEY, B, T)
    mask = mask.at[1, 2, 5:].set(False).at[2, 3].set(False)
    order = jnp.array([2, 0, 1])
    state, (hidden, _) = run(PARAMS, MODEL.init_state(PARAMS, B), tokens, mask)
    permuted, (others, _) = run(PARAMS, MODEL.init_state(PARAMS, B), tokens[order], mask[order])
    np.testing.assert_array_equal(others, hidden[:, order])
    chex.assert_trees_all_equal(permuted, jax.tree.map(lambda x: x[order], state))
    other = jnp.where(mask, tokens, (tokens + 1) % 11)
    _, (same, _) = run(PARAMS, MODEL.init_state(PARAMS, B), other, mask)
    valid = mask.swapaxes(0, 1)
    np.testing.assert_array_equal(same[valid], hidden[valid])
    _, kept, _ = MODEL.step(PARAMS, state, tokens[:, 0], jnp.zeros((B, N), bool))
    chex.assert_trees_all_equal(kept, state)


def test_layers_below_the_memory_are_those_of_bert():
    """Of a model whose memory adds nothing but its norm: output kernels are zero, and a normed row's norm is itself."""
    params = jax.tree.map(jnp.copy, MODEL.init(KEY))
    memory = params["layer_2"]["memory_attention"]
    memory["output"] = jax.tree.map(jnp.zeros_like, memory["output"])
    tokens, mask = streams(KEY, B, 2)
    _, (hidden, logits) = run(params, MODEL.init_state(params, B), tokens, mask)
    plain = {name: values for name, values in params.items() if name != "abstractor"}
    plain["layer_2"] = {
        name: values for name, values in params["layer_2"].items() if name != "memory_attention"
    }
    for t in range(2):
        expected, _, _ = PLAIN.step(plain, PLAIN.init_state(plain, B), tokens[:, t], mask[:, t])
        np.testing.assert_allclose(hidden[t], expected, atol=1e-4)
        np.testing.assert_allclose(logits[t], PLAIN.logits(plain, expected), atol=1e-4)


def test_engrams_are_of_the_segment_itself_and_are_stored_without_gradients():
    tokens, mask = streams(KEY, B, 3)
    state, _ = run(PARAMS, MODEL.init_state(PARAMS, B), tokens[:, :1], mask[:, :1])
    assert (
        (state.engrams.kind == memoria.SHORT_TERM).sum(1) == ENGRAMS.working
    ).all()  # after the first one already
    tokens = jnp.zeros_like(tokens).at[:, 1].set(1).at[:, 2].set(2)

    def last(table):
        params = PARAMS | {"embeddings": PARAMS["embeddings"] | {"word_embeddings": table}}
        return unroll(
            MODEL,
            params,
            MODEL.init_state(params, B),
            tokens,
            mask,
            lambda h, _: h,
            gradient_segments=0,
        )[1][-1, ..., 3].sum()

    moved = np.abs(jax.jit(jax.grad(last))(PARAMS["embeddings"]["word_embeddings"])).max(1) > 0
    assert moved[2] and not moved[:2].any()
    learns = jax.jit(jax.grad(lambda p: run(p, MODEL.init_state(p, B), tokens, mask)[1][1].sum()))(
        PARAMS
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(learns["abstractor"]["query"]))


def test_a_memory_layer_must_have_layers_above_it():
    with pytest.raises(
        ValueError, match=r"memory_layer must be one of 0 .. 1, below the last, got 2"
    ):
        memoria_bert.make(SIZES, 2, ENGRAMS, memory_layer=2)


def test_nothing_needs_ever_be_reminded():
    rules = dataclasses.replace(ENGRAMS, remind_short_term=0, remind_long_term=0)
    model = compiled(memoria_bert.make(SIZES, 2, rules, memory_layer=0))
    params = model.init(jax.random.key(0))
    tokens = jnp.ones((2, N), jnp.int32)
    hidden, _, _ = model.step(params, model.init_state(params, 2), tokens, tokens > 0)
    assert jnp.isfinite(hidden).all()
