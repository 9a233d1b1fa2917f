"""Memoria BERT: the laws of sequence models, and the place of the memory in the layers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import memoria
from rmjax.io.cost import flops
from rmjax.models import bert, memoria_bert
from rmjax.models.scan import truncated, unroll
from rmjax.tasks.sequences import Documents
from rmjax.types import Batch
from tests.models.small import ENGRAMS, N, compiled, noisy, streams

B, T = 3, 6
KEY = jax.random.key(0)
SIZES = bert.Sizes(vocabulary=11, positions=N, dim=16, layers=3, heads=2)
MODEL = compiled(memoria_bert.make(SIZES, 2, ENGRAMS, memory_layer=1))
PLAIN = compiled(bert.make_plain(SIZES, 2))
PARAMS = noisy(MODEL.init)


@jax.jit
def scanned(params, state, tokens, mask, reset):
    both = lambda hidden, _: (hidden, MODEL.logits(params, hidden))
    return unroll(MODEL, params, state, tokens, mask, both, reset=reset)[:2]


def run(params, state, tokens, mask, reset=None):
    reset = np.zeros(tokens.shape[:2], bool) if reset is None else reset
    return scanned(params, state, tokens, mask, reset)


def test_reading_in_parts_and_after_a_reset():
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
    assert np.abs(anew[3:, 1] - hidden[3:, 1]).max() > 1e-3  # the memory mattered


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
    """With output kernels of zero the memory adds only its norm, which keeps normed rows."""
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
    # The first segment already leaves engrams.
    assert ((state.engrams.kind == memoria.SHORT_TERM).sum(1) == ENGRAMS.working).all()
    tokens = jnp.zeros_like(tokens).at[:, 1].set(1).at[:, 2].set(2)

    def last(table):
        params = PARAMS | {"embeddings": PARAMS["embeddings"] | {"word_embeddings": table}}
        state, hidden = MODEL.init_state(params, B), lambda hidden, _: hidden
        read = unroll(MODEL, params, state, tokens, mask, hidden, gradient_segments=0)
        return read[1][-1, ..., 3].sum()

    moved = np.abs(jax.jit(jax.grad(last))(PARAMS["embeddings"]["word_embeddings"])).max(1) > 0
    assert moved[2] and not moved[:2].any()
    loss = lambda p: run(p, MODEL.init_state(p, B), tokens, mask)[1][1].sum()
    learns = jax.jit(jax.grad(loss))(PARAMS)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(learns["abstractor"]["query"]))


def test_a_step_on_documents_does_not_depend_on_their_padding():
    """Both ways of reading have the same loss and gradients, with dropout, at every padding."""
    sizes = dataclasses.replace(SIZES, dropout=0.3, layers=2)
    model = memoria_bert.make(sizes, 2, ENGRAMS, memory_layer=0)
    unrolled, truncated = Documents(model._replace(has_loss=True)), Documents(model)
    params = noisy(model.init)
    mask = np.arange(4 * N) < np.array([4 * N, 2 * N - 3, N])[:, None]
    rng, ids = np.random.default_rng(0), np.arange(B, dtype=np.int32)
    one = np.zeros((B, 1), np.int32)
    batch = Batch(
        items=rng.integers(0, 11, (B, 4, N)).astype(np.int32),
        item_mask=mask.reshape(B, 4, N),
        query=one,
        query_mask=one == 0,
        target=np.array([[0], [1], [1]], np.int32),
        negative_items=one,
        negative_mask=one > 0,
        example_id=ids,
    )
    pad = lambda x: np.pad(x, ((0, 0), (0, 3), (0, 0)))
    longer = dataclasses.replace(batch, items=pad(batch.items), item_mask=pad(batch.item_mask))

    def loss(params, task, batch):
        total, count = task.losses(params, (), (), batch, KEY)[0]["reason"][1]
        return total / count

    value = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = value(params, unrolled, batch)
    chex.assert_trees_all_close(value(params, truncated, longer), expected, rtol=1e-5, atol=1e-6)
    for task in (unrolled, truncated):  # without gradients, and over segments to skip
        alone = jax.jit(loss, static_argnums=1)(params, task, longer)
        np.testing.assert_allclose(alone, expected[0], rtol=1e-6)


def test_four_segments_cost_four_times_as_much_as_one():
    """The loop of `truncated` ends at the last token, but its cost is counted."""
    tokens, mask = streams(KEY, B, 4)

    def cost(segments):
        read = tokens[:, :segments], mask[:, :segments]
        loss = lambda params, hidden, _: hidden.sum()
        total = lambda p: truncated(MODEL, p, MODEL.init_state(p, B), *read, loss)
        return [flops(total, PARAMS), flops(jax.grad(total), PARAMS)]

    assert cost(4) == pytest.approx(np.multiply(4, cost(1)), rel=0.02)


def test_a_memory_layer_must_have_layers_above_it():
    cause = r"memory_layer must be one of 0 .. 1, below the last, got 2"
    with pytest.raises(ValueError, match=cause):
        memoria_bert.make(SIZES, 2, ENGRAMS, memory_layer=2)


def test_a_model_that_reminds_of_no_engrams():
    rules = dataclasses.replace(ENGRAMS, remind_short_term=0, remind_long_term=0)
    model = compiled(memoria_bert.make(SIZES, 2, rules, memory_layer=0))
    params = model.init(jax.random.key(0))
    tokens = jnp.ones((2, N), jnp.int32)
    hidden, _, _ = model.step(params, model.init_state(params, 2), tokens, tokens > 0)
    assert jnp.isfinite(hidden).all()
